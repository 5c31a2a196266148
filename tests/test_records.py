"""Values are numbers; records and documents survive JSON; an invalid document is refused with the place of the fault."""

import functools
import json
import math
import pickle
import re

import pytest
from documents import GOLDEN, chosen, document, everything, generated, perplexity_of
from hypothesis import example, given, settings, strategies as st
from msgspec import structs

from pytest_lmeval.errors import ArgumentError, DocumentError, NoIntervalError
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import dump, load
from pytest_lmeval.records._environment import describe
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._measured import ModelFacts, Record, Series
from pytest_lmeval.records._metric import headline_of, value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.report import _pages as pages

FINITE = st.floats(allow_nan=False, allow_infinity=False)
EVERYTHING = json.loads(GOLDEN.read_text())


def read(folder, plain):
    file = folder / "metrics.json"
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


@given(FINITE, st.none() | FINITE, st.none() | st.integers(0), st.sampled_from([None, True, False]), st.booleans())
def test_a_value_survives_json_and_pickle(number, low, n, better, tied):
    ends = {} if low is None else {"low": min(low, number), "high": max(low, number)}
    value = Value(number, "s", **ends, n=n, higher_is_better=better, ties=(n or 0) * tied)
    for again in (schema.convert(json.loads(json.dumps(value.to_json())), Value), pickle.loads(pickle.dumps(value))):
        assert again.to_json() == value.to_json()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"value": math.nan}, "a value cannot be nan"),
        ({"value": math.inf}, "a value cannot be inf"),
        ({"low": math.nan, "high": 1.0}, "a value cannot be nan"),
        ({"low": 0.9, "high": 0.95}, "0.5 does not lie between 0.9 and 0.95"),
        ({"low": 0.4}, "an interval has two ends; this one goes from 0.4 to None"),
        ({"low": "a", "high": 1}, "the ends of its interval are numbers; got 'a'"),
        ({"unit": 3}, "the unit of a value is a text and its direction True, False or None; got 3, None"),
        ({"higher_is_better": "yes"}, "True, False or None; got '', 'yes'"),
        *(({"n": 3, "ties": ties}, f"ties is {ties!r}: it is the number of ties among the n = 3") for ties in (4, -1, 0.5)),
        ({"ties": 1}, "ties is 1: it is the number of ties among the n = None questions"),
        *(({"n": n}, f"n is {n!r}: it is the number of things counted, or None") for n in (2.5, -1, "a")),
    ],
)
def test_an_invalid_value_is_refused_when_it_is_made(fields, said):
    """And not when the run is written, which would lose what all other tests measured."""
    with pytest.raises(ArgumentError, match=re.escape(said)):
        Value(**{"value": 0.5, **fields})


@given(st.builds(value_of, st.sampled_from(["perplexity", "accuracy", "itl"]), FINITE, st.none()))
def test_an_interval_that_is_not_there_is_never_none_in_a_comparison(value):
    """And `hasattr` says that it is not there."""
    assert value.interval is None
    assert not hasattr(value, "low")
    for end in ("low", "high"):
        with pytest.raises(NoIntervalError, match=f"no `.{end}` to compare with. Too little was read or run"):
            _ = getattr(value, end) < 20


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (value_of("nll", 2.5, None, n=3), "^nll \\(2.5 nats/token, n = 3\\) has no 95 % interval, .* Read more"),
        (value_of("largest_difference", 2.5), "^largest_difference .* an extreme, or measured once"),
        (value_of("chance", 0.5, None), "^chance .* an extreme, or measured once"),  # no score has an interval
        (value_of("accuracy", 0.5, why="Asking ended."), "Asking ended.$"),
        (Value(0.97, n=100), r"^accuracy \(0.97, n = 100\) .* or it was recorded without"),
    ],
)
def test_the_error_names_the_metric_as_its_record_does_and_says_why(value, said):
    name = said[1:].partition(" ")[0] if said.startswith("^") else "accuracy"
    stored = Record(kind="custom", subject="all", lm=ModelFacts(spec="demo"), metrics={name: value})
    for again in (stored, structs.replace(stored, test="another"), pickle.loads(pickle.dumps(stored))):
        with pytest.raises(NoIntervalError, match=said):
            _ = again.metrics[name].low
    with pytest.raises(NoIntervalError, match=f"^{name} "):
        _ = schema.convert(schema.to_plain(stored), Record).metrics[name].high
    assert schema.to_plain(stored)["metrics"][name] == value.to_json()


