"""A text that arrives in parts has the tokens and bytes of the whole text, for tokenizers of each kind."""

import itertools
import math
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from reading import measure_perplexity, texts
from tiny_models import Functional

pytest.importorskip("transformers")
from tokenizers_of_each_kind import KINDS, sample, tokenizer_of

from pytest_lmeval import as_model, corpus
from pytest_lmeval.data import Document
from pytest_lmeval.data._joined import OVERLAP, WINDOW, tokenized
from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.engine._tokens import Tokens

REAL = pytest.param("real", marks=pytest.mark.skipif("LMEVAL_REAL_MODEL" not in os.environ, reason="no LMEVAL_REAL_MODEL"))
ALL = [*KINDS, REAL]
PIECE = st.builds(lambda start, length: sample()[start : start + length], st.integers(0, 190_000), st.integers(0, 900))
RUN = st.builds(
    str.__mul__, st.sampled_from([" ", "\n", "a", "-", "7", "word ", "é", "😀", "\r\n", "    if x:\n"]), st.integers(0, 300)
)
DIGITS = st.text("0123456789", max_size=300)
SCRIPTS = st.text("é😀你好\u0308\ufb01\u3000\u200b\t\r\n ", max_size=60)
PARTS = st.lists(PIECE | RUN | DIGITS | SCRIPTS, max_size=30)


def joined(tokenizer, parts, **how):
    none = Tokens(np.array([], int), np.array([], int))
    return Tokens.joined([none, *tokenized(tokenizer, parts, **how)])


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_parts_are_tokenized_as_the_whole_text(kind, data):
    parts = data.draw(st.lists(PIECE, max_size=30) if kind == "unigram" else PARTS)  # a tie may fall either way
    found = joined(tokenizer_of(kind), parts, window=400, overlap=150, run=8)
    ids, ends = tokenizer_of(kind).encode("".join(parts))
    assert found.ids.tolist() == ids.tolist()
    assert np.cumsum(found.widths).tolist() == ends.tolist()


@pytest.mark.parametrize("kind", ["metaspace-first", "llama2", REAL])
def test_parts_tokenized_alone_are_not_the_whole_text(kind):
    """The broken twin: rows tokenized one by one."""
    tokenizer, parts = tokenizer_of(kind), ["    def f():\n", "        return", " un", "happy\n", "  more"] * 5
    alone = np.concatenate([tokenizer.encode(part)[0] for part in parts])
    whole = tokenizer.encode("".join(parts))[0].tolist()
    assert alone.tolist() != whole == joined(tokenizer, parts).ids.tolist()


@pytest.mark.parametrize("kind", ["llama3", "llama2", REAL])
def test_a_long_text_is_joined_at_its_own_window_and_one_without_a_place_to_join_too(kind):
    tokenizer = tokenizer_of(kind)
    run = "".join(map(str, range(3 * OVERLAP)))[: 3 * OVERLAP]
    text = f"{sample()[: WINDOW - OVERLAP]}{run}{sample()}"
    found, (ids, ends) = joined(tokenizer, [text]), tokenizer.encode(text)
    assert found.ids.tolist() == ids.tolist()
    assert np.cumsum(found.widths).tolist() == ends.tolist()


def test_a_tokenizer_without_places_to_join_is_read_all_the_same_and_ends_are_those_of_the_text():
    class Spread:
        """As slow tokenizers of transformers: no offsets, so the text is spread evenly over the tokens."""

        def encode(self, text):
            ids, _ = tokenizer_of("gpt2").encode(text)
            return ids, np.linspace(0, len(text.encode()), len(ids) + 1)[1:].astype(int)

    text = sample()[:20_000]
    found = joined(Spread(), [text], window=1000, overlap=100, run=60)
    assert found.ids.tolist() == tokenizer_of("gpt2").encode(text)[0].tolist()
    assert (found.widths.sum(), found.widths.min() >= 0) == (len(text.encode()), True)


def test_an_endless_stream_is_tokenized_in_the_same_memory():
    def rows():
        for number in itertools.count():
            yield f"Row {number}: {sample()[number * 7 % 9000 :][:90]}\n"

    def peak(count):
        tracemalloc.start()
        read = sum(len(part) for part in itertools.islice(tokenized(tokenizer_of("llama2"), rows()), count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return read, most

    (short, first), (long, second) = peak(2), peak(6)
    assert long > 2 * short
    assert second < 1.2 * first


@pytest.mark.parametrize("kind", ["llama2", "metaspace-first", REAL])
def test_rows_of_a_stream_cost_what_the_same_text_in_one_file_costs(tmp_path, kind):
    lines = [line for line in sample()[:12_000].splitlines(keepends=True) if line.strip()]
    tokenizer = tokenizer_of(kind)
    lm = as_model(Functional(vocab=tokenizer.tokenizer.vocab_size), tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("".join(lines))
    rows = measure_perplexity(lm, texts(*lines))
    whole = measure_perplexity(lm, corpus(f"text:{tmp_path}/text.txt"))
    assert (rows.tokens, float(rows.bits_per_byte)) == (whole.tokens, float(whole.bits_per_byte))
    nats = float(rows.nll) * rows.tokens
    assert float(rows.bits_per_byte) == pytest.approx(nats / math.log(2) / len("".join(lines).encode()), rel=1e-3)


def test_texts_between_ids_are_texts_of_their_own():
    lm = as_model(Functional(vocab=256))
    documents = [Document("a", "ab"), Document("b", "c"), Document("c", ids=np.array([1, 2])), Document("d", "d")]
    assert [int(token) for part in TokenReader(lm, documents) for token in part.ids] == [97, 98, 99, 1, 2, 100]
