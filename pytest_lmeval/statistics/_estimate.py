"""Estimate a ratio of sums over units (nats per token of documents, or of the blocks of one text), with intervals and tests.

`of_units` takes units that are independent of one another, `of_blocks` consecutive ones that may depend on their neighbours.
Both are functions of their sums alone: nothing is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pytest_lmeval.statistics._student import tail

FEWEST_UNITS = 8  # fewer independent units say next to nothing about the spread between units
FEWEST_BLOCKS = 30  # fewer blocks of one text do not show how slowly it changes
LENGTHS, SHARES = 10, 10  # of the slow parts that are tried: correlation lengths, and shares of the spread
MOST_SHARE = 300  # of a slow part, as a multiple of the independent part's spectrum: covers all of benchmarks/test_coverage.py
FARTHEST, HALVINGS = 1e3, 50  # standard errors in which the end of an interval is looked for, by bisection
FEW, MANY = 15, 30  # units that cannot show at all that they are not skewed, and that can


@dataclass(frozen=True)
class Estimate:
    """A ratio, and how certain it is: a mixture of Student's t distributions around it.

    errors    [k] standard errors
    weights   [k] of the parts of the mixture; they sum to 1
    freedom   degrees of freedom
    skewness  third moment of the estimate over the third power of its error: 0 for blocks
    sums      [n, 2] of the units, if they are so few that a test has to hold with one more unit, too (see `with_one_more`)
    """

    value: float
    errors: np.ndarray
    weights: np.ndarray
    freedom: float
    skewness: float = 0.0
    sums: np.ndarray | None = None

    @property
    def error(self) -> float:
        """The standard error: of a mixture, the root of its mean square."""
        return math.sqrt(float(self.weights @ self.errors**2))

    def above(self, bound: float) -> float:
        """The probability of an estimate so high or higher, were the truth `bound`."""
        found = self._above(bound)
        return found if self.sums is None else max(found, with_one_more(self.sums, bound, -1)._above(bound))

    def below(self, bound: float) -> float:
        """The probability of an estimate so low or lower, were the truth `bound`."""
        found = 1 - self._above(bound)
        return found if self.sums is None else max(found, 1 - with_one_more(self.sums, bound, 1)._above(bound))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The values that a test from either side does not reject at (1 - level) / 2."""
        beyond = (1 - level) / 2
        return self._bound(self.above, beyond, -1), self._bound(self.below, beyond, 1)

    def _above(self, bound: float) -> float:
        distance = self.value - bound
        if not self.errors.any():
            return 0.0 if distance > 0 else 1.0 if distance < 0 else 0.5
        return float(self.weights @ tail(_unskewed(distance / self.errors, self.skewness), self.freedom))

    def _bound(self, probability: Callable[[float], float], beyond: float, side: int) -> float:
        """The truth on one `side` of the value whose `probability`, which falls with the distance, is `beyond`."""
        near, far = 0.0, FARTHEST * float(self.errors.max())
        for _ in range(HALVINGS):
            middle = (near + far) / 2
            near, far = (middle, far) if probability(self.value + side * middle) > beyond else (near, middle)
        return self.value + side * (near + far) / 2


def of_units(sums: np.ndarray, *, cautious: bool = False) -> Estimate | None:
    """The ratio of the sums of both columns [n, 2] of independent units, by Student's t with three corrections.

    - A unit with a large part of the tokens draws the ratio to itself, which hides its own deviation: each is compared with the
      ratio of the others (the jackknife; MacKinnon and White 1985).
    - The degrees of freedom are those of the units that carry the weight (Satterthwaite 1946), not their number.
    - Skewness is transformed away (Hall, "On the removal of skewness by transformation", 1992).

    cautious  fewer than 30 units cannot show that they are not skewed: tests and interval must hold with one more unit, too
              (see `with_one_more`)

    Units without tokens do not count. None where nothing can be said: fewer than eight units, sums that are not finite.
    """
    sums = sums[sums[:, 1] > 0]
    n, total = len(sums), sums.sum(axis=0)
    if n < FEWEST_UNITS or not np.isfinite(total).all() or not total[1] > 0:
        return None
    weights = sums[:, 1] / total[1]
    value = float(total[0] / total[1])
    deviations = (sums[:, 0] - value * sums[:, 1]) / total[1] / (1 - weights)
    error = math.sqrt(float((deviations**2).sum()))
    unbiased = n**2 / ((n - 1) * (n - 2))  # Cramer 1946: a sample shows less skewness than there is
    skewness = unbiased * float(((deviations / error) ** 3).sum()) if error else 0.0
    freedom = float((weights**2).sum() ** 2 / (weights**4).sum())
    few = cautious and effective_units(sums) < MANY
    return Estimate(value, np.array([error]), np.ones(1), freedom, skewness, sums if few else None)


