"""Damaged files are refused, or left out with a warning, by errors of ours; what is whole is used."""

import json
import pickle
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from damaged_files import KINDS, readings
from fuzzing import DEEP, escaped, outcomes

from pytest_lmeval import _session as session
from pytest_lmeval.data import corpus
from pytest_lmeval.data._rows import Rows
from pytest_lmeval.errors import BaselineError, CorpusError, DocumentError, LmevalError, SpecError
from pytest_lmeval.gates import _baseline as baseline
from pytest_lmeval.laws._counterexample_store import CounterexampleStore, case_of
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.records import _history as history, _schema as schema
from pytest_lmeval.records._document import load as load_document
from pytest_lmeval.records._journal import Journal, JournalWarning
from pytest_lmeval.records._measured import Record

FEW = {"checkpoints": 12, "metrics": 40, "histories": 30}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.thorough) if kind in FEW else kind for kind in KINDS])
def test_no_damage_ends_in_an_error_of_another_kind(tmp_path, kind):
    if kind == "checkpoints":
        pytest.importorskip("transformers")
    counts = outcomes(readings(kind, tmp_path, FEW.get(kind, 60), seed=1))
    assert escaped(counts) == []
    assert counts["refused"] or counts["warned"] or kind == "counterexamples"


NESTED = {"lists": b"[" * DEEP, "objects": b'{"a":' * DEEP, "closed": b"[" * 500 + b"]" * 500, "400 digits": b"9" * 400}


@pytest.mark.parametrize("value", NESTED.values(), ids=NESTED)
def test_a_value_nested_without_end_or_of_400_digits_costs_its_line_and_no_other(tmp_path, value):
    whole = b'{"event": "result", "key": "whole", "record": {"kind": "task"}}'
    (tmp_path / "journal.jsonl").write_bytes(
        b'{"event": "result", "key": "k", "record": {"a": ' + value + b"}}\n" + whole + b"\n"
    )
    with pytest.warns(JournalWarning, match="line 1 is broken"):
        assert Journal(tmp_path).results == {"whole": {"kind": "task"}}
    (tmp_path / "history.jsonl").write_bytes(value + b"\n")
    assert history.read(tmp_path) == ([], ["1 lines of history.jsonl cannot be read and are ignored"])
    (tmp_path / "metrics.json").write_bytes(b'{"schema": 2, "records": [], "run": {"seconds": ' + value + b"}}")
    with pytest.raises(DocumentError, match=r"nested more deeply|larger than any number|not whole JSON"):
        load_document(tmp_path)
    (tmp_path / "baseline.json").write_bytes(b'{"schema": 2, "tests": ' + value + b"}")
    with pytest.raises(BaselineError):
        baseline.read(tmp_path / "baseline.json")
    store = CounterexampleStore(tmp_path / "counterexamples.jsonl")
    store.path.write_bytes(b'{"lm": "demo", "law": "splits", "case": {"length": ' + value + b"}}\n")
    store.add("demo", "rows", {"length": 4})
    assert list(store.cases("demo")) == ["rows"]


@pytest.mark.parametrize("value", [NESTED["lists"], NESTED["objects"], NESTED["closed"]], ids=["lists", "objects", "closed"])
def test_a_row_nested_without_end_is_refused_with_its_line(tmp_path, value):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": ' + value + b"}\n")
    with pytest.raises(CorpusError, match=r"rows\.jsonl, line 2: its values are nested more than 100 deep"):
        list(Rows(f"jsonl:{tmp_path / 'rows.jsonl'}").read())


@pytest.mark.parametrize(
    "line",
    [
        {"event": "result", "key": ["k"], "record": {}},
        {"event": "result", "key": "k", "record": "x"},
        {"event": ["result"], "key": "k", "record": {}},
        {"event": "end", "keys": "kept"},
        {"event": "end", "keys": [["kept"]]},
        {"event": "end", "keys": 7},
        [],
        "result",
        None,
    ],
)
def test_a_line_of_the_journal_of_another_shape_is_dropped_and_the_others_stay(tmp_path, line):
    kept = {"event": "result", "key": "kept", "record": {"kind": "task"}}
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (kept, line)))
    with pytest.warns(JournalWarning, match="line 2 is broken"):
        assert Journal(tmp_path).results == {"kept": {"kind": "task"}}


