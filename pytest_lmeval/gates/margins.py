"""How much a metric may lose: what the marker says, and else what its kind allows. Standard library only.

@pytest.mark.lmeval_gate(accuracy=0.01, perplexity="0.5%", throughput="-10%")      0.01 less; half a percent more
@pytest.mark.lmeval_gate(accuracy="off")                                           not compared
@pytest.mark.lmeval_gate("off")                                                    nothing of this test is
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

OFF, NOT_JUDGED = "off", "not judged"
READINGS = ("bits_per_byte", "perplexity", "nll")  # the same losses in three units: one of them is gated
SPEED = ("throughput", "latency", "*_per_second", "seconds", "ttft*", "itl*", "tpot*", "e2e*", "prefill*", "cold")
SPEED_NAMES = {"throughput": ("tokens_per_second", "prefill_tokens_per_second"), "latency": ("e2e", "ttft", "itl")}
SPEED_UNITS = ("s", "ms", "us", "ns", "tokens/s", "frames/s")
COSTS = {  # what a computer does to the last operation, so that chance has no part in it -> what it may grow by
    "flops": "0%",
    "flops_forward": "0%",
    "flops_backward": "0%",
    "flops_total": "0%",
    "prefill_flops": "0%",
    "decode_flops": "0%",
    "state_bytes": "0%",
    "weights_bytes": "0%",
    "model_bytes": "0%",
    "parameters": "0%",
    "tensors_peak_bytes": "1%",
    "peak_bytes": "1%",  # of a CUDA device; elsewhere it is that of a process, and no baseline keeps it
    "verdict": "0%",
}
DEFAULTS = {"perplexity*": "0.5%", "nll*": "0.5%", "bits_per_byte": "0.5%", "loss_at_*": "0.5%", "bleu": "0.5"}


@dataclass(frozen=True)
class Margin:
    """What may be lost: `size` in the metric's unit, or as a share of the baseline if `relative`.

    sign   "-" or "+" where the marker had one: it must be the direction in which the metric gets worse
    given  whether the marker named it
    """

    size: float
    relative: bool = False
    sign: str = ""
    given: bool = False

    def of(self, base: float) -> float:
        """In the metric's unit.

        >>> Margin(0.005, relative=True).of(3.0)
        0.015
        """
        return self.size * abs(base) if self.relative else self.size

    def __str__(self) -> str:
        return f"{100 * self.size:g} %" if self.relative else f"{self.size:g}"


@dataclass(frozen=True)
class Margins:
    """What the marker of a test says: `given` metric -> margin, None where it is off. `off`: nothing is compared."""

    given: dict[str, Margin | None] = field(default_factory=dict)
    off: bool = False

    def of(self, name: str) -> Margin | None:
        """The margin of a metric; None where the marker turned it off."""
        if name in self.given:
            return self.given[name]
        known = {**DEFAULTS, **COSTS}
        return parse(next((margin for pattern, margin in known.items() if fnmatchcase(name, pattern)), 0.01))


def read_marker(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Margins:
    """What the marker `lmeval_gate` says. Raises ValueError for what is no margin.

    >>> read_marker((), {"accuracy": 0.01, "perplexity": "0.5%"}).given["perplexity"]
    Margin(size=0.005, relative=True, sign='', given=True)
    """
    if args and (args != (OFF,) or kwargs):
        raise ValueError(f'takes metrics by name, accuracy=0.01, or "off" alone; got {", ".join(map(repr, args))}.')
    return Margins({name: None if value == OFF else parse(value, name) for name, value in kwargs.items()}, off=bool(args))


def parse(value: Any, name: str = "") -> Margin:
    """A margin as it is written: 0.01 in the unit of the metric, "0.5%" of the baseline. Raises ValueError for all else."""
    match = re.fullmatch(r"([+-]?)(\d+\.?\d*|\.\d+)(\s*%)?", value.strip()) if isinstance(value, str) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return Margin(abs(float(value)), sign="-" if value < 0 else "", given=bool(name))
    if match is None:
        raise ValueError(
            f"{name}={value!r} is no margin. Write what may be lost: a number in the unit of the metric ({name}=0.01), a share "
            f'of the baseline ({name}="0.5%"), or "off".'
        )
    size = float(match[2]) / (100 if match[3] else 1)
    return Margin(size, relative=bool(match[3]), sign=match[1], given=bool(name))


def check_sign(name: str, margin: Margin, higher_is_better: bool) -> str | None:
    """What is wrong with the sign of a margin, in words; None if nothing is."""
    worse = "-" if higher_is_better else "+"
    if not margin.sign or margin.sign == worse:
        return None
    falls = "falls" if higher_is_better else "rises"
    return f"{name} gets worse when it {falls}, so its margin is {worse}{margin} or {margin}, and not {margin.sign}{margin}"


def is_speed(name: str, unit: str = "") -> bool:
    """Whether a metric is a time or a rate: two runs of the same code differ in it, and it is never gated here."""
    return unit in SPEED_UNITS or (not is_cost(name) and any(fnmatchcase(name, pattern) for pattern in SPEED))


def is_cost(name: str) -> bool:
    """Whether a metric is the same in every run of the same code, so that it can be compared as it is."""
    return name in COSTS
