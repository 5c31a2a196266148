"""Evaluate language models as pytest tests: exact streaming, certified numbers, speed and quality.

Public are the names in `__init__.pyi` and in `pytest_lmeval.laws`, `.tasks`, `.records`, `.errors` and `.registry`. Each is
imported when it is first used, so that an installed but unused plugin costs nothing. Modules that begin with an underscore are
private.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

_imported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        from pytest_lmeval.errors import UnknownVerb, nearest

        message = f"module {__name__!r} has no attribute {name!r}.{nearest(name, __all__)}"
        raise (AttributeError if name.startswith("_") else UnknownVerb)(message)
    return _imported(name)
