"""Keep what a task has read as each batch ends: a killed run goes on to the same record, to the last bit."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings, strategies as st
from probing import certificate
from reading import Killed
from running_out import Layered, running_out
from tiny_models import Functional, small_transformer

from pytest_lmeval import Choices, Generate, Task, as_model, policy_for
from pytest_lmeval.engine._memory import row_bytes
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models._model import Bytes
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import JournalWarning
from pytest_lmeval.scoring import _answers

BY, END = 1.0, 3  # what `Turned` multiplies with, and the token that ends its answers
CERTIFIED, BYTE_LM, PACKED_LM = certificate(packed=True), as_model(Functional(vocab=256)), as_model(small_transformer())
PASSAGE = "The quick brown fox jumps over the lazy dog. "
ROWS = [{"n": n, "passage": PASSAGE[: 9 + n // 6]} for n in range(40)]
TRAIN = [{"n": 100 + n, "passage": PASSAGE[n:]} for n in range(3)]
LENGTHS = (" an odd one", " even", " even indeed, and no other")


def choose(row):
    return Choices(f"{row['passage']}{row['n']} is", LENGTHS[: 2 + row["n"] % 2], row["n"] % 2)


def say(row):
    return Generate(f"{row['passage']}{row['n']} is", ("x",), max_tokens=3 + row["n"] % 4)


CHOOSES = Task("chooses", ROWS, choose, shots=TRAIN)
GENERATES = Task("says", ROWS, say, ("exact_match",))
SAMPLES = dataclasses.replace(GENERATES, ask=lambda row: dataclasses.replace(say(row), temperature=0.8))
TASKS = {task: (asked, shots) for task, asked, shots in [
    ("choices", CHOOSES, 2), ("alone", CHOOSES, 0), ("greedy", GENERATES, 0), ("sampled", SAMPLES, 0)
]}  # fmt: skip


class Watched:
    """Counts the calls of a model, without those that learn what its states look like, and is killed at one of them."""

    def __init__(self, lm=BYTE_LM, at=None):
        self.calls, self.at, step_fn = 0, None, lm.step_fn

        def counted(function):
            def call(*arguments):
                self.calls += 1
                if self.calls == self.at:
                    raise Killed
                return function(*arguments)

            return call

        step = counted(step_fn)
        if lm.packing is not None:
            step.packing = dataclasses.replace(lm.packing, step=counted(lm.packing.step))
        self.lm = dataclasses.replace(lm, step_fn=step)
        selection(self.lm), row_bytes(self.lm, 1)
        self.calls, self.at = 0, at


def ask(lm, task="choices", *, kept=None, batch_size=4, cert=CERTIFIED, invariant=False, **options):
    asked, shots = TASKS[task]
    policy = policy_for(lm, cert, batch_size=batch_size, invariant=invariant)
    return measure_task(lm, asked, policy=policy, shots=shots, kept=kept, **options)


def content(result):
    """Everything that was recorded, but for times."""
    record = schema.to_plain(result.record)
    record["cost"].pop("seconds")
    record["details"].pop("audit_seconds")
    return record, result.examples


@pytest.fixture(scope="module")
def whole():
    """task, batch size, model -> content, calls of a run that was not interrupted."""

    @functools.cache
    def run(task, batch_size, lm=BYTE_LM):
        watched = Watched(lm)
        return content(ask(watched.lm, task, batch_size=batch_size)), watched.calls

    return run


@settings(max_examples=24)
@given(data=st.data())
def test_a_run_that_is_killed_at_any_calls_ends_with_the_same_record_to_the_last_bit(whole, tmp_path_factory, data):
    task, batch_size = data.draw(st.sampled_from(sorted(TASKS))), data.draw(st.sampled_from([1, 4]))
    lm = data.draw(st.sampled_from([BYTE_LM, PACKED_LM]))
    expected, calls = whole(task, batch_size, lm)
    kept = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    for at in data.draw(st.lists(st.integers(1, calls), max_size=3)):
        try:
            ask(Watched(lm, at).lm, task, kept=kept, batch_size=batch_size)
        except Killed:
            continue
        break
    assert content(ask(Watched(lm).lm, task, kept=kept, batch_size=batch_size)) == expected


def test_without_the_plan_of_the_whole_block_a_resumed_record_differs(whole, tmp_path, monkeypatch):
    """The broken twin: a block that is formed of the questions without an answer has other batches, and other last bits."""
    expected, calls = whole("choices", 4)
    differ = 0
    monkeypatch.setattr(_answers.AnswerStore, "from_other_batches", _answers.AnswerStore.has)
    for part in (3, 5, 7):
        kept = tmp_path / f"{part}.jsonl"
        with pytest.raises(Killed):
            ask(Watched(at=calls * part // 8).lm, kept=kept)
        differ += content(ask(Watched().lm, kept=kept)) != expected
    assert differ


@pytest.mark.parametrize("task", TASKS)
def test_at_most_one_batch_is_read_twice(whole, tmp_path, task):
    """Beside the prefix that the rest continues."""
    _, calls = whole(task, 4)
    kept = tmp_path / "kept.jsonl"
    at = calls * 3 // 4
    with pytest.raises(Killed):
        ask(Watched(at=at).lm, task, kept=kept)
    again = Watched()
    ask(again.lm, task, kept=kept)
    assert again.calls <= calls - at + 25


def test_an_identical_call_reads_one_question_again_takes_the_others_and_says_so(tmp_path):
    kept, again = tmp_path / "kept.jsonl", Watched()
    first = ask(Watched().lm, kept=kept)
    second = ask(again.lm, kept=kept)
    assert (again.calls, second.resumed) == (len(first.examples[0].choices), len(ROWS))
    assert content(second) == content(first)


@pytest.mark.parametrize("task", ["choices", "greedy"])
def test_answers_that_the_model_would_not_give_any_more_are_not_taken(tmp_path, monkeypatch, task):
    """Something has changed that the key of the file does not see: a global that the code reads, a file beside it."""
    kept, other = tmp_path / "kept.jsonl", as_model(Functional(vocab=256, seed=5))
    monkeypatch.setattr("pytest_lmeval.scoring._requests.fingerprint", lambda lm: "the same")
    ask(BYTE_LM, task, kept=kept)
    with pytest.warns(JournalWarning, match="are not what it answers now"):
        changed = ask(other, task, kept=kept)
    assert changed.resumed == 0
    assert content(changed)[1] == content(ask(other, task))[1]


@pytest.mark.parametrize("task", ["choices", "greedy"])
def test_answers_of_other_batches_and_limits_are_taken_where_that_is_proven_and_counted(tmp_path, task):
    kept, more = tmp_path / "kept.jsonl", Watched()
    ask(Watched().lm, task, kept=kept, limit=25)
    result = ask(more.lm, task, kept=kept, batch_size=3)
    assert (result.resumed, result.record.details["from_other_batches"]) == (25, 25)
    assert "25 from other batches" in result.record.notes
    alone = ask(Watched().lm, task, batch_size=3)
    for one, other in zip(result.examples, alone.examples, strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-4)
        assert one.output == other.output


class Turned(Functional):
    """Its logits are multiplied by a variable that its fingerprint does not see; begins with `mark` after a colon."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        ends = (input_ids == ord(":"))[..., None] & (torch.arange(256) == END)
        return BY * torch.where(ends, 9.0, logits), state


