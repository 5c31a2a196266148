"""A precision is verified or refused, and the record describes the weights as they are."""

import copy
import functools
import json
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import measure_perplexity
from torch import nn

from pytest_lmeval.errors import SpecError
from pytest_lmeval.laws import Harness
from pytest_lmeval.laws._probe import probe
from pytest_lmeval.laws._weights import copy_of, float64_copy, preserve_weights
from pytest_lmeval.models import _precision as precision
from pytest_lmeval.models._identity import facts, fingerprint, precision as precision_facts
from pytest_lmeval.models._model import multiplied
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.models._tensors import is_packed, nbytes, precision_of, unpack, value_bits
from pytest_lmeval.records import _schema as schema

torchao = pytest.importorskip("torchao.quantization")
quantize_ = torchao.quantize_

IDS = torch.randint(0, 32, (1, 40), generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """An embedding, a square matrix, and a head, tied or not. Its state is the sum of the embeddings."""

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
    """Multiplies in float32, whatever the precision of its weights."""

    def forward(self, input_ids, state=None):
        x = self.embed(input_ids).float()
        return (torch.tanh(x @ self.mix.weight.float()) @ self.head.weight.float().T).to(self.head.weight.dtype), x[:, -1:]


class Experts(Tiny):
    """Most of its weights are one tensor of three dimensions."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(8, 64, 64))


class NoHalf(Tiny):
    """Uses an operator without float16."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids)[0] + torch.linalg.det(self.mix.weight), self.embed(input_ids)


class Overflows(Tiny):
    def forward(self, input_ids, state=None):
        return super().forward(input_ids)[0] * 60_000 * 60_000, self.embed(input_ids)


one_module, other_module = functools.cache(Tiny), functools.cache(Tiny)


def packed(wanted, module=None):
    module = module or Tiny()
    before = precision.convert(module, wanted, "tiny")
    return precision.proven(as_model(module, spec=f"tiny@{wanted}"), wanted, bytes_before=before)


def verdict_of(lm):
    return probe(lm, budget=1000).certificate


@pytest.mark.parametrize(
    ("wanted", "dtype", "bits", "stored"),
    [
        ("fp32", "float32", 32, 32),
        ("bf16", "bfloat16", 16, 16),
        ("fp16", "float16", 16, 16),
        ("int8", "int8", 8, 8.28),  # a scale of 32 bits and a zero point of 8 per row
        ("int4", "int4", 4, 9.25),  # a byte each, and scale and zero point per 32 numbers
    ],
)
def test_facts_describe_the_weights(wanted, dtype, bits, stored):
    lm = load(f"demo@{wanted}")
    described = facts(lm)
    found = described.precision
    assert (lm.spec, described.dtype, found.name, found.bits_per_weight) == (f"demo@{wanted}", dtype, wanted, bits)
    assert found.stored_bits_per_weight == pytest.approx(stored, abs=0.02)
    assert found.bytes_before == 4 * described.parameters
    assert found.bytes_after == described.bytes
    assert found.converted + sum(found.kept.values()) / described.parameters == pytest.approx(1)
    assert sum(found.kept.values()) == (35_968 if wanted.startswith("int") else 0)  # embedding and head; convolutions


def test_the_schema_has_the_precision():
    jsonschema = pytest.importorskip("jsonschema")
    whole = schema.json_schema()
    of_a_record = {"$defs": whole["$defs"], "$ref": "#/$defs/Record"}
    kept = json.loads(json.dumps(schema.to_plain(measure_perplexity(packed("int4"), IDS[0]).record)))
    jsonschema.validate(kept, of_a_record)
    kept["lm"]["precision"]["bits_per_weight"] = "four"
    with pytest.raises(jsonschema.ValidationError, match="four"):
        jsonschema.validate(kept, of_a_record)


@settings(max_examples=10)
@given(st.sampled_from(["int8", "int4"]), st.integers(1, 5), st.integers(1, 3), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_packing_rounds_to_the_nearest_step_and_unpacking_gives_the_multiplied_values(wanted, rows, groups, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(32 * groups, rows, bias=False))
    module[0].weight.data = scale * torch.randn(rows, 32 * groups, generator=generator)
    before = module[0].weight.detach().clone()
    precision.convert(module, wanted, "tiny")
    x = torch.randn(3, 32 * groups, generator=generator)
    output = module(x)
    unpack(module, torch.float64)
    after = module[0].weight.detach()

    size = 32 if wanted == "int4" else 32 * groups
    largest = before.reshape(rows, -1, size).abs().amax(-1)
    step = largest / (7 if wanted == "int4" else 127)
    error = (after - before).reshape(rows, -1, size).abs().amax(-1)
    assert (error <= 0.57 * step).all()  # half a step, and a little more since 2^bits - 1 is odd
    assert not is_packed(module[0].weight)
    torch.testing.assert_close(output.double(), x.double() @ after.T, rtol=1e-4, atol=1e-4 * scale)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("zoo:lstm@int8", r"zoo:lstm@int8 cannot be had: 0.0% of the 819,200 weights .* of LSTM is no weight of an nn.Linear"),
        ("zoo:transformer@int4", r"77.7% of the 790,528 weights .* rows that are no multiple of 32; and 1 more"),
        ("zoo:moshi@int8", r"29.4% .* of PerStep"),
        (f"{__name__}:Experts@int8", r"experts \[8, 64, 64\] of Experts is no weight"),
        (f"{__name__}:ConvertsBack@bf16", r"0% of its multiply-adds are done in it \(100% in fp32\)"),
        (f"{__name__}:Overflows@fp16", r"32 of 32 logits of one token are no finite numbers"),
        (f"{__name__}:NoHalf@fp16", r"with its weights in fp16, .*not implemented for 'Half'|fp16, .*Low precision"),
    ],
)
def test_a_precision_that_a_model_cannot_have_is_refused(spec, says):
    with pytest.raises(SpecError, match=says):
        load(spec)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda part, config: None, r"demo@int4 cannot be had: 0.0%.*Not so: layers"),
        (lambda part, _: quantize_(part, torchao.Int8WeightOnlyConfig()), r"layers.0.gate_up.weight \[640, 128\] is int8"),
    ],
    ids=["does nothing", "another width"],
)
def test_a_quantizer_that_is_missing_or_does_something_else_is_noticed(broken, says, monkeypatch):
    monkeypatch.setattr("torchao.quantization.quantize_", broken)
    with pytest.raises(SpecError, match=says):
        load("demo@int4")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SpecError, match=r"demo@int8 needs torchao .*pip install 'pytest-lmeval\[precision\]'"):
        load("demo@int8")


