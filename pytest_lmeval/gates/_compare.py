"""Compare the records of a test with their entries in the baseline: a verdict for each gated metric.

Pairs examples by their hash. Where that is impossible, compares the intervals, and says so in a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import structs

from pytest_lmeval.gates._entry import Entry, differs, gated, same_work
from pytest_lmeval.gates._margins import Margin, Margins
from pytest_lmeval.gates._pairs import pair
from pytest_lmeval.gates._scores import Scores, rounded, rounded_or_none
from pytest_lmeval.records._certificate import rank
from pytest_lmeval.records._comparison import Comparison, GateVerdict
from pytest_lmeval.records._metric import Metric, metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._drawn import answers_needed
from pytest_lmeval.statistics._paired import Difference, unpaired_difference
from pytest_lmeval.statistics._verdict import LEVEL, Verdict, judge_all, judge_exact

Rows = dict[str, Comparison]


class Side(NamedTuple):
    """Entry and scores of a record, of the baseline or of this run."""

    entry: Entry
    scores: Scores | None

    @property
    def several(self) -> bool:
        """Whether its questions were answered several times."""
        return (self.entry.settings.get("repeats") or 1) > 1


@dataclass(frozen=True)
class Candidate:
    """A metric to be judged.

    difference  in the unit of the metric, or of its logarithm for a perplexity
    base        the metric of the baseline, over the examples that are compared
    row         the comparison without its verdict
    """

    metric: Metric
    margin: Margin
    up: bool
    difference: Difference
    base: float
    row: Comparison

    @property
    def allowed(self) -> float:
        """The margin, in the unit of `difference`."""
        size = self.margin.of(self.base)
        return math.log1p(size / self.base) if self.metric.exponential else size

    def shown(self, difference: float | None) -> float | None:
        """A difference in the unit of the metric."""
        if difference is None:
            return None
        return float(f"{self.base * math.expm1(difference) if self.metric.exponential else difference:.6g}")


def compare(pairs: Sequence[tuple[Side, Side]], margins: Margins, family: int) -> list[Rows]:
    """For each record of a test, base and new: metric -> comparison.

    family  number of metrics gated in the whole run; Holm's procedure takes the p-values of later tests for 1
    """
    level = LEVEL / max(family, 1)
    candidates = [list(_candidates(base, new, margins, level)) for base, new in pairs]
    flat = [candidate for of_record in candidates for candidate in of_record]
    differences, allowed, up = [one.difference for one in flat], [one.allowed for one in flat], [one.up for one in flat]
    verdicts = iter(judge_all(differences, allowed, up, family=family))
    rows_of_records = []
    for (base, new), of_record in zip(pairs, candidates, strict=True):
        rows = {one.metric.name: _with_sum(_row(one, next(verdicts)), one, base.entry.first) for one in of_record}
        rows |= dict(_exact(base.entry, new.entry, margins, set(rows)))
        for name in gated(base.entry, margins):
            if name not in new.entry.metrics:
                rows[name] = Comparison(verdict="missing", base=rounded(base.entry.metrics[name]))
        changed = differs(base.entry, new.entry)
        rows_of_records.append({name: structs.replace(row, differences=changed) for name, row in rows.items()})
    return rows_of_records


def new_rows(new: Entry, margins: Margins) -> Rows:
    """The rows of a record that the baseline does not have."""
    if margins.off:
        return {}
    values: dict[str, float | str] = {name: rounded(new.metrics[name]) for name in gated(new, margins)}
    if new.verdict is not None:
        values["verdict"] = new.verdict
    return {name: Comparison(verdict="new", new=value) for name, value in values.items()}


def _gated_in_both(base: Entry, new: Entry, margins: Margins) -> Iterator[tuple[str, Margin, Value, Value, bool]]:
    """Gated metrics that both sides have and that have a direction: name, margin, before, after, whether higher is better."""
    for name in gated(base, margins):
        margin, before, after = margins.of(name), base.metrics[name], new.metrics.get(name)
        if after is not None and margin is not None and before.higher_is_better is not None:
            yield name, margin, before, after, before.higher_is_better


def _candidates(base: Side, new: Side, margins: Margins, level: float) -> Iterator[Candidate]:
    for name, margin, before, after, up in _gated_in_both(base.entry, new.entry, margins):
        declared, found = metric(name, before), None
        incomparable = _incomparable(declared, base, new)
        if not incomparable and base.scores is not None and new.scores is not None:
            found = pair(name, base.scores, new.scores, up=up, drawn=base.several or new.several, level=level)
        if found is not None:
            difference, base_value, row = found
            if not (row.only_base or row.only_new):  # then show the recorded numbers
                base_value, row = rounded(before), structs.replace(row, base=rounded(before), new=rounded(after))
            yield Candidate(declared, margin, up, difference, base_value, row)
        elif not _is_exact(margin, before, after):
            unpaired = _unpaired(declared, before, after, with_intervals=incomparable is None)
            note = incomparable or _why_unpaired(name, base, new)
            row = Comparison(verdict="unclear", base=rounded(before), new=rounded(after), note=note)
            yield Candidate(declared, margin, up, unpaired, rounded(before), row)


def _is_exact(margin: Margin, before: Value, after: Value) -> bool:
    """Whether two numbers are compared without statistics: a user chose the margin, and an interval is missing."""
    return margin.given and None in (before.interval, after.interval)


def _row(candidate: Candidate, verdict: Verdict) -> Comparison:
    found, note = candidate.difference, candidate.row.note
    if verdict.name == "unclear":
        note = _why_unclear(candidate, verdict) or note
    return structs.replace(
        candidate.row,
        verdict=verdict.name,
        difference=candidate.shown(found.value),
        low=candidate.shown(found.low),
        high=candidate.shown(found.high),
        margin=candidate.shown(candidate.allowed),
        margin_given=candidate.margin.given,
        higher_is_better=candidate.up,
        p=float(f"{verdict.p:.4g}"),
        level=float(f"{verdict.level:.4g}"),
        detectable=candidate.shown(verdict.detectable),
        needed=verdict.needed if verdict.name == "unclear" else None,
        noise=rounded_or_none(found.noise),
        answers_needed=_answers_needed(candidate) if verdict.name == "unclear" else None,
        n=found.examples,
        units=found.units,
        test=found.test,
        note=note,
    )


def _answers_needed(candidate: Candidate) -> int | None:
    if candidate.row.answers is None:
        return None
    base, new = candidate.row.answers
    return answers_needed(candidate.difference, candidate.allowed, (base, new))


def _with_sum(row: Comparison, candidate: Candidate, first: dict[str, float]) -> Comparison:
    """The row, which says so if the losses that were accepted since the first baseline add up to more than the margin."""
    before, now = first.get(candidate.metric.name), row.new
    if before is None or not isinstance(now, float | int) or row.verdict == "worse":
        return row
    lost = before - now if candidate.up else now - before
    if lost <= candidate.margin.of(before):
        return row
    note = f"accepted little by little: it was {before:g} in the first baseline, and is {now:g}, more than may be lost at once"
    return structs.replace(row, note=f"{row.note}; {note}" if row.note else note)


def _why_unclear(candidate: Candidate, verdict: Verdict) -> str | None:
    """What makes it unclear, other than the number of examples alone."""
    found = candidate.difference
    what = "examples" if found.units == found.examples else "independent groups"
    if verdict.fewest:
        few = f"{found.units:,} {what} are too few for any loss to be called worse: "
        if found.fewest:
            return f"{few}they do not show how much such numbers vary; at least {verdict.fewest} are needed"
        return (
            f"{few}chance makes even a total loss in one of {1 / found.smallest_p:,.0f} comparisons, and the "
            f"limit is one of {1 / verdict.level:,.0f}; at least {verdict.fewest} are needed"
        )
    if (found.value < 0) != candidate.up or not found.value or found.low is None or found.high is None:
        return None
    least, allowed = -found.high if candidate.up else found.low, candidate.allowed
    if abs(found.value) > allowed and found.few:
        return (
            f"{found.units:,} {what} are few: with one more that changed the other way, so large a loss would come by chance "
            f"in {100 * verdict.p:.2g} % of comparisons"
        )
    if 0 < least <= allowed:
        return f"something was lost, at least {candidate.shown(least):.2g}; open is whether more than the margin"
    return None


def _exact(base: Entry, new: Entry, margins: Margins, judged: set[str]) -> Iterator[tuple[str, Comparison]]:
    """Numbers that are compared without statistics. Costs only if both runs did the same on the same kind of device."""
    if margins.off:
        return
    if base.verdict is not None and new.verdict is not None and margins.of("verdict") is not None:
        verdict = _of_verdicts(base.verdict, new.verdict)
        yield "verdict", Comparison(verdict=verdict, base=base.verdict, new=new.verdict, test="exact")
    for name, margin, before, after, up in _gated_in_both(base, new, margins):
        if name not in judged and _is_exact(margin, before, after):
            yield name, _exact_row(before, after, margin, up)
    same = same_work(base, new)
    old, now = ({**side.metrics, **side.costs} for side in (base, new))
    for name in old:
        cost_margin = margins.of(name) if name in now and metric(name).aspect == "cost" else None
        if cost_margin is not None and (same or cost_margin.given):
            yield name, _exact_row(old[name], now[name], cost_margin, up=False)


def _of_verdicts(base: str, new: str) -> GateVerdict:
    """Compares two verdicts on a model's laws: unclear if they differ and neither is better."""
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


