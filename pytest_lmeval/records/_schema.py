"""From records to JSON and back, by their types: what does not fit is refused with its place, and never repaired.

The types are the schema: `json_schema()` is generated from them. Fields that a type does not have (of a later version) are
kept in its `more`, and written again.
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

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records._value import Value

T = TypeVar("T")
MORE = "__more__"  # how `Kept.more` is called among plain values: a name that no setting has
SHOWN = 60  # characters of a value that an error shows


class Kept(Struct, frozen=True, kw_only=True):
    """What every type of a file is made from. `more`: fields of a later version, kept as they are."""

    more: dict[str, Any] = field(default_factory=dict, name=MORE)


class ValueFields(Kept, frozen=True, kw_only=True):
    """A `Value` as it is written."""

    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    higher_is_better: bool | None = None


def parse(raw: bytes, what: str, again: str) -> Any:
    """The plain values of a JSON text. Raises DocumentError with the line and column where it is none."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise DocumentError(f"{what} is nested more deeply than anything that is written here. {again}.") from None
    except ValueError as error:
        at = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DocumentError(
            f"{what} is not whole JSON: {getattr(error, 'msg', error)}{at}. It was cut off, edited by hand, or a merge left "
            f"its marks, so none of its numbers can be trusted. {again}."
        ) from error


def check_version(found: Any, known: int, what: str, again: str) -> None:
    """Raise DocumentError for another schema version than the known one."""
    if found == known and not isinstance(found, bool):
        return
    if not isinstance(found, int) or isinstance(found, bool):
        said = f"its schema is {json.dumps(found)[:SHOWN]}" if found is not None else "it has no schema"
        raise DocumentError(
            f"{what} names no schema version that is a number ({said}), so what its fields mean is not known here. {again}."
        )
    later = found > known
    how = "Install the version of pytest-lmeval that wrote it" if later else f"It is of an older pytest-lmeval. {again}"
    raise DocumentError(
        f"{what} is of schema version {found!r}, and this pytest-lmeval reads version {known}: what its fields mean is not "
        f"known here. {how}{', or: ' + again[0].lower() + again[1:] if later else ''}."
    )


def build(plain: Any, kind: type[T], what: str, again: str, *, fault: str = "was damaged or edited by hand") -> T:
    """A record, or any other type of this package, from plain values. Raises DocumentError with the place of a fault.

    fault  what happened to `what` for it not to fit
    """
    try:
        return convert(plain, kind)
    except (ValueError, RecursionError) as error:
        place, reason = _locate(plain, kind, str(error))
        where = " > ".join(place)
        raise DocumentError(
            f"{what} {fault}: {f'{where}: ' if where else ''}{reason}. Nothing of it is used. {again}."
        ) from None


