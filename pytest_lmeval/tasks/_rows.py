"""Identify a row by its content, and copy it so that its lists and objects cannot become text by mistake."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any, NoReturn
from uuid import UUID

from pytest_lmeval.errors import TaskError

WRITTEN = (datetime.date, datetime.time, datetime.timedelta, Decimal, Fraction, UUID, PurePath, complex)
"""Types of values that are not JSON, and that `str` writes exactly."""


def id_of(row: Any) -> str:
    """Sixteen hex digits that hash a row's content: its id in files, and the seed of its draws.

    Values are those of JSON, bytes, dates and times, decimals, sets, dataclasses, images, and arrays of numpy and torch; a long
    array counts in full. Equal ids mean equal content, in every process. Raises TaskError, with the field, for any other value.
    """
    try:
        content = json.dumps(_plain(row, ""), sort_keys=True, ensure_ascii=False)
    except RecursionError:
        raise TaskError("the row is nested too deeply, or holds itself, so it has no identity.") from None
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def _plain(value: Any, field: str) -> Any:
    """The value as JSON has it; a value that JSON lacks as a list that begins with its type."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(name, str) for name in value):
            return {name: _plain(part, f"{field}.{name}" if field else name) for name, part in value.items()}
        pairs = [[_plain(name, field), _plain(part, f"{field}[{name!r}]")] for name, part in value.items()]
        return ["\0mapping", *sorted(pairs, key=json.dumps)]
    if isinstance(value, bytes | bytearray | memoryview):
        return ["\0bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, Sequence):
        return [_plain(part, f"{field}[{index}]") for index, part in enumerate(value)]
    if isinstance(value, Set):
        return ["\0set", *sorted((_plain(part, field) for part in value), key=json.dumps)]
    if isinstance(value, WRITTEN):
        return [f"\0{type(value).__name__}", str(value)]
    if isinstance(value, Enum):
        return [f"\0{type(value).__name__}", _plain(value.value, field)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        return [f"\0{type(value).__name__}", _plain(parts, field)]
    return _array(value, field)


def _array(value: Any, field: str) -> Any:
    """The content of an array, a tensor, an image, or a single number of these."""
    if not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        raise _no_identity(value, field)
    import numpy as np

    mode = value.mode if isinstance(getattr(value, "mode", None), str) else ""  # of an image
    if "P" in mode:  # an image whose pixels are indices of a palette
        return [f"\0{mode}", _array(value.convert("RGBA"), field)]
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except Exception as error:
        raise _no_identity(value, field, f" ({type(error).__name__}: {error})") from error
    if array.dtype == object:
        if array.ndim == 0:
            raise _no_identity(value, field)
        return _plain(array.tolist(), field)
    if array.ndim == 0 and array.dtype.kind in "biufSU":
        return _plain(array.item(), field)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return ["\0array", mode, array.dtype.str, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]


def _no_identity(value: Any, field: str, why: str = "") -> TaskError:
    what = f"the field {field!r}" if field else "the row"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return TaskError(
        f"{what} is a {kind}, which has no content to hash{why}: its row could not be told from another, or known "
        "again in the next run. Put values into the row, and make the object in `ask`."
    )


def guarded(value: Any, field: str = "") -> Any:
    """A copy of a row, in which a list, object or bytes raises TaskError where it is written into a text.

    An f-string would write it as Python does, "['a', 'b']", and the question would be asked so. All else is as in the row:
    `repr` and `json.dumps` write it on purpose.
    """
    kind = type(value)  # classes derived from these may have a text of their own
    if kind is dict:
        copy: Any = _Object((name, guarded(part, f"{field}.{name}" if field else str(name))) for name, part in value.items())
    elif kind in (list, tuple):
        own = _List if kind is list else _Tuple
        copy = own(guarded(part, f"{field}[{index}]") for index, part in enumerate(value))
    elif kind is bytes:
        copy = _Bytes(value)
    else:
        return value
    copy.field = field
    return copy


class _NoText:
    field = ""

    def __str__(self) -> NoReturn:
        where, kind = f"the field {self.field!r}" if self.field else "the row", type(self).__bases__[1].__name__
        raise TaskError(
            f"{where} is written into a text, and it is a {kind}, no text: {repr(self)[:80]}. Correct the row, take a part of "
            "it, or write it out on purpose, for example with json.dumps."
        )

    def __format__(self, spec: str) -> str:
        return str(self)


class _Object(_NoText, dict[Any, Any]):
    pass


class _List(_NoText, list[Any]):
    pass


class _Tuple(_NoText, tuple[Any, ...]):
    pass


class _Bytes(_NoText, bytes):
    pass
