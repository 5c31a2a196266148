"""Paired tests: compare each example with itself, before and after (Dror et al. 2018; Miller 2024)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, stdev
from typing import Literal

import numpy as np

from pytest_lmeval.statistics._estimate import (
    FEWEST_BLOCKS,
    FEWEST_UNITS,
    Estimate,
    group_sums,
    of_blocks,
    of_units,
)
from pytest_lmeval.statistics._student import quantile, tail

Alternative = Literal["lower", "higher"]

FLIPS = 100_000  # random assignments of signs at most, unless a smaller p-value is asked for
ENOUGH = 200  # assignments as extreme as the observed one, after which drawing stops
EXACT = 13  # units up to which all assignments are counted
MOST_EXAMPLES = 10**9
MOST_UNITS = 512  # more units are added up in groups before their signs are flipped, which bounds time and memory


@dataclass(frozen=True)
class Difference:
    """New minus base.

    low, high   95 % interval; None if unknown (too few units)
    p_lower     probability of a difference this low or lower, had nothing changed; `p_higher` the other way round
    error       standard error; None if unknown
    units       number of independent units, or of blocks; `examples` in them, of which `changed` differ between the runs
    test        name of the test that gives the probabilities
    smallest_p  the smallest probability that the test can give for so many units
    fewest      number of units below which the test gives no probability at all
    few         whether the units are so few that the test has to hold with one more (see `_estimate.with_one_more`)
    noise       the part of the error that is drawn anew in each run (`statistics._drawn`); None if unknown
    """

    value: float
    low: float | None
    high: float | None
    p_lower: float
    p_higher: float
    error: float | None
    units: int
    examples: int
    changed: int
    test: str
    smallest_p: float = 0.0
    fewest: int = 0
    few: bool = False
    noise: float | None = None


def paired_difference(
    base: Sequence[float],
    new: Sequence[float],
    weights: Sequence[float] | None = None,
    groups: Sequence[Hashable] | None = None,
    *,
    consecutive: bool = False,
    answers: float = 1,
    level: float = 0.01,
    seed: int = 0,
) -> Difference:
    """The difference of two means (or of ratios sum / sum of weights) over the same n examples.

    base, new    [n] what each example counts in each run: 0 or 1, a grade, the nats of a document
    weights      [n] what the sums are divided by, the same in both runs (tokens of a document); None: 1 each
    groups       [n] what each example shares with others; None: all are independent
    consecutive  the examples are blocks of one text, in order: neighbours may be alike
    answers      of how many answers each score is the mean
    level        what the probabilities will be compared with: decides how many signs are drawn

    Answers between 0 and 1: McNemar's exact test where each is 0 or 1 and independent, `sign_flip` otherwise, and Tango's score
    interval. Sums of texts: Student's t (`_estimate.of_units`), or that of blocks (`of_blocks`). Where answers are graded or
    grouped, both count: the larger probability, the wider interval.

    Raises ValueError for lists of different lengths, and for no examples.
    """
    before, after = np.asarray(base, dtype=float), np.asarray(new, dtype=float)
    divisors = np.ones(len(before)) if weights is None else np.asarray(weights, dtype=float)
    if not len(before) or not len(before) == len(after) == len(divisors) == (len(before) if groups is None else len(groups)):
        raise ValueError(f"{len(before)} scores before and {len(after)} after: each example that is compared has both.")
    change = after - before
    examples = np.column_stack([change, divisors])
    units = examples if groups is None else group_sums(examples, groups)
    value, error = _ratio(units)
    found = Difference(value, None, None, 1.0, 1.0, error, len(units), len(change), int((change != 0).sum()), "")
    graded = bool((divisors == 1).all() and min(before.min(), after.min()) >= 0 and max(before.max(), after.max()) <= 1)
    if graded and answers == 1 and len(units) == len(change) and np.isin(change, (-1, 0, 1)).all():
        return _of_flips(found, change)
    found = _of_estimate(found, of_blocks(units) if consecutive else of_units(units, cautious=True), consecutive)
    if not graded:
        return found
    # Had nothing changed, a unit's change would be as likely with the other sign.
    flips = max(FLIPS, math.ceil(10 / level))
    merged = units[:, 0]
    if len(units) > MOST_UNITS:
        merged = np.bincount(np.arange(len(units)) % MOST_UNITS, weights=merged)
    lower, higher = (sign_flip(merged, way, seed=seed, flips=flips) for way in ("lower", "higher"))
    smallest_p = 0.5 ** len(units) if len(merged) <= EXACT else max(0.5 ** len(units), 1 / (flips + 1))
    lost, won = (answers * float(np.maximum(side * change, 0).sum()) for side in (-1, 1))
    low, high = tango(lost, won, answers * len(change))
    return replace(
        found,
        low=None if found.low is None else min(low, found.low),
        high=None if found.high is None else max(high, found.high),
        p_lower=max(lower, found.p_lower),
        p_higher=max(higher, found.p_higher),
        test=f"a sign-flip permutation test and {found.test}",
        smallest_p=smallest_p,
    )


def _of_flips(found: Difference, change: np.ndarray) -> Difference:
    lost, won, n = int((change < 0).sum()), int((change > 0).sum()), len(change)
    lower, higher = mcnemar(lost, won, "lower"), mcnemar(lost, won, "higher")
    low, high = tango(lost, won, n)
    test = "McNemar's exact test"
    return replace(found, low=low, high=high, p_lower=lower, p_higher=higher, test=test, smallest_p=0.5**n)


def _of_estimate(found: Difference, estimate: Estimate | None, consecutive: bool) -> Difference:
    test = "Student's t of neighbouring blocks" if consecutive else "Student's t of skewed changes"
    if estimate is None:
        fewest = FEWEST_BLOCKS if consecutive else FEWEST_UNITS
        return replace(found, test=test, fewest=max(fewest, found.units + 1))
    low, high = estimate.interval()
    lower, higher, few = estimate.below(0.0), estimate.above(0.0), estimate.sums is not None
    return replace(found, low=low, high=high, p_lower=lower, p_higher=higher, error=estimate.error, test=test, few=few)


def unpaired_difference(
    base: tuple[float, float | None, float | None], new: tuple[float, float | None, float | None], n: int
) -> Difference:
    """The difference of two numbers (value, low, high) of `n` examples each, from the widths of their 95 % intervals.

    If an interval is missing, both probabilities are 1.
    """
    value, z = new[0] - base[0], NormalDist().inv_cdf(0.975)
    widths = [high - low for _, low, high in (base, new) if low is not None and high is not None]
    if len(widths) < 2:
        return Difference(value, None, None, 1.0, 1.0, None, n, n, n, "nothing: there is no interval")
    error = math.hypot(*widths) / (2 * z)
    lower = NormalDist().cdf(value / error) if error else float(value >= 0)
    higher = NormalDist().cdf(-value / error) if error else float(value <= 0)
    test = "the intervals alone, not example by example"
    return Difference(value, value - z * error, value + z * error, lower, higher, error, n, n, n, test)


def log_ratio(base: Sequence[float], new: Sequence[float]) -> Difference:
    """The mean of log(new[i] / base[i]), by Student's t over the pairs; a single pair has neither interval nor evidence.

    Raises ValueError for values that are not positive, and for lists that are empty or of different lengths.
    """
    if len(base) != len(new) or not len(base) or min(*base, *new) <= 0:
        raise ValueError(f"a ratio takes pairs of positive numbers; got {list(base)} and {list(new)}.")
    logs = [math.log(after / before) for before, after in zip(base, new, strict=True)]
    value, n, test = fmean(logs), len(logs), "Student's t"
    if n == 1:
        return Difference(value, None, None, 1.0, 1.0, None, n, n, n, test)
    error = stdev(logs) / math.sqrt(n)
    half = quantile(n - 1) * error
    t = value / error if error else math.copysign(math.inf, value) if value else 0.0
    higher = float(tail(t, n - 1))
    return Difference(value, value - half, value + half, 1 - higher, higher, error, n, n, n, test)


def tango(lost: float, won: float, n: float, *, level: float = 0.95) -> tuple[float, float]:
    """The interval of (won - lost) / n of n pairs of answers: the differences that a score test does not reject (Tango,
    "Equivalence test and confidence interval for the difference in proportions for the paired-sample design", 1998).

    Answers between 0 and 1 count by what they lost and won, which is at least as wide as it has to be: they vary less.

    >>> [round(end, 4) for end in tango(9, 0, 1000)]
    [-0.017, -0.0047]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)

    def excess(truth: float) -> float:
        """The standardized difference from the truth: its variance is that of the likeliest rates with this difference."""
        b, c = (2 * n - won + lost) * truth - won - lost, -lost * truth * (1 - truth)
        rate = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * rate + truth * (1 - truth))
        return (
            (won - lost - n * truth) / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, won - lost - n * truth)
        )

    value = (won - lost) / n
    ends = []
    for side in (-1, 1):
        near, far = value, float(side)
        for _ in range(60):
            middle = (near + far) / 2
            near, far = (middle, far) if abs(excess(middle)) <= z else (near, middle)
        ends.append(near)
    return ends[0], ends[1]


