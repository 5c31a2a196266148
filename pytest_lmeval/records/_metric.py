"""What a metric is: one declaration each, which everything that asks reads.

    BREVITY = Metric("brevity", score=lambda example: float(len(example.output) < 40), interval="share")

Whoever computes it makes its values with `Metric.value`; a summary asks whether it is a `headline`, a gate what may be lost of
it and how examples add up to it, a page what its score of one example was. A metric is found by its name among those that are
registered (`pytest_lmeval.metrics`); a name with a `*` declares a family, such as `loss_at_*`. Light: no torch, no numpy.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from pytest_lmeval import registry
from pytest_lmeval.errors import ArgumentError, RegistryError
from pytest_lmeval.records._value import Value

if TYPE_CHECKING:
    from pytest_lmeval.records._example import Example

Norm = Literal["sum", "token", "byte", "character"]
"""What the log-likelihood of a choice is divided by before choices are compared; "sum": by nothing."""

Aspect = Literal["quality", "speed", "cost"]
Needs = Literal[
    "an answer",
    "choices",
    "a right choice",
    "one right choice",
    "two choices, one of them right",
    "targets to compare with",
    "an output to be judged",
]
"""What an example must have before a metric can be computed from it."""
Estimate: TypeAlias = "tuple[float, tuple[float, float] | None]"
"""A number, and its 95 % interval or None."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "aspect": get_args(Aspect),
    "higher_is_better": (True, False, None),
    "needs": get_args(Needs),
    "interval": ("share", "mean", None),
    "norm": (*get_args(Norm), None),
}
"""What some fields of a metric may be."""

MARGIN = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(\s*%)?")
"""How a margin is written as text: its sign, its size, and whether that is a share of the baseline."""

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
    judges       whether that score says that an answer is right (1), wrong (0), or something between
    sums         (above, below): of a reading, the sums over tokens whose ratio it is (see `records._example.Unit`)
    scale        what the mean is multiplied by
    exponential  whether it is the exponential of that mean
    interval     of the mean of its scores: "share" (each is 0 or 1) by Wilson's score, "mean" by the bootstrap
    statistic    (examples, seed) -> estimate: where it is no mean of its scores
    needs        what each example must have (see `Needs`)
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
    judges: bool = field(default=False, kw_only=True)
    sums: tuple[str, str] | None = field(default=None, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    exponential: bool = field(default=False, kw_only=True)
    interval: Literal["share", "mean"] | None = field(default=None, kw_only=True)
    statistic: Callable[[Sequence[Example], int], Estimate | None] | None = field(default=None, kw_only=True)
    needs: Needs = field(default="an answer", kw_only=True)
    library: str | None = field(default=None, kw_only=True)
    norm: Norm | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for what, known in CHOICES.items():
            if (given := getattr(self, what)) not in known:
                raise ArgumentError(
                    f"the metric {self.name!r} has {what}={given!r}; it is one of {', '.join(map(repr, known))}."
                )
        if not (isinstance(self.name, str) and isinstance(self.unit, str)):
            raise ArgumentError(f"the metric {self.name!r} has the unit {self.unit!r}: name and unit are texts.")
        written = isinstance(self.margin, str) and MARGIN.fullmatch(self.margin.strip())
        if not written and (not isinstance(self.margin, int | float) or not math.isfinite(self.margin)):
            raise ArgumentError(f'the metric {self.name!r} has margin={self.margin!r}: it is a number, or a share as "0.5%".')
        if self.judges and (self.score is None or self.higher_is_better is False):
            has = "no score of one" if self.score is None else "a score of which less is better"
            raise ArgumentError(
                f"the metric {self.name!r} is to judge answers, and has {has}: a score that judges is 1 where an answer is "
                "right and 0 where it is wrong."
            )

    def __str__(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        """How tables call it."""
        return self.title or self.name.replace("_", " ")

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

    Raises RegistryError for a name that several packages register, and for one under which something else is registered.

    >>> metric("itl_p95").unit, metric("bits_per_byte").margin
    ('ms', '0.5%')
    """
    if (found := _registered(name)) is not None:
        return found
    known, _, _ = _declared()
    for ending in STATISTICS:
        if (base := name.removesuffix(ending)) in known:
            return replace(known[base], name=name, title="", headline=False, aliases=(), compared=False)
    if value is None:
        return Metric(name, higher_is_better=None)
    aspect: Aspect = "speed" if value.unit in SPEED_UNITS else "quality"
    return Metric(name, value.unit, higher_is_better=value.higher_is_better, aspect=aspect)


def is_declared(name: str) -> bool:
    """Whether somebody registers the metric, by its name or with its family."""
    return _registered(name) is not None


def _registered(name: str) -> Metric | None:
    """What is registered by this name, or declares a family with it."""
    known, patterns, refused = _declared()
    if name in refused:
        raise RegistryError(refused[name])
    if name in known:
        return known[name]
    return next((replace(pattern, name=name) for pattern in patterns if fnmatchcase(name, pattern.name)), None)


def judge_of(metrics: Iterable[Metric]) -> Metric | None:
    """The metric by which one answer is called right or wrong: the first of them that says so."""
    return next((metric for metric in metrics if metric.judges), None)


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
def _declared() -> tuple[dict[str, Metric], list[Metric], dict[str, str]]:
    """All that are registered: by name; those that declare a family; and why a name is refused, which concerns no other."""
    found, refused = dict[str, Metric](), dict[str, str]()
    for name, thing, entry in registry.things("metrics"):
        if name in found or name in refused:
            found.pop(name, None)
            refused[name] = str(registry.ambiguous("metrics", name))
        elif not isinstance(thing, Metric) or thing.name != name:
            is_what = f"the metric {thing.name!r}" if isinstance(thing, Metric) else f"of the type {type(thing).__name__}"
            refused[name] = f"{entry} registers the metric {name!r}, and that is {is_what}: it is to be a Metric of that name."
        else:
            found[name] = thing
    return found, [thing for name, thing in found.items() if "*" in name], refused
