"""The journal survives being killed, and a saved point is there whole or not at all."""

import threading
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import Failing

from pytest_lmeval.records._journal import Checkpoints, Journal, key_of


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
