"""The options of `hf:`: adapters, subfolders, revisions, attention, devices, GGUF files; each is used, recorded, or refused."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import hf_tiny as tiny  # noqa: E402
from real_model import MISSING, real_model_folder  # noqa: E402

from pytest_lmeval.errors import SpecError  # noqa: E402
from pytest_lmeval.models._identity import facts, fingerprint  # noqa: E402
from pytest_lmeval.models._sources import load  # noqa: E402
from pytest_lmeval.models._spec_options import OPTIONS  # noqa: E402
from pytest_lmeval.models._specs import parse  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return tiny.adapter(tmp_path_factory.mktemp("adapter"), base)


def step(lm):
    with torch.no_grad():
        return lm.step(tiny.IDS)[0]


def carried(lm):
    with torch.no_grad():
        first, state = lm.step(tiny.IDS[:, :17])
        return torch.cat([first, lm.step(tiny.IDS[:, 17:], state)[0]], 1)


# ------------------------------------------------------------------------------------------------------------ adapters


def test_an_adapter_over_a_base_and_alone_gives_the_logits_of_peft_itself(base, adapter):
    over, alone, plain = load(f"hf:{base},adapter={adapter}"), load(f"hf:{adapter}"), load(f"hf:{base}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = tiny.logits(model)
    for lm in (over, alone):
        assert torch.equal(step(lm), expected)
        torch.testing.assert_close(carried(lm), expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(step(lm), tiny.logits(tiny.merged(base, adapter)), atol=2e-5, rtol=0)
    assert (step(plain) - expected).abs().max() > 0.1  # one that is ignored would be seen
    assert fingerprint(over) == fingerprint(alone) != fingerprint(plain)
    assert facts(over).loaded["adapter"] == f"{adapter} (LORA, rank 4, trained on {base})"
    assert not any(parameter.requires_grad for parameter in over.module.parameters())


def test_another_adapter_is_another_model(base, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    first = next(name for name in sorted(tensors) if "lora_B" in name)
    save_file(tensors | {first: tensors[first] * 1.01}, other / "adapter_model.safetensors", {"format": "pt"})
    assert fingerprint(load(f"hf:{base},adapter={other}")) != fingerprint(load(f"hf:{base},adapter={adapter}"))


def test_a_precision_is_that_of_the_adapter_too(base, adapter):
    lm = load(f"hf:{base},adapter={adapter}@bf16")
    assert {parameter.dtype for parameter in lm.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"hidden_size": 32}, r"of another shape: .*layers\.0.*down_proj.lora_B.weight \[64, 4\] for \[32, 4\]"),
        ({"num_hidden_layers": 1}, r"Of its 12 tensors and the 6 .*no place for: .*layers\.1\."),
        ({"num_hidden_layers": 3}, r"Of its 12 tensors and the 18 .*missing: .*layers\.2\."),
    ],
)
def test_an_adapter_of_another_model_is_refused_with_names_and_shapes(adapter, base, sizes, says, tmp_path):
    other = tiny.saved(tmp_path / "other", **sizes)
    with pytest.raises(SpecError, match=rf"the adapter {adapter} is of another model than {other}.*{says}.*trained on {base}"):
        load(f"hf:{other},adapter={adapter}")


def test_an_adapter_for_layers_that_a_model_does_not_have_is_refused(adapter, tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SpecError, match=r"cannot be put over .*gpt2: .*Target modules .* not found.* It was trained on "):
        load(f"hf:{tmp_path / 'gpt2'},adapter={adapter}")


def test_what_is_no_adapter_or_has_no_base_is_refused(base, adapter, tmp_path, monkeypatch):
    nameless = tiny.adapter(tmp_path / "nameless", None)
    with pytest.raises(SpecError, match=r"names no base model. Write hf:BASE,adapter="):
        load(f"hf:{nameless}")
    lost = shutil.copytree(adapter, tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(SpecError, match=r"is an adapter over .*gone, which is not here"):
        load(f"hf:{lost}")
    (lost / "adapter_config.json").write_text("[]")
    with pytest.raises(SpecError, match="holds list, and a configuration is an object"):
        load(f"hf:{lost}")
    with pytest.raises(SpecError, match=r"holds no adapter: there is no adapter_config.json"):
        load(f"hf:{base},adapter={base}")
    with pytest.raises(SpecError, match=r"there is no folder .*adaptor with an adapter"):
        load(f"hf:{base},adapter={tmp_path / 'adaptor'}")
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copy(adapter / "adapter_config.json", both)
    with pytest.raises(SpecError, match="holds the weights of a model and an adapter"):
        load(f"hf:{both}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        peft.get_peft_model(tiny.llama(), prefix).save_pretrained(tmp_path / "prefix")
    with pytest.raises(SpecError, match="a PREFIX_TUNING adapter, which puts tokens before the text"):
        load(f"hf:{base},adapter={tmp_path / 'prefix'}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SpecError, match=r"an adapter needs peft: pip install 'pytest-lmeval\[adapters\]'"):
        load(f"hf:{base},adapter={adapter}")


# ---------------------------------------------------------------------------------------- names, folders and revisions


def test_a_folder_with_signs_of_the_syntax_in_its_name_works_with_and_without_options(base, adapter, tmp_path):
    odd = shutil.copytree(base, tmp_path / "we@ird,name")
    assert torch.equal(step(load(f"hf:{odd}")), step(load(f"hf:{base}")))
    lm = load(f"hf:{odd},attn=eager@bf16")
    assert (lm.dtype, lm.module.config._attn_implementation) == (torch.bfloat16, "eager")
    worse = shutil.copytree(adapter, tmp_path / "ad,attn=sdpa@int8")
    for spec, attention in ((f"hf:{odd},adapter={worse}", "sdpa"), (f"hf:{odd},adapter={worse},attn=eager", "eager")):
        lm = load(spec)
        assert fingerprint(lm) == fingerprint(load(f"hf:{base},adapter={adapter},attn={attention}"))
        assert (facts(lm).dtype, lm.module.config._attn_implementation) == ("float32", attention)


def test_a_subfolder_is_the_model_and_a_wrong_one_names_those_that_are_there(base, tmp_path):
    shutil.copytree(base, tmp_path / "run/checkpoint-10")
    assert fingerprint(load(f"hf:{tmp_path / 'run'},subfolder=checkpoint-10")) == fingerprint(load(f"hf:{base}"))
    with pytest.raises(SpecError, match=r"no folder 'checkpoint-20' in .*; it has checkpoint-10. Did you mean checkpoint-10\?"):
        load(f"hf:{tmp_path / 'run'},subfolder=checkpoint-20")


def test_a_folder_has_no_revisions(base):
    with pytest.raises(SpecError, match=r"what is here has one revision; 'v2' is one of a model of the hub"):
        load(f"hf:{base},revision=v2")


def test_attention_is_what_was_asked_for_or_refused(base):
    assert load(f"hf:{base},attn=eager").module.config._attn_implementation == "eager"
    assert facts(load(f"hf:{base},attn=eager")).loaded == {"attention": "eager"}
    with pytest.raises(SpecError, match=r"transformers has no attention 'egaer'; there are: eager, .*Did you mean eager\?"):
        load(f"hf:{base},attn=egaer")


def test_unknown_options_and_values_are_refused_with_the_nearest():
    for spec, says in (
        ("hf:x,adaptor=y", r"no option 'adaptor' of a model; there are: compile, adapter, .* Did you mean adapter\?"),
        ("demo,adapter=y", r"the option 'adapter' is of hf, not of demo; there are: compile"),
        ("hf:x,adapter=", "adapter= is no value of that option; give it a value"),
        ("hf:x,cache=ring", "write cache=static, cache=static:TOKENS, cache=quantized, or"),
        ("hf:x,device_map=cuda", "write one of auto, balanced, .*; a single device is chosen with --lmeval-device"),
        ("hf:x,tp_plan=mine", "write tp_plan=auto"),
        ("hf:x,attn=sdpa,attn=eager", "the option attn is given twice"),
    ):
        with pytest.raises(SpecError, match=says):
            parse(spec)


def test_each_option_is_in_the_guide_with_what_it_takes():
    guide = (Path(__file__).parents[1] / "docs/guides/models.md").read_text()
    for name, option in OPTIONS.items():
        assert f"| `{name}=` | {option.takes} |" in guide, name


# ------------------------------------------------------------------------------------------------------------- devices


def test_a_device_map_gives_the_same_model(base):
    lm = load(f"hf:{base},device_map=auto")
    assert torch.equal(step(lm), step(load(f"hf:{base}")))
    with pytest.raises(SpecError, match="device_map= spreads whole layers, tp_plan= splits each of them; choose one"):
        load(f"hf:{base},device_map=auto,tp_plan=auto")


def test_weights_that_were_left_outside_of_the_devices_are_refused(base, tmp_path, monkeypatch):
    from pytest_lmeval.models import _hf_placing

    places = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    placed = {"device_map": places, "offload_folder": str(tmp_path)}
    monkeypatch.setattr(_hf_placing, "keywords", lambda *given: placed)  # as on a GPU that is too small
    with pytest.raises(SpecError, match=r"the devices are too small: 18 tensors, model.layers.0.* first, .*1 parts on disk"):
        load(f"hf:{base},device_map=auto")


def test_a_plan_for_several_processes_is_refused_in_one(base):
    with pytest.raises(SpecError, match=r"Run `torchrun --nproc-per-node N -m pytest"):
        load(f"hf:{base},tp_plan=auto")


RANK = """
import sys, torch
sys.path.insert(0, {tests!r})
import hf_tiny as tiny
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._sources import load

