"""Convert records to and from JSON by their types. A value that does not fit is refused with its location, never repaired.

The types are the schema: `json_schema()` is generated from them. Fields that a type does not have (of a later version) are
kept in its `more` and written again.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct, field
from msgspec.structs import force_setattr

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records._value import Value

T = TypeVar("T")
MORE = "__more__"  # name of `StoredStruct.more` among plain values, which no field has
SHOWN = 60  # characters of a value that an error shows
DEEPEST = 100  # lists and objects within one another; what is written here has fewer than twenty


class StoredStruct(Struct, frozen=True, kw_only=True):
    """Base of all stored types. `more` holds unknown fields of a later version."""

    more: dict[str, Any] = field(default_factory=dict, name=MORE)


class ValueFields(StoredStruct, frozen=True, kw_only=True):
    """The stored form of a `Value`."""

    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    higher_is_better: bool | None = None
    ties: int = 0


def parse(raw: bytes, what: str, remedy: str) -> Any:
    """Parse a JSON text. Raises DocumentError with line and column if it is invalid, holds a number that is not finite, or is
    nested more than `DEEPEST` deep.

    what   name of the text in messages
    remedy  advice at the end of messages
    """
    try:
        plain = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_float, parse_int=_int)
        if not is_nested_deeper(plain):
            return plain
    except RecursionError:
        pass
    except ValueError as error:
        at = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DocumentError(
            f"{what} is not whole JSON: {getattr(error, 'msg', error)}{at}. It was truncated, edited by hand, or holds merge "
            f"conflict marks, so none of its numbers can be trusted. {remedy}."
        ) from error
    raise DocumentError(f"{what} is nested more deeply than any file that is written here. {remedy}.")


def is_nested_deeper(plain: Any, than: int = DEEPEST) -> bool:
    """Whether more lists and objects than this lie within one another: code that follows them would end in RecursionError."""
    parts = [plain]
    for _ in range(than):
        parts = [
            part
            for whole in parts
            if isinstance(whole, dict | list)
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
        if not parts:
            return False
    return True


def check_version(found: Any, known: int, what: str, remedy: str) -> None:
    """Raise DocumentError for another schema version than `known`."""
    if found == known and not isinstance(found, bool):
        return
    if not isinstance(found, int) or isinstance(found, bool):
        is_what = "it has no schema" if found is None else f"its schema is {json.dumps(found)[:SHOWN]}"
        raise DocumentError(
            f"{what} names no schema version that is a number ({is_what}), so the meaning of its fields is unknown. {remedy}."
        )
    how = f"It is of an older pytest-lmeval. {remedy}"
    if found > known:
        how = f"Install the version of pytest-lmeval that wrote it, or: {remedy[0].lower()}{remedy[1:]}"
    raise DocumentError(
        f"{what} is of schema version {found!r}, and this pytest-lmeval reads version {known}: the meaning of its fields is "
        f"unknown. {how}."
    )


def build(plain: Any, kind: type[T], what: str, remedy: str, *, fault: str = "was damaged or edited by hand") -> T:
    """Convert plain values to a stored type. Raises DocumentError with the location of the first value that does not fit.

    fault  what may have happened to `what`
    """
    try:
        return convert(plain, kind)
    except (ValueError, RecursionError) as error:
        location, reason = _locate(plain, kind, str(error))
        where = " > ".join(location)
        raise DocumentError(
            f"{what} {fault}: {f'{where}: ' if where else ''}{reason}. Nothing of it is used. {remedy}."
        ) from None


def convert(plain: Any, kind: type[T]) -> T:
    """Convert plain values to a stored type. Raises ValueError for a value that does not fit."""
    try:
        found = msgspec.convert(plain, kind, dec_hook=_decode)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ValueError(str(error)) from None
    for struct, own in _structs(found, plain):
        if unknown := {name: part for name, part in own.items() if name not in struct.__struct_encode_fields__}:
            force_setattr(struct, "more", unknown)
    return found


def checked(value: T, what: str, remedy: str) -> T:
    """Copy a value by writing and reading it. Raises DocumentError if it cannot be written or read back."""
    try:
        plain = json.loads(text_of(to_plain(value)))
    except (ValueError, TypeError, RecursionError) as error:
        raise DocumentError(f"{what} cannot be written ({error}). Nothing of it is used. {remedy}.") from error
    return build(plain, type(value), what, remedy, fault="does not fit its type")


def to_plain(value: Any) -> Any:
    """Convert stored types, and lists and dicts of them, to dict, list, str, int, float, bool and None."""
    if isinstance(value, dict):
        return {name: to_plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    plain = msgspec.to_builtins(value, enc_hook=_encode)
    for _, own in _structs(value, plain):
        own.update(own.pop(MORE, {}))
    return plain


def text_of(plain: Any) -> str:
    """Plain values as the text of a file. Raises ValueError for a number that is not finite."""
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def line_of(value: Any) -> str:
    """A value as a line of a JSON-lines file. Raises ValueError for a number that is not finite."""
    plain = to_plain(value)
    line = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    if not line.isascii() and any("\ud800" <= letter <= "\udfff" for letter in line):  # no UTF-8: text of a broken byte
        line = json.dumps(plain, allow_nan=False)
    return line + "\n"


def json_schema() -> dict[str, Any]:
    """Generate the JSON Schema of `metrics.json` from the types."""
    from pytest_lmeval.records._document import SCHEMA, RunDocument

    found: dict[str, Any] = _published(msgspec.json.schema(RunDocument, schema_hook=_schema_of))
    parts = found["$defs"]
    parts["RunDocument"]["properties"].pop("runs")
    parts["RunDocument"]["required"] = ["schema", "run", "environment", "records"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:pytest-lmeval:metrics:{SCHEMA}",
        "title": f"metrics.json of pytest-lmeval, schema version {SCHEMA}",
        **found,
    }


def _structs(value: Any, plain: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each struct within a value with its plain form."""
    if isinstance(value, Struct):
        yield value, plain
        parts = [(getattr(value, name), plain[name]) for name in value.__struct_fields__ if name in plain and name != "more"]
    elif isinstance(value, dict):
        parts = [(part, plain[name]) for name, part in value.items()]
    else:
        parts = list(zip(value, plain, strict=True)) if isinstance(value, list | tuple) else []
    for part, own in parts:
        yield from _structs(part, own)


