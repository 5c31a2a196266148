"""Every form of model is recognised by looking at it and stepped alike; a spec that names nothing says so."""

import gc
import importlib
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from reading import stream
from tiny_models import CARRYING, Functional, GetSetState, PortableStreaming, Stateless, Stepper, Streaming

from pytest_lmeval import registry
from pytest_lmeval.errors import ModelError, SpecError
from pytest_lmeval.models import _precision as precision, _specs as specs
from pytest_lmeval.models._sources import as_model, load, resolve_device
from pytest_lmeval.models._specs import split

IDS = np.random.default_rng(0).integers(0, 32, 70)


@pytest.mark.parametrize(
    ("toy", "form"),
    [
        (Functional, "functional"),
        (Stateless, "stateless"),
        (GetSetState, "get_set_state"),
        (Streaming, "streaming"),
        (PortableStreaming, "streaming"),
        (Stepper, "step"),
    ],
)
def test_the_form_is_found_by_looking(toy, form):
    assert as_model(toy()).form == form


@pytest.mark.parametrize("toy", CARRYING)
def test_every_form_gives_the_same_losses_and_forgets_the_sequence_before(toy):
    expected = np.concatenate([chunk.nll for chunk in stream(as_model(Functional()), IDS, chunk_size=70)])
    lm = as_model(toy())
    for chunk_size in (70, 11, 1):
        nll = np.concatenate([chunk.nll for chunk in stream(lm, IDS, chunk_size=chunk_size)])
        np.testing.assert_allclose(nll, expected, atol=1e-5)


def test_a_module_without_reset_state_is_brought_back_to_its_beginning():
    class NoReset(GetSetState):
        reset_state = property()  # hasattr is False

        def __init__(self):
            super().__init__()
            self.held = torch.zeros(1, 1, 16)

    lm = as_model(NoReset())
    first = [chunk.nll for chunk in stream(lm, IDS, chunk_size=16)]
    again = [chunk.nll for chunk in stream(lm, IDS, chunk_size=16)]
    assert np.array_equal(np.concatenate(first), np.concatenate(again))


def test_logits_beside_a_loss_are_taken():
    class NanoGPT(Functional):
        def forward(self, idx, targets=None):
            return super().forward(idx)[0], None

    lm = as_model(NanoGPT())
    assert lm.form == "stateless"
    assert lm.vocab_size == 32


def test_a_model_is_put_in_eval_mode():
    module = Functional().train()
    as_model(module)
    assert not module.training


def test_bytes_are_the_tokenizer_of_a_vocabulary_of_256_only():
    assert as_model(Functional(vocab=256)).tokenizer.name == "bytes"
    assert as_model(Functional()).tokenizer is None


def test_byte_offsets_are_those_of_the_text():
    ids, ends = as_model(Functional(vocab=256)).tokenizer.encode("né")
    assert ids.tolist() == [110, 195, 169]
    assert ends.tolist() == [1, 2, 3]


def test_a_stream_that_was_opened_to_look_is_closed_again():
    class Strict(Streaming):
        @contextmanager
        def streaming(self, batch_size):
            assert self.held is None, "already streaming!"
            self.held = torch.zeros(1, batch_size, 16)
            yield
            self.held = None

        held = None

    module = Strict()
    as_model(module)
    as_model(module)
    expected = np.concatenate([chunk.nll for chunk in stream(as_model(Functional()), IDS, chunk_size=70)])
    nll = np.concatenate([chunk.nll for chunk in stream(as_model(module), IDS, chunk_size=9)])
    np.testing.assert_allclose(nll, expected, atol=1e-5)
    gc.collect()
    as_model(module)  # the stream of the last reading ended with the model that read it


def test_a_model_is_let_go():
    module = Functional()
    lm = as_model(module)
    list(stream(lm, IDS))
    alive = weakref.ref(module)
    del module, lm
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("odd", [{"step": 0}, {"window": [4, 8]}, {"streaming": True}])
def test_an_attribute_of_a_telling_name_is_only_believed_if_it_fits(odd):
    module = Functional()
    vars(module).update(odd)
    assert as_model(module).form == "functional"


