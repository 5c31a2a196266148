"""The comparison of one number with its baseline, as a gate judged it."""

from __future__ import annotations

from typing import Literal, get_args

from pytest_lmeval.records._schema import StoredStruct

GateVerdict = Literal["worse", "missing", "unclear", "better", "new", "same", "identical", "not judged"]
ORDER: tuple[GateVerdict, ...] = get_args(GateVerdict)
"""Verdicts in the order in which tables show them: what needs attention first."""


class Flip(StoredStruct, frozen=True, kw_only=True):
    """An example whose score changed."""

    id: str
    before: float
    after: float
    output: str | None = None
    target: str | None = None


class Comparison(StoredStruct, frozen=True, kw_only=True, omit_defaults=True):
    """A metric, a cost or the verdict on a model's laws against its baseline. Fields that do not apply are omitted.

    base, new         values on the examples that both runs have
    difference        new - base, with its 95 % interval `low` to `high`
    margin            loss that is allowed; of a speed, as the marker gives it
    margin_given      the marker of the test sets the margin
    p                 probability of so large a difference in its direction if nothing changed
    level             Holm's threshold for p
    detectable        true loss that would be called worse with a probability of 80 %
    needed            number of examples that would show, with a probability of 80 %, that nothing was lost
    n, units          numbers of compared examples and of independent groups of them
    answers           mean numbers of answers to a question in both runs, where one run has several
    noise             standard deviation of the difference of two such runs if nothing changed, from the spread of the answers
    answers_needed    number of answers to each question, in both runs, that would show the same as `needed` examples
    test              statistical test
    only_base, only_new   number of examples that one run alone has
    lost, won         number of examples that got worse, and better
    flipped           first examples that changed, largest loss first
    differences       settings that differ between the runs
    failed            the comparison failed the test
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
    answers: list[float] | None = None
    noise: float | None = None
    answers_needed: int | None = None
    test: str = ""
    only_base: int = 0
    only_new: int = 0
    lost: int | None = None
    won: int | None = None
    flipped: list[Flip] = []
    differences: list[str] = []
    failed: bool = False
    note: str = ""