def _encode(value: Any) -> Any:
    if isinstance(value, Value):
        return {**value.to_json(), **value.more}
    if hasattr(value, "item"):  # a number of numpy or torch among settings
        return value.item()
    return str(value)


def _decode(kind: type, plain: Any) -> Any:
    if kind is Value:
        known = msgspec.structs.asdict(msgspec.convert(plain, ValueFields))
        names = ValueFields.__struct_encode_fields__
        return Value(**{**known, "more": {name: part for name, part in plain.items() if name not in names}})
    raise NotImplementedError(f"{kind} is not a stored type")


def _schema_of(kind: type) -> dict[str, Any]:
    if kind is Value:
        return {**msgspec.json.schema(ValueFields)["$defs"]["ValueFields"], "title": "Value"}
    raise NotImplementedError(f"{kind} is not a stored type")


def _published(schema: Any) -> Any:
    """The schema without `StoredStruct.more`, a name that no file has."""
    if isinstance(schema, dict):
        return {name: _published(part) for name, part in schema.items() if name != MORE}
    return [_published(part) for part in schema] if isinstance(schema, list) else schema


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:SHOWN]} is larger than any number that is written here")
    return number


def _int(text: str) -> int:
    if abs(_float(text)) >= 2**64:
        raise ValueError(f"{text[:SHOWN]} is larger than any number that is written here")
    return int(text)


def _locate(plain: Any, kind: Any, message: str) -> tuple[list[str], str]:
    """The location of the innermost value that does not fit its type (keys, and items counted from 1), and the reason."""
    location: list[str] = []
    parts = _parts(plain, kind)
    while parts:
        name, value, inner = parts.pop(0)
        try:
            convert(value, inner)
        except ValueError as error:
            location.append(name)
            plain, message, parts = value, str(error), _parts(value, inner)
    shown = json.dumps(plain, default=str)
    return location, f"{message.partition(' - at ')[0]}; it is {shown[:SHOWN]}{'...' if len(shown) > SHOWN else ''}"


def _parts(plain: Any, kind: Any) -> list[tuple[str, Any, Any]]:
    """The name, value and type of each part of a value, as far as its type declares them."""
    kinds = [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) in (Union, UnionType) else [kind]
    kind = ValueFields if kinds[0] is Value else kinds[0]
    if isinstance(plain, dict) and isinstance(kind, type) and issubclass(kind, Struct):
        types = _types(kind)
        return [(name, value, types[name]) for name, value in plain.items() if name in types and name != "more"]
    if isinstance(plain, dict) and get_origin(kind) is dict:
        return [(str(name), value, get_args(kind)[1]) for name, value in plain.items()]
    if isinstance(plain, list | tuple) and get_origin(kind) in (list, tuple):
        return [(str(number), value, get_args(kind)[0]) for number, value in enumerate(plain, start=1)]
    return []


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
