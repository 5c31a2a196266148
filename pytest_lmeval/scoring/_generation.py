"""Answers in the model's own words, in batches that every model can read, each judged as it comes.

Rows of a batch always stand at the same length, since that is all that a state knows: while one row is already answering,
another may still be given its prompt. A row that has ended leaves the batch. What a row says depends on neither: the choice of
a token is the likeliest one, or drawn by the row's own seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval._stream import check_vocabulary
from pytest_lmeval.errors import NotFiniteError, TaskError
from pytest_lmeval.models._model import Model, State
from pytest_lmeval.scoring._sharing import Sharing
from pytest_lmeval.scoring._tree import Node, Request
from pytest_lmeval.tasks._questions import Generate, Judge

Said: TypeAlias = "Iterator[tuple[Tensor, list[Answer]]]"


@dataclass(eq=False)
class Answer:
    """One row's answer, in the making.

    given   the prompt that is not yet read
    ids     generated so far
    text    of these, cut before the stop that ended it
    judged  what the judge said, as soon as it said something
    read    tokens that were read for it
    why     stop, end (the model's own), judged, or length; empty while it goes on
    """

    name: str
    question: Generate
    draws: np.random.Generator
    given: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    judged: bool | None = None
    read: int = 0
    why: str = ""


def generate(
    sharing: Sharing,
    prompts: Sequence[Request],
    questions: Sequence[Generate],
    names: Sequence[str],
    *,
    judge: Judge | None = None,
    seed: int = 0,
) -> list[Answer]:
    """The answer of each question, in their order.

    prompts  whose ids are given whole
    names    of the rows: what their draws depend on, beside the seed, and what an error names

    Raises TaskError for a tokenizer that cannot turn ids into text, NotFiniteError for logits that are not finite.
    """
    lm = sharing.lm
    if not hasattr(lm.tokenizer, "decode"):
        raise TaskError(
            f"the tokenizer of {lm.spec} has no decode(ids) -> text, so what the model says cannot be read. Give it that "
            "method."
        )
    for prompt in prompts:
        check_vocabulary(prompt.ids, 0, lm)
    answers = [Answer(name, question, _draws(seed, name)) for question, name in zip(questions, names, strict=True)]

    def listen(said: Said) -> None:
        for logits, rows in said:
            _check_finite(logits, rows, lm)
            for token, row in zip(_chosen(logits, rows), rows, strict=True):
                _take(row, token, lm.tokenizer, judge)

    if not sharing.carry:
        for row, prompt in zip(answers, prompts, strict=True):
            row.given = prompt.ids.tolist()
        longest_first = sorted(answers, key=lambda row: -len(row.given))
        for begin in range(0, len(answers), sharing.batch_size):
            listen(_read_again(sharing, longest_first[begin : begin + sharing.batch_size]))
        return answers

    def end(state: State, batch: list[tuple[Node, int]]) -> None:
        rows = [answers[node.owner] for node, _ in batch]
        for row, (node, _) in zip(rows, batch, strict=True):
            row.given = [*map(int, node.ids[:-1]), int(prompts[node.owner].ids[-1])]
        listen(_carried(sharing, state, rows, [row for _, row in batch]))

    # hold back the last prompt token, the first that generation reads; append a unique sentinel, so that equal prompts stay
    # separate
    marked = [
        Request(np.concatenate([prompt.ids[:-1], [-1 - number, 0]]), len(prompt.ids) + 1)
        for number, prompt in enumerate(prompts)
    ]
    scored = sharing.walk(marked, end)
    for answer, shared in zip(answers, scored, strict=True):
        answer.read += shared.read
    return answers


def _carried(sharing: Sharing, state: State, rows: list[Answer], places: list[int]) -> Said:
    """Logits [b, v] after what each row has read, and these rows, step by step, the state carried."""
    state = None if state is None else sharing.taken(state, places)
    begun = False
    while rows:
        length = 1 if begun and not sharing.share else min(len(row.given) for row in rows)
        begun = True
        ids = torch.tensor([row.given[:length] for row in rows])
        logits, state = sharing.step(ids, state)
        for row in rows:
            row.given = row.given[length:]
            row.read += length
        yield _of_open(logits, rows)
        for row in rows:
            if not row.given and not row.why:
                row.given = [row.ids[-1]]
        staying = [place for place, row in enumerate(rows) if not row.why]
        if len(staying) < len(rows):
            rows = [rows[place] for place in staying]
            state = sharing.taken(state, staying) if rows else None


def _of_open(logits: Tensor, rows: list[Answer]) -> tuple[Tensor, list[Answer]]:
    """The last logits [b, v] of the rows whose prompt is read."""
    open_ = [place for place, row in enumerate(rows) if not row.given]
    return logits[open_, -1], [rows[place] for place in open_]


def _read_again(sharing: Sharing, rows: list[Answer]) -> Said:
    """The same for a model whose state cannot be gone on from token by token: everything is read anew for each."""
    while rows:
        texts = [row.given + row.ids for row in rows]
        width, shortest = max(map(len, texts)), min(map(len, texts))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for place, text in enumerate(texts):
            ids[place, : len(text)] = torch.tensor(text)
        logits, _ = sharing.step(ids, None, keep=width - shortest + 1)
        last = torch.tensor([len(text) - shortest for text in texts], device=logits.device)
        for row, text in zip(rows, texts, strict=True):
            row.read += len(text)
        yield logits[torch.arange(len(rows), device=logits.device), last], rows
        rows = [row for row in rows if not row.why]


def _check_finite(logits: Tensor, rows: list[Answer], lm: Model) -> None:
    """Masked-out logits may be minus infinity; all of them, or any other that is not finite, leave nothing to choose from."""
    wrong = (torch.isnan(logits) | (logits == torch.inf)).any(1) | torch.isneginf(logits).all(1)
    for place in wrong.nonzero().flatten().tolist():
        raise NotFiniteError(
            f"{lm.spec} gave logits that are not finite after {len(rows[place].ids)} generated token(s) of row "
            f"{rows[place].name}, in {lm.dtype} on {lm.device}. Nothing can be chosen from them; what was finished before "
            "is kept."
        )


def _take(row: Answer, token: int, tokenizer: Any, judge: Judge | None) -> None:
    """One more token for a row, and whether that ends it."""
    if token in getattr(tokenizer, "ends", (getattr(tokenizer, "eos", None),)):
        row.why = "end"
    else:
        row.ids.append(token)
        row.text = tokenizer.decode(row.ids)
        stops = [place for stop in row.question.stop if (place := row.text.find(stop)) >= 0]
        if stops:
            row.text, row.why = row.text[: min(stops)], "stop"
        elif len(row.ids) >= row.question.max_tokens:
            row.why = "length"
    if judge is not None and (verdict := _judged(judge, row)) is not None:
        row.judged, row.why = verdict, row.why or "judged"


def _judged(judge: Judge, row: Answer) -> bool | None:
    try:
        verdict = judge(row.text)
    except Exception as error:
        raise TaskError(f"the judge raised {type(error).__name__}: {error}, on row {row.name}: {row.text[-200:]!r}.") from error
    if verdict is not None and not isinstance(verdict, bool | np.bool_):
        raise TaskError(f"the judge said {verdict!r} of row {row.name}: it says True, False, or None while it is not certain.")
    return None if verdict is None else bool(verdict)


def _chosen(logits: Tensor, rows: list[Answer]) -> list[int]:
    """A token for each row [b]: the likeliest, or one that is drawn by the row's own random numbers."""
    likeliest: list[int] = logits.argmax(1).tolist()
    return [
        _drawn(said, row) if row.question.temperature else best for said, row, best in zip(logits, rows, likeliest, strict=True)
    ]


def _drawn(logits: Tensor, row: Answer) -> int:
    chances = torch.softmax(logits.double().cpu() / row.question.temperature, 0).cumsum(0).numpy()
    return int(np.searchsorted(chances, row.draws.random() * chances[-1], side="right").clip(max=len(chances) - 1))


def _draws(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one row."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest(), np.uint32))