lm, whole = load("hf:{base},tp_plan=auto"), load("hf:{base}")
with torch.no_grad():
    first, state = lm.step(tiny.IDS[:, :17])
    read = torch.cat([first, lm.step(tiny.IDS[:, 17:], state)[0]], 1)
    assert torch.allclose(read, whole.step(tiny.IDS)[0], atol=2e-5), (read - whole.step(tiny.IDS)[0]).abs().max()
weight = lm.module.model.layers[0].self_attn.q_proj.weight
assert weight.to_local().numel() * 2 == weight.numel(), "it is not split"
found, expected = facts(lm), facts(whole)
assert (found.parameters, found.precision, found.bytes) == (expected.parameters, expected.precision, expected.bytes)
print("RANK", found.loaded, found.fingerprint, flush=True)
"""


@pytest.mark.thorough
def test_layers_that_are_split_over_the_ranks_of_torchrun_give_the_same_numbers(base, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(base=base, tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stdout.splitlines() if line.startswith("RANK")]
    assert len(said) == 2, done.stderr[-3000:]
    assert said[0] == said[1]
    assert "each layer split over 2 ranks" in said[0]


# ---------------------------------------------------------------------------------------------------------------- GGUF


def test_a_gguf_file_is_read_as_transformers_reads_it(base, tmp_path):
    pytest.importorskip("gguf")
    file = tiny.gguf(tmp_path / "tiny.gguf", tiny.llama())
    lm = load(f"hf:{file}")
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    assert torch.equal(step(lm), tiny.logits(own))
    torch.testing.assert_close(step(lm), tiny.logits(tiny.llama()), atol=2e-5, rtol=0)  # and as it was before
    assert facts(lm).loaded["gguf"].startswith("tiny.gguf: F32 100% of ")
    assert load(f"hf:{file}@bf16").dtype == torch.bfloat16


def test_a_gguf_file_that_cannot_be_read_is_refused(tmp_path):
    pytest.importorskip("gguf")
    file = tiny.gguf(tmp_path / "tiny.gguf", tiny.llama())
    (tmp_path / "text.gguf").write_text("once upon a time")
    with pytest.raises(SpecError, match=r"text.gguf is no GGUF file: it begins with b'once'"):
        load(f"hf:{tmp_path / 'text.gguf'}")
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(SpecError, match=r"short.gguf is damaged .*5,000 bytes\). Copy it again"):
        load(f"hf:{tmp_path / 'short.gguf'}")
    with pytest.raises(SpecError, match=r"there is no file .*gone.gguf"):
        load(f"hf:{tmp_path / 'gone.gguf'}")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(SpecError, match=r"model.bin is a file; a model is a folder, an id of the hub, or a file"):
        load(f"hf:{tmp_path / 'model.bin'}")


@pytest.mark.real_model
@pytest.mark.thorough
def test_a_real_gguf_file_of_four_bits_is_what_transformers_makes_of_it():
    folder = real_model_folder()
    files = [] if folder is None else sorted(folder.glob("*.gguf"))
    if not files:
        pytest.skip(f"{MISSING}, with a .gguf in it")
    lm = load(f"hf:{files[0]}")
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name).eval()
    assert torch.equal(step(lm), tiny.logits(own))
    assert "Q4_1" in facts(lm).loaded["gguf"]
    assert facts(lm).precision.name == "fp32"  # in memory: transformers unpacks it where it has no kernel
    assert len(lm.tokenizer.encode("The quick brown fox")[0]) == 4


# ---------------------------------------------------------------------------------------------------------- on the hub


HUB = """
import json, os, sys
from pathlib import Path
from stub_hub import StubHub

