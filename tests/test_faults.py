"""Every planted fault is caught, and no correct model is accused of one.

Faults are given one of the default's sixty random cases, and a busy machine more time for them than the default's two
seconds; with these, `benchmarks/test_faults.py` counts what is caught, in all precisions.
"""

import pytest
import torch
from clean_models import CLEAN
from faults import FAULTS

from pytest_lmeval.laws import probe
from pytest_lmeval.models._sources import as_model


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault):
    result = probe(as_model(fault.model()), examples=1, budget=6.0)
    assert result.verdict not in ("exact-any-chunk", "consistent", "stateless")
    assert result.certificate.broken & fault.breaks, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # the benchmark has the other two
@pytest.mark.parametrize("name", CLEAN)
def test_a_correct_model_is_not_accused(name, dtype):
    model = CLEAN[name]().to(dtype)
    result = probe(as_model(model))
    assert result.certificate.broken == frozenset(), result
    assert result.verdict == ("exact-any-chunk" if dtype == torch.float32 else "consistent")


def test_the_catalogue_is_whole():
    numbers = {fault.number for fault in FAULTS} - {"+"}
    assert numbers == {f"F{n}" for n in range(1, 30)}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    assert {law for fault in FAULTS for law in fault.breaks} >= {
        "splits", "steps", "causality", "prefix", "rows", "fork", "isolation", "size", "resume", "repeat",
    }  # fmt: skip