def _unpaired(declared: Metric, before: Value, after: Value, *, with_intervals: bool) -> Difference:
    sides = []
    for value in (before, after):
        bounds = (value.interval if with_intervals else None) or (None, None)
        low, high = (None if one is None else math.log(one) if declared.exponential else one for one in bounds)
        sides.append((math.log(value) if declared.exponential else float(value), low, high))
    return unpaired_difference(sides[0], sides[1], after.n or before.n or 0)


def _why_unpaired(name: str, base: Side, new: Side) -> str:
    if base.scores is None:
        why = "the baseline's file of examples is missing or does not have this record"
    elif new.scores is None:
        why = "this run kept no examples"
    elif base.scores.ratio(name) is None or new.scores.ratio(name) is None:
        why = f"{name} is no mean over examples"
    else:
        why = "the two runs cut the text into other tokens"
    return f"{why}: only the intervals are compared"


def _incomparable(declared: Metric, base: Side, new: Side) -> str | None:
    """Why the intervals say nothing, either; None if they do."""
    old, now = (side.entry.settings.get("tokenizer") for side in (base, new))
    if old != now and ("tokens" in (declared.sums or ()) or declared.unit.endswith("/token")):
        return f"the tokenizer was {old} and is {now}, so numbers per token cannot be compared; gate bits_per_byte"
    if base.scores is not None and new.scores is not None and not set(base.scores.ids) & set(new.scores.ids):
        return "the two runs have no example in common, so they cannot be compared"
    return None
