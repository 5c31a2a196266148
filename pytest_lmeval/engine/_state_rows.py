"""Select rows of a state, so that sequences that share a state can continue it in any order; join rows of several states.

The row axis of each tensor of a state is the one that grows from a batch of two rows to one of three. Then selected rows are
stepped on and compared with the same rows read alone. Rows of states after different numbers of tokens are joined if nothing
but their rows tells these states apart, as those of recurrent models; they are tried in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pytest_lmeval.models._failures import OUT_OF_MEMORY, NoMemory, failure_of, unless_full
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Model, State
from pytest_lmeval.models._weak_cache import WeakCache

Path: TypeAlias = "tuple[str, ...]"

READ = 5  # tokens read before a state is divided
PIECE, FAR = 40, 300  # tokens of a step, and those after which a state is joined with others
ROUNDING = 64  # tolerance for a row read in a batch: units in the last place of its largest logit
MARGIN = 8  # the tolerance is at most the difference of two rows over this: low precision must not hide a wrong row


@dataclass(frozen=True)
class Selection:
    """Copies rows of states: `select(state, [0, 0, 2])`.

    axes   the row axis of each tensor; None for a tensor without rows
    joins  whether rows of states after different numbers of tokens can be joined
    """

    axes: Mapping[Path, int | None]
    joins: bool = False

    def __call__(self, state: State, rows: Sequence[int]) -> State:
        return self.join([(state, rows)])

    def join(self, parts: Sequence[tuple[State, Sequence[int]]]) -> State:
        """A state of these rows of several states; of more than one only if `joins`."""
        found: dict[Path, list[Tensor]] = {}
        for state, rows in parts:
            for path, part in _of_type(state, Tensor).items():
                axis = self.axes[path]
                index = torch.tensor(rows, device=part.device)
                found.setdefault(path, []).append(part.detach() if axis is None else part.detach().index_select(axis, index))
        memo: dict[int, Any] = {}
        first = parts[0][0]
        for path, part in _leaves(first):
            if isinstance(part, Tensor) and id(part) not in memo:
                axis, selected = self.axes[path], found[path]
                memo[id(part)] = selected[0].clone() if axis is None else _joined(selected, axis)
            elif isinstance(part, nn.Module):
                memo[id(part)] = part
        return copy.deepcopy(first, memo)


SELECTIONS = WeakCache["Selection | None"]()  # by `step_fn`: finding one takes 40 steps or so


def selection(lm: Model) -> Selection | None:
    """What copies rows of the model's states; None if they have no rows, or if memory is too short to find out."""
    if not lm.stateful or lm.codebooks is not None:
        return None
    found = unless_full(lambda: SELECTIONS.value(lm.step_fn, lambda: _find(lm), stamp=fingerprint(lm)))
    return None if isinstance(found, NoMemory) else found


def _find(lm: Model) -> Selection | None:
    ids = lm.random_ids(3, READ + 2, seed=7)
    try:
        with torch.no_grad():
            (_, two), (_, three) = (lm.step(ids[:rows, :READ]) for rows in (2, 3))
            if (axes := _axes(two, three)) is None:
                return None
            _, state = lm.step(ids[:, :1])  # another number of steps, and another length
            for length in (1, PIECE):
                _, state = lm.step(lm.random_ids(3, length, seed=length), state)
                if set(_of_type(state, Tensor)) != set(axes):
                    return None  # it has other tensors by then, whose row axes are unknown
            select = Selection(axes)
            if not _continues_alone(lm, ids, select):
                return None
    except Exception as error:  # a state that cannot be divided may fail in any way
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        return None
    return replace(select, joins=_joins(lm, ids, select))


def _axes(two: State, three: State) -> dict[Path, int | None] | None:
    """The row axis of each tensor, None for a tensor without rows; None if the axes cannot be found."""
    if _of_type(two, int) != _of_type(three, int):  # a number that grows with the rows has an unknown meaning
        return None
    large = _of_type(three, Tensor)
    axes: dict[Path, int | None] = {}
    for path, tensor in _of_type(two, Tensor).items():
        other = large.get(path)
        if other is None or other.ndim != tensor.ndim:
            return None
        grown = [axis for axis, sizes in enumerate(zip(tensor.shape, other.shape, strict=True)) if sizes[0] != sizes[1]]
        if len(grown) > 1 or any((tensor.shape[axis], other.shape[axis]) != (2, 3) for axis in grown):
            return None
        axes[path] = grown[0] if grown else None
    return axes


