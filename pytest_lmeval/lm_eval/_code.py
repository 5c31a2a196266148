"""Name the code that a task of lm_eval brings, and whether it is marked as unsafe, from its YAML, before any of it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


class Code(NamedTuple):
    """The functions that a task brings, FOLDER/MODULE.FUNCTION each, and whether it runs what the model writes."""

    functions: tuple[str, ...] = ()
    unsafe: bool = False


class _Function(str):
    """Stands for a function that is not loaded."""

    __slots__ = ()


def code_of(file: Path | None, changes: Mapping[str, Any] | None = None) -> Code:
    """The code of the task in this file, and in the `changes` that a group makes to it. A file that is broken has none: loading
    it says what is wrong."""
    from lm_eval.tasks import _yaml_loader as loader

    found: Any = {}
    if file is not None:
        named = mock.patch.object(loader, "_import_func_in_yml", lambda name, folder: _Function(f"{Path(folder).name}/{name}"))
        try:
            with named:
                found = loader.load_yaml(file, resolve_func=True)
        except Exception:  # noqa: BLE001 - whatever a file can do
            return Code()
    config = {**(found if isinstance(found, Mapping) else {}), **(changes or {})}
    return Code(tuple(dict.fromkeys(_functions(config))), bool(config.get("unsafe_code")))


def _functions(value: Any) -> Iterator[str]:
    if isinstance(value, _Function):
        yield str(value)
    elif callable(value):
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _functions(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _functions(one)
