"""Adapters find the form of a model and step every form alike; specs that name nothing are refused with a hint."""

import gc
import importlib
import sys
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from reading import measure_perplexity, stream
from tiny_models import CARRYING, Functional, GetSetState, PortableStreaming, Stepper, Streaming

from pytest_lmeval import registry
from pytest_lmeval.data import Corpus, Document
from pytest_lmeval.errors import ModelError, SpecError
from pytest_lmeval.models import _precision as precision, _specs as specs
from pytest_lmeval.models._sources import as_model, load, resolve_device
from pytest_lmeval.models._specs import parse

IDS = np.random.default_rng(0).integers(0, 32, 70)


def losses(lm, chunk_size):
    return np.concatenate([chunk.nll for chunk in stream(lm, IDS, chunk_size=chunk_size)])


EXPECTED = losses(as_model(Functional()), 70)
FORMS = {Functional: "functional", GetSetState: "get_set_state", Streaming: "streaming", PortableStreaming: "streaming",
         Stepper: "step"}  # fmt: skip


@pytest.mark.parametrize("kind", CARRYING)
def test_every_form_is_found_gives_the_same_losses_and_starts_each_sequence_fresh(kind):
    lm = as_model(kind())
    assert lm.form == FORMS[kind]
    for chunk_size in (70, 11, 1):
        np.testing.assert_allclose(losses(lm, chunk_size), EXPECTED, atol=1e-5)


def test_a_module_without_reset_state_starts_each_sequence_from_its_first_state():
    class NoReset(GetSetState):
        reset_state = property()  # hasattr is False

        def __init__(self):
            super().__init__()
            self.held = torch.zeros(1, 1, 16)

    lm = as_model(NoReset())
    assert np.array_equal(losses(lm, 16), losses(lm, 16))


def test_of_a_pair_of_logits_and_loss_the_logits_are_used_in_eval_mode():
    class NanoGPT(Functional):
        def forward(self, idx, targets=None):
            return super().forward(idx)[0], None

    lm = as_model(NanoGPT().train())
    assert (lm.form, lm.vocab_size, lm.module.training) == ("stateless", 32, False)


def test_only_a_vocabulary_of_256_reads_bytes_by_default():
    assert as_model(Functional()).tokenizer is None
    tokenizer = as_model(Functional(vocab=256)).tokenizer
    assert tokenizer.name == "bytes"
    ids, ends = tokenizer.encode("né")
    assert (ids.tolist(), ends.tolist()) == ([110, 195, 169], [1, 2, 3])
    with pytest.raises(SpecError, match="int is no tokenizer"):
        as_model(Functional(), tokenizer=3)


def test_the_stream_of_the_first_token_is_closed():
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
    np.testing.assert_allclose(losses(as_model(module), 9), EXPECTED, atol=1e-5)
    gc.collect()
    as_model(module)  # the stream ended with the model that opened it


def test_a_module_is_freed_with_its_model():
    lm = as_model(Functional())
    list(stream(lm, IDS))
    alive = weakref.ref(lm.module)
    del lm
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("odd", [{"step": 0}, {"window": [4, 8]}, {"streaming": True}])
def test_attributes_of_an_unexpected_type_are_ignored(odd):
    module = Functional()
    vars(module).update(odd)
    assert as_model(module).form == "functional"


def test_a_tokenizer_needs_only_encode():
    class Letters:
        def encode(self, text):
            return [ord(letter) % 32 for letter in text], range(1, len(text) + 1)

    corpus = Corpus("letters", "test", documents=lambda: iter([Document("a", "to be or not to be")]))
    result = measure_perplexity(as_model(Functional(), tokenizer=Letters()), corpus)
    assert result.record.settings["tokenizer"] == "Letters"
    assert float(result.bits_per_byte) == pytest.approx(float(result.nll) / np.log(2))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (object(), "neither callable nor has `step`"),
        (lambda input_ids: input_ids[7], r"raised IndexError for one token .*: index 7 is out of bounds"),
        (lambda input_ids: "hello", "returned str for one token"),
    ],
)
def test_an_object_that_returns_no_logits_is_refused(source, says):
    with pytest.raises(ModelError, match=says):
        as_model(source)


def test_the_suffix_or_else_bits_set_the_precision():
    assert tuple(precision.DTYPES) == specs.FLOATS
    assert set(specs.BITS.values()) == {*specs.FLOATS, *specs.PACKED} - {"fp16"}
    assert load("demo").dtype == torch.float32
    assert load("demo@bf16").dtype == load("demo", bits=16).dtype == torch.bfloat16
    assert load("demo@fp16", bits=32).dtype == torch.float16


