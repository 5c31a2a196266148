"""For the whole repository: only what every test and benchmark shares."""

import importlib.util
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers that take two threads each get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]

collect_ignore = [] if importlib.util.find_spec("transformers") else ["benchmarks/tiny_transformers.py"]
