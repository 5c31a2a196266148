"""The records of a test against their entries in the baseline: a verdict for each gated metric.

Examples are paired by the hash of what was asked or read, on those that both runs have. Where that cannot be done - the
baseline's examples are missing, the text is another one, the metric is no mean - the intervals are compared, and it is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from pytest_lmeval.gates._entry import Entry, differs, gated, same_work
from pytest_lmeval.gates._margins import Margin, Margins
from pytest_lmeval.gates._pairing import Paired, pair
from pytest_lmeval.gates._scores import Scores, rounded
from pytest_lmeval.records._certificate import rank
from pytest_lmeval.records._comparison import Comparison, GateVerdict
from pytest_lmeval.records._metric import Metric, metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._paired import Difference, unpaired_difference
from pytest_lmeval.statistics._verdict import LEVEL, Verdict, judge_all, judge_exact

Rows = dict[str, Comparison]


@dataclass(frozen=True)
class Side:
    """One of the two: entry and scores of a record."""

    entry: Entry
    scores: Scores | None


@dataclass(frozen=True)
class Candidate:
    """A metric that is to be judged: how it differs, in the numbers that are compared.

    found  before, after, and the difference: in the unit of the metric, but of a perplexity in that of its logarithm
    """

    metric: Metric
    margin: Margin
    up: bool
    found: Paired
    note: str = ""

    @property
    def allowed(self) -> float:
        """The margin in the numbers that are compared."""
        size = self.margin.of(self.found.base)
        return math.log1p(size / self.found.base) if self.metric.exponential else size

    def shown(self, compared: float | None) -> float | None:
        """A difference as the reader sees it."""
        if compared is None:
            return None
        return float(f"{self.found.base * math.expm1(compared) if self.metric.exponential else compared:.6g}")


def compare(pairs: Sequence[tuple[Side, Side]], margins: Margins, family: int) -> list[Rows]:
    """For each record of a test, base and new: metric -> how it compares.

    family  metrics that are gated in the whole run. A test is judged when it ends, when those of later tests are not known, so
            Holm's procedure takes them for 1: what fails here would fail with all of them known, too.
    """
    level = LEVEL / max(family, 1)
    candidates = [list(_candidates(base, new, margins, level)) for base, new in pairs]
    flat = [candidate for of_record in candidates for candidate in of_record]
    verdicts = iter(
        judge_all(
            [candidate.found.difference for candidate in flat],
            [candidate.allowed for candidate in flat],
            [candidate.up for candidate in flat],
            family=family,
        )
    )
    found = []
    for (base, new), of_record in zip(pairs, candidates, strict=True):
        rows = {candidate.metric.name: _row(candidate, next(verdicts)) for candidate in of_record}
        rows |= dict(_exact(base.entry, new.entry, margins, set(rows)))
        for name in gated(base.entry, margins):
            if name not in new.entry.metrics:
                rows[name] = Comparison(verdict="missing", base=rounded(base.entry.metrics[name]))
        differences = differs(base.entry, new.entry)
        found.append({name: structs.replace(row, differences=differences) for name, row in rows.items()})
    return found


def new_rows(new: Entry, margins: Margins) -> Rows:
    """The rows of a record that the baseline does not have."""
    if margins.off:
        return {}
    values: dict[str, float | str] = {name: rounded(new.metrics[name]) for name in gated(new, margins)}
    if new.verdict is not None:
        values["verdict"] = new.verdict
    return {name: Comparison(verdict="new", new=value) for name, value in values.items()}


def _candidates(base: Side, new: Side, margins: Margins, level: float) -> Iterator[Candidate]:
    for name in gated(base.entry, margins):
        margin, before, after = margins.of(name), base.entry.metrics[name], new.entry.metrics.get(name)
        if after is None or margin is None or before.higher_is_better is None:
            continue
        declared, up, found = metric(name, before), before.higher_is_better, None
        other = _other_tokens(declared, base.entry, new.entry)
        if not other and base.scores is not None and new.scores is not None:
            found = pair(name, base.scores, new.scores, up=up, level=level)
        if found is not None:
            if not (found.only_base or found.only_new):  # then the numbers are those that both runs told
                found = replace(found, base=rounded(before), new=rounded(after))
            yield Candidate(declared, margin, up, found)
        elif not _as_it_is(margin, before, after):
            other = other or _other_text(base, new)
            unpaired = _unpaired(declared, before, after, with_intervals=other is None)
            note = other or _why_unpaired(name, base, new)
            yield Candidate(declared, margin, up, Paired(rounded(before), rounded(after), unpaired), note)


def _as_it_is(margin: Margin, before: Value, after: Value) -> bool:
    """Whether a number is compared as it is: its margin was chosen by hand, and nobody knows what chance does to it."""
    return margin.given and None in (before.low, after.low)


def _row(candidate: Candidate, verdict: Verdict) -> Comparison:
    found, difference = candidate.found, candidate.found.difference
    too_few = _too_few(difference, verdict) if verdict.name == "unclear" and verdict.fewest else ""
    return Comparison(
        verdict=verdict.name,
        base=rounded(found.base),
        new=rounded(found.new),
        difference=candidate.shown(difference.value),
        low=candidate.shown(difference.low),
        high=candidate.shown(difference.high),
        margin=candidate.shown(candidate.allowed),
        margin_given=candidate.margin.given,
        higher_is_better=candidate.up,
        p=float(f"{verdict.p:.4g}"),
        level=float(f"{verdict.level:.4g}"),
        detectable=candidate.shown(verdict.detectable),
        needed=verdict.needed if verdict.name == "unclear" else None,
        n=difference.examples,
        units=difference.units,
        test=difference.test,
        only_base=found.only_base,
        only_new=found.only_new,
        lost=found.lost,
        won=found.won,
        flipped=list(found.flipped),
        note=too_few or candidate.note,
    )


def _too_few(found: Difference, verdict: Verdict) -> str:
    """Why not even the loss of everything is called worse."""
    units = f"{found.units:,} {'examples' if found.units == found.examples else 'independent groups'}"
    return (
        f"no loss in {units} is called worse: even of all, it comes about by chance in one of {1 / found.least:,.0f} "
        f"comparisons, and one of {1 / verdict.level:,.0f} is asked for; it takes {verdict.fewest} at least"
    )


def _exact(base: Entry, new: Entry, margins: Margins, judged: set[str]) -> Iterator[tuple[str, Comparison]]:
    """What chance has no part in: compared as it is. Costs only where both runs did the same on the same kind of device."""
    if margins.off:
        return
    if base.verdict is not None and new.verdict is not None and margins.of("verdict") is not None:
        verdict = _of_verdicts(base.verdict, new.verdict)
        yield "verdict", Comparison(verdict=verdict, base=base.verdict, new=new.verdict, test="exact")
    for name in gated(base, margins):
        margin, before, after = margins.of(name), base.metrics[name], new.metrics.get(name)
        if name in judged or after is None or margin is None or before.higher_is_better is None:
            continue
        if _as_it_is(margin, before, after):
            yield name, _exact_row(before, after, margin, before.higher_is_better)
    same = same_work(base, new)
    for name, old, now in _costs(base, new):
        margin = margins.of(name)
        if margin is not None and (same or margin.given):
            yield name, _exact_row(old, now, margin, up=False)


def _of_verdicts(base: str, new: str) -> GateVerdict:
    """How two verdicts on a model's laws compare: unclear where they are other ones, and neither is the better."""
    before, after = rank(base), rank(new)
    if base == new:
        return "identical"
    if before is None or after is None or before == after:
        return "unclear"
    return judge_exact(before, after, 0, higher_is_better=False)


