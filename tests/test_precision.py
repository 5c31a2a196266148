"""A precision is had and proven, or refused; what the record says of the weights is what the weights are."""

import copy
import json
import math
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import measure_perplexity
from tiny_models import Functional, Stepper
from torch import nn

from pytest_lmeval.errors import SpecError
from pytest_lmeval.laws._probe import probe
from pytest_lmeval.laws._weights import copy_of, float64_copy, preserve_weights
from pytest_lmeval.models import _precision as precision
from pytest_lmeval.models._identity import facts, fingerprint, precision as precision_facts
from pytest_lmeval.models._model import Model, multiplied
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.models._tensors import is_packed, nbytes, precision_of, unpack, value_bits
from pytest_lmeval.records import _schema as schema

pytest.importorskip("torchao")

IDS = torch.randint(0, 32, (1, 40), generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """An embedding, a matrix from it to itself, and a head, tied or not. Its state is the sum of what it read."""

    def __init__(self, width=64, *, tied=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(32, width)
            self.mix = nn.Linear(width, width)
            self.head = nn.Linear(width, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, state=None):
        seen = self.embed(input_ids).cumsum(1) + (0 if state is None else state)
        return self.head(torch.tanh(self.mix(seen / 8))), seen[:, -1:]


class ConvertsBack(Tiny):
    """Multiplies in float32, whatever its weights are in."""

    def forward(self, input_ids, state=None):
        x = self.embed(input_ids).float()
        return (torch.tanh(x @ self.mix.weight.float()) @ self.head.weight.float().T).to(self.head.weight.dtype), x[:, -1:]


class Experts(Tiny):
    """Most of its weights are one tensor of three dimensions."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(8, 64, 64))


class NoHalf(Tiny):
    """Uses an operator that knows no float16."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids)[0] + torch.linalg.det(self.mix.weight), self.embed(input_ids)


class Overflows(Tiny):
    def forward(self, input_ids, state=None):
        return super().forward(input_ids)[0] * 60_000 * 60_000, self.embed(input_ids)


THE_ONE, ANOTHER_ONE = Tiny(), Tiny()


def the_one():
    return THE_ONE


def another_one():
    return ANOTHER_ONE


def packed(wanted, module=None):
    return load_as(module or Tiny(), wanted)


def load_as(module, wanted):
    before = precision.convert(module, wanted, "toy")
    return precision.proven(as_model(module, spec=f"toy@{wanted}"), wanted, bytes_before=before)


def spec_of(kind):
    return f"{kind.__module__}:{kind.__qualname__}"


@pytest.mark.parametrize(
    ("wanted", "dtype", "bits", "stored"),
    [
        ("fp32", "float32", 32, 32),
        ("bf16", "bfloat16", 16, 16),
        ("fp16", "float16", 16, 16),
        ("int8", "int8", 8, 8.28),  # a scale of 32 bits and a zero point of 8 a row
        ("int4", "int4", 4, 9.25),  # a byte each, and the same for 32 numbers
    ],
)
def test_the_record_says_what_the_weights_are(wanted, dtype, bits, stored):
    lm = load(f"demo@{wanted}")
    said = facts(lm)
    found = said.precision
    assert (lm.spec, said.dtype, found.name) == (f"demo@{wanted}", dtype, wanted)
    assert found.bits_per_weight == bits
    assert found.stored_bits_per_weight == pytest.approx(stored, abs=0.02)
    assert found.bytes_before == 4 * said.parameters
    assert found.bytes_after == said.bytes
    assert found.converted + sum(found.kept.values()) / said.parameters == pytest.approx(1)
    assert sum(found.kept.values()) == (35_968 if wanted.startswith("int") else 0)  # embedding and head; convolutions


def test_the_schema_knows_it():
    jsonschema = pytest.importorskip("jsonschema")
    whole = schema.json_schema()
    of_a_record = {"$defs": whole["$defs"], "$ref": "#/$defs/Record"}
    kept = json.loads(json.dumps(schema.to_plain(measure_perplexity(packed("int4"), IDS[0]).record)))
    jsonschema.validate(kept, of_a_record)
    kept["lm"]["precision"]["bits_per_weight"] = "four"
    with pytest.raises(jsonschema.ValidationError, match="four"):
        jsonschema.validate(kept, of_a_record)


@given(
    wanted=st.sampled_from(["int8", "int4"]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_packing_rounds_each_weight_by_half_a_step_and_unpacking_gives_what_is_multiplied(wanted, rows, groups, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(32 * groups, rows, bias=False))
    module[0].weight.data = scale * torch.randn(rows, 32 * groups, generator=generator)
    before = module[0].weight.detach().clone()
    precision._pack(module, wanted, "toy")
    x = torch.randn(3, 32 * groups, generator=generator)
    said = module(x)
    unpack(module, torch.float64)
    after = module[0].weight.detach()

    size = 32 if wanted == "int4" else 32 * groups
    largest = before.reshape(rows, -1, size).abs().amax(-1)
    step = largest / (7 if wanted == "int4" else 127)
    error = (after - before).reshape(rows, -1, size).abs().amax(-1)
    assert (error <= 0.57 * step).all()  # half a step, a little longer since 2^bits - 1 is odd
    assert not is_packed(module[0].weight)
    torch.testing.assert_close(said.double(), x.double() @ after.T, rtol=1e-4, atol=1e-4 * scale)


def test_that_law_can_fail():
    """Three bits err by more."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    module = nn.Linear(32, 4, bias=False)
    before = module.weight.detach().clone()
    quantize_(module, IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(32)))
    step = before.abs().amax(-1) / 7
    assert not ((module.weight.dequantize() - before).abs().amax(-1) <= 0.57 * step).all()
    assert (value_bits(module.weight), precision_of(module.weight)) == (3, "int3")


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("zoo:lstm@int8", r"zoo:lstm@int8 cannot be had: 0.0% of the 819,200 weights .* of LSTM is no weight of an nn.Linear"),
        ("zoo:transformer@int4", r"77.7% of the 790,528 weights .* rows that are no multiple of 32; and 1 more"),
        ("zoo:moshi@int8", r"29.4% .* of PerStep"),
        (spec_of(Experts) + "@int8", r"experts \[8, 64, 64\] of Experts is no weight"),
        (spec_of(ConvertsBack) + "@bf16", r"0% of its multiply-adds are done in it \(100% in fp32\)"),
        (spec_of(Overflows) + "@fp16", r"32 of 32 logits of one token are no finite numbers"),
        (spec_of(NoHalf) + "@fp16", r"with its weights in fp16, .*not implemented for 'Half'|fp16, .*Low precision"),
        (spec_of(Stepper) + "@int8", r"cannot be set, since it is no torch module"),
        ("demo@int3", r"unknown precision @int3; known are @fp32, @bf16, @fp16, @int8, @int4"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused_with_the_figures(spec, says):
    with pytest.raises(SpecError, match=says):
        load(spec)


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SpecError, match=r"demo@int8 needs torchao .*pip install 'pytest-lmeval\[precision\]'"):
        load("demo@int8")


def test_a_quantizer_that_does_nothing_is_caught(monkeypatch):
    monkeypatch.setattr(precision, "_torchao", lambda wanted, spec: (lambda part, config: None, None))
    with pytest.raises(SpecError, match=r"demo@int4 cannot be had: 0.0%.*Not so: layers"):
        load("demo@int4")


def test_a_quantizer_of_another_width_is_caught(monkeypatch):
    int8 = precision._torchao("int8", "")
    monkeypatch.setattr(precision, "_torchao", lambda wanted, spec: int8)
    with pytest.raises(SpecError, match=r"layers.0.gate_up.weight \[640, 128\] is int8"):
        load("demo@int4")


def test_a_model_that_is_only_called_int4_has_its_real_bits():
    lm = as_model(Tiny().half(), spec="my-model@int4")
    found = facts(lm)
    assert (found.dtype, found.precision.name, found.precision.bits_per_weight) == ("float16", "fp16", 16)


def test_a_tensor_that_claims_four_bits_and_holds_eight_has_eight():
    lm = packed("int4")
    weight = lm.module.mix.weight
    assert (value_bits(weight), facts(lm).dtype) == (4, "int4")
    weight.qdata[0, 0] = 100
    assert (value_bits(weight), precision_of(weight)) == (8, "int8")
    assert facts(lm).precision.name == "mixed"


def test_integers_of_an_unknown_meaning_are_not_given_bits():
    module = Tiny()
    del module.mix.weight
    module.mix.register_buffer("qweight", torch.zeros(64, 32, dtype=torch.int32))
    found = precision_facts(module)
    assert (found.name, found.bits_per_weight, found.stored_bits_per_weight) == ("packed", None, None)


# ---------------------------------------------------------------------------------------------- loading


def test_the_suffix_wins_over_the_bits_of_the_command_line():
    assert [load("demo", bits=bits).spec for bits in (32, 16, 8, 4)] == ["demo@fp32", "demo@bf16", "demo@int8", "demo@int4"]
    lm = load("demo@fp32", bits=4)
    assert (lm.spec, facts(lm).precision.name) == ("demo@fp32", "fp32")
    assert facts(load("demo")).precision.bytes_before is None


def test_a_head_that_is_tied_to_the_embedding_stays_one_tensor_with_it():
    tied, own = packed("int8", Tiny(tied=True)).module, packed("int8").module
    assert tied.head.weight is tied.embed.weight
    assert not is_packed(tied.head.weight)
    assert is_packed(own.head.weight)
    assert [name for name, _ in multiplied(tied)] == ["mix.weight"]


def test_two_layers_that_share_a_weight_share_the_packed_one():
    module = Tiny()
    module.again = nn.Linear(64, 64)
    module.again.weight = module.mix.weight
    lm = packed("int4", module)
    assert lm.module.again.weight is lm.module.mix.weight
    copied = float64_copy(lm)
    assert copied.module.again.weight is copied.module.mix.weight


def test_a_callable_that_returns_one_module_twice_gives_two_models():
    spec = f"{__name__}:the_one"
    plain, small = load(spec), load(f"{spec}@int8")
    assert facts(plain).dtype == "float32"
    assert facts(small).dtype == "int8"


def test_a_callable_that_returns_a_module_that_was_packed_is_told_off():
    spec = f"{__name__}:another_one"
    assert facts(load(f"{spec}@int8")).dtype == facts(load(f"{spec}@int8")).dtype == "int8"
    for again in (spec, f"{spec}@fp32"):
        with pytest.raises(SpecError, match="returned the one whose weights were made int8 before"):
            load(again)


def test_a_packed_checkpoint_says_so_without_a_suffix(tmp_path):
    transformers = pytest.importorskip("transformers")
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of making the checkpoint, which is not ours
        quantized = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
        )
        quantized.save_pretrained(tmp_path / "packed")

    found = facts(load(f"hf:{tmp_path / 'packed'}"))
    assert (found.dtype, found.precision.name, found.precision.bits_per_weight) == ("int8", "int8", 8)
    assert found.precision.bytes_before is None
    with pytest.raises(SpecError, match="can be fp32, and 90% must be"):
        load(f"hf:{tmp_path / 'packed'}@fp32")
    before = facts(load(f"hf:{tmp_path / 'plain'}")).bytes
    for wanted in ("int8", "int4", "bf16"):
        lm = load(f"hf:{tmp_path / 'plain'}@{wanted}")
        found = facts(lm).precision
        assert (found.name, found.bytes_before) == (wanted, before)
        assert found.bytes_after < 0.6 * before
        assert lm.module.lm_head.weight is lm.module.model.embed_tokens.weight


# ------------------------------------------------------------------------------- all that touches weights


def test_a_fingerprint_is_that_of_the_packed_values():
    lms = [packed(wanted) for wanted in ("fp32", "int8", "int4")]
    assert len({fingerprint(lm) for lm in lms}) == 3
    assert fingerprint(lms[2]) == fingerprint(packed("int4"))
    before = fingerprint(lms[2])
    lms[2].module.mix.weight.qdata[3, 3] += 1
    assert fingerprint(lms[2]) != before


@pytest.mark.parametrize("wanted", ["int8", "int4"])
def test_a_packed_weight_that_reading_changes_is_noticed_and_put_back(wanted):
    lm = packed(wanted)
    before = lm.module.mix.weight.qdata.clone()
    with preserve_weights(lm) as changed:
        assert changed() is None
        lm.module.mix.weight.qdata[0, 0] += 1
        assert "mix.weight" in changed()
    assert torch.equal(lm.module.mix.weight.qdata, before)


@pytest.mark.parametrize("wanted", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_has_the_same_rounded_weights_as_plain_numbers(wanted, dtype):
    lm = packed(wanted)
    other = copy_of(lm, dtype)
    assert {tensor.dtype for tensor in other.module.parameters()} == {dtype}
    assert not any(map(is_packed, other.module.parameters()))
    said, twins = (model.step(IDS)[0].double() for model in (lm, other))
    assert (said - twins).abs().max() < 1e-4
    plain = as_model(Tiny()).step(IDS)[0].double()
    assert (said - plain).abs().max() > 1e-3  # the weights were rounded


@pytest.mark.parametrize("wanted", ["int8", "int4"])
def test_rounded_weights_in_float32_arithmetic_are_proven_exact(wanted):
    found = probe(packed(wanted), examples=2, longest=24).certificate
    assert (found.verdict, found.reference) == ("exact-any-chunk", "float64 run of the same weights")


def test_packed_weights_in_bfloat16_arithmetic_are_consistent():
    module = Tiny().bfloat16()
    lm = load_as(module, "int8")
    assert (facts(lm).dtype, lm.dtype) == ("int8", torch.bfloat16)
    found = probe(lm, examples=2, longest=24).certificate
    assert (found.verdict, found.float32) == ("consistent", "exact-any-chunk")


def test_a_model_whose_activations_are_rounded_too_is_not_proven_and_not_accused():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = Tiny()
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    lm = as_model(module)
    assert (lm.dtype, facts(lm).dtype) == (torch.bfloat16, "int8")
    found = probe(lm, examples=2, longest=24).certificate
    assert (found.verdict, found.float32) == ("consistent", "exact-any-chunk")


def test_a_packed_model_that_drops_its_state_is_caught():
    class Forgets(Tiny):
        def forward(self, input_ids, state=None):
            return super().forward(input_ids, None if input_ids.shape[1] > 1 else state)

    assert probe(packed("int4", Forgets()), examples=2, longest=24).verdict == "exact-step-only"


def test_packed_weights_are_not_trained():
    from pytest_lmeval.training import Protocol, run_training

    with pytest.raises(SpecError, match=r"toy@int4 holds weights that are packed \(int4\).*no gradient"):
        run_training(packed("int4"), IDS[0].repeat(20), protocol=Protocol(steps=1, seq_len=16))


def test_the_bytes_of_a_packed_tensor_are_those_of_its_parts():
    weight = packed("int4").module.mix.weight
    assert nbytes(weight) == 64 * 64 + 64 * 2 * (4 + 1)
    assert math.isclose(nbytes(copy.deepcopy(weight)), nbytes(weight))


def test_gated_recurrences_of_torch_are_not_mistaken_for_linear_layers():
    with pytest.raises(SpecError, match="of GRU is no weight"):
        load_as(Functional(), "int8")
    assert isinstance(load_as(Functional(), "bf16"), Model)


def test_a_model_that_cannot_be_watched_is_taken_at_its_weights():
    class Shy(Tiny):
        def forward(self, input_ids, state=None):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not under a mode")
            return super().forward(input_ids, state)

    assert load_as(Shy(), "bf16").dtype == torch.bfloat16
