"""The journal survives a kill, and a checkpoint exists whole or not at all."""

import threading
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import Failing

from pytest_lmeval.records._journal import Checkpoints, Journal, key_of


def test_a_new_journal_finds_the_results_of_unfinished_runs(tmp_path):
    Journal(tmp_path).add("key", {"value": 1})
    Journal(tmp_path).add("other", {"value": 3})
    assert [Journal(tmp_path).get(key) for key in ("key", "other", "none")] == [{"value": 1}, {"value": 3}, None]
    Journal(tmp_path).end(["key"])
    assert [Journal(tmp_path).get(key) for key in ("key", "other")] == [None, {"value": 3}]
    Journal(tmp_path).add("key", {"value": 2})
    assert Journal(tmp_path).get("key") == {"value": 2}


def test_fresh_forgets_the_interrupted_run(tmp_path):
    Journal(tmp_path).add("key", {"value": 1})
    Checkpoints(tmp_path / "partial").write("key", lambda file: file.write(b"x"))
    assert Journal(tmp_path, fresh=True).get("key") is None
    assert Checkpoints(tmp_path / "partial").read("key", lambda file: file.read()) is None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A journal of four lines, and its folder."""
    folder = tmp_path_factory.mktemp("journal")
    for number in range(4):
        Journal(folder).add(f"key{number}", {"value": number})
    return folder, (folder / "journal.jsonl").read_bytes()


@settings(max_examples=60)
@given(st.integers(0, 300))
def test_a_journal_truncated_anywhere_loses_at_most_its_last_line(written, cut):
    folder, content = written
    whole, rest = content[:cut], content[cut:]
    (folder / "journal.jsonl").write_bytes(whole)
    whole_lines, torn = whole.count(b"\n"), not whole.endswith(b"\n") and bool(whole)
    readable = whole_lines + (torn and rest[:1] == b"\n")  # only the end of the line is missing
    broken = torn and readable == whole_lines
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
        for number in range(10):
            Journal(tmp_path).add(f"{worker}-{number}", {"text": "x" * 3000})

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(tmp_path).results) == 40


def test_a_failed_save_leaves_the_checkpoint_before_it(tmp_path):
    def fail(file):
        file.write(b"sec")
        raise OSError("disk full")

    checkpoints = Checkpoints(tmp_path)
    checkpoints.write("key", lambda file: file.write(b"first"))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write("key", fail)
    assert checkpoints.read("key", lambda file: file.read()) == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["key.pt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError,
        *(pytest.param(error, marks=pytest.mark.thorough) for error in (KeyboardInterrupt, SystemExit, pytest.exit.Exception)),
    ],
)
def test_an_error_in_any_write_of_a_checkpoint_is_raised_as_it_is(tmp_path, error):
    """torch.save then closes its half-written file and raises a RuntimeError about that."""
    point, whole = {"state": torch.zeros(9)}, Failing(0, error)
    torch.save(point, whole)
    assert whole.writes > 10
    for write in range(1, whole.writes + 1):
        with pytest.raises(error, match="in the middle of it"):
            Checkpoints(tmp_path).write("key", lambda file, write=write: torch.save(point, Failing(write, error)))
    assert not any(tmp_path.iterdir())


def test_the_key_depends_on_everything_that_could_change_the_result():
    base = {"test": "a", "kind": "perplexity", "lm": "x", "settings": {"tokens": 1}, "data": "d"}
    keys = {key_of(**base)} | {key_of(**{**base, name: "other"}) for name in base}
    assert len(keys) == 6
    assert key_of(**base) == key_of(**dict(reversed(base.items())))
