"""What a task, a suite and a question refuse, how rows of a dataset reach a task, and which examples a question is shown."""

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from reading import measure_task
from tiny_models import Functional

from pytest_lmeval import Choices, Generate, Rows, Suite, Task, as_model
from pytest_lmeval.errors import TaskError
from pytest_lmeval.scoring import _fewshot as fewshot
from pytest_lmeval.scoring._fewshot import Shots, question_of
from pytest_lmeval.tasks import id_of

LM = as_model(Functional(vocab=256))


def ask(row):
    return Choices(f"{row['n']} is", (" even", " odd"), row["n"] % 2)


def numbers(*values):
    return [{"n": n} for n in values]


TASK = Task("numbers", numbers(*range(8)), ask)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda: Choices("x", "yes", 0), r"choices is 'yes', where several may stand\. Write a tuple, .*: \('yes',\)"),
        (lambda: Choices("x", (" a",), 0, texts="a"), r"texts is 'a', .*\('a',\)"),
        (lambda: Choices("x", (" a",), 0, texts=(1,)), r"texts \(1,\): each is a text, and one is 1, of type int"),
        (lambda: Choices("x", (" a", 2), 0), r"choices \(' a', 2\): each is a text, and one is 2, of type int"),
        (lambda: Choices(7, (" a",), 0), "the prompt is a text, and this one is 7, of type int"),
        (lambda: Choices("x", (" a", " b"), True), "the label is True"),
        (lambda: Choices("x", (" a", " b"), 1.0), "the label is 1.0"),
        (lambda: Choices("x", (" a", " b"), np.int64(-1)), "the label is -1, and there are choices 0 to 1"),
        (lambda: Choices("x\ud800", (" a",), 0), r"the prompt .* has half a character, '\\ud800' at 1"),
        (lambda: Choices("x", ("\udfff",), 0), r"choices .* has half a character, '\\udfff' at 0"),
        (lambda: Generate(None, ("a",)), "the prompt is a text, and this one is None"),
        (lambda: Generate("x", "Paris"), r"answers is 'Paris', .*\('Paris',\)"),
        (lambda: Generate("x", (), stop="\n"), r"stop is '\\n', .*\('\\n',\)"),
        (lambda: Generate("x", (), stop=None), r"stop is None, where several may stand"),
        (lambda: Generate("x", (), max_tokens=2.0), r"max_tokens is 2\.0: .* a whole number"),
        (lambda: Generate("x", (), max_tokens=True), "max_tokens is True"),
        (lambda: Generate("x", (), max_tokens="9"), "max_tokens is '9'"),
        (lambda: Generate("x", (), temperature=math.nan), "temperature is nan: a temperature is a finite number"),
        (lambda: Generate("x", (), temperature=math.inf), "temperature is inf"),
        (lambda: Generate("x", (), temperature=-0.1), r"temperature is -0\.1"),
        (lambda: Generate("x", (), temperature="0"), "temperature is '0'"),
        (lambda: Generate("x", (), temperature=True), "temperature is True"),
        (lambda: Task("t", [], ask, metrics="accuracy"), r"metrics is 'accuracy', .*\('accuracy',\)"),
        (lambda: Task("t", [], ask, metrics=()), "t has no metrics"),
        (lambda: Task("t", [], ask, fewshot_strategy="frist"), "t: fewshot_strategy is 'frist'"),
        (lambda: speaking(threshold=0.0), r"threshold is 0\.0, and a rate is compared with a number between 0 and 1"),
        (lambda: speaking(threshold=1), "threshold is 1, "),
        (lambda: speaking(threshold=math.nan), "threshold is nan"),
        (lambda: speaking(threshold="0.5"), r"threshold is '0\.5'"),
        (lambda: speaking(threshold=0.5, judge=None), "there is no judge"),
        (lambda: speaking(threshold=0.5, metrics=("exact_match",)), "there is no metric 'rate' among exact_match"),
        (lambda: Suite("s", ()), r"the suite s has tasks \[\]: it has at least one"),
        (lambda: Suite("s", TASK), r"tasks is numbers, where several may stand\. .*: \(numbers,\)"),
        (lambda: Suite("s", ("boolq",)), r"the suite s has tasks \['boolq'\]: .* each is a Task"),
        (lambda: Suite("s", (TASK, dataclasses.replace(TASK, style="other"))), "s has several tasks called numbers"),
        (lambda: Suite("s", (dataclasses.replace(TASK, name="average"),)), "a task of the suite s is called 'average'"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_it_is_written(write, message):
    with pytest.raises(TaskError, match=message):
        write()


def speaking(**changes):
    options = {"metrics": ("rate",), "judge": str.isalpha, "threshold": 0.5} | changes
    return Task("t", [], lambda row: Generate("x", ()), **options)


def test_a_judge_may_do_without_a_threshold_and_lists_do_for_tuples():
    assert speaking(threshold=None).judge is str.isalpha
    assert speaking(metrics=["rate", "exact_match"]).metrics == ("rate", "exact_match")
    assert Suite("s", [TASK]).tasks == (TASK,)


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint32])
def test_whole_numbers_of_numpy_are_stored_as_those_of_python(kind):
    one, several = (Choices("x", (" a", " b"), answer) for answer in (kind(1), (kind(1), 0)))
    assert (one.answers, several.answers) == ((1,), (1, 0))
    assert {type(answer) for answer in (*one.answers, *several.answers)} == {int}
    assert type(Generate("x", (), max_tokens=kind(3)).max_tokens) is int