class Ending(Bytes):
    ends = (END,)


@pytest.mark.parametrize(("marks", "empty"), [("::::::", 6), (":::..:", 4)])
def test_what_is_taken_is_compared_with_a_token_of_an_answer_or_with_the_lack_of_one(tmp_path, monkeypatch, marks, empty):
    kept, lm = tmp_path / "kept.jsonl", as_model(Turned(vocab=256), tokenizer=Ending())
    task = Task("says", list(marks), lambda mark: Generate(f"to be{mark}", ("x",), max_tokens=3), ("exact_match",))
    policy = policy_for(lm, CERTIFIED)
    first = measure_task(lm, task, policy=policy, kept=kept)
    assert [one.output for one in first.examples].count("") == empty
    assert measure_task(lm, task, policy=policy, kept=kept).resumed == len(marks)
    monkeypatch.setattr(f"{__name__}.BY", -1.0)
    with pytest.warns(JournalWarning, match="are not what it answers now"):
        changed = measure_task(lm, task, policy=policy, kept=kept)
    assert content(changed) == content(measure_task(lm, task, policy=policy))


def test_a_question_that_does_not_fit_into_memory_whole_is_compared_in_pieces(tmp_path):
    module = Layered(vocab=256)
    lm, kept = as_model(module, tokenizer="bytes"), tmp_path / "kept.jsonl"
    policy = policy_for(lm, CERTIFIED)
    selection(lm), row_bytes(lm, 1)
    first = measure_task(lm, CHOOSES, policy=policy, kept=kept)
    with running_out(module, above=9):
        second = measure_task(lm, CHOOSES, policy=policy, kept=kept)
    assert second.resumed == len(ROWS)
    assert second.examples == first.examples


