"""A small sample of `benchmarks/test_chaos.py`: a killed run, a full disk and memory that runs out lose nothing."""

import signal

import pytest
from chaos import KINDS, Project, differences, full_disk, why_no_disk
from memory_verbs import VERBS, differences as differ, read

LATE = {"stream": signal.SIGKILL, "documents": signal.SIGTERM, "training": signal.SIGINT, "probe": signal.SIGHUP}
OTHERS = [pytest.param(kind, marks=pytest.mark.thorough) for kind in KINDS if kind not in LATE]


@pytest.fixture(scope="module")
def project(tmp_path_factory, fork_server):
    with Project(tmp_path_factory.mktemp("chaos"), fork_server) as project:
        yield project


@pytest.mark.parametrize("kind", [*LATE, *OTHERS])
def test_a_killed_run_ends_with_the_same_bits(project, kind):
    expected, calls = project.undisturbed(kind)
    found = project.killed(kind, LATE.get(kind, signal.SIGKILL), [calls - calls // 10])
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