def test_a_tokenizer_needs_no_more_than_encode():
    class Letters:
        def encode(self, text):
            return [ord(letter) % 32 for letter in text], range(1, len(text) + 1)

    from reading import measure_perplexity

    from pytest_lmeval.data import Corpus, Document

    corpus = Corpus("letters", "test", documents=lambda: iter([Document("a", "to be or not to be")]))
    result = measure_perplexity(as_model(Functional(), tokenizer=Letters()), corpus)
    assert result.record.settings["tokenizer"] == "Letters"
    assert float(result.bits_per_byte) == pytest.approx(float(result.nll) / np.log(2))
    with pytest.raises(SpecError, match="int is no tokenizer"):
        as_model(Functional(), tokenizer=3)


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match="neither callable nor has `step`"):
        as_model(object())


def test_an_error_of_the_model_is_told_with_what_it_was_asked():
    class Failing(Functional):
        def forward(self, input_ids):
            raise IndexError("oops")

    with pytest.raises(ModelError, match=r"one token .* raised IndexError: oops"):
        as_model(Failing())


def test_a_model_that_returns_no_logits_is_refused():
    class Chatty(Functional):
        def forward(self, input_ids):
            return "hello"

    with pytest.raises(ModelError, match="returned str for one token"):
        as_model(Chatty())


def test_the_demo_loads_in_each_precision():
    assert load("demo").dtype == torch.float32
    assert load("demo@bf16").dtype == torch.bfloat16
    assert load("demo", bits=16).dtype == torch.bfloat16
    assert load("demo@fp16", bits=32).dtype == torch.float16


def test_a_folder_that_exists_is_no_precision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split("hf:./model@int8", None) == ("hf:./model", "int8")
    (tmp_path / "model@int8").mkdir()
    assert split("hf:./model@int8", None) == ("hf:./model@int8", "")
    assert split("hf:model@int8", 16) == ("hf:model@int8", "bf16")
    assert split("hf:model@int8@fp16", None) == ("hf:model@int8", "fp16")
    assert split("model@int8", None) == ("model", "int8"), "no folder is meant where no source reads one"
    with pytest.raises(SpecError, match=r"^hf:\./model@int8 could not be loaded: .* is a folder here"):
        load("hf:./model@int8")
    with pytest.raises(
        SpecError, match=r"^hf:\./model: there is no folder \./model \(looked from .*\). Did you mean hf:model@int8\?"
    ):
        load("hf:./model")


def test_the_precisions_that_are_read_are_those_that_can_be_given():
    assert tuple(precision.DTYPES) == specs.FLOATS
    assert set(specs.BITS.values()) == {*specs.FLOATS, *specs.PACKED} - {"fp16"}


# ------------------------------------------------------------------------------------ sources by their names


def test_the_zoo_is_found_by_name():
    assert {"zoo:demo", "zoo:mamba", "demo", "hf"} <= set(registry.names("models"))
    assert load("zoo:demo").vocab_size == 256


SOURCES = """
import torch
from tiny_models import Functional, Stepper
from pytest_lmeval.models._sources import Loaded, as_model

seen = []

def plain():
    return Functional()

def of(rest):
    return Functional(vocab=int(rest))

def reading(rest, *, dtype=torch.float64, spec, trust_remote_code):
    seen.append((rest, dtype, spec, trust_remote_code))
    return Loaded(Functional().to(dtype), "bytes", 12)

def whole():
    return as_model(Functional(), spec="something else")

def stepping(rest, **options):
    assert not options
    return Stepper()

def keeps(rest, dtype=None):
    return Functional()

MODELS = {"family:one": plain, "family:two": "more_models:whole"}
"""


@pytest.fixture
def sources(packages):
    names = ("plain", "of", "reading", "whole", "stepping", "keeps")
    packages("more-models", SOURCES, models={**{name: f"more_models:{name}" for name in names}, "family": "more_models:MODELS"})
    return importlib.import_module("more_models")


