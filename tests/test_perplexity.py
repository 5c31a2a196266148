"""Perplexity: metrics as plainly computed, sums that merge, windows without a state, and runs that are killed and resumed."""

import json
import math
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from clean_models import Attention
from hypothesis import given, settings, strategies as st
from reading import (
    LM,
    accumulated,
    assert_equal_but_for_time,
    chunk_of,
    ids_of,
    losses_of,
    measure_perplexity,
    measure_until_killed,
    saving_every_chunk,
    texts,
)
from tiny_models import Failing, Functional, Stateless, Stepper

from pytest_lmeval import corpus, load, perplexity
from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.errors import CorpusError, NoIntervalError, RegistryError, StreamError
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._agreement import measure_agreement
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._journal import Checkpoints, JournalWarning
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring import _loss_accumulator as scoring
from pytest_lmeval.scoring._loss_accumulator import CHUNKS, TOKENS, LossAccumulator
from pytest_lmeval.scoring._loss_metrics import exponential
from pytest_lmeval.training._plan import plan_for
from pytest_lmeval.training._protocol import Protocol

BYTE_LM = as_model(Functional(vocab=256))
WINDOWS = {"window": 40, "overlap": 15, "chunk_size": 7}
thorough = pytest.mark.thorough


def test_the_metrics_of_an_iterator_are_those_of_a_plain_computation():
    ids = ids_of(500)
    result = measure_perplexity(LM, iter(np.split(ids, 10)), chunk_size=64)
    losses = losses_of(ids)
    with torch.no_grad():
        logits, _ = LM.step(torch.from_numpy(ids)[None, :-1])
    top5 = (logits[0].topk(5).indices == torch.from_numpy(ids[1:])[:, None]).any(1).double().mean()
    assert float(result.nll) == pytest.approx(losses.mean(), rel=1e-6)
    assert float(result.perplexity) == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert float(result.token_accuracy[5]) == pytest.approx(float(top5))
    assert (result.tokens, result.chunks, result.state_bytes) == (499, 8, 64)
    with pytest.raises(AttributeError, match="token ids, no text"):
        result.bits_per_byte  # noqa: B018


def test_documents_begin_with_a_new_state_and_a_stream_carries_it():
    parts = ("a naïve document", "the second café")
    by_document, streamed = (measure_perplexity(BYTE_LM, texts(*parts, as_stream=as_stream)) for as_stream in (False, True))
    losses = [losses_of(list(text.encode()), BYTE_LM) for text in parts]
    assert float(by_document.nll) == pytest.approx(np.concatenate(losses).mean(), rel=1e-6)
    assert by_document.record.details["documents"] == 2
    whole = losses_of(list("".join(parts).encode()), BYTE_LM)
    assert float(streamed.nll) == pytest.approx(whole.mean(), rel=1e-6)
    assert float(streamed.bits_per_byte) == pytest.approx(whole.sum() / math.log(2) / len(whole), rel=1e-6)


def test_documents_and_tokens_are_limited():
    corpus = texts(*["some text"] * 10, as_stream=False)
    assert measure_perplexity(BYTE_LM, corpus, limit=3).tokens == 3 * 8
    assert measure_perplexity(BYTE_LM, corpus, limit=3, tokens=4).tokens == 3 * 3
    assert measure_perplexity(BYTE_LM, corpus, as_stream=True, tokens=20).tokens == 19


@pytest.mark.parametrize("vocab", [32, 5000])
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_a_model_without_a_state_reads_windows_that_depend_on_no_chunk_and_no_vocabulary(vocab, chunk_size):
    lm = as_model(Stateless(vocab=vocab))
    result = measure_perplexity(lm, ids_of(30), chunk_size=chunk_size)
    assert (result.tokens, result.record.details["why"]) == (29, "the model has no state to carry")
    assert (result.record.settings["reading"], result.record.settings["window"]) == ("windows", 1024)
    with pytest.raises(StreamError, match="can only be read in windows"):
        measure_perplexity(lm, ids_of(30), window="unlimited")


