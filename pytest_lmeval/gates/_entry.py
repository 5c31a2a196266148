"""What a baseline keeps of a record: the numbers that mean the same on another machine, and the settings that produced them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from pytest_lmeval.gates._margins import Margins
from pytest_lmeval.gates._scores import keeps_examples, numbered, rounded
from pytest_lmeval.records._measured import ModelFacts, Record
from pytest_lmeval.records._metric import headline_of, metric
from pytest_lmeval.records._schema import Kept, to_plain
from pytest_lmeval.records._value import Value

IRRELEVANT = {  # settings that two runs may differ in, and why
    "budget": "how long the laws of a model are tried says nothing of the model",
    "chunk_size": "the certificate proves that the numbers do not depend on it",
    "examples": "how many cases the laws are tried on, as budget",
    "key": "it follows from the other settings and from the version of this package",
    "profile": "how hard the probe looks, as budget",
    "runs": "how often something is timed changes the times alone, which no baseline keeps",
    "seconds": "how long something is timed, as runs",
    "threads": "they belong to the machine, and the environment of the baseline names them",
    "warm_up": "how often something is run before it is timed, as runs",
}
OF_COSTS = ("chunk_size",)  # of these, what a cost does depend on
COSTS = ("flops", "state_bytes", "peak_bytes")


class Model(Kept, frozen=True, kw_only=True):
    """Of `ModelFacts`, what two runs should have alike."""

    spec: str
    dtype: str
    device: str
    fingerprint: str


class Entry(Kept, frozen=True, kw_only=True):
    """One record in a baseline.

    settings  of the record, but for those that are None, without folders of this machine, long hashes cut
    metrics   those that are the same in every run of the same code
    costs     of its `Cost`, those that are the same in every run
    headline  the metric that is gated where the marker names none: one a record, since each more makes the others less certain
    verdict   on the model's laws, where the record is about them
    examples  checksum of its examples; empty where none are kept
    checksum  of all the above, and of where it stands
    """

    lm: Model
    settings: dict[str, Any]
    metrics: dict[str, Value]
    costs: dict[str, int | float]
    headline: str | None
    verdict: str | None
    examples: str = ""
    checksum: str = ""


def entry_of(record: Record) -> Entry:
    """The entry of a record, not sealed yet."""
    probed = record.is_verdict  # how many cases it tried is a question of time: only the verdict is kept
    kept = {name: value for name, value in record.metrics.items() if not probed and metric(name, value).is_kept}
    metrics = {name: _rounded(value) for name, value in kept.items()}
    costs = {name: None if probed else getattr(record.cost, name) for name in COSTS}
    if "timed_by" in record.details:
        costs["flops"] = None  # of as many runs as the clock wanted
    if not record.lm.device.startswith("cuda"):
        costs["peak_bytes"] = None  # of the whole process
    return Entry(
        lm=_model(record.lm),
        settings=_portable({name: value for name, value in to_plain(record.settings).items() if value is not None}),
        metrics=metrics,
        costs={name: rounded(count) for name, count in costs.items() if count is not None},
        headline=headline_of(metrics) if keeps_examples(record) else None,
        verdict=record.certificate.verdict if probed and record.certificate else None,
    )


def sealed(entry: Entry, place: Sequence[str], examples: str) -> Entry:
    """The entry with its checksum, for where it stands (test, name of the record), and with that of its examples."""
    entry = replace(entry, examples=examples, checksum="")
    text = json.dumps([*place, to_plain(entry)], sort_keys=True)
    return replace(entry, checksum=hashlib.sha256(text.encode()).hexdigest()[:16])


def gated(entry: Entry, margins: Margins) -> list[str]:
    """The metrics of an entry that are judged with chance in mind: its headline, and what the marker names.

    The headline is not where the marker names the same quantity in another unit.
    """
    if margins.off:
        return []
    named = [name for name in margins.given if name in entry.metrics and metric(name).aspect != "cost"]
    first = entry.headline
    told = first is None or any(_quantity(name) == _quantity(first) for name in named)
    return [name for name in (named if told or first is None else [first, *named]) if margins.of(name) is not None]


def names_of(records: Sequence[Record]) -> list[str]:
    """What each record of a test is called in a baseline: its kind and subject, numbered where several have the same."""
    return numbered([f"{record.kind} {portable(record.subject)}" for record in records], " #")


def portable(text: str) -> str:
    """Without the folders of an absolute path: they are those of one machine.

    >>> portable("text:/home/me/notes.txt[test]"), portable("OWNER/NAME[test]")
    ('text:notes.txt[test]', 'OWNER/NAME[test]')
    """
    return re.sub(r"(^|[:\s])(?:[A-Za-z]:)?[/\\](?:[^/\\\[\]#]+[/\\])*", r"\1", text)


def differs(old: Entry, new: Entry) -> list[str]:
    """Where the two runs differ, in words: model, precision, device, settings."""
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
    alike = all(old.settings.get(name) == new.settings.get(name) for name in names)
    return alike and (old.lm.device, old.lm.dtype) == (new.lm.device, new.lm.dtype)


def _quantity(name: str) -> str:
    return metric(name).stands_for or name


def _model(lm: ModelFacts) -> Model:
    return Model(spec=portable(lm.spec), dtype=lm.dtype, device=lm.device, fingerprint=lm.fingerprint)


def _portable(plain: Any) -> Any:
    """Plain values without folders of this machine; of a long hash, as much as tells it apart."""
    if isinstance(plain, dict):
        return {str(name): _portable(value) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_portable(value) for value in plain]
    if isinstance(plain, str):
        return plain[:16] if re.fullmatch(r"[0-9a-f]{32,}", plain) else portable(plain)
    return plain


def _rounded(value: Value) -> Value:
    low, high = (None if bound is None else rounded(bound) for bound in (value.low, value.high))
    return Value(rounded(value), value.unit, low=low, high=high, n=value.n, higher_is_better=value.higher_is_better)