def split(spec, bits=None):
    parsed = parse(spec, bits)
    assert (str(parsed), parsed.options) == (f"{parsed.name}@{parsed.precision}" if parsed.precision else parsed.name, {})
    return parsed.name, parsed.precision


def test_an_existing_folder_wins_over_a_precision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split("hf:./model@int8") == ("hf:./model", "int8")
    (tmp_path / "model@int8").mkdir()
    assert split("hf:./model@int8") == ("hf:./model@int8", "")
    assert split("hf:model@int8", 16) == ("hf:model@int8", "bf16")
    assert split("hf:model@int8@fp16") == ("hf:model@int8", "fp16")
    assert split("model@int8") == ("model", "int8"), "a spec without a source names no folder"
    with pytest.raises(SpecError, match=r"^hf:\./model@int8 could not be loaded: .* is a folder here"):
        load("hf:./model@int8")
    with pytest.raises(SpecError, match=r"^hf:\./model: there is no folder \./model \(looked from .*\)\. .* model@int8\?"):
        load("hf:./model")


# ------------------------------------------------------------------------------------ sources by name


SOURCES = """
import torch
from tiny_models import Functional, Stepper
from pytest_lmeval.models._sources import Loaded, as_model

calls = []

def plain(): return Functional()
def of(rest): return Functional(vocab=int(rest))
def whole(): return as_model(Functional(), spec="something else")
def keeps(rest, dtype=None): return Functional()

def reading(rest, *, dtype=torch.float64, spec, trust_remote_code):
    calls.append((rest, dtype, spec, trust_remote_code))
    return Loaded(Functional().to(dtype), "bytes", 12)

def stepping(rest, **options):
    assert not options
    return Stepper()

MODELS = {"family:one": plain, "family:two": "more_models:whole"}
"""


@pytest.fixture
def sources(packages):
    names = ("plain", "of", "reading", "whole", "stepping", "keeps")
    packages("more-models", SOURCES, models={**{name: f"more_models:{name}" for name in names}, "family": "more_models:MODELS"})
    return importlib.import_module("more_models")


def test_a_registered_source_gets_the_options_that_it_accepts_and_its_model_the_spec(sources):
    assert {"zoo:demo", "zoo:mamba", "demo", "hf", "plain"} <= set(registry.names("models"))
    assert load("plain").vocab_size == load("family:one").vocab_size == 32
    assert load("of:7").vocab_size == 7
    assert load("stepping:x").form == "step"
    assert load("plain@bf16").dtype == torch.bfloat16
    assert (load("whole").spec, load("family:two").spec) == ("whole", "family:two")


def test_a_source_can_load_in_the_precision_and_report_the_saved_size(sources):
    lm = load("reading:x:y@bf16", trust_remote_code=True)
    assert (lm.dtype, lm.bytes_before, lm.spec, lm.tokenizer.name) == (torch.bfloat16, 12, "reading:x:y@bf16", "bytes")
    assert load("reading:z").dtype == torch.float64  # its own default
    assert sources.calls == [("x:y", torch.bfloat16, "reading:x:y@bf16", True), ("z", torch.float64, "reading:z", False)]
    with pytest.raises(SpecError, match=r"keeps:x@bf16 cannot be had: 0.0% of the"):
        load("keeps:x@bf16")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("whole@bf16", "precision of Model cannot be set"),
        ("of", r"of: its model source cannot be called with nothing behind a colon: missing a required argument: 'rest'"),
        ("plain:x", "plain:x: its model source cannot be called with the text 'x' behind the colon: too many"),
        ("demo:x", "demo:x: its model source cannot be called with the text 'x'"),
        ("family:onne", r"unknown model spec 'family:onne'.* Did you mean family:one\?"),
        ("plian", r"Did you mean plain\?"),
    ],
)
def test_a_source_called_wrongly_is_refused(sources, spec, says):
    with pytest.raises(SpecError, match=says):
        load(spec)


def test_a_callable_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text("from tiny_models import Functional\ndef build(): return Functional()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    lm = load("my_models:build@bf16")
    assert (lm.spec, lm.dtype) == ("my_models:build@bf16", torch.bfloat16)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (5, "a spec is a text such as demo, .*; got 5"),
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
def test_a_spec_that_names_nothing_is_refused_with_a_hint(spec, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SpecError, match=says):
        load(spec)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"bits": 5}, "bits is 5; it is one of 32, 16, 8, 4"),
        ({"device": "cdua"}, r"unknown device 'cdua'; .* Did you mean cuda\?"),
        ({"device": "cuda:99"}, "'cuda:99' is not there"),
    ],
)
def test_devices_are_resolved_and_bad_options_refused(option, says):
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(SpecError, match=says):
        load("demo", **option)
