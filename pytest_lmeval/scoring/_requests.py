"""Encode questions as token ids for the engine.

Prompt and choice are tokenized together, blanks at the end of the prompt as part of the choice. If a token spans the boundary,
scoring begins earlier, where all choices still have the tokens of the prompt alone: the question counts as retokenized.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pytest_lmeval.engine._tree import Request, common_prefix_len
from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._identity import fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._source_code import code_digest
from pytest_lmeval.tasks._questions import Choices, Question, Task

Truncate = Literal["left", "refuse"]


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as the model reads it.

    prompt    the whole text before the answer
    key       hash of everything that decides the answer
    requests  one for each choice; the prompt alone if the answer is generated
    """

    id: str
    number: int
    question: Question
    prompt: str
    key: str
    requests: list[Request]
    truncated: int = 0
    retokenized: bool = False


@dataclass(frozen=True)
class Encoder:
    """Encodes the questions of a task for a model. Raises TaskError, with the row, for what cannot be scored.

    truncate  drop tokens on the "left" that do not fit the model's context, or "refuse" the question
    """

    lm: Model
    task: Task
    truncate: Truncate = "left"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.truncate not in ("left", "refuse"):
            raise TaskError(f"truncate={self.truncate!r}: what does not fit is cut on the 'left', or an error: 'refuse'.")
        if self.lm.codebooks is not None or self.lm.tokenizer is None:
            what = "reads frames of codes" if self.lm.codebooks is not None else "has no tokenizer"
            raise TaskError(f"{self.lm.spec} {what}, so it cannot be asked {self.task}. Give it an attribute `tokenizer`.")

    def encode(self, question: Question, before: str, *, id: str, number: int) -> EncodedQuestion:  # noqa: A002 - its keyword
        """`before` is the text before the prompt: description and few-shot examples."""
        where = f"{self.task}, row {number} ({id})"
        prompt = before + question.prompt
        if isinstance(question, Choices):
            (requests, retokenized), room = self._choices(prompt, question.choices, where), 0
        else:
            requests, retokenized, room = [self._prompt(prompt, where)], False, question.max_tokens
        fitted = [self._fitted(request, room, where) for request in requests]
        truncated = max(len(whole.ids) - len(short.ids) for whole, short in zip(requests, fitted, strict=True))
        decisive = "|".join(map(repr, [*self._of_all_answers, question, prompt]))
        key = hashlib.sha256(decisive.encode(errors="surrogatepass")).hexdigest()[:16]
        return EncodedQuestion(id, number, question, prompt, key, fitted, truncated, retokenized)

    @functools.cached_property
    def _of_all_answers(self) -> list[Any]:
        """Everything that decides answers beside the question; a judge does, since it ends them. Cached: the fingerprint reads
        all weights."""
        judge = None if self.task.judge is None else code_digest([self.task.judge]).hex()
        ends = getattr(self.lm.tokenizer, "ends", None)  # of a transformers model: from its generation config
        return [fingerprint(self.lm), tokenizer_fingerprint(self.lm), self.lm.dtype, self.lm.limit, ends, self.seed, judge]

    def _choices(self, prompt: str, choices: tuple[str, ...], where: str) -> tuple[list[Request], bool]:
        bare = prompt.rstrip()
        blanks, alone = prompt[len(bare) :], self._ids(bare)
        prefix = self._prefix(alone)
        together = [self._ids(prompt + choice) if bare else self._ids(blanks + choice) for choice in choices]
        boundary = min(common_prefix_len(alone, ids) for ids in together)
        if not boundary + len(prefix):
            raise TaskError(
                f"{where}: nothing stands before the first token of its choices, so that token cannot be scored. The prompt is "
                "empty (or merges with the choices), and the tokenizer has no beginning-of-sequence token."
            )
        for choice, ids in zip(choices, together, strict=True):
            if len(ids) <= boundary:
                raise TaskError(f"{where}: the choice {choice!r} is empty after tokenizing: it would always win.")
        context_len = len(prefix) + boundary
        return [Request(np.concatenate([prefix, ids]), context_len) for ids in together], boundary < len(alone)

    def _prompt(self, prompt: str, where: str) -> Request:
        alone = self._ids(prompt)
        ids = np.concatenate([self._prefix(alone), alone])
        if not len(ids):
            raise TaskError(f"{where}: the prompt is empty, and the tokenizer has no beginning-of-sequence token.")
        return Request(ids, len(ids))

    def _fitted(self, request: Request, room: int, where: str) -> Request:
        """The request, truncated on the left; `room` tokens are left for a generated answer."""
        limit = self.lm.limit
        longest = None if limit is None else limit - room if room else limit + 1  # the last token of a choice is not read
        if longest is None or len(request.ids) <= longest:
            return request
        cut, answer = len(request.ids) - longest, len(request.ids) - request.context_len
        if self.truncate == "refuse" or cut >= request.context_len:
            more = f", and {room:,} to be generated" if room else ""
            alone = cut >= request.context_len and answer
            help_ = f"Its choice alone takes {answer:,}." if alone else "Take fewer shots, or generate fewer tokens."
            raise TaskError(f"{where} is {len(request.ids):,} tokens{more}; {self.lm.spec} reads {limit:,}. {help_}")
        return Request(request.ids[cut:], request.context_len - cut)

    def _prefix(self, ids: np.ndarray) -> np.ndarray:
        """The ids [p] that the tokenizer puts before a prompt of these ids, unless it begins with them."""
        tokenizer: Any = self.lm.tokenizer
        bos, eos = getattr(tokenizer, "bos", None), getattr(tokenizer, "eos", None)
        prefix = tuple(getattr(tokenizer, "prefix", () if bos is None else (bos,)))
        first = bos if bos is not None else eos
        if not len(ids) and first is not None:
            prefix = prefix or (first,)
        return np.array(() if prefix and tuple(ids[: len(prefix)]) == prefix else prefix, dtype=np.int64)

    def _ids(self, text: str) -> np.ndarray:
        assert self.lm.tokenizer is not None
        return np.asarray(self.lm.tokenizer.encode(text)[0], dtype=np.int64)
