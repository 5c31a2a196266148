"""Reduce a record to what a baseline keeps: numbers that mean the same on another machine, and the settings behind them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from pytest_lmeval.gates._margins import Margins
from pytest_lmeval.gates._scores import keeps_examples, numbered, rounded
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import headline_of, metric
from pytest_lmeval.records._schema import StoredStruct, to_plain
from pytest_lmeval.records._value import Value

IRRELEVANT = (  # settings that two runs may differ in
    "budget", "examples", "profile",  # effort of the probe, which tells nothing about the model
    "runs", "seconds", "warm_up",  # effort of timing: no baseline keeps times
    "chunk_size",  # by the certificate, the numbers do not depend on it
    "threads",  # belong to the machine, and the environment of the baseline names them
    "repeats",  # all answers to a question are compared with all of the other run
    "key",  # follows from the other settings and the version of this package
)  # fmt: skip
OF_COSTS = ("chunk_size", "repeats")  # those that costs do depend on
COSTS = ("flops", "state_bytes", "peak_bytes")


class Model(StoredStruct, frozen=True, kw_only=True):
    """The part of `ModelFacts` that two runs should have in common."""

    spec: str
    dtype: str
    device: str
    fingerprint: str


class Entry(StoredStruct, frozen=True, kw_only=True):
    """One record in a baseline.

    settings  of the record, without those that are None, folders of this machine, and the tails of long hashes
    metrics   those that every run of the same code repeats; `costs` likewise, of its `Cost`
    headline  the metric that is gated if the marker names none; one per record, since each more weakens the test of the others
    verdict   on the model's laws, if the record is about them
    first     the metrics that were first accepted under these settings, where other ones were accepted since: small losses,
              each within its margin, add up
    between_runs  of a metric of answers that were drawn several times: its standard deviation from run to run
    examples  checksum of its examples; empty if none are kept
    checksum  of all of the above, with test and record name
    """

    lm: Model
    settings: dict[str, Any]
    metrics: dict[str, Value]
    costs: dict[str, int | float]
    headline: str | None
    verdict: str | None
    first: dict[str, float] = {}
    between_runs: dict[str, float] = {}
    examples: str = ""
    checksum: str = ""


def entry_of(record: Record) -> Entry:
    """The entry of a record, without checksums."""
    probed = record.is_verdict  # the number of cases that it tried depends on time: keep only the verdict
    kept = {name: value for name, value in record.metrics.items() if not probed and metric(name, value).is_in_baseline}
    metrics = {name: _rounded(value) for name, value in kept.items()}
    costs = {name: None if probed else getattr(record.cost, name) for name in COSTS}
    if "timed_by" in record.details:
        costs["flops"] = None  # the clock decides the number of runs
    if not record.lm.device.startswith("cuda"):
        costs["peak_bytes"] = None  # of the whole process
    lm = record.lm
    return Entry(
        lm=Model(spec=portable(lm.spec), dtype=lm.dtype, device=lm.device, fingerprint=lm.fingerprint),
        settings=_portable({name: value for name, value in to_plain(record.settings).items() if value is not None}),
        metrics=metrics,
        costs={name: rounded(count) for name, count in costs.items() if count is not None},
        headline=headline_of(metrics) if keeps_examples(record) else None,
        verdict=record.certificate.verdict if probed and record.certificate else None,
        between_runs={name: float(rounded(spread)) for name, spread in record.details.get("between_runs", {}).items()},
    )


def sealed(entry: Entry, where: Sequence[str], examples: str) -> Entry:
    """The entry with the checksum of its examples, and its own, which covers `where` (test, record name) too."""
    entry = replace(entry, examples=examples, checksum="")
    plain = to_plain(entry)
    for name in ("first", "between_runs"):  # as before there were any
        if not plain[name]:
            del plain[name]
    text = json.dumps([*where, plain], sort_keys=True)
    return replace(entry, checksum=hashlib.sha256(text.encode()).hexdigest()[:16])


def succeeding(old: Entry | None, new: Entry) -> Entry:
    """The new entry in place of the old one, with the metrics that were first accepted if its settings are still the same."""
    if old is None or _relevant(old) != _relevant(new):
        return new
    first = old.first or {name: float(rounded(value)) for name, value in old.metrics.items()}  # as it is read back
    unchanged = all(name in new.metrics and rounded(new.metrics[name]) == value for name, value in first.items())
    return replace(new, first={} if unchanged else first)


def _relevant(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in entry.settings.items() if name not in IRRELEVANT}


def gated(entry: Entry, margins: Margins) -> list[str]:
    """The metrics that get a verdict: those that the marker names, and the headline if none of them is the same quantity."""
    if margins.off:
        return []
    named = [name for name in margins.given if name in entry.metrics and metric(name).aspect != "cost"]
    quantities = {metric(name).stands_for or name for name in named}
    if (first := entry.headline) is not None and (metric(first).stands_for or first) not in quantities:
        named = [first, *named]
    return [name for name in named if margins.of(name) is not None]


def names_of(records: Sequence[Record]) -> list[str]:
    """The name of each record of a test in a baseline: its kind and subject, numbered where several are equal."""
    return numbered([f"{record.kind} {portable(record.subject)}" for record in records], " #")


def portable(text: str) -> str:
    """The text without the folders of absolute paths, which belong to one machine: "text:notes.txt[test]"."""
    return re.sub(r"(^|[:\s])(?:[A-Za-z]:)?[/\\](?:[^/\\\[\]#]+[/\\])*", r"\1", text)


def differs(old: Entry, new: Entry) -> list[str]:
    """The differences between two runs, in words: model, precision, device, settings."""
    names = [name for name in dict.fromkeys([*old.settings, *new.settings]) if name not in IRRELEVANT]
    pairs = [
        ("model", old.lm.spec, new.lm.spec),
        ("dtype", old.lm.dtype, new.lm.dtype),
        ("device", old.lm.device, new.lm.device),
        ("model's fingerprint", old.lm.fingerprint, new.lm.fingerprint),
        *((name, old.settings.get(name, "not set"), new.settings.get(name, "not set")) for name in names),
    ]
    return [f"{name} was {before}, is {now}" for name, before, now in pairs if before != now]


def same_work(old: Entry, new: Entry) -> bool:
    """Whether both runs did the same on the same kind of device, so that costs can be compared."""
    names = [name for name in (*old.settings, *new.settings) if name not in IRRELEVANT or name in OF_COSTS]
    same = all(old.settings.get(name) == new.settings.get(name) for name in names)
    return same and (old.lm.device, old.lm.dtype) == (new.lm.device, new.lm.dtype)


def _portable(plain: Any) -> Any:
    """Plain values without folders of this machine, and with long hashes cut to 16 characters."""
    if isinstance(plain, dict):
        return {str(name): _portable(value) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_portable(value) for value in plain]
    if isinstance(plain, str):
        return plain[:16] if re.fullmatch(r"[0-9a-f]{32,}", plain) else portable(plain)
    return plain


def _rounded(value: Value) -> Value:
    low, high = map(rounded, value.interval) if value.interval else (None, None)
    return Value(rounded(value), value.unit, low=low, high=high, n=value.n, higher_is_better=value.higher_is_better)
