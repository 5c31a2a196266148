"""The law `packed`: several continuations of one beginning, read in one row with a mask, read as each would alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pytest_lmeval.engine import Engine, Request
from pytest_lmeval.engine._packed import arranged, with_parents
from pytest_lmeval.engine._tree import tree
from pytest_lmeval.errors import NotPossible
from pytest_lmeval.laws._diagnosis import one_line
from pytest_lmeval.laws._harness import RAW, Harness
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.laws._tolerance import log_probabilities
from pytest_lmeval.models._failures import OUT_OF_MEMORY, failure_of
from pytest_lmeval.models._model import State, fork

LEAST_LEAVES, KINDS = 6, 3  # sequences of a tree: six to eight


def packed(harness: Harness, case: Case) -> None:
    """Read a tree of sequences in one row: after a state if the case is cut, and then in two calls, whose columns are copied.

    Raises NotPossible where the model cannot do it, or reads otherwise then: it is not wrong, and is read in another way.
    """
    if harness.lm.packing is None:
        raise NotPossible("how to give it a mask of one's own is not known")
    if harness.largest_continuation is not None:
        raise NotPossible("its state cannot be continued by several tokens")
    cut = case.cuts[0] if case.cuts else 0
    texts, state = _texts(harness, case, cut), harness.state_after(case.seed, cut) if cut else None
    reference = harness.reference(case.seed, case.length)
    first = replace(reference, expected=reference.expected[cut:], full_error=reference.full_error[cut:])
    try:
        alone = [log_probabilities(_read_alone(harness, text[cut:], fork(state))) for text in texts[1:]]
        found = _read_in_one_row(harness, texts, state, cut)
    except Exception as error:
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        raise NotPossible(f"it does not read several sequences in one row ({one_line(error)})") from error
    alone.insert(0, first.expected[: case.length - cut])
    runs = [log_probabilities(logits) for logits in found]
    excesses = [replace(first, expected=expected).measure(run) for expected, run in zip(alone, runs, strict=True)]
    ids = [torch.from_numpy(text[None]).to(harness.lm.device) for text in texts]
    excess, number = harness.worst_of(excesses, runs, list(zip(ids, alone, strict=True)))
    harness.note("packed", excess, f"{case}, sequence {number} of {len(texts)} in one row")
    if not excess.tolerance_ratio <= 1:
        after = f" after {cut} tokens" if cut else ""
        raise NotPossible(
            f"{len(texts)} sequences of up to {case.length} tokens (seed {case.seed}) were read in one row{after}, with a mask "
            f"by which each sees its own past, and sequence {number} is not what it is alone: {excess}"
        )


def _read_alone(harness: Harness, ids: np.ndarray, state: State) -> torch.Tensor:
    """The logits [t, v] of the tokens after a state, which is written to."""
    return Engine(harness.lm, RAW).step(torch.from_numpy(ids[None]).to(harness.lm.device), state)[0][0]


def _texts(harness: Harness, case: Case, cut: int) -> list[np.ndarray]:
    """Sequences that share beginnings, the first `cut` tokens at least; the first is that of the seed."""
    found = [harness.tokens(case.length, case.seed)[0].cpu().numpy()]
    for number in range(1, LEAST_LEAVES + (case.rows - 1) % KINDS):
        parent = found[number // 2]
        shared = cut + (len(parent) - cut) * (1 + number % 3) // 4
        end = max(shared + 1, case.length - number % 5)
        own = harness.tokens(end, case.seed + 1000 + number)[0, shared:].cpu().numpy()
        found.append(np.concatenate([parent[:shared], own]))
    return found


def _read_in_one_row(harness: Harness, texts: list[np.ndarray], state: State, cut: int) -> list[torch.Tensor]:
    """The logits [t - cut, v] of each text, whose first `cut` tokens the state has read."""
    requests = [Request(np.append(ids, 0), cut + 1) for ids in texts]  # the last token is not read
    nodes = list(with_parents(tree(requests, start=cut, step=0)))
    ids, *arrays, begins = arranged(nodes)
    tokens, device = len(ids), harness.lm.device
    input_ids, (positions, visible) = torch.from_numpy(ids[None]).to(device), [torch.from_numpy(a).to(device) for a in arrays]
    engine, parts, packing = Engine(harness.lm, RAW), list[torch.Tensor](), harness.lm.packing
    assert packing is not None
    half = tokens // 2 if cut else tokens
    for begin, end in ((0, half), (half, tokens)) if cut else ((0, tokens),):
        wanted = torch.arange(end - begin, device=device)
        part = positions[begin:end], visible[begin:end, : cut + end], wanted
        logits, state = engine.packed_step(input_ids[:, begin:end], state, *part, more=end < tokens)
        parts.append(logits)
        if end < tokens:
            columns = torch.arange(cut + end, device=device)
            state = packing.join([packing.take(state, columns[:cut]), packing.take(state, columns[cut:])])
    logits = torch.cat(parts)
    found = [logits.new_zeros(len(text) - cut, logits.shape[-1]) for text in texts]
    for (node, _), begin in zip(nodes, begins, strict=True):
        for number, first, last in node.wanted:
            own = begin + first - node.start
            found[number][first - cut : last - cut] = logits[own : own + last - first]
    return found
