"""Define what a served model gives in place of logits: log-probabilities of whole sequences, and whole answers.

A served model is a `Model` whose `step_fn` has the attribute `served`. It carries no state, so texts are read in windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pytest_lmeval.errors import ModelError, NotFiniteError, Refused

ZEROS = 4  # log-probabilities of exactly 0 in a row that are no chance
ABOVE_ZERO = 1e-3  # nats by which rounding may lift a log-probability above 0
MASKED = -9999.0  # what vLLM writes for -inf, which JSON does not have


@dataclass(frozen=True)
class ServerFacts:
    """What a server tells of itself.

    kind         vLLM, SGLang, llama.cpp, or OpenAI-compatible
    version      as it says; empty if it does not
    model        the name by which it is asked
    dtype        precision that it computes in, as torch names it; empty if it is not known
    longest      tokens of a prompt and its answer; None: not known
    chunk        tokens that it reads of a long prompt at once; None: not known
    prefix_cache whether it keeps what it read of earlier prompts; None: not known
    no_scores    why it gives no log-probabilities of a given text; empty if it does
    text_only    it takes texts, no token ids
    settings     further settings that numbers may depend on
    """

    kind: str
    version: str
    model: str
    dtype: str = ""
    longest: int | None = None
    chunk: int | None = None
    prefix_cache: bool | None = None
    no_scores: str = ""
    text_only: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind} {self.version}".rstrip()

    @property
    def plain(self) -> dict[str, Any]:
        """The facts for a record."""
        named = {"server": str(self), "model": self.model, "max_length": self.longest, "chunk": self.chunk}
        named |= {"prefix_cache": self.prefix_cache, "dtype": self.dtype or "not told", "text_only": self.text_only or None}
        return {name: value for name, value in {**named, **self.settings}.items() if value is not None}


@dataclass(frozen=True)
class Scoring:
    """A sequence to score. The tokens from `start` on, at least 1, are scored, each after all before it.

    ids  [n]
    top  most likely tokens that are wanted of each position, too
    """

    ids: Sequence[int]
    start: int
    top: int = 0


@dataclass(frozen=True)
class TokenScores:
    """The scores of the tokens of a `Scoring` from its start on.

    logprobs  [n - start] float64, nats
    ranks     [n - start] int64: tokens that are more likely, as far as the server tells (0: the first choice)
    top       of each position, id -> log-probability of the most likely tokens; empty unless they were asked for
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    top: Sequence[dict[int, float]] = ()


@dataclass(frozen=True)
class Asking:
    """A prompt to answer. All that decides how a token is drawn is sent, so that no default of the server does.

    ends  ids that end the answer
    """

    ids: Sequence[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ServedAnswer:
    """An answer.

    ids       of its tokens, with the one that ended it; None: the server does not tell
    logprobs  of these tokens; None: the server does not tell
    cut       whether it ended at `max_tokens`
    """

    text: str
    ids: Sequence[int] | None = None
    logprobs: Sequence[float] | None = None
    cut: bool = False


class Served(Protocol):
    """How sequences are scored and answered, several at a time.

    concurrency  the most that are under way at once
    """

    @property
    def facts(self) -> ServerFacts: ...

    @property
    def concurrency(self) -> int: ...

    def score(self, asked: Sequence[Scoring], done: Callable[[int, TokenScores], None], *, at_once: int | None = None) -> None:
        """Score sequences, and call `done` with the number and the scores of each as it ends, in any order."""

    def answer(self, asked: Sequence[Asking], done: Callable[[int, ServedAnswer], None], *, at_once: int | None = None) -> None:
        """Answer prompts, and call `done` with the number and the answer of each as it ends, in any order."""


def no_step(served: Served, spec: str) -> Callable[..., Any]:
    """The `step_fn` of a served model, which cannot be stepped."""

    def step_fn(*_: Any) -> Any:
        raise Refused(
            f"{spec} is served by {served.facts}, which gives no logits and no state: it cannot be stepped, trained or timed "
            "token by token here. Use lmeval.perplexity, lmeval.task or lmeval.agreement, or load the model itself (hf:FOLDER)."
        )

    step_fn.served = served  # type: ignore[attr-defined]
    return step_fn


def refuse_scores(served: Served, spec: str) -> None:
    """Raise Refused if the server gives no log-probabilities of a text."""
    if why := served.facts.no_scores:
        raise Refused(
            f"{spec}: {served.facts} gives no log-probabilities of a prompt ({why}), so choices and texts cannot be scored: as "
            "zeros they would look like chance. Ask it for generated answers, or serve the model with vLLM or SGLang."
        )


def checked(scores: TokenScores, asked: Scoring, spec: str) -> TokenScores:
    """The scores, if they can be what was asked for. Raises ModelError for another number of them or a probability above 1,
    NotFiniteError for nan, and Refused for zeros in place of log-probabilities."""
    wanted, found = len(asked.ids) - asked.start, scores.logprobs
    if found.shape != (wanted,) or scores.ranks.shape != (wanted,) or (asked.top and len(scores.top) != wanted):
        raise ModelError(
            f"{spec} was asked for {wanted} log-probabilities, of a sequence of {len(asked.ids)} tokens, and answered "
            f"{len(found)}. They cannot be told apart, so none is used. Is another server, or a proxy, between?"
        )
    _refuse_impossible(found, asked.ids[asked.start :], asked.start, f"a sequence of {len(asked.ids)}", spec)
    if wanted >= ZEROS and not found.any():
        raise Refused(
            f"{spec} gave exactly 0 as the log-probability of each of {wanted} tokens: it does not compute them. Scored so, "
            "every choice would tie, and a task would show chance. Use a server that gives log-probabilities of a prompt."
        )
    masked = np.where(found <= MASKED, -np.inf, np.minimum(found, 0.0))
    return TokenScores(masked, scores.ranks, scores.top)


def checked_answer(answer: ServedAnswer, asked: Asking, vocab_size: int, spec: str) -> ServedAnswer:
    """The answer, if it can be one to what was asked. Raises ModelError for more tokens than were asked for, ids outside of the
    vocabulary, or no text, and NotFiniteError for what is no log-probability."""
    if not isinstance(answer.text, str):
        raise ModelError(f"{spec} gave {answer.text!r} as the text of an answer, which is none. It is not used.")
    if answer.ids is None:
        return answer
    if len(answer.ids) > asked.max_tokens:
        raise ModelError(f"{spec} generated {len(answer.ids)} tokens where at most {asked.max_tokens} were asked for.")
    if unknown := [token for token in answer.ids if not 0 <= token < vocab_size]:
        raise ModelError(
            f"{spec} generated the id {unknown[0]}, and its tokenizer here has {vocab_size:,} tokens. It is the tokenizer of "
            "another model: tokenizer=FOLDER names that of the one that is served."
        )
    if answer.logprobs is not None:
        _refuse_impossible(np.array(answer.logprobs, dtype=np.float64), answer.ids, 0, "an answer", spec)
    return answer


def _refuse_impossible(logprobs: np.ndarray, ids: Sequence[int], first: int, what: str, spec: str) -> None:
    """Raise NotFiniteError for nan, and for a probability above 1; `first` is the position of the first id."""
    wrong = np.isnan(logprobs) | (logprobs > ABOVE_ZERO)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise NotFiniteError(
            f"{spec} gave {logprobs[at]} as the log-probability of token {first + at} (id {ids[at]}) of {what}; it is a finite "
            "number of at most 0. Look for an overflow in the server's precision."
        )
