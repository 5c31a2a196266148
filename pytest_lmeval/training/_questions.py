"""Learn the answers to the questions of a task: what is read of its rows, and the loss of a batch of questions.

head, verbaliser, choice   cross-entropy among the choices, each with the log-likelihood of its tokens after the prompt
answer                     the loss of the tokens of the right answer alone, with what ends it, in nats per token
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pytest_lmeval.engine import Request
from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._model import Model
from pytest_lmeval.scoring._encoded import EncodedQuestion
from pytest_lmeval.scoring._fewshot import identity_of, question_of, rows_of
from pytest_lmeval.scoring._requests import Encoder
from pytest_lmeval.tasks._questions import Choices, Generate, Question, Requests
from pytest_lmeval.tasks._task import Task


@dataclass(frozen=True)
class TrainingRow:
    """A row to learn from: its question, and where it stands."""

    id: str
    number: int
    question: Question


def training_rows(task: Task, source: Any, limit: int | None, data_dir: str | Path | None) -> list[TrainingRow]:
    """The questions of the first rows of a source. Raises TaskError, with the row, for one without a right answer to learn."""
    found: list[TrainingRow] = []
    for number, (where, row) in enumerate(rows_of(source, data_dir, "training row")):
        question = question_of(task, row, where)
        if question is None:
            continue
        if isinstance(question, Requests):
            raise TaskError(
                f"{task} is scored by another harness, whose rows do not say which text is right. Fine-tune on a task of this "
                "package, or on a Task of your own."
            )
        if isinstance(question, Generate) and not any(question.answers):
            raise TaskError(
                f"{task}, {where}: it has no right answer (answers={question.answers!r}), so nothing is to be learned."
            )
        found.append(TrainingRow(identity_of(task, row, where), number, question))
        if len(found) == limit:
            break
    return found


def split(rows: Sequence[TrainingRow], share: float) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Rows to train on, and at least this share of them to choose the weights by: the same for every model and seed.

    Whole groups of rows (that share a passage) are drawn by their hash until there are enough.
    """
    groups: dict[str, list[TrainingRow]] = {}
    for row in rows:
        groups.setdefault(row.question.group or f"{row.id} {row.number}", []).append(row)
    chosen: set[int] = set()
    for name in sorted(groups, key=lambda name: hashlib.sha256(f"held out {name}".encode(errors="surrogatepass")).digest()):
        if len(chosen) >= share * len(rows):
            break
        chosen |= {row.number for row in groups[name]}
    return [row for row in rows if row.number not in chosen], [row for row in rows if row.number in chosen]


def encoded(lm: Model, task: Task, rows: Sequence[TrainingRow]) -> list[EncodedQuestion]:
    """The questions as token ids; an answer to be generated as its one choice, with what ends it."""
    encoder = Encoder(lm, replace(task, name=f"{task.name}[train]"))
    found = []
    for row in rows:
        question, end = row.question, tuple[int, ...]()
        if isinstance(question, Generate):
            text, end = _end(lm, question)
            target = next(f" {answer}" for answer in question.answers if answer)
            question = Choices(question.prompt, (target + text,), 0, question.group, answer_prefix=question.answer_prefix)
        one = encoder.encode(question, task.description, id=row.id, number=row.number)
        if end:
            one = replace(one, requests=[Request(np.append(each.ids, end), each.context_len) for each in one.requests])
        found.append(one)
    return found


def _end(lm: Model, question: Generate) -> tuple[str, tuple[int, ...]]:
    """What ends an answer: the text of its first stop, or the id of a special token that is one, or ends every answer."""
    tokens: dict[int, str] = getattr(lm.tokenizer, "special", {})
    special = {text: token for token, text in tokens.items()}
    if question.stop and question.stop[0] not in special:
        return question.stop[0], ()
    end = special[question.stop[0]] if question.stop else getattr(lm.tokenizer, "eos", None)
    return "", () if end is None else (end,)


def batches_of(questions: Sequence[EncodedQuestion], batch_size: int, seed: int, first: int = 0) -> Iterator[Any]:
    """The batches of all updates from `first` on, without end. Each epoch has each question once, in an order drawn from
    (seed, epoch), without those that fill no batch."""
    steps = len(questions) // batch_size
    for epoch in itertools.count(first // steps):
        order = np.random.default_rng([seed, epoch]).permutation(len(questions))[: steps * batch_size]
        for batch in order.reshape(steps, batch_size)[max(0, first - epoch * steps) :]:
            yield [questions[index] for index in batch]


def losses(lm: Model, questions: Sequence[EncodedQuestion]) -> Tensor:
    """The loss of each question [n], in nats: of the right choice among all, or per token of the only one.

    Each distinct beginning is read once, as a row of one padded batch; a causal model does not see what follows.
    """
    requests = [request for one in questions for request in one.requests]
    reads = {request.read.tobytes(): request.read for request in requests}
    index = {key: at for at, key in enumerate(reads)}
    longest = max(map(len, reads.values()))
    first = min(request.context_len for request in requests) - 1  # the first position whose logits are wanted
    ids = np.zeros((len(reads), longest), dtype=np.int64)
    for at, read in enumerate(reads.values()):
        ids[at, : len(read)] = read
    logits, _ = lm.step(torch.from_numpy(ids).to(lm.device), keep=longest - first)
    asked = np.array([request.asked for request in requests])
    at_row = np.repeat([index[request.read.tobytes()] for request in requests], asked)
    at_position = np.concatenate([np.arange(request.context_len - 1, len(request.ids) - 1) for request in requests]) - first
    targets = np.concatenate([request.ids[request.context_len :] for request in requests])
    owners = np.repeat(np.arange(len(requests)), asked)
    row, position, target, owner = (torch.from_numpy(one).to(lm.device) for one in (at_row, at_position, targets, owners))
    nats = F.cross_entropy(logits[row, position].float(), target, reduction="none")
    scores = torch.zeros(len(requests), device=nats.device).index_add(0, owner, -nats)
    found, begin = [], 0
    for one in questions:
        own = scores[begin : begin + len(one.requests)]
        if len(own) > 1 and isinstance(one.question, Choices):
            found.append(own.logsumexp(0) - own[list(one.question.answers)].logsumexp(0))
        else:
            found.append(-own[0] / asked[begin])
        begin += len(one.requests)
    return torch.stack(found)


def held_out_losses(lm: Model, questions: Sequence[EncodedQuestion], rows: int) -> Tensor:
    """The loss of each question [n] in eval mode, read `rows` at once, float64 on the CPU."""
    assert lm.module is not None
    was_training = lm.module.training
    lm.module.eval()
    try:
        with torch.no_grad():
            parts = [losses(lm, questions[at : at + rows]).double().cpu() for at in range(0, len(questions), rows)]
    finally:
        lm.module.train(was_training)
    return torch.cat(parts)
