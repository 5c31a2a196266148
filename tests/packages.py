"""Make packages for a test that register things by entry points: a module and its metadata in a folder on `sys.path`."""

import sys

import pytest

from pytest_lmeval import registry
from pytest_lmeval.records import _metric as metric


def install(folder, name, code, /, **groups):
    """A package `name` with one module, and its entry points: group -> {name: target}."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[pytest_lmeval.{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
             for group, points in groups.items()]  # fmt: skip
    (metadata / "entry_points.txt").write_text("\n".join(lines))


def forget():
    """Forget which packages are installed."""
    registry._installed.cache_clear()
    registry.entries.cache_clear()
    registry._loaded.cache_clear()
    metric._declared.cache_clear()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """`install` into a folder of this test, whose packages are installed until it ends."""
    folder, before = tmp_path / "site", set(sys.modules)
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def installed(name, code, /, **groups):
        install(folder, name, code, **groups)
        forget()

    yield installed
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(folder)):
            del sys.modules[module]
    monkeypatch.undo()
    forget()
