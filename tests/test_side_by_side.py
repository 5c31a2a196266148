"""Short documents are read as rows of padded batches: the numbers of one after another, in fewer calls and bounded memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
from clean_models import Attention
from hypothesis import given, settings, strategies as st
from msgspec import structs
from reading import assert_equal_but_for_time, measure_until_killed, texts
from running_out import Layered, running_out
from test_audit import CERTIFIED
from tiny_models import Broken, Functional, Neighbourly, Stateless

from pytest_lmeval import as_model, policy_for
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.engine._policy import CALL
from pytest_lmeval.errors import CorpusError, NotFiniteError, Refused, StreamError
from pytest_lmeval.measures._look_ahead import AHEAD, batches
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.records._certificate import LawResult
from pytest_lmeval.records._journal import Checkpoints

VOCAB = 7  # of Attention
HOW = {
    "carried": (Attention, {"window": "unlimited", "chunk_size": 64}),
    "windows": (lambda: Stateless(vocab=VOCAB), {"window": 50, "overlap": 10}),
    "windows with a state": (lambda: Functional(vocab=VOCAB), {"window": 50, "overlap": 10}),
    "windows of lm_eval": (lambda: Functional(vocab=VOCAB), {"window": "lm_eval"}),
}
SHORT = tuple(range(2, 42, 3))


def documents(lengths, seed=0):
    """A corpus of random ids, a document of each length."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, VOCAB, length) for length in lengths]
    return Corpus("some", "test", lambda: (Document(str(n), ids=part) for n, part in enumerate(ids)), "fp", tokenized=True)


def model_of(how, module=None):
    make, _ = HOW[how]
    return replace(as_model(make() if module is None else module), context_length=50 if how == "windows of lm_eval" else None)


def read(lm, corpus, how="carried", rows=8, **options):
    policy = policy_for(lm, batch_size=rows, **HOW[how][1])
    return measure_perplexity(lm, corpus, policy=policy, as_stream=False, **options)


def shapes_of(module, work):
    """The shape of the tokens of each call."""
    with running_out(module) as memory:
        work()
    return memory.shapes


@settings(max_examples=25)
@given(st.sampled_from(sorted(HOW)), st.lists(st.integers(0, 90) | st.integers(0, 30), min_size=1, max_size=40), st.data())
def test_documents_side_by_side_have_the_numbers_of_one_after_another_in_order(tmp_path_factory, how, lengths, data):
    folder, lm = tmp_path_factory.mktemp("losses"), model_of(how)
    if max(lengths) < 2:
        return
    options = {"positions": (20, 60), "limit": data.draw(st.none() | st.just(30)), "tokens": data.draw(st.none() | st.just(25))}
    if max(lengths[: options["limit"]]) < 2:
        return
    beside, alone = (
        read(lm, documents(lengths), how, rows, losses=folder / f"{rows}.npy", units=folder / f"{rows}.jsonl", **options)
        for rows in (8, 1)
    )
    np.testing.assert_allclose(np.load(folder / "8.npy"), np.load(folder / "1.npy"), atol=1e-5)
    assert [beside.record.details[name] for name in ("documents", "chunks")] == [
        alone.record.details[name] for name in ("documents", "chunks")
    ]
    assert beside.record.details.get("skipped") == alone.record.details.get("skipped")
    assert (beside.tokens, beside.state_bytes) == (alone.tokens, alone.state_bytes)
    assert float(beside.nll) == pytest.approx(float(alone.nll), abs=1e-6)
    assert beside.loss_by_position.y == pytest.approx(alone.loss_by_position.y, abs=1e-5)
    assert beside.loss_at == pytest.approx(alone.loss_at, abs=1e-5)
    units = [[json.loads(line) for line in (folder / f"{rows}.jsonl").read_text().splitlines()] for rows in (8, 1)]
    assert [unit["id"] for unit in units[0]] == [unit["id"] for unit in units[1]]
    for one, other in zip(*units, strict=True):
        assert one["sums"] == pytest.approx(other["sums"], abs=1e-4)


def test_text_has_its_bytes_and_its_special_tokens_side_by_side():
    lm = as_model(Functional(vocab=256))
    corpus = texts(*(f"the document of number {n}, naïve" * (n % 3) for n in range(30)), as_stream=False)
    beside, alone = (measure_perplexity(lm, corpus, policy=policy_for(lm, batch_size=rows)) for rows in (8, 1))
    assert float(beside.bits_per_byte) == pytest.approx(float(alone.bits_per_byte), rel=1e-6)
    assert beside.record.details["skipped"] == 10
    assert beside.record.notes == alone.record.notes


