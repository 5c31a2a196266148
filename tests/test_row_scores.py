"""`Task.score` judges finished answers with their rows: which metrics it makes, what it may return, and what is kept."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from msgspec import structs
from reading import measure_task
from tiny_models import Functional

from pytest_lmeval import Choices, Generate, Suite, Task, as_model, suite
from pytest_lmeval.errors import DocumentError, TaskError
from pytest_lmeval.gates._compare import Side, compare
from pytest_lmeval.gates._entry import differs, entry_of
from pytest_lmeval.gates._margins import Margins
from pytest_lmeval.gates._scores import scores_of
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.report._examples import example_tables
from pytest_lmeval.scoring._row_scores import scorer_name
from pytest_lmeval.tasks import Extracted, scores

LM = as_model(Functional(vocab=256))
ROWS = [{"n": n} for n in range(12)]


def ask(row):
    return Generate(f"{row['n']} is", (), (), max_tokens=4)


def choose(row):
    return Choices(f"{row['n']} is", (" even", " odd"), row["n"] % 2)


def scored(score, rows=ROWS, ask=ask, **options):
    return measure_task(LM, Task("t", rows, ask, score=score), **options)


def even(row, answer):
    return row["n"] % 2 == 0


def test_a_truth_value_is_the_metric_score_a_proportion():
    result = scored(even)
    assert list(result.record.metrics) == ["score", "cut_off"]
    assert (result.score, result.score.n, result.score.higher_is_better) == (0.5, 12, True)
    assert result.score.interval == pytest.approx((0.2538, 0.7462), abs=1e-4)  # Wilson's
    assert [example.scores["score"] for example in result.examples] == [1, 0] * 6


def test_several_by_name_are_a_metric_each_and_numbers_beyond_0_and_1_have_students_interval():
    result = scored(lambda row, answer: {"even": even(row, answer), "third": row["n"] / 3, "exact_match": np.float32(0.5)})
    assert list(result.record.metrics) == ["even", "third", "exact_match", "cut_off"]
    n, sd = 12, np.std([row["n"] / 3 for row in ROWS], ddof=1)
    assert result.third.high - result.third == pytest.approx(2.2 * sd / math.sqrt(n), rel=0.05)
    assert result.exact_match == 0.5
    assert result.record.details["scored"] == {"even": True, "third": False, "exact_match": True}


def test_none_counts_as_0_in_every_metric_and_is_refused_whenever_it_comes():
    for first in (0, 5, 11):
        result = scored(lambda row, answer, first=first: None if row["n"] == first else {"a": 1, "b": 0.5})
        assert (result.a, result.b) == (pytest.approx(11 / 12), pytest.approx(5.5 / 12))
        assert [example.outcome for example in result.examples].count("refused") == 1
        assert result.examples[first].outcome == "refused"
    nothing = scored(lambda row, answer: None)
    assert (nothing.score, nothing.score.n) == (0, 12)
    part = scored(lambda row, answer: {"a": None, "b": True})
    assert (part.a, part.b, {one.outcome for one in part.examples}) == (0, 1, {"answered"})


def test_what_is_extracted_is_kept_with_the_example():
    result = scored(lambda row, answer: {"a": Extracted(str(row["n"]), True), "b": False})
    assert [example.extracted for example in result.examples[:2]] == [{"a": "0"}, {"a": "1"}]
    (line,) = [schema.line_of(example) for example in result.examples[:1]]
    assert '"extracted":{"a":"0"}' in line.replace(" ", "")


def test_a_choice_is_scored_by_its_text_and_a_tie_by_the_mean_over_its_choices():
    likes = scored(lambda row, answer: answer == ("even", "odd")[row["n"] % 2], ask=choose)
    assert list(likes.record.metrics) == ["score", "chance"]
    accuracy = measure_task(LM, Task("t", ROWS, choose)).accuracy
    assert likes.score == accuracy
    tied = scored(lambda row, answer: answer == "even", ask=lambda row: Choices("x", (" even", " even"), 0))
    assert tied.score == 1
    uniform = Functional(vocab=256)
    torch.nn.init.zeros_(uniform.head.weight), torch.nn.init.zeros_(uniform.head.bias)
    ab = Choices("x", (" a", " b"), 0)
    says_a = Task("t", ROWS, lambda row: ab, score=lambda row, answer: answer == "a")
    assert {example.scores["score"] for example in measure_task(as_model(uniform), says_a).examples} == {0.5}


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("right", "'right'"),
        ([True], r"\[True\]"),
        ({}, r"\{\}"),
        ({1: True}, r"\{1: True\}"),
        ({"a": "x"}, r"\{'a': 'x'\}"),
        (Extracted(3, True), r"Extracted\(text=3"),
        (Extracted("3", math.nan), r"Extracted\(text='3', score=nan"),
        (1j, "1j"),
    ],
)
def test_what_is_no_score_is_an_error_with_the_task_the_row_and_the_value(returned, shown):
    with pytest.raises(TaskError, match=rf"t, row 7 \(\w{{16}}\): the scorer returned {shown}.* Finished answers are kept"):
        scored(lambda row, answer: returned if row["n"] == 7 else 1.0)


@settings(max_examples=30)
@given(st.one_of(st.booleans(), st.integers(-3, 3), st.floats(-9, 9), st.just(Fraction(1, 3)), st.just(np.bool_(True))))
def test_every_finite_number_is_a_score(number):
    assert scored(lambda row, answer: number, ROWS[:2]).score == pytest.approx(float(number))


def test_a_scorer_that_raises_is_an_error_with_the_row_and_what_was_read_is_kept(tmp_path):
    kept = tmp_path / "kept.jsonl"

    def fails(row, answer):
        return 1 / (row["n"] - 9)

    with pytest.raises(TaskError, match=r"t, row 9 \(\w+\): the scorer raised ZeroDivisionError: .*, on the answer '"):
        scored(fails, kept=kept)
    again = scored(even, kept=kept)
    assert again.resumed == 12  # another scorer, and nothing is read again
    with pytest.raises(TaskError, match=r"row 0.* the scorer raised the field 'x' gives None"):
        scored(scores.exact("x"))


def test_other_names_on_another_row_are_refused():
    with pytest.raises(TaskError, match=r"row 3 .* returned scores named b, and of answers before it a\. .* None where"):
        scored(lambda row, answer: {"b" if row["n"] == 3 else "a": 1})
    with pytest.raises(TaskError, match="returned scores named score, and of answers before it a"):
        scored(lambda row, answer: True if row["n"] == 3 else {"a": 1})


@pytest.mark.parametrize(
    ("name", "metrics", "message"),
    [
        ("f1", None, "is a declared metric that is no mean"),
        ("perplexity", None, "is a declared metric that is no mean"),
        ("tokens_per_second", None, "is a declared metric that is no mean"),
        ("rate", ("rate",), "is among the `metrics` of the task, too"),
    ],
)
def test_a_name_that_means_something_else_is_refused(name, metrics, message):
    judge = (lambda text: True) if metrics else None
    task = Task("t", ROWS, ask, metrics, score=lambda row, answer: {name: 1}, judge=judge)
    with pytest.raises(TaskError, match=f"`score` returns a score named '{name}', which {message}"):
        measure_task(LM, task)


def test_a_judge_and_metrics_stand_beside_a_scorer():
    task = Task("t", ROWS, ask, judge=lambda text: bool(text) or None, score=even)
    assert list(measure_task(LM, task).record.metrics) == ["score", "rate", "cut_off"]
    asked = Task("t", ROWS, lambda row: dataclasses.replace(ask(row), answers=("x",)), ("exact_match", "score"), score=even)
    assert list(measure_task(LM, asked).record.metrics) == ["score", "exact_match", "cut_off"]
    with pytest.raises(TaskError, match="the metric 'score' is what the task's `score` says of an answer, and there is none"):
        Task("t", ROWS, ask, ("score",))
    with pytest.raises(TaskError, match="score is 'exact', of type str; it is a function"):
        Task("t", ROWS, ask, score="exact")


def test_a_scorer_is_given_the_row_as_ask_is_and_cannot_change_it():
    rows = [{"n": 1, "right": ["a"]}]
    with pytest.raises(TaskError, match="the field 'right' is written into a text"):
        scored(lambda row, answer: f"{row['right']}" in answer, rows)
    scored(lambda row, answer: not row["right"].append("b"), rows)
    assert rows == [{"n": 1, "right": ["a"]}]


def test_the_other_tasks_of_a_suite_go_on():
    def broken(row, answer):
        raise KeyError("no such field")

    tasks = (Task("broken", ROWS, ask, score=broken), Task("even", ROWS, ask, score=even))
    with pytest.raises(TaskError, match=r"1 of the 2 tasks of s failed.*\[broken\] broken, row 0 .*KeyError: 'no such field'"):
        suite(LM, Suite("s", tasks))
    both = suite(LM, Suite("s", (tasks[1], dataclasses.replace(tasks[1], name="named", score=lambda row, a: {"x": 1.0}))))
    assert both.average == 0.75


def test_a_gate_compares_what_a_scorer_names_example_by_example_and_says_where_the_scorer_changed(tmp_path):
    def side(score, name):
        result = scored(score, examples=tmp_path / name)
        record = _relative(result.record, name)
        return record, Side(entry_of(record), scores_of(record, tmp_path))

    one, base = side(lambda row, answer: {"own": True}, "a.jsonl")
    other, new = side(lambda row, answer: {"own": False}, "b.jsonl")
    assert one.settings["score"] != other.settings["score"]
    assert [difference.split(" ")[0] for difference in differs(base.entry, new.entry)] == ["score"]
    ((row,),) = [rows.values() for rows in compare([(base, new)], Margins(), 1)]
    assert (row.verdict, row.lost) == ("worse", 12)


def test_a_name_that_no_scorer_and_no_package_declares_is_still_refused_by_a_gate(tmp_path):
    """The broken twin: without what the record says of its scorer, how the scores add up is unknown."""
    result = scored(lambda row, answer: {"own": True}, examples=tmp_path / "a.jsonl")
    record = _relative(result.record, "a.jsonl")
    forgotten = structs.replace(record, details={**record.details, "scored": {}})
    with pytest.raises(DocumentError, match="no installed package registers the metric own"):
        scores_of(forgotten, tmp_path)
    assert scores_of(record, tmp_path).columns == {"own": [1] * 12, "cut_off": [0] * 12}


def test_the_report_marks_answers_by_the_first_score_that_judges(tmp_path):
    result = scored(lambda row, answer: {"length": 7.0, "own": even(row, answer)}, examples=tmp_path / "a.jsonl", ask=ask)
    (table,), _ = example_tables([_relative(result.record, "a.jsonl")], [tmp_path])
    assert table["columns"][0]["marks"] == "10" * 6


def _relative(record, name):
    return structs.replace(record, examples=name)


def test_scorers_are_told_apart_by_their_code_and_what_they_are_made_of():
    ready = [
        scores.exact("answer"), scores.exact("label"), scores.exact("answer", ignore=("case",)), scores.contains("answer"),
        scores.numeric("answer"), scores.letter("answer"), scores.letter("answer", "ABCDE"), scores.f1("answer"),
        scores.by_pattern("answer", scores.STRICT), scores.by_pattern("answer", scores.FLEXIBLE),
        scores.by_pattern("answer", {"x": scores.STRICT}), even,
    ]  # fmt: skip
    assert len({scorer_name(score) for score in ready}) == len(ready)
    assert scorer_name(scores.numeric("answer")) == scorer_name(scores.numeric("answer"))
    assert scorer_name(scores.numeric("answer")).startswith("numeric ")
