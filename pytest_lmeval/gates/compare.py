"""The records of a test against their entries in the baseline: a verdict for each gated metric.

Examples are paired by the hash of what was asked or read, on those that both runs have. Where that cannot be done - the
baseline's examples are missing, the text is another one, the metric is no mean - the intervals are compared, and it is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pytest_lmeval.gates.entry import differs, gated
from pytest_lmeval.gates.margins import Margin, Margins, is_cost
from pytest_lmeval.gates.pairing import pair
from pytest_lmeval.gates.scores import LOGARITHMIC, Scores, rounded
from pytest_lmeval.statistics.paired import Difference, unpaired_difference
from pytest_lmeval.statistics.verdict import LEVEL, Verdict, judge_all, judge_exact

RANKS = (  # verdicts on a model's laws, the best first
    *("exact-any-chunk", "consistent", "exact-multiple-of", "exact-step-only", "stateless"),
    *("length-dependent", "inexact", "non-causal"),
)


@dataclass(frozen=True)
class Side:
    """One of the two: entry and scores of a record."""

    entry: dict[str, Any]
    scores: Scores | None


@dataclass(frozen=True)
class Candidate:
    """A metric that is to be judged: how it differs, in the numbers that are compared.

    base, new    as they are shown
    difference   in the unit of the metric; of a perplexity, of its logarithm
    """

    metric: str
    base: float
    new: float
    difference: Difference
    margin: Margin
    better: bool
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def logarithmic(self) -> bool:
        return self.metric in LOGARITHMIC

    @property
    def allowed(self) -> float:
        """The margin in the numbers that are compared."""
        size = self.margin.of(self.base)
        return math.log1p(size / self.base) if self.logarithmic else size

    def shown(self, compared: float | None) -> float | None:
        """A difference as the reader sees it."""
        if compared is None:
            return None
        return float(f"{self.base * math.expm1(compared) if self.logarithmic else compared:.6g}")


def compare(pairs: list[tuple[Side, Side]], margins: Margins, family: int) -> list[dict[str, dict[str, Any]]]:
    """For each record of a test, base and new: metric -> the row that its gate is told by (see results/schema.json).

    family  metrics that are gated in the whole run. A test is judged when it ends, when those of later tests are not known, so
            Holm's procedure takes them for 1: what fails here would fail with all of them known, too.
    """
    level = LEVEL / max(family, 1)
    candidates = [list(_candidates(base, new, margins, level)) for base, new in pairs]
    flat = [candidate for of_record in candidates for candidate in of_record]
    verdicts = iter(
        judge_all(
            [candidate.difference for candidate in flat],
            [candidate.allowed for candidate in flat],
            [candidate.better for candidate in flat],
            family=family,
        )
    )
    found = []
    for (base, new), of_record in zip(pairs, candidates, strict=True):
        rows = {candidate.metric: _row(candidate, next(verdicts)) for candidate in of_record}
        rows |= dict(_exact(base.entry, new.entry, margins, set(rows)))
        if missing := [name for name in gated(base.entry, margins) if name not in new.entry["metrics"]]:
            old = base.entry["metrics"]
            rows |= {name: {"verdict": "missing", "base": old[name]["value"], "new": None} for name in missing}
        if unlike := differs(base.entry, new.entry):
            rows = {name: {**row, "unlike": unlike} for name, row in rows.items()}
        found.append(rows)
    return found


def new_rows(new: dict[str, Any], margins: Margins) -> dict[str, dict[str, Any]]:
    """The rows of a record that the baseline does not have."""
    if margins.off:
        return {}
    values = {name: new["metrics"][name]["value"] for name in gated(new, margins)}
    if new["verdict"] is not None:
        values["verdict"] = new["verdict"]
    return {name: {"verdict": "new", "base": None, "new": value} for name, value in values.items()}


def _candidates(base: Side, new: Side, margins: Margins, level: float) -> Iterator[Candidate]:
    for name in gated(base.entry, margins):
        margin, before, after = margins.of(name), base.entry["metrics"][name], new.entry["metrics"].get(name)
        if after is None or margin is None or before["higher_is_better"] is None:
            continue
        up = bool(before["higher_is_better"])
        values: tuple[float, float] = (before["value"], after["value"])
        other = _other_tokens(name, base.entry, new.entry)
        found = None
        if not other and base.scores is not None and new.scores is not None:
            found = pair(name, base.scores, new.scores, up=up, level=level)
        if found is not None:
            some = found.row["only_base"] or found.row["only_new"]  # else the numbers are those that both runs told
            values = (found.base, found.new) if some else values
            yield Candidate(name, *values, found.difference, margin, up, found.row)
        elif not _as_it_is(margin, before, after):
            sides = [_interval(metric, logarithmic=name in LOGARITHMIC) for metric in (before, after)]
            if other := other or _other_text(base, new):
                sides = [(value, None, None) for value, _, _ in sides]
            difference = unpaired_difference(sides[0], sides[1], after["n"] or before["n"] or 0)
            yield Candidate(name, *values, difference, margin, up, {"note": other or _why_unpaired(name, base, new)})


def _as_it_is(margin: Margin, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a number is compared as it is: its margin was chosen by hand, and nobody knows what chance does to it."""
    return margin.given and None in (before["low"], after["low"])


