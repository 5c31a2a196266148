"""Declare metrics: one `Metric` each, from which scoring, summaries, gates and pages take all they need.

    BREVITY = Metric("brevity", score=lambda example: float(len(example.output) < 40), interval="proportion")

Metrics are found by name among the registered ones (`pytest_lmeval.metrics`); a name with a `*` declares a family, such as
`loss_at_*`. Imports neither torch nor numpy.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from fnmatch import fnmatchcase
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from pytest_lmeval import registry
from pytest_lmeval.errors import ArgumentError, RegistryError
from pytest_lmeval.records._value import Value

if TYPE_CHECKING:
    from pytest_lmeval.records._example import Example

Norm = Literal["sum", "token", "byte", "character"]
"""Length by which the log-likelihood of a choice is divided before choices are compared; "sum": none."""

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
"""What a question must have for a metric to be computed."""
Answered: TypeAlias = "tuple[float, str | None]"
"""What an answer scores, and what it says."""
Estimate: TypeAlias = "tuple[float, tuple[float, float] | None]"
"""A number, and its 95 % interval or None."""

NEEDS: dict[Needs, Callable[[Sequence[str], Sequence[int], Sequence[str]], bool]] = {
    "an answer": lambda choices, right, targets: True,
    "choices": lambda choices, right, targets: bool(choices),
    "a right choice": lambda choices, right, targets: bool(right),
    "one right choice": lambda choices, right, targets: len(right) == 1,
    "two choices, one of them right": lambda choices, right, targets: len(choices) == 2 and len(right) == 1,
    "targets to compare with": lambda choices, right, targets: bool(targets),
    "an output to be judged": lambda choices, right, targets: not choices,
}
"""Whether a question has what a metric needs, by its choices, the indices of the right ones, and its right texts."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "aspect": get_args(Aspect),
    "higher_is_better": (True, False, None),
    "needs": get_args(Needs),
    "interval": ("proportion", "mean", None),
    "norm": (*get_args(Norm), None),
}
"""Allowed values of some fields."""

TOO_LITTLE = (
    "Too little was read or run to tell how far the truth may lie from it. Read more (documents, a longer text, questions, "
    "groups of them, runs), or compare the value itself, without knowing how sure it is."
)
NOT_ESTIMATED = (
    "It is counted, an extreme, or measured once: nothing tells how far another one would lie from it. Compare it itself."
)
"""Why a value has no interval."""

MARGIN = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(\s*%)?")
"""A margin as text: sign, size, and "%" if it is relative to the baseline."""

SPEED_UNITS = ("s", "ms", "us", "ns", "tokens/s", "frames/s", "FLOP/s", "bytes/s")
STATISTICS = ("_mean", "_min", "_max", "_std", "_p90", "_p95", "_p99")  # of repeated times, or of seeds; suffixes of the metric
MAJORITY = ("_over_majority", "_majority")  # suffixes: how much better than the answer that is right most often, and that


