"""Every error that this package raises on purpose: one tree, so that `except LmevalError` catches them all.

    LmevalError
    |- UsageError (a TypeError too)
    |  |- ArgumentError (a ValueError too)
    |  `- UnknownVerb (an AttributeError too)
    |- RegistryError (a LookupError too)
    |- SpecError (a ValueError too): ProtocolError, UnreadableError
    |- ModelError (a RuntimeError too): NotFiniteError, Refused, OutOfMemory, ChildFailed, TrainingError
    |- HubError, ServerError (ConnectionErrors too)
    |- CorpusError, StreamError, TaskError, ProfilingError (ValueErrors too)
    |  `- of TaskError: WithheldError
    |- DocumentError (a ValueError too): BaselineError
    |- LawBroken (an AssertionError too)
    |- NoIntervalError (an AttributeError too)
    `- NotMeasuredError, NotPossible, SideError, MergeError, RankError

A message says what happened, with the values; why it matters; what to do. Standard library only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any


class LmevalError(Exception):
    """The base: a message written for the user. Raised as one of its children."""


class UsageError(LmevalError, TypeError):
    """A wrong call of a verb: a wrong name, too many or too few arguments, or a wrong value."""


class ArgumentError(UsageError, ValueError):
    """A value that a verb cannot take: an unknown profile or law, an impossible case, a number that is not finite."""


class UnknownVerb(UsageError, AttributeError):
    """A verb that does not exist; the message has the nearest name."""


class RegistryError(LmevalError, LookupError):
    """A name that nothing is registered under, or that two packages have registered."""


class SpecError(LmevalError, ValueError):
    """A model spec, device or precision that names nothing available here."""


class ProtocolError(SpecError):
    """A training protocol that cannot be followed, by any model or by this one."""


class UnreadableError(SpecError):
    """A file of weights that is missing or incomplete."""


class ModelError(LmevalError, RuntimeError):
    """A model does something that a language model does not do; the message says what, where and what to try."""


class NotFiniteError(ModelError):
    """A model gave a loss, or logits, that are not finite."""


class Refused(ModelError):
    """A number that the laws of the model do not support."""


class OutOfMemory(ModelError):
    """A shape that does not fit into the memory of the device; `wanted` is the size in bytes of the failed allocation, None if
    unknown."""

    def __init__(self, message: str, wanted: int | None = None) -> None:
        super().__init__(message)
        self.wanted = wanted


class ChildFailed(ModelError):
    """The process of a measurement ended without an answer; the message has its status and last lines."""


class TrainingError(ModelError):
    """A training that cannot go on: a number that is not finite, or a loss that diverged."""


class HubError(LmevalError, ConnectionError):
    """The hub was not reached, or refused; `status` is that of its answer, 0 without one."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ServerError(LmevalError, ConnectionError):
    """A server of a model was not reached, or refused; `status` is that of its answer, 0 without one."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class CorpusError(LmevalError, ValueError):
    """A corpus that cannot be read or scored. For an unknown name, see RegistryError."""


class StreamError(LmevalError, ValueError):
    """A stream that cannot be scored: too short, or with a token that the model does not have."""


class TaskError(LmevalError, ValueError):
    """A task that cannot be run: a row without a field, a label outside the choices, a suite in place of a task."""


class WithheldError(TaskError):
    """A metric that is not given, since too many answers say nothing; in a shard, pytest skips the test."""


class ProfilingError(LmevalError, ValueError):
    """A measurement that cannot be made with these settings."""


class NoIntervalError(LmevalError, AttributeError):
    """An end of the interval of a value that has none; the message says why."""


class NotMeasuredError(LmevalError):
    """A time that was not measured; pytest skips the test with the reason."""


class NotPossible(LmevalError):
    """A law that cannot be tried on this model."""


class LawBroken(LmevalError, AssertionError):
    """A case on which a model breaks a law.

    Raised as one of its children, one for each decade of `tolerance_ratio`: hypothesis shrinks each class apart, so that a
    gross fault does not hide a subtle one.

    case             the `laws.Case` that breaks it
    tolerance_ratio  the error over the allowed one
    error            the largest error, in nats (logits, for a law that is bit-equal)
    likely           the likely fault, in words
    """

    case: Any
    tolerance_ratio: float = math.inf
    error: float = math.inf
    likely: str = ""

    @property
    def decade(self) -> int:
        """0 for up to ten times the tolerance, 1 for up to a hundred, ... 9 for everything above."""
        ratio = self.tolerance_ratio
        return min(9, math.floor(math.log10(max(ratio, 1.0)))) if math.isfinite(ratio) else 9

    def __str__(self) -> str:
        return f"{super().__str__()} {self.likely}".rstrip()


class DocumentError(LmevalError, ValueError):
    """A file that is no metrics document of this schema."""


class BaselineError(DocumentError):
    """A baseline that cannot be read; the message names the file, the place in it, and what to do."""


class MergeError(LmevalError):
    """Shares of a run that cannot be merged; the message says which, and why."""


class RankError(LmevalError):
    """Another rank of this run failed, or is lost; the message names it."""


class SideError(LmevalError):
    """A version that `lmeval compare-runs` cannot run; the message has the reason and its last output."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A question to end a message with: the most similar known name. Empty if none is similar.

    >>> nearest("perplexty", ["perplexity", "task"]), nearest("x", ["perplexity"])
    (' Did you mean perplexity?', '')
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name.

    >>> no_such("law", "splitz", ["splits", "steps"])
    "there is no law 'splitz'. Did you mean splits? There are: splits, steps."
    """
    known = list(known)
    return f"there is no {kind} {name!r}.{nearest(str(name), known)} There are: {', '.join(known)}."


__all__ = sorted(name for name, thing in list(globals().items()) if isinstance(thing, type) and issubclass(thing, LmevalError))


def described(error: BaseException) -> str:
    """The first line of an error's message, after its type unless it is one of this package.

    >>> described(ValueError("no\\nmore")), described(KeyError()), described(HubError("It is down."))
    ('ValueError: no', 'KeyError: no message', 'It is down')
    """
    line = next(iter(str(error).strip().splitlines()), "no message")[:600].rstrip(".")
    return line if isinstance(error, LmevalError) else f"{type(error).__name__}: {line}"


def lone_surrogate(text: str) -> str | None:
    """The words for a lone surrogate in a text, to end a message with; None for a text without one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"a lone surrogate, {text[error.start]!r} at {error.start}, which no tokenizer can read. Correct or leave out its "
            "row: its text was cut inside a character, or decoded wrongly."
        )
    return None


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
