"""For all tests: a project of a user's, runs of pytest in it that start in half the time, and no deadline for a property."""

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


@pytest.fixture(scope="session")
def fork_server():
    found = ForkServer()
    yield found
    found.close()


@pytest.fixture
def pytester(pytester, fork_server, monkeypatch):
    """As pytest gives it; but its runs are no workers of xdist, whatever runs the test, and are forked where they can be."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    popen, pytest_command = pytester.popen, (sys.executable, "-mpytest")

    def forked(command, stdin, **files):
        if sys.platform == "linux" and command[:2] == pytest_command:  # elsewhere, what torch has begun may not be forked
            return fork_server.popen(command[2:], **files)
        return popen(command, stdin=stdin, **files)

    monkeypatch.setattr(pytester, "popen", forked)
    return pytester


@pytest.fixture
def project(pytester):
    """A user's project: models of their own, a text, no warning that is not an error, and little time for the probe."""
    pytester.makepyfile(tiny=TINY.read_text())
    pytester.makefile(".txt", text="It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    pytester.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\nlmeval_budget = 0.1\n")
    return pytester
