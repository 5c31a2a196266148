"""What is said of fast weights while a text is read: how far they move, which do not, and the loss at chosen places."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import chunk_of, measure_perplexity
from tiny_models import VOCAB, Functional

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.errors import ModelError, NotFiniteError
from pytest_lmeval.measures._perplexity import PerplexityResult
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import Checkpoints, Saver
from pytest_lmeval.records._measured import Record
from pytest_lmeval.scoring import _fast_weights as fast_weights, _positions as positions
from pytest_lmeval.scoring._loss_accumulator import CHUNKS, EACH, LossAccumulator, Moves
from pytest_lmeval.statistics._bootstrap import ratio_intervals

NAMES = ("a.W", "a.b", "c.W")


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr(fast_weights, "STRETCH", 64)


class Learns(Functional):
    """A GRU beside which fast weights move by a known step at every token, those named; they are given as views, as a
    state's own tensors would be, and written to in place by the next step, which uses the state up."""

    def __init__(self, moving=NAMES, step=0.25, **options):
        super().__init__(**options)
        self.moving, self.step, self.asked = moving, step, 0

    def forward(self, input_ids, state=None):
        if state is None:
            state = (None, {name: torch.full((1, 2), float(name != "a.b")) for name in NAMES})
        logits, hidden = super().forward(input_ids, state[0])
        for name in self.moving:
            state[1][name] += self.step * input_ids.shape[1]
        return logits, (hidden, state[1])

    def fast_weights(self, state):
        self.asked += state is not None
        if state is None:
            return {name: torch.full((1, 2), float(name != "a.b")) for name in NAMES}
        return state[1]


def learns(*moving, **options):
    return as_model(Learns(moving, **options))


def ids_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def texts(*documents):
    return Corpus("texts", "test", lambda: (Document(str(i), text) for i, text in enumerate(documents)), "fp", as_stream=False)


# --------------------------------------------------------------------------- how far they move


