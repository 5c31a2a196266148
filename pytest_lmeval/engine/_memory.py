"""Estimate what fits into memory, and read with less when it runs out."""

from __future__ import annotations

from dataclasses import replace

import torch

from pytest_lmeval.engine._policy import LOGITS_BUDGET, SMALLEST_CHUNK, Policy, chunk_of
from pytest_lmeval.models._failures import NoMemory, unless_full
from pytest_lmeval.models._free_memory import free_bytes
from pytest_lmeval.models._model import Model, state_bytes
from pytest_lmeval.models._weak_cache import WeakCache

SHORT, LONG = 8, 40  # tokens after which states are compared
SCORING = 3 * 4  # bytes that each logit takes while it is scored: float32, and twice as much beside it
PART_FOR_LOGITS = 32  # of a GPU's memory, one may be logits
SPARE = 0.9  # fraction of the free memory that is planned with
MOST_ROWS = 1024  # that are tried for --lmeval-batch auto
STATE_COSTS = WeakCache["tuple[int, int]"]()  # by `step_fn`


def row_bytes(lm: Model, tokens: int) -> int:
    """Bytes of the state of one row after so many tokens, as a line through its sizes after 8 and 40 tokens: more than it is
    where a window bounds it. 0 for a model without a state, or if memory is too short to find out."""
    if not lm.stateful or lm.codebooks is not None:
        return 0
    found = unless_full(lambda: STATE_COSTS.value(lm.step_fn, lambda: _state_cost(lm)))  # whatever its weights are
    if isinstance(found, NoMemory):
        return 0
    constant, per_token = found
    return constant + per_token * tokens


def _state_cost(lm: Model) -> tuple[int, int]:
    """(bytes, bytes a token) of the state of one row."""
    longest = min(LONG, lm.limit or LONG)
    short = min(SHORT, longest - 1)
    if not short:
        return 0, 0
    with torch.no_grad():
        small, large = [state_bytes(lm.step(lm.random_ids(1, length), keep=1)[1]) for length in (short, longest)]
    per_token = max(0, large - small) // (longest - short)
    return max(0, small - per_token * short), per_token


def most_logits(lm: Model) -> int:
    """Tokens of a call that may be scored within the budget for logits, at least 1: the same whenever it is asked."""
    budget = LOGITS_BUDGET
    if lm.device.type == "cuda":
        budget = max(budget, torch.cuda.get_device_properties(lm.device).total_memory // PART_FOR_LOGITS)
    return max(1, budget // (SCORING * lm.vocab_size))


def rows_that_fit(lm: Model, tokens: int, scored: int) -> int:
    """The largest power of two, 1 to 1,024, of rows of so many tokens, `scored` of which are scored, that fit into the free
    memory by estimate; 8 if that is unknown."""
    free, rows = free_bytes(lm.device), MOST_ROWS
    if free is None:
        return 8
    each = 2 * row_bytes(lm, tokens) + SCORING * lm.vocab_size * scored  # states: what is shared, and a copy to continue
    while rows > 1 and rows * each > SPARE * free:
        rows //= 2
    return rows


def fitting_chunks(lm: Model, policy: Policy, read: int, held: int, count: int) -> Policy:
    """The policy with chunks so small that the next `count` of them fit into the free memory by estimate: their logits, and a
    state that grows as before, to `held` bytes after `read` tokens. The same policy if its own fit, or if not even
    chunks of 16 tokens do. Activations
    are not counted: what they take is found by running out."""
    free, smaller = free_bytes(lm.device), policy
    while free is not None:
        size = chunk_of(lm, smaller)
        grown = held * count * size // read if read else 0
        if grown + SCORING * lm.vocab_size * size <= SPARE * free:
            return smaller
        if size <= SMALLEST_CHUNK or (halved := with_smaller_chunks(lm, smaller)) is None:
            return policy  # an estimate does not make a reading so slow
        smaller = halved
    return policy


def with_less(policy: Policy, rows: int, tokens: int) -> Policy | None:
    """The policy after a step of so many rows and tokens did not fit: half the rows, or steps of half the tokens; None if it
    allows neither."""
    fewer_rows = replace(policy, batch_size=max(1, min(policy.batch_size, rows) // 2)) if policy.batch_size > 1 else None
    half = tokens // 2 // policy.multiple * policy.multiple
    if (rows == 1 or fewer_rows is None) and policy.carry and not policy.single and half:
        return replace(policy, longest=half)
    return fewer_rows


def with_smaller_chunks(lm: Model, policy: Policy) -> Policy | None:
    """The policy with half the tokens in a chunk; None if it allows no smaller ones."""
    half = chunk_of(lm, policy) // 2 // policy.multiple * policy.multiple
    if not policy.carry or not half:
        return None
    return replace(policy, chunk_size=half)
