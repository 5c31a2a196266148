"""A reading: sums that merge, intervals that cover, windows where there is no state, and a kill that costs nothing."""

import json
import math
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from clean_models import Attention
from hypothesis import given, settings, strategies as st
from reading import chunk_of, measure_perplexity
from tiny_models import VOCAB, Failing, Functional, Stateless, Stepper

from pytest_lmeval import corpus, perplexity
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.errors import CorpusError, StreamError
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._journal import Checkpoints, JournalWarning, Saver
from pytest_lmeval.scoring._loss_accumulator import (
    BLOCK,
    BLOCKS,
    BYTES,
    CHUNKS,
    HITS,
    NATS,
    SECONDS,
    STATE,
    TOKENS,
    LossAccumulator,
)
from pytest_lmeval.scoring._reading_figures import exponential

LM = as_model(Functional())
BYTE_LM = as_model(Functional(vocab=256))


def ids_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def texts(*documents, as_stream=True):
    return Corpus(
        "texts", "test", lambda: (Document(str(i), text) for i, text in enumerate(documents)), "fp", as_stream=as_stream
    )


def losses_of(ids, model=LM):
    with torch.no_grad():
        logits, _ = model.step(torch.from_numpy(np.asarray(ids))[None, :-1])
    return torch.nn.functional.cross_entropy(logits[0].double(), torch.as_tensor(ids[1:]), reduction="none").numpy()


# ----------------------------------------------------------------------------------------- what it finds


def test_the_figures_are_those_of_a_plain_computation():
    ids = ids_of(500)
    result = measure_perplexity(LM, ids, chunk_size=64)
    losses = losses_of(ids)
    with torch.no_grad():
        logits, _ = LM.step(torch.from_numpy(ids)[None, :-1])
    top5 = (logits[0].topk(5).indices == torch.from_numpy(ids[1:])[:, None]).any(1).double().mean()
    assert float(result.nll) == pytest.approx(losses.mean(), rel=1e-6)
    assert float(result.perplexity) == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert float(result.token_accuracy[5]) == pytest.approx(float(top5))
    assert (result.tokens, result.chunks) == (499, 8)
    assert result.state_bytes == 64


def test_bits_per_byte_are_those_of_the_text():
    text = "naïve café " * 30
    result = measure_perplexity(BYTE_LM, texts(text))
    losses = losses_of(np.frombuffer(text.encode(), np.uint8).astype(np.int64), BYTE_LM)
    assert float(result.bits_per_byte) == pytest.approx(losses.sum() / math.log(2) / (len(text.encode()) - 1), rel=1e-6)


def test_ids_have_no_bytes():
    with pytest.raises(AttributeError, match="token ids, no text"):
        measure_perplexity(LM, ids_of(50)).bits_per_byte  # noqa: B018


def test_documents_begin_with_a_new_state_each():
    result = measure_perplexity(BYTE_LM, texts("first document", "second one", as_stream=False))
    losses = [losses_of(list(text.encode()), BYTE_LM) for text in ("first document", "second one")]
    assert float(result.nll) == pytest.approx(np.concatenate(losses).mean(), rel=1e-6)
    assert result.record.details["documents"] == 2


def test_one_stream_carries_its_state_over_documents():
    result = measure_perplexity(BYTE_LM, texts("first document", "second one"))
    assert float(result.nll) == pytest.approx(losses_of(list(b"first documentsecond one"), BYTE_LM).mean(), rel=1e-6)


def test_limits_are_kept():
    corpus = texts(*["some text"] * 10, as_stream=False)
    assert measure_perplexity(BYTE_LM, corpus, limit=3).tokens == 3 * 8
    assert measure_perplexity(BYTE_LM, corpus, limit=3, tokens=4).tokens == 3 * 3
    assert measure_perplexity(BYTE_LM, corpus, as_stream=True, tokens=20).tokens == 19


def test_a_model_without_a_state_is_read_in_windows_and_the_record_says_so():
    result = measure_perplexity(as_model(Stateless()), ids_of(300), window=100, overlap=50)
    assert result.tokens == 299
    assert result.record.settings["reading"] == "windows"
    default = measure_perplexity(as_model(Stateless()), ids_of(300))
    assert default.record.details["why"] == "the model has no state to carry"
    with pytest.raises(StreamError, match="can only be read in windows"):
        measure_perplexity(as_model(Stateless()), ids_of(300), window="unlimited")