def test_in_sixteen_bits_the_batches_are_part_of_the_key(tmp_path):
    kept, cert = tmp_path / "kept.jsonl", certificate("consistent")
    ask(Watched().lm, kept=kept, limit=25, cert=cert)
    assert ask(Watched().lm, kept=kept, batch_size=3, cert=cert).resumed == 0
    assert ask(Watched().lm, kept=kept, limit=25, cert=cert).resumed == 25
    ask(Watched().lm, kept=kept, limit=25, cert=cert, invariant=True)
    assert ask(Watched().lm, kept=kept, batch_size=3, cert=cert, invariant=True).resumed == 25  # each was read alone


def test_answers_of_another_block_are_answers_of_other_batches(tmp_path):
    """Blocks differ with a threshold, and with the other rows."""
    kept, cert, policy = tmp_path / "kept.jsonl", certificate("consistent"), policy_for(BYTE_LM, certificate("consistent"))
    other = [row if row["n"] % 4 else row | {"passage": "Another one"} for row in ROWS]
    judged = Task("says", ROWS, say, judge=lambda text: len(text) > 1)
    for first, second in [
        (dataclasses.replace(judged, threshold=0.02), judged),
        (CHOOSES, dataclasses.replace(CHOOSES, rows=other)),
    ]:
        measure_task(BYTE_LM, first, policy=policy, kept=kept)
        found = measure_task(BYTE_LM, second, policy=policy, kept=kept)
        assert content(found) == content(measure_task(BYTE_LM, second, policy=policy))
    assert cert.verdict == "consistent"


@pytest.mark.parametrize("at", [3, 8])
def test_a_question_half_of_which_was_read_in_other_batches_is_read_as_a_whole(tmp_path, at):
    """Else a run that is killed in the middle of it would take both halves the next time, and form other batches."""
    kept, copy = tmp_path / "kept.jsonl", tmp_path / "copy.jsonl"
    with pytest.raises(Killed):
        ask(Watched(at=14).lm, kept=kept, batch_size=3)
    shutil.copy(kept, copy)
    with pytest.raises(Killed):
        ask(Watched(at=at).lm, kept=kept)
    assert content(ask(Watched().lm, kept=kept)) == content(ask(Watched().lm, kept=copy))


def test_a_sampled_answer_of_a_row_of_another_name_is_not_taken(tmp_path):
    kept = tmp_path / "kept.jsonl"
    named = [dataclasses.replace(SAMPLES, rows=[row | {"id": f"{name}{row['n']}"} for row in ROWS]) for name in "ab"]
    measure_task(BYTE_LM, named[0], kept=kept)
    assert content(measure_task(BYTE_LM, named[1], kept=kept)) == content(measure_task(BYTE_LM, named[1]))


@pytest.mark.parametrize(
    ("task", "damage"),
    [
        ("choices", lambda kept: kept["loglikelihood"].pop()),
        ("greedy", lambda kept: kept["logprobs"].pop()),
        ("greedy", lambda kept: kept.update(why="")),
    ],
)
def test_a_result_of_the_wrong_shape_is_read_again(whole, tmp_path, task, damage):
    kept = tmp_path / "kept.jsonl"
    ask(Watched().lm, task, kept=kept)
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    for line in lines:
        for one in (line.get("scored") or line.get("answers") or {}).values():
            damage(one)
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert content(ask(Watched().lm, task, kept=kept)) == whole(task, 4)[0]


def test_a_text_with_half_a_surrogate_pair_is_kept(tmp_path):
    class Escaping(Bytes):
        def decode(self, ids):
            return bytes(ids).decode(errors="surrogateescape")

    lm, kept = dataclasses.replace(BYTE_LM, tokenizer=Escaping()), tmp_path / "kept.jsonl"
    first = measure_task(lm, GENERATES, kept=kept, examples=tmp_path / "examples.jsonl")
    assert any("\udc80" <= letter <= "\udcff" for one in first.examples for letter in one.output)
    second = measure_task(lm, GENERATES, kept=kept)
    assert (second.resumed, second.examples) == (len(ROWS), first.examples)


def test_a_folder_that_cannot_be_written_to_costs_no_answer(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(JournalWarning, match="cannot be written"):
        result = ask(Watched().lm, kept=tmp_path / "file" / "kept.jsonl")
    assert content(result) == content(ask(Watched().lm))
