"""Read with a served model, which gives log-probabilities and answers in place of logits: many requests under way at once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from pytest_lmeval.engine._generation import Answer, take_text
from pytest_lmeval.engine._losses import check_finite
from pytest_lmeval.engine._policy import Windows
from pytest_lmeval.engine._results import Counts, Results, Scored
from pytest_lmeval.engine._stream import Chunk, refuse_empty, windows_of
from pytest_lmeval.engine._tokens import Tokens, check_vocabulary
from pytest_lmeval.engine._tree import Request
from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._served import Asking, Scoring, Served, ServedAnswer, TokenScores, refuse_scores
from pytest_lmeval.records._share import WHOLE, Share

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine

AHEAD = 4  # windows for each request under way, that are sent before the first of them is handed out
Take: TypeAlias = "Callable[[Answer, int, float], None]"
"""(answer, token, its log-probability): append a token to the answer, or end it."""


class ServedReader:
    """Scores and generates by asking the server; each result is added as it ends."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        served = engine.lm.served
        assert served is not None
        self.served: Served = served

    @property
    def at_once(self) -> int | None:
        """Requests under way at once: one where rows may not be read together; None: as many as the server is asked."""
        policy = self.engine.policy
        return 1 if policy.invariant or policy.batch_size == 1 else None

    def score(self, requests: Sequence[Request], results: Results[Scored]) -> list[Scored]:
        """Equal requests are asked once."""
        refuse_scores(self.served, self.engine.lm.spec)
        found, asked = dict(results.found), dict[tuple[bytes, int], list[int]]()
        for number, request in enumerate(requests):
            if number in found:
                self.engine.counts.add(found[number].read, 0)
            elif request.asked:
                asked.setdefault((request.ids.tobytes(), request.context_len), []).append(number)
            else:
                found[number] = Scored(np.empty(0))
        same = list(asked.values())

        def done(index: int, scores: TokenScores) -> None:
            first, *others = same[index]
            read, greedy = len(requests[first].read), not scores.ranks.any()
            self.engine.counts.add(read, 0)
            new = {first: Scored(scores.logprobs, greedy, read)} | {n: Scored(scores.logprobs, greedy) for n in others}
            found.update(new)
            results.add(new)

        firsts = (requests[numbers[0]] for numbers in same)
        self.served.score([Scoring(one.ids.tolist(), one.context_len) for one in firsts], done, at_once=self.at_once)
        return [found[number] for number in range(len(requests))]

    def generate(self, answers: Sequence[Answer], take: Take, results: Results[Answer], *, judged: bool = False) -> None:
        """Ask for each answer whole, and take its tokens so that it ends where it would end here; one by one if a judge reads
        along, or the model thinks."""
        waiting = []
        for number, answer in enumerate(answers):
            if number in results.found:
                answer.take(results.found[number])
                self.engine.counts.include(answer.counts)
            else:
                waiting.append(number)

        def done(index: int, found: ServedAnswer) -> None:
            number = waiting[index]
            answer = answers[number]
            if judged or answer.prompt.thinking is not None or not _took_whole(self.engine, answer, found):
                _replay(answer, found, take)
            answer.read = len(answer.prompt.ids) + len(found.ids or ())
            answer.counts = Counts(tokens=answer.read, calls=1)
            self.engine.counts.include(answer.counts)
            results.add({number: answer})

        asked = [_asking(self.engine, answers[number]) for number in waiting]
        self.served.answer(asked, done, at_once=self.at_once)


def _asking(engine: Engine, answer: Answer) -> Asking:
    """What is asked of the server. A model that thinks may think of a stop: it is then searched for here."""
    prompt, tokenizer = answer.prompt, engine.lm.tokenizer
    served = engine.lm.served
    assert served is not None
    if prompt.min_p and served.facts.text_only:
        raise TaskError(f"{engine.lm.spec} takes no min_p; {prompt.name} asks for min_p={prompt.min_p}. Draw by top_p instead.")
    ends = getattr(tokenizer, "ends", (getattr(tokenizer, "eos", None),))
    digest = hashlib.sha256(f"{prompt.seed}/{prompt.name}/{prompt.repeat}".encode()).digest()
    return Asking(
        prompt.ids.tolist(),
        prompt.max_tokens,
        stop=() if prompt.thinking else prompt.stop,
        ends=tuple(end for end in ends if end is not None),
        temperature=prompt.temperature,
        top_k=prompt.top_k,
        top_p=prompt.top_p,
        min_p=prompt.min_p,
        seed=int.from_bytes(digest[:4], "big") >> 1,
    )