def test_loss_by_position_covers_every_target():
    ids = ids_of(3000)
    result = measure_perplexity(LM, ids, positions=(1000, 2000, 9000))
    losses = losses_of(ids)
    first = result.loss_by_position
    assert first.y[0] == pytest.approx(losses[0], rel=1e-5)  # the target with one token before it
    assert result.loss_at == pytest.approx({1000: losses[:1000].mean(), 2000: losses[1000:2000].mean()}, rel=1e-5)
    assert float(result.loss_slope) == pytest.approx(losses[1000:2000].mean() - losses[:1000].mean(), abs=1e-6)


def test_losses_are_written_as_they_are_read(tmp_path):
    ids = ids_of(300)
    measure_perplexity(LM, ids, chunk_size=32, losses=tmp_path / "losses.npy")
    written = np.load(tmp_path / "losses.npy")
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, losses_of(ids), atol=1e-5)


def test_progress_is_told_after_every_chunk():
    seen = []
    measure_perplexity(LM, ids_of(100), chunk_size=30, tokens=80, progress=lambda *told: seen.append(told))
    assert [(done, expected) for done, _, expected in seen] == [(30, 79), (60, 79), (79, 79)]


def test_an_iterator_is_read_once_and_never_held():
    ids = ids_of(1000)
    result = measure_perplexity(LM, iter(np.split(ids, 10)))
    assert float(result.nll) == pytest.approx(losses_of(ids).mean(), rel=1e-6)


@pytest.mark.parametrize("corpus", [texts(), texts(""), texts("a")])
def test_an_empty_stream_is_refused(corpus):
    with pytest.raises(StreamError, match=r"texts\[test\]: a stream of fewer than two tokens"):
        measure_perplexity(BYTE_LM, corpus)


def test_an_empty_document_is_named():
    with pytest.raises(StreamError, match="document 1: a stream of fewer than two tokens"):
        measure_perplexity(BYTE_LM, texts("fine", "", "fine", as_stream=False))


def test_no_documents_at_all_are_refused():
    with pytest.raises(StreamError, match="holds no document"):
        measure_perplexity(BYTE_LM, texts(as_stream=False))


def test_a_perplexity_is_never_capped():
    from pytest_lmeval.records._value import Value

    assert float(exponential(Value(25.0))) == pytest.approx(math.exp(25))
    with pytest.raises(StreamError, match="no number a float can hold"):
        exponential(Value(1000.0))


# ------------------------------------------------------------------------------------------- sums


def fold(nll, sizes, **options):
    reading, start = LossAccumulator(**options), 1
    reading.start_document()
    for size in sizes:
        part = nll[start - 1 : start - 1 + size]
        if len(part):
            rank = (part * 7).astype(int) % 9
            reading.add(chunk_of(start, part, rank))
            start += len(part)
    return reading


@settings(max_examples=60)
@given(st.integers(1, 400), st.lists(st.integers(1, 90), min_size=1, max_size=30))
def test_the_sums_do_not_depend_on_the_chunks(length, sizes):
    nll = np.random.default_rng(length).exponential(size=length)
    parts, whole = fold(nll, [*sizes, length], positions=(100,)), fold(nll, [length], positions=(100,))
    for name in ("total", "by_position", "at_positions", "units"):
        np.testing.assert_allclose(np.array(getattr(parts, name)), np.array(getattr(whole, name)), rtol=1e-12)
    assert whole.total[TOKENS] == length
    assert whole.total[NATS] == pytest.approx(nll.sum())
    assert whole.total[HITS[5]] == ((nll * 7).astype(int) % 9 < 5).sum()


def test_a_stream_of_any_length_takes_the_same_memory():
    reading = fold(np.ones(BLOCK * BLOCKS * 5), [997] * 100)
    assert BLOCKS // 2 <= len(reading.units) <= BLOCKS
    assert reading.block == BLOCK * 8
    assert sum(unit[TOKENS] for unit in reading.units) == reading.total[TOKENS]
    long = fold(np.ones(CHUNKS * 3), [1] * CHUNKS * 3)
    assert len(long.chunks) <= CHUNKS
    assert sum(chunk[TOKENS] for chunk in long.chunks) == CHUNKS * 3


@settings(max_examples=30)
@given(st.integers(1, 3 * CHUNKS))
def test_the_course_of_any_number_of_chunks_is_a_mean_of_each_group_also_of_the_last(number):
    reading = LossAccumulator()
    for start in range(1, number + 1):
        reading.add(chunk_of(start, np.ones(1), seconds=0.25, state_bytes=1024))
    rows, each = reading.course
    assert each.sum() == number
    assert (rows[:, SECONDS] == 0.25 * each).all()
    assert (rows[:, STATE] == 1024 * each).all()


