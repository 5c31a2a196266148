"""Encode the `Requests` of another harness by the rules of lm_eval, which cuts tokens on the left, whatever they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pytest_lmeval.engine._tree import Request
from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._model import Model
from pytest_lmeval.scoring._token_ids import begun, encoded, prefix_of
from pytest_lmeval.tasks._questions import Requests


@dataclass(frozen=True)
class TokenRequests:
    """What is asked about one row, in tokens.

    requests   of the scored texts, of the rolling ones, and of the prompts
    sizes      how many requests each scored and each rolling text has
    answers    how many of the requests, the last ones, are prompts to be answered
    truncated  tokens that did not fit the model's context
    """

    requests: list[Request]
    sizes: tuple[int, ...]
    answers: int
    truncated: int


@dataclass(frozen=True)
class LmEvalEncoder:
    """Encodes `Requests` for a model. Raises TaskError, with the row, for what cannot be scored, and for what does not fit the
    model's context if that is to `refuse`."""

    lm: Model
    refuse: bool = False

    def encode(self, question: Requests, where: str) -> TokenRequests:
        contexts = {context for context, _ in question.scored}  # mostly one, which its choices share
        lengths = {context: len(encoded(self.lm, context.rstrip())[0]) for context in contexts}
        scored = [[self._pair(*pair, lengths[pair[0]], where)] for pair in question.scored]
        rolling = [self._windows(text, where) for text in question.rolling]
        prompts = [begun(self.lm, one.prompt, where)[0] for one in question.generated]
        limit, found = self.lm.limit, [one for some in scored + rolling for one in some]
        longest = [] if limit is None else [limit + 1] * len(found) + [limit - one.max_tokens for one in question.generated]
        whole = [*found, *(Request(ids, len(ids)) for ids in prompts)]
        requests = [self._tail(one, most, where) for one, most in zip(whole, longest, strict=True)] if longest else whole
        truncated = sum(len(one.ids) - len(rest.ids) for one, rest in zip(whole, requests, strict=True))
        return TokenRequests(requests, tuple(map(len, scored + rolling)), len(prompts), truncated)

    def _pair(self, context: str, continuation: str, length: int, where: str) -> Request:
        """A continuation after its context, which has `length` tokens without the blanks at its end, which are part of the
        continuation; after nothing, after the token that begins a text."""
        ids, _ = encoded(self.lm, context + continuation)
        if not context:
            return self._whole(ids, where)
        prefix = prefix_of(self.lm, ids)
        context_len = len(prefix) + length
        if not 0 < context_len < len(prefix) + len(ids):
            raise TaskError(f"{where}: the continuation {continuation!r} is empty after tokenizing, so it has no likelihood.")
        return Request(np.concatenate([prefix, ids]), context_len)

    def _whole(self, ids: np.ndarray, where: str) -> Request:
        """A whole text after the token that begins one."""
        first = prefix_of(self.lm, np.empty(0, dtype=np.int64))[:1]
        if len(ids) and len(first) and ids[0] == first[0]:
            first = first[:0]
        if len(first) + len(ids) < 2:
            raise TaskError(f"{where}: a text of {len(ids)} tokens, and no token that begins one: nothing can be scored.")
        return Request(np.concatenate([first, ids]), 1)

    def _windows(self, text: str, where: str) -> list[Request]:
        """A whole text; where it is longer than the model's context, in windows of that length, of which the last begins
        earlier than its first token that counts."""
        whole, limit = self._whole(encoded(self.lm, text)[0], where), self.lm.limit
        targets = len(whole.ids) - 1
        if limit is None or targets <= limit:
            return [whole]
        ends = [*range(limit, targets, limit), targets]
        return [
            Request(whole.ids[max(0, end - limit) : end + 1], min(end, limit) - (end - begin) + 1)
            for begin, end in zip([0, *ends], ends, strict=False)
        ]

    def _tail(self, request: Request, most: int, where: str) -> Request:
        """The last `most` ids of a request."""
        if (over := len(request.ids) - most) <= 0:
            return request
        if self.refuse or request.context_len - over < 1:
            raise TaskError(f"{where} is {len(request.ids):,} tokens, and {self.lm.spec} reads {most:,} here.")
        return Request(request.ids[over:], request.context_len - over)
