"""Documents read as by loglikelihood_rolling of lm-evaluation-harness: its windows, its prefix tokens, its numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import (
    assert_equal_but_for_time,
    losses_of,
    measure_perplexity,
    measure_until_killed,
    nll_of,
    stream_in_windows,
    texts,
)
from tiny_models import Functional, Stateless

from pytest_lmeval.data._corpus import Document
from pytest_lmeval.data._tokens import TokenReader, beginning
from pytest_lmeval.engine import Engine, Policy, Windows, policy_for
from pytest_lmeval.engine._tokens import Tokens
from pytest_lmeval.errors import StreamError
from pytest_lmeval.models._model import with_special_tokens
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._journal import Checkpoints

VOCAB = 256
SEVERAL, thorough = settings(max_examples=25), pytest.mark.thorough
LENGTHS, CONTEXTS = st.integers(1, 120), st.integers(1, 40)


class Recording(Stateless):
    """Keeps the ids of each step."""

    def __init__(self):
        super().__init__(vocab=VOCAB, width=4)
        self.given = []

    def forward(self, input_ids):
        self.given.append(input_ids[0].tolist())
        return super().forward(input_ids)


def expected_windows(count, context):
    """(positions read, positions scored) of each window over the tokens 1 to `count`; the prefix token is at position 0."""
    scored = 0
    while scored < count:
        end = min(scored + context, count)
        yield list(range(max(end - context, 0), end)), list(range(scored + 1, end + 1))
        scored = end


def windows_read(count, context, **options):
    """The same, of a model that reads tokens whose ids are their positions."""
    module = Recording()
    lm = as_model(module)
    module.given.clear()
    chunks = list(stream_in_windows(lm, np.arange(count + 1), window=context, **{"overlap": 0, "anchored": True, **options}))
    return list(zip(module.given, (list(range(chunk.start, chunk.end)) for chunk in chunks), strict=True))


def test_the_last_window_reads_the_whole_context_before_its_end():
    assert windows_read(10, 4) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
        ([6, 7, 8, 9], [9, 10]),
    ]


@SEVERAL
@given(LENGTHS, CONTEXTS)
def test_only_anchored_windows_follow_the_rule(count, context):
    expected = list(expected_windows(count, context))
    assert windows_read(count, context) == expected
    assert (windows_read(count, context, anchored=False) == expected) == (count <= context or count % context == 0)


@SEVERAL
@given(LENGTHS, CONTEXTS, st.data())
def test_anchored_windows_of_any_overlap_score_every_token_once_and_are_all_whole(count, context, data):
    windows = windows_read(count, context, overlap=data.draw(st.integers(0, context - 1)))
    assert [position for _, scored in windows for position in scored] == list(range(1, count + 1))
    for read, scored in windows:
        assert read == list(range(scored[-1] - min(context, count), scored[-1]))


@SEVERAL
@given(LENGTHS, CONTEXTS)
def test_windows_are_those_of_lm_eval(count, context):
    utils = pytest.importorskip("lm_eval.utils")
    theirs = map(
        utils.make_disjoint_window,
        utils.get_rolling_token_windows(list(range(1, count + 1)), prefix_token=0, max_seq_len=context, context_len=1),
    )
    assert windows_read(count, context) == [((before + scored)[:-1], scored) for before, scored in theirs]


@SEVERAL
@given(LENGTHS, CONTEXTS, st.integers(1, 40))
def test_losses_are_those_of_each_window_read_alone_whatever_the_chunk(count, context, chunk_size):
    lm, ids = as_model(Functional(vocab=VOCAB)), np.random.default_rng(count).integers(0, VOCAB, count + 1)
    expected = []
    for read, scored in expected_windows(count, context):
        expected += losses_of(ids[[*read, scored[-1]]], lm)[-len(scored) :].tolist()
    chunks = stream_in_windows(lm, ids, window=context, overlap=0, anchored=True, chunk_size=min(chunk_size, context))
    np.testing.assert_allclose(nll_of(chunks), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------- the prefix of a document


class Letters:
    """Every character is a token."""

    def __init__(self, **special):
        self.__dict__.update(special)

    def encode(self, text):
        return [ord(letter) for letter in text], list(range(1, len(text) + 1))


def model(kind=Functional, tokenizer=None, **facts):
    return replace(as_model(kind(vocab=VOCAB), tokenizer=tokenizer or Letters(bos=1)), **facts)


@pytest.mark.parametrize(
    ("special", "text", "stream", "rolling"),
    [
        ({"bos": 1, "eos": 2, "prefix": ()}, "a", [1], [1]),
        ({"bos": None, "eos": 2, "prefix": ()}, "a", [], [2]),
        ({"bos": 1, "eos": 2, "prefix": (1,)}, "a", [1], [1, 1]),
        ({"bos": None, "eos": 2, "prefix": (7,)}, "a", [], [2, 7]),
        ({"bos": 1, "eos": 2, "prefix": (1,)}, "\x01a", [1], [1]),
        ({"bos": 0, "eos": 2}, "a", [0], [0]),
        ({"bos": None, "eos": None}, "a", [], []),
        ({}, "a", [], []),
    ],
    ids=["bos", "eos alone", "adds bos", "adds another", "begins with bos", "zero is an id", "neither", "plain"],
)
def test_the_prefix_is_bos_or_else_eos_and_then_what_the_tokenizer_adds(special, text, stream, rolling):
    tokenizer = Letters(**special)
    ids = np.asarray(tokenizer.encode(text)[0])
    for expected, options in ((stream, {"rolling": False}), (rolling, {"rolling": True})):
        assert beginning(tokenizer, ids, **options).tolist() == expected
        read = Tokens.joined(list(TokenReader(model(tokenizer=tokenizer), [Document("d", text)], **options)))
        assert read.ids.tolist() == [*expected, *ids]
        assert read.widths.tolist() == [0] * len(expected) + [1] * len(ids)


def test_only_the_first_text_has_the_prefix():
    read = TokenReader(model(), [Document("d", ""), Document("d", "a"), Document("d", "b")])
    assert Tokens.joined(list(read)).ids.tolist() == [1, ord("a"), ord("b")]


# ------------------------------------------------------------------------------------------- perplexity


SOME = [(str(n), f"document number {n}, and words of it" * (n % 4 + 1)) for n in range(6)]


@pytest.mark.parametrize(
    ("how", "documents"),
    [
        ({"window": "lm_eval"}, 6),
        ({"window": "lm_eval", "limit": 2}, 2),
        ({"window": "lm_eval", "as_stream": True}, None),
        ({"window": 16}, None),
    ],
)
def test_documents_are_read_one_by_one_unless_asked_otherwise(how, documents):
    result = measure_perplexity(model(context_length=16), texts(*SOME), **how)
    assert result.record.details["documents"] == documents
    assert result.tokens == sum(len(text) for _, text in SOME[:documents])


def test_parts_of_a_document_are_tokenized_together():
    class Pairs(Letters):
        def encode(self, text):
            ends = [*range(2, len(text), 2), len(text)]
            return [ord(text[end - 1]) for end in ends], ends

    lm = model(tokenizer=Pairs(bos=1), context_length=4)
    found = [
        measure_perplexity(lm, texts(*parts), window="lm_eval")
        for parts in ([("a", "one and two"), ("b", "three")], [("a", "one "), ("a", "a"), ("a", "nd two"), ("b", "three")])
    ]
    assert [result.record.details["documents"] for result in found] == [2, 2]
    assert found[0].nll == found[1].nll


@pytest.mark.parametrize("window", ["lm_eval", "unlimited"])
def test_token_ids_have_no_prefix_in_however_many_parts(window):
    lm, ids = model(context_length=16), np.arange(100)
    whole, parts = (measure_perplexity(lm, given, window=window) for given in (ids, iter(np.split(ids, [3, 50]))))
    assert whole.tokens == parts.tokens == 99
    assert whole.nll == parts.nll


@pytest.mark.parametrize(("context", "window", "why"), [(24, 24, "the model's context"), (None, 2048, "has no context limit")])
@pytest.mark.parametrize("kind", [Functional, Stateless])
def test_the_record_says_how_the_text_was_read(kind, context, window, why):
    lm, certificate = model(kind, context_length=context), Certificate(verdict="exact-any-chunk", dtype="float32")
    record = measure_perplexity(lm, texts(*SOME), window="lm_eval", certificate=certificate).record
    found = [record.settings[name] for name in ("reading", "window", "overlap", "rolling")]
    assert found == ["windows", window, 0, True]
    assert "lm-evaluation-harness" in record.details["why"]
    assert why in record.details["why"]
    assert "as lm_eval reads them" in record.certificate.chunking_used
    assert "rolling" not in measure_perplexity(lm, texts(*SOME), window=24).record.settings


def test_a_policy_describes_the_windows_of_lm_eval():
    policy = Policy(chunk_size=7, windows=Windows(24, anchored=True))
    assert policy.reading == "windows of 24 tokens, as lm_eval reads them, in chunks of 7"
    assert Policy().reading == "carried in chunks"
    stateless = policy_for(model(Stateless, context_length=24), window="lm_eval", chunk_size=7)
    assert (stateless.chunk_size, stateless.windows.size) == (24, 24)  # a window is read in one step


def test_an_overlap_is_refused_with_the_windows_of_lm_eval():
    with pytest.raises(StreamError, match=r"overlap=8.*would not be comparable"):
        measure_perplexity(model(), texts(*SOME), window="lm_eval", overlap=8)


@pytest.mark.parametrize("kind", [Functional, pytest.param(Stateless, marks=thorough)])
def test_a_killed_run_is_resumed_inside_a_document_with_the_same_numbers_to_the_last_bit(tmp_path, kind):
    lm, corpus = model(kind, context_length=24), texts(*SOME[1:4])
    options = {"window": "lm_eval", "chunk_size": 7}
    whole = measure_perplexity(lm, corpus, losses=tmp_path / "whole.npy", **options)
    options |= {"key": "k", "losses": tmp_path / "killed.npy"}
    for killed_at in range(30, whole.tokens, 37):
        saved = Checkpoints(tmp_path / str(killed_at))
        measure_until_killed(killed_at, lm, corpus, checkpoints=saved, **options)
        resumed = measure_perplexity(lm, corpus, checkpoints=saved, **options)
        assert 0 < resumed.resumed_at < killed_at
        assert_equal_but_for_time(resumed, whole)
        assert np.array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))


# ------------------------------------------------------------------------------------------- against lm_eval itself

CONTEXT = 16
TEXTS = (
    "a",
    "short",
    "the quick brown fox jumps over the lazy dog " * 3,
    "<s>a text that begins with the token itself, and goes on for more than one window of it",
    *("x y z " * n + "é and ü" for n in range(1, 24)),
)


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm_eval's own model of transformers needs it")
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
        )
        return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["bos", pytest.param("adds bos", marks=thorough), pytest.param("eos alone", marks=thorough)])
def test_documents_have_the_loglikelihoods_of_lm_eval_and_windows_without_the_anchor_have_not(kind, llama):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    if kind == "adds bos":
        bpe._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"eos_token": "</s>"} if kind == "eos alone" else {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    # with its cache, windows of a batch that read the same tokens but score different numbers of them are confused
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=4, logits_cache=False)
    asked = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(TEXTS)]
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)

    lm = with_special_tokens(as_model(llama, tokenizer=tokenizer))  # as lm_eval reads "<s>" in a text
    unanchored, differences = replace(policy_for(lm, window="lm_eval"), windows=Windows(CONTEXT)), []
    for text, loglikelihood in zip(TEXTS, expected, strict=True):
        result = measure_perplexity(lm, texts(text), window="lm_eval", chunk_size=5)
        assert -float(result.nll) * result.tokens == pytest.approx(loglikelihood, rel=0, abs=1e-4)
        byte_perplexity = math.exp(-loglikelihood / len(text.encode()))
        assert 2 ** float(result.bits_per_byte) == pytest.approx(byte_perplexity, rel=1e-5)
        reader = TokenReader(lm, [Document("d", text)], rolling=True)
        differences.append(loglikelihood + nll_of(Engine(lm, unanchored).stream(reader)).sum())
    assert np.abs(differences).max() > 0.1
