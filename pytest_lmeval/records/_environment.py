"""Describe where a run happens: enough to know whether two numbers may be compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pytest_lmeval.records._document import Environment

PACKAGES = (
    "pytest-lmeval",
    "torch",
    "pytest",
    "pytest-benchmark",
    "hypothesis",
    "numpy",
    "datasets",
    "transformers",
    "tokenizers",
)


def describe(*, root: Path, device: str, threads: int | None, seed: int) -> Environment:
    """The environment of this process. Runs git once, if the folder is a repository; never touches the network."""
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    commit = _git(root, "rev-parse", "HEAD")
    return Environment(
        python=platform.python_version(),
        torch=versions.get("torch"),
        device=device,
        cpu=_processor(),
        cores=os.cpu_count(),
        threads=threads,
        platform=platform.platform(terse=True),
        packages=versions,
        commit=commit,
        dirty=bool(_git(root, "status", "--porcelain", "--untracked-files=no")) if commit else None,
        seed=seed,
    )


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or sys.platform


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