@pytest.mark.parametrize("name", ["unit", "low", "n", "anything"])
def test_a_value_cannot_change(name):
    value = Value(0.5, "s", low=0.4, high=0.6)
    with pytest.raises(AttributeError, match="a value cannot change"):
        setattr(value, name, 1)
    assert value.to_json() == Value(0.5, "s", low=0.4, high=0.6).to_json()


def test_a_value_prints_its_interval_and_unit():
    assert repr(Value(3.14159265, "ms", low=3, high=3.5)) == "3.14159 [3, 3.5] ms"
    assert repr(Value(2)) == "2"


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [([1.0], [1.0, 2.0], "has 1 and 2"), ([1.0], [math.nan], "not finite"), ([math.inf], [1.0], "not finite")],
)
def test_an_invalid_curve_is_refused(x, y, said):
    with pytest.raises(ArgumentError, match=said):
        Series(x, y)
    with pytest.raises(ValueError, match=said):
        schema.convert({"x": x, "y": y}, Series)


def test_the_headline_of_a_record_is_its_first_quality_metric_or_the_one_that_this_stands_for():
    metrics = perplexity_of().metrics
    assert headline_of(metrics) == "bits_per_byte"
    assert headline_of({name: metrics[name] for name in ("tokens_per_second", "perplexity", "nll")}) == "perplexity"
    assert headline_of({"tokens_per_second": metrics["tokens_per_second"], "own": Value(1.0)}) is None
    assert headline_of({"own": Value(1.0), "brevity": Value(0.5, higher_is_better=True)}) == "brevity"


# ------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize(
    "line", [chosen(1), chosen(2, is_right=False, tokens=(1, 2), greedy=(True, False)), generated(3, "\ud800 yes")]
)
def test_an_example_survives_json(line):
    assert schema.convert(json.loads(schema.line_of(line)), Example) == line


@pytest.mark.parametrize("changes", [{"loglikelihoods": (-1.0,)}, {"right": (2,)}, {"tokens": (1,)}, {"chosen": 2}])
def test_an_example_whose_choices_do_not_match_is_refused(changes):
    with pytest.raises(ValueError, match="there are 2 choices"):
        chosen(1, **changes)


# ------------------------------------------------------------------------------------------- documents


def test_the_golden_file_of_version_2_is_read_and_written_without_change(tmp_path):
    text = dump(everything())
    assert json.loads(text) == EVERYTHING
    found = read(tmp_path, text)
    assert found == everything()
    assert repr(found.records[1].metrics["perplexity"]) == "3.5 [3.25, 3.75]"
    assert found.records[0].certificate.laws["splits"].counterexample == "off at token <3>"


def test_the_json_schema_accepts_a_document_and_refuses_a_damaged_one():
    jsonschema = pytest.importorskip("jsonschema")
    published = schema.json_schema()
    jsonschema.validate(EVERYTHING, published)
    damaged = edited(EVERYTHING, ("records", 1, "metrics", "perplexity"), {"unit": "nats"})
    with pytest.raises(jsonschema.ValidationError, match="'value' is a required property"):
        jsonschema.validate(damaged, published)
    text = json.dumps(published)
    assert '"title": "Value"' in text
    assert schema.MORE not in text
    assert "ValueFields" not in text


