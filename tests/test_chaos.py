"""A small sample of `benchmarks/test_chaos.py`: a run that was killed, or whose disk or memory was full, loses nothing."""

import signal

import pytest
from chaos import KINDS, Project, differences, full_disk, why_no_disk
from memory_verbs import VERBS, differences as differ, read

HALFWAY = {"stream": signal.SIGKILL, "documents": signal.SIGTERM, "training": signal.SIGINT, "probe": signal.SIGHUP}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with Project(tmp_path_factory.mktemp("chaos")) as project:
        yield project


@pytest.mark.parametrize(
    "kind", [kind if kind in HALFWAY else pytest.param(kind, marks=pytest.mark.thorough) for kind in KINDS]
)
def test_a_killed_run_ends_with_the_same_bits(project, kind):
    expected, calls = project.undisturbed(kind)
    found = project.killed(kind, HALFWAY.get(kind, signal.SIGKILL), [calls - calls // 10])
    assert differences(expected, found) == []


@pytest.mark.skipif(why_no_disk() is not None, reason=str(why_no_disk()))
def test_a_full_disk_loses_no_result(project):
    expected, calls = project.undisturbed("documents")
    found = full_disk(project, "documents", calls - 5)
    assert found.wrong == []
    assert differences(expected["records"], found.records) == []


@pytest.mark.parametrize("verb", VERBS)
def test_memory_that_runs_out_changes_no_number(verb):
    expected, calls = read(verb)
    for at in (1, calls * 2 // 3):
        assert differ(verb, read(verb, at)[0], expected) == []