def _took_whole(engine: Engine, answer: Answer, found: ServedAnswer) -> bool:
    """Take all tokens of an answer together, which are decoded once. Returns False, and takes none, if special tokens or half a
    character at its end ask for a look at each."""
    tokenizer = engine.lm.tokenizer
    if found.ids is None or found.logprobs is None:
        return False
    ends, ids = getattr(tokenizer, "ends", (getattr(tokenizer, "eos", None),)), list(map(int, found.ids))
    ended = bool(ids) and ids[-1] in ends
    said = ids[:-1] if ended else ids
    text = str(tokenizer.decode(said))  # type: ignore[union-attr]
    if text.endswith("\ufffd") or not {*ends, *getattr(tokenizer, "special", ())}.isdisjoint(said):
        return False
    answer.ids, answer.logprobs = said, list(map(float, found.logprobs[: len(said)]))
    take_text(answer, text)
    if not answer.why:
        answer.why = "length" if found.cut or len(said) >= answer.prompt.max_tokens else "end"
    return True


def _replay(answer: Answer, found: ServedAnswer, take: Take) -> None:
    """Take the tokens of an answer until it ends; without tokens, its text."""
    if found.ids is None:
        take_text(answer, found.text)
    else:
        logprobs = found.logprobs if found.logprobs is not None else [0.0] * len(found.ids)
        for token, logprob in zip(found.ids, logprobs, strict=True):
            take(answer, int(token), float(logprob))
            if answer.why:
                break
        if found.logprobs is None:  # what is kept of an answer has both
            answer.ids, answer.logprobs = [], []
    if not answer.why:
        answer.why = "thinking" if answer.thinks else "length" if found.cut else "end"


def in_windows(
    engine: Engine, tokens: Iterable[Tokens], windows: Windows, position: int, window: int, share: Share = WHOLE
) -> Iterator[Chunk]:
    """The chunks of a stream, one for each window, several of which are under way at once (see `_stream.in_windows`)."""
    known = window + windows.overlap if window else 0
    pieces, first = windows_of(tokens, windows, window), True
    while batch := list(islice(pieces, AHEAD * _width(engine))):
        ready = []
        for begin, piece in batch:
            fresh = max(0, begin + len(piece) - 1 - max(known, begin))
            if fresh and share.owns(begin) and not (first and position > window):  # an interrupted reading ends with a window
                ready.append((begin, piece, fresh))
            known, first = begin + len(piece) - 1, False
        yield from _scored(engine, ready)
    refuse_empty(not known)


def side_by_side(engine: Engine, texts: Sequence[Tokens]) -> list[Chunk]:
    """The only chunk of each of several texts, of two tokens or more."""
    return _scored(engine, [(0, text, len(text) - 1) for text in texts], check=False)


def _width(engine: Engine) -> int:
    served = engine.lm.served
    assert served is not None
    return 1 if engine.policy.invariant or engine.policy.batch_size == 1 else served.concurrency


def _scored(engine: Engine, pieces: Sequence[tuple[int, Tokens, int]], *, check: bool = True) -> list[Chunk]:
    """The chunks of pieces, each with the position of its first token and the number of its last targets that are scored."""
    lm, began = engine.lm, time.perf_counter()
    served = lm.served
    assert served is not None
    refuse_scores(served, lm.spec)
    for begin, piece, _ in pieces:
        check_vocabulary(piece.ids, begin, lm)
    found: dict[int, TokenScores] = {}
    asked = [Scoring(piece.ids.tolist(), len(piece) - fresh, engine.top) for _, piece, fresh in pieces]
    served.score(asked, found.__setitem__, at_once=1 if _width(engine) == 1 else None)
    seconds, whole, chunks = time.perf_counter() - began, sum(len(piece) for _, piece, _ in pieces), list[Chunk]()
    for number, (begin, piece, fresh) in enumerate(pieces):
        scores, end, share = found[number], begin + len(piece), seconds * len(piece) / whole
        nll, widths = -scores.logprobs, piece.widths[len(piece) - fresh :]
        if check:
            check_finite(nll, piece.ids, end - fresh, lm)
        chunks.append(Chunk(end - fresh, end, nll, scores.ranks, widths, share, 0, None, begin, top=tuple(scores.top)))
    return chunks