def test_the_change_of_each_chunk_is_that_of_the_formula():
    result = measure_perplexity(learns(*NAMES), ids_of(401), chunk_size=100)
    series = result.record.series
    after = [1 + 25 * n for n in range(1, 5)]  # a.W: 1, 26, 51, ...
    np.testing.assert_allclose(series["fast_weight_change/a.W"].y, [25 / x for x in after], rtol=1e-6)
    np.testing.assert_allclose(series["fast_weight_change/a.b"].y, [1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-6)  # from zero
    assert series["fast_weight_change"].x == [100, 200, 300, 400]
    each = np.mean([series[f"fast_weight_change/{name}"].y for name in NAMES], axis=0)
    np.testing.assert_allclose(result.fast_weights.change.y, each, rtol=1e-12)
    metrics = result.record.metrics
    assert float(metrics["fast_weight_change"]) == pytest.approx(each.mean())
    assert float(metrics["fast_weight_distance"]) == pytest.approx(np.mean([100 / 101, 1, 100 / 101]))
    assert (metrics["fast_weights_moving"], metrics["fast_weights_moving"].unit) == (3, "of 3")


def test_a_state_that_is_written_to_in_place_is_still_seen_to_move():
    """The copies: the tensors of the last chunk are those of the next."""
    result = measure_perplexity(learns(*NAMES), ids_of(401), chunk_size=100)
    assert result.fast_weights.moved == NAMES
    assert min(result.fast_weights.change.y) > 0


def test_without_copies_it_would_not_be_seen(monkeypatch):
    monkeypatch.setattr(
        fast_weights, "copies", lambda found: fast_weights.Weights(list(found.values()), torch.ones(len(found)))
    )
    result = measure_perplexity(learns(*NAMES), ids_of(401), chunk_size=100)
    assert result.fast_weights.change.y[1:] == [0, 0, 0]


def test_weights_that_are_named_and_move_need_no_warning():
    result = measure_perplexity(learns(*NAMES), ids_of(300))
    assert "warnings" not in result.record.settings
    assert result.record.details["fast_weights"] == result.fast_weights.count == 3


def test_a_model_that_does_not_learn_as_it_reads_is_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = measure_perplexity(learns(), ids_of(2049), chunk_size=100)
    (said,) = result.record.details["warnings"]
    assert "has 3 fast weights and none of them moved in 2,048 tokens: it does not learn as it reads." in said
    assert "(a.W, a.b, c.W)" in said
    assert (result.fast_weights.moved, result.fast_weights.unmoved) == ((), NAMES)
    assert float(result.record.metrics["fast_weight_change"]) == 0
    assert result.record.metrics["fast_weights_moving"] == 0


def test_those_that_stay_are_named_where_others_move():
    result = measure_perplexity(learns("a.W", "c.W"), ids_of(300), chunk_size=64)
    (said,) = result.record.details["warnings"]
    assert "test_fast_weights:Learns did not move in 299 tokens: a.b." in said
    assert said.startswith("1 of the 3 fast weights of")
    assert (result.fast_weights.moved, result.fast_weights.unmoved) == (("a.W", "c.W"), ("a.b",))


def test_of_very_many_that_stay_only_some_are_named():
    said = fast_weights.warning("m", 300, [f"layers.{n}.W" for n in range(200)], 1000)
    assert "layers.7.W and 192 more." in said
    assert "layers.8.W" not in said


def test_a_model_without_fast_weights_says_nothing_of_them():
    for lm in (as_model(Functional()), as_model(type("Empty", (Learns,), {"fast_weights": lambda self, state: {}})())):
        result = measure_perplexity(lm, ids_of(300))
        assert result.fast_weights is None
        assert not [name for name in (*result.record.metrics, *result.record.series) if "fast" in name]
        assert not [name for name in result.record.settings if "fast" in name or name == "warnings"]


def test_a_learning_that_explodes_is_an_error_with_its_place():
    with pytest.raises(NotFiniteError, match=r"the fast weight a\.W of .* is not finite after token 200"):
        measure_perplexity(learns("a.W", step=1e36), ids_of(401), chunk_size=200)


def test_weights_that_change_their_names_cannot_be_followed():
    lm = as_model(type("Renames", (Learns,), {"fast_weights": lambda self, s: {"W" if s is None else "V": torch.ones(1)}})())
    with pytest.raises(ModelError, match="named the fast weights W before it read, and afterwards V"):
        measure_perplexity(lm, ids_of(300))


def test_half_precision_weights_are_compared_in_full():
    one = fast_weights.copies({"W": torch.full((1000,), 0.1, dtype=torch.bfloat16)})
    other = fast_weights.copies({"W": torch.full((1000,), 0.10009765625 + 0.00048828125, dtype=torch.bfloat16)})
    assert one.norms.dtype == torch.float32
    assert float(fast_weights.relative(one, other)) == pytest.approx(
        float((other.tensors[0] - one.tensors[0])[0]) / 0.1006, rel=1e-2
    )


# --------------------------------------------------------------------------- documents, windows, small chunks


def test_each_document_begins_with_the_initial_weights():
    lm = as_model(Learns(NAMES, vocab=256))
    result = measure_perplexity(lm, texts("x" * 101, "y" * 101), chunk_size=100)
    assert result.record.series["fast_weight_change/a.W"].y == pytest.approx([25 / 26] * 2)


def test_each_window_begins_with_the_initial_weights():
    result = measure_perplexity(learns(*NAMES), ids_of(401), window=100, overlap=0, chunk_size=100)
    assert result.record.series["fast_weight_change/a.W"].y == pytest.approx([25 / 26] * 4)


@pytest.mark.parametrize(("length", "looks"), [(129, 2), (20, 1), (130, 3)])
def test_single_tokens_are_taken_together_and_the_rest_is_not_lost(length, looks):
    lm = learns(*NAMES)
    lm.source.asked = 0
    result = measure_perplexity(lm, ids_of(length), chunk_size=1)
    assert lm.source.asked == looks
    assert result.fast_weights.change.x[-1] == length - 1
    assert result.fast_weights.moved == NAMES
    assert float(result.fast_weights.distance) > 0.8


def test_chunks_of_fewer_than_512_tokens_are_taken_together_so_that_looking_stays_cheap(monkeypatch):
    monkeypatch.undo()
    result = measure_perplexity(learns(*NAMES), ids_of(2101), chunk_size=200)
    assert result.fast_weights.change.x == [600, 1200, 1800, 2100]
    result = measure_perplexity(learns(*NAMES), ids_of(2101), chunk_size=1024)
    assert result.fast_weights.change.x == [1024, 2048, 2100]


def test_short_documents_are_looked_at_too():
    result = measure_perplexity(as_model(Learns(NAMES, vocab=256)), texts(*["short text"] * 20))
    assert result.fast_weights.moved == NAMES
    assert result.record.series["fast_weight_change/a.W"].y == pytest.approx([2.25 / 3.25] * len(result.fast_weights.change.y))


# --------------------------------------------------------------------------- without end, and interrupted


@settings(max_examples=20)
@given(st.integers(1, 3 * CHUNKS), st.sampled_from([1, EACH, EACH + 1]))
def test_a_million_chunks_take_the_memory_of_two_thousand(count, weights):
    moves = Moves(tuple(map(str, range(weights))), np.zeros(weights), np.zeros(weights))
    for number in range(count):
        moves.add(7, np.full(weights, number / count), np.full(weights, 0.5))
    assert len(moves.course) <= CHUNKS
    assert len(moves.course[0]) == (3 + weights if weights <= EACH else 3)
    series = fast_weights.series_of(moves)
    assert len(series) == 1 + (weights if weights <= EACH else 0)
    assert series["fast_weight_change"].x[-1] == 7 * count
    assert float(fast_weights.metrics_of(moves)["fast_weight_change"]) == pytest.approx((count - 1) / (2 * count), abs=1e-9)
    again = LossAccumulator.from_json(json.loads(json.dumps(LossAccumulator(moves=moves).to_json()))).moves
    assert vars(again).keys() == vars(moves).keys()
    assert LossAccumulator(moves=again).to_json() == LossAccumulator(moves=moves).to_json()


class Killed(Exception):
    pass


@pytest.mark.parametrize("chunk_size", [1, 16, 100])
@pytest.mark.parametrize("by_document", [True, False])
def test_a_killed_reading_goes_on_with_the_same_moves_to_the_last_bit(tmp_path, monkeypatch, chunk_size, by_document):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)
    corpus = texts(*(f"document number {n} with some text in it, " * 4 for n in range(6)))
    options = {"chunk_size": chunk_size, "as_stream": not by_document, "positions": (100, 600)}

    def killing(at):
        def kill(done, nats, expected):
            if done >= at:
                raise Killed

        return kill

    def model():
        return as_model(Learns(("a.W", "a.b"), step=0.01, vocab=256))

    whole = measure_perplexity(model(), corpus, **options)
    saved = {"checkpoints": Checkpoints(tmp_path), "key": "k"}
    for tokens in (90, 333, 700):
        with pytest.raises(Killed):
            measure_perplexity(model(), corpus, progress=killing(tokens), **options, **saved)
    resumed = measure_perplexity(model(), corpus, **options, **saved)
    assert resumed.resumed_at > 500
    assert resumed.fast_weights == whole.fast_weights
    for name in ("fast_weight_change", "fast_weight_distance", "fast_weights_moving", "loss_at_100"):
        assert resumed.record.metrics[name].to_json() == whole.record.metrics[name].to_json()
    for name, series in whole.record.series.items():
        assert name == "chunk_seconds" or resumed.record.series[name] == series