@pytest.mark.parametrize("details", [{"warnings": 5}, {"warnings": [5]}, {"too_short": "x"}, {"failure": []}])
def test_details_that_code_reads_have_their_types(details):
    with pytest.raises(ValueError, match="among details"):
        schema.convert({"kind": "task", "subject": "x", "lm": {"spec": "demo"}, "details": details}, Record)


@pytest.mark.parametrize(
    "change", [{"length": 3_000_000}, {"before": 3_000_000}, {"rows": 5000}, {"seed": 1 << 70}, {"length": 321}]
)
def test_a_counterexample_beyond_what_a_probe_reads_is_not_tried(tmp_path, change):
    store = CounterexampleStore(tmp_path / "counterexamples.jsonl")
    for case in ({"length": 320}, {"length": 40, **change}):
        with store.path.open("a") as file:
            file.write(json.dumps({"lm": "demo", "law": "splits", "case": case}) + "\n")
    told = "1 cases of demo have more than 320 tokens or 33 rows and are not tried"
    with nullcontext() if "seed" in change else pytest.warns(JournalWarning, match=told):
        assert store.cases("demo", 320) == {"splits": [case_of({"length": 320})]}


def test_tokens_in_a_zip_or_a_pickle_are_refused(tmp_path):
    np.savez(tmp_path / "packed.npz", ids=np.arange(9))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(np.arange(9)))
    for name in ("packed.npz", "objects.npy", "pickle.npy"):
        with pytest.raises(CorpusError, match=r"is no \.npy file of token ids"):
            corpus(f"tokens:{tmp_path / name}")


@pytest.mark.parametrize("letter", ["a", "\u4f60", "\U0001f600", "e\u0301", "\u0416"])
def test_a_long_name_in_any_script_is_shortened_for_file_names(tmp_path, letter):
    context = VerbContext(session.Session(folder=tmp_path), session.TestLog(f"t.py::test_{letter * 200}"))
    path = context.path(context.file("examples.jsonl"))
    path.parent.mkdir()
    path.with_name(f"{path.name}.1234567.new").write_text("fits")
    assert len(path.name.encode()) < 140


# ---------------------------------------------------------------------------------------- checkpoints


class Runs:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("transformers")
    from test_huggingface import MODELS

    folder = tmp_path_factory.mktemp("checkpoint")
    MODELS["llama"]().save_pretrained(folder, max_shard_size="8KB")
    return folder


def without_a_shard(folder):
    next(folder.glob("*.safetensors")).unlink()


def truncated(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Runs(folder / "ran")}, protocol=2))


DAMAGES = {
    "a shard is missing": without_a_shard,
    "a shard is truncated": truncated,
    "a pickle that runs code": pickled,
    "the index is no JSON": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": '),
    "the index is a list": lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
    "the config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "the config is a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "the config is nested": lambda folder: (folder / "config.json").write_text("[" * DEEP),
    "more layers than tensors": lambda folder: (folder / "config.json").write_text(
        re.sub(r'hidden_layers": \d+', f'hidden_layers": {2**70}', (folder / "config.json").read_text())
    ),
    "no heads": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('heads": 2', 'heads": 0')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_its_spec_and_runs_no_code(tmp_path, checkpoint, damage):
    from pytest_lmeval.models._sources import load

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    damage(folder)
    with pytest.raises(SpecError, match=r"hf:.*model (could not be loaded|is incomplete)") as caught:
        load(f"hf:{folder}")
    if damage is pickled:
        assert "could run code. Save them as safetensors" in str(caught.value)
        assert "weights_only" not in str(caught.value)
    elif damage is truncated:
        assert "Damaged: model-000" in str(caught.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"model": {"type": "BPE"}}', b"[" * DEEP, None])
def test_a_damaged_tokenizer_leaves_a_model_for_token_ids(tmp_path, checkpoint, content):
    from tokenizers_of_each_kind import tokenizer_of

    from pytest_lmeval.models._sources import load

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer_of("gpt2").tokenizer.save_pretrained(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if content is None:
        config["model_max_length"] = {}  # which is used only when a text is encoded
    else:
        (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    lm = load(f"hf:{folder}")
    with pytest.raises(LmevalError, match="has no tokenizer that can be loaded"):
        lm.tokenizer.encode("text")