def _joined(selected: Sequence[Tensor], axis: int) -> Tensor:
    return selected[0] if len(selected) == 1 else torch.cat(list(selected), axis)


def _continues_alone(lm: Model, ids: Tensor, select: Selection) -> bool:
    """Whether selected rows continue token by token as the same rows read alone, and leave the original state unchanged."""
    order = [2, 0, 0]
    _, state = lm.step(ids[:, :READ])
    before = {path: tensor.clone() for path, tensor in _of_type(state, Tensor).items()}
    selected = _steps(lm, ids[order, READ:], select(state, order))
    alone = torch.cat([_steps(lm, ids[row : row + 1, READ:], lm.step(ids[row : row + 1, :READ])[1]) for row in order])
    unchanged = all(torch.equal(tensor, before[path]) for path, tensor in _of_type(state, Tensor).items())
    return unchanged and _same(selected, alone)


def _joins(lm: Model, ids: Tensor, select: Selection) -> bool:
    """Whether rows of states after different numbers of tokens continue side by side as each does alone."""
    far = lm.random_ids(1, min(FAR, lm.limit or FAR), seed=8)
    try:
        with torch.no_grad():
            _, near = lm.step(ids[:, :READ])
            later: State = None
            for piece in torch.split(far[:, :-2], PIECE, dim=1):
                _, later = lm.step(piece, later)
                if not _alike(near, later, select.axes):
                    return False
            parts = [(near, [2]), (later, [0]), (near, [0])]
            following = torch.cat([ids[2:3, READ:], far[:, -2:], ids[:1, READ:]])
            alone = [_steps(lm, following[row : row + 1], select(*part)) for row, part in enumerate(parts)]
            return _same(_steps(lm, following, select.join(parts)), torch.cat(alone))
    except Exception as error:  # nor has a model to be able to read as far
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        return False


def _alike(one: State, other: State, axes: Mapping[Path, int | None]) -> bool:
    """Whether the states differ in nothing but their rows."""
    first, second = (_of_type(state, Tensor) for state in (one, other))
    if set(first) != set(second) or not any(axis is not None for axis in axes.values()):
        return False
    for path, axis in axes.items():
        tensors = first[path], second[path]
        shapes = [[size for place, size in enumerate(tensor.shape) if place != axis] for tensor in tensors]
        if shapes[0] != shapes[1] or tensors[0].dtype != tensors[1].dtype or (axis is None and not torch.equal(*tensors)):
            return False
    return _of_type(one, int) == _of_type(other, int)


def _same(found: Tensor, alone: Tensor) -> bool:
    """Whether three rows of logits are those of rows that were read alone, up to rounding."""
    tolerance = ROUNDING * torch.finfo(alone.dtype).eps * float(alone.abs().max())
    error, apart = float((found - alone).abs().max()), float((alone[0] - alone[1]).abs().max())  # of different texts
    return bool(torch.isfinite(alone).all()) and error <= min(tolerance, apart / MARGIN)


def _steps(lm: Model, ids: Tensor, state: State) -> Tensor:
    """Logits [b, t, v] of ids that are read one by one."""
    logits = []
    for input_ids in torch.split(ids, 1, dim=1):
        found, state = lm.step(input_ids, state)
        logits.append(found)
    return torch.cat(logits, dim=1)


def _of_type(state: State, kind: type) -> dict[Path, Any]:
    """The tensors, or the integers, of a state."""
    return {path: part for path, part in _leaves(state) if isinstance(part, kind)}


def _leaves(value: Any, path: Path = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors, modules and integers of a state, each with the names that lead to it."""
    if isinstance(value, Tensor | nn.Module | int):
        yield path, value
        return
    if value is None or isinstance(value, str | bytes | float | complex | type) or id(value) in above:
        return
    above = (*above, id(value))
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        parts += value.items()
    elif isinstance(value, list | tuple):
        parts += enumerate(value)
    if hasattr(value, "__dict__") and not callable(value):
        parts += vars(value).items()
    for name, part in parts:
        yield from _leaves(part, (*path, str(name)), above)
