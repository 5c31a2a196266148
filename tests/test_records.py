"""Values are numbers; records and documents come back from JSON as they were written, and damage is refused with its place."""

import functools
import json
import math
import pickle
import re
from pathlib import Path

import pytest
from documents import answered, document, everything, generated, reading
from hypothesis import example, given, settings, strategies as st

from pytest_lmeval.errors import ArgumentError, DocumentError
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import dump, load
from pytest_lmeval.records._environment import describe
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._measured import Series
from pytest_lmeval.records._metric import headline_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.report import _pages as pages

GOLDEN = Path(__file__).parent / "golden" / "metrics-2.json"
FINITE = st.floats(allow_nan=False, allow_infinity=False)
ODD = [None, 3, -1.5, "x", True, [1], ["x"], {"a": 1}]
EVERYTHING = json.loads(dump(everything()))


def read(tmp_path, plain):
    file = tmp_path / "metrics.json"
    file.write_text(plain if isinstance(plain, str) else json.dumps(plain))
    return load(file)


# ------------------------------------------------------------------------------------------- values


@given(FINITE, FINITE)
def test_a_value_computes_and_compares_like_its_number(number, other):
    value = Value(number, "ms", low=number, high=number, n=3)
    assert value == number
    assert (value < other) == (number < other)
    assert value + other == number + other or math.isnan(number + other)
    assert hash(value) == hash(number)


@given(FINITE, st.none() | FINITE, st.none() | st.integers(0), st.sampled_from([None, True, False]))
def test_a_value_survives_json_and_pickle(number, low, n, better):
    ends = {} if low is None else {"low": min(low, number), "high": max(low, number)}
    value = Value(number, "s", **ends, n=n, higher_is_better=better)
    for again in (schema.convert(json.loads(json.dumps(value.to_json())), Value), pickle.loads(pickle.dumps(value))):
        assert again.to_json() == value.to_json()


@pytest.mark.parametrize("numbers", [{"value": math.nan}, {"value": math.inf}, {"value": 1.0, "low": math.nan, "high": 1.0}])
def test_a_number_that_is_not_finite_is_no_value(numbers):
    with pytest.raises(ValueError, match="a value cannot be"):
        Value(**numbers)


def test_a_value_lies_in_its_interval():
    with pytest.raises(ValueError, match=r"0.5 does not lie between 0.9 and 0.95"):
        Value(0.5, low=0.9, high=0.95)


WRONG = [{"unit": 3}, {"n": 2.5}, {"n": -1}, {"n": "a"}, {"higher_is_better": "yes"}, {"low": "a", "high": 1}]


@pytest.mark.parametrize("field", WRONG)
def test_what_a_value_cannot_hold_is_refused_where_it_is_made(field):
    """Not where the run is written, which would lose what all other tests have measured."""
    with pytest.raises(ArgumentError, match=re.escape(repr(next(iter(field.values()))))):
        Value(0.5, **field)


@pytest.mark.parametrize("name", ["unit", "low", "n", "anything"])
def test_a_value_does_not_change(name):
    value = Value(0.5, "s", low=0.4, high=0.6)
    with pytest.raises(AttributeError, match="a value does not change"):
        setattr(value, name, 1)
    assert value.to_json() == Value(0.5, "s", low=0.4, high=0.6).to_json()


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [([1.0], [1.0, 2.0], "has 1 and 2"), ([1.0], [math.nan], "not finite"), ([math.inf], [1.0], "not finite")],
)
def test_what_is_no_curve_is_refused(x, y, said):
    with pytest.raises(ArgumentError, match=said):
        Series(x, y)
    with pytest.raises(ValueError, match=said):
        schema.convert({"x": x, "y": y}, Series)


def test_a_value_reads_with_its_interval_and_unit():
    assert repr(Value(3.14159265, "ms", low=3, high=3.5)) == "3.14159 [3, 3.5] ms"
    assert repr(Value(2)) == "2"