def test_the_record_survives_json_and_says_the_same_again():
    result = measure_perplexity(learns("a.W"), ids_of(2500), chunk_size=100, positions=(1000, 2000, 9000))
    again = PerplexityResult(schema.convert(json.loads(json.dumps(schema.to_plain(result.record))), Record))
    assert again.fast_weights == result.fast_weights
    assert again.loss_at == result.loss_at
    assert again.loss_at[1000].low == result.loss_at[1000].low
    assert again.loss_slope.high == result.loss_slope.high


# --------------------------------------------------------------------------- the loss at chosen places


def fold(nll, sizes, wanted, documents=None):
    reading = LossAccumulator(documents is not None, wanted)
    for part in np.split(nll, np.cumsum(documents)[:-1]) if documents else [nll]:
        reading.start_document()
        start = 1
        for size in (*sizes, len(part)):
            if len(rows := part[start - 1 : start - 1 + size]):
                reading.add(chunk_of(start, rows))
                start += len(rows)
    return reading


def test_each_loss_and_the_slope_have_an_interval_that_holds_them():
    result = measure_perplexity(as_model(Functional()), ids_of(5000), positions=(2000, 3000, 4000))
    for metric in (*result.loss_at.values(), result.loss_slope):
        assert metric.low < metric < metric.high
    assert list(result.loss_at) == [2000, 3000, 4000]
    assert result.loss_at[2000] == result.record.metrics["loss_at_2k"]
    assert result.loss_at[2000].n == 1000
    assert result.loss_slope.n == 3
    assert result.record.details["not_reached"] == []


