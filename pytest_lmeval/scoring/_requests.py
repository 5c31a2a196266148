"""Encode questions as token ids for the engine.

Prompt and choice are tokenized together, blanks at the end of the prompt as part of the choice. If a token spans the boundary,
scoring begins earlier, where all choices still have the tokens of the prompt alone: the question counts as retokenized.

What does not fit the model's context goes in this order: few-shot examples, the first of them first and each as a whole; then
text at the beginning of the question. The beginning-of-sequence token and the description always stay, and what a chat template
writes. All choices of a question are read after the same text.
"""

from __future__ import annotations

import functools
import hashlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pytest_lmeval.engine._tree import Request, common_prefix_len
from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._chat import Rendered
from pytest_lmeval.models._identity import fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model, special_pattern
from pytest_lmeval.models._source_code import code_digest
from pytest_lmeval.scoring._chat import Chat, after_prefix, joined
from pytest_lmeval.scoring._encoded import EncodedQuestion
from pytest_lmeval.scoring._lm_eval_requests import LmEvalEncoder
from pytest_lmeval.scoring._token_ids import begun, encoded, prefix_of
from pytest_lmeval.tasks._questions import AnyQuestion, Choices, Generate, Question, Requests
from pytest_lmeval.tasks._task import Task

Truncate = Literal["left", "refuse"]


