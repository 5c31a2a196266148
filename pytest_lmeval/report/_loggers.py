"""Send the numbers of a run to MLflow, W&B or trackio: `lmeval render DIR --format mlflow`, `wandb` or `trackio`.

Each value becomes `metric`, with `metric_low` and `metric_high` if it has an interval. report.html goes along, nothing else.
Where they are sent, the libraries decide by their own settings (MLFLOW_TRACKING_URI; WANDB_MODE, WANDB_DIR; TRACKIO_DIR);
LMEVAL_PROJECT names the project. A library is imported by the call, never before.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records._document import RunDocument
from pytest_lmeval.records._secrets import masked
from pytest_lmeval.report._formats import named_values
from pytest_lmeval.report._terminal import say

PROJECT = "pytest-lmeval"
REPORT = "report.html"


def mlflow(document: RunDocument, folder: Path) -> dict[str, Any]:
    """A run of MLflow; its names take no other characters than letters, digits and `_-. /`."""
    library = _library("mlflow")
    library.set_experiment(_project())
    with library.start_run(run_name=_name(document)) as run:
        library.log_metrics({re.sub(r"[^\w\-. /]", "_", name): value for name, value in numbers(document).items()})
        if (report := folder / REPORT).is_file():
            library.log_artifact(str(report))
    say(f"logged to MLflow, {library.get_tracking_uri()}: run {run.info.run_id}")
    return {}


def wandb(document: RunDocument, folder: Path) -> dict[str, Any]:
    """A run of Weights & Biases, with its numbers in the summary."""
    library = _library("wandb")
    quiet = library.Settings(console="off", disable_git=True, save_code=False, x_disable_stats=True)
    run = library.init(project=_project(), name=_name(document), job_type="eval", settings=quiet)
    try:
        run.summary.update(numbers(document))
        if (report := folder / REPORT).is_file():
            run.save(str(report), base_path=str(folder), policy="now")
    finally:
        run.finish()
    say(f"logged to W&B: run {run.id}")
    return {}


def trackio(document: RunDocument, folder: Path) -> dict[str, Any]:
    """A run of trackio."""
    library = _library("trackio")
    run = library.init(project=_project(), name=_name(document), embed=False, auto_log_cpu=False, auto_log_gpu=False)
    try:
        library.log(numbers(document))
        if (report := folder / REPORT).is_file():
            library.log_artifact(str(report), name="report", type="report")
    finally:
        library.finish()
    say(f"logged to trackio: run {run.name}")
    return {}


def numbers(document: RunDocument) -> dict[str, float]:
    """Every number of a run and the ends of its interval, by benchmark and metric."""
    found: dict[str, float] = {}
    for benchmark, name, value in named_values(document):
        key = masked(f"{benchmark}/{name}")
        found[key] = float(value)
        if value.interval is not None:
            found |= {f"{key}_low": value.low, f"{key}_high": value.high}
    return found


def _name(document: RunDocument) -> str:
    return f"lmeval-{document.run.id}" if document.run.id else "lmeval"


def _project() -> str:
    return os.environ.get("LMEVAL_PROJECT") or PROJECT


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DocumentError(
            f"--format {name} needs {name}, which cannot be imported ({error}). pip install 'pytest-lmeval[{name}]'."
        ) from error