@pytest.mark.parametrize("how", ["carried", "windows"])
def test_a_batch_has_at_most_the_tokens_of_a_chunk_and_saves_calls(how):
    lm = model_of(how)
    beside, alone = (shapes_of(lm.module, lambda rows=rows: read(lm, documents(SHORT * 6), how, rows)) for rows in (8, 1))
    longest = max(SHORT) - 1
    assert sum(rows for rows, _ in beside) == len(alone) == len(SHORT) * 6
    assert len(beside) < 0.6 * len(alone)
    assert all(rows * width <= HOW[how][1].get("chunk_size", 50) for rows, width in beside)
    assert max(width for _, width in beside) == longest
    padded = sum(rows * width for rows, width in beside) - sum(rows * width for rows, width in alone)
    assert padded < CALL * (len(alone) - len(beside))  # else it would save nothing


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 9), st.integers(1, 500), st.sampled_from([1, 32, 64]))
def test_every_text_is_in_one_batch_that_fits_and_its_padding_costs_less_than_a_call(lengths, rows, tokens, call):
    found = batches(lengths, rows, tokens, call)
    assert sorted(number for batch in found for number in batch) == list(range(len(lengths)))
    for batch in found:
        width = max(lengths[number] for number in batch)
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * width <= tokens
        assert all(width - lengths[number] <= call for number in batch)


@pytest.mark.parametrize(
    "lengths", [SHORT * 40, (0, 1, 3) * 300, (3, 3000, 5, 900, 2, 2, 2) * 3], ids=["short", "tiny", "mixed"]
)
def test_no_more_is_held_than_the_look_ahead_allows(lengths):
    lm, given, ahead = model_of("carried"), [], []
    corpus = documents(lengths)

    def counted():
        for document in corpus.documents():
            given.append(len(document.ids))
            yield document

    def note(done, nats, expected):
        targets = np.cumsum([max(0, length - 1) for length in given])
        ahead.append((len(given) - np.searchsorted(targets, done), targets[-1] - done))

    measured = read(lm, replace(corpus, documents=counted), progress=note)
    assert measured.tokens == sum(max(0, length - 1) for length in lengths)
    assert max(documents for documents, _ in ahead) <= AHEAD * 8 + 3  # two without a target, and the next one
    assert max(tokens for _, tokens in ahead) <= AHEAD * 64 + max(lengths)  # and the one that no longer fits


@pytest.mark.parametrize("how", ["carried", pytest.param("windows", marks=pytest.mark.thorough), "windows of lm_eval"])
def test_a_killed_run_is_resumed_inside_of_a_group_with_the_same_numbers_to_the_last_bit(tmp_path, how):
    lengths = [*SHORT, 300, 0, *SHORT[::-1], 70, 1, *SHORT, *SHORT, *SHORT, 5]
    lm, corpus = model_of(how), documents(lengths)
    whole = read(lm, corpus, how, losses=tmp_path / "whole.npy")
    alone = read(lm, corpus, how, rows=1)
    assert float(whole.nll) != float(alone.nll)  # or batches would not matter to the last bit, and the test could not fail
    for killed_at in range(20, whole.tokens, 171):
        saved = {"checkpoints": Checkpoints(tmp_path / str(killed_at)), "key": "k", "losses": tmp_path / "killed.npy"}
        options = {"policy": policy_for(lm, **HOW[how][1]), "as_stream": False, **saved}
        with pytest.MonkeyPatch.context() as patch:  # measure_until_killed makes a policy of its own
            patch.setattr("reading.measure_perplexity", measure_perplexity)
            measure_until_killed(killed_at, lm, corpus, **options)
        resumed = read(lm, corpus, how, **saved)
        assert 0 < resumed.resumed_at <= killed_at + 300
        assert_equal_but_for_time(resumed, whole)
        assert np.array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))


