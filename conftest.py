"""For the whole repository: only what every test and benchmark shares."""

import importlib.util
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers that take two threads each get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]

collect_ignore = [] if importlib.util.find_spec("transformers") else ["benchmarks/tiny_transformers.py"]


@pytest.fixture(scope="session", autouse=True)
def only_the_run_itself_speaks_to_github():
    """The runs inside of tests do not; a session's fixtures end before its reports are written."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"):
            patch.delenv(name, raising=False)
        yield
