"""A spec that says compile=True: the laws, and all else, go through torch.compile, and what it breaks is found."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from probing import probed
from reading import ids_of, measure_perplexity
from torch import nn

from pytest_lmeval import equivalence
from pytest_lmeval.errors import SpecError
from pytest_lmeval.laws._weights import copy_of, float64_copy
from pytest_lmeval.models._compiled import compiled
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.training._weights import copy_of as trained_copy

VOCAB = 7


class Summing(nn.Module):
    """Predicts from the sum of all tokens so far, which is the state [b, 1, width]: quickly compiled."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, input_ids, state=None):
        sums = self.embed(input_ids).cumsum(1)
        sums = sums if state is None else sums + state
        return self.head(torch.tanh(sums)), sums[:, -1:]


@pytest.fixture(scope="module")
def backend():
    """A backend `planted` of torch.compile, which runs graphs as they are, but for what it is told."""
    told = SimpleNamespace()

    def planted(graph, example_inputs):
        def run(*inputs):
            told.calls += 1
            return tuple(told.change(output, inputs) for output in graph(*inputs))

        if told.error is not None:
            raise told.error
        return run

    torch.compiler.list_backends()  # the first import of what is registered
    torch._dynamo.register_backend(planted, name="planted")
    return told


@pytest.fixture(autouse=True)
def planted(backend):
    """calls of graphs; change: what becomes of an output; error: raised by the compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    vars(backend).update(calls=0, change=lambda output, inputs: output, error=None)
    return backend


def model():
    return compiled(as_model(Summing(), spec="mine,compile=planted"), "planted")


def test_the_laws_are_tried_on_what_is_compiled_for_any_number_of_rows_and_tokens(planted):
    result = equivalence(model())
    assert result.verdict == "exact-any-chunk"
    assert planted.calls > 300  # steps of the probe
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["total"] == frames["ok"] < 40  # none was run as it is, and no shape has a graph of its own


def test_a_fault_of_the_compiler_is_found_by_the_laws(planted):
    def moved(output, inputs):
        """The logits of a single token that continues a state."""
        continued = any(isinstance(one, torch.Tensor) and one.ndim == 3 for one in inputs)
        return output + torch.linspace(0, 0.1, VOCAB) if continued and output.shape[1:] == (1, VOCAB) else output

    planted.change, lm = moved, model()
    assert "steps" in probed(lm).certificate.broken
    assert probed(lm.module).verdict == "exact-any-chunk"


def test_numbers_are_those_of_the_model_as_it_is_and_its_identity_is_another(planted):
    eager, lm = as_model(Summing(), spec="mine,compile=planted"), model()
    one, other = (measure_perplexity(which, ids_of(400) % VOCAB, chunk_size=64) for which in (eager, lm))
    assert float(one.nll) == pytest.approx(float(other.nll), abs=1e-5)
    assert planted.calls > 0
    assert fingerprint(lm) == fingerprint(model()) != fingerprint(eager)
    assert other.record.lm.form == "functional, compiled by planted"


def test_copies_are_not_compiled(planted):
    lm = model()
    again, calls = as_model(pickle.loads(pickle.dumps(copy.deepcopy(lm.module)))), planted.calls
    for other in (float64_copy(lm), copy_of(lm), trained_copy(lm), again):
        other.step(other.random_ids(1, 5))
        assert (other.compiled, planted.calls) == ("", calls)
    lm.step(lm.random_ids(1, 5))
    assert planted.calls > calls


def test_a_spec_says_what_is_compiled_and_in_which_precision():
    lm = load("zoo:lstm,compile=eager@bf16")
    assert (lm.spec, lm.compiled, lm.dtype) == ("zoo:lstm,compile=eager@bf16", "eager", torch.bfloat16)
    assert load("zoo:lstm,compile=False").compiled == ""
    assert fingerprint(lm) != fingerprint(load("zoo:lstm@bf16"))


class InvalidCxxCompiler(RuntimeError):
    """As inductor's, which is known by its name."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("no such kernel"), r"mine,compile=planted cannot be compiled: .*no such kernel.* Leave compile= out"),
        (InvalidCxxCompiler(), r"needs a C\+\+ compiler, and none was found: install g\+\+, or name it in CXX"),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_once(planted, error, says):
    planted.error = error
    with pytest.raises(SpecError, match=says):
        model()


def test_an_unknown_backend_and_a_form_that_calls_no_forward_are_refused():
    with pytest.raises(SpecError, match=r"torch.compile has no backend 'inductr' here; .* Did you mean inductor\?"):
        load("zoo:lstm,compile=inductr")
    with pytest.raises(SpecError, match="a model of the form 'step' is stepped by another method"):
        load("tiny_models:Stepper,compile=True")


@pytest.mark.thorough
def test_a_model_of_transformers_is_compiled_by_inductor(tmp_path):
    from test_huggingface import MODELS

    MODELS["llama"]().save_pretrained(tmp_path)
    eager, lm = load(f"hf:{tmp_path}"), load(f"hf:{tmp_path},compile=True")
    assert (lm.spec, lm.compiled) == (f"hf:{tmp_path},compile=True", "inductor")
    one, other = (measure_perplexity(which, ids_of(100), chunk_size=33) for which in (eager, lm))  # each graph takes long
    assert float(one.nll) == pytest.approx(float(other.nll), abs=1e-5)