def test_the_spec_does_not_change_the_reported_bits():
    found = facts(as_model(Tiny().half(), spec="my-model@int4"))
    assert (found.dtype, found.precision.name, found.precision.bits_per_weight) == ("float16", "fp16", 16)


def test_a_tensor_has_the_declared_bits_and_with_larger_values_eight():
    lm = packed("int4")
    weight = lm.module.mix.weight
    assert nbytes(weight) == nbytes(copy.deepcopy(weight)) == 64 * 64 + 64 * 2 * (4 + 1)
    assert (value_bits(weight), facts(lm).dtype) == (4, "int4")
    weight.qdata[0, 0] = 100
    assert (value_bits(weight), precision_of(weight)) == (8, "int8")
    assert facts(lm).precision.name == "mixed"
    module = nn.Linear(32, 4)
    quantize_(module, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=torchao.PerGroup(32)))
    assert (value_bits(module.weight), precision_of(module.weight)) == (3, "int3")


def test_integers_of_unknown_meaning_have_no_bits():
    module = Tiny()
    del module.mix.weight
    module.mix.register_buffer("qweight", torch.zeros(64, 32, dtype=torch.int32))
    found = precision_facts(module)
    assert (found.name, found.bits_per_weight, found.stored_bits_per_weight) == ("packed", None, None)


# ---------------------------------------------------------------------------------------------- loading


def test_a_head_tied_to_the_embedding_is_not_packed_and_a_shared_weight_stays_shared():
    tied, own = packed("int8", Tiny(tied=True)).module, packed("int8").module
    assert tied.head.weight is tied.embed.weight
    assert (is_packed(tied.head.weight), is_packed(own.head.weight)) == (False, True)
    assert [name for name, _ in multiplied(tied)] == ["mix.weight"]
    module = Tiny()
    module.again = nn.Linear(64, 64)
    module.again.weight = module.mix.weight
    lm = packed("int4", module)
    assert lm.module.again.weight is lm.module.mix.weight
    copied = float64_copy(lm)
    assert copied.module.again.weight is copied.module.mix.weight


def test_a_callable_may_return_its_module_again_until_it_is_packed():
    spec = f"{__name__}:one_module"
    assert [facts(load(name)).dtype for name in (spec, f"{spec}@int8", f"{spec}@int8")] == ["float32", "int8", "int8"]
    other = f"{__name__}:other_module"
    assert facts(load(f"{other}@int8")).dtype == "int8"
    for again in (other, f"{other}@fp32"):
        with pytest.raises(SpecError, match="returned a module whose weights were converted to int8 before"):
            load(again)


