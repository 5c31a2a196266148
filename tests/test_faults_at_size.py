"""A fault in a transformers model is found wherever it begins: by the probe, or by the audit of what is measured."""

import pytest

pytest.importorskip("transformers")

from faults_at_size import FAR, FAULTS, INSIDE, PAST, PLACES, certificate_of, planted, random_llama, refusal

from pytest_lmeval import as_model, replay
from pytest_lmeval.errors import LawBroken

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
def test_the_probe_finds_a_fault_that_begins_inside_the_floors(clean, fault):
    certificate = certificate_of(as_model(planted(clean, fault.model, fault.at[INSIDE])))
    assert certificate.verdict not in (EXACT, "unproven")
    assert certificate.broken


@pytest.mark.thorough
@pytest.mark.parametrize("place", [PAST, FAR])
@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_the_audit_finds_a_fault_that_begins_past_them(clean, fault, place):
    lm = as_model(planted(clean, fault.model, fault.at[place]))
    if not certificate_of(lm).broken:
        assert refusal(lm, fault, place)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["positions-restart", "rows-leak", "single-tokens"])
def test_the_audit_stops_no_right_model(clean, name):
    fault = next(fault for fault in FAULTS if fault.name == name)
    lm = as_model(clean)
    assert certificate_of(lm).verdict == EXACT
    assert refusal(lm, fault, FAR) is None


def test_there_are_many_kinds_each_at_three_places():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 12
    assert all(list(fault.at) == list(PLACES) and sorted(fault.at.values()) == list(fault.at.values()) for fault in FAULTS)
