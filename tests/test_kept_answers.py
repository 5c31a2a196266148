"""Keep what a task has read as each batch ends: a killed run goes on to the same record, to the last bit."""

import dataclasses

import pytest
from hypothesis import given, settings, strategies as st
from probing import certificate
from reading import Killed
from tiny_models import Functional

from pytest_lmeval import Choices, Generate, Task, as_model, policy_for
from pytest_lmeval.engine._memory import row_bytes
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import JournalWarning
from pytest_lmeval.scoring import _answers

CERTIFIED, BYTE_LM = certificate(), as_model(Functional(vocab=256))
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

        def step(input_ids, state, keep):
            self.calls += 1
            if self.calls == self.at:
                raise Killed
            return step_fn(input_ids, state, keep)

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
    """task, batch size -> content, calls of a run that was not interrupted."""
    found = {}

    def run(task, batch_size):
        if (task, batch_size) not in found:
            watched = Watched()
            found[task, batch_size] = content(ask(watched.lm, task, batch_size=batch_size)), watched.calls
        return found[task, batch_size]

    return run


@settings(max_examples=15)
@given(data=st.data())
def test_a_run_that_is_killed_at_any_calls_ends_with_the_same_record_to_the_last_bit(whole, tmp_path_factory, data):
    task, batch_size = data.draw(st.sampled_from(sorted(TASKS))), data.draw(st.sampled_from([1, 4]))
    expected, calls = whole(task, batch_size)
    kept = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    for at in data.draw(st.lists(st.integers(1, calls), max_size=3)):
        try:
            ask(Watched(at=at).lm, task, kept=kept, batch_size=batch_size)
        except Killed:
            continue
        break
    assert content(ask(Watched().lm, task, kept=kept, batch_size=batch_size)) == expected


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


def test_an_identical_call_reads_nothing_and_says_so(tmp_path):
    kept = tmp_path / "kept.jsonl"
    first, again = ask(Watched().lm, kept=kept), Watched()
    second = ask(again.lm, kept=kept)
    assert (again.calls, second.resumed) == (0, len(ROWS))
    assert content(second) == content(first)


def test_another_process_reads_one_question_again_before_it_takes_the_others(tmp_path, monkeypatch):
    kept, again = tmp_path / "kept.jsonl", Watched()
    first = ask(Watched().lm, kept=kept)
    monkeypatch.setattr(_answers, "RUN", "another")
    second = ask(again.lm, kept=kept)
    assert (again.calls, second.resumed) == (len(first.examples[0].choices), len(ROWS))
    assert content(second) == content(first)


@pytest.mark.parametrize("task", ["choices", "greedy"])
def test_answers_that_the_model_would_not_give_any_more_are_not_taken(tmp_path, monkeypatch, task):
    """Something has changed that the key of the file does not see: a global that the code reads, a file beside it."""
    kept, other = tmp_path / "kept.jsonl", as_model(Functional(vocab=256, seed=5))
    monkeypatch.setattr("pytest_lmeval.scoring._requests.fingerprint", lambda lm: "the same")
    ask(BYTE_LM, task, kept=kept)
    monkeypatch.setattr(_answers, "RUN", "another")
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


def test_in_sixteen_bits_the_batches_are_part_of_the_key(tmp_path):
    kept, cert = tmp_path / "kept.jsonl", certificate("consistent")
    ask(Watched().lm, kept=kept, limit=25, cert=cert)
    assert ask(Watched().lm, kept=kept, batch_size=3, cert=cert).resumed == 0
    assert ask(Watched().lm, kept=kept, limit=25, cert=cert).resumed == 25
    ask(Watched().lm, kept=kept, limit=25, cert=cert, invariant=True)
    assert ask(Watched().lm, kept=kept, batch_size=3, cert=cert, invariant=True).resumed == 25  # each was read alone


def test_a_folder_that_cannot_be_written_to_costs_no_answer(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(JournalWarning, match="cannot be written"):
        result = ask(Watched().lm, kept=tmp_path / "file" / "kept.jsonl")
    assert content(result) == content(ask(Watched().lm))
