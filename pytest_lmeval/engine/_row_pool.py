"""Generate answers in the rows of a batch: as one ends, the next prompt takes its row (continuous batching).

The rows of a state may be at different positions, since states after any number of tokens have one shape.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from pytest_lmeval.engine._generation import Answer
from pytest_lmeval.engine._results import NOTHING_READ, Deferred
from pytest_lmeval.engine._state_rows import Selection
from pytest_lmeval.models._model import State

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine
    from pytest_lmeval.engine._executor import Choose


class Waiting(NamedTuple):
    """An answer that is to be generated.

    before  the state after all of its prompt but the last token, in this row of it; NOTHING_READ for a prompt of one token
    last    the last token of its prompt
    """

    answer: Answer
    before: Deferred
    row: int
    last: int


def answer_in_rows(engine: Engine, select: Selection, waiting: Sequence[Waiting], choose: Choose) -> None:
    """Generate each answer until it ends, `batch_size` of them at a time, a token of each in a step.

    waiting  in turn; prompts of one token form one batch of their own
    """
    queue = deque(waiting)
    active: list[Answer] = []
    state: State = None
    rows, held = list[int](), 0  # of the state, those that the active answers continue, and how many it has
    while queue or active:
        ids = [answer.ids[-1] for answer in active]
        parts = [(state, rows)] if active else []
        while queue and len(active) < engine.policy.batch_size:
            answer, before, row, last = queue.popleft()
            active.append(answer)
            ids.append(last)
            if before is not NOTHING_READ:
                parts.append((before.get(), [row]))
        if parts and (len(parts) > 1 or not rows or len(rows) < held):
            state = select.join(parts)
        parts, held = [], len(active)
        logits, state = engine.prefill(torch.tensor(ids, device=engine.lm.device)[:, None], state)
        engine.counts.add(len(ids), 0)
        engine.counts.hold(state)
        for answer in active:
            answer.read += 1
        choose(logits[:, -1], active)
        rows = [row for row, answer in enumerate(active) if not answer.why]
        active = [active[row] for row in rows]
