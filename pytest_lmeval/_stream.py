"""The heart: a model reads a stream of tokens in chunks, its state carried, and every token is scored once.

    for chunk in stream(lm, tokens, chunk_size=1024):
        total += chunk.nll.sum()

A chunk of logits is turned into one loss and one rank a token and is gone before the next chunk is read, so
memory is the model, its state and one chunk, however long the stream. Everything else in this package that
reads text (perplexity, accuracy, loss by position) is a fold over these chunks.

The stream of T tokens has T - 1 targets: the first token has nothing before it to be predicted from. Put a
beginning-of-sequence token in front to score it too. A model of several codebooks predicts the first frame from its initial
codes: frame t is target t + 1, and has a loss for each scored codebook (see `models._model.Codebooks`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pytest_lmeval.errors import NotFiniteError, StreamError
from pytest_lmeval.models._model import Codebooks, Model, State, state_bytes

LOGITS_BUDGET = 256 << 20  # bytes that a chunk's logits and what is computed from them may take
LARGEST_CHUNK, SMALLEST_CHUNK = 1024, 16
ROWS = 1 << 19  # logits that are scored in one go: few enough to stay in the processor's caches

Scores: TypeAlias = "tuple[np.ndarray, np.ndarray, np.ndarray | None, State]"
"""What a chunk is scored with: (nll, rank, valid, state), see `Chunk`."""


@dataclass(frozen=True)
class Chunk:
    """The scores of the targets `start` to `end` of a stream (counted from 1: token 0 is no target).

    nll          [n] float64 on the CPU, nats: negative log-likelihood of each target given all before it; [n, s] of frames
    rank         [n] int64 on the CPU: how many tokens were likelier (0: the model's first choice; ties in the order of ids)
    seconds      wall time of the step and the scoring
    state_bytes  memory that the state holds after this chunk
    state        to go on from: after the token before `end`; a further step uses it up
    window       where the window that the chunk belongs to begins; 0 where the state is carried
    valid        [n, s] of frames: whether there was a code to predict; where not, nll is no number and rank -1
    """

    start: int
    end: int
    nll: np.ndarray
    rank: np.ndarray
    seconds: float
    state_bytes: int
    state: State
    window: int = 0
    valid: np.ndarray | None = None

    @property
    def losses(self) -> np.ndarray:
        """The losses of all that was scored, in a row: of frames, those of the first one before those of the next."""
        return self.nll if self.valid is None else self.nll[self.valid]


def stream(
    lm: Model,
    tokens: Iterable[Any] | np.ndarray | Tensor,
    *,
    chunk_size: int | None = None,
    state: State | None = None,
    position: int = 0,
) -> Iterator[Chunk]:
    """Score a stream chunk by chunk, the state carried, each target token exactly once.

    tokens      ids [T], or frames of codes [T, k]: a tensor, an array (memory-mapped ones are read as needed), or an
                iterator of arrays
    chunk_size  tokens (frames) a step; by default what fits the memory budget (see `default_chunk_size`)
    state       go on from this state, with `tokens` starting at the first token that it has not seen
    position    the place of that token in the stream, so that chunks are numbered from there

    Raises StreamError for a stream without a target or a token outside the vocabulary, NotFiniteError for a
    loss that is not finite, with the position.
    """
    books, start = lm.codebooks, position
    size = default_chunk_size(lm.vocab_size * (len(books.scored) if books else 1)) if chunk_size is None else chunk_size
    for ids in cut(pieces(tokens, size, books), size, 0, 0) if books else overlapping(tokens, size):
        began = time.perf_counter()
        read = _read_frames(lm, books, ids, state, start) if books else _read(lm, ids, state, start, len(ids) - 1)
        nll, rank, valid, state = read
        end = start + 1 + len(nll)
        yield Chunk(start + 1, end, nll, rank, time.perf_counter() - began, state_bytes(state), state, valid=valid)
        start = end - 1
    _refuse_empty(start == position == 0)


def stream_in_windows(
    lm: Model,
    tokens: Iterable[Any] | np.ndarray | Tensor,
    *,
    window: int,
    overlap: int,
    anchored: bool = False,
    chunk_size: int | None = None,
    state: State | None = None,
    position: int = 0,
    read_to: int | None = None,
) -> Iterator[Chunk]:
    """Score a stream in windows that know nothing of one another: for models without a state, or with a limited context.

    Each window reads `window` tokens from scratch, the first `overlap` of them only as context (they were scored by the
    window before), so a token sees between `overlap` and `window` tokens before it, and window / (window - overlap)
    times the work of one pass is done. Within a window the state is carried from chunk to chunk, if `chunk_size` is given.

    anchored  the last window begins early enough to read `window` tokens too, if there are so many, and scores those left
    position  where `tokens` begin in the stream: the beginning of a window (`Chunk.window`)
    read_to   go on inside that window, with `state`, which has seen everything before this token
    """
    if lm.codebooks is not None:
        raise StreamError(f"{lm.spec} reads frames of codes, which are only read with the state carried, not in windows.")
    if not 0 <= overlap < window:
        raise StreamError(f"windows of {window} tokens cannot overlap by {overlap}: a window has to score something new.")
    known = position + overlap if position else 0  # the last target that the windows before have scored
    for begin, ids in _windows(tokens, window, overlap, anchored, position):
        place = begin
        if read_to is not None:
            place, read_to = read_to, None
        else:
            state = None
        for step_ids in overlapping(ids[place - begin :], window if chunk_size is None else chunk_size):
            began = time.perf_counter()
            last = place + len(step_ids) - 1
            fresh = max(0, min(last - place, last - known))
            nll, rank, _, state = _read(lm, step_ids, state, place, fresh)
            if fresh:
                seconds = time.perf_counter() - began
                yield Chunk(last - fresh + 1, last + 1, nll, rank, seconds, state_bytes(state), state, begin)
            place = last
        known = begin + len(ids) - 1
    _refuse_empty(not known)


def _windows(
    tokens: Iterable[Any] | np.ndarray | Tensor, window: int, overlap: int, anchored: bool, position: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Where each window begins in the stream, and its tokens with the last target."""
    end, before = position, np.empty(0, dtype=np.int64)
    for ids in overlapping(tokens, window, overlap):
        new = ids[overlap + 1 :] if len(before) else ids
        if anchored:  # changes the last window alone: the others are as long as this can make them
            ids = np.concatenate([before, new])[-window - 1 :]
        end += len(new)
        yield end - len(ids), ids
        before = ids


def _read(lm: Model, ids: np.ndarray, state: State | None, start: int, fresh: int) -> Scores:
    """Step over all but the last of `ids` and score the last `fresh` targets; `start` is the place of ids[0]."""
    check_vocabulary(ids, start, lm)
    inputs = torch.from_numpy(ids).to(lm.device)[None]
    with torch.no_grad():
        logits, state = lm.step(inputs[:, :-1], state, keep=fresh)
        nll, rank = score(logits[0], inputs[0, len(ids) - fresh :])
    check_finite(nll, ids, start + len(ids) - fresh, lm)
    return nll, rank, None, state


def _read_frames(lm: Model, books: Codebooks, codes: np.ndarray, state: State | None, start: int) -> Scores:
    """Step over frames [n, k] and score the codes that they bring to light; `start` is the place of codes[0]."""
    check_vocabulary(codes, start, lm)
    targets = books.targets(codes, state)
    valid = targets >= 0
    nll, rank = np.full(valid.shape, np.nan), np.full(valid.shape, -1)
    with torch.no_grad():
        logits, state = lm.step(torch.from_numpy(codes.T[None]).to(lm.device), state)
        said = logits[0].transpose(0, 1)[torch.from_numpy(valid)]  # of the valid targets alone
        nll[valid], rank[valid] = score(said, torch.from_numpy(targets[valid]).to(lm.device))
    for place, column in np.argwhere(valid & ~np.isfinite(nll)):
        frame, book = start + place - books.delays[column], books.scored[column]
        raise _not_finite(nll[place, column], f"code {targets[place, column]} of codebook {book} in frame {frame}", lm)
    return nll, rank, valid, state


def _refuse_empty(empty: bool) -> None:
    if empty:
        raise StreamError(
            "a stream of fewer than two tokens has nothing to score: the first token is only read (a first frame of codes is "
            "scored). Give it more text, or a tokenizer with a beginning-of-sequence token."
        )


def overlapping(tokens: Iterable[Any] | np.ndarray | Tensor, size: int, overlap: int = 0) -> Iterator[np.ndarray]:
    """Cut a stream into arrays of size + 1 tokens that share a border token (input of one, target of the other) and
    the `overlap` tokens before it.

    >>> [list(map(int, ids)) for ids in overlapping(np.arange(6), 2)]
    [[0, 1, 2], [2, 3, 4], [4, 5]]
    >>> [list(map(int, ids)) for ids in overlapping(np.arange(6), 3, overlap=1)]
    [[0, 1, 2, 3], [2, 3, 4, 5]]
    """
    return cut(pieces(tokens, size), size + 1, overlap + 1, 1)


def cut(parts: Iterable[np.ndarray], length: int, shared: int, known: int) -> Iterator[np.ndarray]:
    """Arrays of `length` that share `shared`, the last one as long as it comes; of the first, `known` are nothing to read."""
    waiting: list[np.ndarray] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += len(part)
        if held < length:
            continue
        joined = np.concatenate(waiting)
        while len(joined) >= length:
            yield joined[:length]
            joined, known = joined[length - shared :], shared
        waiting, held = [joined], len(joined)
    if held > known:
        yield np.concatenate(waiting)


def pieces(tokens: Iterable[Any] | np.ndarray | Tensor, size: int, books: Codebooks | None = None) -> Iterator[np.ndarray]:
    """The ids [n], or frames [n, k], as int64 arrays, a large one a slice at a time so that a memory-mapped file is never
    read whole."""
    if size < 1:
        raise StreamError(f"chunk_size is {size}; a chunk has at least one token.")
    if isinstance(tokens, Tensor):
        tokens = tokens.detach().cpu().numpy()
    if isinstance(tokens, list | tuple | range):
        tokens = np.asarray(tokens)
    if not isinstance(tokens, np.ndarray):
        for piece in tokens:
            yield from pieces((np.atleast_2d if books else np.atleast_1d)(np.asarray(piece)), size, books)
        return
    k = (len(books.sizes),) if books else ()
    if tokens.ndim == 0 or tokens.shape[1:] != k or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        wanted = f"frames of {k[0]} integer codes, [T, {k[0]}]" if k else "a row of integer token ids"
        raise StreamError(f"a stream is {wanted}; got shape {list(tokens.shape)} of {tokens.dtype}.")
    step = max(size, 1 << 16)
    for begin in range(0, len(tokens), step):
        yield tokens[begin : begin + step].astype(np.int64)


def score(logits: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood [n] (float64, nats) and rank [n] of `targets` [n] under `logits` [n, v].

    Ties rank in the order of their ids, as argmax has it. Computed in float32 at least, a block of rows at a time.
    """
    if not len(targets):
        return np.empty(0), np.empty(0, dtype=np.int64)
    rows = max(1, ROWS // logits.shape[-1])
    scores = [_score_rows(x, y) for x, y in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)]
    nll, rank = (torch.cat(parts).cpu().numpy() for parts in zip(*scores, strict=True))
    return nll.astype(np.float64), rank


def _score_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    picked = logits.gather(1, targets[:, None])
    rank = (logits > picked).sum(1)
    tied = (logits == picked).sum(1) > 1
    if tied.any():
        ids = torch.arange(logits.shape[1], device=logits.device)
        rank[tied] += ((logits[tied] == picked[tied]) & (ids < targets[tied, None])).sum(1)
    return F.cross_entropy(logits, targets, reduction="none"), rank


def default_chunk_size(vocab_size: int) -> int:
    """The power of two, 16 to 1024, whose logits (float32, and as much again twice to score them) fit the budget.

    >>> default_chunk_size(256), default_chunk_size(152_000)
    (1024, 128)
    """
    fitting = LOGITS_BUDGET // (vocab_size * 4 * 3)
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, 1 << max(fitting, 1).bit_length() - 1))


def check_vocabulary(ids: np.ndarray, start: int, lm: Model) -> None:
    """Of ids [n], or codes [n, k], that begin at token (frame) `start` of the stream."""
    books = lm.codebooks
    lowest, sizes = (-1 if books.gaps else 0, np.array(books.sizes)) if books else (0, np.array(lm.vocab_size))
    wrong = np.argwhere((ids < lowest) | (ids >= sizes))
    if not len(wrong):
        return
    place, *book = wrong[0]
    if books:
        raise StreamError(
            f"frame {start + place} of the stream has code {ids[place, book[0]]} in codebook {book[0]}, but those of {lm.spec} "
            f"are {lowest} to {sizes[book[0]] - 1} there. The codes were probably made for another model, or stand in another "
            "order."
        )
    raise StreamError(
        f"token {start + place} of the stream has id {ids[place]}, but the vocabulary of {lm.spec} is 0 to "
        f"{lm.vocab_size - 1}. The text was probably tokenized for another model."
    )


def check_finite(nll: np.ndarray, ids: np.ndarray, first: int, lm: Model) -> None:
    """`nll` are the losses of the last of `ids`, the first of them being that of the stream's token `first`."""
    if np.isfinite(nll).all():
        return
    wrong = int(np.flatnonzero(~np.isfinite(nll))[0])
    target = len(ids) - len(nll) + wrong
    raise _not_finite(nll[wrong], f"token {first + wrong} of the stream (id {ids[target]}, after id {ids[target - 1]})", lm)


def _not_finite(loss: float, place: str, lm: Model) -> NotFiniteError:
    return NotFiniteError(
        f"{lm.spec} gave a loss of {loss} for {place}, in {lm.dtype} on {lm.device}. A number that is not finite cannot be "
        "averaged, so the run stops here; what was finished before is kept. Look for an overflow in low precision, or a "
        "masked-out logit."
    )
