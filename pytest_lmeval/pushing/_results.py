"""Results in the hub's formats: entries below .eval_results, and on demand the older model-index of README.md.

https://huggingface.co/docs/hub/eval-results
An entry names a registered benchmark, which nothing here can guess: the user says which task is which. It has no field for an
interval or the number of questions, so they stand in its notes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.errors import ArgumentError, DocumentError, nearest, some
from pytest_lmeval.pushing._contents import Sent, text_file
from pytest_lmeval.records._document import RunDocument
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._secrets import masked
from pytest_lmeval.records._value import Value

KINDS = ("task", "finetune")
TASK_ID = "default"


@dataclass(frozen=True)
class Score:
    """One number for one benchmark."""

    task: str
    dataset: str
    task_id: str
    record: Record
    metric: str
    percent: bool

    @property
    def value(self) -> float:
        return self._scaled(self.record.metrics[self.metric])

    @property
    def notes(self) -> str:
        """Metric, interval, number of questions, and what decides the number."""
        value: Value = self.record.metrics[self.metric]
        said = [self.record.subject, self.metric]
        if value.interval is not None:
            said.append(f"95 % interval {self._scaled(value.low):.6g} to {self._scaled(value.high):.6g}")
        if value.n is not None:
            said.append(f"n = {value.n}")
        return masked(", ".join([*said, f"pytest-lmeval {importlib.metadata.version('pytest-lmeval')}"]))

    def _scaled(self, number: float) -> float:
        return round(float(number) * (100 if self.percent else 1), 10)


def scores_of(document: RunDocument, options: argparse.Namespace, fingerprint: str) -> list[Score]:
    """The numbers that the options map to benchmarks. Raises ArgumentError for a task or metric that the run does not have, and
    for a task that several models were asked, unless one of them has the fingerprint."""
    metrics = dict(_pair(text, "--metric", "TASK=NAME") for text in options.metric)
    wanted = [(*_pair(text, "--benchmark", "TASK=DATASET[:ID]"),) for text in options.benchmark]
    for option, names in (("--metric", metrics), ("--percent", options.percent)):
        if unknown := set(names) - {task for task, _ in wanted}:
            raise ArgumentError(f"{option} names {some(sorted(unknown))}, which no --benchmark maps to a dataset.")
    found = []
    for task, dataset in wanted:
        record = _record(document, task, options.lm, fingerprint)
        metric = metrics.get(task) or next(iter(record.metrics), "")
        if metric not in record.metrics:
            raise ArgumentError(f"{record.subject} has no metric {metric!r}. It has: {some(list(record.metrics))}.")
        name, _, task_id = dataset.partition(":")
        if name.count("/") != 1 or not all(name.split("/")):
            raise ArgumentError(f"--benchmark {task}={dataset}: a dataset of the hub has the form OWNER/NAME.")
        found.append(Score(task, name, task_id or TASK_ID, record, metric, task in options.percent))
    return found


def entry_files(scores: Sequence[Score], document: RunDocument, source_url: str | None) -> list[Sent]:
    """A file for each number."""
    if not scores:
        return []
    import yaml

    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError as error:
        raise ArgumentError(
            "the installed huggingface_hub knows no .eval_results. Upgrade it, or leave out --benchmark."
        ) from error
    files: dict[str, list[Any]] = {}
    for score in scores:
        entry = EvalResultEntry(
            dataset_id=score.dataset,
            task_id=score.task_id,
            value=score.value,
            date=document.run.started or None,
            source_url=source_url,
            notes=score.notes,
        )
        name = re.sub(r"[^\w.-]+", "-", f"{score.dataset.partition('/')[2]}-{score.task_id}")
        files.setdefault(f".eval_results/{name}.yaml", []).append(entry)
    texts = {path: yaml.safe_dump(eval_result_entries_to_yaml(held), sort_keys=False) for path, held in files.items()}
    return [text_file(path, text) for path, text in texts.items()]


def card(name: str, scores: Sequence[Score]) -> Callable[[str | None], str]:
    """The function of README.md's text (None: there is none) that puts the numbers into its model-index."""
    from huggingface_hub import EvalResult, ModelCard

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.dataset,
            dataset_name=score.dataset,
            dataset_config=score.task_id,
            metric_type=score.metric,
            metric_name=score.notes,
            metric_value=score.value,
        )
        for score in scores
    ]

    def merged(text: str | None) -> str:
        found = ModelCard(text or f"---\ntags:\n- pytest-lmeval\n---\n\n# {name}\n", ignore_metadata_errors=False)
        data: Any = found.data
        before = [one for one in data.eval_results or [] if not any(_about(one) == _about(new) for new in results)]
        data.eval_results = [*before, *results]
        data.model_name = data.model_name or name
        return str(found)

    return merged


def _about(result: Any) -> tuple[Any, ...]:
    return result.task_type, result.dataset_type, result.dataset_config, result.metric_type


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    """A task and what it is mapped to; the name of a task may hold `=`."""
    task, equals, other = text.rpartition("=")
    if not (task and equals and other):
        raise ArgumentError(f"{option} {text!r} does not have the form {form}.")
    return task, other


def _task_of(record: Record) -> str:
    """The subject without its last part, such as `5-shot`."""
    return record.subject.rpartition(", ")[0] or record.subject


def _record(document: RunDocument, task: str, spec: str | None, fingerprint: str) -> Record:
    """The record of a task: of the model that is named, or of that which is sent."""
    of_tasks = [record for record in document.records if record.kind in KINDS]
    named = [record for record in of_tasks if task in (record.subject, _task_of(record))]
    if not named:
        known = sorted({_task_of(record) for record in of_tasks})
        raise ArgumentError(
            f"the run asked no task {task!r}.{nearest(task, known)} It asked: {some(known) if known else 'none'}."
        )
    found = [record for record in named if spec in (None, record.lm.spec)]
    if not found:
        raise ArgumentError(f"--lm is {spec!r}, and {task} was asked of {some([record.lm.spec for record in named])}.")
    if len(found) > 1:
        found = [record for record in found if record.lm.fingerprint == fingerprint] or found
    if len(found) > 1:
        listed = some([f"{record.lm.spec} ({record.subject})" for record in found])
        raise ArgumentError(
            f"the run has {len(found)} results of {task}: {listed}. Choose one by --lm, or by the whole subject."
        )
    if found[0].not_measured or not found[0].metrics:
        raise DocumentError(f"{found[0].subject} has no numbers: {found[0].not_measured or 'none were measured'}.")
    return found[0]
