"""Texts, questions and answers go on with less at once when memory runs out, from the last good state, and say so."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from memory_verbs import VERBS, differences, read
from reading import ids_of
from running_out import ERRORS, Layered, running_out
from tiny_models import Stateless

from pytest_lmeval import Choices, Generate, Task, _options, as_model, policy_for
from pytest_lmeval._session import Session
from pytest_lmeval.engine import Engine, Request, _memory, _state_rows
from pytest_lmeval.errors import OutOfMemory
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models import _free_memory, _hf_checkpoint
from pytest_lmeval.models._sources import load
from pytest_lmeval.records._journal import JournalWarning

TASK = Task("chooses", [{"n": n} for n in range(24)], lambda row: Choices(f"the number {row['n']} is", (" odd", " even"), 0))


def byte_model(**options):
    module = Layered(vocab=256, **options)
    return module, as_model(module, tokenizer="bytes")


@settings(max_examples=12)
@given(st.data(), st.sampled_from([verb for verb in VERBS if not verb.startswith(("training", "probe"))]))
def test_memory_that_runs_out_at_any_call_of_any_verb_changes_no_number(data, verb):
    expected, calls = read(verb)
    assert differences(verb, read(verb, data.draw(st.integers(1, calls)))[0], expected) == []


@pytest.mark.parametrize("error", ERRORS)
def test_questions_are_read_in_as_many_rows_as_fit_and_the_record_says_so(error):
    module, lm = byte_model()
    policy = policy_for(lm, batch_size=8)
    whole = measure_task(lm, TASK, policy=policy)
    with running_out(module, above=60, error=error, in_place=True) as memory:
        result = measure_task(lm, TASK, policy=policy)
    assert max(rows * tokens for rows, tokens in memory.shapes if (rows, tokens) != memory.shapes[0]) >= 60
    (note,) = (note for note in result.record.notes if "memory" in note)
    assert note.startswith("memory is short, so it was read in batches of ")
    assert result.record.settings["batch_size"] == 8
    assert len(memory.raised) <= 8  # it does not try again what did not fit
    for one, other in zip(result.examples, whole.examples, strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-4)


def test_a_row_too_long_for_one_step_is_read_in_several():
    module, lm = byte_model()
    requests = [Request(ids_of(90), 2)]
    (alone,) = Engine(lm).score(requests)
    engine = Engine(lm)
    with running_out(module, above=20):
        (found,) = engine.score(requests)
    np.testing.assert_allclose(found.loglikelihood, alone.loglikelihood, atol=1e-4)
    assert "steps of at most" in engine.less


def test_what_does_not_fit_in_one_token_is_an_error_with_what_to_do():
    module, lm = byte_model()
    said = r"a step of 1 row\(s\) of 1 token\(s\) does not fit .* an allocation of .* and there is no smaller one.*@bf16"
    with running_out(module, above=0), pytest.raises(OutOfMemory, match=said):
        Engine(lm).score([Request(ids_of(30), 2)])
    stateless = as_model(module := Stateless())
    with running_out(module, above=16), pytest.raises(OutOfMemory, match="cannot be read in smaller steps"):
        measure_perplexity(stateless, ids_of(100), policy=policy_for(stateless, window=32))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_that_was_begun_begins_again_with_the_same_random_numbers(temperature):
    module, lm = byte_model()
    task = Task("says", TASK.rows, lambda row: Generate(f"{row['n']}:", ("x",), max_tokens=6, temperature=temperature))
    whole = measure_task(lm, task)
    with running_out(module, at=[9, 15, 16]) as memory:
        result = measure_task(lm, task)
    assert memory.raised
    assert [one.output for one in result.examples] == [one.output for one in whole.examples]


def test_a_text_that_can_be_read_only_once_is_not_begun_again():
    module, lm = byte_model()
    with running_out(module, at=[3]), pytest.raises(Exception, match="out of memory"):
        measure_perplexity(lm, iter([ids_of(200)]), policy=policy_for(lm, chunk_size=16))


def test_chunks_are_halved_before_they_fail_where_the_estimate_says_so(monkeypatch):
    module, lm = byte_model()
    free = iter([1 << 30] * 2 + [70_000] * 1000)  # it becomes short while the text is read
    monkeypatch.setattr(_memory, "free_bytes", lambda device: next(free))
    policy = policy_for(lm, chunk_size=32)
    with running_out(module) as memory:
        result = measure_perplexity(lm, ids_of(1500), policy=policy)
    assert memory.shapes[0] == (1, 32)
    assert memory.shapes[-2][1] < 32
    assert not memory.raised
    assert "memory is short, so it was read in chunks of 16 tokens instead of 32" in result.record.notes
    monkeypatch.setattr(_memory, "free_bytes", lambda device: None)  # a system that does not tell
    whole = measure_perplexity(lm, ids_of(1500), policy=policy)
    assert float(result.nll) == pytest.approx(float(whole.nll), abs=1e-5)


def test_a_batch_of_any_size_that_fits_is_chosen_and_recorded(monkeypatch):
    _, lm = byte_model()
    lmeval = Lmeval(VerbContext(Session(batch="auto")))

    def chosen(free):
        monkeypatch.setattr(_memory, "free_bytes", lambda device: free)
        return lmeval.task(lm, TASK).record.settings["batch_size"]

    largest, some, one = map(chosen, (1 << 40, 300_000, 1))
    assert largest > some > one == 1
    assert lmeval.task(lm, TASK, batch_size=3).record.settings["batch_size"] == 3


def test_the_memory_of_the_cpu_is_the_least_of_what_is_free_and_what_is_allowed(tmp_path, monkeypatch):
    device = as_model(Layered()).device
    assert 0 < _free_memory.free_bytes(device) < 1 << 50
    monkeypatch.setattr(_free_memory, "CGROUP", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300000\nactive_file 200000\n")
    for name, size in (("memory.max", 9_000_000), ("memory.current", 2_300_000)):
        (tmp_path / name).write_text(f"{size}\n")
    assert _free_memory.free_bytes(device) == 7_000_000  # files that nobody uses are no memory in use
    (tmp_path / "memory.max").write_text("max\n")
    assert _free_memory.free_bytes(device) > 7_000_000
    monkeypatch.setattr(_free_memory, "MEMINFO", tmp_path / "nothing")
    monkeypatch.setattr(_free_memory, "_within_limit", lambda: None)
    assert _free_memory.free_bytes(device) is None


def test_the_state_of_a_row_is_a_line_through_two_sizes():
    lm = as_model(module := Layered())
    with running_out(module) as memory:
        assert [_memory.row_bytes(lm, tokens) for tokens in (8, 40)] == [
            _memory.state_bytes(lm.step(lm.random_ids(1, tokens))[1]) for tokens in (8, 40)
        ]
    assert memory.calls == 4
    assert _memory.row_bytes(as_model(Stateless()), 100) == 0
    short = dataclasses.replace(lm, context_length=1, step_fn=lambda *given: lm.step_fn(*given))
    assert _memory.row_bytes(short, 1) == 0


@pytest.mark.parametrize("learn", [_state_rows.selection, lambda lm: _memory.row_bytes(lm, 9)])
def test_what_was_not_found_out_since_memory_ran_out_is_found_out_later(learn):
    module, lm = byte_model()
    with running_out(module, at=2):
        assert not learn(lm)
    assert learn(lm)


@pytest.mark.parametrize(("given", "expected"), [("", None), ("auto", "auto"), ("24", 24)])
def test_the_option_takes_a_number_or_auto(pytester, given, expected):
    assert _options.batch(pytester.parseconfig(*([f"--lmeval-batch={given}"] if given else []))) == expected


def test_weights_that_are_larger_than_what_is_free_are_announced(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    monkeypatch.setattr(_hf_checkpoint, "free_bytes", lambda device: size - 1)
    with pytest.warns(JournalWarning, match=rf"its weights take {size:,} bytes .* and {size - 1:,} are free"):
        load(f"hf:{tmp_path}")
    monkeypatch.setattr(_hf_checkpoint, "free_bytes", lambda device: size)
    load(f"hf:{tmp_path}")
