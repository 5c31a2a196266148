"""What a step needs is counted, and its times are set against the machine's roofline; how fast a machine is, no test says."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from tiny_models import Functional, Stateless, Stepper, Streaming
from torch import nn

from pytest_lmeval import _session as session
from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.measures import Lmeval, _efficiency as module
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.measures._efficiency import measure_efficiency
from pytest_lmeval.models._model import weights
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.profiling import _roofline as roofline
from pytest_lmeval.profiling._roofline import Peaks, measured_peaks
from pytest_lmeval.profiling._runner import Runner
from pytest_lmeval.profiling._storages import bytes_read
from pytest_lmeval.profiling._work import Work, training_work, work_of
from pytest_lmeval.records._metric import metric

LM = as_model(Functional())
FAST = {"runs": 3, "warm_up": 0}
positive = st.floats(1e-3, 1e15)


def peaks_of(flops, bandwidth):
    return Peaks(flops, bandwidth, device="cpu", dtype="float32", threads=1, size=256)


@pytest.fixture
def machine(monkeypatch):
    """A machine that does so many operations and moves so many bytes a second."""
    return lambda flops, bandwidth: monkeypatch.setattr(module, "measured_peaks", lambda *_: peaks_of(flops, bandwidth))


# ----------------------------------------------------------------------------------------------- bytes that are read


def read_by(work, *tensors):
    return bytes_read(tensors, work)


def test_a_weight_is_read_once_however_often_it_is_used():
    weight, x = torch.ones(8, 16), torch.ones(3, 16)
    assert read_by(lambda: [x @ weight.T, x @ weight.mT, weight * 2, weight.clone()], weight) == weight.nbytes


def test_to_look_at_a_weight_is_not_to_read_it():
    weight = torch.ones(8, 16)
    assert read_by(lambda: [weight.T, weight[2:], weight.view(-1), weight.expand(3, 8, 16)], weight) == 0


def test_of_a_table_the_rows_are_read_that_are_looked_up():
    table, ids = nn.Embedding(1000, 16), torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        assert read_by(lambda: table(ids), table.weight) == 3 * 16 * 4
        assert read_by(lambda: table(ids) @ table.weight.T, table.weight) == 1000 * 16 * 4  # the head shares it
        assert read_by(lambda: table(torch.zeros(1, 5000, dtype=torch.long)), table.weight) == 1000 * 16 * 4


def test_of_stacked_experts_the_chosen_ones_are_read():
    experts, x = torch.ones(8, 16, 4), torch.ones(3, 16)
    assert read_by(lambda: [x @ experts[2], x @ experts[5], x @ experts[5]], experts) == 2 * 16 * 4 * 4


def test_a_weight_that_is_shown_wider_is_read_as_it_is():
    bias, x = torch.ones(1, 16), torch.ones(3, 16)
    assert read_by(lambda: x + bias.expand(3, 16), bias) == bias.nbytes


def test_what_is_not_watched_is_not_read():
    weight, other = torch.ones(8, 16), torch.ones(8, 16)
    assert read_by(lambda: other * 2, weight) == 0


@pytest.mark.parametrize("spec", ["zoo:transformer", "zoo:lstm", "zoo:mamba", "zoo:mamba2", "zoo:ttt"])
def test_a_dense_model_reads_all_of_its_weights(spec):
    lm = load(spec)
    with torch.no_grad():
        assert bytes_read(weights(lm.module), lambda: lm.step(lm.random_ids(1, 4))) == sum(w.nbytes for w in weights(lm.module))


# ------------------------------------------------------------------------------------------------------------- work

WIDTH, VOCAB = 16, 32
CELL = 3 * WIDTH * 2 * WIDTH  # entries of the matrices of a GRU
READ = 4 * (CELL + 2 * 3 * WIDTH + VOCAB * WIDTH + VOCAB)  # bytes of its weights, its biases, and the head


@pytest.mark.parametrize(("rows", "tokens"), [(1, 5), (3, 4)])
def test_a_gru_needs_what_it_needs_by_hand(rows, tokens):
    work = work_of(LM, LM.random_ids(rows, tokens))
    products = 2 * (CELL + VOCAB * WIDTH)
    table, state = 4 * WIDTH, 4 * WIDTH * rows
    assert work["prefill"] == Work(rows * tokens * products, READ + rows * tokens * table + state, rows * tokens)
    assert work["decode"] == Work(rows * products, READ + rows * table + 2 * state, rows)


def test_a_state_that_grows_is_read_whole_and_written_where_it_grows():
    lm = load("zoo:transformer")
    weight = sum(w.nbytes for w in weights(lm.module))
    a_token = 4 * 2 * 128 * 4  # layers, keys and values, width, bytes
    work = work_of(lm, lm.random_ids(2, 10))
    assert work["prefill"].bytes == weight + 2 * 10 * a_token
    assert work["decode"].bytes == weight + 2 * 10 * a_token + 2 * a_token


def test_of_a_model_that_reads_frames_the_tokens_are_frames():
    lm = load("zoo:moshi")
    assert {phase: work.tokens for phase, work in work_of(lm, lm.random_ids(2, 3)).items()} == {"prefill": 6, "decode": 2}
    assert "a frame" in metric("prefill_flops_per_token").about


@given(st.integers(0, 10**15), st.integers(1, 10**12), positive, positive)
def test_the_roofline_is_one_law_in_two_forms(flops, moved, peak, bandwidth):
    work, peaks = Work(flops, moved, 1), peaks_of(peak, bandwidth)
    assert work.least_seconds(peaks) >= flops / peak
    assert work.least_seconds(peaks) >= moved / bandwidth
    assert flops == pytest.approx(peaks.bound(work.intensity) * work.least_seconds(peaks), rel=1e-9)


# ------------------------------------------------------------------------------------------------------- efficiency


def test_shares_are_of_the_measured_peaks(machine):
    machine(flops=1e9, bandwidth=1e6)
    result = measure_efficiency(LM, batch_size=2, seq_len=8, **FAST)
    seconds = {
        phase: float(result.latency.record.metrics[name]) / 1e3 for phase, name in [("prefill", "prefill"), ("decode", "itl")]
    }
    for phase, work in work_of(LM, LM.random_ids(2, 8)).items():
        assert (result.flops(phase), result.bytes(phase)) == (work.flops, work.bytes)
        assert result.flops_per_token(phase) == work.flops / work.tokens
        assert result.intensity(phase) == work.flops / work.bytes
        least = max(work.flops / 1e9, work.bytes / 1e6)
        assert result.roofline_fraction(phase) == pytest.approx(least / seconds[phase])
    assert result.peak_fraction == pytest.approx(float(result.flops("prefill")) / seconds["prefill"] / 1e9)
    assert result.bandwidth_fraction == pytest.approx(float(result.bytes("decode")) / seconds["decode"] / 1e6)
    assert set(result.record.details["formulas"]) >= {"prefill_bound", "prefill_intensity", "decode_roofline_fraction"}


@pytest.mark.parametrize(
    ("flops", "bandwidth", "position", "limit"),
    [
        (1e15, 1e18, "compute-bound", "overhead"),
        (1e18, 1e15, "bandwidth-bound", "overhead"),
        (1.0, 1e15, "compute-bound", "compute"),
        (1e15, 1.0, "bandwidth-bound", "caches"),
    ],
)
def test_the_machine_decides_by_what_a_phase_is_bound(machine, flops, bandwidth, position, limit):
    machine(flops, bandwidth)
    result = measure_efficiency(LM, seq_len=8, **FAST)
    for phase in ("prefill", "decode"):
        assert (result.position(phase), result.limited_by(phase)) == (position, limit)


def test_times_and_peaks_are_of_the_same_number_of_threads(monkeypatch):
    keys = []
    monkeypatch.setattr(roofline, "_measured", lambda *key: keys.append(key) or peaks_of(1e9, 1e9))
    before = torch.get_num_threads()
    result = measure_efficiency(LM, seq_len=8, threads=before + 1, **FAST)
    assert keys == [("cpu", torch.float32, before + 1)]
    assert result.record.settings["threads"] == result.latency.record.settings["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"new_tokens": -1}, "new_tokens is -1"),
        ({"runs": 0}, "runs is 0"),
        ({"warm_up": -1}, "warm_up is -1"),
        ({"seq_len": 9}, "at most 8 tokens"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is_counted(monkeypatch, shape, message):
    monkeypatch.setattr(module, "training_work", None)
    with pytest.raises(ProfilingError, match=message):
        measure_efficiency(replace(LM, context_length=8), **{"seq_len": 4, "new_tokens": 2, **shape})


NOT_TIMED = Runner(not_measured="other tests run at the same time")


def test_where_nothing_is_timed_what_is_counted_is_kept(monkeypatch):
    monkeypatch.setattr(module, "measured_peaks", None)  # and nothing is measured of the machine
    result = measure_efficiency(LM, seq_len=8, runner=NOT_TIMED)
    assert result.not_measured == "other tests run at the same time"
    assert result.flops("decode") == work_of(LM, LM.random_ids(1, 8))["decode"].flops
    assert {metric.unit for metric in result.record.metrics.values()} == {"FLOP", "bytes", "FLOP/byte"}
    for look in (lambda: result.roofline_fraction("decode"), lambda: result.position("prefill"), lambda: result.peak_fraction):
        with pytest.raises(Exception, match="other tests run at the same time") as caught:
            look()
        assert type(caught.value).__name__ == "NotMeasuredError"  # for which the plugin skips


def test_the_verbs_under_xdist(tmp_path):
    lmeval = Lmeval(VerbContext(session.Session(tmp_path, parallel=True), log := session.TestLog("test")))
    assert "xdist" in lmeval.efficiency(LM, seq_len=8).not_measured
    assert lmeval.memory(LM, seq_len=8, apart=False).state_bytes == WIDTH * 4
    assert [(record.kind, record.test) for record in log.records] == [("efficiency", "test"), ("memory", "test")]


def test_a_model_without_a_state_has_no_decode(machine):
    machine(1e9, 1e9)
    result = measure_efficiency(as_model(Stateless()), seq_len=8, **FAST)
    assert result.record.details["position"].keys() == {"prefill"}
    with pytest.raises(KeyError, match="decode"):
        result.flops("decode")


# --------------------------------------------------------------------------------------------------------- backward


def test_backward_is_counted_and_leaves_no_gradient():
    lm = as_model(Functional())
    result = measure_efficiency(lm, batch_size=2, seq_len=5, runner=NOT_TIMED)
    products = 2 * 2 * 5 * (CELL + VOCAB * WIDTH)
    assert result.flops("forward") == products
    first = 2 * 2 * 3 * WIDTH * WIDTH  # the state before the first token is no variable
    assert result.flops("backward") == 2 * products - first  # what goes back into the table is added up, not multiplied
    assert all(parameter.grad is None for parameter in lm.module.parameters())


@pytest.mark.parametrize("frozen", [1, 2])
def test_backward_that_leaves_weights_out_is_not_given(frozen):
    lm = as_model(Functional())
    multiplied = [lm.module.head.weight, lm.module.cell.weight_hh_l0]
    for weight in multiplied[:frozen]:
        weight.requires_grad_(False)
    first = ["head.weight", "cell.weight_hh_l0"][frozen - 1]
    assert training_work(lm, lm.random_ids(1, 5)) == (
        None,
        f"{frozen} of the 3 weights that are multiplied ask for no gradient, the first of them {first}",
    )


def test_a_table_that_is_frozen_leaves_no_product_out():
    plain, lm = as_model(Functional()), as_model(Functional())
    lm.module.embed.weight.requires_grad_(False)
    prompt = lm.random_ids(1, 5)
    work, reason = training_work(lm, prompt)
    assert reason is None
    assert work.forward == training_work(plain, prompt)[0].forward


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_have_no_backward_and_it_is_said_why(bits):
    pytest.importorskip("torchao")
    lm = load(f"demo@int{bits}")
    assert training_work(lm, lm.random_ids(1, 5)) == (
        None,
        "20 of the 20 weights that are multiplied ask for no gradient, the first of them layers.0.qkv.weight",
    )


class LossAccumulator(Functional):
    @torch.no_grad()
    def forward(self, input_ids, state=None):
        return super().forward(input_ids, state)


class Writing(Functional):
    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        if torch.is_grad_enabled():
            raise ArithmeticError("made for reading\nand more")
        return logits, state


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Stepper(), "no torch module"),
        (Functional().requires_grad_(False), "no parameter asks for a gradient"),
        (LossAccumulator(), "RuntimeError: element 0 of tensors does not require grad"),
        (Writing(), "ArithmeticError: made for reading"),
    ],
    ids=["object", "frozen", "without gradients", "failing"],
)
def test_without_backward_the_rest_is_counted_and_it_is_said_why(model, reason):
    result = measure_efficiency(as_model(model), seq_len=5, runner=NOT_TIMED)
    assert result.record.details["no_backward"].startswith(reason)
    assert "backward_flops" not in result.record.metrics
    assert result.flops("prefill") == work_of(LM, LM.random_ids(1, 5))["prefill"].flops


def test_a_model_that_keeps_its_state_inside_is_stepped_in_turn():
    result = measure_efficiency(as_model(Streaming()), seq_len=5, runner=NOT_TIMED)
    assert result.flops("decode") == work_of(LM, LM.random_ids(1, 5))["decode"].flops


# --------------------------------------------------------------------------------------------------------- roofline


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(roofline, "SECONDS", 0.0)
    monkeypatch.setattr(roofline, "SIZES", {"cpu": (8, 16)})
    monkeypatch.setattr(roofline, "BYTES", {"cpu": 1 << 12})
    roofline._measured.cache_clear()
    yield
    roofline._measured.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_peaks_of_a_precision_are_measured_once(small, monkeypatch, dtype):
    found = measured_peaks(torch.device("cpu"), dtype)
    assert found.flops > 0 < found.bandwidth
    assert (found.size in (8, 16), found.threads) == (True, torch.get_num_threads())
    monkeypatch.setattr(roofline, "_matmul_peak", None)
    assert measured_peaks(torch.device("cpu"), dtype) is found
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)  # another number of threads is another machine
    with pytest.raises(TypeError, match="not callable"):
        measured_peaks(torch.device("cpu"), dtype)


def test_the_fastest_of_the_repetitions_counts(monkeypatch):
    ticks = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(roofline, "seconds", lambda device: next(ticks))
    assert roofline._fastest(lambda: None, torch.device("cpu"), budget=5.0) == 1.0