def test_the_state_is_weighed_after_every_chunk():
    held = measure_perplexity(LM, ids_of(500), chunk_size=64).record.series["state_bytes"]
    assert (held.y, held.x[0], held.x[-1], held.y_unit) == ([64.0] * 8, 64, 499, "bytes")
    cache = measure_perplexity(as_model(Attention()), ids_of(500) % 7, chunk_size=64).record.series["state_bytes"].y
    assert cache[0] > 0
    np.testing.assert_allclose(np.diff(cache[:-1]), cache[0], rtol=1e-6)  # a cache grows by as much with each chunk
    assert "state_bytes" not in measure_perplexity(LM, ids_of(500), window=50).record.series  # none is carried there
    assert "state_bytes" not in measure_perplexity(LM, ids_of(500), as_stream=False).record.series  # nor from text to text


def test_a_reading_survives_json_to_the_last_bit():
    reading = fold(np.random.default_rng(0).exponential(size=3000), [177] * 20, positions=(500,))
    again = LossAccumulator.from_json(json.loads(json.dumps(reading.to_json())))
    assert again.to_json() == reading.to_json()
    assert again.total[BYTES] == 3000


# ------------------------------------------------------------------------------------------- being killed


class Killed(Exception):
    pass


def read_killed_at(tokens, **options):
    """Read until so many tokens are scored, then die; a point is saved after every chunk."""

    def kill(done, nats, expected):
        if done >= tokens:
            raise Killed

    return pytest.raises(Killed), {"progress": kill, **options}


@pytest.mark.parametrize("plan", [{}, {"window": 40, "overlap": 15}, {"window": 40, "overlap": 15, "chunk_size": 7}])
@pytest.mark.parametrize("as_stream", [True, False])
def test_a_killed_reading_goes_on_with_the_same_numbers_to_the_last_bit(tmp_path, monkeypatch, plan, as_stream):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)
    options = {"chunk_size": 16, "positions": (50, 100), **plan}
    corpus = texts(*(f"document number {n} with some text in it, " * 3 for n in range(6)), as_stream=as_stream)
    whole = measure_perplexity(BYTE_LM, corpus, losses=tmp_path / "whole.npy", **options)
    saved = {"checkpoints": Checkpoints(tmp_path / "partial"), "key": "k", "losses": tmp_path / "killed.npy"}
    for tokens in (100, 250, 430):
        dies, extra = read_killed_at(tokens, **options, **saved)
        with dies:
            measure_perplexity(BYTE_LM, corpus, **extra)
    resumed = measure_perplexity(BYTE_LM, corpus, **options, **saved)
    assert 300 < resumed.resumed_at < resumed.tokens
    for name in ("perplexity", "nll", "bits_per_byte", "token_accuracy_top1", "token_accuracy_top5"):
        assert resumed.record.metrics[name].to_json() == whole.record.metrics[name].to_json()
    for name in ("chunk_loss", "running_perplexity", "loss_by_position", "loss_at"):
        assert resumed.record.series[name] == whole.record.series[name]
    assert np.array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))


def test_a_saved_point_of_another_version_is_reported_and_the_text_read_from_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    saved = {"checkpoints": Checkpoints(tmp_path), "key": "k", "chunk_size": 16}
    dies, extra = read_killed_at(50, **saved)
    with dies:
        measure_perplexity(LM, ids_of(100), **extra)
    point = torch.load(tmp_path / "k.pt")
    reading = json.loads(point["reading"])
    reading["chunks"] = [row[:-1] for row in reading["chunks"]]
    torch.save({**point, "reading": json.dumps(reading)}, tmp_path / "k.pt")
    with pytest.warns(JournalWarning, match=r"cannot be read .*of another version"):
        assert measure_perplexity(LM, ids_of(100), **saved).resumed_at == 0


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_reading_goes_on_where_the_disk_is_full_and_stops_where_it_is_stopped(tmp_path, monkeypatch, error):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    saving = torch.save
    monkeypatch.setattr(torch, "save", lambda point, file: saving(point, Failing(20, error)))
    read = partial(measure_perplexity, LM, ids_of(100), chunk_size=16, checkpoints=Checkpoints(tmp_path), key="k")
    if error is OSError:
        with pytest.warns(JournalWarning, match="the reading itself goes on"):
            assert read().tokens == 99
    else:
        with pytest.raises(KeyboardInterrupt):
            read()


