"""kyutai's `moshi`: single frames give the losses of its own full pass, and the probe finds what its ring buffer loses."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import measure_perplexity, stream

from pytest_lmeval.errors import LawBroken, SpecError
from pytest_lmeval.laws import probe, replay
from pytest_lmeval.laws._weights import float64_copy
from pytest_lmeval.measures._latency import measure_latency
from pytest_lmeval.models._model import fork
from pytest_lmeval.models._sources import as_model, load

moshi_lm = pytest.importorskip("moshi.models.lm", reason="pip install 'pytest-lmeval[moshi]' and pip install --no-deps moshi")
no_compile = pytest.importorskip("moshi.utils.compile").no_compile

CONTEXT = 16
SETTINGS = {
    "delays": [0, 0, *[1] * 7, 0, *[1] * 7], "n_q": 16, "dep_q": 8, "card": 64, "text_card": 128, "dim": 64, "num_heads": 4,
    "num_layers": 1, "hidden_scale": 2, "norm": "rms_norm_f32", "gating": "silu", "positional_embedding": "rope",
    "depformer_dim": 32, "depformer_num_heads": 2, "depformer_num_layers": 1, "depformer_multi_linear": True,
    "depformer_weights_per_step": True, "depformer_pos_emb": "none",
}  # fmt: skip


def tiny(context=CONTEXT, **options):
    """An LMModel as its loader configures it, but small, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return moshi_lm.LMModel(**{**SETTINGS, "context": context, **options}).eval()


MODULE = tiny()
LM = as_model(MODULE)


def codes_of(length, seed=0, gaps=0.0):
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, size, length) for size in LM.codebooks.sizes], axis=1)
    return np.where(random.random(codes.shape) < gaps, -1, codes)


def full_losses(codes, module=MODULE):
    """[t, 8] losses of the model's own forward pass, NaN where its mask says that there is no valid code."""
    whole = torch.from_numpy(codes.T[None])
    with torch.no_grad(), no_compile():
        output = module(whole)
    targets = whole[0, 1:9].clamp(min=0)
    logits = output.logits[0].double().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
    return losses.masked_fill(~output.mask[0], float("nan")).T.numpy()


def undelayed(chunks):
    """[t, 8] losses of a stream, by the frame whose codes they predict."""
    nll = np.concatenate([chunk.nll for chunk in chunks])
    columns = [np.append(nll[delay:, column], [np.nan] * delay) for column, delay in enumerate(LM.codebooks.delays)]
    return np.stack(columns, axis=1)


def test_a_moshi_model_is_recognized_by_its_attributes():
    assert (LM.form, LM.boundaries) == ("moshi", (CONTEXT,))
    assert (LM.codebooks.sizes, LM.codebooks.scored) == ((128, *[64] * 16), tuple(range(1, 9)))
    assert LM.codebooks.delays == (0, 1, 1, 1, 1, 1, 1, 1)


@settings(max_examples=4)
@given(st.integers(1, 40), st.sampled_from([0.0, 0.3]))
def test_single_frames_give_the_losses_of_the_full_pass(length, gaps):
    codes = codes_of(length, gaps=gaps)
    np.testing.assert_allclose(undelayed(stream(LM, codes, chunk_size=1)), full_losses(codes), atol=1e-4)


@pytest.mark.parametrize("length", [1, CONTEXT, CONTEXT + 1, 50])
def test_the_first_chunk_may_be_longer_than_the_ring_buffer(length):
    codes = codes_of(length + 20)
    chunks = list(stream(LM, codes[:length], chunk_size=length))
    state = fork(chunks[-1].state)
    chunks += stream(LM, codes[length:], chunk_size=1, state=state, position=length)
    np.testing.assert_allclose(undelayed(chunks), full_losses(codes), atol=1e-4)


@pytest.mark.parametrize("chunk_size", [3, CONTEXT])
def test_chunks_of_several_frames_are_wrong_once_the_ring_buffer_is_full(chunk_size):
    codes = codes_of(3 * CONTEXT)
    off = np.nan_to_num(np.abs(undelayed(stream(LM, codes, chunk_size=chunk_size)) - full_losses(codes))).max(axis=1)
    first = int(np.flatnonzero(off > 1e-3)[0])
    overwritten = CONTEXT // chunk_size * chunk_size  # the first frame whose chunk overwrites what it should see
    assert overwritten - 1 <= first <= overwritten + 1


def test_the_probe_finds_that_only_single_frames_are_exact():
    result = probe(LM, examples=1, budget=1000)
    assert result.verdict == "exact-step-only", result
    assert result.certificate.broken == {"splits"}
    assert result.laws["steps"].worst_ratio < 8
    assert result.certificate.reference == "float64 run of the same weights"
    assert result.certificate.not_reached == ()
    case = result.laws["splits"].counterexamples[0].case
    assert case["length"] > CONTEXT
    with pytest.raises(LawBroken):
        replay(LM, "splits", **case)


@pytest.mark.thorough
def test_the_certificate_names_a_context_that_the_probe_did_not_reach():
    result = probe(as_model(tiny(context=600)), budget=1000, longest=40)
    assert result.verdict == "unproven", result
    assert result.certificate.not_reached == (600,)
    assert result.certificate.broken == frozenset()


def test_the_float64_copy_has_the_same_weights():
    codes, double = codes_of(20), float64_copy(LM)
    assert double.dtype == torch.float64
    low, high = (np.concatenate([chunk.losses for chunk in stream(lm, codes, chunk_size=1)]) for lm in (LM, double))
    np.testing.assert_allclose(low, high, atol=1e-4)
    assert (low != high).any()


def test_forks_of_a_state_are_independent_it_does_not_grow_and_the_module_keeps_none():
    ids = LM.random_ids(1, 30)
    with torch.no_grad():
        state = LM.step(ids[..., :20])[1]
        branch = fork(state)
        first = LM.step(ids[..., 20:21], state)[0]
        LM.step(ids[..., 25:26], fork(branch))
        assert torch.equal(first, LM.step(ids[..., 20:21], branch)[0])
    assert not MODULE.is_streaming
    assert len({chunk.state_bytes for chunk in stream(LM, codes_of(40), chunk_size=1)}) == 1


@pytest.mark.parametrize("options", [{"context": None}, {"dep_q": 0, "depformer_weights_per_step": False}])
def test_a_model_that_cannot_be_streamed_or_scored_is_refused(options):
    with pytest.raises(SpecError, match="cannot be streamed: it has"):
        as_model(tiny(**options))


def test_perplexity_is_the_mean_over_valid_codes_and_latency_can_be_measured():
    codes = codes_of(60, gaps=0.1)
    result = measure_perplexity(LM, codes, chunk_size=1, positions=(50,))
    assert float(result.nll) == pytest.approx(np.nanmean(full_losses(codes)), rel=1e-5)
    assert set(result.loss_at) == {50}
    assert measure_latency(LM, seq_len=8, new_tokens=3, runs=2, warm_up=1).itl.n == 4


def test_other_models_are_loaded_without_importing_moshi(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "moshi"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert load("zoo:moshi").form == "functional"
