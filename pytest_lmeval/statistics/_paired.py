"""Did the same examples come out differently? Paired tests: each example is compared with itself, before and after.

Two runs on the same examples agree on most of them. A test that treats the runs as independent adds the spread between
examples, which both runs share, to the noise, and finds next to nothing (McNemar 1947; Dror et al., "The hitchhiker's guide to
testing statistical significance in NLP", 2018; Miller, "Adding Error Bars to Evals", 2024). Examples that share a document
are one unit: their differences are added up first.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from pytest_lmeval.statistics._bootstrap import ratio_intervals

Alternative = Literal["lower", "higher", "different"]

FLIPS = 100_000  # random assignments of signs at most, unless a smaller p-value is asked for
ENOUGH = 200  # as extreme ones after which no more are drawn
EXACT = 13  # units up to which all assignments are counted
MOST_EXAMPLES = 10**9
MOST_UNITS = 512  # beyond it, units are added up in groups: nothing is lost, and time and memory are bounded


@dataclass(frozen=True)
class Difference:
    """New minus base.

    low, high   95 % interval; None for fewer than eight units
    p_lower     probability of a difference as low as this or lower, had nothing changed; `p_higher` the other way round
    error       standard error; None where it is not known
    units       independent units that it rests on; `examples` in them, of which `changed` are not what they were
    test        what the probabilities come from
    least       the smallest probability that the test gives for so many units, whatever became of them
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
    least: float = 0.0


def paired_difference(
    base: Sequence[float],
    new: Sequence[float],
    weights: Sequence[float] | None = None,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.01,
    seed: int = 0,
) -> Difference:
    """The difference of two means (or of ratios sum / sum of weights) of the same examples.

    base, new   what each example counts, in both runs: 0 or 1, a grade, the nats of a document
    weights     what the sums are divided by, the same in both runs: the tokens of a document; None: 1 each
    groups      what each example shares with others; None: all are independent
    level       what the probabilities will be compared with: signs are drawn often enough to tell one that is smaller

    Right or wrong is tested by McNemar's exact test, anything else, and whatever is grouped, by flipping signs. The interval
    is that of the bootstrap over units. Raises ValueError for lists of different lengths, and for no examples.
    """
    before, after = np.asarray(base, dtype=float), np.asarray(new, dtype=float)
    divisors = np.ones(len(before)) if weights is None else np.asarray(weights, dtype=float)
    if not len(before) or not len(before) == len(after) == len(divisors) == (len(before) if groups is None else len(groups)):
        raise ValueError(f"{len(before)} scores before and {len(after)} after: each example that is compared has both.")
    change = after - before
    units = _units(np.column_stack([change, divisors]), groups)
    alone = len(units) == len(change)
    value, error = _ratio(units)
    least = 0.5 ** len(units)
    if alone and np.isin(change, (-1, 0, 1)).all() and (divisors == 1).all():
        lost, won = int((change < 0).sum()), int((change > 0).sum())
        lower, higher, test = mcnemar(lost, won, "lower"), mcnemar(lost, won, "higher"), "McNemar's exact test"
    else:
        # Where nothing changed, a unit's change is as likely with the other sign; what it is divided by is the same either way.
        few, flips = _merged(units)[:, 0], max(FLIPS, math.ceil(10 / level))
        lower, higher = (sign_flip(few, way, seed=seed, flips=flips) for way in ("lower", "higher"))
        least = max(least, 1 / (flips + 1)) if len(few) > EXACT else least
        test = "a sign-flip permutation test"
    (interval,) = ratio_intervals(_merged(units), [(0, 1)], seed=seed)
    low, high = interval or (None, None)
    changed = int((change != 0).sum())
    return Difference(value, low, high, lower, higher, error, len(units), len(change), changed, test, least)


