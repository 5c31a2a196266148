"""Quantized checkpoints are loaded as transformers does; the record says what they hold, and the laws are tried on them."""

import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_tiny as tiny  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from pytest_lmeval.errors import SpecError  # noqa: E402
from pytest_lmeval.laws._probe import probe  # noqa: E402
from pytest_lmeval.laws._weights import float64_copy, preserve_weights  # noqa: E402
from pytest_lmeval.models import _packed_layers  # noqa: E402
from pytest_lmeval.models._identity import facts, fingerprint  # noqa: E402
from pytest_lmeval.models._packed_layers import packed_layers  # noqa: E402
from pytest_lmeval.models._sources import load  # noqa: E402

LINEAR = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # weights of the layers that are quantized
HEAD = TABLE = 64 * 64


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bnb(base, tmp_path_factory):
    """name -> folder quantized by bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    kinds = {"nf4": four, "nested": {**four, "bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}
    folder = tmp_path_factory.mktemp("bnb")
    return {
        name: tiny.quantized(folder / name, base, transformers.BitsAndBytesConfig(**options)) for name, options in kinds.items()
    }


@pytest.mark.parametrize(("name", "kind", "bits"), [("nf4", "nf4", 4), ("nested", "nf4", 4), ("int8", "int8", 8)])
def test_the_record_says_what_bitsandbytes_holds_and_not_what_the_tensors_look_like(bnb, base, name, kind, bits):
    found, plain = facts(load(f"hf:{bnb[name]}")), facts(load(f"hf:{base}"))
    assert (found.dtype, found.precision.name, found.parameters) == (kind, kind, plain.parameters)
    assert found.precision.bits_per_weight == pytest.approx((bits * LINEAR + 32 * HEAD) / (LINEAR + HEAD))
    assert found.precision.stored_bits_per_weight > found.precision.bits_per_weight  # the scales
    assert found.precision.kept == {"fp32": plain.parameters - LINEAR}
    assert found.loaded["quantization"].startswith("bitsandbytes (")
    scales = found.bytes - LINEAR * bits // 8 - (plain.parameters - LINEAR) * 4
    assert 0 < scales < 0.2 * found.bytes  # of layers this small; more on some processors


def test_the_fingerprint_sees_the_scales_of_a_quantized_layer(bnb, tmp_path):
    other = shutil.copytree(bnb["nf4"], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("absmax"))
    save_file(tensors | {name: 2 * tensors[name]}, other / "model.safetensors", {"format": "pt"})
    one, two = (load(f"hf:{folder}") for folder in (bnb["nf4"], other))
    assert all(map(torch.equal, one.module.parameters(), two.module.parameters()))  # the codes alone are the same
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) == fingerprint(load(f"hf:{bnb['nf4']}"))


@pytest.mark.parametrize("name", ["nf4", "nested", "int8"])
def test_the_reference_has_the_numbers_that_quantized_layers_stand_for(bnb, base, name):
    lm = load(f"hf:{bnb[name]}")
    copy, whole = float64_copy(lm), load(f"hf:{base}")
    assert {parameter.dtype for parameter in copy.module.parameters()} == {torch.float64}
    bits = 4 if "4" in name or name == "nested" else 8
    for layer, _, _ in packed_layers(lm.module):
        read, saved = copy.module.get_submodule(layer).weight, whole.module.get_submodule(layer).weight.double()
        assert 0 < (read - saved).norm() / saved.norm() < (0.12 if bits == 4 else 0.01)  # scales in another order: about 1
    with torch.no_grad():
        one, two = (model.step(tiny.IDS)[0].double() for model in (lm, copy))
    assert (one - two).norm() < 0.03 * two.norm()


def test_looking_at_a_model_of_bitsandbytes_does_not_change_it(bnb):
    """Its `state_dict` repacks the weights, and not as they were."""
    lm = load(f"hf:{bnb['nf4']}")
    with torch.no_grad():
        before, identity = lm.step(tiny.IDS)[0], fingerprint(lm)
        with preserve_weights(lm) as changed:
            assert changed() is None
        float64_copy(lm)
        assert torch.equal(lm.step(tiny.IDS)[0], before)
    assert fingerprint(lm) == identity


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_laws_hold_on_quantized_models_and_a_wrong_type_is_seen(bnb, name, monkeypatch):
    """That of four bits multiplies bfloat16 on a CPU that can: to call that float32 breaks laws."""
    lm = load(f"hf:{bnb[name]}")
    assert probe(lm, budget=1).verdict == ("consistent" if lm.dtype == torch.bfloat16 else "exact-any-chunk")
    if name == "nf4" and lm.dtype == torch.bfloat16:
        monkeypatch.setattr(type(lm), "dtype", torch.float32)
        assert probe(lm, budget=1).verdict == "inexact"


def test_a_suffix_is_refused_unless_it_is_what_the_checkpoint_holds(bnb):
    for spec in (f"hf:{bnb['nf4']}@int4", f"hf:{bnb['nf4']}@bf16", f"hf:{bnb['int8']}@fp32"):
        with pytest.raises(SpecError, match=r"the checkpoint is quantized already \(14 layers of (nf4|int8)\)"):
            load(spec)
    assert fingerprint(load(f"hf:{bnb['int8']}@int8")) == fingerprint(load(f"hf:{bnb['int8']}"))


def test_compressed_tensors_are_read_and_the_record_says_that_they_were_unpacked(base, tmp_path):
    pytest.importorskip("compressed_tensors")
    lm = load(f"hf:{tiny.compressed(tmp_path / 'ct', base)}")
    found = facts(lm)
    assert found.loaded["quantization"] == "compressed-tensors (bits 4, group 32, format pack-quantized)"
    assert found.precision.name == "fp32"
    weight = lm.module.model.layers[0].mlp.up_proj.weight.detach()
    assert all(len(group.unique()) <= 16 for group in weight.unflatten(1, (-1, 32)).flatten(0, 1))  # rounded to four bits


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            r"gptq \(bits 4, group 128\), which needs gptqmodel and optimum",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, r"awq \(bits 4\), which needs gptqmodel: pip install"),
    ],
)
def test_a_method_whose_package_is_missing_is_named(base, tmp_path, declared, says):
    folder = tiny.declared_quantized(tmp_path / "q", base, **declared)
    with pytest.raises(SpecError, match=f"its weights are quantized by {says}"):
        load(f"hf:{folder}")


def test_a_method_that_needs_a_gpu_and_an_unknown_one_are_said():
    from pytest_lmeval.models._quantization import why_not

    said = why_not({"quant_method": "torchao"}, RuntimeError("No GPU found. A GPU is needed for quantization."))
    assert torch.cuda.is_available() or "torchao, which needs a GPU, and torch" in said
    assert "quantized by mine, and transformers could not read them: ValueError: what" in why_not(
        {"quant_method": "mine"}, ValueError("what")
    )


class Rows(torch.nn.Module):
    """A layer as gptqmodel stores it: codes, scales and zero points in buffers."""

    def __init__(self):
        super().__init__()
        self.bits, self.in_features, self.out_features = 4, 64, 32
        self.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(2, 32, dtype=torch.float16))


class Blocks(torch.nn.Module):
    """A layer as transformers stores FP8 in blocks of 2 x 2."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 4
        self.weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_layers_of_methods_that_cannot_run_here_are_read_by_their_format():
    module = torch.nn.Sequential(Rows(), Blocks())
    (_, _, rows), (_, _, blocks) = packed_layers(module)
    assert (rows.precision, rows.bits, rows.weights, rows.bytes) == ("int4", 4.0, 2048, 1024 + 128)
    assert (blocks.precision, blocks.weights, blocks.rounds) == ("fp8", 16, True)
    _packed_layers.unpack_layers(only := torch.nn.Sequential(Blocks()), torch.float64)
    assert only[0].weight.tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