@dataclass(frozen=True)
class Metric:
    """The declaration of a metric.

    name              by which a task asks for it, a marker names it, a record stores it
    unit              of its values, unless they have another one (frames for tokens)
    higher_is_better  None if neither direction is better
    aspect            "quality" of what the model says; "speed", different in every run; "cost", counted, the same in every run
    repeats           False for a cost that differs in every run too: the memory of a whole process
    about             definition, in words or as a formula
    title             label in tables; default: the name with blanks
    headline          summaries show it, or a value "above 0"; the report shows all
    margin            allowed loss against a baseline: 0.01 in its unit, "0.5%" of the baseline
    aliases           other names by which the marker of a gate may mean it
    stands_for        a metric of the same quantity in another unit, which is gated in its place if recorded too
    compared          `lmeval compare-runs` compares it: a median, since one percentile of one run says little

    How it is computed:

    score        of one example; None if the metric does not apply to it. Of a tie it is the mean over the tied choices: each is
                 the example's `chosen` and `output` in turn
    judges       that score says that an answer is right (1), wrong (0), or in between
    sums         (numerator, denominator): the two sums over tokens of a text whose ratio it is (see `records._example.Unit`)
    scale        factor of the mean
    exponential  it is the exponential of the scaled mean
    interval     of its mean score: "proportion" (scores are 0 or 1) by Wilson's score, "mean" by Student's t, or by
                 Wilson's score if all lie between 0 and 1
    several      of several answers to a question, each with its score and what it says (None: nothing), and of K, the number in
                 the metric's name: the score of the question. The first of its answers has it, the others None
    statistic    (examples, seed) -> estimate: if it is no mean of scores
    needs        what each question must have (see `Needs`)
    library      required package that computes it
    norm         how the log-likelihoods of choices are normalized; None if it compares none

    Raises ArgumentError for a field with a value that is not allowed.
    """

    name: str
    unit: str = ""
    _: KW_ONLY
    higher_is_better: bool | None = True
    aspect: Aspect = "quality"
    repeats: bool = True
    about: str = ""
    title: str = ""
    headline: bool | Literal["above 0"] = True
    margin: float | str = 0.01
    aliases: tuple[str, ...] = ()
    stands_for: str = ""
    compared: bool = False
    score: Callable[[Example], float | None] | None = None
    judges: bool = False
    sums: tuple[str, str] | None = None
    scale: float = 1.0
    exponential: bool = False
    interval: Literal["proportion", "mean"] | None = None
    statistic: Callable[[Sequence[Example], int], Estimate | None] | None = None
    several: Callable[[Sequence[Answered], int], float] | None = None
    needs: Needs = "an answer"
    library: str | None = None
    norm: Norm | None = None

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
            raise ArgumentError(
                f'the metric {self.name!r} has margin={self.margin!r}: it is a number, or a percentage as "0.5%".'
            )
        if self.judges and (self.score is None or self.higher_is_better is False):
            has = "no score of one" if self.score is None else "a score of which less is better"
            raise ArgumentError(
                f"the metric {self.name!r} is to judge answers, and has {has}: such a score is 1 for a right answer and 0 "
                "for a wrong one."
            )

    def __str__(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.title or self.name.replace("_", " ")

    def can_score(self, choices: Sequence[str], right: Sequence[int], targets: Sequence[str]) -> bool:
        """A question with these choices, indices of right ones, and right texts has what the metric needs."""
        return NEEDS[self.needs](choices, right, targets)

    @property
    def is_in_baseline(self) -> bool:
        """A baseline stores it, since it is the same in every run of the same code."""
        return self.aspect != "speed" and self.repeats

    def scaled(self, mean: float) -> float:
        """Compute the metric from a mean of scores or a ratio of sums. Raises OverflowError if no float holds it."""
        return math.exp(self.scale * mean) if self.exponential else self.scale * mean

    def value(
        self,
        number: float,
        interval: tuple[float, float] | EllipsisType | None = ...,
        *,
        n: int | None = None,
        ties: int = 0,
        unit: str | None = None,
        higher_is_better: bool | None = None,
        why: str = "",
    ) -> Value:
        """Make a value of this metric.

        interval  extended to a number that rounding or a biased statistic put outside; None if too little was read for one
        why       there is no interval, if the reason is another
        """
        estimated = not (self.score and self.interval is None and self.statistic is None)
        if isinstance(interval, EllipsisType):
            interval, estimated = None, False
        low, high = (None, None) if interval is None else (min(number, interval[0]), max(number, interval[1]))
        why = why or (TOO_LITTLE if estimated else NOT_ESTIMATED) if interval is None else ""
        better = self.higher_is_better if higher_is_better is None else higher_is_better
        unit = self.unit if unit is None else unit
        return Value(number, unit, low=low, high=high, n=n, ties=ties, higher_is_better=better, why=why)


def metric(name: str, value: Value | None = None) -> Metric:
    """The declaration of a metric; for an undeclared one, unit and direction are taken from its value.

    Raises RegistryError for a name that several packages register, or under which something else is registered.

    >>> metric("itl_p95").unit, metric("bits_per_byte").margin
    ('ms', '0.5%')
    """
    if (found := _registered(name)) is not None:
        return found
    known, _, _ = _declared()
    for ending in (*STATISTICS, *MAJORITY):
        if (base := name.removesuffix(ending)) in known:
            shown = ending in MAJORITY and known[base].headline
            return replace(known[base], name=name, title="", headline=shown, aliases=(), compared=False)
    if value is None:
        return Metric(name, higher_is_better=None)
    aspect: Aspect = "speed" if value.unit in SPEED_UNITS else "quality"
    return Metric(name, value.unit, higher_is_better=value.higher_is_better, aspect=aspect)


def is_declared(name: str) -> bool:
    """A package registers the metric, by its name or with its family."""
    return _registered(name) is not None


def _registered(name: str) -> Metric | None:
    known, patterns, refused = _declared()
    if name in refused:
        raise RegistryError(refused[name])
    if name in known:
        return known[name]
    return next((replace(pattern, name=name) for pattern in patterns if fnmatchcase(name, pattern.name)), None)


def judge_of(metrics: Iterable[Metric]) -> Metric | None:
    """The first metric that calls one answer right or wrong."""
    return next((metric for metric in metrics if metric.judges), None)


def headline_of(metrics: dict[str, Value]) -> str | None:
    """The one metric that represents a record: its first quality metric with a direction, or the one that this stands for."""
    for name, value in metrics.items():
        declared = metric(name, value)
        if declared.aspect == "quality" and value.higher_is_better is not None:
            return declared.stands_for if declared.stands_for in metrics else name
    return None


def value_of(name: str, number: float, interval: tuple[float, float] | EllipsisType | None = ..., **options: Any) -> Value:
    """Make a value of a declared metric (see `Metric.value`)."""
    return metric(name).value(number, interval, **options)


@functools.cache
def _declared() -> tuple[dict[str, Metric], list[Metric], dict[str, str]]:
    """Registered metrics by name, those that declare a family, and for each refused name why."""
    found, refused = dict[str, Metric](), dict[str, str]()
    for name, thing, entry in registry.things("metrics"):
        if name in found or name in refused:
            found.pop(name, None)
            refused[name] = str(registry.ambiguous("metrics", name))
        elif not isinstance(thing, Metric) or thing.name != name:
            is_what = f"the metric {thing.name!r}" if isinstance(thing, Metric) else f"of the type {type(thing).__name__}"
            refused[name] = f"{entry} registers the metric {name!r}, and that is {is_what}: it must be a Metric of that name."
        else:
            found[name] = thing
    return found, [thing for name, thing in found.items() if "*" in name], refused