def test_a_position_that_was_not_reached_is_said_to_be_so():
    result = measure_perplexity(as_model(Functional()), ids_of(2001), positions=(9000, 2000, 2040, 2100, 2000))
    assert result.record.settings["positions"] == [2000, 2040, 2100, 9000]
    assert result.record.details["not_reached"] == [2100, 9000]
    assert list(result.loss_at) == [2000, 2040]  # all but the last fifty tokens are near enough


def test_a_slope_of_one_position_is_none_and_says_why():
    result = measure_perplexity(as_model(Functional()), ids_of(1500), positions=(1000, 8000))
    assert "loss_slope" not in result.record.metrics
    with pytest.raises(AttributeError, match=r"Asked for were \[1000, 8000\]; of those, ids\[test\] did not go on to \[8000\]"):
        result.loss_slope  # noqa: B018


@settings(max_examples=30)
@given(st.integers(0, 99), st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_the_figures_are_those_of_a_plain_computation_whatever_the_chunks(seed, sizes):
    nll = np.random.default_rng(seed).exponential(size=3500)
    found = positions.loss_metrics(fold(nll, sizes, (500, 2000, 3000)), seed=seed)
    losses = [nll[max(0, at - 1000) : at].mean() for at in (500, 2000, 3000)]
    for name, expected in zip(("loss_at_500", "loss_at_2k", "loss_at_3k"), losses, strict=True):
        assert float(found[name]) == pytest.approx(expected)
    assert float(found["loss_slope"]) == pytest.approx(np.polyfit([0.5, 2, 3], losses, 1)[0])


def test_the_interval_of_a_loss_is_the_bootstrap_of_its_blocks():
    nll = np.random.default_rng(0).exponential(size=2000)
    found = positions.loss_metrics(fold(nll, [2000], (2000,)), seed=5)["loss_at_2k"]
    blocks = nll[1000:].reshape(20, 50).sum(axis=1)
    (expected,) = ratio_intervals(np.column_stack([np.full(20, 50.0), blocks]), [(1, 0)], seed=5)
    assert (found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize("documents", [None, [1500] * 30])
def test_intervals_cover_what_they_should(documents):
    """Of 120 texts of independent losses of mean one, most intervals hold the mean and the slope of zero."""
    held = {"loss_at_500": 0, "loss_at_1500": 0, "loss_slope": 0}
    for seed in range(120):
        nll = np.random.default_rng(seed).exponential(size=sum(documents or [1500]))
        found = positions.loss_metrics(fold(nll, [1500], (500, 1500), documents), seed=seed)
        for name in held:
            held[name] += found[name].low <= (name != "loss_slope") <= found[name].high
    assert all(count > 0.84 * 120 for count in held.values()), held
    assert any(count < 120 for count in held.values()), held  # an interval that always holds would be too wide


def test_too_few_blocks_or_documents_have_no_interval():
    nll = np.random.default_rng(0).exponential(size=6000)
    few = positions.loss_metrics(fold(nll[:2000], [2000], (300, 2000)), seed=0)
    assert few["loss_at_300"].low is None  # six blocks of fifty
    assert few["loss_at_2k"].low is not None
    assert few["loss_slope"].low is None
    assert positions.loss_metrics(fold(nll, [6000], (1000,), [1200] * 5), seed=0)["loss_at_1k"].low is None


def test_documents_that_end_before_a_position_do_not_count_there():
    nll = np.concatenate([np.ones(1500), np.full(700, 9.0), np.ones(1500)])
    reading = fold(nll, [1500], (500, 1500), [1500, 700, 1500])
    found = positions.loss_metrics(reading, seed=0)
    assert float(found["loss_at_1500"]) == pytest.approx(1.0)
    assert found["loss_at_1500"].n == 2000
    assert float(found["loss_at_500"]) == pytest.approx((1 + 9 + 1) / 3)


def test_documents_that_come_near_no_position_take_no_memory():
    reading = fold(np.ones(40 * 30), [30], (100_000,), [30] * 40)
    assert len(reading.units) == 40
    assert len(reading.at_positions) == 1
    assert positions.not_reached(reading) == [100_000]
    assert positions.loss_metrics(reading, seed=0) == {}


def test_positions_are_named_as_people_say_them():
    names = [positions.name_of(at) for at in (500, 8000, 8192, 24_000, 1_000_000, 1_500_000)]
    assert names == ["loss_at_500", "loss_at_8k", "loss_at_8192", "loss_at_24k", "loss_at_1M", "loss_at_1500k"]
    assert math.isclose(float(positions.slope_weights(np.array([1.0, 2.0])) @ np.array([3.0, 5.0])), 2.0)
