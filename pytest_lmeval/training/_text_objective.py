"""Learn to predict each token of a text, in crops, each read from an empty state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pytest_lmeval.engine import Engine, Policy, Request
from pytest_lmeval.models._failures import NoMemory, halving
from pytest_lmeval.models._flops import Flops, training_flops
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._seeds import generator_of
from pytest_lmeval.profiling._peak import Peak
from pytest_lmeval.records._measured import Record
from pytest_lmeval.training._plan import TextPlan, batches, held_out_batches, read, steps_an_epoch
from pytest_lmeval.training._refusals import refuse_divergence
from pytest_lmeval.training._result import record_of
from pytest_lmeval.training._run import Run
from pytest_lmeval.training._updates import differentiate, no_room
from pytest_lmeval.training._weights import copy_of


@dataclass(frozen=True)
class TextObjective:
    """An `Objective`; `flops` are those of a step."""

    plan: TextPlan
    tokens: np.ndarray
    held_out: list[Tensor]
    steps_an_epoch: int
    flops: Flops

    item = "crop"

    @property
    def batch_size(self) -> int:
        return self.plan.protocol.batch_size

    @property
    def unit(self) -> int:
        return self.plan.protocol.seq_len

    @property
    def holds_out(self) -> bool:
        return bool(self.held_out)

    @property
    def steps(self) -> int:
        return self.plan.protocol.steps or self.steps_an_epoch * (self.plan.protocol.epochs or 0)

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        return batches(self.tokens, self.plan.protocol, first=first)

    def loss(self, lm: Model, rows: Tensor) -> Tensor:
        return loss_of(lm, rows)

    def evaluate(self, lm: Model, rows: int) -> Tensor:
        return evaluate(lm, self.held_out)

    def refuse(self, run: Run) -> None:
        refuse_divergence(run, self.plan.protocol, self.steps)

    def record(self, run: Run, trained: Model, peak: Peak) -> Record:
        return record_of(run, trained, self.plan, self.steps_an_epoch, self.flops, peak)


def text_objective(plan: TextPlan) -> TextObjective:
    """Read the texts of a plan as token ids, and count the operations of a step.

    Raises CorpusError for a text that is too short, ModelError for a model whose loss has no gradient.
    """
    protocol, unseen = plan.protocol, plan.held_out
    tokens = read(plan.lm, plan.text, protocol.tokens)
    per_epoch = steps_an_epoch(tokens, protocol, plan.subject)
    held_out = [] if unseen is None else held_out_batches(read(plan.lm, unseen, protocol.tokens), protocol, str(unseen))
    with torch.random.fork_rng(devices=[plan.lm.device] if plan.lm.device.type == "cuda" else []):
        flops = flops_of_a_step(copy_of(plan.lm), next(batches(tokens, protocol)), protocol.seed)
    return TextObjective(plan, tokens, held_out, per_epoch, flops)


def loss_of(lm: Model, crops: Tensor) -> Tensor:
    """Mean loss of crops [b, t + 1], each read from an empty state, in nats per token."""
    crops = crops.to(lm.device)
    logits, _ = lm.step(crops[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())


def evaluate(lm: Model, held_out: list[Tensor]) -> Tensor:
    """Nats of each held-out crop, read from an empty state, [crops] float64 on the CPU."""
    assert lm.module is not None
    was_training = lm.module.training
    lm.module.eval()
    engine = Engine(lm, Policy(carry=False, batch_size=len(held_out[0])))
    try:
        scored = engine.score([Request(crop, 1) for crops in held_out for crop in crops.numpy()])
    finally:
        lm.module.train(was_training)
    return torch.tensor([-one.loglikelihood.sum() for one in scored], dtype=torch.float64)


def flops_of_a_step(lm: Model, crops: Tensor, seed: int) -> Flops:
    """Counts a step of a copy of the model, which it may change (running means, counters); of fewer rows if all do not fit."""
    assert lm.module is not None
    lm.module.train()

    def loss(rows: int) -> Tensor:
        generator_of(lm.device).manual_seed(seed)
        return loss_of(lm, crops[:rows])

    found, rows = halving(lambda rows: training_flops(partial(loss, rows), partial(differentiate, lm)), len(crops))
    if isinstance(found, NoMemory):
        raise no_room(lm, "its first batch", len(crops), found.wanted)
    return Flops(found.forward * len(crops) // rows, found.backward * len(crops) // rows)