def test_a_source_of_another_package_is_called_with_what_it_takes(sources):
    assert load("plain").vocab_size == load("family:one").vocab_size == 32
    assert load("of:7").vocab_size == 7
    assert load("stepping:x").form == "step"
    assert load("plain@bf16").dtype == torch.bfloat16


def test_a_source_reads_in_the_precision_and_says_how_it_was_saved(sources):
    lm = load("reading:x:y@bf16", trust_remote_code=True)
    assert (lm.dtype, lm.bytes_before, lm.spec) == (torch.bfloat16, 12, "reading:x:y@bf16")
    assert lm.tokenizer.name == "bytes"
    assert load("reading:z").dtype == torch.float64  # its own default
    assert sources.seen == [
        ("x:y", torch.bfloat16, "reading:x:y@bf16", True),
        ("z", torch.float64, "reading:z", False),
    ]
    with pytest.raises(SpecError, match=r"keeps:x@bf16 cannot be had: 0.0% of the"):
        load("keeps:x@bf16")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"spec": 5}, "a spec is a text such as demo, .*; got 5"),
        ({"spec": "demo", "bits": 5}, "bits is 5; it is one of 32, 16, 8, 4"),
        ({"spec": "demo", "device": "cdua"}, r"unknown device 'cdua'; .* Did you mean cuda\?"),
    ],
)
def test_what_cannot_be_loaded_is_refused_outside_of_pytest_too(given, says):
    with pytest.raises(SpecError, match=says):
        load(**given)


def test_a_model_that_a_source_has_made_is_known_by_its_spec(sources):
    assert load("whole").spec == "whole"
    assert load("family:two").spec == "family:two"
    with pytest.raises(SpecError, match="precision of Model cannot be set"):
        load("whole@bf16")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("of", r"of: its model source cannot be called with nothing behind a colon: missing a required argument: 'rest'"),
        ("plain:x", "plain:x: its model source cannot be called with the text 'x' behind the colon: too many"),
        ("demo:x", "demo:x: its model source cannot be called with the text 'x'"),
        ("family:onne", r"unknown model spec 'family:onne'.* Did you mean family:one\?"),
        ("plian", r"Did you mean plain\?"),
    ],
)
def test_a_source_that_cannot_be_called_so_is_refused(sources, spec, says):
    with pytest.raises(SpecError, match=says):
        load(spec)


def test_a_callable_beside_the_tests_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text("from tiny_models import Functional\ndef build(): return Functional()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    lm = load("my_models:build@bf16")
    assert (lm.spec, lm.dtype) == ("my_models:build@bf16", torch.bfloat16)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gpt2", "Did you mean hf:gpt2"),
        ("mamba", r"Did you mean zoo:mamba\?"),
        ("zoo:mambo", r"unknown model spec 'zoo:mambo'.* Did you mean zoo:mamba\?"),
        ("zooo:mamba", r"unknown model spec .* Did you mean zoo:mamba\?"),
        ("no.such.module:build", "unknown model spec 'no.such.module:build'.*No module named 'no'"),
        ("importlib.nothing:build", "cannot be imported"),
        ("tiny_models:nothing", "cannot be imported"),
        ("demo@fp8", "unknown precision @fp8; known are @fp32"),
        ("demo@bf6", r"unknown precision @bf6; .* Did you mean bf16\?"),
        ("tiny_models:Functional@int4", r"tiny_models:Functional@int4 cannot be had: .* of GRU is no weight"),
        ("tiny_models:Stepper@bf16", "precision of Stepper cannot be set"),
        ("hf:/no/such/folder", "there is no folder /no/such/folder"),
        ("hf:no/such", "hf:no/such could not be loaded"),
        ("hf", "hf: its model source cannot be called with nothing behind a colon"),
        ("hf:", "hf: names no model: write hf:ID_OR_FOLDER"),
        ("", "unknown model spec"),
    ],
)
def test_a_spec_that_names_nothing_says_what_would(spec, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SpecError, match=says):
        load(spec)


def test_devices_are_resolved_or_refused():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(SpecError, match="unknown device 'tpu9'"):
        resolve_device("tpu9")
    with pytest.raises(SpecError, match="'cuda:99' is not there"):
        resolve_device("cuda:99")
