"""The state of a training between two steps, and its files.

Each training has a folder, named by its key. Each file is replaced in one move, so the process may be killed at any time.

    protocol.json      everything that decides the outcome: protocol, model, texts, tokenizer, version of this package
    point.pt           the point to resume from, until the training is finished
    best.safetensors   the best weights so far
    record.json        the record, once the training is finished
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pytest_lmeval.errors import UnreadableError
from pytest_lmeval.models._identity import architecture_of
from pytest_lmeval.models._model import Model
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import Checkpoints, warn
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._replacing import inside, replacing
from pytest_lmeval.training._plan import Plan
from pytest_lmeval.training._weights import copy_of, fill, load_weights, snapshot

POINT = "point"
KEPT = ("losses", "norms", "evaluations", "best_step", "best", "seconds", "micro_batch")


@dataclass
class Run:
    """The state of a training after `step` steps.

    lm, optimizer   the copy that is trained, and its optimizer
    text            name of the training text, or of the task
    spec            name of the trained model; None: one that says what was done
    partial         frozen parameters are not saved
    losses, norms   per step so far: mean loss of its tokens (nats), norm of all gradients before clipping
    evaluations     number of steps -> nats of each held-out crop, [crops] float64
    best_step       number of steps before the evaluation with the lowest mean; all steps if there is no held-out text
    best            the weights at that time, on the CPU
    seconds         spent in steps, also before an interruption; without evaluating and saving
    micro_batch     rows of a batch that are read at once, fewer than all since memory ran out; None: all
    resumed_at      number of steps at the point that the run resumed from
    """

    lm: Model
    optimizer: torch.optim.Optimizer
    text: str
    spec: str | None = None
    partial: bool = False
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: dict[int, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    micro_batch: int | None = None
    resumed_at: int = 0

    def __post_init__(self) -> None:
        self._before = architecture_of(self.lm)

    @property
    def architecture(self) -> dict[str, str | None]:
        """Classes and settings of the model's parts; None for what training changes, such as a counter."""
        return {name: value if self._before.get(name) == value else None for name, value in architecture_of(self.lm).items()}

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def module(self) -> nn.Module:
        assert self.lm.module is not None
        return self.lm.module

    @property
    def versions(self) -> list[int]:
        """Counts the changes of each buffer that holds no state, such as running means."""
        return [tensor._version for name, tensor in self.module.named_buffers() if name not in self.lm.mutable_buffers]

    @property
    def best_spec(self) -> str:
        """The name of the model with the best weights."""
        return self.spec or f"{self.lm.spec}, trained {self.best_step} steps on {self.text}"

    def keep_as_best(self) -> None:
        self.best_step, self.best = self.step, snapshot(self.lm, partial=self.partial)

    def add_evaluation(self, nats: Tensor) -> None:
        """Record an evaluation, and keep the weights if it is the best so far."""
        if not self.evaluations or nats.mean() < self.evaluations[self.best_step].mean():
            self.keep_as_best()
        self.evaluations[self.step] = nats


def new_run(plan: Plan) -> Run:
    """A run before its first step: a copy of the model, and AdamW that decays only matrices (not biases, gains, rates)."""
    lm, protocol = copy_of(plan.lm, partial=plan.partial), plan.protocol
    assert lm.module is not None
    trained = [parameter for parameter in lm.module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": protocol.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=protocol.lr, betas=protocol.betas)
    return Run(lm, optimizer, plan.subject, plan.spec, plan.partial)


@dataclass(frozen=True)
class Folder:
    """The files of one training."""

    path: Path

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    def begin(self, identity: dict[str, Any]) -> bool:
        """Write what decides the outcome. Warns if the folder cannot be written, and returns False."""
        try:
            with replacing(self.path / "protocol.json") as new:
                new.write_text(json.dumps(identity, indent=1, default=str))
        except OSError as error:
            warn(f"{self.path} cannot be written ({error.strerror or error}): nothing of this training is kept.")
            return False
        return True

    def resume(self, new: Callable[[], Run]) -> Run:
        """A new run, or one at the saved point if there is a readable one."""

        def load(file: IO[bytes]) -> Run:
            point, run = torch.load(file, map_location="cpu", weights_only=True), new()
            fill(run.lm, point["weights"], "the saved point", partial=run.partial)
            run.optimizer.load_state_dict(point["optimizer"])
            for name in KEPT:
                if getattr(run, name) is not None and type(point[name]) is not type(getattr(run, name)):
                    raise TypeError(f"{name} is a {type(point[name]).__name__}")
                setattr(run, name, point[name])
            run.resumed_at = run.step
            return run

        run: Run | None = Checkpoints(self.path).read(POINT, load)
        return run or new()

    def save(self, run: Run) -> None:
        """Save a point to resume from (tensors and plain values, which load without running code), and the best weights."""
        point = {"weights": snapshot(run.lm, partial=run.partial), "optimizer": run.optimizer.state_dict()}
        point |= {name: getattr(run, name) for name in KEPT}
        Checkpoints(self.path).write(POINT, lambda file: torch.save(point, file))
        self.save_best(run)

    def save_best(self, run: Run) -> None:
        if run.best:
            about = {"spec": run.best_spec, "step": str(run.best_step), "architecture": json.dumps(run.architecture)}
            with replacing(self.best) as new:
                save_file(run.best, new, metadata={"key": self.path.name, **about})

    def finish(self, run: Run, record: Record) -> None:
        """Write the best weights, and the record as the last file: if it exists, all do. Warns if they cannot be written."""
        try:
            self.save_best(run)
            with replacing(self.path / "record.json") as new:
                new.write_text(json.dumps({"sha256": _digest(self.best), "record": schema.to_plain(record)}, allow_nan=False))
        except (OSError, SafetensorError) as error:
            warn(f"{self.path} cannot be written ({error}): the trained model is not kept, and the next run trains it again.")
            return
        Checkpoints(self.path).drop(POINT)

    def finished(self, lm: Model, *, partial: bool = False) -> tuple[Model, Record] | None:
        """The trained model and its record if both are whole; warns of a broken file.

        Raises SpecError if the weights are those of another model.
        """
        file = self.path / "record.json"
        try:
            written = json.loads(inside(self.path, file.name).read_text())
            record, digest = schema.convert(written["record"], Record), written["sha256"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            warn(f"{file} is broken ({type(error).__name__}: {error}); the model is trained anew.")
            return None
        try:
            trained = load_weights(lm, inside(self.path, self.best.name), partial=partial)
            if _digest(self.best) != digest:
                raise UnreadableError(f"{self.best} holds other weights than record.json beside it describes.")
        except (OSError, UnreadableError) as error:
            warn(f"{error} The model is trained anew.")
            return None
        return trained, record


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
