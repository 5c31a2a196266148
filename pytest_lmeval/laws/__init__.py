"""The laws of a language model that streams, and the probe that finds which of them a model keeps.

    probe(lm)              every law, a verdict and a certificate
    replay(lm, "splits", ...)    one counterexample, again

and for hypothesis tests of your own:

    harness = Harness(as_model(my_model))

    @given(case=cases(longest=100, boundaries=(16,)))
    def test_my_cache_is_exact(case):
        check("splits", harness, case)
"""

from pytest_lmeval.errors import LawBroken, NotPossible
from pytest_lmeval.laws._checks import LAWS, check
from pytest_lmeval.laws._harness import Harness
from pytest_lmeval.laws._probe import probe, replay
from pytest_lmeval.laws._strategies import Case, cases, compositions, edge_cases

__all__ = [
    "LAWS",
    "Case",
    "Harness",
    "LawBroken",
    "NotPossible",
    "cases",
    "check",
    "compositions",
    "edge_cases",
    "probe",
    "replay",
]
