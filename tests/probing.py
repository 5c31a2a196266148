"""Short ways to try laws in tests: decided by numbers of cases, never by a clock."""

from pytest_lmeval.errors import LawBroken
from pytest_lmeval.laws import check, edge_cases, probe
from pytest_lmeval.models._sources import as_model


def probed(model, *, examples=1, longest=72, **options):
    """The result of a probe with no limit of time: the edge cases, and a few random ones."""
    return probe(as_model(model), budget=1e6, examples=examples, longest=longest, **options)


def failure(law, harness, case):
    """The exception with which the model breaks the law on a case; None if it keeps it."""
    try:
        check(law, harness, case)
    except LawBroken as broken:
        return broken
    return None


def first_failure(laws, harness):
    """The first failure of one of the laws on the edge cases, short ones first; None if there is none."""
    cases = sorted(edge_cases(harness.longest), key=lambda case: case.length)
    return next((found for case in cases for law in laws if (found := failure(law, harness, case))), None)
