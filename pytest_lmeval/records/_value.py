"""Define `Value`, a number with its uncertainty.

>>> accuracy = Value(0.812, low=0.79, high=0.83, n=1200, higher_is_better=True)
>>> accuracy > 0.8, accuracy.low > 0.8
(True, False)
"""

from __future__ import annotations

import copyreg
import math
from numbers import Integral, Real
from typing import Any

from pytest_lmeval.errors import ArgumentError

FIELDS = ("unit", "low", "high", "n", "higher_is_better", "ties")
MANY_TIES = 0.01  # of the questions: so many can move an accuracy by the default margin of a gate


class Value(float):
    """A float with its unit, 95 % interval, sample size and direction.

    low, high         95 % interval, or None if the sample is too small for one
    n                 number of things counted or averaged (tokens, examples, runs)
    higher_is_better  None if neither direction is better
    ties              how many of n are questions whose likeliest choices are equally likely (see `Example.likeliest`)
    more              unknown fields of a later version of `metrics.json`

    Raises ArgumentError for a number that is not finite, an interval that does not hold the value, or a field of another type.
    """

    __slots__ = (*FIELDS, "more")

    unit: str
    low: float | None
    high: float | None
    n: int | None
    higher_is_better: bool | None
    ties: int
    more: dict[str, Any]

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
        low, high = None if low is None else float(low), None if high is None else float(high)
        for name, field in zip(FIELDS, (unit, low, high, n, higher_is_better, ties), strict=True):
            object.__setattr__(self, name, field)
        object.__setattr__(self, "more", more or {})
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a value cannot change: make a new one instead of setting its {name} to {value!r}")

    def __repr__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.6g}, {self.high:.6g}]"
        return f"{float(self):.6g}{interval}{' ' + self.unit if self.unit else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return copyreg.__newobj_ex__, (type(self), (float(self),), fields)  # type: ignore[attr-defined]

    @property
    def has_many_ties(self) -> bool:
        """Over 1 % of the questions are ties."""
        return self.ties > MANY_TIES * (self.n or 0)

    def to_json(self) -> dict[str, Any]:
        """The fields of `records._schema.ValueFields`, without ties if there are none: few metrics can have them."""
        return {"value": float(self)} | {name: getattr(self, name) for name in FIELDS if name != "ties" or self.ties}