def test_a_packed_checkpoint_is_recognized_without_a_suffix(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and torchao
        config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
        options = {"quantization_config": config, "dtype": torch.float32}
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "packed")

    found = facts(load(f"hf:{tmp_path / 'packed'}"))
    assert (found.dtype, found.precision.name, found.precision.bits_per_weight) == ("int8", "int8", 8)
    assert found.precision.bytes_before is None
    with pytest.raises(SpecError, match="can be fp32, and 90% must be"):
        load(f"hf:{tmp_path / 'packed'}@fp32")
    before = facts(load(f"hf:{tmp_path / 'plain'}")).bytes
    for wanted in ("int8", "bf16"):
        lm = load(f"hf:{tmp_path / 'plain'}@{wanted}")
        found = facts(lm).precision
        assert (found.name, found.bytes_before) == (wanted, before)
        assert found.bytes_after < 0.6 * before
        assert lm.module.lm_head.weight is lm.module.model.embed_tokens.weight


# ------------------------------------------------------------------------------- packed weights elsewhere


def test_the_fingerprint_depends_on_the_packed_values():
    lms = [packed(wanted) for wanted in ("fp32", "int8", "int4")]
    assert len({fingerprint(lm) for lm in lms}) == 3
    assert fingerprint(lms[2]) == fingerprint(packed("int4"))
    before = fingerprint(lms[2])
    lms[2].module.mix.weight.qdata[3, 3] += 1
    assert fingerprint(lms[2]) != before


@pytest.mark.parametrize("wanted", ["int8", "int4"])
def test_packed_weights_are_copied_unpacked_and_restored_if_reading_changes_them(wanted):
    lm = packed(wanted)
    for dtype in (torch.float32, torch.float64):
        other = copy_of(lm, dtype)
        assert {tensor.dtype for tensor in other.module.parameters()} == {dtype}
        assert not any(map(is_packed, other.module.parameters()))
        found, copied, plain = (model.step(IDS)[0].double() for model in (lm, other, as_model(Tiny())))
        assert (found - copied).abs().max() < 1e-4
        assert (found - plain).abs().max() > 1e-3  # the weights were rounded
    values = lm.module.mix.weight.qdata
    before = values.clone()
    with preserve_weights(lm) as changed:
        assert changed() is None
        values[0, 0] += 1
        assert "mix.weight" in changed()
    assert torch.equal(lm.module.mix.weight.qdata, before)


@pytest.mark.parametrize("wanted", ["int4", pytest.param("int8", marks=pytest.mark.thorough)])
def test_packed_weights_in_float32_arithmetic_are_exact(wanted):
    found = verdict_of(packed(wanted))
    assert (found.verdict, found.reference) == ("exact-any-chunk", "float64 run of the same weights")


@pytest.mark.parametrize("activations", ["rounded", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def test_packed_weights_with_activations_of_few_bits_are_consistent(activations):
    module = Tiny()
    if activations == "rounded":
        quantize_(module, torchao.Int8DynamicActivationInt8WeightConfig())
    lm = as_model(module) if activations == "rounded" else packed("int8", module.bfloat16())
    assert (lm.dtype, facts(lm).dtype) == (torch.bfloat16, "int8")
    found = verdict_of(lm)
    assert (found.verdict, found.float32) == ("consistent", "exact-any-chunk")


@pytest.mark.thorough
def test_the_probe_catches_a_packed_model_that_drops_its_state():
    class Forgets(Tiny):
        def forward(self, input_ids, state=None):
            return super().forward(input_ids, None if input_ids.shape[1] > 1 else state)

    assert verdict_of(packed("int4", Forgets())).verdict == "exact-step-only"


def test_packed_weights_are_not_trained():
    from pytest_lmeval.training import Protocol, run_training

    with pytest.raises(SpecError, match=r"tiny@int4 holds weights that are packed \(int4\).*no gradient"):
        run_training(packed("int4"), IDS[0].repeat(20), protocol=Protocol(steps=1, seq_len=16))


@pytest.mark.parametrize(("off", "allowed"), [(3e-3, True), (0.5, False)])
def test_a_token_that_multiplies_rounding_is_measured_by_the_rounding_of_its_own_sequence(off, allowed):
    harness = Harness(load("zoo:lstm"))
    ids = harness.tokens(24, seed=5)
    exact = harness.run(ids, [24], lm=harness.float64_copy)
    at_one_token = torch.zeros_like(exact)
    at_one_token[17, 3] = 1
    alone, run = exact + 1e-3 * at_one_token, exact - off * at_one_token
    excess = replace(harness.reference(0), expected=alone).measure(run)
    assert excess.tolerance_ratio > 1  # by what the sequence of seed 0 lets expect
    worst, _ = harness.worst_of([excess], [run], [(ids, alone)])
    assert (worst.tolerance_ratio <= 1) == allowed


def test_a_model_that_fails_under_the_flop_counter_is_accepted_by_its_weights():
    class Shy(Tiny):
        def forward(self, input_ids, state=None):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not under a mode")
            return super().forward(input_ids, state)

    assert packed("bf16", Shy()).dtype == torch.bfloat16
