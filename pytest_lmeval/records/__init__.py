"""What a run leaves behind: metrics and their values, typed records and examples, the journal, the history. No torch.

Public are `load(path)` and `dump(document)` of a `metrics.json`, its type `Document`, and `json_schema()`, generated from it.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"Document": "_document", "dump": "_document", "json_schema": "_schema", "load": "_document"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
