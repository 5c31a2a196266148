"""What a metric is: one declaration each, which everything that asks reads.

    BREVITY = Metric("brevity", score=lambda example: float(len(example.output) < 40), interval="share")

Whoever computes it makes its values with `Metric.value`; a summary asks whether it is a `headline`, a gate what may be lost of
it and how examples add up to it, a page what its score of one example was. A metric is found by its name among those that are
registered (`pytest_lmeval.metrics`); a name with a `*` declares a family, such as `loss_at_*`. Light: no torch, no numpy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pytest_lmeval import registry
from pytest_lmeval.records._value import Value

if TYPE_CHECKING:
    from pytest_lmeval.records._example import Example, Norm

Aspect = Literal["quality", "speed", "cost"]
Estimate: TypeAlias = "tuple[float, tuple[float, float] | None]"
"""A number, and its 95 % interval or None."""

SPEED_UNITS = ("s", "ms", "us", "ns", "tokens/s", "frames/s", "FLOP/s", "bytes/s")
STATISTICS = ("_mean", "_min", "_max", "_std", "_p90", "_p95", "_p99")  # of repeated times, under the name of what was timed


@dataclass(frozen=True)
class Metric:
    """What a metric is, and how it is made.

    name              by which a task asks for it, a marker names it, a record holds it
    unit              of its values, where they do not say another one (frames for tokens)
    higher_is_better  None where neither direction is better
    aspect            quality, of what the model says; speed, another in every run; cost: counted, the same in every run
    repeats           False for a cost that is another in every run too: the memory of a whole process
    about             its definition, in words or as a formula
    title             how tables call it; the name with blanks by default
    headline          whether summaries show it; the report shows all
    margin            what may be lost against a baseline: 0.01 in its unit, "0.5%" of the baseline
    aliases           names by which the marker of a gate may mean it too
    stands_for        a metric of the same quantity in another unit: where that is recorded too, it is the one that is gated
    compared          whether `lmeval compare-runs` compares it: a median, since one percentile of one run says little

    How it adds up:

    score        of one example: what it counts; None where the metric is not about that example
    sums         (above, below): of a reading, the sums over tokens whose ratio it is (see `records._example.Unit`)
    scale        what the mean is multiplied by
    exponential  whether it is the exponential of that mean
    interval     of the mean of its scores: "share" (each is 0 or 1) by Wilson's score, "mean" by the bootstrap
    statistic    (examples, seed) -> estimate: where it is no mean of its scores
    needs        what each example must have, one of `scoring._metrics.NEEDS`
    library      package that computes it, and must be there
    norm         what the log-likelihoods of choices are divided by before they are compared; None where it compares none
    """

    name: str
    unit: str = ""
    higher_is_better: bool | None = field(default=True, kw_only=True)
    aspect: Aspect = field(default="quality", kw_only=True)
    repeats: bool = field(default=True, kw_only=True)
    about: str = field(default="", kw_only=True)
    title: str = field(default="", kw_only=True)
    headline: bool = field(default=True, kw_only=True)
    margin: float | str = field(default=0.01, kw_only=True)
    aliases: tuple[str, ...] = field(default=(), kw_only=True)
    stands_for: str = field(default="", kw_only=True)
    compared: bool = field(default=False, kw_only=True)
    score: Callable[[Example], float | None] | None = field(default=None, kw_only=True)
    sums: tuple[str, str] | None = field(default=None, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    exponential: bool = field(default=False, kw_only=True)
    interval: Literal["share", "mean"] | None = field(default=None, kw_only=True)
    statistic: Callable[[Sequence[Example], int], Estimate | None] | None = field(default=None, kw_only=True)
    needs: str = field(default="an answer", kw_only=True)
    library: str | None = field(default=None, kw_only=True)
    norm: Norm | None = field(default=None, kw_only=True)

    def __str__(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        """How tables call it."""
        return self.title or self.name.replace("_", " ")

    @property
    def judges(self) -> bool:
        """Whether its score says that an answer is right (1), wrong (0), or something between."""
        adds_up = self.interval is not None or self.statistic is not None
        return self.score is not None and adds_up and not self.exponential and not self.unit

    @property
    def is_kept(self) -> bool:
        """Whether a baseline keeps it: not what is another in every run of the same code."""
        return self.aspect != "speed" and self.repeats

    def scaled(self, mean: float) -> float:
        """The metric that a mean of scores, or a ratio of sums, makes. Raises OverflowError where no float holds it."""
        return math.exp(self.scale * mean) if self.exponential else self.scale * mean

    def value(
        self,
        number: float,
        interval: tuple[float, float] | None = None,
        *,
        n: int | None = None,
        unit: str | None = None,
        higher_is_better: bool | None = None,
    ) -> Value:
        """A value of this metric. The interval is stretched to the number, where rounding, or the percentiles of a biased
        statistic, leave it out."""
        low, high = (None, None) if interval is None else (min(number, interval[0]), max(number, interval[1]))
        better = self.higher_is_better if higher_is_better is None else higher_is_better
        return Value(number, self.unit if unit is None else unit, low=low, high=high, n=n, higher_is_better=better)


def metric(name: str, value: Value | None = None) -> Metric:
    """The declaration of a metric. Of one that nobody declared, what its value tells: its unit and its direction.

    >>> metric("itl_p95").unit, metric("bits_per_byte").margin
    ('ms', '0.5%')
    """
    known, patterns = _declared()
    if name in known:
        return known[name]
    for pattern in patterns:
        if fnmatchcase(name, pattern.name):
            return replace(pattern, name=name)
    for ending in STATISTICS:
        if (base := name.removesuffix(ending)) in known:
            return replace(known[base], name=name, title="", headline=False, aliases=(), compared=False)
    if value is None:
        return Metric(name, higher_is_better=None)
    aspect: Aspect = "speed" if value.unit in SPEED_UNITS else "quality"
    return Metric(name, value.unit, higher_is_better=value.higher_is_better, aspect=aspect)


def headline_of(metrics: dict[str, Value]) -> str | None:
    """The metric that stands for a record where only one can: the first one of quality that has a direction, or that which it
    stands for."""
    for name, value in metrics.items():
        declared = metric(name, value)
        if declared.aspect == "quality" and value.higher_is_better is not None:
            return declared.stands_for if declared.stands_for in metrics else name
    return None


def value_of(name: str, number: float, interval: tuple[float, float] | None = None, **options: Any) -> Value:
    """A value of a declared metric (see `Metric.value`)."""
    return metric(name).value(number, interval, **options)


@functools.cache
def _declared() -> tuple[dict[str, Metric], list[Metric]]:
    """All that are registered: by name, and those that declare a family."""
    found: dict[str, Metric] = registry.mapping("metrics")
    return found, [thing for name, thing in found.items() if "*" in name]
