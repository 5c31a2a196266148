"""Define `Value`, a number with its uncertainty.

>>> accuracy = Value(0.812, low=0.79, high=0.83, n=1200, higher_is_better=True)
>>> accuracy > 0.8, accuracy.low > 0.8, accuracy.interval
(True, False, (0.79, 0.83))
"""

from __future__ import annotations

import copyreg
import math
from numbers import Integral, Real
from typing import Any

from pytest_lmeval.errors import ArgumentError, NoIntervalError

FIELDS = ("unit", "low", "high", "n", "higher_is_better", "ties")
MANY_TIES = 0.01  # of the questions: so many can move an accuracy by the default margin of a gate


class Value(float):
    """A float with its unit, 95 % interval, sample size and direction.

    low, high         95 % interval; reading them raises NoIntervalError where there is none, with the reason
    interval          both, or None if there is none
    n                 number of things counted or averaged (tokens, examples, runs)
    higher_is_better  None if neither direction is better
    ties              how many of n are questions whose likeliest choices are equally likely (see `Example.likeliest`)
    more              unknown fields of a later version of `metrics.json`
    name              of its metric, where a record holds it
    why               there is no interval, and what to do about it: two sentences; not stored

    Raises ArgumentError for a number that is not finite, an interval that does not hold the value, or a field of another type.
    """

    __slots__ = ("higher_is_better", "interval", "more", "n", "name", "ties", "unit", "why")

    unit: str
    interval: tuple[float, float] | None
    n: int | None
    higher_is_better: bool | None
    ties: int
    more: dict[str, Any]
    name: str
    why: str

    def __new__(
        cls,
        value: float,
        unit: str = "",
        *,
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
        higher_is_better: bool | None = None,
        ties: int = 0,
        more: dict[str, Any] | None = None,
        name: str = "",
        why: str = "",
    ) -> Value:
        if not isinstance(unit, str) or not isinstance(higher_is_better, bool | None):
            raise ArgumentError(
                f"the unit of a value is a text and its direction True, False or None; got {unit!r}, {higher_is_better!r}"
            )
        if n is not None and (not isinstance(n, Integral) or isinstance(n, bool) or n < 0):
            raise ArgumentError(f"n is {n!r}: it is the number of things counted, or None")
        if not isinstance(ties, Integral) or isinstance(ties, bool) or not 0 <= ties <= (n or 0):
            raise ArgumentError(f"ties is {ties!r}: it is the number of ties among the n = {n} questions")
        for number in (value, low, high):
            if number is not None and not isinstance(number, Real):
                raise ArgumentError(f"a value and the ends of its interval are numbers; got {number!r}")
            if number is not None and not math.isfinite(number):
                raise ArgumentError(f"a value cannot be {number} (value {value}, interval {low} to {high}, n {n})")
        if (low is None) != (high is None):
            raise ArgumentError(f"an interval has two ends; this one goes from {low} to {high}")
        if low is not None and high is not None and not low <= value <= high:
            raise ArgumentError(f"a value lies in its interval; {value} does not lie between {low} and {high}")
        self = super().__new__(cls, value)
        interval = None if low is None or high is None else (float(low), float(high))
        fields = (higher_is_better, interval, more or {}, n, name, ties, unit, why)
        for slot, field in zip(self.__slots__, fields, strict=True):
            object.__setattr__(self, slot, field)
        return self

    @property
    def low(self) -> float:
        __tracebackhide__ = True
        return self._ends("low")[0]

    @property
    def high(self) -> float:
        __tracebackhide__ = True
        return self._ends("high")[1]

    def _ends(self, asked: str) -> tuple[float, float]:
        __tracebackhide__ = True
        if self.interval is None:
            n = "" if self.n is None else f", n = {self.n:,}"
            why = self.why or "Too little was read for one, or it was recorded without. Compare the value itself, or read more."
            raise NoIntervalError(
                f"{self.name or 'a value'} ({self!r}{n}) has no 95 % interval, so it has no `.{asked}` to compare with. {why}"
            )
        return self.interval

    def named(self, name: str) -> Value:
        """The same value as one of the metric of this name."""
        return self if name == self.name else type(self)(float(self), **{**self._options(), "name": name})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a value cannot change: make a new one instead of setting its {name} to {value!r}")

    def __repr__(self) -> str:
        interval = "" if self.interval is None else " [{:.6g}, {:.6g}]".format(*self.interval)
        return f"{float(self):.6g}{interval}{' ' + self.unit if self.unit else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj_ex__, (type(self), (float(self),), self._options())  # type: ignore[attr-defined]

    def _options(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return {"low": low, "high": high} | {slot: getattr(self, slot) for slot in self.__slots__ if slot != "interval"}

    @property
    def has_many_ties(self) -> bool:
        """Over 1 % of the questions are ties."""
        return self.ties > MANY_TIES * (self.n or 0)

    def to_json(self) -> dict[str, Any]:
        """The fields of `records._schema.ValueFields`, without ties if there are none: few metrics can have them."""
        options = self._options()
        return {"value": float(self)} | {name: options[name] for name in FIELDS if name != "ties" or self.ties}
