"""Encode questions as token ids for the engine.

Prompt and choice are tokenized together, blanks at the end of the prompt as part of the choice. If a token spans the boundary,
scoring begins earlier, where all choices still have the tokens of the prompt alone: the question counts as retokenized.

What does not fit the model's context goes in this order: few-shot examples, the first of them first and each as a whole; then
text at the beginning of the question. The beginning-of-sequence token and the description always stay. All choices of a
question are read after the same text.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pytest_lmeval.engine._tree import Request, common_prefix_len
from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._identity import fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._source_code import code_digest
from pytest_lmeval.tasks._questions import Choices, Generate, Question, Task

Truncate = Literal["left", "refuse"]


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as the model reads it.

    prompt         the whole text before the answer, without what did not fit
    key            hash of everything that decides the answer
    requests       one for each choice; the prompt alone if the answer is generated
    truncated      tokens of the question that did not fit
    shots_dropped  few-shot examples that did not fit
    row            that it was made of, as `ask` was given it
    thinking       texts between which the model thinks; None: it does not
    repeat         which of several answers to the question this asks for
    """

    id: str
    number: int
    question: Question
    prompt: str
    key: str
    requests: list[Request]
    truncated: int = 0
    shots_dropped: int = 0
    retokenized: bool = False
    row: Any = field(default=None, repr=False, compare=False)
    thinking: tuple[str, str] | None = None
    repeat: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """What no other question of the task has: the index of the row, and which answer to it."""
        return self.number, self.repeat

    def repeated(self, times: int) -> Iterator[EncodedQuestion]:
        """The question as often as it is to be answered, each time with a key of its own."""
        yield self
        for repeat in range(1, times):
            key = hashlib.sha256(f"{self.key}/{repeat}".encode()).hexdigest()[:16]
            yield replace(self, key=key, repeat=repeat)


@dataclass(frozen=True)
class _Reading:
    """A prompt and its answers in tokens.

    requests  each begins with the same `context_len` tokens
    before    how many of these stand before the text: the beginning-of-sequence token
    ends      [n] byte of the text where each token of the prompt ends
    """

    prompt: str
    requests: list[Request]
    before: int
    ends: np.ndarray
    retokenized: bool = False

    @property
    def context_len(self) -> int:
        return self.requests[0].context_len

    def __len__(self) -> int:
        return max(len(request.ids) for request in self.requests)

    def kept(self, description: str) -> int:
        """The number of tokens at the beginning of the text that hold the description."""
        size = len(description.encode())
        return int(np.searchsorted(self.ends, size)) + 1 if size else 0

    def without(self, first: int, count: int) -> _Reading | None:
        """The same without at least `count` tokens of the text from the token `first` on, so that it goes on with a whole
        character; None if nothing of the prompt would be left after them."""
        raw, before = self.prompt.encode(), self.before
        for last in range(first + count, self.context_len - before):
            at, end = int(self.ends[last - 1]), int(self.ends[last])
            if end > at and raw[at] & 0xC0 != 0x80:  # UTF-8: no byte that continues a character
                requests = [
                    Request(
                        np.concatenate([request.ids[: before + first], request.ids[before + last :]]),
                        request.context_len - (last - first),
                    )
                    for request in self.requests
                ]
                kept = int(self.ends[first - 1]) if first else 0
                prompt = (raw[:kept] + raw[at:]).decode(errors="ignore")
                ends = np.concatenate([self.ends[:first], self.ends[last:] - (at - kept)])
                return _Reading(prompt, requests, before, ends, self.retokenized)
        return None


