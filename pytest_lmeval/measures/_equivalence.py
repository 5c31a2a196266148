"""Which laws of streaming a model keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_lmeval.laws._probe import EquivalenceResult, probe, restore
from pytest_lmeval.measures._context import current, verb


@verb
def equivalence(
    lm: Any,
    *,
    profile: str | None = None,
    budget: float | None = None,
    examples: int | None = None,
    longest: int | None = None,
    known: Path | None = None,
) -> EquivalenceResult:
    """Which laws of streaming the model keeps (see `laws._probe` for the parameters); probed once in a run.

    Parameters that are not given are those of the command line. With any of them the model is probed for itself.
    """
    context = current()
    given = {"profile": profile, "budget": budget, "examples": examples, "longest": longest, "known": known}
    options = {name: value for name, value in given.items() if value is not None}
    model = context.model(lm)
    key = context.key("equivalence", model, options)
    if (finished := context.finished(key)) is not None:
        return restore(finished)
    probed = probe(model, **{**context.session.probe, **options}) if options else context.session.verdict(model)
    return context.recorded(key, probed)
