"""Evaluations of language models as pytest tests: exact streaming, certified numbers, speed beside quality.

The names in `__init__.pyi` are the public face, beside those of `pytest_lmeval.laws`, `.tasks`, `.records`, `.errors` and
`.registry`; each is imported when it is first used, so that an installed but unused plugin costs nothing. A module whose name
begins with an underscore is private.
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
