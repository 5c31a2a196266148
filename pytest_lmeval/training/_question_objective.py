"""The objective of a fine-tuning: the questions of a task to learn, and those that choose the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.profiling._peak import Peak
from pytest_lmeval.records._measured import Cost, Record, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.scoring._encoded import EncodedQuestion
from pytest_lmeval.training._plan import Plan
from pytest_lmeval.training._questions import batches_of, held_out_losses, losses
from pytest_lmeval.training._result import POINTS, averaged, costs_of, micro_batch
from pytest_lmeval.training._run import Run


@dataclass(frozen=True)
class QuestionObjective:
    """An `Objective`."""

    plan: Plan
    questions: Sequence[EncodedQuestion]
    held_out: Sequence[EncodedQuestion]

    unit, item, holds_out = 1, "question", True

    @property
    def batch_size(self) -> int:
        return self.plan.protocol.batch_size

    @property
    def steps(self) -> int:
        return self.plan.protocol.steps or len(self.questions) // self.batch_size * (self.plan.protocol.epochs or 0)

    def batches(self, first: int = 0) -> Iterator[Any]:
        return batches_of(self.questions, self.batch_size, self.plan.protocol.seed, first)

    def loss(self, lm: Model, rows: Sequence[EncodedQuestion]) -> Tensor:
        return losses(lm, rows).mean()

    def evaluate(self, lm: Model, rows: int) -> Tensor:
        return held_out_losses(lm, self.held_out, rows)

    def refuse(self, run: Run) -> None:
        """Nothing: a held-out loss that rises is overfitting, and the best weights are kept."""

    def record(self, run: Run, trained: Model, peak: Peak) -> Record:
        rows = [self.batch_size * step for step in range(1, run.step + 1)]
        ends, means = averaged(run.losses, -(-run.step // POINTS))
        held_out = {step: float(nats.mean()) for step, nats in run.evaluations.items()}
        return Record(
            kind="finetune",
            subject=run.text,
            lm=facts(trained),
            settings=self.plan.settings,
            details={"steps": run.step, "best_step": run.best_step, **micro_batch(run, self.plan.protocol)},
            metrics={
                "nll": value_of("nll", held_out[run.best_step], n=len(self.held_out)),
                **costs_of(run, trained, peak),
            },
            cost=Cost(seconds=run.seconds, tokens=self._tokens(run.step), peak_bytes=peak.bytes),
            series={
                "learning_curve": Series([float(rows[end - 1]) for end in ends], means, "questions", "nats", "Learning curves"),
                "held_out_loss": Series(
                    [float(step * self.batch_size) for step in held_out],
                    [*held_out.values()],
                    "questions",
                    "nats",
                    "Held-out loss",
                ),
            },
        )

    def _tokens(self, steps: int) -> int:
        """Tokens that were read in so many steps, without padding."""
        batches = zip(range(steps), self.batches(), strict=False)
        return sum(len(request.read) for _, batch in batches for one in batch for request in one.requests)


def hash_of(questions: Sequence[EncodedQuestion]) -> str:
    """A hash of the token ids of questions, and of what is right."""
    digest = hashlib.sha256()
    for one in questions:
        right = getattr(one.question, "answers", ())
        digest.update(f"{right}{[(request.context_len, len(request.ids)) for request in one.requests]}".encode())
        for request in one.requests:
            digest.update(request.ids.tobytes())
    return digest.hexdigest()[:16]
