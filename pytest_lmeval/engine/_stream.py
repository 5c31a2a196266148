"""Read a stream of tokens in chunks, and score every target once, in the memory of the model, its state and one chunk.

A stream of T tokens has T - 1 targets: the first token has nothing before it to predict it from. A model of several codebooks
predicts the first frame from its initial codes: frame t is target t + 1, with a loss for each scored codebook.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pytest_lmeval.engine._losses import check_finite, not_finite, score
from pytest_lmeval.engine._policy import Windows, streaming_refused
from pytest_lmeval.engine._tokens import Tokens, check_vocabulary, overlapping
from pytest_lmeval.errors import StreamError
from pytest_lmeval.models._model import Codebooks, State, state_bytes
from pytest_lmeval.records._share import WHOLE, Share

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine


@dataclass(frozen=True)
class Chunk:
    """The scores of the targets `start` to `end` of a stream (counted from 1: token 0 is no target).

    nll          [n] float64 on the CPU, nats: negative log-likelihood of each target given all before it; [n, s] of frames
    rank         [n] int64 on the CPU: the number of more likely tokens (0: the model's first choice; ties by id)
    widths       [n] bytes of text that each target stands for; zeros for bare ids
    seconds      wall time of the step and the scoring
    state_bytes  memory of the state after this chunk
    state        after the token before `end`; a further step may write to it
    window       where the chunk's window begins; 0 if the state is carried
    valid        [n, s] of frames: whether there was a code to predict; elsewhere nll is nan and rank -1
    top          of a served model, where asked for: id -> log-probability of the most likely tokens at each target
    """

    start: int
    end: int
    nll: np.ndarray
    rank: np.ndarray
    widths: np.ndarray
    seconds: float
    state_bytes: int
    state: State
    window: int = 0
    valid: np.ndarray | None = None
    top: tuple[dict[int, float], ...] = ()

    @property
    def losses(self) -> np.ndarray:
        """The losses of all scored targets in one row; of frames, frame by frame."""
        return self.nll if self.valid is None else self.nll[self.valid]


def carried(engine: Engine, tokens: Iterable[Tokens], state: State, position: int) -> Iterator[Chunk]:
    """The chunks of a stream whose state is carried. `tokens` begin at `position`; `state` is the one before it."""
    books, size, start = engine.lm.codebooks, engine.chunk_size, position
    for piece in overlapping(tokens, size, 0, 0) if books else overlapping(tokens, size + 1):
        if start == position:
            _check_state(engine, state, position)
        chunk = _frames(engine, books, piece, state, start) if books else _tokens(engine, piece, state, start, len(piece) - 1)
        yield chunk
        state, start = chunk.state, chunk.end - 1
    refuse_empty(start == position == 0)


def in_windows(
    engine: Engine, tokens: Iterable[Tokens], windows: Windows, state: State, position: int, window: int, share: Share = WHOLE
) -> Iterator[Chunk]:
    """The chunks of a stream in independent windows, each from an empty state that is carried through its chunks.

    window    position of the first of `tokens`: the beginning of a window
    position  resume inside that window here, with `state`, which is the one before it
    share     of the windows; the others are not read
    """
    if engine.lm.codebooks is not None:
        raise StreamError(f"{engine.lm.spec} reads frames of codes: only with the state carried, not in windows.")
    known = window + windows.overlap if window else 0  # the last target scored by the windows before
    inside = position > window
    for begin, piece in windows_of(tokens, windows, window):
        start, state = (position, state) if inside else (begin, None)
        if inside and begin + len(piece) > position + 1:
            _check_state(engine, state, position - begin)
        inside = False
        for part in overlapping([piece[start - begin :]], engine.chunk_size + 1) if share.owns(begin) else ():
            last = start + len(part) - 1
            fresh = max(0, min(last - start, last - known))
            chunk = _tokens(engine, part, state, start, fresh, begin)
            if fresh:
                yield chunk
            state, start = chunk.state, last
        known = begin + len(piece) - 1
    refuse_empty(not known)


def side_by_side(engine: Engine, texts: Sequence[Tokens]) -> list[Chunk]:
    """The only chunk of each of several texts, of two tokens or more in the vocabulary, read as rows of one padded batch.

    A chunk has its part of the seconds and of the state's bytes, and no state; its losses may be infinite or nan.
    """
    began = time.perf_counter()
    ids = [torch.from_numpy(text.ids).to(engine.lm.device) for text in texts]
    logits, state = engine.step(pad_sequence([row[:-1] for row in ids], batch_first=True))
    scores = [score(of_row[: len(row) - 1], row[1:]) for of_row, row in zip(logits, ids, strict=True)]
    seconds, held = time.perf_counter() - began, state_bytes(state) // len(texts)
    whole = sum(map(len, texts))
    return [
        Chunk(1, len(text), nll, rank, text.widths[1:], seconds * len(text) / whole, held, None)
        for text, (nll, rank) in zip(texts, scores, strict=True)
    ]


def _check_state(engine: Engine, state: State, seen: int) -> None:
    """Raise Refused if the policy does not allow a state after `seen` tokens to be continued."""
    if state is not None and (not engine.policy.carry or seen % engine.policy.multiple):
        raise streaming_refused(engine.lm, engine.policy)


def windows_of(tokens: Iterable[Tokens], windows: Windows, start: int) -> Iterator[tuple[int, Tokens]]:
    """The position of each window in the stream, and its tokens with the last target."""
    end, before = start, None
    for piece in overlapping(tokens, windows.size + 1, windows.overlap + 1):
        new = piece if before is None else piece[windows.overlap + 1 :]
        if windows.anchored:  # changes only the last window: the others are full already
            piece = new if before is None else Tokens.joined([before, new])
            piece = piece[-windows.size - 1 :]
        end += len(new)
        yield end - len(piece), piece
        before = piece


def _tokens(engine: Engine, piece: Tokens, state: State, start: int, fresh: int, window: int = 0) -> Chunk:
    """Read all but the last token of a piece and score its last `fresh` targets; `start` is the position of its first token."""
    ids, lm, began = piece.ids, engine.lm, time.perf_counter()
    check_vocabulary(ids, start, lm)
    inputs = torch.from_numpy(ids).to(lm.device)[None]
    logits, state = _step(engine, inputs[:, :-1], state, fresh, start - window)
    first = len(ids) - fresh
    nll, rank = score(logits[0], inputs[0, first:])
    check_finite(nll, ids, start + first, lm)
    end, seconds = start + len(ids), time.perf_counter() - began
    return Chunk(end - fresh, end, nll, rank, piece.widths[first:], seconds, state_bytes(state), state, window)


def _frames(engine: Engine, books: Codebooks, piece: Tokens, state: State, start: int) -> Chunk:
    """Read frames [n, k] and score the codes that they predict; `start` is the position of the first frame."""
    codes, lm, began = piece.ids, engine.lm, time.perf_counter()
    check_vocabulary(codes, start, lm)
    targets = books.targets(codes, state)
    valid = targets >= 0
    nll, rank = np.full(valid.shape, np.nan), np.full(valid.shape, -1)
    logits, state = _step(engine, torch.from_numpy(codes.T[None]).to(lm.device), state, len(codes))
    valid_logits = logits[0].transpose(0, 1)[torch.from_numpy(valid)]
    nll[valid], rank[valid] = score(valid_logits, torch.from_numpy(targets[valid]).to(lm.device))
    for index, column in np.argwhere(valid & ~np.isfinite(nll)):
        frame, book = start + index - books.delays[column], books.scored[column]
        raise not_finite(nll[index, column], f"code {targets[index, column]} of codebook {book} in frame {frame}", lm)
    end, seconds = start + 1 + len(nll), time.perf_counter() - began
    return Chunk(start + 1, end, nll, rank, piece.widths, seconds, state_bytes(state), state, valid=valid)


def _step(engine: Engine, inputs: Tensor, state: State, fresh: int, before: int = 0) -> tuple[Tensor, State]:
    """The logits of the last `fresh` positions, and the state. An invariant policy pads a last chunk, which nothing continues,
    to the shape of one with text after it; `before` are the tokens of its window before it."""
    windows, padding = engine.policy.windows, 0
    if engine.policy.invariant:
        size = engine.chunk_size if windows is None else min(engine.chunk_size, windows.size - before)
        padding = max(0, size - inputs.shape[-1])
    logits, state = engine.step(F.pad(inputs, (0, padding)) if padding else inputs, state, keep=fresh + padding)
    return logits[..., :fresh, :], state


def refuse_empty(empty: bool) -> None:
    if empty:
        raise StreamError(
            "a stream of fewer than two tokens has nothing to score: the first token is only read (a first frame of codes is "
            "scored). Give it more text, or a tokenizer with a beginning-of-sequence token."
        )
