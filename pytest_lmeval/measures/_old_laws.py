"""Which laws of streaming a model keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_lmeval.measures.context import Desk

if TYPE_CHECKING:
    from pytest_lmeval.laws.probe import EquivalenceResult


def equivalence(desk: Desk, /, lm: Any, **options: Any) -> EquivalenceResult:
    """Which laws of streaming the model keeps (see `equivalence.probe.equivalence`); probed once in a session."""
    from pytest_lmeval.laws.probe import probe, restore

    model = desk.model(lm)
    key = desk.key("equivalence", model, options)
    if (finished := desk.finished(key)) is not None:
        return restore(finished)
    probed = probe(model, **{**desk.session.probe, **options}) if options else desk.session.verdict(model)
    return desk.recorded(key, probed)