def test_loss_by_position_covers_every_target():
    ids = ids_of(3000)
    result = measure_perplexity(LM, ids, positions=(1000, 2000, 9000))
    losses = losses_of(ids)
    assert result.loss_by_position.y[0] == pytest.approx(losses[0], rel=1e-5)  # the target with one token before it
    assert result.loss_at == pytest.approx({1000: losses[:1000].mean(), 2000: losses[1000:2000].mean()}, rel=1e-5)
    assert float(result.loss_slope) == pytest.approx(losses[1000:2000].mean() - losses[:1000].mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"chunk_size": 30, "tokens": 80}, [(30, 79), (60, 79), (79, 79)]),
        ({"chunk_size": 32, "window": 64, "overlap": 0}, [(32, 99), (64, 99), (96, 99), (99, 99)]),
    ],
)
def test_progress_is_reported_after_every_chunk(how, expected):
    seen = []
    measure_perplexity(LM, ids_of(100), progress=lambda done, nats, whole: seen.append((done, whole)), **how)
    assert seen == expected


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (texts(), r"texts\[test\]: a stream of fewer than two tokens"),
        (texts(""), r"texts\[test\]: a stream of fewer than two tokens"),
        (texts("a"), r"texts\[test\]: a stream of fewer than two tokens"),
        (texts("a", "", "b", as_stream=False), r"texts\[test\] holds 3 document\(s\), and all are empty, or of one token"),
        (texts(as_stream=False), "holds no document"),
        (np.array([1.2, 3.9, 4.1]), r"a row of integer token ids; got shape .* of float64"),
    ],
)
def test_a_text_without_a_target_and_ids_that_are_no_integers_are_refused(corpus, message):
    with pytest.raises((StreamError, CorpusError), match=message):
        measure_perplexity(BYTE_LM, corpus)


def test_a_name_is_a_corpus_wherever_one_is_taken():
    lm, other = load("demo"), load("demo")
    named, given = (measure_perplexity(lm, source, tokens=200) for source in ("stdlib", corpus("stdlib")))
    assert (named.record.subject, named.nll) == (given.record.subject, given.nll)
    assert named.record.settings["data"] == given.record.settings["data"]
    assert perplexity("demo", "stdlib", tokens=200).nll == given.nll
    assert measure_agreement(lm, other, "stdlib", tokens=200).agreement == 1
    protocol = Protocol(seq_len=32, steps=1, batch_size=2)
    plans = [plan_for(lm, *sources, protocol) for sources in (("stdlib", None), (corpus("stdlib"), None))]
    assert plans[0].key == plans[1].key
    with pytest.raises(CorpusError, match="are the same text"):
        plan_for(lm, "stdlib", corpus("stdlib"), protocol)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlob", "there is no corpus 'stdlob'. Did you mean stdlib?"),
        ("text:nothing.txt", "nothing.txt"),
        (None, "the name of one, .* got None, of type NoneType"),
        (7, "got 7, of type int"),
        (corpus, "of type function"),
        (Path("notes.txt"), 'A file is named as "text:notes.txt"'),
    ],
)
def test_what_is_no_corpus_is_refused_in_words(source, message):
    with pytest.raises((CorpusError, RegistryError), match=message):
        measure_perplexity(BYTE_LM, source)


def test_the_end_of_an_interval_that_a_short_text_has_not_is_an_error_that_says_so():
    result = measure_perplexity(load("demo"), "stdlib", tokens=60)
    assert result.perplexity < 20
    for ask in (lambda: result.perplexity.high < 20, lambda: result.bits_per_byte.low > 1):
        with pytest.raises(NoIntervalError, match=r"has no 95 % interval, so it has no .* Too little was read .* longer text"):
            ask()
    with pytest.raises(NoIntervalError, match=r"^tokens_per_second \(.* tokens/s, n = 59\) .* measured once"):
        _ = result.tokens_per_second.low


@pytest.mark.parametrize("lm", [BYTE_LM, as_model(Stateless(vocab=256))], ids=["carried", "windows"])
def test_documents_without_a_target_are_skipped_and_counted(tmp_path, lm):
    all_of_them, scored = ("", "fine", "x", "", "another one", "y"), ("fine", "another one")
    found, expected = (measure_perplexity(lm, texts(*some, as_stream=False)) for some in (all_of_them, scored))
    assert_equal_but_for_time(found, expected)
    assert (found.record.details["documents"], found.record.details["skipped"]) == (2, 4)
    assert "4 of 6 documents skipped: nothing to score in them" in found.record.notes
    assert "skipped" not in expected.record.details
    assert measure_perplexity(lm, texts(*all_of_them, as_stream=False), limit=2).record.details["skipped"] == 1
    assert measure_perplexity(lm, texts(*all_of_them, as_stream=True)).tokens == len("".join(all_of_them)) - 1


