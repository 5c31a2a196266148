"""A file that stands for a reference: the same numbers without reading it, a bound of the KL, and no other text compared."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from reading import texts
from safetensors.numpy import load_file, save_file
from test_agreement import LM, LONG, REFERENCE, model
from tiny_models import VOCAB

from pytest_lmeval import agreement
from pytest_lmeval._session import Session
from pytest_lmeval.errors import DocumentError, SpecError
from pytest_lmeval.measures import _agreement_base as base
from pytest_lmeval.measures._agreement import measure_agreement
from pytest_lmeval.measures._context import VerbContext, running_in

SAME = ("agreement", "nll_difference", "perplexity_ratio", "mean_exp_difference")
OF_BYTES = [model(seed, vocab=256) for seed in (0, 1)]
PROBED = Session(budget=1000)


@pytest.fixture(scope="module")
def in_one_session():
    """The models of bytes are probed once."""
    with running_in(VerbContext(PROBED)):
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    measure_agreement(LM, REFERENCE, LONG, save=path)
    return path


def figures(result):
    return {name: float(value) for name, value in result.record.metrics.items()}


def test_the_file_gives_the_numbers_of_the_reference_and_a_bound_of_the_kl(file):
    whole, kept = figures(measure_agreement(LM, REFERENCE, LONG)), figures(measure_agreement(LM, base.read(file), LONG))
    assert {name: kept[name] for name in SAME} == pytest.approx({name: whole[name] for name in SAME}, rel=1e-6)
    assert 0.5 * whole["kl"] < kept["kl_at_least"] < whole["kl"] + 1e-7
    assert "kl" not in kept


def test_with_all_tokens_kept_the_bound_is_the_kl(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "TOP", VOCAB)
    whole = measure_agreement(LM, REFERENCE, LONG, save=tmp_path / "all.safetensors")
    kept = measure_agreement(LM, base.read(tmp_path / "all.safetensors"), LONG)
    assert kept.kl_at_least == pytest.approx(float(whole.kl), rel=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text("abcdefgh ", min_size=2, max_size=60), min_size=1, max_size=5), st.booleans())
@pytest.mark.usefixtures("in_one_session")
def test_documents_and_streams_are_read_as_the_file_was_written(tmp_path_factory, documents, as_stream):
    path = tmp_path_factory.mktemp("documents") / "base.safetensors"
    lm, reference = OF_BYTES
    corpus = texts(*documents, as_stream=as_stream)
    whole = agreement(lm, reference, corpus, save=path)
    kept = agreement(lm, f"base:{path}", corpus)
    assert kept.agreement == whole.agreement
    assert float(kept.nll_difference) == pytest.approx(float(whole.nll_difference), abs=1e-6)
    assert kept.record.settings["by_document"] is not as_stream


def test_a_changed_model_is_seen_as_far_from_the_file_as_from_the_reference(file):
    same = measure_agreement(REFERENCE, base.read(file), LONG)
    assert same.kl_at_least < 1e-9
    assert same.agreement == 1
    assert same.record.metrics["kl_at_least_max"] < 1e-6
    assert measure_agreement(LM, base.read(file), LONG).record.metrics["kl_at_least_p99"] > 0.01


def test_another_text_or_another_length_is_refused(file):
    changed = LONG.copy()
    changed[1500] = (changed[1500] + 1) % VOCAB
    with pytest.raises(SpecError, match=r"has other tokens, the first of them after target 1,0"):
        measure_agreement(LM, base.read(file), changed)
    with pytest.raises(SpecError, match=r"has 2,499 targets .* and 999 were read"):
        measure_agreement(LM, base.read(file), LONG[:1000])
    with pytest.raises(SpecError, match=r"has 2,499 targets of .* has more: another text would be compared"):
        measure_agreement(LM, base.read(file), np.concatenate([LONG, LONG[:1]]))


def test_other_windows_than_those_of_the_file_are_refused(file, tmp_path):
    with pytest.raises(
        SpecError, match="was read without windows, and window=32 would compare predictions from other contexts"
    ):
        agreement(LM, f"base:{file}", LONG, window=32)
    agreement(LM, REFERENCE, LONG[:200], window=64, save=tmp_path / "windows")
    assert (
        agreement(LM, f"base:{tmp_path / 'windows'}", LONG[:200], window=64).record.details["read"].startswith("windows of 64")
    )
    with pytest.raises(SpecError, match="was read in windows of 64 tokens, and window=32"):
        agreement(LM, f"base:{tmp_path / 'windows'}", LONG[:200], window=32)


def test_what_no_file_can_be_written_to_is_refused_before_anything_is_read(file, tmp_path):
    unread = (pytest.fail("it was read") for _ in range(1))
    for save, reference, said in (
        (tmp_path, REFERENCE, "is a folder; write the name of a file"),
        ("", REFERENCE, "is empty"),
        (tmp_path / "copy", base.read(file), "is such a file. Copy that file"),
    ):
        with pytest.raises(SpecError, match=said):
            measure_agreement(LM, reference, unread, save=save)


@pytest.mark.usefixtures("in_one_session")
def test_another_vocabulary_or_tokenizer_is_refused(file, tmp_path):
    with pytest.raises(SpecError, match="so their predictions cannot be compared"):
        measure_agreement(model(0, vocab=VOCAB + 1), base.read(file), LONG)
    (lm, reference), corpus = OF_BYTES, texts("a text to read", as_stream=True)
    agreement(lm, reference, corpus, save=tmp_path / "bytes.safetensors")
    found = base.read(tmp_path / "bytes.safetensors")
    other = base.Base(found.path, base.About(**{**vars_of(found.about), "tokenizer": "another"}), found.arrays)
    with pytest.raises(SpecError, match="encode the same text differently"):
        measure_agreement(lm, other, corpus)


def vars_of(struct):
    return {name: getattr(struct, name) for name in struct.__struct_fields__ if name != "more"}


def test_a_file_that_is_none_says_what_it_is_and_how_to_write_one(file, tmp_path):
    with pytest.raises(SpecError, match="is not there"):
        base.read(tmp_path / "none")
    (tmp_path / "garbage").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(DocumentError, match="cannot be read"):
        base.read(tmp_path / "garbage")
    save_file({"x": np.zeros(2, dtype=np.float32)}, tmp_path / "weights")
    with pytest.raises(DocumentError, match="something else"):
        base.read(tmp_path / "weights")
    arrays = load_file(file)
    about = {"format": 2, "lm": {"spec": "x"}, "tokenizer": "", "vocab_size": VOCAB, "corpus": ""}
    save_file(arrays, tmp_path / "newer", {"pytest_lmeval": json.dumps(about)})
    with pytest.raises(DocumentError, match="Install the version"):
        base.read(tmp_path / "newer")
    arrays.pop("top")
    save_file(arrays, tmp_path / "part", {"pytest_lmeval": json.dumps({**about, "format": 1})})
    with pytest.raises(DocumentError, match="lacks a part"):
        base.read(tmp_path / "part")


def test_it_is_small(file):
    assert file.stat().st_size < 100 * len(LONG)
