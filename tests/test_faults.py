"""Every planted fault breaks one of its laws, and no correct model breaks any."""

import pytest
import torch
from clean_models import CLEAN
from faults import FAULTS
from probing import first_failure, probed

from pytest_lmeval.laws import Harness
from pytest_lmeval.models._sources import as_model

VERDICTS = {  # a fault for each way in which a verdict is reached; the others are probed by the thorough tests
    "prefill-starts-over": "exact-step-only",
    "state-dropped": "inexact",
    "sees-all": "non-causal",
    "base-follows-length": "length-dependent",
    "filled-up": "exact-multiple-of-4",
    "left-over": "inexact",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_breaks_one_of_its_laws_on_an_edge_case(fault):
    assert first_failure(sorted(fault.breaks), Harness(as_model(fault.model())))


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=fault.name, marks=[] if fault.name in VERDICTS else pytest.mark.thorough) for fault in FAULTS],
)
def test_the_probe_reaches_the_verdict_on_a_planted_fault(fault):
    result = probed(fault.model(), budget=None)
    assert result.verdict not in ("exact-any-chunk", "consistent", "stateless")
    assert result.verdict == VERDICTS.get(fault.name, result.verdict)
    assert result.certificate.broken & fault.breaks, result


@pytest.mark.parametrize(
    ("dtype", "budget"),
    [
        (torch.float32, 20_000),
        pytest.param(torch.float32, 300_000, marks=pytest.mark.thorough),
        pytest.param(torch.bfloat16, 100_000, marks=pytest.mark.thorough),  # the benchmark has the other two
    ],
)
@pytest.mark.parametrize("name", CLEAN)
def test_a_correct_model_breaks_no_law(name, dtype, budget):
    result = probed(CLEAN[name]().to(dtype), budget=budget, examples=10)
    assert result.certificate.broken == frozenset(), result
    assert result.verdict == ("exact-any-chunk" if dtype == torch.float32 else "consistent")


def test_the_catalogue_has_every_kind_of_fault_and_every_law():
    assert {fault.kind for fault in FAULTS} - {"+"} == {f"F{n}" for n in range(1, 30)}
    assert VERDICTS.keys() <= {fault.name for fault in FAULTS}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 90
    assert {law for fault in FAULTS for law in fault.breaks} == {
        "splits", "steps", "causality", "prefix", "rows", "fork", "isolation", "size", "resume", "repeat",
    }  # fmt: skip
