"""For the whole repository: only what every test and benchmark shares."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers that take two threads each get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]
