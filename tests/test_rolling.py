"""Documents read as lm-evaluation-harness' loglikelihood_rolling reads them: its windows, its first token, its numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import measure_perplexity, stream_in_windows
from tiny_models import Functional, Stateless

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.data._tokens import TokenReader, beginning
from pytest_lmeval.engine import Policy, Windows, policy_for
from pytest_lmeval.engine._policy import rolling_windows
from pytest_lmeval.engine._tokens import Tokens
from pytest_lmeval.errors import StreamError
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._journal import Checkpoints, Saver
from pytest_lmeval.scoring._resume import read_point

VOCAB = 256
LONGEST = 120
SEVERAL = settings(max_examples=60)
LENGTHS, CONTEXTS = st.integers(1, LONGEST), st.integers(1, 40)


class Noting(Stateless):
    """Keeps what it was given to read."""

    def __init__(self):
        super().__init__(vocab=VOCAB)
        self.given = []

    def forward(self, input_ids):
        self.given.append(input_ids[0].tolist())
        return super().forward(input_ids)


def windows_by_the_rule(count, context):
    """(places read, places scored) of each window over the tokens 1 to `count`, the prefix token being at place 0."""
    scored = 0
    while scored < count:
        end = min(scored + context, count)
        begin = max(end - context, 0)
        yield list(range(begin, end)), list(range(scored + 1, end + 1))
        scored = end


def windows_read(count, context, **options):
    """The same, as a model sees it to which each token says its own place."""
    module = Noting()
    lm = as_model(module)
    module.given.clear()
    chunks = list(stream_in_windows(lm, np.arange(count + 1), window=context, **{"overlap": 0, "anchored": True, **options}))
    return list(zip(module.given, (list(range(chunk.start, chunk.end)) for chunk in chunks), strict=True))


# ------------------------------------------------------------------------------------------- the windows


def test_the_last_window_reads_the_whole_context_before_its_end():
    assert windows_read(10, 4) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
        ([6, 7, 8, 9], [9, 10]),
    ]


@SEVERAL
@given(LENGTHS, CONTEXTS)
def test_windows_are_those_of_the_rule(count, context):
    assert windows_read(count, context) == list(windows_by_the_rule(count, context))


@SEVERAL
@given(LENGTHS, CONTEXTS)
def test_without_the_anchor_the_last_window_would_be_another(count, context):
    alike = windows_read(count, context, anchored=False) == list(windows_by_the_rule(count, context))
    assert alike == (count <= context or count % context == 0)


@SEVERAL
@given(LENGTHS, CONTEXTS, st.data())
def test_anchored_windows_of_any_overlap_score_every_token_once_and_are_all_whole(count, context, data):
    windows = windows_read(count, context, overlap=data.draw(st.integers(0, context - 1)))
    assert [place for _, scored in windows for place in scored] == list(range(1, count + 1))
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
    for read, scored in windows_by_the_rule(count, context):
        logits, _ = lm.step(torch.from_numpy(ids[read])[None])
        said = torch.log_softmax(logits[0, -len(scored) :], dim=-1)
        expected += (-said.gather(1, torch.from_numpy(ids[scored])[:, None])[:, 0]).tolist()
    chunks = stream_in_windows(lm, ids, window=context, overlap=0, anchored=True, chunk_size=min(chunk_size, context))
    np.testing.assert_allclose(np.concatenate([chunk.nll for chunk in chunks]), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------- what stands before a document


class Letters:
    """Every character is a token."""

    def __init__(self, **special):
        self.__dict__.update(special)

    def encode(self, text):
        return [ord(letter) for letter in text], list(range(1, len(text) + 1))


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
def test_the_prefix_token_is_bos_or_else_eos_and_what_the_tokenizer_adds_follows_it(special, text, stream, rolling):
    tokenizer = Letters(**special)
    for expected, options in ((stream, {"rolling": False}), (rolling, {"rolling": True})):
        ids = np.asarray(tokenizer.encode(text)[0])
        assert beginning(tokenizer, ids, **options).tolist() == expected
        reader = TokenReader(as_model(Functional(vocab=VOCAB), tokenizer=tokenizer), [Document("d", text)], **options)
        read = Tokens.joined(list(reader))
        assert read.ids.tolist() == [*expected, *ids]
        assert read.widths.tolist() == [*(0 for _ in expected), *(1 for _ in ids)]


def test_the_first_token_stands_before_the_first_text_alone():
    lm = as_model(Functional(vocab=VOCAB), tokenizer=Letters(bos=1))
    read = TokenReader(lm, [Document("d", ""), Document("d", "a"), Document("d", "b")])
    assert Tokens.joined(list(read)).ids.tolist() == [1, ord("a"), ord("b")]


# ------------------------------------------------------------------------------------------- the reading


def texts(*documents, as_stream=True):
    """Documents of (name, text)."""
    return Corpus("texts", "test", lambda: (Document(name, text) for name, text in documents), "fp", as_stream=as_stream)


def reads(module, **facts):
    return replace(as_model(module, tokenizer=Letters(bos=1)), **facts)


SOME = [(str(n), f"document number {n}, and words of it" * (n % 4 + 1)) for n in range(6)]


def test_documents_are_read_one_by_one_unless_told_otherwise():
    lm = reads(Functional(vocab=VOCAB), context_length=16)
    result = measure_perplexity(lm, texts(*SOME), window="lm_eval")
    assert result.record.details["documents"] == 6
    assert result.tokens == sum(len(text) for _, text in SOME)
    assert measure_perplexity(lm, texts(*SOME), window="lm_eval", limit=2).tokens == sum(len(text) for _, text in SOME[:2])
    assert measure_perplexity(lm, texts(*SOME), window="lm_eval", as_stream=True).record.details["documents"] is None
    assert measure_perplexity(lm, texts(*SOME), window=16).record.details["documents"] is None


def test_parts_of_a_document_are_tokenized_together():
    class Pairs(Letters):
        def encode(self, text):
            ends = [*range(2, len(text), 2), len(text)]
            return [ord(text[end - 1]) for end in ends], ends

    lm = replace(as_model(Functional(vocab=VOCAB), tokenizer=Pairs(bos=1)), context_length=4)
    found = [
        measure_perplexity(lm, texts(*parts), window="lm_eval")
        for parts in ([("a", "one and two"), ("b", "three")], [("a", "one "), ("a", "a"), ("a", "nd two"), ("b", "three")])
    ]
    assert [result.record.details["documents"] for result in found] == [2, 2]
    assert found[0].nll == found[1].nll


def test_token_ids_are_read_as_they_stand_in_however_many_parts():
    lm, ids = reads(Functional(vocab=VOCAB), context_length=16), np.arange(100)
    whole, parts = (measure_perplexity(lm, given, window="lm_eval") for given in (ids, iter(np.split(ids, [3, 50]))))
    assert whole.tokens == parts.tokens == 99
    assert whole.nll == parts.nll


@pytest.mark.parametrize(("context", "window", "why"), [(24, 24, "the model's context"), (None, 2048, "names no context")])
@pytest.mark.parametrize("toy", [Functional, Stateless])
def test_the_record_says_how_it_was_read(toy, context, window, why):
    lm = reads(toy(vocab=VOCAB), context_length=context)
    result = measure_perplexity(
        lm, texts(*SOME), window="lm_eval", certificate=Certificate(verdict="exact-any-chunk", dtype="float32")
    )
    told = result.record.settings
    assert (told["reading"], told["window"], told["overlap"], told["rolling"]) == ("windows", window, 0, True)
    assert "lm-evaluation-harness" in result.record.details["why"]
    assert why in result.record.details["why"]
    assert "as lm_eval reads them" in result.record.certificate.chunking_used
    assert "rolling" not in measure_perplexity(lm, texts(*SOME), window=24).record.settings


def test_a_window_of_a_stateless_model_is_read_in_one_step():
    policy = policy_for(reads(Stateless(vocab=VOCAB), context_length=24), window="lm_eval", chunk_size=7)
    assert (policy.chunk_size, policy.windows.size) == (24, 24)


def test_an_overlap_is_refused_where_the_windows_are_those_of_lm_eval():
    with pytest.raises(StreamError, match=r"overlap=8.*would not be comparable"):
        measure_perplexity(reads(Functional(vocab=VOCAB)), texts(*SOME), window="lm_eval", overlap=8)


class Killed(Exception):
    pass


def reading(lm, folder, name, *, die_at=None):
    """Read, a point saved after every chunk; die when so many tokens are scored."""

    def progress(done, nats, expected):
        if die_at is not None and done >= die_at:
            raise Killed

    saved = {"checkpoints": Checkpoints(folder / name), "key": "k", "losses": folder / f"{name}.npy"}
    return measure_perplexity(lm, texts(*SOME), window="lm_eval", chunk_size=7, progress=progress, **saved)


def killed_and_resumed(lm, folder, die_at):
    name = f"killed at {die_at}"
    with pytest.raises(Killed):
        reading(lm, folder, name, die_at=die_at)
    return reading(lm, folder, name), np.load(folder / f"{name}.npy")


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)


@pytest.mark.parametrize("toy", [Functional, Stateless])
def test_a_killed_reading_goes_on_inside_a_document_with_the_same_numbers_to_the_last_bit(tmp_path, often, toy):
    lm = reads(toy(vocab=VOCAB), context_length=24)
    whole = reading(lm, tmp_path, "whole")
    losses = np.load(tmp_path / "whole.npy")
    for die_at in range(30, whole.tokens, 17):
        resumed, own_losses = killed_and_resumed(lm, tmp_path, die_at)
        assert 0 < resumed.resumed_at < die_at
        for name in ("nll", "bits_per_byte", "token_accuracy_top5"):
            assert resumed.record.metrics[name].to_json() == whole.record.metrics[name].to_json()
        for name in ("chunk_loss", "running_perplexity", "loss_by_position"):
            assert resumed.record.series[name] == whole.record.series[name]
        assert np.array_equal(own_losses, losses)


def test_a_point_that_forgot_where_its_window_begins_gives_other_numbers(tmp_path, often, monkeypatch):
    lm = reads(Functional(vocab=VOCAB), context_length=24)
    whole = reading(lm, tmp_path, "whole")

    def misplaced(*where):
        reading = read_point(*where)
        return reading and replace(reading, window=reading.scored)

    monkeypatch.setattr("pytest_lmeval.measures._perplexity.read_point", misplaced)
    resumed, _ = killed_and_resumed(lm, tmp_path, 50)
    assert abs(resumed.nll - whole.nll) > 1e-6


# ------------------------------------------------------------------------------------------- against lm_eval itself

CONTEXT = 16
TEXTS = (
    "a",
    "short",
    "the quick brown fox jumps over the lazy dog " * 3,
    "<s>a text that begins with the token itself, and goes on for more than one window of it",
    *("x y z " * n + "é and ü" for n in range(1, 24)),
)


def tokenizer_of(kind):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    if kind == "adds bos":
        bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"eos_token": "</s>"} if kind == "eos alone" else {"bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)


@pytest.fixture(scope="module")
def llama():
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


@pytest.fixture(params=["bos", "adds bos", "eos alone"])
def both(request, llama):
    """The same model and tokenizer as lm_eval and as this package have them."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    tokenizer = tokenizer_of(request.param)
    # with its cache, windows of a batch that read the same tokens but score different numbers of them are confused
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=4, logits_cache=False)
    return theirs, as_model(llama, tokenizer=tokenizer)