def _row(candidate: Candidate, verdict: Verdict) -> dict[str, Any]:
    found, allowed = candidate.difference, candidate.allowed
    return {
        "verdict": verdict.name,
        "base": rounded(candidate.base),
        "new": rounded(candidate.new),
        "difference": candidate.shown(found.value),
        "low": candidate.shown(found.low),
        "high": candidate.shown(found.high),
        "margin": candidate.shown(allowed),
        "margin_given": candidate.margin.given,
        "higher_is_better": candidate.better,
        "p": float(f"{verdict.p:.4g}"),
        "level": float(f"{verdict.level:.4g}"),
        "detectable": candidate.shown(verdict.detectable),
        "needed": verdict.needed if verdict.name == "unclear" else None,
        "n": found.examples,
        "units": found.units,
        "test": found.test,
        **candidate.row,
        **({"note": _too_few(found, verdict)} if verdict.name == "unclear" and verdict.fewest else {}),
    }


def _too_few(found: Difference, verdict: Verdict) -> str:
    """Why not even the loss of everything is called worse."""
    units = f"{found.units:,} {'examples' if found.units == found.examples else 'independent groups'}"
    return (
        f"no loss in {units} is called worse: even of all, it comes about by chance in one of {1 / found.least:,.0f} "
        f"comparisons, and one of {1 / verdict.level:,.0f} is asked for; it takes {verdict.fewest} at least"
    )


def _exact(
    base: dict[str, Any], new: dict[str, Any], margins: Margins, judged: set[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What chance has no part in: compared as it is. Costs only where both runs did the same on the same kind of device."""
    if margins.off:
        return
    if base["verdict"] is not None and new["verdict"] is not None and margins.of("verdict") is not None:
        name = judge_exact(_rank(base["verdict"]), _rank(new["verdict"]), 0, higher_is_better=False)
        name = "unclear" if name == "identical" and base["verdict"] != new["verdict"] else name
        yield "verdict", {"verdict": name, "base": base["verdict"], "new": new["verdict"], "test": "exact"}
    for metric in gated(base, margins):
        margin, before, after = margins.of(metric), base["metrics"][metric], new["metrics"].get(metric)
        if after is not None and margin is not None and _as_it_is(margin, before, after) and metric not in judged:
            yield metric, _exact_row(before["value"], after["value"], margin, bool(before["higher_is_better"]))
    alike = base["settings"] == new["settings"] and all(base["lm"][key] == new["lm"].get(key) for key in ("device", "dtype"))
    for cost, old, now in _both(base, new):
        margin = margins.of(cost)
        if margin is None or not (alike or margin.given):
            continue
        yield cost, _exact_row(old, now, margin, False)


def _exact_row(base: float, new: float, margin: Margin, up: bool) -> dict[str, Any]:
    return {
        "verdict": judge_exact(base, new, margin.of(base), higher_is_better=up),
        "base": base,
        "new": new,
        "difference": rounded(new - base),
        "margin": rounded(margin.of(base)),
        "margin_given": margin.given,
        "higher_is_better": up,
        "test": "exact",
    }


def _both(base: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """The costs that both have, whether they stand among the costs of a record or among its metrics."""
    for name in base["costs"]:
        if name in new["costs"]:
            yield name, base["costs"][name], new["costs"][name]
    for name in base["metrics"]:
        if is_cost(name) and name in new["metrics"] and name not in base["costs"]:
            yield name, base["metrics"][name]["value"], new["metrics"][name]["value"]


def _rank(verdict: str) -> int:
    return next((place for place, name in enumerate(RANKS) if verdict.startswith(name)), len(RANKS))


def _interval(metric: dict[str, Any], *, logarithmic: bool) -> tuple[float, float | None, float | None]:
    value, low, high = (
        None if metric[name] is None else math.log(metric[name]) if logarithmic else float(metric[name])
        for name in ("value", "low", "high")
    )
    assert value is not None
    return value, low, high


def _why_unpaired(metric: str, base: Side, new: Side) -> str:
    if base.scores is None:
        return "the baseline's file of examples is missing, or says nothing of this record: only the intervals are compared"
    if new.scores is None:
        return "this run kept no examples: only the intervals are compared"
    if base.scores.ratio(metric) is None or new.scores.ratio(metric) is None:
        return f"{metric} is no mean over examples: only the intervals are compared"
    return "the two runs cut the text into other tokens: only the intervals are compared"


def _other_text(base: Side, new: Side) -> str | None:
    """Why two numbers say nothing of the model, if they are of different examples."""
    if base.scores is None or new.scores is None or set(base.scores.ids) & set(new.scores.ids):
        return None
    return "the two runs have no example in common, so nothing can be said"


def _other_tokens(metric: str, base: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Why a number per token cannot be compared, if the tokens are others."""
    old, now = (entry["settings"].get("tokenizer") for entry in (base, new))
    if metric == "bits_per_byte" or old == now:
        return None
    return f"the tokenizer was {old} and is {now}: a number per token says nothing then; gate bits_per_byte"