def unpaired_difference(
    base: tuple[float, float | None, float | None], new: tuple[float, float | None, float | None], n: int
) -> Difference:
    """The difference of two numbers with 95 % intervals (value, low, high), of `n` examples that may not be the same.

    The widths of the intervals stand in for the standard errors. Far less certain than a paired difference. Without an
    interval on one side it is known how large the difference is, and nothing of what chance would do: both probabilities are 1.
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


def mcnemar(lost: int, won: int, alternative: Alternative = "different") -> float:
    """The exact test of McNemar (1947): of the answers that changed, were about as many won as lost?

    lost, won  right before and wrong now; wrong before and right now

    Had nothing changed, each of them would fall to either side with probability 1/2: the tail of a binomial distribution.
    "lower" asks for so many lost or more.

    >>> round(mcnemar(16, 4, "lower"), 4), round(mcnemar(16, 4), 4), mcnemar(0, 0)
    (0.0059, 0.0118, 1.0)
    """
    if lost < 0 or won < 0:
        raise ValueError(f"{lost} lost and {won} won: these are counts.")
    if alternative == "different":
        return min(1.0, 2 * mcnemar(max(lost, won), min(lost, won), "lower"))
    few = won if alternative == "lower" else lost
    n = lost + won
    ways = sum(math.comb(n, k) for k in range(few + 1))
    return float(min(1.0, ways / 2**n))  # whole numbers of any size: exact until the division


def sign_flip(
    differences: Sequence[float] | np.ndarray, alternative: Alternative = "different", *, seed: int = 0, flips: int = FLIPS
) -> float:
    """How often the sum of the differences [units] would be as extreme, had each unit's sign been a coin toss (Fisher 1935).

    All assignments are counted for up to 13 units that differ. Beyond, they are drawn until 200 were as extreme or `flips`
    are drawn; the share is a valid p-value either way (Besag and Clifford, "Sequential Monte Carlo p-values", 1991).

    >>> sign_flip([-1, -1, -1, -1, 0], "lower")
    0.0625
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    if not len(values):
        return 1.0
    values = values if alternative == "higher" else -values
    observed = values.sum()
    if alternative == "different":
        observed = abs(observed)
    threshold = observed - 1e-9 * np.abs(values).sum()  # sums that are equal but for rounding are as extreme
    if len(values) <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float(_extreme(signs @ values, threshold, alternative).mean())
    generator, seen, drawn, part = np.random.default_rng(seed), 0, 0, 2000
    while drawn < flips:
        bits = np.unpackbits(np.frombuffer(generator.bytes(part * -(-len(values) // 8)), np.uint8).reshape(part, -1), axis=1)
        sums = 2.0 * (bits[:, : len(values)] @ values) - values.sum()
        extreme = _extreme(sums, threshold, alternative)
        if seen + extreme.sum() >= ENOUGH:
            return float(ENOUGH / (drawn + 1 + np.flatnonzero(np.cumsum(extreme) == ENOUGH - seen)[0]))
        seen, drawn = seen + int(extreme.sum()), drawn + part
    return (seen + 1) / (drawn + 1)


def _extreme(sums: np.ndarray, threshold: float, alternative: Alternative) -> np.ndarray:
    found: np.ndarray = (np.abs(sums) if alternative == "different" else sums) >= threshold
    return found


def holm(p_values: Sequence[float], family: int | None = None) -> list[float]:
    """The p-values, adjusted for how many there are (Holm, "A simple sequentially rejective multiple test procedure", 1979).

    family  the number of tests, where not all p-values are known: those that are not count as 1. What is rejected then is also
            rejected when they are known.

    The probability that any true hypothesis of the family is rejected is at most the level that the result is compared with.

    >>> [round(p, 3) for p in holm([0.03, 0.01])], [round(p, 3) for p in holm([0.03, 0.01], family=4)]
    ([0.03, 0.02], [0.09, 0.04])
    """
    family = len(p_values) if family is None else max(family, len(p_values))
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (family - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def detectable(error: float, *, level: float, margin: float = 0.0, power: float = 0.8) -> float:
    """The smallest true loss that is found with this probability: significant at this level, one-sided, and beyond the margin.

    z of power standard errors above what has to be observed, the larger of z of 1 - level standard errors and the margin: the
    minimum detectable effect (Bloom, "Minimum detectable effects", 1995).

    >>> round(detectable(0.01, level=0.05), 4), round(detectable(0.01, level=0.05, margin=0.1), 4)
    (0.0249, 0.1084)
    """
    normal = NormalDist()
    return max(error * normal.inv_cdf(1 - level), margin) + error * normal.inv_cdf(power)


def examples_needed(examples: int, error: float, margin: float, *, power: float = 0.8) -> int | None:
    """How many examples of this kind would show with this probability that no more than the margin was lost, if nothing was.

    error   standard error of the difference on so many `examples`

    For the 95 % interval to end before the margin, z of 0.975 and z of power standard errors have to fit into it (Julious,
    "Sample sizes for clinical trials with normal data", 2004). None for a margin of 0, and where it takes over a billion.

    >>> examples_needed(200, 0.02, 0.01), examples_needed(200, 0.02, 0)
    (6280, None)
    """
    reach = error * (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power))
    if not margin or (times := reach / margin) > MOST_EXAMPLES:
        return None
    needed = math.ceil(round(examples * times**2, 6))
    return needed if needed <= MOST_EXAMPLES else None


def _units(sums: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    """The sums of each group [units, columns], in the order in which groups come first."""
    if groups is None:
        return sums
    place = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    of = np.array([place[group] for group in groups])
    return np.column_stack([np.bincount(of, weights=column) for column in sums.T])


def _merged(units: np.ndarray) -> np.ndarray:
    """At most so many units: sums of units are as independent of one another, and as symmetric where nothing changed."""
    if len(units) <= MOST_UNITS:
        return units
    return _units(units, (np.arange(len(units)) % MOST_UNITS).tolist())


def _ratio(units: np.ndarray) -> tuple[float, float | None]:
    """The ratio of the sums of both columns, and its standard error by linearization (Kish 1965)."""
    total = units.sum(axis=0)
    value = float(total[0] / total[1])
    if len(units) < 2:
        return value, None
    spread = np.sum((units[:, 0] - value * units[:, 1]) ** 2) * len(units) / (len(units) - 1)
    return value, float(math.sqrt(spread) / total[1])
