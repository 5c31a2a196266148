"""A fault in a transformers model is found wherever it begins: by the floors of the laws, or by the audit of measured data."""

import pytest

pytest.importorskip("transformers")

from faults_at_size import FAR, FAULTS, INSIDE, PAST, PLACES, planted, random_llama, refusal

from pytest_lmeval import as_model, replay
from pytest_lmeval.errors import LawBroken
from pytest_lmeval.laws import probe

EXACT = "exact-any-chunk"
IDS = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def clean():
    return random_llama()


@pytest.mark.parametrize("place", [INSIDE, *(pytest.param(place, marks=pytest.mark.thorough) for place in (PAST, FAR))])
@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_a_planted_fault_breaks_its_law_past_its_place_and_the_right_model_does_not(clean, fault, place):
    case = fault.case(place)
    replay(clean, fault.law, longest=case["length"] + 8, **case)
    with pytest.raises(LawBroken):
        replay(planted(clean, fault.model, fault.at[place]), fault.law, longest=case["length"] + 8, **case)


@pytest.mark.thorough
@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_the_floors_find_a_fault_that_begins_inside_them(clean, fault):
    certificate = probe(planted(clean, fault.model, fault.at[INSIDE]), budget=1).certificate
    assert certificate.broken, certificate.summary
    assert certificate.verdict not in (EXACT, "unproven")


@pytest.fixture(scope="module")
def certificate(clean):
    """Of the right model, and so of any whose fault begins past what was tried."""
    found = probe(clean, budget=1).certificate
    assert found.verdict == EXACT
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("place", [PAST, FAR])
@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_the_audit_finds_a_fault_that_begins_past_them(clean, certificate, fault, place):
    assert refusal(as_model(planted(clean, fault.model, fault.at[place])), certificate, fault, place)


@pytest.mark.thorough
@pytest.mark.parametrize("shows", ["text", "choices", "answer"])
def test_the_audit_stops_no_right_model(clean, certificate, shows):
    assert refusal(as_model(clean), certificate, next(fault for fault in FAULTS if fault.shows == shows), FAR) is None


def test_there_are_many_kinds_each_at_three_places():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 12
    assert all(list(fault.at) == list(PLACES) and sorted(fault.at.values()) == list(fault.at.values()) for fault in FAULTS)
