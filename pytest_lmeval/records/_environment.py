"""Describe the machine and the software of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pytest_lmeval.records._document import Environment

PACKAGES = "pytest-lmeval torch pytest pytest-benchmark hypothesis numpy datasets transformers tokenizers"


def describe(*, root: Path, device: str, threads: int | None, seed: int) -> Environment:
    """Describe this process and the commit of the folder `root`. Runs git, without network access."""
    versions = versions_of(PACKAGES)
    commit = _git(root, "rev-parse", "HEAD")
    return Environment(
        python=platform.python_version(),
        torch=versions.get("torch"),
        device=device,
        cpu=processor(),
        cores=os.cpu_count(),
        threads=threads,
        platform=platform.platform(terse=True),
        packages=versions,
        commit=commit,
        dirty=bool(_git(root, "status", "--porcelain", "--untracked-files=no")) if commit else None,
        seed=seed,
    )


def versions_of(packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages.split():
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor() -> str:
    """The name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or sys.platform


def _git(root: Path, *arguments: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    return None
