"""Fast weights while a text is read: how much they change, which do not, and the loss at chosen positions."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import LM, accumulated, assert_equal_but_for_time, ids_of, measure_perplexity, measure_until_killed, texts
from tiny_models import Functional

from pytest_lmeval.data import Corpus, Document
from pytest_lmeval.errors import ModelError, NoIntervalError
from pytest_lmeval.measures._perplexity import PerplexityResult
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import Checkpoints
from pytest_lmeval.records._measured import Record
from pytest_lmeval.scoring import _fast_weights as fast_weights
from pytest_lmeval.scoring._loss_accumulator import CHUNKS, MOST_CURVES, FastWeightSums, LossAccumulator
from pytest_lmeval.scoring._loss_metrics import loss_metrics, not_reached
from pytest_lmeval.statistics._estimate import ratio_intervals

NAMES = ("a.W", "a.b", "c.W")
CHUNK = fast_weights.TOKENS_BETWEEN
thorough = pytest.mark.thorough


class Learns(Functional):
    """A GRU beside which fast weights grow by a known step at every token, those named; they are given as views, as a state's
    own tensors would be, and the next step writes to them in place."""

    def __init__(self, changing=NAMES, step=0.25, **options):
        super().__init__(**options)
        self.changing, self.step, self.asked = changing, step, 0

    def forward(self, input_ids, state=None):
        hidden, weights = (None, self.fast_weights(None)) if state is None else state
        logits, hidden = super().forward(input_ids, hidden)
        for name in self.changing:
            weights[name] += self.step * input_ids.shape[1]
        return logits, (hidden, weights)

    def fast_weights(self, state):
        self.asked += state is not None
        return {name: torch.full((1, 2), float(name != "a.b")) for name in NAMES} if state is None else state[1]


def learns(*changing, **options):
    return as_model(Learns(changing, **options))


def overriding(fast_weights):
    return as_model(type("Overriding", (Functional,), {"fast_weights": fast_weights})())


def test_the_change_of_each_chunk_follows_the_formula_though_the_state_is_written_to_in_place():
    result = measure_perplexity(learns(*NAMES), ids_of(4 * CHUNK + 1), chunk_size=CHUNK)
    series = result.record.series
    after = [1 + CHUNK / 4 * n for n in range(1, 5)]
    np.testing.assert_allclose(series["fast_weight_change/a.W"].y, [CHUNK / 4 / x for x in after], rtol=1e-6)
    np.testing.assert_allclose(series["fast_weight_change/a.b"].y, [1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-6)  # from zero
    assert series["fast_weight_change"].x == [CHUNK * n for n in range(1, 5)]
    each = np.mean([series[f"fast_weight_change/{name}"].y for name in NAMES], axis=0)
    np.testing.assert_allclose(result.fast_weights.change.y, each, rtol=1e-12)
    metrics = result.record.metrics
    assert float(metrics["fast_weight_change"]) == pytest.approx(each.mean())
    assert float(metrics["fast_weight_distance"]) == pytest.approx(np.mean([1 - 1 / after[-1], 1, 1 - 1 / after[-1]]))
    assert (metrics["fast_weights_changed"], metrics["fast_weights_changed"].unit) == (3, "of 3")
    assert (result.fast_weights.changed, result.fast_weights.count) == (NAMES, 3)
    assert "warnings" not in result.record.details


def test_unchanged_fast_weights_are_named_but_only_some_of_many():
    result = measure_perplexity(learns(), ids_of(2049))
    (warning,) = result.record.details["warnings"]
    assert "has 3 fast weights and none of them moved in 2,048 tokens: it does not learn as it reads." in warning
    assert "(a.W, a.b, c.W)" in warning
    assert (result.fast_weights.changed, result.fast_weights.unchanged) == ((), NAMES)
    assert result.record.metrics["fast_weight_change"] == result.record.metrics["fast_weights_changed"] == 0
    result = measure_perplexity(learns("a.W", "c.W"), ids_of(300), chunk_size=64)
    (warning,) = result.record.details["warnings"]
    assert "test_fast_weights:Learns did not move in 299 tokens: a.b." in warning
    assert warning.startswith("1 of the 3 fast weights of")
    assert (result.fast_weights.changed, result.fast_weights.unchanged) == (("a.W", "c.W"), ("a.b",))
    warning = fast_weights.warning("m", 300, [f"layers.{n}.W" for n in range(200)], 1000)
    assert "layers.7.W and 192 more." in warning
    assert "layers.8.W" not in warning


@pytest.mark.parametrize("lm", [LM, overriding(lambda self, state: {})])
def test_the_record_of_a_model_without_fast_weights_does_not_mention_them(lm):
    record = measure_perplexity(lm, ids_of(300)).record
    assert fast_weights.found_in(record) is None
    assert not [name for name in (*record.metrics, *record.series, *record.settings, *record.details) if "fast" in name]


@pytest.mark.parametrize(
    ("lm", "message"),
    [
        (learns("a.W", step=1e36), r"the fast weight a\.W of .* is not finite after token 512"),
        (overriding(lambda self, s: {str(s is None): torch.ones(1)}), "named the fast weights True .*, and afterwards False"),
        (overriding(lambda self, s: [torch.ones(1)]), "returned list; expected a dict"),
    ],
)
def test_fast_weights_that_cannot_be_compared_are_refused(lm, message):
    with pytest.raises(ModelError, match=message):
        measure_perplexity(lm, ids_of(2 * CHUNK), chunk_size=CHUNK)


def test_half_precision_weights_are_compared_in_float32():
    tensors = [torch.full((1000,), value, dtype=torch.bfloat16) for value in (0.1, 0.1006)]
    one, other = (fast_weights.copies({"W": tensor}) for tensor in tensors)
    assert one.norms.dtype == torch.float32
    expected = 1 - float(tensors[0][0]) / float(tensors[1][0])
    assert float(fast_weights.relative(one, other)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("corpus", "how", "measured", "grown"),
    [
        (texts(*["x" * 101] * 4, as_stream=False), {"chunk_size": 100}, [400], 25),  # too few tokens to measure before the end
        (texts("x" * 401), {"chunk_size": 100, "window": 100, "overlap": 0}, [400], 25),
        (texts(*["short text"] * 60, as_stream=False), {}, [513, 540], 2.25),
    ],
    ids=["documents", "windows", "short documents"],
)
def test_each_document_and_each_window_begins_with_the_initial_weights(corpus, how, measured, grown):
    result = measure_perplexity(learns(*NAMES, vocab=256), corpus, **how)
    assert result.fast_weights.change.x == measured
    assert float(result.fast_weights.distance) == pytest.approx(np.mean([grown / (grown + 1), 1, grown / (grown + 1)]))
    assert result.record.series["fast_weight_change/a.W"].y == pytest.approx([grown / (grown + 1)] * len(measured))


@pytest.mark.parametrize(
    ("length", "chunk_size", "measured"),
    [(2101, 200, [600, 1200, 1800, 2100]), (2101, 1024, [1024, 2048, 2100]), (20, 1, [19]), (1026, 1, [512, 1024, 1025])],
)
def test_chunks_of_fewer_than_512_tokens_are_measured_together_and_the_rest_is_not_lost(length, chunk_size, measured):
    lm = learns(*NAMES)
    lm.source.asked = 0
    result = measure_perplexity(lm, ids_of(length), chunk_size=chunk_size)
    assert result.fast_weights.change.x == measured
    assert lm.source.asked == len(measured)
    assert result.fast_weights.changed == NAMES
    assert float(result.fast_weights.distance) > 0.8


@pytest.mark.parametrize("weights", [1, MOST_CURVES, MOST_CURVES + 1])
@settings(max_examples=4)
@given(st.integers(1, 3 * CHUNKS))
def test_any_number_of_measurements_takes_the_memory_of_two_thousand(weights, count):
    sums = FastWeightSums(tuple(map(str, range(weights))), np.zeros(weights), np.zeros(weights))
    for number in range(count):
        sums.add(7, np.full(weights, number / count), np.full(weights, 0.5))
    curves = weights if weights <= MOST_CURVES else 0
    assert len(sums.history) <= CHUNKS
    assert len(sums.history[0]) == 3 + curves
    series = fast_weights.series_of(sums)
    assert len(series) == 1 + curves
    assert series["fast_weight_change"].x[-1] == 7 * count
    assert float(fast_weights.metrics_of(sums)["fast_weight_change"]) == pytest.approx((count - 1) / (2 * count), abs=1e-9)
    whole = LossAccumulator(fast_weights=sums)
    again = LossAccumulator.from_json(json.loads(json.dumps(whole.to_json())))
    assert again.to_json() == whole.to_json()
    assert vars(again.fast_weights).keys() == vars(sums).keys()


@pytest.mark.parametrize(
    ("chunk_size", "as_stream"),
    [
        (16, True),
        (100, False),
        *(pytest.param(*how, marks=thorough) for how in [(1, True), (1, False), (16, False), (100, True)]),
    ],
)
def test_a_killed_run_is_resumed_with_the_same_changes_to_the_last_bit(tmp_path, chunk_size, as_stream):
    corpus = texts(*(f"document number {n} with some text in it, " * 8 for n in range(6)), as_stream=as_stream)
    lm, options = learns("a.W", "a.b", step=0.01, vocab=256), {"chunk_size": chunk_size, "positions": (100, 600)}
    whole = measure_perplexity(lm, corpus, **options)
    options |= {"checkpoints": Checkpoints(tmp_path), "key": "k"}
    for tokens in (90, 700, 1400):
        measure_until_killed(tokens, lm, corpus, **options)
    resumed = measure_perplexity(lm, corpus, **options)
    assert resumed.resumed_at > 500
    assert resumed.fast_weights == whole.fast_weights
    assert len(whole.fast_weights.change.x) == 4
    assert_equal_but_for_time(resumed, whole)


def test_the_record_survives_json():
    result = measure_perplexity(learns("a.W"), ids_of(2500), chunk_size=100, positions=(1000, 2000, 9000))
    again = PerplexityResult(schema.convert(json.loads(json.dumps(schema.to_plain(result.record))), Record))
    assert (again.fast_weights, again.loss_at) == (result.fast_weights, result.loss_at)
    assert again.loss_at[1000].interval == result.loss_at[1000].interval


def test_each_loss_and_the_slope_have_an_interval_that_holds_them():
    documents = [Document(str(number), ids=ids_of(400, number)) for number in range(12)]
    corpus = Corpus("ids", "test", lambda: iter(documents), "", tokenized=True, as_stream=False)
    result = measure_perplexity(LM, corpus, positions=(100, 200, 300))
    assert all(metric.low < metric < metric.high for metric in (*result.loss_at.values(), result.loss_slope))
    assert (list(result.loss_at), result.record.details["not_reached"]) == ([100, 200, 300], [])
    assert result.loss_at[200] == result.record.metrics["loss_at_200"]
    assert (result.loss_at[200].n, result.loss_slope.n) == (2400, 3)


def test_positions_that_were_not_reached_are_named_and_a_slope_needs_two():
    result = measure_perplexity(LM, ids_of(2001), positions=(9000, 2000, 2040, 2100, 2000))
    assert result.record.settings["positions"] == [2000, 2040, 2100, 9000]
    assert result.record.details["not_reached"] == [2100, 9000]
    assert list(result.loss_at) == [2000, 2040]  # all but the last fifty tokens are near enough
    result = measure_perplexity(LM, ids_of(1500), positions=(1000, 8000))
    assert "loss_slope" not in result.record.metrics
    with pytest.raises(AttributeError, match=r"Asked for were \[1000, 8000\], and ids\[test\] did not reach \[8000\]"):
        result.loss_slope  # noqa: B018


@settings(max_examples=15)
@given(st.integers(0, 99), st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_the_losses_are_those_of_a_plain_computation_whatever_the_chunks(seed, sizes):
    nll = np.random.default_rng(seed).exponential(size=3500)
    found = loss_metrics(accumulated(nll, sizes, (500, 2000, 3000)))
    losses = [nll[max(0, at - 1000) : at].mean() for at in (500, 2000, 3000)]
    for name, expected in zip(("loss_at_500", "loss_at_2k", "loss_at_3k"), losses, strict=True):
        assert float(found[name]) == pytest.approx(expected)
    assert float(found["loss_slope"]) == pytest.approx(np.polyfit([0.5, 2, 3], losses, 1)[0])


def test_the_interval_of_a_loss_is_that_of_its_documents_if_they_are_enough_and_one_text_has_none():
    nll = np.random.default_rng(0).exponential(size=6000)
    found = loss_metrics(accumulated(nll, [], (300, 500), [600] * 10))
    documents = nll.reshape(10, 600)[:, :500].sum(axis=1)
    (expected,) = ratio_intervals(np.column_stack([np.full(10, 500.0), documents]), [(1, 0)])
    assert (found["loss_at_500"].low, found["loss_at_500"].high) == pytest.approx(expected)
    assert found["loss_slope"].interval is not None
    for lengths in ([1200] * 5, None):
        found = loss_metrics(accumulated(nll, [], (500, 1000), lengths))
        assert {metric.interval for metric in found.values()} == {None}
        with pytest.raises(NoIntervalError, match="Read more .documents" if lengths else "A thousand targets of one text"):
            _ = found["loss_at_500"].high


def test_intervals_cover_what_they_should():
    """Of 120 times 30 documents with independent losses of mean one, most intervals hold the mean and the slope of zero."""
    held = {"loss_at_500": 0, "loss_at_1500": 0, "loss_slope": 0}
    for seed in range(120):
        nll = np.random.default_rng(seed).exponential(size=1500 * 30)
        found = loss_metrics(accumulated(nll, [], (500, 1500), [1500] * 30))
        for name in held:
            held[name] += found[name].low <= (name != "loss_slope") <= found[name].high
    assert all(count > 0.88 * 120 for count in held.values()), held
    assert any(count < 120 for count in held.values()), held  # an interval that always holds would be too wide


def test_documents_that_end_before_a_position_do_not_count_there_and_take_no_memory():
    nll = np.concatenate([np.ones(1500), np.full(700, 9.0), np.ones(1500)])
    found = loss_metrics(accumulated(nll, [], (500, 1500), [1500, 700, 1500]))
    assert float(found["loss_at_1500"]) == pytest.approx(1.0)
    assert found["loss_at_1500"].n == 2000
    assert float(found["loss_at_500"]) == pytest.approx((1 + 9 + 1) / 3)
    sums = accumulated(np.ones(40 * 30), [], (100_000,), [30] * 40)
    assert (len(sums.units), len(sums.at_positions)) == (40, 1)
    assert not_reached(sums) == [100_000]
    assert loss_metrics(sums) == {}
