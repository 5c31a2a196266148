"""Record what a training gave: the trained model, how it learned, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from pytest_lmeval.models._flops import Flops
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.profiling._peak import Peak
from pytest_lmeval.records._measured import Cost, MetricValue, Record, Result, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._loss_metrics import exponential
from pytest_lmeval.statistics._estimate import ratio_intervals
from pytest_lmeval.training._plan import Plan
from pytest_lmeval.training._protocol import Protocol
from pytest_lmeval.training._run import Run

POINTS = 1000  # most points of a curve in the record; longer curves average neighbouring steps


UNKNOWN = "{record.lm.spec} was trained without held_out, so its {name} on unseen text is not known."


@dataclass(frozen=True, repr=False)
class TrainResult(Result):
    """A trained model, ready for use, and the record of its training.

    lm          with the weights of the lowest held-out loss; without a held-out text, the last
    cached      whether an earlier training with the same key gave it
    resumed_at  the step at which an interrupted training resumed; 0 if it did not
    """

    lm: Model
    cached: bool = False
    resumed_at: int = 0

    nll = MetricValue(absent=UNKNOWN)
    """Mean held-out loss of `lm`, nats per token, with its 95 % interval (over crops)."""
    perplexity = MetricValue(absent=UNKNOWN)
    """exp of `nll`."""
    train_loss = MetricValue()
    """Mean training loss of the last `eval_every` steps, nats per token."""

    @property
    def curve(self) -> Series:
        """Training loss by tokens seen."""
        return self.record.series["learning_curve"]

    @property
    def best_step(self) -> int:
        """The number of steps that `lm` was trained for, up to the best evaluation."""
        return int(self.record.details["best_step"])


def record_of(run: Run, trained: Model, plan: Plan, per_epoch: int, flops: Flops, peak: Peak) -> Record:
    """The record of a training. `flops` are those of one step."""
    protocol = plan.protocol
    tokens = run.step * protocol.batch_size * protocol.seq_len
    spent, last = flops * run.step, run.losses[-protocol.eval_every :]
    flops_by_pass = {"flops_forward": spent.forward, "flops_backward": spent.backward, "flops_total": spent.total}
    seen = len(last) * protocol.batch_size * protocol.seq_len
    return Record(
        kind="train",
        subject=run.text,
        lm=facts(trained),
        settings=plan.settings,
        details={"steps": run.step, "steps_an_epoch": per_epoch, "best_step": run.best_step, **micro_batch(run, protocol)},
        metrics={
            **_held_out_values(run, protocol),
            "train_loss": value_of("train_loss", sum(last) / len(last), n=seen),
            **costs_of(run, trained, peak, flops_by_pass),
            "tokens_per_second": value_of("tokens_per_second", tokens / run.seconds, n=tokens),
        },
        cost=Cost(seconds=run.seconds, tokens=tokens, flops=spent.total, peak_bytes=peak.bytes),
        series=_series_of(run, protocol, per_epoch),
    )


def costs_of(run: Run, trained: Model, peak: Peak, flops: dict[str, int] | None = None) -> dict[str, Value]:
    """What a training took: time, operations if they were counted, memory."""
    about = facts(trained)
    found: dict[str, float | None] = {"seconds": run.seconds, **(flops or {}), "model_bytes": about.bytes}
    found |= {"peak_memory": peak.bytes, "peak_memory_growth": peak.growth, "parameters": about.parameters}
    return {name: value_of(name, cost) for name, cost in found.items() if cost is not None}


def micro_batch(run: Run, protocol: Protocol) -> dict[str, Any]:
    """Of a training that ran out of memory: how many rows it read at once, and words for it."""
    if run.micro_batch is None:
        return {}
    ran_out = (
        f"{run.lm.spec} on {run.text}: memory ran out, so its batches of {protocol.batch_size} rows were read "
        f"{run.micro_batch} at a time and their gradients added up: the same, but for rounding and the masks of dropout"
    )
    return {"micro_batch": run.micro_batch, "warnings": [ran_out]}


def _held_out_values(run: Run, protocol: Protocol) -> dict[str, Value]:
    """nll and perplexity of the best weights, and of the last."""
    values: dict[str, Value] = {}
    for suffix, step in (("", run.best_step), ("_last", run.step)) if run.evaluations else ():
        nats = run.evaluations[step].numpy()
        sums = np.column_stack([nats, np.full(len(nats), protocol.seq_len)])
        (interval,) = ratio_intervals(sums, [(0, 1)])
        n = len(nats) * protocol.seq_len
        nll = value_of(f"nll{suffix}", nats.sum() / n, interval, n=n)
        values |= {f"perplexity{suffix}": exponential(nll, f"perplexity{suffix}"), f"nll{suffix}": nll}
    return values


def _series_of(run: Run, protocol: Protocol, per_epoch: int) -> dict[str, Series]:
    a_step = protocol.batch_size * protocol.seq_len
    series = {}
    curves = (("learning_curve", run.losses, "nats/token", "Learning curves"), ("gradient_norm", run.norms, "", ""))
    for name, values, unit, title in curves:
        ends, means = averaged(values, -(-len(values) // POINTS))
        series[name] = Series([float(end * a_step) for end in ends], means, "tokens", unit, title)
    ends, means = averaged(run.losses, per_epoch)
    series["epoch_loss"] = Series([end / per_epoch for end in ends], means, "epochs", "nats/token")
    if run.evaluations:
        losses = torch.stack(list(run.evaluations.values())).mean(1) / protocol.seq_len
        seen = [float(step * a_step) for step in run.evaluations]
        series["held_out_loss"] = Series(seen, losses.tolist(), "tokens", "nats/token", "Held-out loss")
    return series


def averaged(values: list[float], group: int) -> tuple[list[int], list[float]]:
    """The end and the mean of each group of consecutive values; the last group may be shorter."""
    parts = [values[begin : begin + group] for begin in range(0, len(values), group)]
    return list(accumulate(map(len, parts))), [sum(part) / len(part) for part in parts]
