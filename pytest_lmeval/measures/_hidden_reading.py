"""Read the hidden states of texts batch by batch: short texts as rows of a padded batch, long ones alone, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._tokens import TokenReader, sequences
from pytest_lmeval.engine import Engine
from pytest_lmeval.engine._hidden import hidden_states
from pytest_lmeval.engine._policy import chunk_of
from pytest_lmeval.engine._tokens import Tokens, check_vocabulary, naming, overlapping
from pytest_lmeval.errors import NotFiniteError, OutOfMemory, StreamError
from pytest_lmeval.measures._look_ahead import AHEAD, batches
from pytest_lmeval.models._failures import NoMemory, unless_full
from pytest_lmeval.models._model import State
from pytest_lmeval.scoring._hidden_files import Point

Token: TypeAlias = Literal["last", "mean", "all"]
SMALL = 16 << 20  # bytes of the hidden states of all layers that a step returns at most, if they are of
EFFICIENT = 256  # tokens or more;
BUDGET = 64 << 20  # else at most so many


@dataclass(frozen=True)
class HiddenBatch:
    """Hidden states of some texts.

    texts      [n] number of the text of each vector
    positions  [n] of its token in the text; of a mean, of the last token
    vectors    name of a layer -> [n, d], on the device and in the precision of the model; means in float64
    """

    texts: np.ndarray
    positions: np.ndarray
    vectors: dict[str, Tensor]


class HiddenReader:
    """Reads the hidden states of texts.

    modules  by name
    token    "last" or "mean": a vector for each text; "all": for each of its tokens
    limit    read so many texts
    tokens   read so many tokens of each
    widths   name of a layer -> width of its vectors, and the device on which they are added up
    skipped  texts without a token so far, and `read` the tokens
    """

    def __init__(
        self, engine: Engine, modules: dict[str, nn.Module], token: Token, limit: int | None = None, tokens: int | None = None
    ) -> None:
        self.engine, self.modules, self.token, self.limit, self.tokens = engine, modules, token, limit, tokens
        self.skipped = self.read = 0
        found, _ = hidden_states(engine, engine.lm.random_ids(1, 1), None, modules, lambda hidden: hidden[0, 0])
        self.widths = {name: (len(found[name]), _adding_device(found[name])) for name in modules}
        held = sum(vector.nbytes for vector in found.values()) if token == "all" else 1
        policy, self.size, self.most = engine.policy, None, tokens_of(held)  # tokens of a piece, and of a batch
        if policy.carry and not policy.single:
            size = min(chunk_of(engine.lm, replace(policy, windows=None)), self.most)
            self.size = max(1, size // policy.multiple) * policy.multiple
            self.most = min(self.most, self.size)
        self.longest = policy.longest if engine.lm.limit is None and self.size is None else engine.lm.limit

    def batches(self, source: Corpus, start: Point) -> Iterator[tuple[HiddenBatch | None, Point | None]]:
        """Yield the hidden states of the texts from a point on, and points from which a later reading may go on: then
        everything before has been yielded. Texts of a group have none, so that a later reading forms the same batches."""
        lm, policy, held = self.engine.lm, self.engine.policy, list[tuple[int, Tokens]]()
        rows = 1 if lm.codebooks is not None or policy.invariant else policy.batch_size
        readers = sequences(lm, source, by_document=True, limit=self.limit, tokens=self.tokens)
        with naming(str(source)):
            for number, reader in enumerate(islice(readers, start.text, None), start.text):
                inside = number == start.text and start.position > 0
                reader.skip = start.position if inside else 0
                text, rest = self._begun(reader)
                if inside or rest is not None:
                    yield from self._grouped(held, rows)
                    held = []
                    with naming(f"text {number}"):
                        yield from self._in_pieces(chain(text, rest or ()), start if inside else Point(start.which, number))
                elif text:
                    held.append((number, Tokens.joined(text)))
                else:
                    self.skipped += 1
                if len(held) == AHEAD * rows:
                    yield from self._grouped(held, rows)
                    yield None, Point(start.which, number + 1)
                    held = []
            yield from self._grouped(held, rows)

    def _begun(self, reader: TokenReader) -> tuple[list[Tokens], Iterator[Tokens] | None]:
        """The first tokens of a text, and the others if they are more than one step reads."""
        parts, rest, most = list[Tokens](), iter(reader), self.size or self.longest
        while most is None or sum(map(len, parts)) <= most:
            if (part := next(rest, None)) is None:
                return parts, None
            parts.append(part)
        return parts, rest

    def _grouped(self, texts: list[tuple[int, Tokens]], rows: int) -> Iterator[tuple[HiddenBatch, None]]:
        """Read short texts in batches, longest first."""
        for number, text in texts:
            with naming(f"text {number}"):
                check_vocabulary(text.ids, 0, self.engine.lm)
        for batch in batches([len(text) for _, text in texts], rows, self.most, self.engine.policy.call):
            waiting = [[texts[index] for index in batch]]
            while waiting:
                part = waiting.pop(0)
                found = unless_full(partial(self._side_by_side, part))
                if not isinstance(found, NoMemory):
                    yield self._checked(found), None
                    del found  # before the next step needs its memory
                elif len(part) > 1:
                    waiting = [part[: len(part) // 2], part[len(part) // 2 :], *waiting]
                else:
                    raise self._too_large(len(part[0][1]), found)

    def _side_by_side(self, texts: list[tuple[int, Tokens]]) -> HiddenBatch:
        numbers, lengths = np.array([number for number, _ in texts]), [len(text) for _, text in texts]
        ids = [self._ids(text) for _, text in texts]
        found, _ = self._step(pad_sequence(ids, batch_first=True) if len(ids) > 1 else ids[0][None], None, lengths)
        if self.token == "all":
            return HiddenBatch(numbers.repeat(lengths), np.concatenate([np.arange(length) for length in lengths]), found)
        if self.token == "mean":
            found = {name: sums / torch.tensor(lengths, device=sums.device)[:, None] for name, sums in found.items()}
        return HiddenBatch(numbers, np.array(lengths) - 1, found)

    def _in_pieces(self, tokens: Iterator[Tokens], point: Point) -> Iterator[tuple[HiddenBatch | None, Point]]:
        """Read one text in pieces, with the state carried, and yield a point after each."""
        state, at, vectors = point.state, point.position, point.vectors
        for piece in overlapping(tokens, self.size, 0, 0) if self.size else [Tokens.joined([*tokens])]:
            begin, at = at, at + len(piece)
            check_vocabulary(piece.ids, begin, self.engine.lm)
            if self.longest is not None and at > self.longest:
                raise StreamError(
                    f"it has more than the {self.longest:,} tokens that {self.engine.lm.spec} reads: what comes later would be "
                    f"read without its beginning. Read the first tokens of each text, tokens={self.longest}, or cut the texts."
                )
            read = unless_full(partial(self._step, self._ids(piece)[None], state, [len(piece)]))
            if isinstance(read, NoMemory):
                raise self._too_large(len(piece), read)
            found, state = read
            if self.token == "all":
                batch = HiddenBatch(np.full(len(piece), point.text), np.arange(begin, at), found)
                yield self._checked(batch), Point(point.which, point.text, at, state)
                del batch, found, read  # before the next step needs their memory
                continue
            vectors = {name: own + vectors.get(name, 0) for name, own in found.items()} if self.token == "mean" else found
            yield None, Point(point.which, point.text, at, state, vectors)
        ended = Point(point.which, point.text + 1)
        if self.token == "all":
            yield None, ended
            return
        vectors = {name: sums / at for name, sums in vectors.items()} if self.token == "mean" else vectors
        yield self._checked(HiddenBatch(np.array([point.text]), np.array([at - 1]), vectors)), ended

    def _ids(self, text: Tokens) -> Tensor:
        """Ids [t], or codes [k, t]."""
        return torch.from_numpy(text.ids.T if text.ids.ndim > 1 else text.ids).to(self.engine.lm.device)

    def _step(self, ids: Tensor, state: State, lengths: list[int]) -> tuple[dict[str, Tensor], State]:
        """The vectors, or their sums in float64, of rows of these lengths."""
        self.read += sum(lengths)
        last = torch.tensor(lengths) - 1

        def take(hidden: Tensor) -> Tensor:
            ends = last.to(hidden.device)
            if self.token == "last":
                return hidden[torch.arange(len(ends), device=hidden.device), ends]
            real = torch.arange(hidden.shape[1], device=hidden.device) <= ends[:, None]
            if self.token == "all":
                return hidden[real]
            hidden, real = (one.to(_adding_device(hidden)) for one in (hidden, real))
            return hidden.masked_fill(~real[..., None], 0).sum(dim=1, dtype=torch.float64)

        return hidden_states(self.engine, ids, state, self.modules, take)

    def _checked(self, batch: HiddenBatch) -> HiddenBatch:
        """The batch. Raises NotFiniteError for a number that is not finite, with text, token and layer."""
        for name, vectors in batch.vectors.items():
            if not (finite := vectors.isfinite().all(dim=1)).all():
                row = int((~finite).nonzero()[0])
                raise NotFiniteError(
                    f"text {batch.texts[row]}: the hidden state of {name} at token {batch.positions[row]} is not finite, so no "
                    "mean and no covariance would be. Weights of a larger range may help: @bf16 or @fp32."
                )
        return batch

    def _too_large(self, length: int, found: NoMemory) -> OutOfMemory:
        lm = self.engine.lm
        return OutOfMemory(
            f"{lm.spec} on {lm.device}: the hidden states of {length:,} tokens do not fit into memory. Read fewer layers, or "
            "the first tokens of each text: tokens=N.",
            found.wanted,
        )


def tokens_of(held: int) -> int:
    """Tokens of a step that returns so many bytes of hidden states for each."""
    return max(1, min(BUDGET // held, max(EFFICIENT, SMALL // held)))


def _adding_device(vectors: Tensor) -> torch.device:
    """The device of vectors, or the CPU if it has no float64."""
    return torch.device("cpu") if vectors.device.type == "mps" else vectors.device
