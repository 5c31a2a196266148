"""One measured thing: which test, which model, what was found, what it cost, and why it can be trusted.

A record is what `metrics.json` holds a list of (schema version 1, described in `schema.json` beside this file).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pytest_lmeval.records.value import Metric

SCHEMA = 1


@dataclass(frozen=True)
class Series:
    """A curve: y against x, both with their units."""

    x: list[float]
    y: list[float]
    x_unit: str
    y_unit: str

    def to_json(self) -> dict[str, Any]:
        return {"x": list(self.x), "y": list(self.y), "x_unit": self.x_unit, "y_unit": self.y_unit}


@dataclass(frozen=True, repr=False)
class Record:
    """What one verb found out.

    test         node id of the test, empty outside pytest
    lm           facts about the model (`Model.facts`)
    kind         the verb: perplexity, equivalence, latency, throughput, train
    subject      what it was applied to: a corpus, a shape
    settings     everything that was chosen, so that the number can be had again
    cost         seconds, tokens, flops, peak_bytes, state_bytes; None where it was not measured
    certificate  the verdict of the equivalence probe that the number stands on
    examples     file of per-example or per-token values, relative to the output folder
    units        file of the sums of each document, or block of a stream, relative to the output folder
    gate         metric -> how it compares with the baseline (see `gates.compare`); None where there is none
    """

    kind: str
    subject: str
    lm: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    series: dict[str, Series] = field(default_factory=dict)
    examples: str | None = None
    units: str | None = None
    gate: dict[str, Any] | None = None
    test: str = ""

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={metric!r}" for name, metric in self.metrics.items())
        return f"{self.kind} of {self.lm.get('spec')} on {self.subject}: {figures}"

    def to_json(self) -> dict[str, Any]:
        return {
            "test": self.test,
            "lm": self.lm,
            "kind": self.kind,
            "subject": self.subject,
            "settings": self.settings,
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "cost": {name: self.cost.get(name) for name in ("seconds", "tokens", "flops", "peak_bytes", "state_bytes")},
            "certificate": self.certificate,
            "series": {name: series.to_json() for name, series in self.series.items()},
            "examples": self.examples,
            **({"units": self.units} if self.units else {}),
            **({"gate": self.gate} if self.gate else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The record that `to_json` wrote."""
        return cls(
            **{
                **data,
                "metrics": {name: Metric.from_json(metric) for name, metric in data["metrics"].items()},
                "series": {name: Series(**series) for name, series in data["series"].items()},
            }
        )
