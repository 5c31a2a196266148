"""The laws about a state: copies of it are apart, a saved one goes on, and a constant one stays as large as it is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pytest_lmeval.engine import Engine
from pytest_lmeval.errors import NotPossible
from pytest_lmeval.laws._assertions import bit_equal, broken, near
from pytest_lmeval.laws._harness import FEW, MEMORY, Harness
from pytest_lmeval.laws._sequences import others
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.models._model import Model, State, fork, state_bytes, state_types
from pytest_lmeval.scoring._resume import safe_load


def fork_(harness: Harness, case: Case) -> None:
    ids, cut = harness.tokens(case.length, case.seed), case.cuts[0]
    known, rest = ids[..., :cut], ids[..., cut:]
    state = _read(harness.lm, known)
    with _possibly("its state cannot be forked"):
        branch, first = fork(state), fork(state)
        (straight,) = _take_turns(harness.lm, (rest, first))
        after, _ = _take_turns(harness.lm, (rest, branch), (others(harness.lm, rest), state))
    harness.calls += 1 + 3 * len(after)
    said = f"two continuations of one state after {cut} of its tokens saw each other"
    bit_equal(harness, case, straight, after, said, "A copy of the state shares something with it.", after=cut)


def resume(harness: Harness, case: Case) -> None:
    ids, cut = harness.tokens(case.length, case.seed), case.cuts[0]
    known, rest = ids[..., :cut], ids[..., cut:]
    state, file = _read(harness.lm, known), io.BytesIO()
    with _possibly("its state cannot be saved"):
        torch.save({"state": state}, file)
        (straight,) = _take_turns(harness.lm, (rest, state))
        saved = safe_load(file.getvalue(), harness.lm)["state"]
        (resumed,) = _take_turns(harness.fresh() or harness.lm, (rest, saved))
    harness.calls += 1 + 2 * len(resumed)
    said = f"saved after {cut} tokens and continued by a fresh copy of the model, came out otherwise than without the stop"
    why = "A part of its state is not in the state."
    near(harness, case, straight, resumed, said, why, after=cut)


@contextmanager
def _possibly(otherwise: str) -> Iterator[None]:
    """What is done here may not be possible with this model, and says nothing about it then."""
    try:
        yield
    except MEMORY:
        raise
    except Exception as error:
        raise NotPossible(f"{otherwise} ({in_a_line(error)})") from error


def _read(lm: Model, ids: Tensor) -> State:
    return Engine(lm).step(ids)[1]


def _take_turns(lm: Model, *continuations: tuple[Tensor, State]) -> list[Tensor]:
    """[t, v] or [t, s, v] logits of each continuation (ids, state): at most eight more tokens, one at a time, which every model
    that carries a state can do, and in turns."""
    count, engine = min(8, continuations[0][0].shape[-1]), Engine(lm)
    turns = zip(*(engine.steps(torch.split(ids[..., :count], 1, dim=-1), state) for ids, state in continuations), strict=True)
    found = [[logits[0, ..., -1, :] for logits, _ in turn] for turn in turns]
    return [torch.stack(logits) for logits in zip(*found, strict=True)]


def size(harness: Harness, case: Case) -> None:
    case = replace(case, length=harness.longest)
    held = state_sizes(harness, case)
    middle, end = held[2 * len(held) // 3], held[-1]
    if not harness.lm.constant_state or end[1] <= middle[1]:
        return
    if waiting := [boundary for boundary in harness.lm.boundaries if boundary >= middle[0]]:
        raise NotPossible(f"its state may grow until it has read {max(waiting)} tokens, and it was read only {end[0]}")
    raise broken(
        case,
        f"its state is declared constant, and grew from {middle[1]:,} bytes after {middle[0]} tokens to {end[1]:,} after "
        f"{end[0]}. A long text would need memory without end.",
        share=end[1] / middle[1],
    )


def state_sizes(harness: Harness, case: Case) -> list[tuple[int, int]]:
    """(tokens read, bytes of the state) while a sequence is read in even pieces."""
    length = min(case.length, FEW) if harness.goes_on is not None else case.length
    ids = harness.tokens(length, case.seed)
    pieces = torch.split(ids, 1 if harness.goes_on is not None else max(1, case.length // 12), dim=-1)
    held: list[tuple[int, int]] = []
    # a state that keeps its input keeps no view of all of it
    for piece, (_, state) in zip(pieces, Engine(harness.lm).steps(piece.clone() for piece in pieces), strict=True):
        harness.calls += 1
        held.append(((held[-1][0] if held else 0) + piece.shape[-1], state_bytes(state)))
    if not held[-1][1]:
        raise NotPossible(f"its state ({_kinds(state)}) holds no tensor that could be weighed")
    return held


def _kinds(state: State) -> str:
    return ", ".join(sorted(kind.__name__ for kind in state_types(state)))


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"
