"""Any number of runs as one document: the models of each carry its name, so that everything stands side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.report.document import LISTS
from pytest_lmeval.report.overview import overview


def merge(documents: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """One document with the records of all, in the order of the runs; `runs` says how each came about.

    What each run's gate found is left out: it is about another baseline than the runs beside it.
    """
    return {
        **documents[0],
        "records": [
            {**record, "gate": None, "lm": {**record["lm"], "spec": f"{record['lm']['spec']} \u00b7 {label}"}}
            for document, label in zip(documents, labels, strict=True)
            for record in document["records"]
        ],
        **{name: [item for document in documents for item in document[name]] for name in LISTS},
        "runs": [
            {
                "label": label,
                "headline": overview(document).headline,
                "run": document["run"],
                "environment": document["environment"],
            }
            for document, label in zip(documents, labels, strict=True)
        ],
    }


def labels_of(files: Sequence[Path]) -> list[str]:
    """A short name for each file: what its path has alone.

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


def check_metric(name: str, records: Sequence[dict[str, Any]]) -> str:
    """The name of a metric that the records hold, spaces for underscores allowed. Raises DocumentError where none does."""
    known = dict.fromkeys(metric for record in records for metric in record["metrics"])
    found = name.replace(" ", "_")
    if found not in known:
        raise DocumentError(f"no run has a metric {name!r} to sort by. There are: {', '.join(sorted(known)) or 'none'}.")
    return found
