"""Every error that this package raises on purpose: one tree, so that `except LmevalError` catches them all.

    LmevalError
    |- UsageError           a verb was called in a way that it does not know            (a TypeError too)
    |  |- ArgumentError     with a value that it cannot take                            (a ValueError too)
    |  `- UnknownVerb       by a name that no verb has                                  (an AttributeError too)
    |- RegistryError        a name that nothing, or more than one thing, is registered by (a LookupError too)
    |- SpecError            a spec, device or precision that cannot be had              (a ValueError too)
    |  |- ProtocolError     a training protocol that cannot be followed
    |  `- UnreadableError   a file of weights that is not there, or is not whole
    |- ModelError           the model did what a language model does not do             (a RuntimeError too)
    |  |- NotFiniteError    it gave a loss or logits that are not finite
    |  |- Refused           its laws do not support the number that was asked for
    |  |- OutOfMemory       the device has no room for a shape
    |  |- ChildFailed       the process that it was measured in ended without an answer
    |  `- TrainingError     its training cannot go on
    |- CorpusError          a text that cannot be read                                  (a ValueError too)
    |- StreamError          a stream that cannot be scored                              (a ValueError too)
    |- TaskError            a task that cannot be asked                                 (a ValueError too)
    |- ProfilingError       a measurement that cannot be made as it was asked for       (a ValueError too)
    |- NotMeasuredError     a time was asked for that was not taken; pytest skips the test
    |- NotPossible          a law that cannot be tried on this model
    |- LawBroken            a case on which a model breaks a law                        (an AssertionError too)
    |- DocumentError        a metrics.json that cannot be read                          (a ValueError too)
    |  `- BaselineError     a baseline that cannot be read
    `- SideError            a version that `lmeval compare-runs` cannot run

A message says what happened, with the values; why it matters; what to do. Standard library only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ArgumentError",
    "BaselineError",
    "ChildFailed",
    "CorpusError",
    "DocumentError",
    "LawBroken",
    "LmevalError",
    "ModelError",
    "NotFiniteError",
    "NotMeasuredError",
    "NotPossible",
    "OutOfMemory",
    "ProfilingError",
    "ProtocolError",
    "Refused",
    "RegistryError",
    "SideError",
    "SpecError",
    "StreamError",
    "TaskError",
    "TrainingError",
    "UnknownVerb",
    "UnreadableError",
    "UsageError",
]


class LmevalError(Exception):
    """What is wrong, in words that were written for the user. Raised as one of its children."""


class UsageError(LmevalError, TypeError):
    """A verb was called in a way that it does not know: by a wrong name, with too much or too little, or with a wrong value."""


class ArgumentError(UsageError, ValueError):
    """A value that a verb cannot take: an unknown profile or law, a case that is none, a number that is not finite."""


class UnknownVerb(UsageError, AttributeError):
    """A verb that does not exist; the message tells the nearest name."""


class RegistryError(LmevalError, LookupError):
    """A name that nothing is registered by, or that two packages have registered."""


class SpecError(LmevalError, ValueError):
    """A model spec, device or precision that names nothing that can be had here."""


class ProtocolError(SpecError):
    """A training protocol that cannot be followed: by anyone, or by this model."""


class UnreadableError(SpecError):
    """A file of weights that is not there, or is not whole."""


class ModelError(LmevalError, RuntimeError):
    """A model that did something a language model does not do; the message names what, where and what to try."""


class NotFiniteError(ModelError):
    """A model gave a loss, or logits, that are not finite numbers."""


class Refused(ModelError):
    """A number was asked for that nothing could stand behind."""


class OutOfMemory(ModelError):
    """A shape for which the memory of the device does not suffice; `wanted` is the size in bytes of the piece that could not
    be had, None where that is not known."""

    def __init__(self, message: str, wanted: int | None = None) -> None:
        super().__init__(message)
        self.wanted = wanted


class ChildFailed(ModelError):
    """The process in which something was to be measured ended without an answer; the message has its status and last lines."""


class TrainingError(ModelError):
    """A training that cannot go on: a number that is not finite, or a loss that went away."""


class CorpusError(LmevalError, ValueError):
    """A corpus that cannot be read, or holds something that cannot be scored. For an unknown name, see RegistryError."""


class StreamError(LmevalError, ValueError):
    """A stream that cannot be scored: too short, or with a token that the model does not have."""


class TaskError(LmevalError, ValueError):
    """A task that cannot be asked: a row without a field, a label outside the choices, a suite where a task is meant."""


class ProfilingError(LmevalError, ValueError):
    """A measurement that cannot be made as it was asked for."""


class NotMeasuredError(LmevalError):
    """A time was asked for that was not taken; under pytest, the test is skipped with the reason."""


class NotPossible(LmevalError):
    """A law that cannot be tried on this model."""


class LawBroken(LmevalError, AssertionError):
    """A case on which a model breaks a law. `share` is the error over what was allowed.

    What is raised is one of its children, a class for each decade of `share`: hypothesis shrinks each class apart, so
    that a gross fault does not hide a subtle one, nor the other way round.

    case    the `laws.Case` that breaks it
    error   the largest error, in nats (logits, for a law that is bit-equal)
    likely  the kind of fault that it looks like, in words
    """

    case: Any
    share: float = math.inf
    error: float = math.inf
    likely: str = ""

    @property
    def decade(self) -> int:
        """0 for up to ten times too much, 1 for up to a hundred, ... 9 for everything above."""
        return 9 if not math.isfinite(self.share) else min(9, max(0, math.floor(math.log10(max(self.share, 1.0)))))

    def __str__(self) -> str:
        return f"{super().__str__()} {self.likely}".rstrip()


class DocumentError(LmevalError, ValueError):
    """A file that is no metrics document of this schema; the message says where, what, and what to do."""


class BaselineError(DocumentError):
    """A baseline that cannot be read: the message names the file, the place in it, and what to do."""


class SideError(LmevalError):
    """A side of a comparison that cannot be run; the message says why, and what it wrote last."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A question to end a message with: did you mean the known name that is most like this one? Empty if none is.

    >>> nearest("perplexty", ["perplexity", "task"]), nearest("x", ["perplexity"])
    (' Did you mean perplexity?', '')
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is none of the known ones.

    >>> no_such("law", "splitz", ["splits", "steps"])
    "there is no law 'splitz'. Did you mean splits? There are: splits, steps."
    """
    known = list(known)
    return f"there is no {kind} {name!r}.{nearest(str(name), known)} There are: {', '.join(known)}."
