"""Read a part of the measured data a second time, and decide whether the two readings may differ.

The laws are tried on short random tokens; what is measured is longer, and real. So a twentieth of the work goes into trying
the same claim on the data itself: a text has the same losses in other chunks (`_text_audit`), and an answer the same
log-probabilities whichever others are read beside it or share its prefix (`_task_audit`). The laws tell rounding from faults.
What is read a second time depends on counts of tokens and calls, never on a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pytest_lmeval.engine import Engine
from pytest_lmeval.errors import LawBroken, NotPossible
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import CONSISTENT
from pytest_lmeval.records._measured import Record

if TYPE_CHECKING:
    from pytest_lmeval.laws._tolerance import Excess

SHARE = 1 / 20  # of the work of a measurement that its audit may take
GROSS = 10  # times the tolerance: a difference that no law explains is still none of rounding
UNEXPLAINED = "  Memory ran out when the laws were tried on it, so which of them is broken is not known."


def excess_of(found: np.ndarray, again: np.ndarray, lm: Model, rounding: float | None) -> Excess:
    """How far the losses [n] or [n, s] of a measurement are from those of a second reading, and how far they may be by the
    tolerance of the laws; `rounding` is the largest error of a full run in the probe."""
    from pytest_lmeval.laws._tolerance import Reference

    expected = torch.from_numpy(again).reshape(len(again), -1)
    reference = Reference(expected, torch.full((len(again),), rounding or 0.0, dtype=torch.float64), lm.dtype)
    return reference.measure(torch.from_numpy(found).reshape(len(found), -1))


def law_broken(engine: Engine, law: str, ids: np.ndarray, cuts: Sequence[int], cut: int, **company: Any) -> str | None:
    """The message of a law that is broken on these tokens, and a line that tries it again: on random tokens, cut once at `cut`
    or everywhere, if it is broken on these too. None if it is kept."""
    from pytest_lmeval.laws import Case, Harness, check

    lm, most = engine.lm, engine.policy.longest
    if lm.served is not None:  # there is no step to try a law on
        return "  The server has other log-probabilities for the same tokens: try its laws with lmeval.equivalence(lm)."
    case, longest = Case(len(ids), tuple(cuts), **company), len(ids)

    def failure(harness: Harness, case: Case) -> LawBroken | None:
        try:
            check(law, harness, case)
        except LawBroken as broken:
            return broken
        except NotPossible:
            pass
        return None

    if (broken := failure(Harness(lm, longest, most, text=ids), case)) is None:
        return None
    random = Harness(lm, longest, most)
    everywhere = f"tuple({cuts!r})" if isinstance(cuts, range) and len(cuts) > 1 else repr(tuple(cuts))
    for simple, shown in ((replace(case, cuts=(cut,)), repr((cut,))), (case, everywhere)):
        if failure(random, simple) is not None:
            others = "".join(f", {name}={value}" for name, value in company.items())
            return f'  {law}: {broken}\n    pytest_lmeval.replay(lm, "{law}", length={longest}, cuts={shown}{others})'
    others = "".join(f", {name}={value}" for name, value in company.items())
    return f'  {law}: {broken}\n    check("{law}", Harness(lm, {longest}, text=ids), Case({longest}, {everywhere}{others}))'


def spread_note(record: Record) -> list[str]:
    """What a number of 16 bits depends on, beside the model and the data, and by how much."""
    certificate = record.certificate
    if certificate is None or certificate.verdict != CONSISTENT or record.settings.get("invariant"):
        return []
    audit = certificate.audit
    spread, where = ("scores", "") if audit is None else (f"up to {audit.difference:.2g} nats a token", f" ({audit})")
    precision = "an unknown precision" if certificate.dtype == "unknown" else certificate.dtype
    return [f"{spread} in {precision} depend on batch, neighbours and chunks{where}; invariant=True fixes all shapes"]