@dataclass(frozen=True)
class Encoder:
    """Encodes the questions of a task for a model. Raises TaskError, with the row, for what cannot be scored.

    truncate  drop what does not fit the model's context: examples, then tokens on the "left" of the question; or "refuse" it
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

    def encode(
        self,
        question: Question,
        description: str = "",
        examples: Sequence[str] = (),
        *,
        id: str,  # noqa: A002 - its keyword
        number: int,
    ) -> EncodedQuestion:
        """`description` and few-shot `examples` are the texts before the prompt."""
        where = f"{self.task}, row {number} ({id})"
        room = question.max_tokens if isinstance(question, Generate) else 0
        limit = self.lm.limit
        longest = None if limit is None else limit - room if room else limit + 1  # the last token of a choice is not read

        def reading(dropped: int) -> _Reading:
            prompt = description + "".join(examples[dropped:]) + question.prompt
            if isinstance(question, Choices):
                return self._choices(prompt, question.choices, where)
            return self._prompt(prompt, where)

        found, dropped, truncated = reading(0), 0, 0
        if longest is not None and len(found) > longest:
            if self.truncate == "refuse":
                raise self._too_long(found, room, where, "Take fewer shots, or generate fewer tokens.")
            if examples:
                dropped = 1 + bisect_left(range(1, len(examples)), True, key=lambda count: len(reading(count)) <= longest)
                found = reading(dropped)
            if len(found) > longest:
                whole, found = found, self._fitted(found, description, longest, room, where)
                truncated = len(whole) - len(found)
        drawn: list[Any] = []
        if isinstance(question, Generate) and question.temperature:
            drawn = [id, *question.drawn_from.items()]  # the id seeds the random numbers
        thinking = self._thinking if isinstance(question, Generate) else None
        decisive = "|".join(map(repr, [*self._of_all_answers, question, found.prompt, *drawn, *(thinking or ())]))
        key = hashlib.sha256(decisive.encode(errors="surrogatepass")).hexdigest()[:16]
        prompt, requests = found.prompt, found.requests
        return EncodedQuestion(
            id, number, question, prompt, key, requests, truncated, dropped, found.retokenized, thinking=thinking
        )

    @functools.cached_property
    def _thinking(self) -> tuple[str, str] | None:
        """The texts between which the model thinks: those of the task, or those that its tokenizer knows."""
        return getattr(self.lm.tokenizer, "thinking", None) if self.task.thinking == "auto" else self.task.thinking

    @functools.cached_property
    def _of_all_answers(self) -> list[Any]:
        """Everything that decides answers beside the question; a judge does, since it ends them. Cached: the fingerprint reads
        all weights."""
        judge = None if self.task.judge is None else code_digest([self.task.judge]).hex()
        ends = getattr(self.lm.tokenizer, "ends", None)  # of a transformers model: from its generation config
        return [fingerprint(self.lm), tokenizer_fingerprint(self.lm), self.lm.dtype, self.lm.limit, ends, self.seed, judge]

    def _choices(self, prompt: str, choices: tuple[str, ...], where: str) -> _Reading:
        bare = prompt.rstrip()
        blanks, (alone, ends) = prompt[len(bare) :], self._encoded(bare)
        together = [self._encoded(prompt + choice if bare else blanks + choice)[0] for choice in choices]
        boundary = min(common_prefix_len(alone, ids) for ids in together)
        prefix = self._prefix(alone[:boundary])
        if not boundary + len(prefix):
            raise TaskError(
                f"{where}: nothing stands before the first token of its choices, so that token cannot be scored. The prompt is "
                "empty (or merges with the choices), and the tokenizer has no beginning-of-sequence token."
            )
        for choice, ids in zip(choices, together, strict=True):
            if len(ids) <= boundary:
                raise TaskError(f"{where}: the choice {choice!r} is empty after tokenizing: it would always win.")
        context_len = len(prefix) + boundary
        requests = [Request(np.concatenate([prefix, ids]), context_len) for ids in together]
        return _Reading(prompt, requests, len(prefix), ends, boundary < len(alone))

    def _prompt(self, prompt: str, where: str) -> _Reading:
        alone, ends = self._encoded(prompt)
        prefix = self._prefix(alone)
        ids = np.concatenate([prefix, alone])
        if not len(ids):
            raise TaskError(f"{where}: the prompt is empty, and the tokenizer has no beginning-of-sequence token.")
        return _Reading(prompt, [Request(ids, len(ids))], len(prefix), ends)

    def _fitted(self, whole: _Reading, description: str, longest: int, room: int, where: str) -> _Reading:
        """The reading without text at the beginning of the question; `room` tokens are left for a generated answer."""
        begun = common_prefix_len(self._prefix(np.empty(0)), whole.requests[0].ids)  # its first token may stand in the text
        first = max(whole.kept(description), begun - whole.before)
        if (found := whole.without(first, len(whole) - longest)) is not None:
            return found
        answer = len(whole) - whole.context_len
        alone = "choice" if answer and answer >= longest else "description" if first else ""
        help_ = f"Its {alone} alone takes {answer if alone == 'choice' else first:,}." if alone else "Generate fewer tokens."
        raise self._too_long(whole, room, where, help_)

    def _too_long(self, reading: _Reading, room: int, where: str, help_: str) -> TaskError:
        more = f", and {room:,} to be generated" if room else ""
        return TaskError(f"{where} is {len(reading):,} tokens{more}; {self.lm.spec} reads {self.lm.limit:,}. {help_}")

    def _prefix(self, ids: np.ndarray) -> np.ndarray:
        """The ids [p] that the tokenizer puts before a prompt of these ids, unless it begins with them."""
        tokenizer: Any = self.lm.tokenizer
        bos, eos = getattr(tokenizer, "bos", None), getattr(tokenizer, "eos", None)
        prefix = tuple(getattr(tokenizer, "prefix", () if bos is None else (bos,)))
        first = bos if bos is not None else eos
        if not len(ids) and first is not None:
            prefix = prefix or (first,)
        return np.array(() if prefix and tuple(ids[: len(prefix)]) == prefix else prefix, dtype=np.int64)

    def _encoded(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text [n], and the byte where each ends [n]."""
        assert self.lm.tokenizer is not None
        ids, ends = self.lm.tokenizer.encode(text)
        return np.asarray(ids, dtype=np.int64), np.asarray(ends, dtype=np.int64)
