"""From a question in words to token ids, by written rules:

- Blanks at the end of a prompt belong to what follows it.
- Prompt and choice are tokenized together, as they would be read. If a token spans the boundary between them, it moves
  to where all choices still begin as the prompt does alone, for all of them; such questions are counted.
- The ids that the tokenizer puts before a text stand before the prompt, unless it begins with them in words. An empty prompt
  is the beginning-of-sequence token.
- What does not fit the model's context is taken away on the left, also those first ids, and counted; or refused, if asked.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pytest_lmeval.engine._tree import Request, common_prefix_len
from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.tasks._questions import Choices, Question, Task

Truncate = Literal["left", "refuse"]


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as the model reads it.

    prompt    the whole text that is read before the answer
    key       hash of everything that decides the answer
    requests  one a choice; for an answer in the model's own words one that holds the prompt alone
    """

    id: str
    number: int
    question: Question
    prompt: str
    key: str
    requests: list[Request]
    truncated: int = 0
    retokenized: bool = False

    @property
    def alone(self) -> int:
        """Tokens that would be read if nothing were shared."""
        return sum(len(request.read) for request in self.requests)


@dataclass(frozen=True)
class Encoder:
    """Encodes the questions of a task for a model. Raises TaskError, with the row, for what cannot be scored."""

    lm: Model
    task: Task
    truncate: Truncate = "left"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.truncate not in ("left", "refuse"):
            raise TaskError(f"truncate={self.truncate!r}: what does not fit is cut on the 'left', or it is an error: 'refuse'.")
        if self.lm.codebooks is not None or self.lm.tokenizer is None:
            what = "reads frames of codes" if self.lm.codebooks is not None else "has no tokenizer"
            raise TaskError(f"{self.lm.spec} {what}, so it cannot be asked {self.task}. Give it an attribute `tokenizer`.")

    def encode(self, question: Question, before: str, *, id: str, number: int) -> EncodedQuestion:  # noqa: A002 - as it is called
        """`before` is what stands before the prompt: description and examples."""
        place = f"{self.task}, row {number} ({id})"
        prompt = before + question.prompt
        if isinstance(question, Choices):
            requests, moved = self._choices(prompt, question.choices, place)
        else:
            requests, moved = [self._open(prompt, place)], False
        room = 0 if isinstance(question, Choices) else question.max_tokens
        fitting = [self._fitted(request, room, place) for request in requests]
        cut = max(len(request.ids) - len(short.ids) for request, short in zip(requests, fitting, strict=True))
        key = _hash("|".join(map(repr, [*self._decides, question, prompt])))
        return EncodedQuestion(id, number, question, prompt, key, fitting, cut, moved)

    @functools.cached_property
    def _decides(self) -> list[Any]:
        """What decides all answers, beside the question: looked at once, since looking at a model's weights takes long."""
        code = getattr(self.task.judge, "__code__", None)
        judge = None if code is None else (code.co_code, code.co_consts, code.co_names)
        ends = getattr(self.lm.tokenizer, "ends", None)  # of a transformers model: from its settings for generation
        return [fingerprint(self.lm), self.lm.dtype, self.lm.limit, ends, self.seed, judge]

    def _choices(self, prompt: str, choices: tuple[str, ...], place: str) -> tuple[list[Request], bool]:
        bare = prompt.rstrip()
        blanks, alone = prompt[len(bare) :], self._ids(bare)
        prefix = self._prefix(alone)
        together = [self._ids(prompt + choice) if bare else self._ids(blanks + choice) for choice in choices]
        boundary = min(common_prefix_len(alone, ids) for ids in together)
        if not boundary + len(prefix):
            raise TaskError(
                f"{place}: nothing stands before the first token of its choices, so that token cannot be scored. The prompt is "
                "empty (or merges with the choices), and the tokenizer has no beginning-of-sequence token."
            )
        for choice, ids in zip(choices, together, strict=True):
            if len(ids) <= boundary:
                raise TaskError(
                    f"{place}: the choice {choice!r} is empty after tokenizing: {prompt[-20:] + choice!r} has no token more "
                    f"than {prompt[-20:]!r}, so it would be as likely as nothing, and always win."
                )
        given = len(prefix) + boundary
        return [Request(np.concatenate([prefix, ids]), given) for ids in together], boundary < len(alone)

    def _open(self, prompt: str, place: str) -> Request:
        alone = self._ids(prompt)
        ids = np.concatenate([self._prefix(alone), alone])
        if not len(ids):
            raise TaskError(
                f"{place}: the prompt is empty, and the tokenizer has no beginning-of-sequence token to begin with."
            )
        return Request(ids, len(ids))

    def _fitted(self, request: Request, room: int, place: str) -> Request:
        """The request without what is too much for the model's context on its left; `room` tokens are left for an answer."""
        limit = self.lm.limit
        most = None if limit is None else limit - room if room else limit + 1  # the last token of a choice is not read
        if most is None or len(request.ids) <= most:
            return request
        cut, answer = len(request.ids) - most, len(request.ids) - request.context_len
        if self.truncate == "refuse" or cut >= request.context_len:
            alone = cut >= request.context_len and answer
            raise TaskError(
                f"{place} is {len(request.ids):,} tokens"
                + (f", and {room:,} to be generated" if room else "")
                + f"; {self.lm.spec} reads {limit:,}. "
                + (f"Its choice alone takes {answer:,}." if alone else "Take fewer shots, or ask for less to be generated.")
            )
        return Request(request.ids[cut:], request.context_len - cut)

    def _prefix(self, ids: np.ndarray) -> np.ndarray:
        """What stands before a prompt of these ids; nothing more where the text itself begins so."""
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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
