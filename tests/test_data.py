"""Corpora: stdlib, files, and the hub (through a local mirror and a broken connection)."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from reading import stream
from tiny_models import Functional

from pytest_lmeval.data import Document, _files as files, check, corpus
from pytest_lmeval.data._stdlib import split_of
from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.engine._tokens import Tokens
from pytest_lmeval.errors import CorpusError, RegistryError
from pytest_lmeval.models._sources import as_model

BYTES = as_model(Functional(vocab=256))
LINE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def texts(found):
    return [document.text for document in found.documents()]


def test_stdlib_has_three_disjoint_splits_by_a_hash_of_the_name():
    splits = [list(corpus("stdlib", split).documents()) for split in ("train", "validation", "test")]
    sizes = [sum(len(document.text) for document in documents) for documents in splits]
    assert sizes[0] > 1_000_000
    assert min(sizes) > 50_000
    names = [document.name for documents in splits for document in documents]
    assert len(names) == len(set(names))
    long = [{part for d in documents for part in d.text.split("\n\n") if len(part) > 100} for documents in splits]
    assert len(long[2]) > 100
    assert long[0] & long[1] == long[0] & long[2] == long[1] & long[2] == set()
    assert [split_of(name) for name in ("typing", "json", "topic:while")] == ["train", "test", "train"]
    assert 1500 < sum(split_of(f"module{i}") == "train" for i in range(2000)) < 1700


def test_a_text_can_be_read_twice_its_fingerprint_follows_the_content_and_a_folder_has_splits(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = corpus(f"text:{path}")
    assert texts(first) == texts(first) == ["one"]
    path.write_text("two")
    assert corpus(f"text:{path}").fingerprint != first.fingerprint
    path.rename(tmp_path / "validation.txt")
    assert texts(corpus(f"text:{tmp_path}", "validation")) == ["two"]
    with pytest.raises(CorpusError, match=r"no file .*test\.txt"):
        corpus(f"text:{tmp_path}", "test")


@settings(max_examples=8)
@given(st.lists(LINE, min_size=1, max_size=9), st.integers(0, 3))
def test_the_parts_of_a_text_file_lose_nothing(tmp_path_factory, lines, size):
    path, text = tmp_path_factory.mktemp("text") / "a.txt", "\n".join([*lines, "x" * (files.PART * size // 2), *lines])
    path.write_bytes(text.encode())
    parts = texts(corpus(f"text:{path}"))
    assert "".join(parts).encode() == text.encode()
    assert len(parts) > 1 or len(text) <= files.PART or "\n" not in text[files.PART :]


def test_jsonl_reads_the_named_field_and_token_files_are_memory_mapped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "first", "text": "x"}\n{"body": "second"}\n')
    found = corpus(f"jsonl:{tmp_path / 'a.jsonl'}#body")
    assert (texts(found), found.as_stream) == (["first", "second"], False)
    np.save(tmp_path / "ids.npy", np.arange(10, dtype=np.uint16))
    (document,) = corpus(f"tokens:{tmp_path / 'ids.npy'}").documents()
    assert isinstance(document.ids, np.memmap)
    assert document.ids.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("jsonl", '{"text": "fine"}\n{broken', "line 2: not JSON"),
        ("jsonl", '{"other": "x"}', r"line 1: no text in field 'text' \(there is other\)"),
        ("jsonl", '{"text": 3}', r"line 1: no text in field 'text' \(it holds 3\)"),
        ("jsonl", "[1]", r"line 1: a row is an object with named fields, and this is \[1\], of type list"),
        ("text", b"caf\xe9", "not UTF-8 text: byte 0xe9"),
        ("tokens", np.zeros((2, 2, 2), int), r"int64 of shape \[2, 2, 2\]"),
        ("tokens", np.zeros(3), "float64"),
        ("tokens", "not numpy", "no .npy file"),
    ],
)
def test_a_file_of_bad_content_is_refused(tmp_path, kind, content, says):
    path = tmp_path / "file.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CorpusError, match=says):
        texts(corpus(f"{kind}:{path}"))


@pytest.mark.parametrize(
    ("name", "split", "says"),
    [
        ("stdlib", "dev", "unknown split 'dev'"),
        ("c4", "test", "c4 has no split 'test'; it has train, validation"),
        ("text:nowhere.txt", "test", "there is no file nowhere.txt"),
        ("text", "test", "text names no file: write text:PATH"),
        ("jsonl:", "test", "jsonl names no file: write jsonl:PATH"),
        ("stdlib:all", "test", "stdlib:all: stdlib has no options"),
        ("ptb:all", "test", "ptb:all: ptb has no options"),
    ],
)
def test_a_bad_name_or_split_is_refused(name, split, says):
    with pytest.raises(CorpusError, match=says):
        corpus(name, split)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wikitext", r"no corpus 'wikitext'. Did you mean wikitext-2\? There are: automaton, .*, and OWNER/NAME of the .* hub"),
        ("txt:notes", r"Did you mean text\?"),
        ("a.txt", r"A file is named as text:a\.txt"),
        ("./a.txt", r"A file is named as text:\./a\.txt"),
        ("/a.txt", r"no corpus '/a\.txt'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, monkeypatch, name, says):
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    for ask in (corpus, check):
        with pytest.raises(RegistryError, match=says):
            ask(name)


def test_check_reads_no_file_and_refuses_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    monkeypatch.chdir(tmp_path)
    for name in ("stdlib", "wikitext-2", "text:a.txt", "recall:keys=9", "openai/gsm8k:main#question"):
        check(name)
    for name in ("text:nowhere.txt", "jsonl:nowhere.jsonl#text", "tokens:nowhere.npy"):
        with pytest.raises(CorpusError, match=r"there is no file or folder 'nowhere"):
            check(name)


# ------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def mirror(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "Salesforce/wikitext/wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["", " = Title = \n", " Some text . \n"]}), folder / "test.parquet")
    folder = tmp_path / "monology/pile-uncopyrighted/default"
    folder.mkdir(parents=True)
    rows = [{"text": f"document {number}", "meta": {"set": "x"}} for number in range(5)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "ptb-text-only/ptb_text_only/penn_treebank"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text('{"sentence": "a <unk> sentence"}\n{"sentence": "another"}\n')
    return tmp_path


def test_a_mirror_is_read_like_the_hub_and_has_any_dataset(mirror):
    wikitext = corpus("wikitext-2", "test", data_dir=mirror)
    assert texts(wikitext) == ["", " = Title = \n", " Some text . \n"]
    assert wikitext.as_stream
    pile = corpus("pile", "test", data_dir=mirror)
    assert texts(pile) == [f"document {number}" for number in range(5)]
    assert not pile.as_stream
    assert texts(corpus("ptb", "validation", data_dir=mirror)) == ["a <unk> sentence\n", "another\n"]
    assert len(texts(corpus("Salesforce/wikitext:wikitext-2-raw-v1#text", "test", data_dir=mirror))) == 3
    with pytest.raises(CorpusError, match=r"test\.parquet, row 0: no text in field 'body' \(there is text\)"):
        texts(corpus("Salesforce/wikitext:wikitext-2-raw-v1#body", "test", data_dir=mirror))


def test_a_missing_dataset_or_a_corrupt_file_in_the_mirror_is_named(mirror):
    with pytest.raises(CorpusError, match=r"does not hold allenai/c4: looked for .*allenai/c4/en/train"):
        corpus("c4", "train", data_dir=mirror)
    path = mirror / "Salesforce/wikitext/wikitext-2-raw-v1/test.parquet"
    path.write_bytes(b"PAR1 this is not parquet PAR1")
    with pytest.raises(CorpusError, match=r"wikitext-2-raw-v1/test\.parquet could not be read at row 0"):
        texts(corpus("wikitext-2", "test", data_dir=mirror))


# ------------------------------------------------------------------------------------------- tokens


@settings(max_examples=15)
@given(st.lists(LINE, min_size=1, max_size=6), st.integers(0, 30), st.integers(1, 9))
def test_each_target_has_its_number_of_bytes(parts, limit, chunk_size):
    documents = [Document(str(i), text) for i, text in enumerate(parts)]
    expected = "".join(parts).encode()[: limit or None]
    reader = TokenReader(BYTES, documents, limit=limit or None)
    assert [int(token) for part in reader for token in part.ids] == list(expected)
    if len(expected) > 1:
        widths = np.concatenate([chunk.widths for chunk in stream(BYTES, reader, chunk_size=chunk_size)])
        assert widths.tolist() == [1] * (len(expected) - 1)


def test_skip_begins_in_the_middle_and_a_beginning_of_sequence_token_has_no_bytes():
    reader = TokenReader(BYTES, [Document("a", "hello "), Document("b", "world")])
    reader.skip = 8
    assert bytes(int(token) for part in reader for token in part.ids) == b"rld"

    class WithBos:
        name, bos = "bos", 99

        def encode(self, text):
            return np.array([1, 2]), np.array([2, 5])

    reader = TokenReader(replace(BYTES, tokenizer=WithBos()), [Document("a", "hello")])
    read = Tokens.joined(list(reader))
    assert (read.ids.tolist(), read.widths.tolist()) == ([99, 1, 2], [0, 2, 3])
