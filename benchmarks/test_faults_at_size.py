"""Show what finds each kind of fault in a model of real size, at each place where it may begin.

    LMEVAL_REAL_MODEL=FOLDER pytest benchmarks/test_faults_at_size.py

Twenty kinds (tests/faults_at_size.py) are planted into SmolLM2-135M-Instruct, or the Llama in the folder; without either, into
a random one of its shape. What begins inside the floors of the laws, the probe finds; what begins past them shows where the
data themselves are read again. All options are the default ones.
"""

import time
from collections import defaultdict

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from faults_at_size import FAR, FAULTS, INSIDE, PLACES, planted, random_llama, refusal  # noqa: E402
from real_model import real_model_folder  # noqa: E402

from pytest_lmeval import as_model, equivalence  # noqa: E402

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

LAYERS, WIDTH = 30, 96
LEAST = 8  # kinds that the audit has to find
CASES = [(fault, place) for place in PLACES for fault in FAULTS]
FOUND = defaultdict(dict)  # name -> place -> the laws that the probe found broken, "audit", or nothing


@pytest.fixture(scope="module")
def clean():
    folder = real_model_folder()
    if folder is None:
        return random_llama(LAYERS, WIDTH)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    folder = real_model_folder()
    return None if folder is None else transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("fault", "place"), CASES, ids=[f"{place}-{fault.name}" for fault, place in CASES])
def test_a_fault_is_found(clean, tokenizer, capsys, fault, place):
    lm, began = as_model(planted(clean, fault.model, fault.at[place]), tokenizer=tokenizer), time.process_time()
    certificate = equivalence(lm).certificate
    how = " ".join(sorted(certificate.broken)) or ("audit" if refusal(lm, certificate, fault, place) else "")
    FOUND[fault.name][place] = how
    with capsys.disabled():
        seconds = time.process_time() - began
        print(f"\n{fault.name}, {fault.at[place]:,}: {certificate.verdict}; {how or 'NOT FOUND'} ({seconds:.0f} s)", end="")
    assert how
    assert place != INSIDE or how != "audit"


def test_the_audit_finds_many_kinds(capsys):
    if sum(map(len, FOUND.values())) < len(CASES):
        pytest.skip("some cases were left out")
    audited = [name for name, places in FOUND.items() if "audit" in places.values()]
    with capsys.disabled():
        print(f"\n\n{'':24}" + "".join(f"{f'{place} ({at:,})':32}" for place, at in PLACES.items()))
        for name, places in FOUND.items():
            print(f"{name:24}" + "".join(f"{places[place] or 'NOT FOUND':32}" for place in PLACES))
        print(f"{len(audited)} of {len(FAULTS)} kinds were found by the audit where the probe did not reach")
    assert len(audited) >= LEAST


@pytest.mark.parametrize("shows", ["text", "choices", "answer"])
def test_nothing_is_found_in_the_right_model(clean, tokenizer, shows):
    lm = as_model(clean, tokenizer=tokenizer)
    certificate = equivalence(lm).certificate
    assert certificate.verdict == "exact-any-chunk"
    assert refusal(lm, certificate, next(fault for fault in FAULTS if fault.shows == shows), FAR) is None
