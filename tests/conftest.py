"""For all tests: a user's project, fast runs of pytest in it, and no deadline for a property."""

import gc
import os
import sys
from pathlib import Path

import pytest
from fork_server import ForkServer
from hypothesis import settings
from packages import packages  # noqa: F401 - a fixture

TINY = Path(__file__).with_name("tiny.py")

settings.register_profile("untimed", deadline=None)  # a busy machine is no bug
settings.load_profile("untimed")


def pytest_collection_finish():
    """Leave what was imported to no garbage collection: timed code collects before it starts, which would search all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def fork_server():
    found = ForkServer()
    yield found
    found.close()


@pytest.fixture
def pytester(pytester, fork_server, monkeypatch):
    """pytest's own; but its runs are never workers of xdist, whatever runs the test, and are forked where that is possible."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    popen, pytest_command = pytester.popen, (sys.executable, "-mpytest")

    def forked(command, stdin, **files):
        if sys.platform == "linux" and command[:2] == pytest_command:  # elsewhere, a process that imported torch cannot fork
            return fork_server.popen(command[2:], **files)
        return popen(command, stdin=stdin, **files)

    monkeypatch.setattr(pytester, "popen", forked)
    return pytester


@pytest.fixture
def project(pytester):
    """A user's project: models of their own, a text, warnings as errors, and a probe that tries the floors of the laws.

    A budget of 1000 tokens buys next to nothing beyond the floors; a test that needs more cases asks for more.
    """
    pytester.makepyfile(tiny=TINY.read_text())
    pytester.makefile(".txt", text="It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    pytester.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\nlmeval_budget = 1000\n")
    return pytester
