"""Show which law catches which planted fault, what a verdict costs, and which faults 16 bits hide.

The faults are those of `tests/faults.py`: correct tiny models with one fault each, most of them seen in real systems.
"""

import statistics

import pytest
import torch
from clean_models import CLEAN
from faults import FAULTS

from pytest_lmeval.laws import LAWS, probe
from pytest_lmeval.models._sources import as_model

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

PRECISIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def test_every_fault_is_caught(capsys):
    rows, missed, seconds, calls = [], [], [], []
    for fault in FAULTS:
        result = probe(as_model(fault.model()))
        broken = result.certificate.broken
        rows.append(
            f"{fault.kind:>4} {fault.name:32}" + " ".join(("x" if law in broken else "").center(len(law)) for law in LAWS)
        )
        missed += [] if broken & fault.breaks else [fault.name]
        seconds.append(result.record.cost.seconds)
        calls.append(result.record.details["calls"])
    with capsys.disabled():
        print("\n", " " * 36, " ".join(LAWS))
        print("\n".join(rows))
        print(f"{len(FAULTS) - len(missed)} of {len(FAULTS)} planted faults caught; missed: {missed or 'none'}")
        print(f"median of a verdict: {statistics.median(seconds):.2f} s and {statistics.median(calls):.0f} calls")
    assert not missed


def test_no_correct_model_breaks_a_law(capsys):
    false_alarms = []
    for name, model in CLEAN.items():
        for dtype in PRECISIONS:
            certificate = probe(as_model(model().to(dtype))).certificate
            false_alarms += [(name, dtype, certificate.broken)] if certificate.broken else []
            with capsys.disabled():
                print(f"\n{name:16} {dtype!s:16} {certificate.verdict:16} worst ratio {certificate.worst_ratio:.2f}", end="")
    with capsys.disabled():
        print(f"\n{len(false_alarms)} false alarms on {len(CLEAN)} models in {len(PRECISIONS)} precisions")
    assert not false_alarms


def test_half_of_the_faults_are_found_in_bfloat16(capsys):
    """The others are found in a copy in float32, or are smaller than the rounding of 16 bits."""
    alone, by_copy, hidden = [], [], []
    for fault in FAULTS:
        certificate = probe(as_model(fault.model().bfloat16())).certificate
        messages = [law.counterexample for law in certificate.laws.values() if law.counterexample]
        if not messages:
            hidden.append(fault.name)
        elif all("a copy of it in float32" in message for message in messages):
            by_copy.append(fault.name)
        else:
            alone.append(fault.name)
    with capsys.disabled():
        print(f"\n{len(alone)} of {len(FAULTS)} faults are found in bfloat16 alone")
        print(f"a copy in float32 shows {len(by_copy)} more: {', '.join(by_copy)}")
        print(f"{len(hidden)} are no larger than the rounding of 16 bits: {', '.join(hidden)}")
    assert len(alone) > len(FAULTS) / 2


@pytest.mark.parametrize("name", ["Attention", "Selective"])
def test_calls_grow_more_slowly_than_the_length(name, capsys):
    calls = {}
    for longest in (40, 80, 160, 320, 640):
        result = probe(as_model(CLEAN[name]()), longest=longest, examples=20, budget=10_000_000)
        tokens = sum(law.cases for law in result.laws.values())
        calls[longest] = result.record.details["calls"]
        with capsys.disabled():
            print(f"\n{name}, up to {longest} tokens: {calls[longest]} calls for {tokens} cases")
    assert calls[640] < 16 * calls[40]  # a check of every cut would need 16 times as many
