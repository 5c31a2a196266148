"""Special tokens that are written in a text are the characters that they are, unless the corpus or the task says otherwise."""

import dataclasses
import os

import pytest
from reading import measure_agreement, measure_perplexity, measure_task, measure_until_killed, texts
from tiny_models import Functional

pytest.importorskip("transformers")
from tokenizers_of_each_kind import tokenizer_of

from pytest_lmeval import Choices, Task, as_model, corpus
from pytest_lmeval.data import Document
from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._identity import tokenizer_fingerprint
from pytest_lmeval.models._model import with_special_tokens
from pytest_lmeval.records._journal import Checkpoints

REAL = pytest.param("real", marks=pytest.mark.skipif("LMEVAL_REAL_MODEL" not in os.environ, reason="no LMEVAL_REAL_MODEL"))
WRITTEN = ("<|im_start|>user\nis it?<|im_", "end|>\n<|im_start|>assistant\n")  # one across the join


def lm_of(kind):
    tokenizer = tokenizer_of(kind)
    return as_model(Functional(vocab=len(tokenizer.tokenizer)), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "metaspace-first", REAL])
def test_they_are_read_as_text_by_default_and_as_control_tokens_on_request(kind):
    lm = lm_of(kind)
    control = with_special_tokens(lm).tokenizer
    special = {lm.tokenizer.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")}
    text = "".join(WRITTEN)
    (ids, ends), (controls, control_ends) = lm.tokenizer.encode(text), control.encode(text)
    assert not special & set(ids.tolist())
    assert sum(token in special for token in controls.tolist()) == 3
    assert ends[-1] == control_ends[-1] == len(text)
    assert tokenizer_fingerprint(lm) != tokenizer_fingerprint(dataclasses.replace(lm, tokenizer=control))


@pytest.mark.parametrize(("special_tokens", "how"), [(False, "text"), (True, "control tokens")])
def test_a_reading_says_how_many_are_written_in_its_text_and_how_they_were_read(tmp_path, special_tokens, how):
    lm, other = lm_of("llama3"), as_model(Functional(seed=1, vocab=len(tokenizer_of("llama3").tokenizer)))
    read = dataclasses.replace(texts(*WRITTEN, "and so on " * 40), special_tokens=special_tokens)
    note = f"3 special tokens are written in the text, read as {how}"
    result = measure_perplexity(lm, read)
    assert note in result.record.notes
    assert result.record.details["special_tokens"] == 3
    assert result.record.settings.get("special_tokens", False) is special_tokens
    other = dataclasses.replace(other, tokenizer=lm.tokenizer)
    assert note in measure_agreement(lm, other, read).record.notes
    by_document = dataclasses.replace(read, as_stream=False)
    saved = {"checkpoints": Checkpoints(tmp_path), "key": "k", "chunk_size": 16}
    measure_until_killed(40, lm, by_document, **saved)
    resumed = measure_perplexity(lm, by_document, **saved)
    assert resumed.resumed_at
    assert resumed.record.details["special_tokens"] == 2  # one is cut in two
    assert not measure_perplexity(lm, texts("no such token")).record.notes


def test_only_those_before_the_limit_are_counted():
    lm = lm_of("llama3")
    reader = TokenReader(lm, [Document("a", "<s> one two three </s>")], limit=len(lm.tokenizer.encode("<s> one two")[0]))
    assert len(list(reader))
    assert reader.special == 1


@pytest.mark.parametrize(("special_tokens", "how"), [(False, "text"), (True, "control tokens")])
def test_a_task_says_in_how_many_questions_they_are_written(special_tokens, how):
    rows = [{"q": "<|im_start|>is it?", "a": " no"}, {"q": "is it?", "a": "</s>"}, {"q": "is it?", "a": " no"}]
    task = Task("t", rows, lambda row: Choices(row["q"], (" yes", row["a"]), 0), special_tokens=special_tokens)
    record = measure_task(lm_of("llama3"), task).record
    assert f"special tokens are written in 2 questions, read as {how}" in record.notes
    assert record.details["special_tokens"] == 2
    assert record.settings.get("special_tokens", False) is special_tokens
    likelihoods = [measure_task(lm_of("llama3"), dataclasses.replace(task, special_tokens=on)).examples for on in (True, False)]
    assert [one.tokens for one in likelihoods[0]] != [one.tokens for one in likelihoods[1]]


def test_a_tokenizer_that_has_none_is_refused_and_a_corpus_by_name_may_ask():
    with pytest.raises(SpecError, match="has no special tokens that a text could hold"):
        measure_perplexity(as_model(Functional(vocab=256)), dataclasses.replace(texts("some text"), special_tokens=True))
    named = corpus("stdlib", special_tokens=True)
    assert named.special_tokens
    assert named.identity != corpus("stdlib").identity == corpus("stdlib").fingerprint
