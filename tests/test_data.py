"""Corpora: the embedded one, files, and the hub (by way of a local mirror and a connection that breaks)."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from reading import stream
from tiny_models import Functional

from pytest_lmeval.data import Document, _files as files, check, corpus
from pytest_lmeval.data._rows import resilient
from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.engine._tokens import Tokens
from pytest_lmeval.errors import CorpusError, RegistryError
from pytest_lmeval.models._sources import as_model

BYTES = as_model(Functional(vocab=256))


def texts(found):
    return [document.text for document in found.documents()]


def test_stdlib_is_real_text_in_three_disjoint_splits():
    splits = {split: list(corpus("stdlib", split).documents()) for split in ("train", "validation", "test")}
    sizes = {split: sum(len(document.text) for document in documents) for split, documents in splits.items()}
    assert sizes["train"] > 1_000_000
    assert min(sizes.values()) > 50_000
    names = [document.name for documents in splits.values() for document in documents]
    assert len(names) == len(set(names))


def test_no_long_paragraph_of_stdlib_stands_in_two_splits():
    def long_paragraphs(split):
        return {part for text in texts(corpus("stdlib", split)) for part in text.split("\n\n") if len(part) > 100}

    train, validation, held_out = map(long_paragraphs, ("train", "validation", "test"))
    assert len(held_out) > 100
    assert not held_out & train
    assert not held_out & validation
    assert not validation & train


def test_a_split_depends_on_the_name_alone():
    from pytest_lmeval.data._stdlib import split_of

    assert [split_of(name) for name in ("typing", "json", "topic:while")] == ["train", "test", "train"]
    share = sum(split_of(f"module{i}") == "train" for i in range(2000)) / 2000
    assert 0.75 < share < 0.85


def test_a_corpus_can_be_read_again_and_says_when_it_changed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = corpus(f"text:{path}")
    assert texts(first) == texts(first) == ["one"]
    path.write_text("two")
    assert corpus(f"text:{path}").fingerprint != first.fingerprint


@settings(max_examples=30)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), st.integers(1, 50))
def test_a_text_file_comes_in_parts_that_lose_nothing(tmp_path_factory, text, part):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PART", part)
        assert "".join(texts(corpus(f"text:{path}"))).encode() == text.encode()


def test_a_folder_has_a_file_for_each_split(tmp_path):
    (tmp_path / "validation.txt").write_text("held out")
    assert texts(corpus(f"text:{tmp_path}", "validation")) == ["held out"]
    with pytest.raises(CorpusError, match=r"no file .*test\.txt"):
        corpus(f"text:{tmp_path}", "test")


def test_jsonl_reads_the_named_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "first", "text": "x"}\n{"body": "second"}\n')
    found = corpus(f"jsonl:{path}#body")
    assert texts(found) == ["first", "second"]
    assert not found.as_stream


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "line 2: not JSON"),
        ('{"other": "x"}', r"line 2: no text in field 'text' \(there is other\)"),
        ('{"text": 3}', "line 2: no text in field"),
        ("[1]", "line 2: no text in field"),
        ('{"text": ""}', "line 2: the document is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=says):
        texts(corpus(f"jsonl:{path}"))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match="not UTF-8 text: byte 0xe9"):
        texts(corpus(f"text:{tmp_path / 'a.txt'}"))


def test_token_files_are_mapped_not_loaded(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(10, dtype=np.uint16))
    (document,) = corpus(f"tokens:{tmp_path / 'ids.npy'}").documents()
    assert isinstance(document.ids, np.memmap)
    assert document.ids.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.zeros((2, 2, 2), int), r"int64 of shape \[2, 2, 2\]"),
        (np.zeros(3), "float64"),
        (None, "no .npy file"),
    ],
)
def test_a_file_that_holds_no_ids_is_refused(tmp_path, content, says):
    path = tmp_path / "ids.npy"
    if content is None:
        path.write_text("not numpy")
    else:
        np.save(path, content)
    with pytest.raises(CorpusError, match=says):
        corpus(f"tokens:{path}")


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
def test_what_is_unknown_is_named(name, split, says):
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
def test_an_unknown_name_is_told_with_the_nearest(tmp_path, monkeypatch, name, says):
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    for ask in (corpus, check):
        with pytest.raises(RegistryError, match=says):
            ask(name)


@pytest.mark.parametrize("name", ["stdlib", "wikitext-2", "text:a.txt", "recall:keys=9", "openai/gsm8k:main#question"])
def test_a_name_can_be_checked_without_reading_anything(tmp_path, monkeypatch, name):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    monkeypatch.chdir(tmp_path)
    check(name)


@pytest.mark.parametrize("name", ["text:nowhere.txt", "jsonl:nowhere.jsonl#text", "tokens:nowhere.npy"])
def test_a_file_that_is_not_there_is_noticed_when_its_name_is_checked(name):
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


def test_a_mirror_is_read_like_the_hub(mirror):
    wikitext = corpus("wikitext-2", "test", data_dir=mirror)
    assert texts(wikitext) == ["", " = Title = \n", " Some text . \n"]
    assert wikitext.as_stream
    pile = corpus("pile", "test", data_dir=mirror)
    assert texts(pile) == [f"document {number}" for number in range(5)]
    assert not pile.as_stream
    assert texts(corpus("ptb", "validation", data_dir=mirror)) == ["a <unk> sentence\n", "another\n"]


def test_any_dataset_of_the_hub_can_be_named(mirror):
    assert len(texts(corpus("Salesforce/wikitext:wikitext-2-raw-v1#text", "test", data_dir=mirror))) == 3
    with pytest.raises(CorpusError, match=r"row 0: no text in field 'body' \(there is text\)"):
        texts(corpus("Salesforce/wikitext:wikitext-2-raw-v1#body", "test", data_dir=mirror))


def test_a_mirror_that_lacks_a_dataset_says_where_it_looked(mirror):
    with pytest.raises(CorpusError, match=r"does not hold allenai/c4: looked for .*allenai/c4/en/train"):
        corpus("c4", "train", data_dir=mirror)


def test_a_corrupt_parquet_file_is_named(mirror):
    path = mirror / "Salesforce/wikitext/wikitext-2-raw-v1/test.parquet"
    path.write_bytes(b"PAR1 this is not parquet PAR1")
    with pytest.raises(CorpusError, match=r"wikitext-2-raw-v1\[test\] could not be read .*test\.parquet"):
        texts(corpus("wikitext-2", "test", data_dir=mirror))


def flaky(rows, failures):
    """Rows that break off with the given errors, each after so many rows; counts how often it was opened."""
    opened = []

    def rows_from(start):
        opened.append(start)
        for index in range(start, len(rows)):
            if failures and failures[0][0] == index:
                raise failures.pop(0)[1]
            yield rows[index]

    return rows_from, opened


@settings(max_examples=50)
@given(st.integers(0, 30), st.lists(st.integers(1, 29), max_size=6, unique=True))
def test_a_broken_connection_is_taken_up_at_the_row_where_it_broke(length, breaks):
    places = sorted(place for place in breaks if place < length)
    rows_from, opened = flaky(list(range(length)), [(place, ConnectionError("reset")) for place in places])
    waits = []
    assert list(resilient(rows_from, sleep=waits.append)) == list(range(length))
    assert opened == [0, *places]
    assert waits == [1.0] * len(places)


def test_waiting_gets_longer_and_ends():
    rows_from, _ = flaky([1, 2], [(1, TimeoutError()) for _ in range(20)])
    waits, had = [], []
    with pytest.raises(TimeoutError):
        had.extend(resilient(rows_from, sleep=waits.append))
    assert waits == [1, 2, 4, 8, 16]


def test_a_connection_that_never_was_is_not_tried_again():
    rows_from, opened = flaky([1, 2], [(0, ConnectionError("no network"))])
    with pytest.raises(ConnectionError):
        list(resilient(rows_from, sleep=lambda _: None))
    assert opened == [0]


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("bad"), PermissionError("no")])
def test_what_will_not_get_better_is_not_tried_again(error):
    rows_from, opened = flaky([1, 2], [(1, error)])
    with pytest.raises(type(error)):
        list(resilient(rows_from, sleep=lambda _: None))
    assert opened == [0]


# ------------------------------------------------------------------------------------------- tokens


@settings(max_examples=50)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.integers(0, 30), st.integers(1, 9))
def test_each_target_comes_with_the_bytes_that_it_stands_for(parts, limit, chunk_size):
    documents = [Document(str(i), text) for i, text in enumerate(parts)]
    whole = "".join(parts).encode("utf-8", "surrogatepass")
    if any("\ud800" <= c <= "\udfff" for c in "".join(parts)):
        return
    reader = TokenReader(BYTES, documents, limit=limit or None)
    assert [int(token) for piece in reader for token in piece.ids] == list(whole[: limit or None])
    if len(whole[: limit or None]) > 1:
        widths = np.concatenate([chunk.widths for chunk in stream(BYTES, reader, chunk_size=chunk_size)])
        assert widths.tolist() == [1] * (len(whole[: limit or None]) - 1)


def test_skipping_begins_in_the_middle():
    documents = [Document("a", "hello "), Document("b", "world")]
    reader = TokenReader(BYTES, documents)
    reader.skip = 8
    assert bytes(int(token) for piece in reader for token in piece.ids) == b"rld"


def test_a_beginning_of_sequence_token_stands_for_no_bytes():
    class WithBos:
        name, bos = "bos", 99

        def encode(self, text):
            return np.array([1, 2]), np.array([2, 5])

    from dataclasses import replace

    reader = TokenReader(replace(BYTES, tokenizer=WithBos()), [Document("a", "hello")])
    read = Tokens.joined(list(reader))
    assert (read.ids.tolist(), read.widths.tolist()) == ([99, 1, 2], [0, 2, 3])