def with_one_more(sums: np.ndarray, truth: float, side: int) -> Estimate:
    """The estimate with one more unit of mean size on this side of the `truth`: as far from it as the farthest is, beside 15
    units or fewer; beside more, the nearer the more there are, until 30 need none. It takes what skewness the units show for
    that of the unit, and so does not transform it."""
    size = sums[:, 1].mean()
    farthest = np.abs(sums[:, 0] - truth * sums[:, 1]).max()
    part = min(1.0, (MANY - effective_units(sums)) / (MANY - FEW))
    found = of_units(np.vstack([sums, [truth * size + side * part * farthest, size]]))
    assert found is not None
    return replace(found, skewness=0.0)


def effective_units(sums: np.ndarray) -> float:
    """The number of units of equal size that weigh as these do (Kish 1965)."""
    return float(sums[:, 1].sum() ** 2 / (sums[:, 1] ** 2).sum())


def of_blocks(sums: np.ndarray) -> Estimate | None:
    """The ratio of the sums of both columns [n, 2] of consecutive blocks of one text, whose neighbours may be alike.

    The deviation of a block is taken as a part of its own, and a part that changes slowly (a first-order autoregression). How
    slowly, and how large it is, is unknown: each of a hundred possibilities, and that there is none, counts by how well it
    explains all blocks (their periodogram; Whittle 1953), and the estimate is the mixture. A text that changes slowly has a
    wide interval, however many tokens its blocks have.

    None where nothing can be said: fewer than 30 blocks, or sums that are not finite.
    """
    n, total = len(sums), sums.sum(axis=0)
    if n < FEWEST_BLOCKS or not np.isfinite(total).all() or not total[1] > 0:
        return None
    value = float(total[0] / total[1])
    deviations = (sums[:, 0] - value * sums[:, 1]) / (total[1] / n)
    frequencies = np.arange(1, n) / (2 * n)  # cycles in a block
    waves = np.cos(2 * np.pi * np.outer(frequencies, np.arange(n) + 0.5)) * math.sqrt(2 / n)
    power = (waves @ deviations) ** 2
    if not power.any():
        return Estimate(value, np.zeros(1), np.ones(1), n - 1)
    lengths, shares = np.geomspace(0.5, n / 2, LENGTHS), np.geomspace(0.1, MOST_SHARE, SHARES)  # blocks; of the spectrum
    slow = 1 / (1 + (2 * np.pi * lengths[:, None] * frequencies) ** 2)
    spectra = np.concatenate([np.ones((1, n - 1)), (1 + shares[:, None, None] * slow).reshape(-1, n - 1)])
    at_zero = np.concatenate([[1.0], np.repeat(1 + shares, LENGTHS)])
    scales = (power / spectra).mean(axis=1)  # of each possibility, the most likely one
    likelihoods = -(np.log(spectra).sum(axis=1) + (n - 1) * np.log(scales)) / 2
    likelihoods[0] += math.log(LENGTHS * SHARES)  # no slow part at all is as credible as any
    weights = np.exp(likelihoods - likelihoods.max())
    return Estimate(value, np.sqrt(at_zero * scales / n), weights / weights.sum(), n - 1)


def ratio_intervals(
    sums: np.ndarray, ratios: Sequence[tuple[int, int]], *, consecutive: bool = False
) -> list[tuple[float, float] | None]:
    """The 95 % intervals of ratios (numerator, denominator) of columns of `sums` [units, columns]: of independent units, or of
    `consecutive` blocks of one text. None where nothing can be said."""
    of = of_blocks if consecutive else of_units
    found = [of(sums[:, [above, below]]) for above, below in ratios]
    return [None if estimate is None else estimate.interval() for estimate in found]


def group_sums(columns: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """The sums of each column [n, columns] over each group [groups, columns], groups in order of first appearance."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    return np.column_stack([np.bincount(index, weights=column) for column in columns.T])


def _unskewed(z: np.ndarray, skewness: float) -> np.ndarray:
    """Hall's transformation of a standardized estimate, which rises with it."""
    return z + skewness * z**2 / 3 + skewness**2 * z**3 / 27 + skewness / 6
