"""What is made of the records of a run: a section of its pages, and a file for another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_lmeval import Section

if TYPE_CHECKING:
    from pytest_lmeval.records import RunDocument


def brevity(document: RunDocument, folder: Path | None) -> Section | None:
    """A table of how brief each model was; no section where that was not measured. `folder` holds the files of the run."""
    measured = [record for record in document.records if "brevity" in record.metrics]
    rows = [[record.test, record.lm.spec, float(record.metrics["brevity"])] for record in measured]
    return Section("Brevity", "The share of outputs of at most five words.", ["test", "model", "share"], rows) if rows else None


def csv(document: RunDocument) -> dict[str, str]:
    """The file metrics.csv, a line a number."""
    lines = ["test,model,metric,value"]
    for record in document.records:
        lines += [f"{record.test},{record.lm.spec},{name},{float(value)!r}" for name, value in record.metrics.items()]
    return {"metrics.csv": "\n".join(lines) + "\n"}
