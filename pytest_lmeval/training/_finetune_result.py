"""Record what a fine-tuning gave: the median and the range over seeds, beside the majority class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec import structs

from pytest_lmeval.measures._task import TaskResult
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._measured import Cost, Record, Series
from pytest_lmeval.records._metric import is_declared, metric as declared
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._answers import write_examples
from pytest_lmeval.scoring._metrics import metrics_of
from pytest_lmeval.tasks._task import Task
from pytest_lmeval.training._majority import beside_majority, majority_of
from pytest_lmeval.training._questions import TrainingRow

NOT_OF_ANSWERS = ("chance", "cut_off")  # the same, or nothing to compare, for every seed
PER_SEED = ("seed", "key", "trained_from_fingerprint", "frozen")  # settings of a training that are not those of all


@dataclass(frozen=True)
class Seed:
    """The record of the training with one seed, and what the trained model answered.

    cached, resumed_at  see `TrainResult`
    """

    seed: int
    training: Record
    result: TaskResult
    cached: bool = False
    resumed_at: int = 0


@dataclass(frozen=True, repr=False)
class FinetuneResult(TaskResult):
    """The answers of the median seed to a task, as those of `TaskResult`: every metric is an attribute, with its interval over
    questions. Of M, `M_min` and `M_max` are the range over seeds, `M_majority` is its value where the answer that is right most
    often in training is always given, and `M_over_majority` how much more the median seed has, with its interval.

    The median is by the first metric; of an even number of seeds it is the lower one of the middle.

    lm     the trained model of the first seed, whatever it reached
    seeds  the training and the answers of each, in order; the weights of the other models are in the output folder
    """

    lm: Model | None = None
    seeds: tuple[Seed, ...] = ()


def result_of(
    first: Model,
    spec: str,
    task: Task,
    seeds: Sequence[Seed],
    rows: Sequence[TrainingRow],
    counts: dict[str, Any],
    notes: list[str],
    examples: Path | None,
) -> FinetuneResult:
    """The result over all seeds.

    first     the trained model of the first seed
    spec      of the model that was given
    rows      the training rows
    counts    for the details of the record, with the `kind` of fine-tuning
    examples  write the answers of the median seed to this file
    """
    main = next(iter(seeds[0].result.record.metrics))
    ordered = sorted(seeds, key=lambda one: float(one.result.record.metrics[main]))
    better = seeds[0].result.record.metrics[main].higher_is_better is not False
    median = (ordered if better else ordered[::-1])[(len(seeds) - 1) // 2]
    record, answers = median.result.record, median.result.examples
    values = {name: value for name, value in record.metrics.items() if name not in NOT_OF_ANSWERS}
    own = [name for name in values if is_declared(name)]
    metrics: dict[str, Value] = {}
    beside = beside_majority(majority_of(rows), answers, metrics_of(own, task.name), values) if own else {}
    for name, value in values.items():
        of_seeds = [float(one.result.record.metrics[name]) for one in seeds if name in one.result.record.metrics]
        metrics[name] = value
        for ending, number in (("_min", min(of_seeds)), ("_max", max(of_seeds))):
            metrics[name + ending] = declared(name + ending, value).value(number, n=len(of_seeds))
        metrics |= {other: beside[other] for other in (f"{name}_majority", f"{name}_over_majority") if other in beside}
    metrics |= {name: value for name, value in record.metrics.items() if name not in values}
    trained, asked = [one.training for one in seeds], [one.result.record for one in seeds]
    details = {
        **record.details,
        **counts,
        "median_seed": median.seed,
        "seeds": {str(one.seed): _about(one) for one in seeds},
        "trained_parameters": _trained_parameters(first),
    }
    if said := [text for one in trained for text in one.details.get("warnings", [])]:
        details["warnings"] = said
    settings = {name: value for name, value in trained[0].settings.items() if name not in PER_SEED}
    cut = counts["truncated_in_training"]
    made = structs.replace(
        record,
        kind="finetune",
        subject=f"{task.name}, fine-tuned",
        lm=structs.replace(record.lm, spec=f"{spec} fine-tuned"),
        settings={**record.settings, **settings, "seeds": [one.seed for one in seeds]},
        details=details,
        notes=[
            f"{counts['kind']}, {_seeds_note(main, metrics, len(seeds))}",
            *notes,
            *([f"{cut:,} training questions truncated"] if cut else []),
            *record.notes,
        ],
        metrics=metrics,
        cost=Cost(
            seconds=sum(one.cost.seconds or 0.0 for one in [*trained, *asked]),
            tokens=sum(one.cost.tokens or 0 for one in [*trained, *asked]),
            peak_bytes=max((one.cost.peak_bytes or 0 for one in trained), default=0) or None,
        ),
        series=_series(seeds, main),
        examples=None if examples is None else str(examples),
    )
    if examples is not None:
        write_examples(answers, examples)
    resumed = sum(one.result.resumed for one in seeds)
    return FinetuneResult(made, answers, resumed, lm=first, seeds=tuple(seeds))


def _about(one: Seed) -> dict[str, Any]:
    record, learned = one.result.record, one.training
    values = {name: float(value) for name, value in record.metrics.items() if name not in NOT_OF_ANSWERS}
    about = {"best_step": learned.details["best_step"], "held_out_nll": float(learned.metrics["nll"])}
    return {**values, **about, "key": learned.settings["key"], "seconds": float(learned.metrics["seconds"])}


def _seeds_note(main: str, metrics: dict[str, Value], seeds: int) -> str:
    if seeds == 1:
        return "one seed"
    return f"median of {seeds} seeds, {main} {metrics[f'{main}_min']:.4g} to {metrics[f'{main}_max']:.4g}"


def _trained_parameters(lm: Model) -> int:
    assert lm.module is not None
    return sum(parameter.numel() for parameter in lm.module.parameters() if parameter.requires_grad)


def _series(seeds: Sequence[Seed], main: str) -> dict[str, Series]:
    """The curves, each the mean over seeds, and the first metric of each seed."""
    found = {}
    for name, title in (("learning_curve", "Learning curves"), ("held_out_loss", "Held-out loss")):
        curves = [one.training.series[name] for one in seeds]
        means = [fmean(values) for values in zip(*(curve.y for curve in curves), strict=True)]
        found[name] = structs.replace(curves[0], y=means, title=title)
    values = [float(one.result.record.metrics[main]) for one in seeds]
    found[main] = Series(
        [float(one.seed) for one in seeds], values, "run", "", f"{main.replace('_', ' ').capitalize()} by seed"
    )
    return found