@pytest.mark.parametrize("fault", ["token", "nan", "corpus", "float"])
def test_what_is_wrong_with_a_document_is_said_of_that_document_after_those_before_it(tmp_path, fault):
    module = Broken(vocab=VOCAB + 1) if fault == "nan" else Functional(vocab=VOCAB)
    lm, whole = as_model(module), list(documents([10] * 20).documents())

    def parts():
        for number, document in enumerate(whole):
            ids = document.ids.astype(np.float64 if (fault, number) == ("float", 11) else int)
            if number == 11 and fault in ("token", "nan"):
                ids[4] = 7  # is no token of one model, and the other gives nan after it
            if number == 11 and fault == "corpus":
                raise CorpusError("line 12 is damaged")
            yield Document(document.name, ids=ids)

    seen = []
    expected, message = {
        "token": (StreamError, r"some\[test\], document 11: token 4 of the stream has id 7"),
        "nan": (NotFiniteError, r"some\[test\], document 11: .* loss of nan for token 5 of the stream"),
        "corpus": (CorpusError, "line 12 is damaged"),
        "float": (CorpusError, "11 cannot be read by"),
    }[fault]
    with pytest.raises(expected, match=message):
        read(lm, Corpus("some", "test", parts, "fp", tokenized=True), progress=lambda done, nats, whole: seen.append(done))
    assert seen == [9 * (number + 1) for number in range(10 if fault == "corpus" else 11)]  # it raises before the tenth ends


@pytest.mark.parametrize(
    ("short", "said"), [({"above": 40}, "batches of 2 instead of 8"), ({"above": 15}, "batches of 1 instead")]
)
def test_fewer_rows_are_read_where_memory_is_short_and_the_record_says_so(short, said):
    module = Layered(vocab=256)
    lm, corpus = as_model(module, tokenizer="bytes"), texts(*(f"a document: {n:03d}" for n in range(40)), as_stream=False)
    whole = measure_perplexity(lm, corpus, policy=policy_for(lm))
    with running_out(module, **short, in_place=True) as memory:
        result = measure_perplexity(lm, corpus, policy=policy_for(lm))
    assert float(result.nll) == pytest.approx(float(whole.nll), abs=1e-6)
    assert len(memory.raised) <= 4  # it does not try again what did not fit
    (note,) = (note for note in result.record.notes if "memory" in note)
    assert said in note
    assert not any("memory" in note for note in whole.record.notes)


class Learning(Functional):
    """Names its state as weights that it changes."""

    def fast_weights(self, state):
        return {"hidden": self.cell.weight_hh_l0.detach() if state is None else state[0]}


@pytest.mark.parametrize("why", ["one row", "invariant", "fast weights", "rows is untried"])
def test_documents_are_read_one_after_another_where_a_batch_is_not_allowed(why):
    lm = as_model(Learning(vocab=VOCAB) if why == "fast weights" else Functional(vocab=VOCAB))
    rows = {"rows": LawResult(cases=0, missing="no time")} if why == "rows is untried" else {}
    proven = structs.replace(CERTIFIED, laws={**CERTIFIED.laws, **rows})
    policy = policy_for(lm, proven, batch_size=1 if why == "one row" else 8, invariant=why == "invariant")
    shapes = shapes_of(lm.module, lambda: measure_perplexity(lm, documents(SHORT), policy=policy, as_stream=False))
    assert {rows for rows, _ in shapes} == {1}


def test_a_model_whose_rows_see_each_other_is_found_on_the_documents_and_nothing_is_reported():
    lm = as_model(Neighbourly(vocab=VOCAB))
    corpus = documents(SHORT * 3)
    with pytest.raises(Refused) as refused:
        measure_perplexity(lm, corpus, policy=policy_for(lm, CERTIFIED), as_stream=False)
    message = str(refused.value)
    assert "some[test] contradicts it: " in message
    assert "rows of a batch, were read again alone" in message
    assert 'replay(lm, "rows"' in message
    beside, alone = (read(lm, corpus, rows=rows) for rows in (8, 1))
    assert abs(beside.nll - alone.nll) > 1e-5  # the fault matters


def test_a_right_model_is_audited_on_longer_and_longer_documents_and_not_accused():
    lm = as_model(Functional(vocab=VOCAB))
    result = measure_perplexity(lm, documents(SHORT * 40), policy=policy_for(lm, CERTIFIED), as_stream=False)
    audit = result.record.certificate.audit
    assert max(SHORT) / 2 <= audit.tokens < max(SHORT)
    assert 0 < audit.share <= 1 / 20
    assert audit.difference < 1e-5
