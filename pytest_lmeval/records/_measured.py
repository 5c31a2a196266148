"""One measured thing: which test, which model, what was found, what it cost, and why it can be trusted.

A record is what `metrics.json` holds a list of (see `records._document`). It is typed from whoever makes it to the page that
shows it; `records._schema` reads and writes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._comparison import Comparison
from pytest_lmeval.records._schema import Kept
from pytest_lmeval.records._value import Value

Outcome = Literal["", "passed", "failed", "skipped"]


class Precision(Kept, frozen=True, kw_only=True):
    """What the weights of a module are, found in its tensors and not in what was asked for (see `models._identity.precision`).

    name                    fp32, bf16, fp16, int8, int4, ...: of nine tenths of the weights that are multiplied; `mixed`, or
                            `packed` where integers have no known meaning
    bits_per_weight         mean over the weights that are multiplied of the bits of a value, without scales; None: unknown
    stored_bits_per_weight  mean over the same of what they take in memory, with scales and zero points
    bytes_before            of the whole model before its precision was set; None if it was left as it came
    bytes_after             of the whole model as it lies in memory
    converted               share of all parameters in the named precision
    converted_multiplied    share of the weights that are multiplied
    kept                    other precisions and how many parameters are in them
    """

    name: str
    bits_per_weight: float | None
    stored_bits_per_weight: float | None
    bytes_before: int | None
    bytes_after: int
    converted: float
    converted_multiplied: float
    kept: dict[str, int]


class ModelFacts(Kept, frozen=True, kw_only=True):
    """What a record says about the model.

    form         which adapter drives it
    parameters   how many; None for an object that is no torch module
    bytes        of parameters and buffers as they lie in memory, with scales and zero points of packed ones
    dtype        the coarsest type that it computes in, or of packed weights their precision: int8, int4
    fingerprint  changes when the model does (see `models._identity.fingerprint`)
    """

    spec: str
    form: str = ""
    parameters: int | None = None
    bytes: int = 0
    dtype: str = ""
    device: str = ""
    fingerprint: str = ""
    precision: Precision | None = None


class Cost(Kept, frozen=True, kw_only=True):
    """What a measurement cost; None where that was not measured."""

    seconds: float | None = None
    tokens: int | None = None
    flops: float | None = None
    peak_bytes: int | None = None
    state_bytes: int | None = None


class Series(Kept, frozen=True):
    """A curve: y against x, both with their units.

    title  what its plot is called; empty: the name of the series
    log    axes that are logarithmic: "", "x", "y", "xy"
    """

    x: list[float]
    y: list[float]
    x_unit: str = ""
    y_unit: str = ""
    title: str = ""
    log: Literal["", "x", "y", "xy"] = ""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ArgumentError(f"a curve has as many x as y, and this one has {len(self.x)} and {len(self.y)}")
        if not all(map(math.isfinite, (*self.x, *self.y))):
            raise ArgumentError("a curve holds a number that is not finite")


class Record(Kept, frozen=True, kw_only=True):
    """What one verb found out.

    test          node id of the test, empty outside pytest
    kind          the verb: perplexity, task, equivalence, latency, ...; "custom" for numbers of the user's own
    subject       what it was applied to: a corpus, a task, a shape
    settings      everything that was chosen, and decides what the numbers mean: compared as a whole with those of a baseline
    details       what else was seen on the way, for people
    notes         what a reader of the numbers should know: that they were read in windows, that questions were cut
    not_measured  why there are no numbers
    cost          what it took
    certificate   the verdict on the model's laws that the numbers stand on
    example       what one of its examples is called: question, document, block
    examples      file of per-example (or per-token) values, relative to the output folder
    units         file of the sums of each document, or block of a stream, relative to the output folder
    gate          metric -> how it compares with the baseline; None where there is none
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

    @property
    def is_verdict(self) -> bool:
        """Whether it is about the laws of a model, which have tables of their own, and of which a gate compares the verdict."""
        return self.kind == "equivalence" and self.certificate is not None

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value!r}" for name, value in self.metrics.items())
        return f"{self.kind} of {self.lm.spec} on {self.subject}: {figures}"


@dataclass(frozen=True, repr=False)
class Result:
    """What a verb returns: the record, and what a test asks of it as attributes."""

    record: Record

    def __repr__(self) -> str:
        return repr(self.record)