@pytest.mark.parametrize(
    ("returned", "message"),
    [("Is it?", "`ask` returned 'Is it\\?', of type str"), (False, "of type bool"), ((" a", 0), "of type tuple")],
)
def test_what_is_no_question_is_refused_with_its_row(returned, message):
    with pytest.raises(TaskError, match=f"t, row 0: .*{message}. It returns Choices or Generate, or None"):
        measure_task(LM, Task("t", numbers(1), lambda row: returned))


def test_a_row_with_half_a_character_has_an_id_and_is_refused_by_name_only_where_it_is_read():
    rows = [{"n": 1, "note": "\ud83d"}, {"n": 2, "note": "\ud83d\ude00"}]
    assert len({id_of(row) for row in (*rows, {"n": 2, "note": "😀"})}) == 3
    assert len(measure_task(LM, Task("t", rows, ask)).examples) == 2
    with pytest.raises(TaskError, match=r"t, row 0: the prompt .* has half a character"):
        measure_task(LM, Task("t", rows, lambda row: Choices(row["note"], (" a",), 0)))


def test_targets_that_a_metric_needs_are_missed():
    task = Task("t", numbers(1), lambda row: Generate("x", row.get("right", ()), max_tokens=2), ("exact_match",))
    with pytest.raises(TaskError, match="exact_match is computed from targets to compare with"):
        measure_task(LM, task)
    assert measure_task(LM, dataclasses.replace(task, rows=[{"right": [""]}])).exact_match.n == 1


# ------------------------------------------------------------------------------------- rows of a dataset


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return Rows(f"jsonl:{tmp_path}/rows.jsonl")

    return write


def passage(row):
    return Choices(f"{row['passage']} {row.get('hint', 'no hint')}", (" a", " b"), row["label"])


@pytest.mark.parametrize("second", [{"label": 1}, {"label": 1, "passage": None}])
def test_a_field_that_one_line_lacks_is_not_read_as_the_word_none(written, second):
    task = Task("t", written({"passage": "It is", "label": 0}, second), passage)
    with pytest.raises(TaskError, match=r"t, row 1 cannot be asked: the field 'passage' is missing or null\. The row is label"):
        measure_task(LM, task)


def test_a_field_that_a_line_of_examples_lacks_is_refused_too(written):
    task = Task("t", [{"passage": "p", "label": 0}], passage, shots=written({"label": 1, "passage": "q"}, {"label": 1}))
    with pytest.raises(TaskError, match=r"t, example 1 cannot be asked: the field 'passage' is missing or null"):
        measure_task(LM, task, shots=1)


def test_a_field_that_is_not_read_or_asked_for_by_get_may_be_null(written):
    rows = [{"passage": "p", "label": 0, "hint": "h", "more": 1}, {"passage": "q", "label": 1, "more": None}]
    found = measure_task(LM, Task("t", written(*rows), passage)).examples
    listed = measure_task(LM, Task("t", [rows[0], {"passage": "q", "label": 1}], passage)).examples
    assert [(one.id, one.prompt) for one in found] == [(one.id, one.prompt) for one in listed]


