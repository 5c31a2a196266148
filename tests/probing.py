"""Short ways to try laws in tests."""

from pytest_lmeval.errors import LawBroken
from pytest_lmeval.laws import Case, check, edge_cases, probe
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._certificate import EXACT, Certificate, LawResult

LAWS = ("repeat", "isolation", "causality", "prefix", "splits", "steps", "fork", "resume", "rows", "size", "sums")


def certificate(verdict=EXACT, dtype="float32", *, unavailable=(), rounding=2e-6, packed=False):
    """What a probe says that found nothing, right or wrong."""
    laws = {
        name: LawResult(cases=9, unavailable="it cannot" if name in unavailable else None)
        for name in (*LAWS, *["packed"] * packed)
    }
    return Certificate(verdict=verdict, dtype=dtype, laws=laws, longest=320, rounding=rounding)


def probed(model, *, budget=20_000, examples=1, **options):
    """The result of a probe: the floors of the laws, and some of the edge cases."""
    return probe(as_model(model), budget=budget, examples=examples, **options)


def failure(law, harness, case):
    """The exception with which the model breaks the law on a case; None if it keeps it."""
    try:
        check(law, harness, case)
    except LawBroken as broken:
        return broken
    return None


def first_failure(laws, harness):
    """The first failure of one of the laws on the edge cases and on single tokens, short ones first; None if there is none."""
    cases = sorted([*edge_cases(harness.longest), Case(48, seed=1)], key=lambda case: case.length)
    return next((found for case in cases for law in laws if (found := failure(law, harness, case))), None)
