"""Ask models tasks: what an answer depends on and what it does not, how prompts become tokens, and which rows are refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import Killed, measure_task
from tiny_models import Functional

from pytest_lmeval import Choices, Codebooks, Generate, Rows, Task, as_model, load
from pytest_lmeval.errors import CorpusError, NotFiniteError, TaskError
from pytest_lmeval.models._model import Bytes
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import JournalWarning
from pytest_lmeval.scoring._answers import AnswerStore
from pytest_lmeval.scoring._fewshot import Shots
from pytest_lmeval.scoring._requests import Encoder
from pytest_lmeval.tasks import id_of

SUMS = [{"a": a, "b": b, "right": (a + b) % 2} for a in range(8) for b in range(4)]


def ask(row):
    return Choices(f"{row['a']} + {row['b']} is", (" even", " odd"), row["right"])


def other_label(row):
    return dataclasses.replace(ask(row), answer=1 - row["right"])


TASK = Task("sums", SUMS, ask, metrics=("accuracy", "accuracy_per_token"), shots=SUMS, description="Sums of numbers.\n")


LM, OTHER = (as_model(Functional(vocab=256, seed=seed)) for seed in (0, 1))


def outcome(result):
    """What must not depend on how the questions were read: id -> prompt, prediction, log-likelihoods."""
    return {
        example.id: (example.prompt, example.predicted(), np.round(example.loglikelihoods, 4).tolist())
        for example in result.examples
    }


@settings(max_examples=12)
@given(st.permutations(SUMS), st.integers(1, 9), st.integers(1, 32), st.sampled_from([0, 2]), st.booleans())
def test_no_answer_depends_on_order_limit_batch_or_neighbours(rows, batch_size, limit, shots, fork):
    task = dataclasses.replace(TASK, rows=rows)
    whole = outcome(measure_task(LM, TASK, shots=shots))
    part = outcome(measure_task(LM, task, shots=shots, batch_size=batch_size, limit=limit, fork=fork))
    assert len(part) == limit
    for name, found in part.items():
        assert found[:2] == whole[name][:2]
        np.testing.assert_allclose(found[2], whole[name][2], atol=2e-4)


def test_examples_drawn_as_lm_eval_draws_them_depend_on_the_order():
    """The test above can fail."""
    turned = dataclasses.replace(TASK, rows=SUMS[::-1])
    first, second = (outcome(measure_task(LM, task, shots=2, fewshot="lm_eval")) for task in (TASK, turned))
    assert {name: found[0] for name, found in first.items()} != {name: found[0] for name, found in second.items()}


def test_the_first_examples_are_shown_to_all_questions_but_to_themselves():
    shots = Shots(dataclasses.replace(TASK, fewshot_strategy="first"), 2, "document")

    def shown_to(row):
        return [shot.prompt + shot.target for shot in shots.questions(row, id_of(row))]

    assert shown_to(SUMS[5]) == ["0 + 0 is even", "0 + 1 is odd"]
    assert shown_to(SUMS[0]) == ["0 + 1 is odd", "0 + 2 is even"]


def test_a_log_likelihood_is_that_of_the_tokens_of_a_choice_after_its_prompt():
    result = measure_task(LM, TASK, limit=1)
    (example,) = result.examples
    prompt = TASK.description + ask(SUMS[0]).prompt
    for choice, found, tokens in zip(example.choices, example.loglikelihoods, example.tokens, strict=True):
        ids = torch.tensor(list((prompt + choice).encode()))
        with torch.no_grad():
            log_probabilities = LM.step(ids[None, :-1])[0][0].log_softmax(-1)
        expected = sum(log_probabilities[index - 1, ids[index]].item() for index in range(len(prompt), len(ids)))
        assert found == pytest.approx(expected, abs=1e-4)
        assert tokens == len(choice)


@pytest.mark.parametrize("other", ["accuracy", "accuracy_per_token", "greedy_match"])
def test_no_metric_depends_on_which_others_are_asked_for(other):
    """The likeliest of two choices of very different lengths changes where log-likelihoods are divided by tokens."""
    rows = [{"n": n} for n in range(6)]
    task = Task("own", rows, lambda row: Choices(f"{row['n']} is", (" a number of some length", " x"), 0), ("exact_match",))
    alone = measure_task(LM, task)
    beside = measure_task(LM, dataclasses.replace(task, metrics=("exact_match", other)))
    assert beside.exact_match == alone.exact_match == 0
    chosen = {example.chosen for example in beside.examples}
    assert chosen == ({0} if other == "accuracy_per_token" else {1})
    assert all(example.answer == ("x" if example.chosen else "a number of some length") for example in beside.examples)


def test_the_record_holds_settings_and_counts():
    result = measure_task(LM, TASK, shots=1, limit=10, batch_size=4)
    settings_, details = result.record.settings, result.record.details
    assert result.record.subject == "sums, 1-shot"
    assert (details["questions"], settings_["shots"], details["prefix_sharing"]) == (10, 1, "prefix sharing: on")
    assert details["tokens_read"] < details["tokens_alone"]
    assert details["tokens_alone"] == sum(example.read + example.saved for example in result.examples)
    assert result.chance == 0.5
    assert result.accuracy.n == 10
    assert 0 <= result.accuracy.low <= result.accuracy <= result.accuracy.high <= 1
    swapped = dataclasses.replace(TASK, ask=other_label)
    for task, shots, same in ((TASK, 1, True), (TASK, 2, False), (swapped, 1, False)):
        prompts = measure_task(LM, task, shots=shots, limit=10).record.settings["prompts"]
        assert (prompts == settings_["prompts"]) == same
    with pytest.raises(AttributeError, match=r"no metric 'f1'\. It has accuracy"):
        _ = result.f1


def test_ties_are_counted_and_shared():
    result = measure_task(LM, Task("same", [{}], lambda row: Choices("Say", (" a", " a"), 1)))
    assert (result.record.details["ties"], result.examples[0].predicted()) == (1, 0)
    assert result.examples[0].loglikelihoods[0] == result.examples[0].loglikelihoods[1]
    assert result.accuracy == 0.5


class Flat(torch.nn.Module):
    """All tokens are equally likely."""

    noise = 0.0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, state=None):
        wave = torch.sin(ids.cumsum(1)[..., None] * torch.arange(1.0, 257))  # of what was read, different for each token
        return self.noise * wave + self.weight, torch.zeros(len(ids), 1)


class Jittered(Flat):
    """The same but for rounding of a few units in the last place of its losses."""

    noise = 2e-7


FIRST_IS_RIGHT = Task(
    "first", [{"n": n} for n in range(30)], lambda row: Choices(f"{row['n']} is", (" a", " b"), 0),
    ("accuracy", "accuracy_per_token", "f1_macro", "matthews"),
)  # fmt: skip


@pytest.mark.parametrize("kind", [Flat, Jittered])
def test_a_model_that_knows_nothing_does_not_beat_guessing_where_the_first_choice_is_always_right(kind):
    """What the guide asserts, `accuracy.low > chance`, fails."""
    result = measure_task(as_model(kind().eval()), FIRST_IS_RIGHT)
    assert (result.accuracy, result.accuracy_per_token, result.matthews) == (0.5, 0.5, 0)
    assert not result.accuracy.low > result.chance
    assert (result.accuracy.ties, result.f1_macro.ties, result.record.details["ties"]) == (30, 30, 30)
    among = "accuracy and accuracy_per_token and f1_macro and matthews"
    assert f"30 of 30 questions tied in {among} (each of k tied choices counts 1/k)" in result.record.notes


def test_a_task_in_lm_evals_style_keeps_its_number_and_says_that_all_are_ties():
    result = measure_task(as_model(Flat().eval()), dataclasses.replace(FIRST_IS_RIGHT, style="lm_eval"))
    best = [int(np.argmax(example.loglikelihoods)) for example in result.examples]
    assert result.accuracy == np.mean([guess in one.right for guess, one in zip(best, result.examples, strict=True)]) == 1
    assert (result.accuracy.ties, result.record.details["ties"]) == (30, 30)
    assert not result.accuracy.low > result.chance
    assert any("the first of tied choices is taken, as in lm_eval" in note for note in result.record.notes)


def test_a_model_that_prefers_an_answer_has_no_ties_and_the_same_number_by_both_rules():
    ours, theirs = (measure_task(LM, dataclasses.replace(TASK, style=style)) for style in ("own", "lm_eval"))
    assert ours.record.metrics == theirs.record.metrics
    assert (ours.record.details["ties"], ours.accuracy.ties) == (0, 0)
    assert not any("tied" in note for note in ours.record.notes)


def test_an_answer_of_an_earlier_run_counts_by_the_rule_of_this_one(tmp_path):
    lm, path = as_model(Flat().eval()), tmp_path / "answers.jsonl"
    measure_task(lm, dataclasses.replace(FIRST_IS_RIGHT, style="lm_eval"), kept=path)
    again = measure_task(lm, FIRST_IS_RIGHT, kept=path)
    assert (again.resumed, again.accuracy) == (30, 0.5)


def test_rows_are_read_as_needed_and_the_first_block_is_one_batch():
    read, after = [], []
    task = dataclasses.replace(TASK, rows=lambda: (read.append(row) or row for row in SUMS))
    measure_task(LM, task, batch_size=4, progress=lambda *_: after.append(len(read)))
    assert after[0] == 4
    read.clear()
    assert len(measure_task(LM, task, limit=3, batch_size=8).examples) == len(read) == 3
    read.clear()
    mixed = dataclasses.replace(task, ask=lambda row: Generate("x", ()) if row["b"] else ask(row))
    with pytest.raises(TaskError, match=r"sums, row 1: accuracy is computed from choices, and the answer to .* is generated"):
        measure_task(LM, mixed, batch_size=4)
    assert len(read) == 2  # before anything is asked


class Pairs:
    """A tokenizer of pairs of characters: the end of a text may change with what follows it."""

    name, bos, eos = "pairs", None, None

    def encode(self, text):
        pieces = [text[start : start + 2] for start in range(0, len(text), 2)]
        ids = [ord(piece[0]) * 2 + (ord(piece[1]) if len(piece) > 1 else 0) for piece in pieces]
        return np.array(ids, dtype=np.int64), np.cumsum([len(piece.encode()) for piece in pieces])


class Begins(Bytes):
    bos, prefix = 1, (1, 2)


class Ends(Bytes):
    eos, prefix = 3, ()


class BeginsIfAsked(Pairs):
    """As that of SmolLM2: it has a beginning-of-sequence token, and puts it before no text by itself."""

    bos, prefix = 1, ()


class Swallows(Bytes):
    def encode(self, text):
        return super().encode(text.replace("~", ""))


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "choices", "context_len", "ids", "retokenized"),
    [
        (Pairs(), "abc", ("d", "de"), 1, [292, 298], True),  # "cd" spans the boundary: it moves for both choices
        (Pairs(), "abcd", ("e", "fg"), 2, [292, 298, 202], False),
        (Bytes(), "ab  ", ("c",), 2, [97, 98, 32, 32, 99], False),  # blanks belong to the choice
        (Begins(), "a", ("b",), 3, [1, 2, 97, 98], False),
        (Ends(), "", ("b",), 1, [3, 98], False),
        (Ends(), "a", ("b",), 1, [97, 98], False),
        (BeginsIfAsked(), "a", ("b", "c"), 1, [1, 292], True),  # "ab" is one token, and nothing stands before it
        (BeginsIfAsked(), "abc", ("d", "e"), 1, [292, 298], True),
    ],
)
def test_the_boundary_of_prompt_and_choice_in_tokens(tokenizer, prompt, choices, context_len, ids, retokenized):
    lm = dataclasses.replace(LM, tokenizer=tokenizer, vocab_size=1000)
    question = Encoder(lm, TASK).encode(Choices(prompt, choices, 0), "", id="x", number=7)
    assert question.retokenized == retokenized
    assert {request.context_len for request in question.requests} == {context_len}
    assert question.requests[0].ids.tolist() == ids


def test_a_prompt_that_does_not_fit_is_truncated_on_the_left_or_refused():
    lm = dataclasses.replace(LM, context_length=12)
    task = Task("long", [{"length": length} for length in (5, 30)], lambda row: Choices("x" * row["length"], (" a", " bb"), 0))
    result = measure_task(lm, task)
    assert [example.truncated for example in result.examples] == [0, 20]
    assert result.record.details["truncated"] == 1
    with pytest.raises(TaskError, match=r"long, row 1 .* is 33 tokens; .* reads 12. Take fewer shots."):
        measure_task(lm, task, truncate="refuse")
    with pytest.raises(TaskError, match="choice alone takes 20"):
        measure_task(lm, Task("long", [{}], lambda row: Choices("x", ("y" * 20,), 0)))
    with pytest.raises(TaskError, match="description alone takes 13"):
        measure_task(lm, Task("long", [{}], lambda row: Choices("x", ("y",), 0), description="Answer this: "))
    with pytest.raises(TaskError, match=r"is 1 tokens, and 12 to be generated; .* reads 12. Generate fewer tokens."):
        measure_task(lm, Task("long", [{}], lambda row: Generate("x", ("y",), max_tokens=12), metrics=("exact_match",)))


TEXTS = st.text("ab é€🙂", max_size=12)


@settings(max_examples=200)
@given(
    TEXTS,
    st.lists(TEXTS.map(lambda text: text + "\n"), max_size=4),
    st.text("xy é€🙂", min_size=1, max_size=16).map(lambda text: text + "?"),
    st.lists(st.text("de", min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 80),
    st.sampled_from([Bytes(), Begins()]),
)
def test_what_does_not_fit_goes_example_by_example_and_then_from_the_beginning_of_the_question(
    description, examples, text, choices, limit, tokenizer
):
    lm = dataclasses.replace(LM, tokenizer=tokenizer, context_length=limit)
    question, begun = Choices(text, choices, 0), list(getattr(tokenizer, "prefix", ()))
    longest = max(len(choice) for choice in choices)

    def size(shown, asked):
        return len(begun) + len("".join((description, *shown, asked)).encode()) + longest - 1  # the last token is not read

    try:
        shots = [Generate(example, ()) for example in examples]
        task = dataclasses.replace(TASK, fewshot_delimiter="")
        found = Encoder(lm, task).encode(question, description, shots, id="x", number=0)
    except TaskError:
        assert size([], "?") > limit
        return
    shown = examples[found.shots_dropped :]
    before = description + "".join(shown)
    asked = found.prompt.removeprefix(before)
    assert found.prompt == before + asked
    assert text.endswith(asked)
    assert asked
    assert size(shown, asked) <= limit
    assert found.truncated == len(text.encode()) - len(asked.encode())
    if found.shots_dropped:
        assert size(examples[found.shots_dropped - 1 :], text) > limit
    if found.truncated:
        assert not shown
        assert size([], text[-len(asked) - 1 :]) > limit  # not a character too many
    for request, choice in zip(found.requests, choices, strict=True):
        assert request.ids.tolist() == [*begun, *(found.prompt + choice).encode()]
        assert request.context_len == len(request.ids) - len(choice)


def test_the_record_counts_the_examples_and_the_questions_that_did_not_fit():
    lm = dataclasses.replace(LM, context_length=40)
    task = Task("t", [{"n": n} for n in (1, 9, 30)], lambda row: Choices("x" * row["n"] + " is", (" a", " b"), 0), shots=())
    task = dataclasses.replace(task, shots=task.rows[:1] * 3, description="D: ")
    result = measure_task(lm, dataclasses.replace(task, rows=[{"n": n} for n in (2, 9, 60)]), shots=2)
    assert [(one.shots_dropped, one.truncated) for one in result.examples] == [(0, 0), (0, 0), (2, 27)]
    assert [one.prompt[:12] for one in result.examples] == ["D: x is a\n\nx", "D: x is a\n\nx", "D: xxxxxxxxx"]
    assert (result.record.details["truncated"], result.record.details["fewer_shots"]) == (1, 1)
    assert {"1 truncated", "1 fewer shots"} <= set(result.record.notes)
    with pytest.raises(TaskError, match="Take fewer shots"):
        measure_task(lm, dataclasses.replace(task, rows=[{"n": 60}]), shots=2, truncate="refuse")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda row: Choices("x", ("y", "~"), 0), "the choice '~' is empty after tokenizing"),
        (lambda row: Choices(row["nothing"], (" a",), 0), r"t, row 0 cannot be asked: it has no field 'nothing'. .* n='1'"),
        (lambda row: Choices("x", (" a", " b"), 2), r"t, row 0: the label is 2, and there are choices 0 to 1"),
        (lambda row: Choices("", ("a", "b"), 0), "nothing stands before the first token"),
        (lambda row: Generate("", ("a",)), "the prompt is empty"),
        (lambda row: row + 1, "TypeError"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(question, message):
    with pytest.raises(TaskError, match=message):
        measure_task(dataclasses.replace(LM, tokenizer=Swallows()), Task("t", [{"n": 1}], question))


@pytest.mark.parametrize(
    ("lm", "changes", "options", "message"),
    [
        (as_model(Functional()), {}, {}, "has no tokenizer"),
        (dataclasses.replace(LM, codebooks=Codebooks((4,), (0,), (0,))), {}, {}, "reads frames of codes"),
        (LM, {"rows": []}, {}, "has no question"),
        (LM, {}, {"limit": 0}, "limit is 0"),
        (LM, {}, {"shots": -1}, "shots=-1"),
        (LM, {}, {"truncate": "right"}, "truncate='right'"),
    ],
)
def test_wrong_arguments_are_refused(lm, changes, options, message):
    with pytest.raises(TaskError, match=message):
        measure_task(lm, dataclasses.replace(TASK, **changes), **options)


def test_a_corrupt_or_missing_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(CorpusError, match=r"x\.parquet could not be read at row 0"):
        measure_task(LM, dataclasses.replace(TASK, rows=Rows(f"parquet:{tmp_path}/x.parquet")))
    with pytest.raises(CorpusError, match="there is no file"):
        measure_task(LM, dataclasses.replace(TASK, rows=Rows(f"jsonl:{tmp_path}/x.jsonl")))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    found = measure_task(LM, dataclasses.replace(TASK, rows=Rows(f"jsonl:{tmp_path}/x.jsonl")))
    assert outcome(found) == outcome(measure_task(LM, TASK))


class NaNAfter7(Functional):
    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return torch.where((input_ids == ord("7"))[..., None], logits * math.nan, logits), state


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda row: Choices("n is", (f" {row['n']}.", " x."), 0), r"nan.* for the choice ' 7.' of row 7 \("),
        (lambda row: Generate(f"{row['n']}", ()), f"of row {id_of({'n': 7})}"),
    ],
)
def test_a_number_that_is_not_finite_names_the_row(ask, message):
    task = Task("next", [{"n": n} for n in range(9)], ask, ("chance",))
    with pytest.raises(NotFiniteError, match=message):
        measure_task(as_model(NaNAfter7(vocab=256)), task, batch_size=2)


def test_answers_of_an_interrupted_run_are_not_asked_for_again(tmp_path):
    def stop(done, *_):
        if done >= 4:
            raise Killed

    kept = tmp_path / "kept.jsonl"
    with pytest.raises(Killed):
        measure_task(LM, TASK, batch_size=4, progress=stop, kept=kept)
    result = measure_task(LM, TASK, batch_size=4, kept=kept, examples=tmp_path / "examples.jsonl")
    whole = measure_task(LM, TASK, batch_size=4)
    assert result.resumed == 4
    assert result.examples == whole.examples
    lines = (tmp_path / "examples.jsonl").read_text().splitlines()
    assert [schema.convert(json.loads(line), Example) for line in lines] == list(result.examples)


def test_what_is_read_after_a_line_that_was_cut_off_is_kept(tmp_path):
    kept = tmp_path / "kept.jsonl"
    measure_task(LM, TASK, limit=2, kept=kept)
    kept.write_text(kept.read_text()[:-30])
    with pytest.warns(JournalWarning, match=r"line \d+ is broken"):
        assert measure_task(LM, TASK, limit=2, kept=kept).resumed < 2
    with pytest.warns(JournalWarning, match=r"line \d+ is broken"):
        assert measure_task(LM, TASK, limit=2, kept=kept).resumed == 2


@pytest.mark.parametrize(("lm", "changes"), [(OTHER, {}), (LM, {"ask": other_label}), (LM, {"description": "Other words.\n"})])
def test_answers_of_another_model_or_to_another_question_are_not_taken(tmp_path, lm, changes):
    assert measure_task(LM, TASK, kept=tmp_path / "p").resumed == 0
    task = dataclasses.replace(TASK, **changes)
    result = measure_task(lm, task, kept=tmp_path / "p")
    assert result.resumed == 0
    assert outcome(result) == outcome(measure_task(lm, task))
    assert [example.right for example in result.examples] == [(ask_.answer,) for ask_ in map(task.ask, SUMS)]


def test_answers_of_another_max_tokens_are_not_taken(tmp_path):
    short, long = generating(max_tokens=2), generating(max_tokens=3)
    measure_task(DEMO, short, kept=tmp_path / "p")
    assert [measure_task(DEMO, task, kept=tmp_path / "p").resumed for task in (long, short)] == [0, len(PROMPTS)]


DEMO = load("demo")
PROMPTS = ["The first argument is ", "Return a list of ", "Return the ", "This module defines ", "Return the ", "def "]


def generating(prompts=PROMPTS, **options):
    rows = [{"text": text} for text in prompts]
    return Task("says", rows, lambda row: Generate(row["text"], ("x",), **options), ("exact_match",))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_depends_on_no_neighbour_and_not_on_how_it_is_read(temperature):
    task = generating(max_tokens=8, temperature=temperature)
    options = ({"batch_size": 1}, {"batch_size": 4}, {"single": True}, {"carry": False, "batch_size": 3}, {"multiple": 4})
    first, *others = ([example.output for example in measure_task(DEMO, task, **how).examples] for how in options)
    assert others == [first] * 4
    assert first[2] == first[4] or temperature
    assert set(map(len, first)) <= set(range(1, 9))
    again = [example.output for example in measure_task(DEMO, task, seed=1).examples]
    assert (again == first) == (temperature == 0)  # another seed draws others


def test_greedy_answers_are_those_of_reading_everything_again():
    result = measure_task(DEMO, generating(max_tokens=6, stop=()))
    for example, text in zip(result.examples, PROMPTS, strict=True):
        ids = list(text.encode())
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(DEMO.step(torch.tensor([ids]))[0][0, -1].argmax()))
        assert example.output == bytes(ids[len(text) :]).decode(errors="replace")


def test_a_stop_ends_an_answer_and_is_no_part_of_it():
    whole, stopped = (measure_task(DEMO, generating(max_tokens=12, stop=stop)).examples for stop in ((), ("e", " t")))
    for one, other in zip(whole, stopped, strict=True):
        ends = [index for stop in ("e", " t") if (index := one.output.find(stop)) >= 0]
        assert other.output == (one.output[: min(ends)] if ends else one.output)
    assert any(len(one.output) > len(other.output) for one, other in zip(whole, stopped, strict=True))


def test_asking_ends_when_the_rate_is_certain():
    """The judge is certain at the first letter, so one token an answer is enough, and a few answers for the rate."""
    task = dataclasses.replace(
        generating([f"{n} Return the " for n in range(400)], max_tokens=50),
        metrics=("rate",),
        judge=lambda text: text[0].isalpha() if text else None,
        threshold=0.05,
    )
    result = measure_task(DEMO, task, batch_size=8)
    counts = result.record.details
    assert counts["rate_is"] == "above"
    assert counts["questions"] < 40
    assert counts["not_asked"] == 400 - counts["questions"]
    assert result.rate.low > 0.05
    assert {len(example.output) for example in result.examples} == {1}
    unsure = measure_task(DEMO, dataclasses.replace(task, rows=task.rows[:16], threshold=0.95), batch_size=8)
    assert "rate_is" not in unsure.record.settings
    assert unsure.record.details["questions"] == 16


def judged(judge, tmp_path):
    """The answers, with verdicts, of a run after one that was judged by another judge; and how many were taken from that."""
    task = dataclasses.replace(generating(max_tokens=6, stop=()), metrics=("rate", "exact_match"), judge=judge)
    return measure_task(DEMO, task, kept=tmp_path / "kept")


def longer_than(count, verdict=True):
    return lambda text: verdict if len(text) > count else None


def test_a_changed_judge_judges_the_answers_of_an_interrupted_run(tmp_path):
    """What it closes over has changed: whether a verdict is right, and where an answer ends."""
    first, same, opposite, later, never = (
        judged(longer_than(*made), tmp_path) for made in ((2,), (2,), (2, False), (4, False), (99,))
    )
    assert [float(one.rate) for one in (first, same, opposite, later, never)] == [1, 1, 0, 0, 0]
    assert [one.resumed for one in (first, same, opposite, later, never)] == [0, len(PROMPTS), 0, 0, 0]
    assert [len(one.examples[0].generated) for one in (first, same, opposite, later, never)] == [3, 3, 3, 5, 6]
    for made in ((2,), (2, False), (4, False), (99,)):
        assert judged(longer_than(*made), tmp_path).examples == judged(longer_than(*made), tmp_path / "new").examples


class Strict:
    """A judge whose settings no key can tell."""

    def __init__(self, words):
        self.words = words

    def __call__(self, text):
        return text[:1] in self.words if text.strip() else None


def test_a_verdict_is_never_taken_from_an_interrupted_run(tmp_path, monkeypatch):
    letters = set("abcdefghijklmnopqrstuvwxyz ")
    first, other = judged(Strict({"?"}), tmp_path), judged(Strict(letters), tmp_path)
    alone = judged(Strict(letters), tmp_path / "alone")
    assert float(first.rate) == 0 < float(other.rate) == float(alone.rate)
    assert other.examples == alone.examples
    assert other.resumed == sum(not example.judged for example in alone.examples)  # both judges agree on these
    judged(Strict({"?"}), tmp_path)
    answers = AnswerStore.answers
    monkeypatch.setattr(AnswerStore, "answers", lambda store, asked, prompts, judge: answers(store, asked, prompts, None))
    assert float(judged(Strict(letters), tmp_path).rate) == 0  # by the key alone


class Mute:
    name, bos = "mute", None
    encode = Bytes().encode


@pytest.mark.parametrize(
    ("tokenizer", "options", "changes", "message"),
    [
        (Mute(), {}, {"judge": lambda text: True}, "has no decode"),
        (Bytes(), {}, {"judge": lambda text: 1}, "the judge returned 1 for row"),
        (Bytes(), {}, {"judge": lambda text: 1 / 0}, "the judge raised ZeroDivisionError: .* on row"),
        (Bytes(), {"group": "g"}, {"judge": lambda text: True, "threshold": 0.5}, "answers of one group"),
    ],
)
def test_answers_that_cannot_be_generated_or_judged_are_refused(tokenizer, options, changes, message):
    task = dataclasses.replace(generating(max_tokens=3, **options), metrics=None, **changes)
    with pytest.raises(TaskError, match=message):
        measure_task(dataclasses.replace(DEMO, tokenizer=tokenizer), task)


def test_a_shared_prefix_of_generated_answers_is_read_once_in_all_batches():
    task = generating([f"{'Return the value of it. ' * 20}{number} is " for number in range(40)], max_tokens=4)
    result = measure_task(DEMO, task, batch_size=8)
    assert result.record.details["tokens_read"] < 480 + 40 * 16
    assert result.record.settings["generation"] == ["at most 4 tokens, temperature 0, until ['\\n']"]


def test_prompts_of_very_different_lengths_take_few_steps():
    class Counted(Functional):
        steps = 0

        def forward(self, input_ids, state=None):
            self.steps += 1
            return super().forward(input_ids, state)

    lm = as_model(Counted(vocab=256))
    task = generating(["x" * 5, "x" * 900], max_tokens=6)
    measure_task(lm, dataclasses.replace(task, rows=task.rows[:1]))
    lm.module.steps = 0
    result = measure_task(lm, task)
    assert lm.module.steps < 30
    alone = [measure_task(lm, dataclasses.replace(task, rows=[row])).examples[0].output for row in task.rows]
    assert [example.output for example in result.examples] == alone