def mcnemar(lost: int, won: int, alternative: Alternative) -> float:
    """McNemar's exact test (1947): the probability of so many `lost` answers or more ("lower"), or of so many `won` ("higher"),
    if each changed answer were lost or won with probability 1/2.
    """
    if lost < 0 or won < 0:
        raise ValueError(f"{lost} lost and {won} won: these are counts.")
    few, n = won if alternative == "lower" else lost, lost + won
    return float(sum(math.comb(n, k) for k in range(few + 1)) / 2**n)  # exact integers until the division


def sign_flip(
    differences: Sequence[float] | np.ndarray, alternative: Alternative, *, seed: int = 0, flips: int = FLIPS
) -> float:
    """The probability of so extreme a sum of differences [units] if each unit's sign were a coin toss (Fisher 1935).

    Counts all assignments of up to 13 units that differ. Beyond, draws until 200 are as extreme or `flips` are drawn (Besag and
    Clifford, "Sequential Monte Carlo p-values", 1991).

    >>> sign_flip([-1, -1, -1, -1, 0], "lower")
    0.0625
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0] * (1 if alternative == "higher" else -1)
    if not len(values):
        return 1.0
    threshold = values.sum() - 1e-9 * np.abs(values).sum()  # sums that differ only by rounding count as equal
    if len(values) <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float((signs @ values >= threshold).mean())
    generator, seen, drawn, part = np.random.default_rng(seed), 0, 0, 2000
    while drawn < flips:
        bits = np.unpackbits(np.frombuffer(generator.bytes(part * -(-len(values) // 8)), np.uint8).reshape(part, -1), axis=1)
        extreme = 2.0 * (bits[:, : len(values)] @ values) - values.sum() >= threshold
        if seen + extreme.sum() >= ENOUGH:
            return float(ENOUGH / (drawn + 1 + np.flatnonzero(np.cumsum(extreme) == ENOUGH - seen)[0]))
        seen, drawn = seen + int(extreme.sum()), drawn + part
    return (seen + 1) / (drawn + 1)


def holm(p_values: Sequence[float], family: int | None = None) -> list[float]:
    """The p-values, adjusted for their number (Holm, "A simple sequentially rejective multiple test procedure", 1979).

    family  number of tests, if not all p-values are known: the unknown ones count as 1, so knowing them only rejects more

    >>> [round(p, 3) for p in holm([0.03, 0.01])], [round(p, 3) for p in holm([0.03, 0.01], family=4)]
    ([0.03, 0.02], [0.09, 0.04])
    """
    family = len(p_values) if family is None else max(family, len(p_values))
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (family - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def detectable(error: float, *, level: float, margin: float = 0.0, power: float = 0.8) -> float:
    """The smallest true loss that is found with probability `power`: observed beyond the margin, and significant at the level,
    one-sided (Bloom, "Minimum detectable effects", 1995).
    """
    normal = NormalDist()
    return max(error * normal.inv_cdf(1 - level), margin) + error * normal.inv_cdf(power)


def examples_needed(examples: int, error: float, margin: float, *, power: float = 0.8) -> int | None:
    """The number of such examples that shows with probability `power` that no more than the margin was lost, if nothing was.

    `error` is the standard error on `examples` examples. None for a margin of 0, and where it takes over a billion (Julious,
    "Sample sizes for clinical trials with normal data", 2004).

    >>> examples_needed(200, 0.02, 0.01), examples_needed(200, 0.02, 0)
    (6280, None)
    """
    reach = error * (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power))
    if not margin or (times := reach / margin) > MOST_EXAMPLES:
        return None
    needed = math.ceil(round(examples * times**2, 6))
    return needed if needed <= MOST_EXAMPLES else None


def _ratio(units: np.ndarray) -> tuple[float, float | None]:
    """The ratio of the sums of both columns [units, 2], and its standard error by linearization (Kish 1965)."""
    total = units.sum(axis=0)
    value = float(total[0] / total[1])
    if len(units) < 2:
        return value, None
    spread = np.sum((units[:, 0] - value * units[:, 1]) ** 2) * len(units) / (len(units) - 1)
    return value, float(math.sqrt(spread) / total[1])