def _exact_row(base: float, new: float, margin: Margin, up: bool) -> Comparison:
    return Comparison(
        verdict=judge_exact(base, new, margin.of(base), higher_is_better=up),
        base=rounded(base),
        new=rounded(new),
        difference=rounded(new - base),
        margin=rounded(margin.of(base)),
        margin_given=margin.given,
        higher_is_better=up,
        test="exact",
    )


def _costs(base: Entry, new: Entry) -> Iterator[tuple[str, float, float]]:
    """The costs that both have, whether they stand among the costs of a record or among its metrics."""
    old, now = ({**side.metrics, **side.costs} for side in (base, new))
    return ((name, old[name], now[name]) for name in old if name in now and metric(name).aspect == "cost")


def _unpaired(declared: Metric, before: Value, after: Value, *, with_intervals: bool) -> Difference:
    sides = []
    for value in (before, after):
        bounds = (float(value), value.low, value.high) if with_intervals else (float(value), None, None)
        number, low, high = (None if one is None else math.log(one) if declared.exponential else one for one in bounds)
        assert number is not None
        sides.append((number, low, high))
    return unpaired_difference(sides[0], sides[1], after.n or before.n or 0)


def _why_unpaired(name: str, base: Side, new: Side) -> str:
    if base.scores is None:
        return "the baseline's file of examples is missing, or says nothing of this record: only the intervals are compared"
    if new.scores is None:
        return "this run kept no examples: only the intervals are compared"
    if base.scores.ratio(name) is None or new.scores.ratio(name) is None:
        return f"{name} is no mean over examples: only the intervals are compared"
    return "the two runs cut the text into other tokens: only the intervals are compared"


def _other_text(base: Side, new: Side) -> str | None:
    """Why two numbers say nothing of the model, if they are of different examples."""
    if base.scores is None or new.scores is None or set(base.scores.ids) & set(new.scores.ids):
        return None
    return "the two runs have no example in common, so nothing can be said"


def _other_tokens(declared: Metric, base: Entry, new: Entry) -> str | None:
    """Why a number per token cannot be compared, if the tokens are others."""
    old, now = (entry.settings.get("tokenizer") for entry in (base, new))
    per_token = "tokens" in (declared.sums or ()) or declared.unit.endswith("/token")
    if not per_token or old == now:
        return None
    return f"the tokenizer was {old} and is {now}: a number per token says nothing then; gate bits_per_byte"
