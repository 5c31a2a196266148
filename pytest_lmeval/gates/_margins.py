"""Read how much a metric may lose: from the marker, or from the declaration of the metric.

@pytest.mark.lmeval_gate(accuracy=0.01, perplexity="0.5%", throughput="-10%")      0.01 less; half a percent more
@pytest.mark.lmeval_gate(accuracy="off")                                           not compared
@pytest.mark.lmeval_gate("off")                                                    no metric of this test is compared
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_lmeval.records._metric import MARGIN, metric

OFF = "off"


@dataclass(frozen=True)
class Margin:
    """The loss that is allowed: `size` in the metric's unit, or as a fraction of the baseline if `relative`.

    sign   "-" or "+" if the marker had one: the direction in which the metric gets worse
    given  whether the marker named it
    """

    size: float
    relative: bool = False
    sign: str = ""
    given: bool = False

    def of(self, base: float) -> float:
        """The margin in the metric's unit."""
        return self.size * abs(base) if self.relative else self.size

    def __str__(self) -> str:
        return f"{100 * self.size:g} %" if self.relative else f"{self.size:g}"


@dataclass(frozen=True)
class Margins:
    """The marker of a test. `given`: metric -> margin, None where it is off; `off`: nothing is compared."""

    given: dict[str, Margin | None] = field(default_factory=dict)
    off: bool = False

    def of(self, name: str) -> Margin | None:
        """The margin of a metric; None if the marker turns it off."""
        return self.given[name] if name in self.given else parse(metric(name).margin)


def read_marker(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Margins:
    """The margins of a marker `lmeval_gate`. Raises ValueError for anything else."""
    if args and (args != (OFF,) or kwargs):
        raise ValueError(f'takes metrics by name, accuracy=0.01, or "off" alone; got {", ".join(map(repr, args))}.')
    return Margins({name: None if value == OFF else parse(value, name) for name, value in kwargs.items()}, off=bool(args))


def parse(value: Any, name: str = "") -> Margin:
    """A margin from 0.01 (in the unit of the metric) or "0.5%" (of the baseline). Raises ValueError for anything else."""
    match = MARGIN.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return Margin(abs(float(value)), sign="-" if value < 0 else "", given=bool(name))
    if match is None:
        raise ValueError(
            f"{name}={value!r} is no margin. Write what may be lost: a number in the unit of the metric ({name}=0.01), a "
            f'percentage of the baseline ({name}="0.5%"), or "off".'
        )
    size = float(match[2]) / (100 if match[3] else 1)
    return Margin(size, relative=bool(match[3]), sign=match[1], given=bool(name))


def check_sign(name: str, margin: Margin, higher_is_better: bool) -> str | None:
    """The error in the sign of a margin, in words; None if it is right."""
    worse, changes = ("-", "falls") if higher_is_better else ("+", "rises")
    if margin.sign in ("", worse):
        return None
    return f"{name} gets worse when it {changes}, so its margin is {worse}{margin} or {margin}, and not {margin.sign}{margin}"
