"""Rows of tasks: their identity is their content and nothing else, and no value that is no text is asked as its repr."""

import datetime
import decimal
import json
import operator
import uuid
from functools import partial
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import measure_task
from tiny_models import Functional

from pytest_lmeval import Choices, Generate, Rows, Task, as_model
from pytest_lmeval.errors import TaskError
from pytest_lmeval.scoring._fewshot import question_of
from pytest_lmeval.tasks import find, id_of
from pytest_lmeval.tasks._rows import guarded

LM = as_model(Functional(vocab=256))
OF_JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


def values(leaves):
    """Leaves, and lists and objects of them."""

    def within(inner):
        return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)

    return st.recursive(leaves, within, max_leaves=6)


VALUES = values(OF_JSON | st.binary(max_size=4))
JSON = st.dictionaries(st.text(max_size=4), values(OF_JSON), max_size=4)


@settings(max_examples=60)
@given(JSON, JSON)
def test_rows_of_json_have_one_id_exactly_where_they_are_written_alike(row, other):
    one, two = (json.dumps(each, sort_keys=True) for each in (row, other))
    assert (id_of(row) == id_of(other)) == (one == two)
    assert id_of(dict(reversed(row.items()))) == id_of(json.loads(one)) == id_of(guarded(row)) == id_of(row)


def test_ids_stay_what_they_were():
    assert id_of({"n": 7, "text": "naïve", "list": [1, 2.5, None, True]}) == "689d9b6c3628d922"


class Point:
    def __init__(self, x):
        self.x = x

    def __repr__(self):
        return "a point"


LONG = np.arange(5000)
DISTINCT = {
    "a long array": LONG,
    "one that differs in its middle, which its repr does not show": np.where(LONG == 2500, 0, LONG),
    "its floats": LONG.astype(float),
    "its shape": LONG.reshape(2, -1),
    "a tensor": torch.arange(4999),
    "bytes": b"a",
    "other bytes": b"b",
    "text": "2024-03-01 00:00:00",
    "a date": datetime.date(2024, 3, 1),
    "a time": datetime.datetime(2024, 3, 1),
    "a time with a zone": datetime.datetime(2024, 3, 1, tzinfo=datetime.timezone.utc),
    "a time of numpy": np.datetime64("2024-03-01"),
    "a decimal": decimal.Decimal("1.10"),
    "another decimal": decimal.Decimal("1.1"),
    "a path": PurePosixPath("a/b"),
    "a uuid": uuid.UUID(int=3),
    "a set": {"a", "b", "c"},
    "numbers as names": {1: "a"},
    "texts as names": {"1": "a"},
    "objects": np.array(["a", None], dtype=object),
}


def test_the_id_of_any_value_is_its_own_content():
    ids = {name: id_of({"value": value}) for name, value in DISTINCT.items()}
    assert len(set(ids.values())) == len(DISTINCT)
    assert id_of({"value": LONG.astype(">i8")}) == id_of({"value": torch.arange(5000)}) == ids["a long array"]
    assert id_of({"value": frozenset("cab")}) == ids["a set"]
    assert id_of({"value": np.int64(3)}) == id_of({"value": 3})
    assert id_of({"value": np.float32(0.5)}) == id_of({"value": 0.5})


def test_the_id_of_an_image_is_its_pixels():
    image = pytest.importorskip("PIL.Image")
    white, black = (image.new("L", (9, 9), value) for value in (255, 0))
    assert id_of({"i": white}) == id_of({"i": white.copy()}) != id_of({"i": black})
    coloured, other = white.convert("P"), white.convert("P")
    other.putpalette([7] * 768)
    assert id_of({"i": coloured}) != id_of({"i": other})


def circle():
    row = {}
    row["again"] = row
    return row


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"a": {"points": [1, Point(1)]}},
            r"t, row 0: the field 'a\.points\[1\]' is a .*\.Point, which has no",
        ),
        ({"a": print}, "t, row 0: the field 'a' is a builtins.builtin_function_or_method"),
        ({"a": np.array([Point(1)])}, r"t, row 0: the field 'a\[0\]' is a .*\.Point"),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, r"the field 'a' is a torch\.Tensor, which has no content .*TypeError"),
    ],
)
def test_a_value_without_content_is_refused_with_its_field(row, says):
    task = Task("t", [row], lambda row: Choices("x", ("y",), 0))
    with pytest.raises(TaskError, match=says):
        measure_task(LM, task)
    with pytest.raises(TaskError, match=says.replace("row 0", "example 0")):
        measure_task(LM, Task("t", [{"n": 1}], task.ask, shots=[row, {"n": 2}]), shots=1)


def test_a_row_that_holds_itself_is_refused():
    with pytest.raises(TaskError, match="holds itself"):
        id_of(circle())


# --------------------------------------------------------------------------------------- what is asked


