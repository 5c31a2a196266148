"""Check what tasks, suites and questions refuse, how rows of a dataset reach a task, and which examples a question shows."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from reading import measure_task
from tiny_models import Functional

from pytest_lmeval import Choices, Generate, Rows, Suite, Task, as_model
from pytest_lmeval.errors import TaskError
from pytest_lmeval.scoring import _fewshot
from pytest_lmeval.scoring._fewshot import POOL, Shots, question_of
from pytest_lmeval.tasks import id_of

LM = as_model(Functional(vocab=256))


def ask(row):
    return Choices(f"{row['n']} is", (" even", " odd"), row["n"] % 2)


def numbers(*values):
    return [{"n": n} for n in values]


TASK = Task("numbers", numbers(*range(8)), ask)


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Choices("x", "yes", 0), r"choices is 'yes', which is not a sequence\. Write a tuple, .*: \('yes',\)"),
        (lambda: Choices("x", (" a",), 0, texts="a"), r"texts is 'a', .*\('a',\)"),
        (lambda: Choices("x", (" a",), 0, texts=(1,)), r"texts \(1,\): each is a text, and one is 1, of type int"),
        (lambda: Choices("x", (" a",), 0, texts=("a", "b")), "2 texts for 1 choices"),
        (lambda: Choices("x", (" a", 2), 0), r"choices \(' a', 2\): each is a text, and one is 2, of type int"),
        (lambda: Choices("x", (" a", ""), 0), "each has text to be scored"),
        (lambda: Choices("x", (), 0), "has at least one"),
        (lambda: Choices("x", (" a",), ()), "none of the choices"),
        (lambda: Choices(7, (" a",), 0), "the prompt is a text, and this one is 7, of type int"),
        (lambda: Choices("x", (" a", " b"), True), "the label is True"),
        (lambda: Choices("x", (" a", " b"), 1.0), "the label is 1.0"),
        (lambda: Choices("x", (" a", " b"), 2), "the label is 2, and there are choices 0 to 1"),
        (lambda: Choices("x", (" a", " b"), np.int64(-1)), "the label is -1, .*hidden ones are often -1"),
        (lambda: Choices("x\ud800", (" a",), 0), r"the prompt .* has a lone surrogate, '\\ud800' at 1"),
        (lambda: Choices("x", ("\udfff",), 0), r"choices .* has a lone surrogate, '\\udfff' at 0"),
        (lambda: Generate(None, ("a",)), "the prompt is a text, and this one is None"),
        (lambda: Generate("x", "Paris"), r"answers is 'Paris', .*\('Paris',\)"),
        (lambda: Generate("x", (), stop="\n"), r"stop is '\\n', .*\('\\n',\)"),
        (lambda: Generate("x", (), stop=None), r"stop is None, which is not a sequence"),
        (lambda: Generate("x", (), stop=("",)), "an empty text would end every answer"),
        (lambda: Generate("x", (), max_tokens=0), "at least one"),
        (lambda: Generate("x", (), max_tokens=2.0), r"max_tokens is 2\.0: .* a whole number"),
        (lambda: Generate("x", (), max_tokens=True), "max_tokens is True"),
        (lambda: Generate("x", (), max_tokens="9"), "max_tokens is '9'"),
        (lambda: Generate("x", (), temperature=math.nan), "temperature is nan: it is a finite number"),
        (lambda: Generate("x", (), temperature=math.inf), "temperature is inf"),
        (lambda: Generate("x", (), temperature=-0.1), r"temperature is -0\.1"),
        (lambda: Generate("x", (), temperature="0"), "temperature is '0'"),
        (lambda: Generate("x", (), temperature=True), "temperature is True"),
        (lambda: Task("t", [], ask, metrics="accuracy"), r"metrics is 'accuracy', .*\('accuracy',\)"),
        (lambda: Task("t", [], ask, metrics=()), "t has no metrics"),
        (lambda: Task("t", [], ask, fewshot_strategy="frist"), "t: fewshot_strategy is 'frist'"),
        (lambda: speaking(threshold=0.0), r"threshold is 0\.0\. A rate is compared with a number between 0 and 1"),
        (lambda: speaking(threshold=1), r"threshold is 1\. "),
        (lambda: speaking(threshold=math.nan), "threshold is nan"),
        (lambda: speaking(threshold="0.5"), r"threshold is '0\.5'"),
        (lambda: speaking(threshold=0.5, judge=None), "there is no judge"),
        (lambda: speaking(threshold=0.5, metrics=("exact_match",)), "there is no metric 'rate' among exact_match"),
        (lambda: Suite("s", ()), r"the suite s has tasks \[\]: it has at least one"),
        (lambda: Suite("s", TASK), r"tasks is numbers, which is not a sequence\. .*: \(numbers,\)"),
        (lambda: Suite("s", ("boolq",)), r"the suite s has tasks \['boolq'\]: .* each is a Task"),
        (lambda: Suite("s", (TASK, dataclasses.replace(TASK, style="other"))), "s has several tasks called numbers"),
        (lambda: Suite("s", (dataclasses.replace(TASK, name="average"),)), "a task of the suite s is called 'average'"),
    ],
)
def test_a_wrong_declaration_is_refused_at_once(declare, message):
    with pytest.raises(TaskError, match=message):
        declare()


def speaking(**changes):
    options = {"metrics": ("rate",), "judge": str.isalpha, "threshold": 0.5} | changes
    return Task("t", [], lambda row: Generate("x", ()), **options)


def test_a_judge_needs_no_threshold_and_lists_become_tuples():
    assert speaking(threshold=None).judge is str.isalpha
    assert speaking(metrics=["rate", "exact_match"]).metrics == ("rate", "exact_match")
    assert Suite("s", [TASK]).tasks == (TASK,)


@pytest.mark.parametrize("kind", [np.int64, np.uint32])
def test_whole_numbers_of_numpy_are_stored_as_those_of_python(kind):
    one, several = (Choices("x", (" a", " b"), answer) for answer in (kind(1), (kind(1), 0)))
    assert (one.answers, several.answers) == ((1,), (1, 0))
    assert {type(answer) for answer in (*one.answers, *several.answers)} == {int}
    assert type(Generate("x", (), max_tokens=kind(3)).max_tokens) is int


@pytest.mark.parametrize(
    ("returned", "message"),
    [("Is it?", "`ask` returned 'Is it\\?', of type str"), (False, "of type bool"), ((" a", 0), "of type tuple")],
)
def test_a_value_that_is_no_question_is_refused_with_its_row(returned, message):
    with pytest.raises(TaskError, match=f"t, row 0: .*{message}. It returns Choices or Generate, or None"):
        measure_task(LM, Task("t", numbers(1), lambda row: returned))


def test_a_row_with_a_lone_surrogate_has_an_id_and_is_refused_only_if_a_prompt_contains_it():
    rows = [{"n": 1, "note": "\ud83d"}, {"n": 2, "note": "\ud83d\ude00"}]
    assert len({id_of(row) for row in (*rows, {"n": 2, "note": "😀"})}) == 3
    assert len(measure_task(LM, Task("t", rows, ask)).examples) == 2
    with pytest.raises(TaskError, match=r"t, row 0: the prompt .* has a lone surrogate"):
        measure_task(LM, Task("t", rows, lambda row: Choices(row["note"], (" a",), 0)))


def test_a_metric_of_targets_is_refused_where_there_are_none():
    def answers(row):
        return Generate("x", row.get("right", ()), (), max_tokens=2)

    with pytest.raises(TaskError, match=r"t, row 0: exact_match is computed from targets .* generated, with answers=\(\)"):
        Task("t", numbers(1), answers, ("exact_match",))
    task = Task("t", [{"right": [""]}, {}], answers, ("exact_match",))
    with pytest.raises(TaskError, match="t, row 1: exact_match is computed from targets"):
        measure_task(LM, task)
    assert measure_task(LM, task, limit=1).exact_match.n == 1


def asking(row):
    return Generate("x", ("b", "c"), (), max_tokens=2) if row.get("n") else Choices("x", (" a", " b"), 0)


@pytest.mark.parametrize("rows", [list, lambda rows: lambda: iter(rows)], ids=["a list", "a function"])
@pytest.mark.parametrize(
    ("row", "changes", "metrics"),
    [
        ({}, {}, ["accuracy", "chance"]),
        ({"n": 1}, {}, ["exact_match", "cut_off"]),
        ({"n": 1}, {"judge": lambda text: True}, ["rate", "cut_off"]),
        ({"n": 1}, {"judge": lambda text: True, "threshold": 0.5}, ["rate", "cut_off"]),
        ({"n": 1}, {"metrics": ("rate", "exact_match"), "judge": lambda text: True}, ["rate", "exact_match", "cut_off"]),
    ],
)
def test_the_first_question_chooses_the_default_metrics(rows, row, changes, metrics):
    result = measure_task(LM, Task("t", rows([row] * 3), asking, **changes))
    assert list(result.record.metrics) == metrics
    assert set(result.examples[0].scores) == {*metrics, "chance", "cut_off"}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{}], {"metrics": ("exact_match", "f1_macro", "bleu")}, None),
        ([{"n": 1}], {"metrics": ("accuracy",)}, r"accuracy is computed from choices, .* with answers=\('b', 'c'\)"),
        ([{"n": 1}], {"metrics": ("perplexity",)}, "perplexity is computed from a right choice"),
        ([{}], {"metrics": ("rate",), "judge": lambda text: None}, r"an output to be judged, .* the choices \[' a', ' b'\]"),
        ([], {"metrics": ("rate",)}, "'rate' is the fraction of answers judged True, and there is no judge"),
        ([{}], {"ask": lambda row: Generate("x", ())}, r"answers=\(\) to compare it with and no judge, so nothing says what"),
        ([{}], {"ask": lambda row: 1 / 0}, None),  # said with its row when it is asked
        ([{}], {"metrics": ("no_metric",)}, None),
        ("jsonl:rows.jsonl", {}, None),
        (iter([{}]), {}, "t: rows is .* It can be read once"),
        (7, {}, "t: rows is 7, of type int. Give a list"),
        ([], {"shots": iter([])}, "t: shots is"),
        ([], {"ask": "ask"}, "t: ask is 'ask', of type str; it is a function"),
        ([], {"judge": True}, "t: judge is True, of type bool"),
    ],
)
def test_what_cannot_be_computed_is_said_when_the_task_is_made(rows, changes, message):
    options = {"ask": asking} | changes
    if message is None:
        task = Task("t", rows, **options)
        assert task.rows == (Rows(rows) if isinstance(rows, str) else rows)
        return
    with pytest.raises(TaskError, match=message):
        Task("t", rows, **options)


def dataset(folder, *rows):
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Rows(f"jsonl:{folder}/rows.jsonl")


def passage(row):
    return Choices(f"{row['passage']} {row.get('hint', 'no hint')}", (" a", " b"), row["label"])


@pytest.mark.parametrize("second", [{"label": 1}, {"label": 1, "passage": None}])
def test_a_missing_field_is_refused_and_not_read_as_the_word_none(tmp_path, second):
    rows = dataset(tmp_path, {"passage": "It is", "label": 0}, second)
    message = r"1 \(.*rows\.jsonl, line 2\) cannot be asked: the field 'passage' is missing or null\. The row is label"
    with pytest.raises(TaskError, match=f"t, row {message}"):
        measure_task(LM, Task("t", rows, passage))
    with pytest.raises(TaskError, match=f"t, example {message}"):
        measure_task(LM, Task("t", [{"passage": "p", "label": 0}], passage, shots=rows), shots=1)


def test_a_field_that_is_unused_or_read_by_get_may_be_null(tmp_path):
    rows = [{"passage": "p", "label": 0, "hint": "h", "more": 1}, {"passage": "q", "label": 1, "more": None}]
    found = measure_task(LM, Task("t", dataset(tmp_path, *rows), passage)).examples
    listed = measure_task(LM, Task("t", [rows[0], {"passage": "q", "label": 1}], passage)).examples
    assert [(one.id, one.prompt) for one in found] == [(one.id, one.prompt) for one in listed]


def test_a_null_would_be_read_as_the_word_none_without_that_check():
    """The broken twin: a row as datasets reads it."""
    question = question_of(Task("t", [], passage), {"passage": None, "label": 0}, "row 0")
    assert question.prompt.startswith("None")


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 3))
def test_a_question_is_shown_only_other_rows(values, count, seed):
    shots, own = pool_of(values, min(count, len(values)), seed), {"n": values[0]}
    others = [value for value in values if value != values[0]]
    if len(others) < shots.count:
        with pytest.raises(TaskError, match=f"there are {len(others)} examples beside row {id_of(own)} itself"):
            shots.questions(own, id_of(own))
        return
    shown = [row["n"] for row in shots.rows(own, id_of(own))]
    assert len(shown) == shots.count
    assert not [value for value in set(shown) if shown.count(value) > others.count(value)]


def pool_of(values, count, seed=0):
    return Shots(dataclasses.replace(TASK, shots=numbers(*values)), count, "document", seed=seed)


def test_every_row_of_the_pool_is_drawn_equally_often():
    """600 questions draw 2 of 10 rows: 120 times each, give or take 10."""
    shots = pool_of(range(1000, 1010), 2)
    drawn = [row["n"] for n in range(600) for row in shots.rows({"n": n}, id_of({"n": n}))]
    assert all(80 <= drawn.count(value) <= 160 for value in range(1000, 1010))


def test_the_pool_is_hashed_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(_fewshot, "id_of", lambda row: hashed.append(row) or id_of(row))
    shots = Shots(dataclasses.replace(TASK, shots=numbers(*range(100))), 2, "document")
    for row in TASK.rows:
        shots.rows(row, id_of(row))
    assert hashed == numbers(*range(100))


def even(row):
    return None if row["n"] % 2 else ask(row)


@pytest.mark.parametrize("how", ["document", "lm_eval"])
@pytest.mark.parametrize(("strategy", "pool"), [("draw", range(0, 40, 2)), ("first", [0, 2, 4, 6])])
def test_rows_that_are_no_questions_are_not_shown_as_examples(how, strategy, pool):
    task = dataclasses.replace(TASK, ask=even, shots=numbers(*range(40)), fewshot_strategy=strategy)
    assert Shots(task, 3, how).pool == numbers(*pool)
    result = measure_task(LM, task, shots=3, fewshot=how)
    assert result.record.details["not_questions"] == 4  # of the eight rows, not of the forty in the pool


def test_a_pool_is_read_no_further_than_needed():
    task = dataclasses.replace(TASK, ask=even, shots=lambda: ({"n": n} for n in itertools.count()))
    assert len(Shots(task, 3, "document").pool) == POOL
    assert len(Shots(dataclasses.replace(task, fewshot_strategy="first"), 3, "document").pool) == 4


def test_a_pool_too_small_for_lm_eval_is_refused():
    task = dataclasses.replace(TASK, shots=numbers(1, 2, 3))
    for rows in (TASK.rows, Rows("x/y", split="validation")):
        with pytest.raises(TaskError, match=r"3 example\(s\), and its rows for that are 3, of which lm_eval draws one more"):
            Shots(dataclasses.replace(task, rows=rows), 3, "lm_eval")
    assert len(Shots(dataclasses.replace(task, rows=Rows("x/y", split="test")), 3, "lm_eval").rows({"n": 9}, "")) == 3
    with pytest.raises(TaskError, match="there are 1 examples beside row"):
        measure_task(LM, dataclasses.replace(task, shots=numbers(0, 0, 0, 1)), shots=2, fewshot="lm_eval", limit=1)