def test_skipped_documents_are_counted_once_by_a_run_that_is_killed(tmp_path):
    documents = [text for n in range(6) for text in (f"document number {n} with some text in it, " * 3, "", "x")]
    corpus, saved = texts("", *documents, as_stream=False), {"checkpoints": Checkpoints(tmp_path), "key": "k", "chunk_size": 16}
    whole = measure_perplexity(BYTE_LM, corpus, chunk_size=16, units=tmp_path / "whole.jsonl")
    for tokens in (100, 250, 430):
        measure_until_killed(tokens, BYTE_LM, corpus, **saved)
    resumed = measure_perplexity(BYTE_LM, corpus, units=tmp_path / "units.jsonl", **saved)
    assert resumed.resumed_at > 300
    assert_equal_but_for_time(resumed, whole)
    assert resumed.record.details["skipped"] == whole.record.details["skipped"] == 13
    assert (tmp_path / "units.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_perplexity_is_never_capped():
    assert float(exponential(Value(25.0))) == pytest.approx(math.exp(25))
    with pytest.raises(StreamError, match="too large a number"):
        exponential(Value(1000.0))


def test_a_corpus_may_be_named(tmp_path):
    (tmp_path / "text.txt").write_text("some text " * 9)
    name = f"text:{tmp_path / 'text.txt'}"
    named = Lmeval(VerbContext(Session(budget=1000), Log())).perplexity(BYTE_LM, name, tokens=40)
    assert named.nll == measure_perplexity(BYTE_LM, corpus(name), tokens=40).nll
    assert named.record.subject == f"{name}[test]"


def test_the_state_is_measured_after_every_chunk():
    carried = measure_perplexity(LM, ids_of(500), chunk_size=64).record.series["state_bytes"]
    assert (carried.y, carried.x[0], carried.x[-1], carried.y_unit) == ([64.0] * 8, 64, 499, "bytes")
    cache = measure_perplexity(as_model(Attention()), ids_of(500) % 7, chunk_size=64).record.series["state_bytes"].y
    assert cache[0] > 0
    np.testing.assert_allclose(np.diff(cache[:-1]), cache[0], rtol=1e-6)  # a cache grows by as much with each chunk
    assert "state_bytes" not in measure_perplexity(LM, ids_of(500), window=50).record.series
    assert "state_bytes" not in measure_perplexity(LM, ids_of(500), as_stream=False).record.series


@settings(max_examples=30)
@given(st.integers(1, 400), st.lists(st.integers(1, 90), min_size=1, max_size=30))
def test_the_sums_do_not_depend_on_the_chunks(length, sizes):
    nll = np.random.default_rng(length).exponential(size=length)
    parts, whole = (accumulated(nll, chunks, positions=(100,)) for chunks in (sizes, []))
    for name in ("total", "by_position", "at_positions", "units"):
        np.testing.assert_allclose(np.array(getattr(parts, name)), np.array(getattr(whole, name)), rtol=1e-12)
    assert whole.total[TOKENS] == length
    assert whole.total[scoring.NATS] == pytest.approx(nll.sum())
    assert whole.total[scoring.HITS[5]] == ((nll * 7).astype(int) % 9 < 5).sum()


def test_a_stream_of_any_length_takes_the_same_memory():
    sums = accumulated(np.ones(scoring.BLOCK * scoring.BLOCKS * 5), [997] * 100)
    assert scoring.BLOCKS // 2 <= len(sums.units) <= scoring.BLOCKS
    assert sums.block == scoring.BLOCK * 8
    assert sum(unit[TOKENS] for unit in sums.units) == sums.total[TOKENS]


@pytest.mark.parametrize("number", [1, CHUNKS, CHUNKS + 1, 2 * CHUNKS + 3])
def test_the_history_of_any_number_of_chunks_fits_and_gives_the_mean_of_each_row(number):
    sums = LossAccumulator()
    for start in range(1, number + 1):
        sums.add(chunk_of(start, np.ones(1), seconds=0.25, state_bytes=1024))
    rows, counts = sums.history
    assert len(rows) <= CHUNKS
    assert counts.sum() == rows[:, TOKENS].sum() == number
    assert (rows[:, scoring.SECONDS] == 0.25 * counts).all()
    assert (rows[:, scoring.STATE] == 1024 * counts).all()


@pytest.mark.parametrize(
    ("how", "as_stream"),
    [
        ({}, True),
        (WINDOWS, False),
        pytest.param({}, False, marks=thorough),
        pytest.param(WINDOWS, True, marks=thorough),
    ],
)
def test_a_killed_run_is_resumed_with_the_same_numbers_to_the_last_bit(tmp_path, how, as_stream):
    options = {"chunk_size": 16, "positions": (50, 100), **how}
    corpus = texts(*(f"document number {n} with some text in it, " * 3 for n in range(6)), as_stream=as_stream)
    whole = measure_perplexity(BYTE_LM, corpus, losses=tmp_path / "whole.npy", **options)
    options |= {"checkpoints": Checkpoints(tmp_path / "partial"), "key": "k", "losses": tmp_path / "killed.npy"}
    for tokens in (100, 250, 430):
        measure_until_killed(tokens, BYTE_LM, corpus, **options)
    resumed = measure_perplexity(BYTE_LM, corpus, **options)
    assert 300 < resumed.resumed_at < resumed.tokens
    assert_equal_but_for_time(resumed, whole)
    assert "loss_at" in whole.record.series
    assert np.array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))