@settings(max_examples=150)
@given(VALUES, st.sampled_from([str, format, "{}".format, partial(operator.mod, "%s")]))
def test_a_list_an_object_or_bytes_are_never_asked_as_their_repr(value, how):
    def ask(row):
        return Choices(f"Q: {how(row['q'])}", ("a", "b"), 0)

    task = Task("t", [], ask)
    if isinstance(value, list | dict | bytes):
        kind = type(value).__name__
        with pytest.raises(TaskError, match=f"t, row 3: the field 'q' is written into a text, and it is a {kind}, no text"):
            question_of(task, {"q": value}, "row 3")
    else:
        assert question_of(task, {"q": value}, "row 3").prompt == f"Q: {value}"


def test_lists_and_objects_are_read_as_ever_and_written_on_purpose():
    row = {"q": ["a", {"b": (1, b"c")}], "n": 1}
    copy = guarded(row)
    assert copy == row
    assert (", ".join(copy["q"][:1]), json.dumps(copy["q"][0]), len(copy["q"]), copy["q"][1]["b"][0] + 1) == ("a", '"a"', 2, 2)
    assert repr(copy["q"]) == repr(row["q"])
    assert json.dumps(guarded({"l": [1, {"x": []}]})) == '{"l": [1, {"x": []}]}'
    with pytest.raises(TaskError, match=r"the field 'q\[1\]\.b\[1\]' is written into a text, and it is a bytes"):
        f"{copy['q'][1]['b'][1]}"
    with pytest.raises(TaskError, match="the row is written into a text, and it is a dict"):
        f"{copy}"


def test_what_a_question_does_to_its_row_changes_neither_the_row_nor_its_id():
    def ask(row):
        row["words"].append("more")
        return Choices(f"Q: {row.pop('n')}", ("a", "b"), 0)

    rows = [{"n": n, "words": []} for n in range(3)]
    found = measure_task(LM, Task("t", rows, ask)).examples
    assert [one.id for one in found] == [id_of({"n": n, "words": []}) for n in range(3)]


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        (
            "squad",
            {"title": "t", "context": "c", "question": "q", "answers": {"text": "Denver", "answer_start": [0]}},
            r"answers is 'Denver', which is not a sequence",
        ),
        ("squadv2", {"title": "t", "context": "c", "question": "q", "answers": {"text": "Denver"}}, "answers is 'Denver'"),
        (
            "squadv2",
            {"title": "t", "context": ["c"], "question": "q", "answers": {"text": []}},
            "the field 'context' is written",
        ),
        ("squad", {"title": "t", "context": "c", "question": "q", "answers": "Denver"}, "cannot be asked: TypeError"),
        ("mmlu_anatomy", {"question": "q", "choices": "abcd", "answer": 0}, "choices is 'abcd'"),
        ("mmlu_anatomy", {"question": "q", "choices": {"a": 1, "b": 2, "c": 3, "d": 4}, "answer": 0}, "choices is {'a': 1"),
        ("mmlu_anatomy", {"question": "q", "choices": ["a", "b", "c", ["d"]], "answer": 0}, r"one is \['d'\], of type _List"),
        ("arc_easy", {"question": "q", "choices": {"text": "ab", "label": ["A", "B"]}, "answerKey": "A"}, "choices is 'ab'"),
        ("hellaswag", {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": "ab", "label": "0"}, "endings is 'ab'"),
        ("record", {"passage": "p", "query": "q", "entities": "ab", "answers": ["a"]}, "entities is 'ab'"),
        ("boolq", {"passage": {"p": 1}, "question": "q", "label": 0}, "the field 'passage' is written into a text"),
        ("boolq", {"passage": "p\udc80", "question": "q", "label": 0}, r"has a lone surrogate, '\\udc80' at 1"),
    ],
)
def test_a_shipped_task_refuses_a_value_of_another_kind_with_its_file_and_line(tmp_path, name, row, says):
    (tmp_path / "rows.jsonl").write_text(f"\n{json.dumps(row)}\n")
    task = Task(name, Rows(f"jsonl:{tmp_path}/rows.jsonl"), find(name).ask)
    with pytest.raises(TaskError, match=rf"{name}, row 0 \(.*rows\.jsonl, line 2\).*{says}"):
        measure_task(LM, task)


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: Generate("x", {"a", "b"}), "answers is {.*}, which is not a sequence"),
        (lambda: Choices("x", b"ab", 0), "choices is b'ab', which is not a sequence"),
        (lambda: Choices("x", ("a", "b"), "1"), r"the label is '1', .* as all values of a CSV file are: write int\(\.\.\.\)"),
        (lambda: Choices("x", ("a",), 0, group=["p"]), r"the group is a text, or None, and this one is \['p'\], of type list"),
        (lambda: Task("t", [], find("boolq").ask, description="\ud800"), "description .* has a lone surrogate"),
    ],
)
def test_values_that_would_be_taken_apart_are_refused(declare, says):
    with pytest.raises(TaskError, match=says):
        declare()
