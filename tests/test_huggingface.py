"""transformers models: every kind of cache is carried, and a folder is enough to load one."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from reading import measure_perplexity, stream  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_generation import say  # noqa: E402

from pytest_lmeval.data import corpus  # noqa: E402
from pytest_lmeval.errors import ModelError, NotPossible, SpecError  # noqa: E402
from pytest_lmeval.laws import Case, Harness, check  # noqa: E402
from pytest_lmeval.models._huggingface import HFTokenizer  # noqa: E402
from pytest_lmeval.models._identity import facts, fingerprint  # noqa: E402
from pytest_lmeval.models._model import fork  # noqa: E402
from pytest_lmeval.models._sources import as_model, load  # noqa: E402
from pytest_lmeval.report._words import model_line  # noqa: E402

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}
IDS = np.random.default_rng(0).integers(3, 64, 90)


def build(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # initial weights of such small models hardly depend on the input
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def gpt2(**options):
    return build("GPT2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, **options)


MODELS = {
    "llama": lambda: build("Llama", **SIZE, **HEADS),
    "mistral-window": lambda: build("Mistral", **SIZE, **HEADS, sliding_window=8),
    "gpt2": gpt2,
    "mamba2": lambda: build("Mamba2", **SIZE, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=16),
    "rwkv": lambda: build("Rwkv", **SIZE),
    "lfm2": lambda: build("Lfm2", **SIZE, **HEADS, layer_types=["conv", "full_attention"]),
}
RARE = {"gpt2", "lfm2"}  # the classes of their caches are those of others above


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.thorough) if n in RARE else n for n in MODELS])
def test_every_kind_of_cache_is_carried_and_can_be_forked(name):
    module = MODELS[name]()
    lm, ids = as_model(module), torch.from_numpy(IDS)[None]
    assert (lm.form, lm.stateful, lm.vocab_size) == ("transformers", True, 64)
    with torch.no_grad():
        logits = module(ids[:, :-1]).logits[0]
        _, state = lm.step(ids[:, :20])
        branch = fork(state)
        first, _ = lm.step(ids[:, 20:40], state)
        assert torch.equal(first, lm.step(ids[:, 20:40], branch)[0])
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    for chunk_size in (90, 32, 7):
        nll = np.concatenate([chunk.nll for chunk in stream(lm, IDS, chunk_size=chunk_size)])
        np.testing.assert_allclose(nll, expected, atol=2e-4)


def test_the_state_of_a_windowed_model_stops_growing_and_one_kept_inside_is_not_used():
    sizes = [chunk.state_bytes for chunk in stream(as_model(MODELS["mistral-window"]()), IDS, chunk_size=10)]
    growing = [chunk.state_bytes for chunk in stream(as_model(MODELS["llama"]()), IDS, chunk_size=10)]
    assert len(set(sizes[1:-1])) == 1
    assert growing == sorted(set(growing))
    options = {"num_attention_heads": 2, "lru_width": 32, "intermediate_size": 48, "attention_window_size": 8}
    assert not as_model(build("RecurrentGemma", **{**SIZE, "num_hidden_layers": 3}, **options)).stateful


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_sequences_are_read_in_one_row_unless_a_window_or_a_recurrence_misreads_the_mask(attention):
    cases = Case(20), Case(60, (40,))

    def tried(name):
        module = MODELS[name]()
        module.set_attn_implementation(attention)
        harness = Harness(as_model(module), longest=80)
        for case in cases:
            check("packed", harness, case)

    tried("llama")
    with pytest.raises(NotPossible, match="each sees its own past, and sequence 0 is not what it is alone"):
        tried("mistral-window")
    assert as_model(MODELS["mamba2"]()).packing is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder written by `save_pretrained`, with a small trained tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    path = tmp_path_factory.mktemp("model")
    text = "the quick brown fox jumps over the lazy dog, naïve café, 你好 " * 20
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=300, special_tokens=["<s>"])
    trained.save(str(path / "tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>")
    tokenizer.save_pretrained(path)
    build("Llama", **{**SIZE, "vocab_size": len(tokenizer)}, **HEADS).save_pretrained(path)
    return path


def test_a_folder_is_loaded_and_every_byte_is_scored(folder, tmp_path):
    (tmp_path / "text.txt").write_text("the lazy café, 你好 fox\n" * 50, encoding="utf-8")
    lm = load(f"hf:{folder}")
    result = measure_perplexity(lm, corpus(f"text:{tmp_path / 'text.txt'}"))
    nats, size = float(result.nll) * result.tokens, (tmp_path / "text.txt").stat().st_size
    assert float(result.bits_per_byte) == pytest.approx(nats / np.log(2) / size)  # the first byte too, after <s>
    text = "naïve 你好 the fox"
    ids, ends = lm.tokenizer.encode(text)
    assert (len(ids), ends[-1]) == (len(ends), len(text.encode()))
    assert (np.diff(ends) >= 0).all()


def bytes_of_words():
    """A tokenizer as Llama's: words, and for other characters their bytes, which are replaced together until all are there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "▁a": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def bytes_in_pairs():
    """A tokenizer as GPT-2's, of single bytes and a few pairs."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["ab é€ é€ 🙂🙂 ab"] * 9, vocab_size=270)
    return made._tokenizer


@pytest.mark.parametrize("make", [bytes_of_words, bytes_in_pairs])
@pytest.mark.parametrize("text", ["é", "a é€🙂 b", "🙂🙂 é", "ab"])
def test_an_answer_grows_by_whole_characters_and_special_tokens_are_only_searched_in(make, text):
    own = HFTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="<|end|>"), "tiny")
    end = own.tokenizer.convert_tokens_to_ids("<|end|>")
    assert own.special == {end: "<|end|>"}
    own.ends = ()  # of a model whose turns end with another token than its texts
    ids, _ = own.encode(text)
    answer, seen = say(own, [*ids.tolist(), end, *ids.tolist()], stop=("<|end|>",))
    assert (answer.text.strip(), answer.why) == (text, "stop")
    assert all(later.startswith(before) for before, later in pairwise(seen))
    assert {letter for shown in seen for letter in shown} <= {*text, " "}
    half, _ = say(own, ids.tolist()[:-1] or [end])
    assert text.startswith(half.text.strip())


def test_a_text_longer_than_the_context_is_read_in_windows():
    result = measure_perplexity(as_model(gpt2(n_positions=32)), IDS)
    assert (result.tokens, result.record.settings["window"]) == (89, 32)
    assert result.record.details["why"] == "the model's context is 32 tokens"


def test_code_in_a_model_folder_is_not_run_by_default(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "evil")
    config = json.loads((tmp_path / "evil" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SpecError, match="could not be loaded"):
        load(f"hf:{tmp_path / 'evil'}")
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_tokenizer_scores_ids_and_refuses_text(folder, tmp_path):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(folder / name, tmp_path)
    lm = load(f"hf:{tmp_path}")
    assert measure_perplexity(lm, IDS, tokens=50).tokens == 49
    with pytest.raises(SpecError, match="has no tokenizer that can be loaded"):
        measure_perplexity(lm, corpus("automaton:size=100"))
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(lm) == fingerprint(load(f"hf:{tmp_path / 'copy'}")) != fingerprint(load(f"hf:{folder}@bf16"))


def changed(folder, path, change):
    """A copy of a model folder, whose weights `change` has changed."""
    shutil.copytree(folder, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return f"hf:{path}"


def test_a_checkpoint_without_all_weights_is_refused_by_their_names(folder, tmp_path):
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    changes = {
        f"missing: {up}, {norm}[.]": lambda tensors: (tensors.pop(up), tensors.pop(norm)),
        rf"of another shape: {norm} \[31\] for \[32\]": lambda tensors: tensors.update({norm: torch.ones(31)}),
        "missing: .* and 3 more": lambda tensors: [
            tensors.pop(name) for name in list(tensors) if ".0.mlp" in name or "norm" in name
        ],
    }
    for number, (message, change) in enumerate(changes.items()):
        with pytest.raises(SpecError, match=rf"is incomplete\. .*{message}"):
            load(changed(folder, tmp_path / str(number), change))
    with pytest.raises(SpecError, match="is incomplete"):
        load(changed(folder, tmp_path / "half", lambda tensors: tensors.pop(norm)) + "@bf16")
    random = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "0").get_parameter(up) for _ in range(2)]
    assert not torch.equal(*random)  # which is why


def test_tied_weights_are_no_missing_ones_and_unused_ones_are_said(folder, tmp_path):
    lm = load(f"hf:{folder}")
    more = {f"vision.{n}.weight": torch.ones(2) for n in range(7)}
    spec = changed(folder, tmp_path / "more", lambda tensors: tensors.update(more))
    other = load(spec)
    assert fingerprint(other) == fingerprint(lm)
    assert (facts(lm).unused, facts(other).unused) == ([], [*more])
    assert model_line(facts(other)).endswith(
        "; 7 tensors of its checkpoint not used: vision.0.weight, vision.1.weight, vision.2.weight, vision.3.weight, "
        "vision.4.weight and 2 more"
    )
    assert "checkpoint" not in model_line(facts(lm))
    tied = build("Llama", **SIZE, **HEADS, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = load(f"hf:{tmp_path / 'tied'}")
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(SpecError, match=r"missing: lm_head\.weight"):
        load(f"hf:{tmp_path / 'tied'}")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_transformers_saved_is_complete(name, tmp_path):
    MODELS[name]().save_pretrained(tmp_path)
    assert facts(load(f"hf:{tmp_path}")).unused == []


def test_the_attention_implementation_is_part_of_who_a_model_is(folder):
    lms = [load(f"hf:{folder}") for _ in range(3)]
    lms[1].module.set_attn_implementation("eager")
    found = list(map(fingerprint, lms))
    assert found[0] == found[2] != found[1]
    lms[1].module.set_attn_implementation("sdpa")
    assert fingerprint(lms[1]) == found[0]


def test_models_that_share_a_tokenizer_have_their_own_end_tokens(folder):
    tokenizer, modules = load(f"hf:{folder}").tokenizer, [MODELS["llama"](), MODELS["llama"]()]
    modules[1].generation_config.eos_token_id = [2, 7]
    assert [as_model(module, tokenizer=tokenizer).tokenizer.ends[-1] for module in modules] == [2, 7]


def test_a_model_whose_cache_fails_is_stepped_without_it_and_one_that_cannot_be_called_refused():
    module = MODELS["llama"]()
    forward = module.forward

    def crashing(input_ids=None, use_cache=None, **rest):
        if use_cache:
            raise AttributeError("no attribute 'num_hidden_layers'")
        return forward(input_ids=input_ids, use_cache=False, **rest)

    module.forward = crashing
    lm = as_model(module)
    assert not lm.stateful
    assert "without its cache, which raised AttributeError: no attribute" in lm.form
    module.forward = forward
    module.to("meta")
    module.model.embed_tokens = torch.nn.Embedding(64, 32)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*raised .*: 1 tensors on cpu, \d+ tensors on meta"):
        as_model(module)
