"""Served equals trained: the agreement of a server and its model is theirs, and a planted mismatch is found and explained."""

import dataclasses
import gc
import re

import numpy as np
import pytest
import torch
from stub_server import StubServer

from pytest_lmeval import Refused, SpecError, agreement, policy_for
from pytest_lmeval.measures._agreement import measure_agreement
from pytest_lmeval.models._sources import as_model, load

IDS = np.random.default_rng(0).integers(97, 123, 700)
WINDOW = 350


def llama(change=None, *, seed=0, **config):
    """A small Llama over bytes, of large weights, so that its predictions depend on the context."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=256, num_key_value_heads=2, max_position_embeddings=1024, **sizes, **config)
    ).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if "embed" in name else 5)
                if change is not None:
                    parameter.copy_(change(parameter))
    return as_model(module, spec="hf:llama", tokenizer="bytes")


def coarser(weight):
    """The weights in 8 bits, by row."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


@pytest.fixture
def serve():
    running = []

    def start(model, kind="vllm", **options):
        running.append(StubServer(model, kind, longest=800, **options).__enter__())
        return load(running[-1].spec, concurrency=4)

    yield start
    gc.collect()
    for server in running:
        server.__exit__()


def compared(lm, reference):
    policies = [policy_for(one, window=WINDOW, overlap=0) for one in (lm, reference)]
    return measure_agreement(lm, reference, IDS, policy=policies[0], reference_policy=policies[1])


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_of_the_same_weights_agrees_and_nothing_is_explained(serve, kind):
    model = llama()
    result = compared(serve(model, kind), model)
    assert result.agreement == 1
    assert result.mean_exp_difference == pytest.approx(1, abs=1e-5)
    assert result.kl_at_least < 1e-6
    assert result.explanation == []
    assert result.record.cost.tokens == len(IDS) - 1


def test_what_top_k_bounds_is_never_more_than_what_all_log_probabilities_give(serve):
    model, other = llama(), llama(coarser)
    exact, bound = compared(other, model), compared(serve(other), model)
    assert 0 < bound.kl_at_least <= exact.kl * (1 + 1e-6)
    assert bound.nll_difference == pytest.approx(exact.nll_difference, abs=1e-5)
    assert bound.agreement == pytest.approx(exact.agreement)
    assert bound.mean_exp_difference == pytest.approx(exact.mean_exp_difference, abs=1e-5)
    swapped = compared(model, serve(other))
    assert swapped.nll_difference == pytest.approx(-exact.nll_difference, abs=1e-5)


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (lambda: llama(coarser), "They are small, and alike everywhere"),
        (lambda: llama(lambda weight: weight + 0.3 * torch.randn(weight.shape)), "They are there from the first tokens on"),
        (lambda: llama(seed=5), "look at the checkpoint, its revision and its adapter"),
        (
            lambda: llama(rope_parameters={"rope_type": "linear", "factor": 1.002, "rope_theta": 10000.0}),
            "They grow with the position.*look at rope theta and scaling",
        ),
        (
            lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
            "After a single token there is none, and then there is.*look at rope theta and scaling",
        ),
    ],
    ids=["quantized", "adapter", "other weights", "stretched rope", "scaled rope"],
)
def test_a_planted_mismatch_is_found_and_its_pattern_names_the_likely_causes(serve, planted, said):
    result = compared(serve(planted()), llama())
    assert len(result.explanation) == 1
    assert re.search(said, result.explanation[0])
    assert result.explanation[0] in result.record.notes
    worst = result.record.details["worst"]
    assert worst["id"] == IDS[worst["token"]]
    assert f">>>{chr(worst['id'])}<<<" in worst["text"]
    assert worst["difference"] == pytest.approx(abs(worst["lm"] - worst["reference"]))


@pytest.mark.parametrize(
    ("layer", "noise", "said"),
    [
        ("q_proj", 0.3, "None.* queries and keys of other weights.*adapter"),
        ("down_proj", 0.002, "small, and alike.*look at the adapter"),
    ],
)
def test_an_adapter_of_few_layers_is_among_what_its_differences_point_to(serve, layer, noise, said):
    tuned = llama()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in tuned.module.named_parameters():
            if layer in name:
                parameter.add_(noise * torch.randn(parameter.shape))
    (words,) = compared(serve(tuned), llama()).explanation
    assert re.search(said, words.replace("After a single token there is none", "None"))


def test_two_servers_are_compared(serve):
    result = compared(serve(llama()), serve(llama(), "sglang"))
    assert result.agreement == 1
    assert compared(serve(llama()), serve(llama(seed=3))).mean_exp_difference > 1.05


def test_another_chat_template_of_the_server_is_named(serve):
    model = llama()

    class Templated(type(model.tokenizer)):
        def apply_chat_template(self, messages, **options):
            return "".join(f"[{one['role']}]{one['content']}\n" for one in messages)

    own = dataclasses.replace(model, tokenizer=Templated())
    same = compared(serve(model, templated=lambda messages: list(Templated().apply_chat_template(messages).encode())), own)
    assert same.explanation == []
    other = compared(serve(model, templated=lambda messages: [*b"<s>"]), own)
    assert "the chat template of server:" in other.explanation[0]
    assert "writes another prompt than that of hf:llama: '<s>' in place of" in other.explanation[0]


def test_a_server_without_ids_or_log_probabilities_is_refused(serve):
    model = llama()
    with pytest.raises(Refused, match=r"tells the texts of its most likely tokens, not their ids"):
        compared(serve(model, "openai"), model)
    with pytest.raises(Refused, match=r"gives no log-probabilities of a prompt"):
        compared(serve(model, "llamacpp"), model)


def test_a_file_is_compared_in_the_windows_in_which_it_was_read_or_not_at_all(serve, tmp_path):
    model, long = llama(), np.tile(IDS, 2)
    agreement(model, model, long, save=tmp_path / "long")  # longer than its context: in windows that overlap
    agreement(model, model, IDS, save=tmp_path / "short")
    assert agreement(model, f"base:{tmp_path / 'long'}", long).record.metrics["largest_difference"] < 1e-4
    served = serve(model)
    with pytest.raises(SpecError, match=r"was read 1,024 tokens at once, and .* reads at most 798: predictions from other"):
        agreement(served, f"base:{tmp_path / 'long'}", long)
    smaller = dataclasses.replace(served, vocab_size=250)  # that of its tokenizer, where weights are padded
    assert agreement(smaller, f"base:{tmp_path / 'short'}", IDS).explanation == []
