"""A number that knows how certain it is.

>>> accuracy = Value(0.812, low=0.79, high=0.83, n=1200, higher_is_better=True)
>>> accuracy > 0.8, accuracy.low > 0.8
(True, False)
"""

from __future__ import annotations

import math
from typing import Any


class Value(float):
    """A float with its unit, 95 % interval, sample size and direction. A value or bound that is not finite is refused.

    low, high         95 % interval, or None where the sample is too small for one
    n                 what was counted or averaged over (tokens, examples, runs)
    higher_is_better  None where neither direction is better
    more              fields of a later version of `metrics.json`, kept as they are
    """

    __slots__ = ("high", "higher_is_better", "low", "more", "n", "unit")

    unit: str
    low: float | None
    high: float | None
    n: int | None
    higher_is_better: bool | None
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
        more: dict[str, Any] | None = None,
    ) -> Value:
        for number in (value, low, high):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"a value cannot be {number} (value {value}, interval {low} to {high}, n {n})")
        if (low is None) != (high is None):
            raise ValueError(f"an interval has two ends, and this one goes from {low} to {high}")
        self = super().__new__(cls, value)
        self.unit, self.n, self.higher_is_better, self.more = unit, n, higher_is_better, more or {}
        self.low = None if low is None else float(low)
        self.high = None if high is None else float(high)
        return self

    def __repr__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.6g}, {self.high:.6g}]"
        return f"{float(self):.6g}{interval}{' ' + self.unit if self.unit else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {**self.to_json(), "more": self.more}
        return _restore, (fields.pop("value"), fields)

    def to_json(self) -> dict[str, Any]:
        """The fields of `records._schema.ValueFields`."""
        return {
            "value": float(self),
            "unit": self.unit,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "higher_is_better": self.higher_is_better,
        }


def _restore(value: float, fields: dict[str, Any]) -> Value:
    return Value(value, **fields)