def convert(plain: Any, kind: type[T]) -> T:
    """The same; raises ValueError."""
    try:
        return msgspec.convert(_sorted(plain, kind), kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def checked(value: T, what: str, again: str) -> T:
    """What somebody's code has made, as it would come back from its file: a copy. Raises DocumentError where it would not."""
    try:
        plain = json.loads(text_of(to_plain(value)))
    except (ValueError, TypeError, RecursionError) as error:
        raise DocumentError(f"{what} cannot be written ({error}). Nothing of it is used. {again}.") from error
    return build(plain, type(value), what, again, fault="does not fit its type")


def to_plain(value: Any) -> Any:
    """Plain values (dict, list, str, int, float, bool, None) of a record, a document, or of a list or dict of such things."""
    if isinstance(value, dict):
        return {name: to_plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return _unsorted(msgspec.to_builtins(value, enc_hook=_encode), type(value))


def text_of(plain: Any) -> str:
    """Plain values as the text of a file. Raises ValueError for a number that is not finite."""
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def line_of(value: Any) -> str:
    """A value as a line of a JSON-lines file. Raises ValueError for a number that is not finite."""
    return json.dumps(to_plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `metrics.json`, generated from the types."""
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


def _encode(value: Any) -> Any:
    if isinstance(value, Value):
        return {**value.to_json(), **({MORE: value.more} if value.more else {})}
    if hasattr(value, "item"):  # a number of numpy or torch, among settings
        return value.item()
    return str(value)


def _decode(kind: type, plain: Any) -> Any:
    if kind is Value:
        fields = msgspec.convert(plain, ValueFields)
        return Value(**{name: getattr(fields, name) for name in ValueFields.__struct_fields__})
    raise NotImplementedError(f"{kind} is no type of a record")


def _schema_of(kind: type) -> dict[str, Any]:
    if kind is Value:
        return {**msgspec.json.schema(ValueFields)["$defs"]["ValueFields"], "title": "Value"}
    raise NotImplementedError(f"{kind} is no type of a record")


def _published(schema: Any) -> Any:
    """The schema without `Kept.more`, among properties and defaults: no file has a field of that name."""
    if isinstance(schema, dict):
        return {name: _published(part) for name, part in schema.items() if name != MORE}
    return [_published(part) for part in schema] if isinstance(schema, list) else schema


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is larger than any number that is written here")
    return number


def _int(text: str) -> int:
    if abs(_float(text)) >= 2**64:
        raise ValueError(f"{text[:SHOWN]} is larger than any number that is written here")
    return int(text)


def _sorted(plain: Any, kind: Any) -> Any:
    """The same values, in which what a type does not know stands in its `more`."""
    if not _may_hold_more(kind):
        return plain
    kind = _without_null(kind)
    if not isinstance(plain, dict) or not (_is_struct(kind) or kind is Value):
        return _rebuilt(plain, [_sorted(value, inner) for _, value, inner in _parts(plain, kind)])
    known = {name: _sorted(value, inner) for name, value, inner in _parts(plain, kind)}
    more = {name: value for name, value in plain.items() if name not in known}
    return {**known, **({MORE: more} if more else {})}


def _unsorted(plain: Any, kind: Any) -> Any:
    """The other way round: what stands in a `more` beside the fields that are known."""
    if not _may_hold_more(kind):
        return plain
    kind = _without_null(kind)
    parts = {name: _unsorted(value, inner) for name, value, inner in _parts(plain, kind)}
    if isinstance(plain, dict) and (_is_struct(kind) or kind is Value):
        return {**parts, **plain.get(MORE, {})}
    return _rebuilt(plain, [*parts.values()])


def _locate(plain: Any, kind: Any, message: str) -> tuple[list[str], str]:
    """The innermost place whose value does not fit its type, and why: keys by name, items counted from 1."""
    place: list[str] = []
    while (misfit := next(_misfits(plain, kind), None)) is not None:
        name, plain, kind, message = misfit
        place.append(name)
    shown = json.dumps(plain, default=str)
    return place, f"{message.partition(' - at ')[0]}; it is {shown[:SHOWN]}{'...' if len(shown) > SHOWN else ''}"


def _misfits(plain: Any, kind: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """The parts of a value that do not fit: the name of each, itself, its type, and what is wrong with it."""
    for name, value, inner in _parts(plain, _without_null(kind)):
        try:
            convert(value, inner)
        except ValueError as error:
            yield name, value, inner, str(error)


def _parts(plain: Any, kind: Any) -> list[tuple[str, Any, Any]]:
    """The parts of a value that its type has words for: the name of each, itself, and its type."""
    kind = ValueFields if kind is Value else kind
    if isinstance(plain, dict) and _is_struct(kind):
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


def _rebuilt(plain: Any, parts: list[Any]) -> Any:
    """The dict or list with other parts; anything else as it is."""
    if not parts:
        return plain
    return dict(zip(plain, parts, strict=True)) if isinstance(plain, dict) else parts


@functools.cache
def _may_hold_more(kind: Any) -> bool:
    """Whether a value of this type has a field `more` somewhere; long lists of numbers need not be looked through."""
    return kind is Value or _is_struct(kind) or any(_may_hold_more(part) for part in get_args(kind))


def _without_null(kind: Any) -> Any:
    """Of `X | None`, X."""
    kinds = [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) in (Union, UnionType) else [kind]
    return kinds[0] if len(kinds) == 1 else kind


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)
