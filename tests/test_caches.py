"""A static or a quantized KV cache in place of the model's own: carried, recorded, and held to the laws."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_tiny as tiny  # noqa: E402
from reading import measure_perplexity  # noqa: E402

from pytest_lmeval.errors import SpecError  # noqa: E402
from pytest_lmeval.laws._probe import probe  # noqa: E402
from pytest_lmeval.models._identity import facts, fingerprint  # noqa: E402
from pytest_lmeval.models._model import fork, state_types  # noqa: E402
from pytest_lmeval.models._sources import load  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("base"))


def names(state):
    return {kind.__name__ for kind in state_types(state)}


def test_a_static_cache_gives_the_numbers_of_the_model_s_own_and_is_what_is_carried(base):
    lm, own = load(f"hf:{base},cache=static:64"), load(f"hf:{base}")
    with torch.no_grad():
        first, state = lm.step(tiny.IDS[:, :17])
        branch = fork(state)
        rest = lm.step(tiny.IDS[:, 17:], state)[0]
        torch.testing.assert_close(torch.cat([first, rest], 1), own.step(tiny.IDS)[0], atol=2e-5, rtol=0)
        assert torch.equal(lm.step(tiny.IDS[:, 17:], branch)[0], rest)
    assert "StaticLayer" in names(state)
    assert (lm.context_length, lm.packing) == (64, None)
    assert facts(lm).form == "transformers, static cache of 64 tokens"
    assert facts(lm).loaded == {"cache": "static cache of 64 tokens"}
    others = (own, load(f"hf:{base},cache=static:65"), load(f"hf:{base},cache=quantized"))
    assert fingerprint(lm) not in map(fingerprint, others)
    assert fingerprint(load(f"hf:{base},cache=dynamic")) == fingerprint(own)


def test_a_text_longer_than_a_static_cache_is_read_in_windows(base):
    result = measure_perplexity(load(f"hf:{base},cache=static:32"), tiny.IDS[0].repeat(3).numpy())
    assert (result.tokens, result.record.settings["window"]) == (119, 32)
    assert result.record.details["why"] == "the model's context is 32 tokens"


def test_the_length_of_a_static_cache_is_limited_by_the_model(base, tmp_path):
    assert load(f"hf:{base},cache=static").context_length == 2048  # that of the model
    tiny.saved(tmp_path / "long", max_position_embeddings=100_000)
    assert load(f"hf:{tmp_path / 'long'},cache=static").context_length == 4096
    with pytest.raises(SpecError, match=r"a static cache of 4096 tokens is more than the 2048 that the model reads"):
        load(f"hf:{base},cache=static:4096")
    with pytest.raises(SpecError, match="holds no text to predict"):
        load(f"hf:{base},cache=static:1")


def test_the_laws_are_tried_on_a_static_cache(base):
    certificate = probe(load(f"hf:{base},cache=static:400"), budget=1)
    assert certificate.verdict == "exact-any-chunk", certificate


def test_a_quantized_cache_breaks_splits_and_the_verdict_says_so(base):
    """What was read before is rounded, and what is read at once is not: numbers depend on how a text is cut."""
    lm = load(f"hf:{base},cache=quantized")
    with torch.no_grad():
        _, state = lm.step(tiny.IDS[:, :17])
        assert "Fp8QuantizedLayer" in names(state)
    certificate = probe(lm, budget=1)
    assert certificate.verdict == "inexact"
    assert certificate.laws["splits"].status == "broken"
    assert facts(lm).loaded["cache"] == "quantized cache (fp8)"


def test_a_quantizer_that_is_missing_and_a_model_without_such_a_cache_are_refused(base, tmp_path):
    from transformers.utils import is_hqq_available

    if not is_hqq_available():
        with pytest.raises(SpecError, match=r"cannot be read with a quantized cache \(hqq\): .*HQQ"):
            load(f"hf:{base},cache=quantized:hqq")
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = transformers.MistralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48, sliding_window=8
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "window")
    with pytest.raises(
        SpecError, match=r"MistralForCausalLM cannot be read with a quantized cache .*only full attention layers"
    ):
        load(f"hf:{tmp_path / 'window'},cache=quantized")
    mamba = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    with pytest.raises(SpecError, match=r"MambaForCausalLM cannot be read with a quantized cache .*Leave cache= out"):
        load(f"hf:{tmp_path / 'mamba'},cache=quantized")


def test_a_compiled_model_carries_the_cache_that_was_asked_for(base):
    lm = load(f"hf:{base},cache=static:64,compile=eager")
    with torch.no_grad():
        logits, state = lm.step(tiny.IDS)
        torch.testing.assert_close(logits, load(f"hf:{base}").step(tiny.IDS)[0], atol=2e-5, rtol=0)
    assert "StaticLayer" in names(state)
    assert facts(lm).form == "transformers, static cache of 64 tokens, compiled by eager"