def test_short_documents_in_windows_are_not_counted_twice_after_a_kill(tmp_path):
    model, saved = as_model(Stateless(vocab=256)), {"checkpoints": Checkpoints(tmp_path), "key": "k"}
    corpus = texts(*(f"document {n}" + " and more" * (n % 3) for n in range(12)), as_stream=False)
    measure_until_killed(100, model, corpus, **saved)
    resumed = measure_perplexity(model, corpus, **saved)
    assert (resumed.resumed_at > 0, resumed.record.details["documents"]) == (True, 12)
    assert_equal_but_for_time(resumed, measure_perplexity(model, corpus))


@pytest.mark.parametrize("fault", ["truncated", "deleted"])
def test_losses_that_never_reached_the_disk_are_scored_again(tmp_path, fault):
    ids, path = ids_of(400), tmp_path / "losses.npy"
    saved = {"checkpoints": Checkpoints(tmp_path / "partial"), "key": "k", "losses": path, "chunk_size": 16}
    measure_until_killed(200, LM, ids, **saved)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    else:
        path.unlink()
    measure_perplexity(LM, ids, **saved)
    written = np.load(path)
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, losses_of(ids), atol=1e-5)


@pytest.mark.parametrize("fault", ["another version", "half a file"])
def test_a_checkpoint_that_cannot_be_used_is_reported_and_the_text_read_from_its_beginning(tmp_path, fault):
    saved, path = {"checkpoints": Checkpoints(tmp_path), "key": "k", "chunk_size": 16}, tmp_path / "k.pt"
    measure_until_killed(50, LM, ids_of(100), **saved)
    if fault == "half a file":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        point = torch.load(path)
        sums = json.loads(point["sums"])
        sums["chunks"] = [row[:-1] for row in sums["chunks"]]
        torch.save({**point, "sums": json.dumps(sums)}, path)
    with pytest.warns(JournalWarning, match="cannot be read" if fault == "half a file" else "cannot be read .*another version"):
        assert measure_perplexity(LM, ids_of(100), **saved).resumed_at == 0


@pytest.mark.parametrize("model", [LM, as_model(Stepper())], ids=["module", "object"])
@pytest.mark.parametrize("function", [open, eval, subprocess.getoutput])
def test_a_checkpoint_cannot_run_code(tmp_path, model, function):
    class Evil:
        def __reduce__(self):
            arguments = {open: (str(tmp_path / "ran"), "w"), eval: (f"open({str(tmp_path / 'ran')!r}, 'w')",)}
            return function, arguments.get(function, (f"touch {tmp_path / 'ran'}",))

    torch.save({"meta": "{}", "state": Evil()}, tmp_path / "k.pt")
    with pytest.warns(JournalWarning, match="cannot be read"):
        measure_perplexity(model, ids_of(100), checkpoints=Checkpoints(tmp_path), key="k")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_run_continues_if_the_disk_is_full_and_stops_if_it_is_interrupted(tmp_path, monkeypatch, error):
    saving = torch.save
    monkeypatch.setattr(torch, "save", lambda point, file: saving(point, Failing(20, error)))
    measure = partial(measure_perplexity, LM, ids_of(100), chunk_size=16, checkpoints=Checkpoints(tmp_path), key="k")
    if error is OSError:
        with pytest.warns(JournalWarning, match="the reading continues"), saving_every_chunk():
            assert measure().tokens == 99
    else:
        with pytest.raises(KeyboardInterrupt), saving_every_chunk():
            measure()


def test_a_state_that_cannot_be_saved_costs_only_the_checkpoint(tmp_path):
    class WithFunction(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state and state[0])
            return logits, (state, lambda: None)

    saved = {"checkpoints": Checkpoints(tmp_path), "key": "k"}
    with pytest.warns(JournalWarning, match="no checkpoint can be saved"), saving_every_chunk():
        assert measure_perplexity(as_model(WithFunction()), ids_of(200), chunk_size=16, **saved).tokens == 199