def test_a_broken_saved_point_is_reported_and_the_text_read_from_its_beginning(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "k.pt").write_bytes(b"half a file")
    with pytest.warns(JournalWarning, match="cannot be read"):
        result = measure_perplexity(LM, ids_of(100), checkpoints=checkpoints, key="k")
    assert result.tokens == 99


def often(monkeypatch):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)


@pytest.mark.parametrize("model", [LM, as_model(Stepper())], ids=["module", "object"])
@pytest.mark.parametrize("function", [open, eval, subprocess.getoutput])
def test_a_saved_point_cannot_run_code(tmp_path, model, function):
    class Evil:
        def __reduce__(self):
            arguments = {open: (str(tmp_path / "ran"), "w"), eval: (f"open({str(tmp_path / 'ran')!r}, 'w')",)}
            return function, arguments.get(function, (f"touch {tmp_path / 'ran'}",))

    torch.save({"meta": "{}", "state": Evil()}, tmp_path / "k.pt")
    with pytest.warns(JournalWarning, match="cannot be read"):
        measure_perplexity(model, ids_of(100), checkpoints=Checkpoints(tmp_path), key="k")
    assert not (tmp_path / "ran").exists()


def test_short_documents_in_windows_are_not_counted_twice_after_a_kill(tmp_path, monkeypatch):
    often(monkeypatch)
    model = as_model(Stateless(vocab=256))
    corpus = texts(*(f"document {n}" + " and more" * (n % 3) for n in range(12)), as_stream=False)
    whole = measure_perplexity(model, corpus)
    saved = {"checkpoints": Checkpoints(tmp_path), "key": "k"}
    dies, extra = read_killed_at(100, **saved)
    with dies:
        measure_perplexity(model, corpus, **extra)
    resumed = measure_perplexity(model, corpus, **saved)
    assert resumed.resumed_at > 0
    assert (resumed.tokens, resumed.nll.to_json()) == (whole.tokens, whole.nll.to_json())
    assert resumed.record.details["documents"] == 12


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_losses_that_never_reached_the_disk_are_read_again(tmp_path, monkeypatch, damage):
    often(monkeypatch)
    ids, path = ids_of(400), tmp_path / "losses.npy"
    saved = {"checkpoints": Checkpoints(tmp_path / "partial"), "key": "k", "losses": path, "chunk_size": 16}
    dies, extra = read_killed_at(200, **saved)
    with dies:
        measure_perplexity(LM, ids, **extra)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    else:
        path.unlink()
    measure_perplexity(LM, ids, **saved)
    np.testing.assert_allclose(np.load(path), losses_of(ids), atol=1e-5)


def test_a_state_that_cannot_be_saved_costs_only_the_saved_point(tmp_path, monkeypatch):
    often(monkeypatch)

    class WithFunction(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state and state[0])
            return logits, (state, lambda: None)

    with pytest.warns(JournalWarning, match="no point to go on from can be saved"):
        result = measure_perplexity(
            as_model(WithFunction()), ids_of(200), chunk_size=16, checkpoints=Checkpoints(tmp_path), key="k"
        )
    assert result.tokens == 199


def test_a_window_is_scored_and_told_chunk_by_chunk():
    told = []
    result = measure_perplexity(LM, ids_of(300), window=200, chunk_size=32, progress=lambda done, *_: told.append(done))
    assert told[:7] == [32, 64, 96, 128, 160, 192, 200]
    assert result.chunks > 9


def test_the_window_of_a_stateless_model_does_not_depend_on_the_chunk_or_the_vocabulary():
    for vocab in (16, 5000):
        for chunk_size in (None, 16):
            result = measure_perplexity(as_model(Stateless(vocab=vocab)), np.arange(16), chunk_size=chunk_size)
            assert result.record.settings["window"] == 1024


def test_no_token_is_put_before_ids():
    class WithBos:
        bos = 3

        def encode(self, text):
            raise AssertionError

    model = as_model(Functional(), tokenizer=WithBos())
    assert measure_perplexity(model, ids_of(50)).tokens == 49


def test_ids_that_are_no_integers_are_refused():
    with pytest.raises(CorpusError, match=r"a row of integer token ids; got shape .* of float64"):
        measure_perplexity(LM, np.array([1.2, 3.9, 4.1]))


def test_a_corpus_may_be_named():
    by_name, itself = (perplexity("demo", text, tokens=40) for text in ("stdlib", corpus("stdlib")))
    assert by_name.nll == itself.nll
    assert by_name.record.subject == "stdlib[test]"
