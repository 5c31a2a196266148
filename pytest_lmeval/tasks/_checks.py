"""Check what the parts of a task are given: texts, several values, numbers. Each failure is a TaskError with the value."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Set
from numbers import Integral
from typing import Any

from pytest_lmeval.errors import TaskError, lone_surrogate

TURNS = (
    "conversation",
    "messages",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
)
"""Keywords of `apply_chat_template` that decide which turns are rendered, and as what."""


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Several texts as a tuple. Raises TaskError, with the name, for a single text and for a value among them that is none."""
    found = several(name, value)
    for text in found:
        check_text(f"{name} {found!r}: each is a text, and one", text)
    return found


def several(name: str, value: Any) -> tuple[Any, ...]:
    """The values as a tuple. A single text is refused: Python would take it for a sequence of letters. So is what has no order,
    or is a sequence of names or numbers."""
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        one = repr(value) if isinstance(value, str | bytes | Mapping | Set) else str(value)  # a task's name instead of its rows
        raise TaskError(f"{name} is {one}, which is not a sequence. Write a tuple, with a comma if it is one: ({one},)")
    return tuple(value)


def check_text(what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TaskError(f"{what} is {text!r}, of type {type(text).__name__}.")
    if wrong := lone_surrogate(text):
        raise TaskError(f"{what} has {wrong}")


def template_kwargs(what: str, given: Any) -> dict[str, Any]:
    """Keywords of a chat template, as a dict of their own. Raises TaskError for what cannot be recorded, and for keywords that
    are not the task's to give."""
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TaskError(f'{what}: chat_template_kwargs is {given!r}. It is a dict of keywords: {{"enable_thinking": False}}.')
    if taken := [name for name in TURNS if name in given]:
        raise TaskError(f"{what}: chat_template_kwargs has {taken[0]!r}, which follows from the questions. Leave it out.")
    try:
        json.dumps(dict(given))
    except (TypeError, ValueError) as error:
        raise TaskError(
            f"{what}: chat_template_kwargs is {dict(given)!r}, which cannot be recorded ({error}). Give texts, numbers, truth "
            "values, and lists and dicts of these."
        ) from error
    return dict(given)


def as_int(value: Any) -> Any:
    """An integer of numpy as one of Python; any other value unchanged."""
    return operator.index(value) if is_number(value, Integral) else value


def is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
