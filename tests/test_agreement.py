"""Agreement of two models: the numbers of a plain computation, whatever the chunks of each, and never a meaningless one."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import measure_agreement, measure_perplexity, texts
from tiny_models import VOCAB, Dropped, Functional, Stateless

from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.errors import NotFiniteError, SpecError, StreamError
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.statistics._proportion import wilson, wilson_of_sums

IDS = np.random.default_rng(0).integers(0, VOCAB, 700)
LONG = np.random.default_rng(1).integers(0, VOCAB, 2500)  # enough for an interval
NAMES = ("agreement", "kl", "nll_difference", "perplexity_ratio", "largest_difference")


def model(seed=0, **options):
    """Its weights are large, so that its logits depend on the context."""
    module = Functional(seed=seed, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    return as_model(module, spec=f"toy-{seed}")


LM, REFERENCE = model(0), model(1)


def values(result):
    return np.array([float(result.record.metrics[name]) for name in NAMES])


def expected(lm, reference, ids):
    """All metrics, from one step over the whole text."""
    inputs = torch.from_numpy(ids)[None]
    with torch.no_grad():
        q, p = (one.step(inputs[:, :-1])[0][0].double().log_softmax(-1) for one in (lm, reference))
    targets = inputs[0, 1:, None]
    loss = float((p.gather(1, targets) - q.gather(1, targets)).mean())
    same = float((q.argmax(-1) == p.argmax(-1)).double().mean())
    return np.array([same, float((p.exp() * (p - q)).sum(-1).mean()), loss, np.exp(loss), float((p - q).abs().max())])


def test_a_model_agrees_with_itself_exactly():
    result = measure_agreement(LM, LM, LONG)
    assert values(result).tolist() == [1, 0, 0, 1, 0]
    assert result.agreement.low < 1  # the text is finite
    assert result.record.kind == "agreement"


@given(ours=st.integers(1, 300), theirs=st.integers(1, 300), length=st.integers(2, 400))
@settings(max_examples=15)
def test_the_metrics_are_those_of_the_whole_text_whatever_the_chunks_of_each_model(ours, theirs, length):
    ids = IDS[:length]
    result = measure_agreement(LM, REFERENCE, ids, chunk_size=ours, reference_chunk_size=theirs)
    np.testing.assert_allclose(values(result), expected(LM, REFERENCE, ids), atol=1e-5)
    assert result.record.cost.tokens == length - 1
    assert result.kl > 0


def test_the_difference_of_losses_is_that_of_two_perplexities_and_intervals_are_those_of_blocks():
    result = measure_agreement(LM, REFERENCE, LONG)
    assert all(metric.low < metric < metric.high for metric in (result.record.metrics[name] for name in NAMES[:4]))
    assert measure_agreement(LM, REFERENCE, LONG[:1500]).kl.interval is None  # fewer than thirty blocks
    alone = [float(measure_perplexity(lm, LONG).nll) for lm in (LM, REFERENCE)]
    assert float(result.nll_difference) == pytest.approx(alone[0] - alone[1], abs=1e-6)
    swapped = measure_agreement(REFERENCE, LM, LONG)
    assert float(swapped.nll_difference) == pytest.approx(-float(result.nll_difference))
    assert float(swapped.agreement) == float(result.agreement)
    assert float(swapped.kl) != pytest.approx(float(result.kl), rel=1e-3)  # KL has a direction


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=1, max_size=80))
def test_the_interval_of_groups_is_that_of_their_answers(answers):
    right, groups = [float(one) for one, _ in answers], [group for _, group in answers]
    of = np.array([sorted(set(groups)).index(group) for group in groups])
    interval = None if len(set(groups)) < 8 else wilson(right, groups)
    if len(set(groups)) == len(groups) and interval is not None:
        return  # groups of one answer each are counted as independent
    sums = np.column_stack([np.bincount(of, weights=right), np.bincount(of)])
    assert wilson_of_sums(sums) == (interval if interval is None else pytest.approx(interval))


def test_each_document_begins_with_an_empty_state():
    parts = [Document(str(number), ids=IDS[begin : begin + 50]) for number, begin in enumerate(range(0, 500, 50))]
    corpus = Corpus("parts", "test", lambda: iter(parts), "x", as_stream=False, tokenized=True)
    result = measure_agreement(LM, REFERENCE, corpus, chunk_size=7, reference_chunk_size=30)
    assert float(result.kl) == pytest.approx(np.mean([expected(LM, REFERENCE, part.ids)[1] for part in parts]), abs=1e-5)
    assert result.kl.interval is not None
    assert result.record.cost.tokens == 490
    assert measure_agreement(LM, REFERENCE, corpus, limit=2, tokens=10).record.cost.tokens == 18


def test_an_iterator_is_read_once_and_not_far_ahead():
    handed_out, furthest = [0], []

    def ids():
        for begin in range(0, 700, 10):
            handed_out[0] += 10
            yield IDS[begin : begin + 10]

    def progress(tokens, nats, expected):
        furthest.append(handed_out[0] - tokens)

    result = measure_agreement(LM, REFERENCE, ids(), chunk_size=16, reference_chunk_size=32, progress=progress)
    np.testing.assert_allclose(values(result), expected(LM, REFERENCE, IDS), atol=1e-5)
    assert max(furthest) < 60


def test_a_model_without_a_state_reads_its_windows():
    lm = dataclasses.replace(as_model(Stateless()), context_length=64)
    result = measure_agreement(lm, LM, IDS, chunk_size=64)
    assert "windows of 64" in result.record.details["read"]
    assert "carried" in result.record.details["reference_read"]
    assert result.record.cost.tokens == 699


def test_documents_without_a_target_are_skipped_and_counted():
    ours, theirs = model(0, vocab=256), model(1, vocab=256)
    found, expected = (
        measure_agreement(ours, theirs, texts(*some, as_stream=False))
        for some in (("", "fine", "x", "another one"), ("fine", "another one"))
    )
    assert values(found).tolist() == values(expected).tolist()
    assert found.record.details["skipped"] == 2
    assert "2 of 4 documents skipped: nothing to score in them" in found.record.notes
    with pytest.raises(StreamError, match=r"holds 2 document\(s\), and all are empty, or of one token"):
        measure_agreement(ours, theirs, texts("", "x", as_stream=False))


def test_models_of_other_tokens_and_a_text_without_a_target_are_refused():
    with pytest.raises(StreamError, match="fewer than two tokens"):
        measure_agreement(LM, REFERENCE, IDS[:1])
    with pytest.raises(SpecError, match=r"toy-0 has 32 tokens and toy-2 has 40, so their predictions cannot be compared"):
        measure_agreement(LM, model(2, vocab=40), IDS)
    with pytest.raises(SpecError, match="reads frames of codes"):
        measure_agreement(load("zoo:moshi"), load("zoo:moshi"), IDS)

    class Reversed:
        name, bos = "reversed", None

        def encode(self, text):
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)[::-1], np.arange(1, len(text.encode()) + 1)

    own = model(0, vocab=256)
    other = dataclasses.replace(own, spec="other", tokenizer=Reversed())
    text = Corpus("text", "test", lambda: iter([Document("a", "some text that is read")]), "x")
    with pytest.raises(SpecError, match="toy-0 and other have tokenizers that encode the same text differently"):
        measure_agreement(own, other, text)
    assert measure_agreement(own, own, text).kl == 0
    assert measure_agreement(own, other, IDS).kl == 0  # the same ids


def test_a_token_that_only_the_model_rules_out_has_no_kl_and_the_error_names_its_position():
    class RulesOut(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            if input_ids.shape[-1] > 1:
                logits[..., 20:, 5] = -torch.inf
            return logits, state

    ids = np.where(IDS == 5, 6, IDS)
    never, other = as_model(RulesOut(seed=0), spec="never-5"), as_model(Functional())
    with pytest.raises(NotFiniteError, match=r"not finite at token 21 of document 0: .* of id 5 is -3.* and -inf in never-5"):
        measure_agreement(never, other, ids)
    for ours in (never, other):
        assert measure_agreement(ours, never, ids).kl >= 0  # a token of no probability in the reference costs nothing


def test_the_verb_records_both_models_and_how_each_was_read(tmp_path):
    def lmeval(**options):
        return Lmeval(VerbContext(Session(tmp_path, budget=1000, **options), Log("test_it")))

    first = lmeval()
    result = first.agreement(LM, REFERENCE, IDS, tokens=300)
    assert result.record.cost.tokens == 299
    assert result.record.certificate.verdict == result.record.details["reference_verdict"] == "exact-any-chunk"
    assert result.record.settings["reference"]["spec"] == "toy-1"
    assert result.record.test == "test_it"
    again = lmeval(verdicts=first._context.session.verdicts)  # of an interrupted run
    assert float(again.agreement(LM, REFERENCE, IDS, tokens=300).kl) == float(result.kl)
    assert "taken from an interrupted run" in again._context.log.notes[0]
    assert first.agreement(REFERENCE, LM, IDS, tokens=300).kl != result.kl
    result = first.agreement(as_model(Functional()), as_model(Dropped()), IDS[:200])  # exact in single steps only
    assert result.record.details["reference_read"] == "carried in chunks of 1"
    assert float(result.largest_difference) < 1e-5