def test_a_null_would_pass_unseen_without_that():
    """The broken twin: a row as the library reads it."""
    question = question_of(Task("t", [], passage), {"passage": None, "label": 0}, "row 0")
    assert question.prompt.startswith("None")


# ----------------------------------------------------------------------------------------------- examples


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 3))
def test_a_question_is_shown_others_as_long_as_there_are_enough(values, count, seed):
    shots, own = pool_of(values, min(count, len(values)), seed), {"n": values[0]}
    others = [value for value in values if value != values[0]]
    if len(others) < shots.count:
        with pytest.raises(TaskError, match=f"there are {len(others)} examples beside row {id_of(own)} itself"):
            shots.of(own, id_of(own))
        return
    shown = [row["n"] for row in shots._rows(own, id_of(own))]
    assert len(shown) == shots.count
    assert not [value for value in set(shown) if shown.count(value) > others.count(value)]


def pool_of(values, count, seed=0):
    return Shots(dataclasses.replace(TASK, shots=numbers(*values)), count, "document", seed=seed)


def test_one_draw_more_than_needed_would_not_be_enough():
    """The broken twin draws one to spare: with duplicates of the row in the pool, it fails for some seed."""
    pool = [0, 0, 0, 1, 2]
    assert any(sum(map(bool, random.Random(seed).sample(pool, 3))) < 2 for seed in range(50))
    for seed in range(50):
        assert {row["n"] for row in pool_of(pool, 2, seed)._rows({"n": 0}, id_of({"n": 0}))} == {1, 2}


def test_each_of_the_pool_is_drawn_as_often():
    """Of 600 rows 2 of 10: 120 each, give or take 10."""
    shots = pool_of(range(1000, 1010), 2)
    drawn = [row["n"] for n in range(600) for row in shots._rows({"n": n}, id_of({"n": n}))]
    assert all(80 <= drawn.count(value) <= 160 for value in range(1000, 1010))


def test_the_pool_is_hashed_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(fewshot, "id_of", lambda row: hashed.append(row) or id_of(row))
    shots = pool_of(range(100), 2)
    for row in TASK.rows:
        shots._rows(row, id_of(row))
    assert len(hashed) == 100


def even(row):
    return None if row["n"] % 2 else ask(row)


@pytest.mark.parametrize(
    ("how", "strategy", "pool"), [("document", "draw", range(0, 40, 2)), ("document", "first", [0, 2, 4, 6]),
                              ("lm_eval", "draw", range(0, 40, 2)), ("lm_eval", "first", [0, 2, 4, 6])],
)  # fmt: skip
def test_rows_that_are_no_questions_are_no_examples(how, strategy, pool):
    task = dataclasses.replace(TASK, ask=even, shots=numbers(*range(40)), fewshot_strategy=strategy)
    assert Shots(task, 3, how).pool == numbers(*pool)
    result = measure_task(LM, task, shots=3, fewshot=how)
    assert result.record.details["not_questions"] == 4  # of the eight that are asked, none of the forty


def test_a_pool_is_read_no_further_than_it_is_needed():
    task = dataclasses.replace(TASK, ask=even, shots=lambda: ({"n": n} for n in itertools.count()))
    assert len(Shots(task, 3, "document").pool) == fewshot.POOL
    assert len(Shots(dataclasses.replace(task, fewshot_strategy="first"), 3, "document").pool) == 4


@pytest.mark.parametrize(
    ("rows", "enough"), [(TASK.rows, False), (Rows("x/y", split="validation"), False), (Rows("x/y"), True)]
)
def test_a_pool_that_is_too_small_for_the_one_to_spare_of_lm_eval_is_refused(rows, enough):
    task = dataclasses.replace(TASK, rows=rows, shots=numbers(1, 2, 3))
    if enough:
        assert len(Shots(task, 3, "lm_eval")._rows({"n": 9}, "")) == 3
        return
    with pytest.raises(TaskError, match=r"shown 3 example\(s\), and its rows for that are 3, of which lm_eval draws one more"):
        Shots(task, 3, "lm_eval")


def test_a_row_that_fills_the_pool_of_lm_eval_is_told():
    task = dataclasses.replace(TASK, shots=numbers(0, 0, 0, 1))
    with pytest.raises(TaskError, match="there are 1 examples beside row"):
        measure_task(LM, task, shots=2, fewshot="lm_eval", limit=1)
