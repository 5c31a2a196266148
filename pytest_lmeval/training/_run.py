"""A training as it stands between two steps: what it needs to go on, and nothing that follows from (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lmeval.models._identity import architecture_of
from pytest_lmeval.models._model import Model
from pytest_lmeval.training._plan import Plan
from pytest_lmeval.training._protocol import Protocol
from pytest_lmeval.training._trainee import copy_of
from pytest_lmeval.training._weights import fill, snapshot

KEPT = ("losses", "norms", "evaluations", "best_step", "best", "seconds")


@dataclass
class Run:
    """lm, optimizer   the copy that is trained, and its optimizer
    text            what it is trained on, for people
    spec            how the trained model is to be called; by default after what was done
    losses, norms   of each step so far: the mean loss of its tokens (nats), the norm of all gradients before it was clipped
    evaluations     steps done -> nats of each held-out crop, [crops] float64
    best_step       steps done at the evaluation with the lowest mean, or at the end where there is no held-out text
    best            the weights at that time, on the CPU
    seconds         spent in steps, those before an interruption included; evaluating and saving are left out
    resumed_at      the step that it went on from
    """

    lm: Model
    optimizer: torch.optim.Optimizer
    text: str
    spec: str | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: dict[int, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    resumed_at: int = 0

    def __post_init__(self) -> None:
        self._before = architecture_of(self.lm)

    @property
    def architecture(self) -> dict[str, str | None]:
        """Classes and settings of the model's parts; None for what training changes, a counter for example."""
        return {name: value if self._before.get(name) == value else None for name, value in architecture_of(self.lm).items()}

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def module(self) -> nn.Module:
        assert self.lm.module is not None
        return self.lm.module

    @property
    def best_spec(self) -> str:
        """How a model with the best weights is called."""
        return self.spec or f"{self.lm.spec}, trained {self.best_step} steps on {self.text}"

    def add_step(self, loss: float, norm: float, seconds: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.seconds += seconds

    def keep_as_best(self) -> None:
        self.best_step, self.best = self.step, snapshot(self.lm)

    def add_evaluation(self, nats: Tensor) -> None:
        """Note an evaluation, and the weights if no earlier one was as good."""
        if not self.evaluations or nats.mean() < self.evaluations[self.best_step].mean():
            self.keep_as_best()
        self.evaluations[self.step] = nats

    def to_point(self) -> dict[str, Any]:
        """Tensors and plain values, which `torch.load` reads without running anything."""
        now = {"weights": snapshot(self.lm), "optimizer": self.optimizer.state_dict()}
        return {**now, **{name: getattr(self, name) for name in KEPT}}


def new_run(plan: Plan) -> Run:
    """Before the first step, with a copy of the model."""
    trainee = copy_of(plan.lm)
    assert trainee.module is not None
    return Run(trainee, adamw(trainee.module, plan.protocol), str(plan.text), plan.spec)


def resume(run: Run, point: dict[str, Any]) -> Run:
    """Bring a new run to where `to_point` was taken. Raises whatever a point of something else leads to."""
    fill(run.lm, point["weights"], "the saved point")
    run.optimizer.load_state_dict(point["optimizer"])
    for name in KEPT:
        setattr(run, name, point[name])
    run.resumed_at = run.step
    return run


def adamw(module: nn.Module, protocol: Protocol) -> torch.optim.AdamW:
    """Matrices decay; vectors and scalars (biases, gains, decay rates) do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": protocol.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=protocol.lr, betas=protocol.betas)
