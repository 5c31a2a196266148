"""Find which laws of streaming a model keeps: the verb `equivalence`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_lmeval.laws._probe import EquivalenceResult
from pytest_lmeval.measures._context import current, shared_verb


@shared_verb
def equivalence(
    lm: Any,
    *,
    profile: str | None = None,
    budget: int | None = None,
    examples: int | None = None,
    longest: int | None = None,
    counterexamples: Path | None = None,
) -> EquivalenceResult:
    """Find which laws of streaming the model keeps (see `laws._probe.probe` for the parameters).

    By default the parameters are those of the command line, and a model is probed once in a run; with any of them, anew.
    """
    given = ("profile", profile), ("budget", budget), ("examples", examples), ("longest", longest)
    options = {name: value for name, value in (*given, ("counterexamples", counterexamples)) if value is not None}
    context = current()
    model = context.model(lm)
    key = context.key("equivalence", model, {**context.session.probe, **options})
    if (finished := context.finished(key)) is not None:
        return EquivalenceResult(finished)
    probed = context.session.probed(model, **options) if options else context.session.verdict(model)
    return context.recorded(key, probed)