def test_the_headline_of_a_record_is_its_first_metric_of_quality_or_what_that_one_stands_for():
    metrics = reading().metrics
    assert headline_of(metrics) == "bits_per_byte"
    assert headline_of({name: metrics[name] for name in ("tokens_per_second", "perplexity", "nll")}) == "perplexity"
    assert headline_of({"tokens_per_second": metrics["tokens_per_second"], "own": Value(1.0)}) is None
    assert headline_of({"own": Value(1.0), "brevity": Value(0.5, higher_is_better=True)}) == "brevity"


# ------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize(
    "line", [answered(1), answered(2, is_right=False, tokens=(1, 2), greedy=(True, False)), generated(3, "\ud800 yes")]
)
def test_an_example_survives_json(line):
    assert schema.convert(json.loads(schema.line_of(line)), Example) == line


@pytest.mark.parametrize("changes", [{"loglikelihoods": (-1.0,)}, {"right": (2,)}, {"tokens": (1,)}])
def test_choices_that_do_not_fit_each_other_are_no_example(changes):
    with pytest.raises(ValueError, match="there are 2 choices"):
        answered(1, **changes)


# ------------------------------------------------------------------------------------------- documents


def test_the_golden_file_of_version_2_is_read_and_written_again_as_it_stands():
    assert json.loads(dump(load(GOLDEN))) == json.loads(GOLDEN.read_text())


def test_a_document_comes_back_as_it_was_written(tmp_path):
    found = read(tmp_path, dump(everything()))
    assert found == everything()
    assert dump(found) == dump(everything())
    assert repr(found.records[1].metrics["perplexity"]) == "3.5 [3.25, 3.75]"


def test_a_document_fits_the_schema_that_is_made_from_the_types_and_a_damaged_one_does_not():
    jsonschema = pytest.importorskip("jsonschema")
    published = schema.json_schema()
    jsonschema.validate(EVERYTHING, published)
    damaged = edited(EVERYTHING, ("records", 1, "metrics", "perplexity"), {"unit": "nats"})
    with pytest.raises(jsonschema.ValidationError, match="'value' is a required property"):
        jsonschema.validate(damaged, published)


def test_the_schema_names_nothing_that_is_private():
    published = json.dumps(schema.json_schema())
    assert schema.MORE not in published
    assert "ValueFields" not in published
    assert '"title": "Value"' in published


def with_unknown_fields(value):
    """Plain values with a field more in each object that a type describes."""
    if isinstance(value, list):
        return [with_unknown_fields(part) for part in value]
    if not isinstance(value, dict):
        return value
    free = value.keys() & FREE
    return {name: part if name in free else with_unknown_fields(part) for name, part in value.items()} | {"later": {"more": 1}}


FREE = {"settings", "details", "case", "packages", "kept", "metrics", "laws", "series", "gate", "rows"}


def test_fields_of_a_later_version_are_kept(tmp_path):
    later = with_unknown_fields(EVERYTHING)
    later["records"][1]["metrics"]["perplexity"]["later"] = 1
    later["records"][0]["certificate"]["laws"]["splits"]["counterexamples"][0]["later"] = [1]
    found = read(tmp_path, later)
    assert json.loads(dump(found)) == later
    assert found.records[0].more == {"later": {"more": 1}}


