"""Compare lower precisions with fp32: quality, agreement, speed, size.

    pytest benchmarks/test_precision.py --lm hf:./my-checkpoint

A precision that the model cannot have is skipped, with the reason. Four-bit weights take a byte each here and are multiplied as
floats: they show what rounding costs, not speed.
"""

import pytest

from pytest_lmeval import Value, load
from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._identity import facts

TOKENS = 4_000  # half precisions are slow on many processors
QUESTIONS = 60
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
WORSE = {"fp32": 1.0, "bf16": 1.02, "fp16": 1.02, "int8": 1.02, "int4": 1.15}  # most times the perplexity of fp32
ALIKE = {"fp32": 1.0, "bf16": 0.95, "fp16": 0.95, "int8": 0.95, "int4": 0.75}  # least fraction of equal likeliest tokens


pytestmark = [pytest.mark.benchmark, pytest.mark.parametrize("precision", BITS)]


@pytest.fixture(scope="module")
def in_precision(lm):
    """precision -> the model in it, whatever precision `--lm` names."""
    spec, at, last = lm.spec.rpartition("@")
    name = spec if at and last in BITS else lm.spec
    loaded = {}

    def find(precision):
        try:
            if precision not in loaded:
                loaded[precision] = load(f"{name}@{precision}", device=lm.device)
        except SpecError as error:
            pytest.skip(str(error))
        return loaded[precision]

    return find


def test_weights_have_the_precision_asked_for(lmeval, in_precision, precision):
    model = in_precision(precision)
    found = facts(model).precision
    bits = {name: Value(getattr(found, name), "bits") for name in ("bits_per_weight", "stored_bits_per_weight")}
    lmeval.record(model, "weights", **bits, bytes=Value(found.bytes_after, "bytes"))

    assert found.name == precision
    assert found.bits_per_weight <= 0.9 * BITS[precision] + 0.1 * 32  # a tenth may stay in float32


def test_predicts_as_in_fp32(lmeval, in_precision, corpus, precision):
    result = lmeval.agreement(in_precision(precision), in_precision("fp32"), corpus("stdlib", "test"), tokens=TOKENS)

    assert result.agreement >= ALIKE[precision]
    assert result.perplexity_ratio <= WORSE[precision]
    if precision == "fp32":
        assert result.largest_difference == 0


def test_reads(lmeval, in_precision, corpus, precision):
    result = lmeval.perplexity(in_precision(precision), corpus("stdlib", "test"), tokens=TOKENS)

    assert result.bits_per_byte < 8  # the loss of knowing nothing


def test_answers(lmeval, in_precision, precision):
    result = lmeval.task(in_precision(precision), "stdlib_next", limit=QUESTIONS)

    assert result.accuracy.low > result.chance


def test_latency(lmeval, in_precision, benchmark, precision):
    lmeval.latency(in_precision(precision), batch_size=1, seq_len=128, runs=10)
