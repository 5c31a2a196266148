"""Merge any number of runs into one document; the models of each take the run's label, so that they stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from msgspec.structs import replace

from pytest_lmeval.errors import DocumentError, nearest
from pytest_lmeval.records._document import NamedRun, RunDocument
from pytest_lmeval.records._measured import Record
from pytest_lmeval.report._overview import overview


def merge(documents: Sequence[RunDocument], labels: Sequence[str]) -> RunDocument:
    """One document with the records of all, in the order of the runs; `runs` says how each came about.

    What each run's gate found is left out: it is about another baseline than the runs beside it.
    """
    labelled = list(zip(labels, documents, strict=True))
    return RunDocument(
        run=documents[0].run,
        environment=documents[0].environment,
        records=[_labelled(record, label) for label, document in labelled for record in document.records],
        skipped=list(chain.from_iterable(document.skipped for document in documents)),
        failures=list(chain.from_iterable(document.failures for document in documents)),
        sections=list(chain.from_iterable(document.sections for document in documents)),
        problems=list(chain.from_iterable(document.problems for document in documents)),
        runs=[
            NamedRun(label=label, headline=overview(document).headline, run=document.run, environment=document.environment)
            for label, document in labelled
        ],
    )


def _labelled(record: Record, label: str) -> Record:
    return replace(record, gate=None, lm=replace(record.lm, spec=f"{record.lm.spec} \u00b7 {label}"))


def labels_of(files: Sequence[Path]) -> list[str]:
    """A short name for each file: the end of its path that tells it from the others.

    >>> labels_of([Path("base/metrics.json"), Path("new/metrics.json")]), labels_of([Path("a.json"), Path("x/b.json")])
    (['base', 'new'], ['a', 'b'])
    >>> labels_of([Path("a.json"), Path("a.json")])
    ['1', '2']
    """
    parts = [file.with_suffix("").parts for file in files]
    longest = max(map(len, parts))
    for wanted in range(1, longest + 1):
        last = ["/".join(own[-wanted:]) for own in parts]
        if len(set(last)) == len(last):
            return [name.removesuffix("/metrics") for name in last]
    return [str(number) for number in range(1, len(files) + 1)]


def check_metric(name: str, records: Sequence[Record]) -> str:
    """The name of a metric that the records hold, spaces for underscores allowed. Raises DocumentError where none does."""
    known = {metric for record in records for metric in record.metrics}
    found = name.replace(" ", "_")
    if found not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise DocumentError(f"no run has a metric {name!r} to sort by.{nearest(found, known)} There are: {listed}.")
    return found
