"""Generate answers side by side in one row of a state: as one ends, the next prompt takes its place (continuous batching).

The state has a column for each token read. A token sees the columns of its own sequence; prompts share those of their common
beginning, which is read once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.models._model import Packing, State
from pytest_lmeval.records._certificate import Costs

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine
    from pytest_lmeval.engine._executor import Choose


@dataclass(eq=False)
class _Sequence:
    """A prompt and its answer.

    pending  ids to read next, after those at the columns of `path`
    """

    answer: Answer
    pending: list[int]
    path: list[int] = field(default_factory=list)


class Pool:
    """Answers that are generated together, after a shared beginning.

    most   tokens of a call
    state  after the shared beginning of `start` tokens; not written to
    """

    def __init__(self, engine: Engine, costs: Costs, most: int, state: State, start: int) -> None:
        packing = engine.lm.packing
        assert packing is not None
        self.engine, self.costs, self.most, self.start = engine, costs, most, start
        self.packing: Packing = packing
        self.state = self._taken(state, range(start)) if start else None
        self.columns = start
        self._after: dict[tuple[int, int], int] = {}  # (column of a token of a prompt, the next token) -> its column

    def answer(self, rows: Sequence[tuple[Answer, np.ndarray]], choose: Choose) -> None:
        """Generate each answer until it ends; rows are answers with the ids [n] of their prompts after the beginning."""
        waiting = deque(_Sequence(answer, ids.tolist()) for answer, ids in rows)
        active: list[_Sequence] = []
        while waiting or active:
            new = [waiting.popleft() for _ in range(min(len(waiting), self.engine.policy.batch_size - len(active)))]
            for sequence in new:
                self._read_apart(sequence)
            active += new
            choose(self._read(active), [sequence.answer for sequence in active])
            active = [sequence for sequence in active if not sequence.answer.why]
            for sequence in active:
                sequence.pending = [sequence.answer.ids[-1]]
            if waiting or active:
                self._compact(active, waiting)

    def _read(self, active: Sequence[_Sequence]) -> Tensor:
        """Read what each sequence has pending; returns the logits [n, v] after each."""
        fed: list[tuple[_Sequence, int]] = []  # each token read, by its index in its sequence
        ids, last = list[int](), list[int]()
        for sequence in active:
            self._share(sequence)
            for token in sequence.pending:
                column = self.columns + len(fed)
                if len(sequence.pending) > 1:  # a prompt
                    self._after.setdefault((self._end(sequence), token), column)
                fed.append((sequence, len(sequence.path)))
                ids.append(token)
                sequence.path.append(column)
            sequence.answer.read += len(sequence.pending)
            last.append(len(fed) - 1)
        found = []
        for begin in range(0, len(fed), self.most):
            part = fed[begin : begin + self.most]
            visible = np.zeros((len(part), self.columns + len(part)), dtype=bool)
            visible[:, : self.start] = True
            for row, (sequence, index) in enumerate(part):
                visible[row, sequence.path[: index + 1]] = True
            positions = np.array([self.start + index for _, index in part])
            wanted = [index - begin for index in last if begin <= index < begin + len(part)]
            logits = self._step(ids[begin : begin + len(part)], positions, visible, np.array(wanted or [0]))
            found.append(logits[: len(wanted)])
        return torch.cat(found)

    def _step(self, ids: list[int], positions: np.ndarray, visible: np.ndarray, wanted: np.ndarray) -> Tensor:
        device, counts = self.engine.lm.device, self.engine.counts
        arrays = [torch.from_numpy(array).to(device) for array in (positions, visible, wanted)]
        input_ids = torch.tensor([ids], device=device)
        logits, self.state = self.engine.packed_step(input_ids, self.state, *arrays, more=True)
        self.columns += len(ids)
        counts.add(len(ids), 0)
        counts.hold(self.state)
        return logits

    def _share(self, sequence: _Sequence) -> None:
        """Let a prompt begin with the columns that another one has read; its last token it reads itself."""
        while len(sequence.pending) > 1 and (column := self._after.get((self._end(sequence), sequence.pending[0]))) is not None:
            sequence.path.append(column)
            del sequence.pending[0]

    def _end(self, sequence: _Sequence) -> int:
        return sequence.path[-1] if sequence.path else -1

    def _read_apart(self, sequence: _Sequence) -> None:
        """Read a long prompt alone, but for its last token: in the pool, each is compared with the columns of others, too."""
        self._share(sequence)
        ids, others = sequence.pending[:-1], self.columns - self.start - len(sequence.path)
        if not self.costs.reach or len(ids) * others <= self.costs.call * self.costs.reach:
            return
        own = [*range(self.start), *sequence.path]
        _, state = self.engine.prefill(
            torch.tensor([ids], device=self.engine.lm.device), self._taken(self.state, own) if own else None
        )
        self.engine.counts.add(len(ids), 0)
        self.state = self.packing.join([self.state, self._taken(state, range(len(own), len(own) + len(ids)))])
        self.engine.counts.hold(self.state)
        for token in ids:
            self._after.setdefault((self._end(sequence), token), self.columns)
            sequence.path.append(self.columns)
            self.columns += 1
        sequence.answer.read += len(ids)
        del sequence.pending[:-1]

    def _compact(self, active: Sequence[_Sequence], waiting: Sequence[_Sequence]) -> None:
        """Drop the columns that no sequence sees or will share, once they are more than half."""
        kept = {column for sequence in active for column in sequence.path}
        for sequence in waiting:
            end = -1
            for token in sequence.pending[:-1]:
                if (end := self._after.get((end, token), -1)) < 0:
                    break
                kept.add(end)
        columns = [*range(self.start), *sorted(kept)]
        if 2 * len(columns) >= self.columns:
            return
        self.state = self._taken(self.state, columns) if columns else None
        new = {column: index for index, column in enumerate(columns)} | {-1: -1}
        for sequence in active:
            sequence.path = [new[column] for column in sequence.path]
        self._after = {
            (new[before], token): new[column]
            for (before, token), column in self._after.items()
            if before in new and column in new
        }
        self.columns = len(columns)

    def _taken(self, state: State, columns: Sequence[int]) -> State:
        return self.packing.take(state, torch.tensor(columns, device=self.engine.lm.device))
