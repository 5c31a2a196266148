"""Fine-tune a model on a task by the one protocol for all models, once for each seed, and ask each trained model the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pytest_lmeval.engine import policy_for
from pytest_lmeval.errors import ArgumentError, ProtocolError, TaskError
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models._classifier import classifier
from pytest_lmeval.models._identity import tokenizer_fingerprint
from pytest_lmeval.models._lora import linear_layers, with_lora
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.scoring._encoded import EncodedQuestion
from pytest_lmeval.scoring._fewshot import question_of, rows_of
from pytest_lmeval.tasks._questions import Choices, Generate
from pytest_lmeval.tasks._task import Task
from pytest_lmeval.training._finetune_result import FinetuneResult, Seed, result_of
from pytest_lmeval.training._loop import follow
from pytest_lmeval.training._plan import Plan, refuse_untrainable
from pytest_lmeval.training._protocol import Protocol
from pytest_lmeval.training._question_objective import QuestionObjective, hash_of
from pytest_lmeval.training._questions import TrainingRow, encoded, split, training_rows
from pytest_lmeval.training._weights import copy_of

HEAD, VERBALISER, CHOICE, ANSWER = "head on the last token", "verbaliser", "choice by likelihood", "answer tokens"
DEFAULTS: dict[str, Any] = {"lr": 1e-4, "seq_len": 512}
EPOCHS = 3  # if neither steps nor epochs are given
EVALUATIONS = 2  # an epoch, if eval_every is not given
OF_TEXTS = ("tokens", "eval_tokens")  # settings of a protocol that a fine-tuning does not have
Bars: TypeAlias = "Callable[[str, str], AbstractContextManager[Any]]"


@dataclass(frozen=True)
class Finetuning:
    """How a model is fine-tuned, beside the `Protocol`. Raises ArgumentError for values that cannot be.

    protocol     the settings that are given; the others are those of `Protocol`, but for lr=1e-4, seq_len=512 (the most tokens
                 of a question, cut on its left beyond), epochs=3 and two evaluations an epoch
    seeds        of the order of questions, dropout, and the weights that are added
    classes      where all questions have the same choices: "head", a linear layer over the last hidden state of the last token,
                 or "verbaliser", the log-likelihoods of the choices; None: a head, unless the task says that they are letters
    method       "full": all weights; "lora": adapters of this `rank` in all linear layers
    held_out     the share of the training rows that chooses the weights
    train_limit  learn from the first so many questions
    """

    protocol: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    classes: Literal["head", "verbaliser"] | None = None
    method: Literal["full", "lora"] = "full"
    rank: int = 8
    held_out: float = 0.1
    train_limit: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("classes", (None, "head", "verbaliser")), ("method", ("full", "lora"))):
            if (value := getattr(self, name)) not in allowed:
                raise ArgumentError(f"{name}={value!r}; {name} is {' or '.join(map(repr, allowed))}.")
        whole = [seed for seed in self.seeds if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 31]
        if not self.seeds or len(set(whole)) < len(self.seeds):
            raise ArgumentError(
                f"the seeds are {list(self.seeds)}: at least one, different, each a whole number from 0 to 2**31 - 1. "
                "seeds=5 are 0 to 4."
            )
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ArgumentError(f"rank={self.rank!r}; the rank of an adapter is a whole number from 1 up.")
        share = self.held_out
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
            raise ArgumentError(
                f"held_out={share!r}; it is a share of the training rows, above 0 and below 1: without held-out rows, nothing "
                "says which weights are best, and the test may not."
            )
        if self.train_limit is not None and (not isinstance(self.train_limit, int) or self.train_limit < 1):
            raise ArgumentError(f"train_limit={self.train_limit!r}; a number of questions is a whole number from 1 up.")
        if wrong := [name for name in (*OF_TEXTS, "seed") if name in self.protocol]:
            instead = "seeds" if wrong[0] == "seed" else "train_limit, limit and held_out"
            raise ProtocolError(f"a fine-tuning has no setting {wrong[0]}: it learns from questions. It has {instead}.")
        self.protocol_for(0, None)

    def protocol_for(self, seed: int, questions: int | None) -> Protocol:
        """The protocol of a seed, for so many questions to learn from."""
        given = {**DEFAULTS, **self.protocol}
        if given.get("steps") is None and given.get("epochs") is None:
            given["epochs"] = EPOCHS
        found = Protocol.of(**given, seed=seed)
        if questions is None or "eval_every" in given:
            return found
        return replace(found, eval_every=max(1, questions // found.batch_size // EVALUATIONS))


def measure_finetune(
    lm: Model,
    task: Task,
    how: Finetuning,
    *,
    train: Any = None,
    limit: int | None = None,
    batch_size: int = 8,
    certificate: Certificate | None = None,
    data_dir: str | Path | None = None,
    folder: str | Path | None = None,
    kept: Callable[[Model], Path | None] = lambda lm: None,
    examples: Path | None = None,
    bars: Bars = lambda title, unit: nullcontext(),
    fresh: bool = False,
) -> FinetuneResult:
    """Fine-tune copies of a model, which itself does not change, and ask each the task once.

    train        rows to learn from, in place of those of the task
    limit        ask the first `limit` questions only
    batch_size   rows in which the trained model is asked
    certificate  of the model: how the trained one, with the same code, may be read; the audit of each task reads some again
    folder       keep weights, records and resume points in folder/models/KEY, one for each seed; None: write nothing
    kept         the file in which the answers of a trained model are kept
    bars         (title, unit) -> a context manager of the callback that shows progress

    Raises SpecError for a model that cannot be fine-tuned so, TaskError with the row for one that cannot be learned or asked.
    """
    if task.prepare is not None:
        raise TaskError(
            f"{task} is prepared and scored by another harness. Fine-tune on a Task of this package, or of your own."
        )
    refuse_untrainable(lm, Protocol.of(**{**DEFAULTS, **how.protocol}), frozen=how.method == "lora")
    rows = _rows(task, train, how, data_dir)
    notes = _shared_questions(task, rows, limit, data_dir)
    learned, chosen_by = _parts(task, rows, how)
    kind = _kind(task, rows, how.classes)
    classes = rows[0].question.choices if kind == HEAD and isinstance(rows[0].question, Choices) else ()
    seq_len = how.protocol_for(0, None).seq_len
    reading = replace(lm, context_length=min(seq_len, lm.limit or seq_len), classes=classes)
    read = encoded(reading, task, learned), encoded(reading, task, chosen_by)
    room = max((row.question.max_tokens for row in rows if isinstance(row.question, Generate)), default=0)
    layers, base = (linear_layers(lm), _frozen(lm)) if how.method == "lora" else ([], lm)
    seeds: list[Seed] = []
    first: Model | None = None
    for seed in how.seeds:
        changed = _changed(base, classes, layers, how.rank, seed)
        plan = _plan(lm, changed, task, kind, how, how.protocol_for(seed, len(learned)), *read)
        with bars(f"{lm.spec} learns {task} with seed {seed}", "questions") as show:
            trained = follow(plan, partial(QuestionObjective, plan, *read), folder, show, fresh=fresh)
        asked = replace(trained.lm, context_length=(reading.context_length or 0) + room)
        policy = policy_for(asked, certificate, batch_size=batch_size)
        with bars(f"{asked.spec} answers {task}", "questions") as show:
            result = measure_task(asked, task, policy=policy, limit=limit, data_dir=data_dir, kept=kept(asked), progress=show)
        seeds.append(Seed(seed, trained.record, result, trained.cached, trained.resumed_at))
        first = first or asked
    assert first is not None
    counts = {
        "kind": kind,
        "learned_from": len(learned),
        "chosen_by": len(chosen_by),
        "truncated_in_training": sum(one.truncated > 0 for part in read for one in part),
        **({"layers": layers} if layers else {}),
    }
    return result_of(first, lm.spec, task, seeds, rows, counts, notes, examples)


def _rows(task: Task, train: Any, how: Finetuning, data_dir: str | Path | None) -> list[TrainingRow]:
    """The questions to learn from and to choose the weights by."""
    source = train if train is not None else task.train if task.train is not None else task.shots
    if isinstance(source, list | tuple) and not source:
        raise TaskError(f"{task} has no rows to train on. Give them: Task(..., train=ROWS), or train=ROWS here.")
    rows = training_rows(task, replace(task, train=source).train, how.train_limit, data_dir)
    if not rows:
        raise TaskError(f"{task}: none of its training rows is a question, so there is nothing to learn.")
    return rows


def _parts(task: Task, rows: Sequence[TrainingRow], how: Finetuning) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """The rows to learn from, and those that choose the weights."""
    learned, chosen_by = split(rows, how.held_out)
    size = how.protocol_for(0, None).batch_size
    if len(learned) < size:
        raise TaskError(
            f"{task} has {len(rows)} training questions, of which {len(chosen_by)} choose the weights, and a batch has {size}. "
            "Give more rows, or take a smaller batch_size or held_out."
        )
    return learned, chosen_by


def _kind(task: Task, rows: Sequence[TrainingRow], classes: str | None) -> str:
    """How the answers are learned. Raises TaskError for answers of several kinds, and for classes where there are none."""
    questions = [row.question for row in rows]
    generated = [isinstance(one, Generate) for one in questions]
    if all(generated):
        if classes is not None:
            raise TaskError(f"{task} has answers in words, and classes={classes!r} is for choices. Leave it out.")
        return ANSWER
    if any(generated):
        row = rows[generated.index(True)].number
        raise TaskError(f"{task}: most training rows have choices, and row {row} is answered in words. Fine-tune on one kind.")
    chosen = [one for one in questions if isinstance(one, Choices)]
    first = chosen[0].choices
    other = next((row for row, one in zip(rows, chosen, strict=True) if one.choices != first or len(one.answers) > 1), None)
    if other is not None or len(first) < 2:
        if classes is not None:
            why = f"row {other.number} has others than the first" if other is not None else f"there is one, {first[0]!r}"
            raise TaskError(
                f"{task} has no classes: its choices are not the same for all ({why}). Leave out classes={classes!r}."
            )
        return CHOICE
    if len(labels := {one.answers[0] for one in chosen}) == 1:
        only = first[labels.pop()]
        raise TaskError(f"{task}: all {len(rows)} training rows have the label {only!r}, so there is nothing to tell apart.")
    if classes is None:
        return HEAD if task.classes else CHOICE
    return HEAD if classes == "head" else VERBALISER


def _shared_questions(task: Task, rows: Sequence[TrainingRow], limit: int | None, data_dir: str | Path | None) -> list[str]:
    """A note on questions of the test that are learned, too. Raises TaskError if all are, and for a row that cannot be asked,
    before anything is trained."""

    def texts(question: Any) -> tuple[Any, ...]:
        return question.prompt, getattr(question, "choices", ())

    learned, shared, total = {texts(row.question) for row in rows}, 0, 0
    for where, row in rows_of(task.rows, data_dir):
        if (question := question_of(task, row, where)) is None:
            continue
        total += 1
        shared += texts(question) in learned
        if total == limit:
            break
    if total and shared == total:
        raise TaskError(
            f"all {total} questions of {task} stand in its training rows, so it would be asked what it learned by heart. Train "
            "on another split: train=ROWS."
        )
    return [f"{shared:,} of {total:,} questions stand in the training rows, too"] if shared else []


def _frozen(lm: Model) -> Model:
    """A copy of the model whose parameters are not trained."""
    found = copy_of(lm)
    assert found.module is not None
    found.module.requires_grad_(False)
    return found


def _changed(base: Model, classes: Sequence[str], layers: Sequence[str], rank: int, seed: int) -> Model:
    """The model that is trained with a seed: with a head for `classes`, and with adapters in `layers`."""
    if not classes and not layers:
        return base
    found = copy_of(base, partial=bool(layers))
    found = classifier(found, classes, seed) if classes else found
    return with_lora(found, layers, rank, seed) if layers else found


def _plan(
    lm: Model,
    changed: Model,
    task: Task,
    kind: str,
    how: Finetuning,
    protocol: Protocol,
    learned: Sequence[EncodedQuestion],
    chosen_by: Sequence[EncodedQuestion],
) -> Plan:
    names = {"trained_from": lm.spec, "task": task.name}
    decided_by = {
        "kind": kind,
        "method": how.method,
        **({"rank": how.rank} if how.method == "lora" else {}),
        "questions": hash_of(learned),
        "held_out_questions": hash_of(chosen_by),
        "tokenizer": tokenizer_fingerprint(lm),
    }
    spec = f"{lm.spec} fine-tuned on {task}, seed {protocol.seed}"
    return Plan(changed, task.name, protocol, decided_by, names, spec, partial=how.method == "lora")