def test_a_setting_may_have_any_name(tmp_path):
    settings = {"more": {"a": 1}, "n": {"more": 3}, "layers": (1, 2)}
    found = read(tmp_path, dump(document(reading(settings=settings, details={"more": "said"}))))
    assert found.records[0].settings == {**settings, "layers": [1, 2]}
    assert found.records[0].details == {"more": "said"}
    assert found.records[0].more == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 2, "records": [{"te', "is not whole JSON: Unterminated string starting at at line 1, column 28"),
        ('{"schema": 2, "records": [], "run": {"seconds": NaN}}', "is not whole JSON: NaN is no number"),
        ('{"schema": 2, "records": [], "run": {"seconds": 1e999}}', "1e999 is larger than any number"),
        ('{"schema": 2, "records": [], "run": {"exit_status": 1' + "0" * 999 + "}}", "is larger than any number"),
        ("[" * 100_000, "is nested more deeply"),
        ('{"schema": 1, "records": []}', "It is of an older pytest-lmeval. Run the tests again"),
        ('{"schema": "3", "records": []}', 'names no schema version that is a number (its schema is "3"), so what'),
        ('{"schema": true, "records": []}', "(its schema is true)"),
        ('{"records": []}', "names no schema version that is a number (it has no schema)"),
        ('{"schema": 7, "records": []}', "Install the version of pytest-lmeval that wrote it, or: run the tests again"),
        ('{"schema": 7, "records": {}}', "Install the version of pytest-lmeval that wrote it, or: run the tests again"),
        ("[1, 2]", "holds no list of records"),
        ("{}", "holds no list of records"),
        ("\xff", "is not whole JSON"),
    ],
)
def test_what_is_no_document_is_refused_with_what_to_do(tmp_path, text, said):
    with pytest.raises(DocumentError, match=r"metrics\.json") as refused:
        read(tmp_path, text)
    assert said in str(refused.value)


def test_a_file_that_is_not_there_is_refused_with_where_runs_write_theirs(tmp_path):
    with pytest.raises(DocumentError, match=r"cannot be read \(No such file or directory\). A run writes metrics.json into"):
        load(tmp_path / "elsewhere")


def paths(value, path=()):
    """The paths of all parts of plain values."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield (*path, name)
        yield from paths(part, (*path, name))


def edited(plain, path, value):
    copy = json.loads(json.dumps(plain))
    at(copy, path[:-1])[path[-1]] = value
    return copy


def at(plain, path):
    return functools.reduce(lambda part, name: part[name], path, plain)


@settings(max_examples=300)
@given(st.sampled_from(list(paths(EVERYTHING))), st.sampled_from(ODD))
@example(("records", 1, "series", "loss_by_position", "y"), [1.0])
@example(("records", 1, "metrics", "perplexity", "low"), None)
@example(("records", 0, "certificate", "laws", "splits", "kept"), True)
def test_what_was_edited_is_refused_with_its_place_or_read_as_it_stands(tmp_path_factory, path, value):
    plain = edited(EVERYTHING, path, value)
    try:
        found = read(tmp_path_factory.mktemp("edited"), plain)
    except DocumentError as refused:
        place = str(refused).partition("edited by hand: ")[2].partition(":")[0].split(" > ")
        wanted = [str(part + 1) if isinstance(part, int) else part for part in path]
        common = min(len(place), len(wanted))  # of what fits no other field, the object that holds both is named
        assert path in [("schema",), ("records",)] or place[:common] == wanted[:common]
    else:
        parent = at(json.loads(dump(found)), path[:-1])
        kept = (
            parent.get(path[-1]) if isinstance(parent, dict) else parent[path[-1]]
        )  # of a comparison, no defaults are written
        if isinstance(value, dict):
            assert kept.items() >= value.items()
        else:
            assert kept == value or path[-1] == "kept"  # whether a law is kept follows from its counterexamples


@settings(max_examples=30)
@given(st.sampled_from(list(paths(EVERYTHING))), st.sampled_from([*ODD, "nothing"]))
def test_what_is_not_refused_can_be_rendered(tmp_path_factory, path, value):
    plain = edited(EVERYTHING, path, value)
    if value == "nothing":
        del at(plain, path[:-1])[path[-1]]
    try:
        found = read(tmp_path_factory.mktemp("edited"), plain)
    except DocumentError:
        return
    assert all(pages.render(name, found) for name in pages.PAGES)


def test_this_machine_is_described(tmp_path):
    found = describe(root=tmp_path, device="cpu", threads=2, seed=0)
    assert (found.commit, found.dirty, found.threads) == (None, None, 2)
    assert found.packages["torch"] == found.torch
    assert document(environment=found).environment is found
