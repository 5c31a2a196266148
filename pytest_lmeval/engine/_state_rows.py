"""Select rows of a state, so that sequences that share a state can continue it in any order.

The row axis of each tensor of a state is the one that grows from a batch of two rows to one of three. Then selected rows are
stepped on and compared with the same rows read alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pytest_lmeval.models._failures import OUT_OF_MEMORY, NoMemory, failure_of, unless_full
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Model, State
from pytest_lmeval.models._weak_cache import WeakCache

Select: TypeAlias = "Callable[[State, Sequence[int]], State]"
Path: TypeAlias = "tuple[str, ...]"

READ = 5  # tokens read before a state is divided
ROUNDING = 64  # tolerance for a row read in a batch: units in the last place of its largest logit
MARGIN = 8  # the tolerance is at most the difference of two rows over this: low precision must not hide a wrong row

SELECTIONS = WeakCache["Select | None"]()  # by `step_fn`: finding one takes 20 steps or so


def selection(lm: Model) -> Select | None:
    """A function that copies rows of a state: `select(state, [0, 0, 2])`; None if the model's states have no rows, or if memory
    is too short to find out."""
    if not lm.stateful or lm.codebooks is not None:
        return None
    found = unless_full(lambda: SELECTIONS.value(lm.step_fn, lambda: _find(lm), stamp=fingerprint(lm)))
    return None if isinstance(found, NoMemory) else found


def _find(lm: Model) -> Select | None:
    ids = lm.random_ids(3, READ + 2, seed=7)
    try:
        with torch.no_grad():
            (_, two), (_, three) = (lm.step(ids[:rows, :READ]) for rows in (2, 3))
            if (axes := _axes(two, three)) is None:
                return None
            _, state = lm.step(ids[:, :1])  # another number of steps, and another length
            for length in (1, 40):
                _, state = lm.step(lm.random_ids(3, length, seed=length), state)
                if set(_of_type(state, Tensor)) != set(axes):
                    return None  # it has other tensors by then, whose row axes are unknown
            select = partial(_selected, axes=axes)
            return select if _continues_alone(lm, ids, select) else None
    except Exception as error:  # a state that cannot be divided may fail in any way
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        return None


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


def _selected(state: State, rows: Sequence[int], axes: dict[Path, int | None]) -> State:
    memo: dict[int, Any] = {}
    for path, part in _leaves(state):
        if isinstance(part, Tensor) and id(part) not in memo:
            axis = axes[path]
            index = torch.tensor(rows, device=part.device)
            memo[id(part)] = part.detach().clone() if axis is None else part.detach().index_select(axis, index)
        elif isinstance(part, nn.Module):
            memo[id(part)] = part
    return copy.deepcopy(state, memo)


def _continues_alone(lm: Model, ids: Tensor, select: Select) -> bool:
    """Whether selected rows continue token by token as the same rows read alone, and leave the original state unchanged."""
    order = [2, 0, 0]
    _, state = lm.step(ids[:, :READ])
    before = {path: tensor.clone() for path, tensor in _of_type(state, Tensor).items()}
    selected = _steps(lm, ids[order, READ:], select(state, order))
    alone = torch.cat([_steps(lm, ids[row : row + 1, READ:], lm.step(ids[row : row + 1, :READ])[1]) for row in order])
    tolerance = ROUNDING * torch.finfo(alone.dtype).eps * float(alone.abs().max())
    unchanged = all(torch.equal(tensor, before[path]) for path, tensor in _of_type(state, Tensor).items())
    error, apart = float((selected - alone).abs().max()), float((alone[0] - alone[1]).abs().max())  # rows 2 and 0
    return unchanged and bool(torch.isfinite(alone).all()) and error <= min(tolerance, apart / MARGIN)


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