def with_unknown_fields(value):
    """Plain values with an additional field in each object that a type describes."""
    if isinstance(value, list):
        return [with_unknown_fields(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: part if name in FREE else with_unknown_fields(part) for name, part in value.items()} | {"later": {"more": 1}}


FREE = {"settings", "details", "case", "packages", "kept", "metrics", "laws", "series", "gate", "rows"}


def test_fields_of_a_later_version_are_kept(tmp_path):
    later = with_unknown_fields(EVERYTHING)
    later["records"][1]["metrics"]["perplexity"] |= {"later": 1, "more": 2}
    later["records"][0]["certificate"]["laws"]["splits"]["counterexamples"][0] |= {"later": [1], "more": {"a": 1}}
    found = read(tmp_path, later)
    assert json.loads(dump(found)) == later
    assert found.records[0].more == {"later": {"more": 1}}


def test_a_setting_may_have_any_name(tmp_path):
    settings = {"more": {"a": 1}, "n": {"more": 3}, schema.MORE: 4, "layers": (1, 2)}
    found = read(tmp_path, dump(document(perplexity_of(settings=settings, details={"more": "words"}))))
    assert found.records[0].settings == {**settings, "layers": [1, 2]}
    assert found.records[0].details == {"more": "words"}
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
        ('{"schema": "3", "records": []}', 'names no schema version that is a number (its schema is "3"), so the'),
        ('{"schema": true, "records": []}', "(its schema is true)"),
        ('{"records": []}', "names no schema version that is a number (it has no schema)"),
        ('{"schema": 7, "records": []}', "Install the version of pytest-lmeval that wrote it, or: run the tests again"),
        ('{"schema": 7, "records": {}}', "Install the version of pytest-lmeval that wrote it, or: run the tests again"),
        ("[1, 2]", "holds no list of records"),
        ("{}", "holds no list of records"),
        ("\xff", "is not whole JSON"),
    ],
)
def test_a_file_that_is_no_document_is_refused_with_what_to_do(tmp_path, text, said):
    with pytest.raises(DocumentError, match=r"metrics\.json") as refused:
        read(tmp_path, text)
    assert said in str(refused.value)


def test_a_missing_file_is_refused_with_the_folder_that_runs_write_to(tmp_path):
    with pytest.raises(DocumentError, match=r"cannot be read \(No such file or directory\). A run writes metrics.json into"):
        load(tmp_path / "elsewhere")


def paths(value, path=()):
    """The paths of all parts of plain values."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield (*path, name)
        yield from paths(part, (*path, name))


PATHS = st.sampled_from(list(paths(EVERYTHING)))
ODD = [None, 3, -1.5, "x", True, [1], ["x"], {"a": 1}]


def edited(plain, path, value):
    copy = json.loads(json.dumps(plain))
    at(copy, path[:-1])[path[-1]] = value
    return copy


def at(plain, path):
    return functools.reduce(lambda part, name: part[name], path, plain)


def check_edit(folder, path, value):
    """An edited document is refused with the place of the edit, or read with the new value."""
    try:
        found = read(folder, edited(EVERYTHING, path, value))
    except DocumentError as refused:
        place = str(refused).partition("edited by hand: ")[2].partition(":")[0].split(" > ")
        wanted = [str(part + 1) if isinstance(part, int) else part for part in path]
        common = min(len(place), len(wanted))  # if two fields contradict each other, the object that holds both is named
        assert path in [("schema",), ("records",)] or place[:common] == wanted[:common]
    else:
        parent = at(json.loads(dump(found)), path[:-1])
        kept = parent.get(path[-1]) if isinstance(parent, dict) else parent[path[-1]]  # a comparison omits its defaults
        if isinstance(value, dict):
            assert kept.items() >= value.items()
        else:
            assert kept == value or path[-1] == "kept"  # whether a law is kept follows from its counterexamples


@given(PATHS, st.sampled_from(ODD))
@example(("records", 1, "series", "loss_by_position", "y"), [1.0])
@example(("records", 1, "metrics", "perplexity", "low"), None)
@example(("records", 0, "certificate", "laws", "splits", "kept"), True)
def test_an_edited_document_is_refused_with_the_place_or_read_with_the_new_value(tmp_path_factory, path, value):
    check_edit(tmp_path_factory.mktemp("edited"), path, value)


@pytest.mark.thorough
def test_every_edit_is_refused_with_the_place_or_read_with_the_new_value(tmp_path):
    for path in paths(EVERYTHING):
        for value in ODD:
            check_edit(tmp_path, path, value)


@settings(max_examples=30)
@given(PATHS, st.sampled_from([*ODD, "nothing"]))
def test_a_document_that_is_not_refused_can_be_rendered(tmp_path_factory, path, value):
    plain = edited(EVERYTHING, path, value)
    if value == "nothing":
        del at(plain, path[:-1])[path[-1]]
    try:
        found = read(tmp_path_factory.mktemp("edited"), plain)
    except DocumentError:
        return
    assert all(pages.render(name, found) for name in pages.PAGES)


def test_the_environment_is_described(tmp_path):
    found = describe(root=tmp_path, device="cpu", threads=2, seed=0)
    assert (found.commit, found.dirty, found.threads) == (None, None, 2)
    assert found.packages["torch"] == found.torch