def their_sums(theirs):
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(TEXTS)]
    return theirs.loglikelihood_rolling(asked, disable_tqdm=True)


def our_sums(ours, **options):
    results = [measure_perplexity(ours, texts(("d", text)), **options) for text in TEXTS]
    return results, [-float(result.nll) * result.tokens for result in results]


def test_documents_have_the_loglikelihoods_that_lm_eval_gives_them(both):
    theirs, ours = both
    expected = their_sums(theirs)
    results, found = our_sums(ours, window="lm_eval", chunk_size=5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    for text, result, loglikelihood in zip(TEXTS, results, expected, strict=True):
        byte_perplexity = math.exp(-loglikelihood / len(text.encode()))
        assert 2 ** float(result.bits_per_byte) == pytest.approx(byte_perplexity, rel=1e-5)


def test_windows_without_the_anchor_have_not(both, monkeypatch):
    theirs, ours = both
    monkeypatch.setattr("pytest_lmeval.engine._policy.rolling_windows", without_the_anchor)
    _, found = our_sums(ours, window="lm_eval")
    assert np.abs(np.subtract(found, their_sums(theirs))).max() > 0.1


def without_the_anchor(*arguments):
    return replace(rolling_windows(*arguments), anchored=False)


def test_a_policy_says_that_its_windows_are_those_of_lm_eval():
    policy = Policy(chunk_size=7, windows=Windows(24, anchored=True))
    assert policy.reading == "windows of 24 tokens, as lm_eval reads them, in chunks of 7"
    assert Policy().reading == "carried in chunks"