found = {}
with StubHub(Path(sys.argv[1])) as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from pytest_lmeval.errors import SpecError
    from pytest_lmeval.models._identity import facts
    from pytest_lmeval.models._sources import load
    for spec in sys.argv[2:]:
        try:
            lm = facts(load(spec))
            found[spec] = [lm.fingerprint, lm.loaded]
        except SpecError as error:
            found[spec] = str(error)
    found["asked"] = [path for _, path in hub.asked]
print("found", json.dumps(found), flush=True)
"""


def from_hub(folder, home, *specs):
    """What a child found in a hub that serves a folder: fingerprints and facts, or errors; and what it asked for."""
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": paths, "LMEVAL_HUB_TIMEOUT": "5"}
    command = [sys.executable, "-W", "ignore", "-c", HUB, str(folder), *specs]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("found ")]
    assert lines, ran.stderr[-3000:]
    return json.loads(lines[0].removeprefix("found "))


@pytest.mark.thorough
def test_an_adapter_of_the_hub_is_put_over_the_base_that_it_names(base, adapter, tmp_path):
    found = from_hub(adapter, tmp_path, "hf:moods/well")
    assert found["hf:moods/well"][0] == fingerprint(load(f"hf:{base},adapter={adapter}"))


@pytest.mark.thorough
def test_a_revision_of_the_hub_is_asked_for_and_its_commit_recorded(base, tmp_path):
    there, gone = "hf:moods/well,revision=v2", "hf:moods/404,revision=v3"
    found = from_hub(base, tmp_path, there, gone)
    assert found[there] == [fingerprint(load(f"hf:{base}")), {"revision": "0" * 40}]
    assert any("/v2" in path for path in found["asked"])
    assert "there is no such repository, revision or file" in found[gone]
    assert "looked up on the hub at the revision 'v3'" in found[gone]
