"""A file that cannot be written loses no result and hides no failure, and the report is always that of the last run."""

import fcntl
import os
import re
import shutil
import subprocess
import time

import pytest
from documents import perplexity_of
from test_plugin import metrics, run

from pytest_lmeval.__main__ import main
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import Journal
from pytest_lmeval.records._replacing import NEW, leftovers, replacing

TESTS = """
    import pathlib, shutil
    import pytest

    def fill():
        for size in (4096, 1):
            with open(".lmeval/filling", "ab", buffering=0) as file:
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    pass

    def take_away():
        shutil.move(".lmeval", "moved")
        pathlib.Path(".lmeval").write_text("in the way")

    @pytest.mark.filterwarnings("always")
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_reads(lmeval, lm, corpus, moment):
        spoil = {spoil}
        if moment == "before":
            spoil()
        assert lmeval.perplexity(lm, corpus("text:text.txt"), tokens=300, losses=True).perplexity < 500
        spoil()

    def test_fails(lmeval):
        assert 1 == 2
"""


@pytest.fixture
def small_disk(project):
    """The output folder on a file system of 256 KiB."""
    folder = project.path / ".lmeval"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield project
    subprocess.run(["umount", folder], check=True)


def spoiled(project, spoil, moment, *options):
    project.makepyfile(test_spoiled=TESTS.replace("{spoil}", spoil))
    (project.path / "temporary").mkdir()
    return run(project, "-k", f"{moment} or fails", "-W", "always", f"--basetemp={project.path / 'base'}", *options)


def check_other_folder(project, result):
    """The report is whole, in the folder that the run names, and none is left where it was asked for."""
    output = " ".join(result.stdout.str().split())
    assert "INTERNALERROR" not in output
    assert "assert 1 == 2" in output
    (folder,) = set(re.findall(r"so this run's report is in (\S+)\. Move it, or make room", output))
    found = metrics(project, folder)
    assert [record["test"].partition("[")[0] for record in found["records"]] == ["test_spoiled.py::test_reads"]
    assert [failure["test"] for failure in found["failures"]] == ["test_spoiled.py::test_fails"]
    assert {"metrics.json", "summary.md", "report.html"} <= set(os.listdir(folder))
    assert not (project.path / ".lmeval/metrics.json").exists()
    shutil.rmtree(folder)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_full_disk_shows_the_failures_and_names_another_folder(small_disk, moment):
    result = spoiled(small_disk, "fill", moment)
    result.assert_outcomes(passed=1, failed=1, **({"warnings": 4} if moment == "before" else {}))
    check_other_folder(small_disk, result)
    if moment == "before":
        for what in ("losses of this text are not kept", "examples of this measurement are not kept", "the run goes on"):
            assert what in result.stdout.str()


@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.thorough), "after"])
def test_a_file_in_place_of_the_folder_shows_the_failures_and_names_another_folder(project, moment):
    result = spoiled(project, "take_away", moment)
    check_other_folder(project, result)


