"""How a number of this run compares with the baseline's: what a gate found."""

from __future__ import annotations

from typing import Literal

from pytest_lmeval.records._schema import Kept

GateVerdict = Literal["worse", "missing", "unclear", "better", "new", "same", "identical", "not judged"]
ORDER: tuple[GateVerdict, ...] = ("worse", "missing", "unclear", "better", "new", "same", "identical", "not judged")
"""From what most readers look for first."""


class Flip(Kept, frozen=True, kw_only=True):
    """An example that counts another number than before."""

    id: str
    before: float
    after: float
    output: str | None = None
    target: str | None = None


class Comparison(Kept, frozen=True, kw_only=True, omit_defaults=True):
    """One metric (or cost, or the verdict on a model's laws) against the baseline. What does not apply is left out.

    base, new         on the examples that both runs have
    difference        new - base, with its 95 % interval
    margin            what may be lost; of a speed as the marker has it
    margin_given      by the marker of the test
    p                 probability of so large a difference in its direction, had nothing changed
    level             what p is compared with, after Holm
    detectable        the true loss that would have been called worse with a probability of 80 %
    needed            examples with which, had nothing been lost, that would be shown with a probability of 80 %
    n, units          examples that were compared, and independent groups of them
    test              the statistical test
    only_base, only_new   examples of one run alone
    lost, won         examples that came out worse than before, and better
    flipped           the first examples that changed, those that lost most first
    differences       settings that differ between the runs
    failed            the test failed for this
    """

    verdict: GateVerdict
    base: float | str | None = None
    new: float | str | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | str | None = None
    margin_given: bool = False
    higher_is_better: bool | None = None
    p: float | None = None
    level: float | None = None
    detectable: float | None = None
    needed: int | None = None
    n: int | None = None
    units: int | None = None
    test: str = ""
    only_base: int = 0
    only_new: int = 0
    lost: int | None = None
    won: int | None = None
    flipped: list[Flip] = []
    differences: list[str] = []
    failed: bool = False
    note: str = ""
