"""A number that knows how certain it is.

>>> accuracy = Metric(0.812, unit="", low=0.79, high=0.83, n=1200, higher_is_better=True)
>>> accuracy > 0.8, accuracy.low > 0.8
(True, False)
"""

from __future__ import annotations

import math
from typing import Any


class Metric(float):
    """A float with its unit, 95 % interval, sample size and direction. A value or bound that is not finite is refused.

    low, high         95 % interval, or None where the sample is too small for one
    n                 what was counted or averaged over (tokens, examples, runs)
    higher_is_better  None where neither direction is better
    """

    __slots__ = ("high", "higher_is_better", "low", "n", "unit")

    unit: str
    low: float | None
    high: float | None
    n: int | None
    higher_is_better: bool | None

    def __new__(
        cls,
        value: float,
        unit: str = "",
        *,
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
        higher_is_better: bool | None = None,
    ) -> Metric:
        for number in (value, low, high):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"a metric cannot be {number} (value {value}, interval {low} to {high}, n {n}).")
        self = super().__new__(cls, value)
        self.unit, self.n, self.higher_is_better = unit, n, higher_is_better
        self.low = None if low is None else float(low)
        self.high = None if high is None else float(high)
        return self

    def __repr__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.6g}, {self.high:.6g}]"
        return f"{float(self):.6g}{interval}{' ' + self.unit if self.unit else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (float(self), self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "value": float(self),
            "unit": self.unit,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "higher_is_better": self.higher_is_better,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Metric:
        """The metric that `to_json` wrote."""
        options = {name: data.get(name) for name in ("low", "high", "n", "higher_is_better")}
        return cls(data["value"], data.get("unit", ""), **options)


def _restore(value: float, data: dict[str, Any]) -> Metric:
    return Metric.from_json({**data, "value": value})