def test_a_run_whose_results_are_elsewhere_is_not_green_and_its_results_are_taken_by_the_next(project):
    result = spoiled(project, "take_away", "after", "--deselect=test_spoiled.py::test_fails")
    result.assert_outcomes(passed=1, deselected=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    (project.path / ".lmeval").unlink()
    shutil.move(project.path / "moved", project.path / ".lmeval")
    project.makepyfile(test_spoiled=TESTS.replace("{spoil}", "lambda: None"))
    result = run(project, "-k", "after")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*: result taken from an interrupted run"])


def test_a_run_that_can_write_nowhere_says_so_and_shows_its_numbers(project, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc")
    project.makeconftest("import tempfile\ntempfile.tempdir = '/proc'\n")
    result = spoiled(project, "take_away", "after", "-q", "-q", "-q")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    output = " ".join(result.stdout.str().split())
    assert "Nothing is written: make room there, or name another folder" in output
    assert "perplexity" in output


# ------------------------------------------------------------------------------------------ nothing was recorded

FAILS = """
    import pytest

    @pytest.fixture
    def broken():
        raise RuntimeError("no model here")

    def test_setup(lmeval, broken):
        pass

    def test_call(lmeval):
        assert False, "before it measured"

    def test_records_nothing(lmeval):
        pass

    @pytest.mark.skip(reason="not today")
    def test_skipped(lmeval):
        pass

    def test_unrelated():
        pass
"""


@pytest.mark.parametrize(
    "options", [pytest.param([], id="alone"), pytest.param(["-n", "2"], id="xdist", marks=pytest.mark.thorough)]
)
def test_a_run_that_records_nothing_replaces_the_report_of_the_run_before(project, options):
    project.makepyfile(test_it="def test_own(lmeval, lm):\n    lmeval.record(lm, 'passkey', accuracy=0.5)\n")
    run(project).assert_outcomes(passed=1)
    assert "The test passed" in (project.path / ".lmeval/summary.md").read_text()
    project.makepyfile(test_it=FAILS)
    result = run(project, *options)
    result.assert_outcomes(passed=2, failed=1, errors=1, skipped=1)
    result.stdout.fnmatch_lines(["*= lmeval =*", "nothing was measured", "written to .lmeval: metrics.json, *"])
    found = metrics(project)
    assert found["records"] == []
    assert sorted(failure["test"] for failure in found["failures"]) == ["test_it.py::test_call", "test_it.py::test_setup"]
    assert {skipped["test"]: skipped["reason"] for skipped in found["skipped"]} == {
        "test_it.py::test_records_nothing": "it ran, and recorded nothing",
        "test_it.py::test_skipped": "not today",
    }
    for page in ("summary.md", "report.html"):
        text = (project.path / ".lmeval" / page).read_text()
        assert "Nothing was measured: 2 tests failed, 2 tests recorded nothing" in text
        assert "no model here" in text


@pytest.mark.parametrize("options", [["-k", "unrelated"], ["--collect-only"], ["--setup-plan"]])
def test_a_run_that_does_not_measure_leaves_the_folder_alone(project, options):
    project.makepyfile(test_it=FAILS)
    run(project, *options)
    assert not (project.path / ".lmeval/metrics.json").exists()


def test_a_fixture_of_the_same_name_is_none_of_ours(project):
    project.makepyfile(
        test_it="import pytest\n@pytest.fixture\ndef lmeval():\n    return 3\ndef test_it(lmeval):\n    assert lmeval == 3\n"
    )
    run(project).assert_outcomes(passed=1)
    assert not (project.path / ".lmeval").exists()


# ------------------------------------------------------------------------------------- leftovers and killed runs


def test_leftovers_are_deleted_when_a_run_ends_but_nothing_that_is_in_use(project):
    folder = project.path / ".lmeval"
    (folder / "partial").mkdir(parents=True)
    for name in (f"metrics.json.1{NEW}", f"partial/old.pt.2{NEW}", f"summary.md.3{NEW}", "partial/old.pt", "partial/new.jsonl"):
        (folder / name).write_text("x")
    os.utime(folder / "partial/old.pt", (time.time() - 15 * 24 * 3600,) * 2)
    project.makepyfile(test_it="def test_own(lmeval, lm):\n    lmeval.record(lm, 'passkey', accuracy=0.5)\n")
    with open(folder / f"summary.md.3{NEW}") as written:
        fcntl.flock(written, fcntl.LOCK_EX)
        run(project).assert_outcomes(passed=1)
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert left - {"history.jsonl", "journal.jsonl", "metrics.json", "report.html", "summary.md"} == {
        f"summary.md.3{NEW}",
        "partial/new.jsonl",
    }


def test_a_file_that_is_being_replaced_is_no_leftover(tmp_path):
    with replacing(tmp_path / "a.json") as new:
        new.write_text("{}")
        assert (leftovers(tmp_path), new.exists()) == ([], True)
    assert (tmp_path / "a.json").read_text() == "{}"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_the_results_of_a_killed_run_are_rendered_from_its_journal(tmp_path, capsys):
    before, after = perplexity_of(test="t.py::test_before"), perplexity_of(test="t.py::test_after")
    Journal(tmp_path).add("one", schema.to_plain(before))
    assert main(["render", str(tmp_path)]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "# lmeval: The run did not end: 1 test measured something before" in text
    assert "Python ," not in text  # the journal does not know the machine
    assert "test\\_before" in text
    assert "it was killed, or still runs" in capsys.readouterr().out
    Journal(tmp_path).end(["one"])
    assert main(["render", str(tmp_path)]) == 2
    Journal(tmp_path).add("two", schema.to_plain(after))
    assert main(["render", str(tmp_path)]) == 0
    assert "test\\_before" not in (tmp_path / "summary.md").read_text()
    assert "test\\_after" in (tmp_path / "report.html").read_text().replace("test_after", "test\\_after")
