"""Define records: the measured thing, the model, the result, its cost and its certificate.

`metrics.json` holds a list of records (see `records._document`); `records._schema` reads and writes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

from msgspec.structs import force_setattr

from pytest_lmeval.errors import ArgumentError, NotMeasuredError, ProfilingError
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._comparison import Comparison
from pytest_lmeval.records._schema import StoredStruct
from pytest_lmeval.records._value import Value

Outcome = Literal["", "passed", "failed", "skipped"]
READ_DETAILS: dict[str, type[str] | type[dict[str, Any]] | type[list[str]]] = {
    "failure": str,
    "too_short": dict,
    "warnings": list,
    "scored": dict,
    "between_runs": dict,
    "withheld": dict,
}
"""The details that code reads, and their types. `scored`: metric of the scorer of a task -> whether it judges answers;
`withheld`: metric that the record would have -> why it was not measured; `between_runs`: metric -> standard deviation of its
value from run to run, where each run draws as many answers to the same questions."""


class Precision(StoredStruct, frozen=True, kw_only=True):
    """Precision of a module's weights, found in its tensors and not in the request (see `models._identity.precision`).

    "Weights" here are those that are multiplied.

    name                    precision of nine tenths of the weights: fp32, bf16, fp16, int8, int4, ...; else `mixed`, or
                            `packed` for integers of unknown meaning
    bits_per_weight         mean bits of a weight's value, without scales; None: unknown
    stored_bits_per_weight  mean bits of a weight in memory, with scales and zero points
    bytes_before            of the whole model before its precision was set; None if it was not set
    bytes_after             of the whole model in memory
    converted               fraction of all parameters in the named precision
    converted_multiplied    fraction of the weights in it
    kept                    other precisions -> number of parameters in them
    """

    name: str
    bits_per_weight: float | None
    stored_bits_per_weight: float | None
    bytes_before: int | None
    bytes_after: int
    converted: float
    converted_multiplied: float
    kept: dict[str, int]


class ModelFacts(StoredStruct, frozen=True, kw_only=True):
    """Description of the model.

    form         adapter that steps it
    parameters   number of them; None for an object that is no torch module
    bytes        of parameters and buffers in memory, with scales and zero points of packed ones
    dtype        coarsest type that it computes in, or precision of packed weights: int8, int4
    fingerprint  changes with the model (see `models._identity.fingerprint`)
    unused       tensors of its checkpoint that the model has no place for
    server       what the server of a served model tells of itself
    loaded       what its source tells of what was loaded and how: adapter, revision, quantization, attention, devices, cache
    """

    spec: str
    form: str = ""
    parameters: int | None = None
    bytes: int = 0
    dtype: str = ""
    device: str = ""
    fingerprint: str = ""
    precision: Precision | None = None
    unused: list[str] = []
    server: dict[str, Any] | None = None
    loaded: dict[str, Any] = {}


class Cost(StoredStruct, frozen=True, kw_only=True):
    """Cost of a measurement; None for what was not measured."""

    seconds: float | None = None
    tokens: int | None = None
    flops: float | None = None
    peak_bytes: int | None = None
    state_bytes: int | None = None


class Series(StoredStruct, frozen=True):
    """A curve: y against x, both with their units.

    title      title of its plot; empty: the name of the series
    log        logarithmic axes: "", "x", "y", "xy"
    low, high  95 % intervals of y; empty for none
    part       of the subject, such as a layer, that it is about: the plot lets its reader choose one
    curve      what it shows of a part, such as a set of texts: several have one plot
    points     in no order, so that no line joins them

    Raises ArgumentError if the lists differ in length or a number is not finite.
    """

    x: list[float]
    y: list[float]
    x_unit: str = ""
    y_unit: str = ""
    title: str = ""
    log: Literal["", "x", "y", "xy"] = ""
    low: list[float] = []
    high: list[float] = []
    part: str = ""
    curve: str = ""
    points: bool = False

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ArgumentError(f"a curve has as many x as y; this one has {len(self.x)} and {len(self.y)}")
        if {len(self.low), len(self.high)} not in ({0}, {len(self.x)}):
            raise ArgumentError(
                f"a curve has two ends of an interval for each point, or none; this one has {len(self.x)} points and "
                f"{len(self.low)} and {len(self.high)} ends"
            )
        if not all(map(math.isfinite, (*self.x, *self.y, *self.low, *self.high))):
            raise ArgumentError("a curve holds a number that is not finite")


class Record(StoredStruct, frozen=True, kw_only=True):
    """What one verb measured.

    test          node id of the test, empty outside pytest
    kind          the verb: perplexity, task, equivalence, latency, ...; "custom" for numbers of the user's own
    subject       what was measured: a corpus, a task, a shape
    settings      all choices that decide what the numbers mean; a gate compares them with those of the baseline
    details       further observations, for people
    notes         caveats for readers of the numbers, such as windows or truncated prompts
    not_measured  why there are no numbers
    certificate   verdict on the model's laws that the numbers rest on
    example       name of one example: question, document, block
    examples      file of per-example (or per-token) values, relative to the output folder
    units         file of the sums of each document or block, relative to the output folder
    gate          metric -> its comparison with the baseline; None without a baseline
    outcome       of the test
    """

    kind: str
    subject: str
    lm: ModelFacts
    test: str = ""
    settings: dict[str, Any] = {}
    details: dict[str, Any] = {}
    notes: list[str] = []
    not_measured: str | None = None
    metrics: dict[str, Value] = {}
    cost: Cost = Cost()
    certificate: Certificate | None = None
    series: dict[str, Series] = {}
    example: str = "example"
    examples: str | None = None
    units: str | None = None
    gate: dict[str, Comparison] | None = None
    outcome: Outcome = ""

    def __post_init__(self) -> None:
        force_setattr(self, "metrics", {name: value.named(name) for name, value in self.metrics.items()})
        for name, kind in READ_DETAILS.items():
            found = self.details.get(name, kind())
            if not isinstance(found, kind) or (kind is list and not all(isinstance(one, str) for one in found)):
                raise ArgumentError(f"among details, {name} is {repr(found)[:60]}, which is no {kind.__name__} (of texts)")

    @property
    def is_verdict(self) -> bool:
        """The record is about the laws of a model: pages give it a table of its own, and a gate compares its verdict."""
        return self.kind == "equivalence" and self.certificate is not None

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value!r}" for name, value in self.metrics.items())
        return f"{self.kind} of {self.lm.spec} on {self.subject}: {figures}"


@dataclass(frozen=True)
class Result:
    """What a verb returns: the record, with its numbers as attributes."""

    record: Record

    def __repr__(self) -> str:
        return repr(self.record)


def withheld_of(record: Record) -> dict[str, str]:
    """The metrics that a record does not have because its answers say too little, and why."""
    return {name: str(why) for name, why in record.details.get("withheld", {}).items()}


def measured(record: Record, name: str) -> Value:
    """The metric of that name. Raises NotMeasuredError if it was not timed, ProfilingError if the model failed, KeyError if
    there is no such metric."""
    if failure := record.details.get("failure"):
        raise ProfilingError(f"{record.lm.spec} failed at {record.subject}, so there is no {name}: {failure}")
    if reason := record.not_measured or record.details.get("too_short", {}).get(name.partition("_")[0]):
        raise NotMeasuredError(f"{name} was not measured: {reason}")
    return record.metrics[name]


class MetricValue:
    """An attribute of a result: the metric `name`, by default the one of its own name.

    Raises as `measured`; AttributeError with the message `absent`, if there is one, where the record has no such metric.
    """

    def __init__(self, name: str = "", *, absent: str = "") -> None:
        self._name, self._absent = name, absent

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = self._name or name

    @overload
    def __get__(self, result: None, owner: type) -> MetricValue: ...
    @overload
    def __get__(self, result: Result, owner: type) -> Value: ...
    def __get__(self, result: Result | None, owner: type) -> MetricValue | Value:
        if result is None:
            return self
        if self._absent and self._name not in result.record.metrics:
            raise AttributeError(self._absent.format(record=result.record, name=self._name))
        return measured(result.record, self._name)
