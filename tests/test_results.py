"""Metrics are numbers, records survive JSON, the journal survives being killed, and version 1 stays readable."""

import json
import math
import pickle
import threading
import warnings
from importlib import resources
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Failing

from pytest_lmeval.records.journal import Checkpoints, Journal, key_of
from pytest_lmeval.records.record import Record, Series
from pytest_lmeval.records.value import Value

GOLDEN = Path(__file__).parent / "golden" / "metrics-1.json"
SCHEMA = json.loads(resources.files("pytest_lmeval.records").joinpath("schema.json").read_text())
FINITE = st.floats(allow_nan=False, allow_infinity=False)


# ------------------------------------------------------------------------------------------- metrics


@given(FINITE, FINITE)
def test_a_metric_computes_and_compares_like_its_value(value, other):
    metric = Value(value, "ms", low=value, high=value, n=3)
    assert metric == value
    assert (metric < other) == (value < other)
    assert metric + other == value + other or math.isnan(value + other)
    assert hash(metric) == hash(value)


@given(FINITE, st.none() | FINITE, st.none() | st.integers(0), st.sampled_from([None, True, False]))
def test_a_metric_survives_json_and_pickle(value, low, n, better):
    metric = Value(value, "s", low=low, high=low, n=n, higher_is_better=better)
    for again in (Value.from_json(json.loads(json.dumps(metric.to_json()))), pickle.loads(pickle.dumps(metric))):
        assert again.to_json() == metric.to_json()


@pytest.mark.parametrize("numbers", [{"value": math.nan}, {"value": math.inf}, {"value": 1.0, "low": math.nan}])
def test_a_number_that_is_not_finite_is_no_metric(numbers):
    with pytest.raises(ValueError, match="a metric cannot be"):
        Value(**numbers)


def test_a_metric_reads_with_its_interval_and_unit():
    assert repr(Value(3.14159265, "ms", low=3, high=3.5)) == "3.14159 [3, 3.5] ms"
    assert repr(Value(2)) == "2"


# ------------------------------------------------------------------------------------------- records


def a_record():
    return Record(
        kind="perplexity",
        subject="stdlib[test]",
        lm={"spec": "demo", "parameters": 1, "bytes": 4, "dtype": "float32", "device": "cpu", "fingerprint": "ab"},
        settings={"chunk_size": 64},
        metrics={"perplexity": Value(3.5, low=3.0, high=4.0, n=10, higher_is_better=False)},
        cost={"seconds": 1.5, "tokens": 10},
        series={"chunk_loss": Series([1.0], [2.0], "tokens", "nats/token")},
        test="test_a.py::test_b",
    )


def test_a_record_survives_json():
    assert Record.from_json(json.loads(json.dumps(a_record().to_json()))) == Record(
        **{**vars(a_record()), "cost": {"seconds": 1.5, "tokens": 10, "flops": None, "peak_bytes": None, "state_bytes": None}}
    )


def test_the_golden_file_of_version_1_can_still_be_read():
    document = json.loads(GOLDEN.read_text())
    records = [Record.from_json({k: v for k, v in data.items() if k != "outcome"}) for data in document["records"]]
    assert [record.kind for record in records] == ["equivalence", "perplexity", "latency", "throughput"]
    assert records[1].metrics["bits_per_byte"].low < records[1].metrics["bits_per_byte"]


def test_the_golden_file_fits_the_published_schema_and_a_damaged_one_does_not():
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(GOLDEN.read_text())
    jsonschema.validate(document, SCHEMA)
    del document["records"][0]["metrics"]["laws_kept"]["unit"]
    with pytest.raises(jsonschema.ValidationError, match="'unit' is a required property"):
        jsonschema.validate(document, SCHEMA)


# ------------------------------------------------------------------------------------------- journal


def test_a_new_journal_finds_what_an_interrupted_run_finished(tmp_path):
    Journal(tmp_path).add("key", {"value": 1})
    assert Journal(tmp_path).get("key") == {"value": 1}
    assert Journal(tmp_path).get("other") is None


def test_a_run_that_ended_is_history(tmp_path):
    Journal(tmp_path).add("key", {"value": 1})
    Journal(tmp_path).add("other", {"value": 3})
    Journal(tmp_path).end(["key"])
    assert Journal(tmp_path).get("key") is None
    assert Journal(tmp_path).get("other") == {"value": 3}  # left by a run of other tests, still to be taken up
    Journal(tmp_path).add("key", {"value": 2})
    assert Journal(tmp_path).get("key") == {"value": 2}


def test_fresh_forgets_the_interrupted_run(tmp_path):
    Journal(tmp_path).add("key", {"value": 1})
    Checkpoints(tmp_path / "partial").write("key", lambda file: file.write(b"x"))
    assert Journal(tmp_path, fresh=True).get("key") is None
    assert Checkpoints(tmp_path / "partial").read("key", lambda file: file.read()) is None


@settings(max_examples=60)
@given(st.integers(0, 400))
def test_a_journal_cut_anywhere_loses_at_most_its_last_line(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("journal")
    for number in range(4):
        Journal(folder).add(f"key{number}", {"value": number})
    content = (folder / "journal.jsonl").read_bytes()
    cut = min(cut, len(content))
    (folder / "journal.jsonl").write_bytes(content[:cut])
    whole_lines = content[:cut].count(b"\n")
    torn = content[:cut].rpartition(b"\n")[2]
    readable = whole_lines + (bool(torn) and content[cut : cut + 1] == b"\n")  # only the end of the line is missing
    broken = bool(torn) and readable == whole_lines
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        journal = Journal(folder)
        assert list(journal.results) == [f"key{number}" for number in range(readable)]
        journal.add("after", {"value": 9})
        assert Journal(folder).get("after") == {"value": 9}
    assert len(caught) == 2 * broken
    assert all(f"line {whole_lines + 1} is broken and was dropped" in str(warning.message) for warning in caught)


def test_workers_can_write_to_one_journal_at_once(tmp_path):
    def write(worker):
        for number in range(25):
            Journal(tmp_path).add(f"{worker}-{number}", {"text": "x" * 3000})

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(tmp_path).results) == 100


def test_a_saved_point_is_replaced_as_a_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write("key", lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.write("key", fail)
    assert checkpoints.read("key", lambda file: file.read()) == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["key.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, pytest.exit.Exception])
def test_what_stops_the_saving_of_a_point_comes_through_wherever_it_happens(tmp_path, error):
    """torch.save closes its half-written file then, and raises a RuntimeError about what is missing in it."""
    point, whole = {"state": torch.zeros(9)}, Failing(0, error)
    torch.save(point, whole)
    assert whole.writes > 10
    for place in range(1, whole.writes + 1):
        with pytest.raises(error, match="in the middle of it"):
            Checkpoints(tmp_path).write("key", lambda file, place=place: torch.save(point, Failing(place, error)))
    assert not any(tmp_path.iterdir())


def test_the_key_changes_with_everything_that_could_change_the_result():
    base = {"test": "a", "kind": "perplexity", "lm": "x", "settings": {"tokens": 1}, "data": "d"}
    keys = {key_of(**base)} | {key_of(**{**base, name: "other"}) for name in base}
    assert len(keys) == 6
    assert key_of(**base) == key_of(**dict(reversed(base.items())))
