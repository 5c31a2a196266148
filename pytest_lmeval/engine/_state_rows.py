"""Rows of a state: how a state that several rows share is told apart, and put together again in another order.

    select = selection(lm)                    None where the model's state cannot be divided into rows
    state = select(state, [0, 0, 2])          row 0 twice, then row 2; what was given is left as it was

Nothing is known of a state but its tensors. Which of a tensor's axes runs over the rows is found by reading two rows and then
three of them: it is the one that has grown. Whether that is the whole truth is then tried: rows that were taken out of a state
must go on as they do alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Model, State
from pytest_lmeval.models._weak_cache import WeakCache

Select: TypeAlias = "Callable[[State, Sequence[int]], State]"
Path: TypeAlias = "tuple[str, ...]"

TRIED = 5  # tokens read before a state is divided
ROUNDING = 64  # units in the last place of the largest logit by which a row may differ that is read beside others
ALIKE = 8  # times less than two rows differ: low precision must not hide that one is taken for the other

SELECTIONS = WeakCache["Select | None"]()  # of loaded models, by `step_fn`: finding one takes 20 steps or so


def selection(lm: Model) -> Select | None:
    """How rows of the model's states are selected; None where they cannot be."""
    if not lm.stateful or lm.codebooks is not None:
        return None
    return SELECTIONS.value(lm.step_fn, lambda: _found(lm), stamp=fingerprint(lm))


def _found(lm: Model) -> Select | None:
    ids = lm.random_ids(3, TRIED + 2, seed=7)
    try:
        with torch.no_grad():
            (_, two), (_, three) = (lm.step(ids[:rows, :TRIED]) for rows in (2, 3))
            if (axes := _axes(two, three)) is None:
                return None
            _, state = lm.step(ids[:, :1])  # in another number of steps, and to another length
            for length in (1, 40):
                _, state = lm.step(lm.random_ids(3, length, seed=length), state)
                if {path for path, part in _leaves(state) if isinstance(part, Tensor)} != set(axes):
                    return None  # it has other tensors by then, whose rows are not known

            def select(state: State, rows: Sequence[int]) -> State:
                return _selected(state, rows, axes)

            return select if _goes_on(lm, ids, select) else None
    except Exception:  # noqa: BLE001 - a state that cannot be divided may fail in any way; then it is not
        return None


def _axes(two: State, three: State) -> dict[Path, int | None] | None:
    """The axis of rows of each tensor, None for those that have none; None where there is no telling."""
    plain, others = ({path: value for path, value in _leaves(state) if isinstance(value, int)} for state in (two, three))
    if plain != others:  # a number that grows with the rows: what it is for is not known
        return None
    small, large = ({path: value for path, value in _leaves(state) if isinstance(value, Tensor)} for state in (two, three))
    axes: dict[Path, int | None] = {}
    for path, tensor in small.items():
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


def _goes_on(lm: Model, ids: Tensor, select: Select) -> bool:
    """Whether selected rows go on as they do alone, token by token, and leave what they were taken from as it was."""
    order = [2, 0, 0]
    _, state = lm.step(ids[:, :TRIED])
    before = [tensor.clone() for tensor in _tensors(state)]
    there = _steps(lm, ids[order, TRIED:], select(state, order))
    alone = torch.cat([_steps(lm, ids[row : row + 1, TRIED:], lm.step(ids[row : row + 1, :TRIED])[1]) for row in order])
    allowed = ROUNDING * torch.finfo(alone.dtype).eps * float(alone.abs().max())
    untouched = all(torch.equal(tensor, was) for tensor, was in zip(_tensors(state), before, strict=True))
    error, apart = float((there - alone).abs().max()), float((alone[0] - alone[1]).abs().max())  # rows 2 and 0
    return untouched and bool(torch.isfinite(alone).all()) and error <= min(allowed, apart / ALIKE)


def _steps(lm: Model, ids: Tensor, state: State) -> Tensor:
    """Logits [b, t, v] of the ids, read one by one."""
    logits = []
    for place in range(ids.shape[1]):
        said, state = lm.step(ids[:, place : place + 1], state)
        logits.append(said)
    return torch.cat(logits, dim=1)


def _tensors(state: State) -> list[Tensor]:
    return [part for _, part in _leaves(state) if isinstance(part, Tensor)]


def _leaves(value: Any, path: Path = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors, modules and plain integers of a state, each with the names that lead to it."""
    if isinstance(value, Tensor | nn.Module | int):
        yield path, value
        return
    if value is None or isinstance(value, str | bytes | float | complex | type) or id(value) in above:
        return
    above = (*above, id(value))
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, (*path, str(key)), above)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _leaves(part, (*path, str(number)), above)
    if hasattr(value, "__dict__") and not callable(value):
        for name, part in vars(value).items():
            yield from _leaves(part, (*path, name), above)
