"""Describe hidden states in a record: metrics with intervals, caveats, and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from msgspec import structs

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.engine import Policy
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._measured import Cost, Record, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._hidden_states import HiddenStates, LayerStates

VECTORS = {"last": "of the last token", "mean": "mean over the tokens", "all": "of all tokens"}


@dataclass
class Described:
    """What a record says of one layer, without its sums.

    explained  fraction of the variance along each of the first directions
    apart      the separation of two sets, if there is one
    error      bound of the error of a variance, as a fraction of the whole; None if the covariance is exact
    curves     coordinates of the vectors of each set that are plotted
    """

    count: int
    width: int
    explained: list[float]
    apart: Value | None
    error: float | None
    curves: list[tuple[list[float], list[float]]]

    @property
    def first(self) -> float:
        return self.explained[0] if self.explained else 0.0


def _described(layer: LayerStates) -> Described:
    both, directions = layer.both, layer.leading_directions
    error = both.error / directions.total if both.rank and directions.total else None
    return Described(both.count, len(both.mean), directions.explained.tolist(), layer.separation, error, layer.plotted())


def record_of(
    lm: Model,
    states: HiddenStates,
    names: Sequence[str],
    policy: Policy,
    sources: Sequence[Corpus] = (),
    limit: int | None = None,
    seconds: float | None = None,
) -> Record:
    """The record of sums that are complete. It holds the covariance and the directions of one layer at a time."""
    subject = " and ".join(f"{count:,} {name}" for count, name in zip(states.texts, names, strict=False))
    found = {name: _described(states[name]) for name in states}
    apart = {name: layer.apart for name, layer in found.items() if layer.apart is not None}
    metrics: dict[str, Value] = {}
    if apart:
        metrics["separation"] = _mean_of("separation", [*apart.values()])
    metrics["first_direction"] = value_of(
        "first_direction", sum(layer.first for layer in found.values()) / len(found), n=next(iter(found.values())).count
    )
    metrics |= {f"separation_at_{name}": value for name, value in apart.items()}
    metrics |= {
        f"first_direction_at_{name}": value_of(f"first_direction_at_{name}", layer.first) for name, layer in found.items()
    }
    errors = {name: layer.error for name, layer in found.items() if layer.error is not None}
    notes = []
    if few := [layer for layer in found.values() if layer.count <= layer.width]:
        notes.append(
            f"{few[0].count:,} vectors of width {few[0].width:,}: the covariance has a variance along {few[0].count - 1:,} "
            "directions at most, and says nothing of the others"
        )
    if errors:
        notes.append(f"covariances of low rank: a variance may be larger by up to {max(errors.values()):.2%} of the whole")
    notes += [f"{states.skipped:,} texts without a token were skipped"] * bool(states.skipped)
    return Record(
        kind="hidden_states",
        subject=subject,
        lm=facts(lm),
        settings={
            **{name: states.about[name] for name in ("layers", "rank", "tokens")},
            "vectors": VECTORS[states.about["token"]],
            "limit": limit,
            "data": [source.fingerprint for source in sources],
        },
        details={"texts": states.texts, "error_of_low_rank": errors},
        notes=[*notes, *policy.withheld[:1]],
        metrics=metrics,
        cost=Cost(seconds=seconds, tokens=states.tokens),
        series=_series(found, names, two=len(states.moments) > 1),
        certificate=None
        if policy.certificate is None
        else structs.replace(policy.certificate, chunking_used=f"texts side by side, long ones {policy.reading}"),
    )


def _mean_of(name: str, values: Sequence[Value]) -> Value:
    """The mean of values that may depend on each other in any way; so does its interval."""
    ends = [value.interval for value in values if value.interval is not None]
    interval = None if len(ends) < len(values) else tuple(sum(column) / len(ends) for column in zip(*ends, strict=True))
    why = next((value.why for value in values if value.why), "")
    return value_of(name, sum(values) / len(values), interval, n=values[0].n, why=why)


def _series(found: dict[str, Described], names: Sequence[str], two: bool) -> dict[str, Series]:
    """The plots: along the first directions, explained variance, and both by layer."""
    series, order = {}, {name: float(number) for number, name in enumerate(found)}
    title = "Two sets along their direction" if two else "Hidden states along their first directions"
    axes = ("along the direction between the sets", "across it") if two else ("first direction", "second direction")
    for name, layer in found.items():
        for curve, (x, y) in zip(names, layer.curves, strict=False):
            series[f"along_{name}_{curve}"] = Series(x, y, *axes, title, part=name, curve=curve if two else "", points=True)
        if layer.explained:
            parts = [100 * part for part in accumulate(layer.explained)]
            numbers = [float(number) for number in range(1, len(parts) + 1)]
            series[f"explained_{name}"] = Series(
                numbers, parts, "directions", "% of the variance", "Explained variance", part=name
            )
    parts = [100 * layer.first for layer in found.values()]
    series["first_direction_by_layer"] = Series(
        [*order.values()], parts, "layers", "% of the variance", "First direction by layer"
    )
    if apart := {name: layer.apart for name, layer in found.items() if layer.apart is not None}:
        x, y = [order[name] for name in apart], [float(value) for value in apart.values()]
        ends = [value.interval for value in apart.values() if value.interval is not None]
        low, high = ([*map(float, column)] for column in zip(*ends, strict=True)) if len(ends) == len(x) else ([], [])
        series["separation_by_layer"] = Series(x, y, "layers", "sd", "Separation by layer", low=low, high=high)
    return series