@dataclass(frozen=True)
class _Reading:
    """A prompt and its answers in tokens.

    requests  each begins with the same `context_len` tokens
    before    how many of these stand before the text: the beginning-of-sequence token
    ends      [n] byte of the text where each token of the prompt ends; empty in a chat
    written   where special tokens are text in a chat
    """

    prompt: str
    requests: list[Request]
    before: int
    ends: np.ndarray
    retokenized: bool = False
    written: tuple[tuple[int, int], ...] | None = None

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
    chat      asks in turns, if given
    """

    lm: Model
    task: Task
    truncate: Truncate = "left"
    seed: int = 0
    chat: Chat | None = None

    def __post_init__(self) -> None:
        if self.truncate not in ("left", "refuse"):
            raise TaskError(f"truncate={self.truncate!r}: what does not fit is cut on the 'left', or an error: 'refuse'.")
        if self.lm.codebooks is not None or self.lm.tokenizer is None:
            what = "reads frames of codes" if self.lm.codebooks is not None else "has no tokenizer"
            raise TaskError(f"{self.lm.spec} {what}, so it cannot be asked {self.task}. Give it an attribute `tokenizer`.")

    def encode(
        self,
        question: AnyQuestion,
        description: str = "",
        examples: Sequence[Question] = (),
        *,
        id: str,  # noqa: A002 - its keyword
        number: int,
    ) -> EncodedQuestion:
        """`description` and few-shot `examples` stand before the question."""
        where = f"{self.task}, row {number} ({id})"
        if isinstance(question, Requests):
            return self._of_another_harness(question, where, id=id, number=number)
        room = question.max_tokens if isinstance(question, Generate) else 0
        limit = self.lm.limit
        longest = None if limit is None else limit - room if room else limit + 1  # the last token of a choice is not read

        def reading(dropped: int, asked: Question = question) -> _Reading:
            if self.chat is not None:
                return self._in_turns(self.chat, description, examples[dropped:], asked, where)
            shown = (
                _opened(shot) + after_prefix(shot, shot.target) + self.task.fewshot_delimiter for shot in examples[dropped:]
            )
            return self._answered(description + "".join(shown) + _opened(asked), asked, where)

        found, dropped, truncated = reading(0), 0, 0
        if longest is not None and len(found) > longest:
            if self.truncate == "refuse":
                raise self._too_long(found, room, where, "Take fewer shots, or generate fewer tokens.")
            if examples:
                dropped = 1 + bisect_left(range(1, len(examples)), True, key=lambda count: len(reading(count)) <= longest)
                found = reading(dropped)
            if len(found) > longest:
                whole = found
                if self.chat is not None:
                    prompts = self._cut(question.prompt)
                    fits = bisect_left(
                        prompts, True, key=lambda prompt: len(reading(dropped, replace(question, prompt=prompt))) <= longest
                    )
                    if fits == len(prompts):
                        raise self._too_long(whole, room, where, "Its other turns alone do not fit.")
                    found = reading(dropped, replace(question, prompt=prompts[fits]))
                else:
                    found = self._fitted(whole, description, longest, room, where)
                truncated = len(whole) - len(found)
        drawn: list[Any] = []
        if isinstance(question, Generate) and question.temperature:
            drawn = [id, *question.drawn_from.items()]  # the id seeds the random numbers
        thinking = self._thinking if isinstance(question, Generate) else None
        turns = [] if found.written is None else [("chat", found.written)]
        return EncodedQuestion(
            id,
            number,
            question,
            found.prompt,
            self._key(question, found.prompt, *turns, *drawn, *(thinking or ())),
            found.requests,
            truncated,
            dropped,
            found.retokenized,
            self._has_special(description, examples[dropped:], question),
            answers=int(isinstance(question, Generate)),
            thinking=thinking,
        )

    def _key(self, *decisive: Any) -> str:
        """A hash of everything that decides the answer."""
        text = "|".join(map(repr, [*self._of_all_answers, *decisive]))
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]

    def _of_another_harness(self, question: Requests, where: str, *, id: str, number: int) -> EncodedQuestion:  # noqa: A002
        found = LmEvalEncoder(self.lm, refuse=self.truncate == "refuse").encode(question, where)
        drawn = [(one.temperature, *one.drawn_from.items()) for one in question.generated if one.temperature]
        return EncodedQuestion(
            id,
            number,
            question,
            question.prompt,
            self._key(question, *([id] if drawn else []), *drawn),
            found.requests,
            found.truncated,
            sizes=found.sizes,
            answers=found.answers,
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

    def _in_turns(self, chat: Chat, description: str, examples: Sequence[Question], question: Question, where: str) -> _Reading:
        """The reading of a question that is asked in turns."""
        try:
            rendered = chat.rendered(description, examples, question)
            found = self._answered(rendered.text, question, where, rendered)
        except TaskError as error:
            raise error if str(error).startswith(where) else TaskError(f"{where}: {error}") from error
        return replace(found, written=rendered.written)

    def _answered(self, prompt: str, question: Question, where: str, rendered: Rendered | None = None) -> _Reading:
        """The reading of a prompt and its answers; `rendered` is the conversation of which it is the text."""
        if self.lm.classes:
            return self._classes(prompt, question, where, rendered)
        if not isinstance(question, Choices):
            return self._prompt(prompt, where, rendered)
        made = after_prefix if self.chat is None else self.chat.choice
        return self._choices(prompt, [made(question, choice) for choice in question.choices], where, rendered)

    def _choices(self, prompt: str, choices: Sequence[str], where: str, rendered: Rendered | None) -> _Reading:
        bare = prompt.rstrip()
        blanks, (alone, ends) = prompt[len(bare) :], encoded(self.lm, bare, rendered)
        together = [encoded(self.lm, prompt + choice if bare else blanks + choice, rendered)[0] for choice in choices]
        boundary = min(common_prefix_len(alone, ids) for ids in together)
        prefix = prefix_of(self.lm, alone[:boundary], rendered)
        if not boundary + len(prefix):
            raise TaskError(
                f"{where}: nothing stands before the first token of its choices, so that token cannot be scored. The prompt is "
                "empty (or merges with the choices), and the tokenizer has no beginning-of-sequence token."
            )
        for choice, ids in zip(choices, together, strict=True):
            if len(ids) <= boundary or not choice:
                raise TaskError(f"{where}: the choice {choice!r} is empty after tokenizing: it would always win.")
        context_len = len(prefix) + boundary
        requests = [Request(np.concatenate([prefix, ids]), context_len) for ids in together]
        return _Reading(prompt, requests, len(prefix), ends, boundary < len(alone))

    def _classes(self, prompt: str, question: Question, where: str, rendered: Rendered | None) -> _Reading:
        """The reading of a prompt whose choices are the classes of the model: of each, the index stands after the prompt."""
        given = question.choices if isinstance(question, Choices) else ()
        if given != self.lm.classes:
            asked = f"has the choices {list(given)!r}" if given else "is answered by a text"
            raise TaskError(
                f"{where} {asked}, and {self.lm.spec} is a classifier, which chooses among {list(self.lm.classes)!r} alone. "
                "Ask it the task that it was fine-tuned for, or fine-tune with classes='verbaliser'."
            )
        ids, before, ends = begun(self.lm, prompt, where, rendered)
        requests = [Request(np.append(ids, index), len(ids)) for index in range(len(given))]
        return _Reading(prompt, requests, before, ends)

    def _prompt(self, prompt: str, where: str, rendered: Rendered | None) -> _Reading:
        ids, before, ends = begun(self.lm, prompt, where, rendered)
        return _Reading(prompt, [Request(ids, len(ids))], before, ends)

    def _cut(self, prompt: str) -> list[str]:
        """The prompt without its first tokens, as many as whole characters end with, one after another; the last has text."""
        raw, (_, ends) = prompt.encode(), encoded(self.lm, prompt)
        whole = (end for end in dict.fromkeys(ends.tolist()) if end < len(raw) and raw[end] & 0xC0 != 0x80)
        return [cut for end in whole if (cut := raw[end:].decode()).strip()]

    def _has_special(self, description: str, examples: Sequence[Question], question: Question) -> bool:
        """Whether a special token is written in the texts of a question, of what stands before it, or of its choices."""
        if self._special is None:
            return False
        texts = [description, "" if self.chat is None else self.chat.system, *getattr(question, "choices", ())]
        texts += [text for one in (*examples, question) for text in (one.prompt, one.answer_prefix)]
        texts += [shot.target for shot in examples]
        return self._special.search("\0".join(texts).encode()) is not None

    @functools.cached_property
    def _special(self) -> re.Pattern[bytes] | None:
        return special_pattern(self.lm)

    def _fitted(self, whole: _Reading, description: str, longest: int, room: int, where: str) -> _Reading:
        """The reading without text at the beginning of the question; `room` tokens are left for a generated answer."""
        prefix = prefix_of(self.lm, np.empty(0))  # its first token may stand in the text
        first = max(whole.kept(description), common_prefix_len(prefix, whole.requests[0].ids) - whole.before)
        if (found := whole.without(first, len(whole) - longest)) is not None:
            return found
        answer = len(whole) - whole.context_len
        alone = "choice" if answer and answer >= longest else "description" if first else ""
        help_ = f"Its {alone} alone takes {answer if alone == 'choice' else first:,}." if alone else "Generate fewer tokens."
        raise self._too_long(whole, room, where, help_)

    def _too_long(self, reading: _Reading, room: int, where: str, help_: str) -> TaskError:
        more = f", and {room:,} to be generated" if room else ""
        return TaskError(f"{where} is {len(reading):,} tokens{more}; {self.lm.spec} reads {self.lm.limit:,}. {help_}")


def _opened(question: Question) -> str:
    """The prompt and the beginning of its answer, without turns."""
    return joined(question.prompt, question.answer_prefix)
