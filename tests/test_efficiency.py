"""The operations and bytes of a step are counted, and its times compared with the machine's roofline, on a given machine."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from tiny_models import Functional, Stateless, Stepper, Streaming
from torch import nn

from pytest_lmeval import _session as session
from pytest_lmeval.errors import NotMeasuredError, ProfilingError
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.measures._efficiency import measure_efficiency
from pytest_lmeval.models._model import weights
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.profiling._roofline import Load, Peaks, fastest, measured_peaks
from pytest_lmeval.profiling._runner import Runner
from pytest_lmeval.profiling._work import Work, bytes_read, training_work, work_of
from pytest_lmeval.records._metric import metric

CPU = torch.device("cpu")
LM = as_model(Functional())
SHORT = {"seq_len": 8, "runs": 3, "warm_up": 0}
positive = st.floats(1e-3, 1e15)


def peaks_of(flops, bandwidth):
    return Peaks(flops, bandwidth, device="cpu", dtype="float32", threads=1, size=256)


def machine(flops, bandwidth):
    """A runner on a machine that does so many operations and moves so many bytes a second."""
    return Runner(peaks=lambda device, dtype: peaks_of(flops, bandwidth))


# ----------------------------------------------------------------------------------------------- bytes that are read


def test_a_weight_is_read_once_however_often_it_is_used():
    weight, x = torch.ones(8, 16), torch.ones(3, 16)
    assert bytes_read([weight], lambda: [x @ weight.T, x @ weight.mT, weight * 2, weight.clone()]) == weight.nbytes


def test_a_view_reads_nothing_and_neither_does_work_on_another_tensor():
    weight, other = torch.ones(8, 16), torch.ones(8, 16)
    assert bytes_read([weight], lambda: [weight.T, weight[2:], weight.view(-1), weight.expand(3, 8, 16), other * 2]) == 0


def test_a_lookup_reads_the_rows_that_it_returns_and_at_most_the_table():
    table, ids = nn.Embedding(1000, 16), torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        assert bytes_read([table.weight], lambda: table(ids)) == 3 * 16 * 4
        assert bytes_read([table.weight], lambda: table(ids) @ table.weight.T) == 1000 * 16 * 4  # the head shares it
        assert bytes_read([table.weight], lambda: table(torch.zeros(1, 5000, dtype=torch.long))) == 1000 * 16 * 4


def test_of_stacked_experts_the_chosen_ones_are_read():
    experts, x = torch.ones(8, 16, 4), torch.ones(3, 16)
    assert bytes_read([experts], lambda: [x @ experts[2], x @ experts[5], x @ experts[5]]) == 2 * 16 * 4 * 4


def test_an_expanded_weight_is_read_once():
    bias, x = torch.ones(1, 16), torch.ones(3, 16)
    assert bytes_read([bias], lambda: x + bias.expand(3, 16)) == bias.nbytes


@pytest.mark.parametrize(
    "spec",
    [
        "zoo:lstm",
        "zoo:ttt",
        *(pytest.param(f"zoo:{name}", marks=pytest.mark.thorough) for name in ("transformer", "mamba", "mamba2")),
    ],
)
def test_a_dense_model_reads_all_of_its_weights(spec):
    lm = load(spec)
    with torch.no_grad():
        assert bytes_read(weights(lm.module), lambda: lm.step(lm.random_ids(1, 4))) == sum(w.nbytes for w in weights(lm.module))


# ------------------------------------------------------------------------------------------------------------- work

WIDTH, VOCAB = 16, 32
CELL = 3 * WIDTH * 2 * WIDTH  # entries of the matrices of a GRU
READ = 4 * (CELL + 2 * 3 * WIDTH + VOCAB * WIDTH + VOCAB)  # bytes of its weights, its biases, and the head


@pytest.mark.parametrize(("rows", "tokens"), [(1, 5), (3, 4)])
def test_the_work_of_a_gru_equals_a_count_by_hand(rows, tokens):
    work = work_of(LM, LM.random_ids(rows, tokens))
    products = 2 * (CELL + VOCAB * WIDTH)
    table, state = 4 * WIDTH, 4 * WIDTH * rows
    assert work["prefill"] == Work(rows * tokens * products, READ + rows * tokens * table + state, rows * tokens)
    assert work["decode"] == Work(rows * products, READ + rows * table + 2 * state, rows)


def test_a_growing_state_is_read_whole_and_written_where_it_grows():
    lm = load("zoo:transformer")
    weight = sum(w.nbytes for w in weights(lm.module))
    token = 4 * 2 * 128 * 4  # layers, keys and values, width, bytes
    work = work_of(lm, lm.random_ids(2, 10))
    assert work["prefill"].bytes == weight + 2 * 10 * token
    assert work["decode"].bytes == weight + 2 * 10 * token + 2 * token


def test_the_tokens_of_a_model_that_reads_frames_are_frames():
    lm = load("zoo:moshi")
    assert {phase: work.tokens for phase, work in work_of(lm, lm.random_ids(2, 3)).items()} == {"prefill": 6, "decode": 2}
    assert "a frame" in metric("prefill_flops_per_token").about


@given(st.integers(0, 10**15), st.integers(1, 10**12), positive, positive)
def test_the_bound_and_the_least_time_are_the_same_roofline(flops, moved, peak, bandwidth):
    work, peaks = Work(flops, moved, 1), peaks_of(peak, bandwidth)
    assert work.least_seconds(peaks) >= flops / peak
    assert work.least_seconds(peaks) >= moved / bandwidth
    assert flops == pytest.approx(peaks.bound(work.intensity) * work.least_seconds(peaks), rel=1e-9)


# ------------------------------------------------------------------------------------------------------- efficiency


def test_fractions_are_of_the_measured_peaks():
    result = measure_efficiency(LM, batch_size=2, **SHORT, runner=machine(flops=1e9, bandwidth=1e6))
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
def test_the_machine_decides_what_limits_a_phase(flops, bandwidth, position, limit):
    result = measure_efficiency(LM, **SHORT, runner=machine(flops, bandwidth))
    for phase in ("prefill", "decode"):
        assert (result.bound_by(phase), result.limited_by(phase)) == (position, limit)


def test_times_and_peaks_are_taken_with_the_same_number_of_threads():
    measured = []
    runner = Runner(peaks=lambda *of: measured.append((*of, torch.get_num_threads())) or peaks_of(1e9, 1e9))
    before = torch.get_num_threads()
    result = measure_efficiency(LM, threads=before + 1, **SHORT, runner=runner)
    assert measured == [(CPU, torch.float32, before + 1)]
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
def test_what_cannot_be_timed_is_refused_before_a_step_is_taken(shape, message):
    steps = []
    lm = replace(LM, context_length=8, step_fn=lambda *given: steps.append(given))
    with pytest.raises(ProfilingError, match=message):
        measure_efficiency(lm, **{"seq_len": 4, "new_tokens": 2, **shape})
    assert steps == []


NOT_TIMED = Runner(not_measured="other tests run at the same time", peaks=None)  # nor is the machine measured


def test_where_nothing_is_timed_the_counts_are_kept():
    result = measure_efficiency(LM, seq_len=8, runner=NOT_TIMED)
    assert result.not_measured == "other tests run at the same time"
    assert result.flops("decode") == work_of(LM, LM.random_ids(1, 8))["decode"].flops
    assert {metric.unit for metric in result.record.metrics.values()} == {"FLOP", "bytes", "FLOP/byte"}
    for look in (lambda: result.roofline_fraction("decode"), lambda: result.bound_by("prefill"), lambda: result.peak_fraction):
        with pytest.raises(NotMeasuredError, match="other tests run at the same time"):
            look()


def test_under_xdist_efficiency_is_not_timed_and_memory_is_measured(tmp_path):
    lmeval = Lmeval(VerbContext(session.Session(tmp_path, parallel=True), log := session.TestLog("test")))
    assert "xdist" in lmeval.efficiency(LM, seq_len=8).not_measured
    assert lmeval.memory(LM, seq_len=8, apart=False).state_bytes == WIDTH * 4
    assert [(record.kind, record.test) for record in log.records] == [("efficiency", "test"), ("memory", "test")]


def test_a_model_without_a_state_has_no_decode():
    result = measure_efficiency(as_model(Stateless()), **SHORT, runner=machine(1e9, 1e9))
    assert result.record.details["bound_by"].keys() == {"prefill"}
    with pytest.raises(KeyError, match="decode"):
        result.flops("decode")


# --------------------------------------------------------------------------------------------------------- backward


def test_backward_is_counted_and_leaves_no_gradient():
    lm = as_model(Functional())
    result = measure_efficiency(lm, batch_size=2, seq_len=5, runner=NOT_TIMED)
    products = 2 * 2 * 5 * (CELL + VOCAB * WIDTH)
    assert result.flops("forward") == products
    first = 2 * 2 * 3 * WIDTH * WIDTH  # the state before the first token has no gradient
    assert result.flops("backward") == 2 * products - first  # the gradient of the table is a sum, not a product
    assert all(parameter.grad is None for parameter in lm.module.parameters())


@pytest.mark.parametrize("frozen", [1, 2])
def test_backward_is_not_counted_if_a_multiplied_weight_is_frozen(frozen):
    lm = as_model(Functional())
    for weight in [lm.module.head.weight, lm.module.cell.weight_hh_l0][:frozen]:
        weight.requires_grad_(False)
    first = ["head.weight", "cell.weight_hh_l0"][frozen - 1]
    assert training_work(lm, lm.random_ids(1, 5)) == (
        None,
        f"{frozen} of the 3 weights that are multiplied require no gradient, first {first}",
    )


def test_a_frozen_table_leaves_no_product_out():
    plain, lm = as_model(Functional()), as_model(Functional())
    lm.module.embed.weight.requires_grad_(False)
    prompt = lm.random_ids(1, 5)
    work, reason = training_work(lm, prompt)
    assert reason is None
    assert work.forward == training_work(plain, prompt)[0].forward


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.thorough)])
def test_backward_of_quantized_weights_is_not_counted(bits):
    pytest.importorskip("torchao")
    lm = load(f"demo@int{bits}")
    assert training_work(lm, lm.random_ids(1, 5)) == (
        None,
        "20 of the 20 weights that are multiplied require no gradient, first layers.0.qkv.weight",
    )


class Inference(Functional):
    @torch.no_grad()
    def forward(self, input_ids, state=None):
        return super().forward(input_ids, state)


class FailsInTraining(Functional):
    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        if torch.is_grad_enabled():
            raise ArithmeticError("made for reading\nand more")
        return logits, state


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Stepper(), "no torch module"),
        (Functional().requires_grad_(False), "no parameter requires a gradient"),
        (Inference(), "RuntimeError: element 0 of tensors does not require grad"),
        (FailsInTraining(), "ArithmeticError: made for reading"),
    ],
    ids=["object", "frozen", "without gradients", "failing"],
)
def test_without_backward_the_rest_is_counted_and_the_record_says_why(model, reason):
    result = measure_efficiency(as_model(model), seq_len=5, runner=NOT_TIMED)
    assert result.record.details["no_backward"].startswith(reason)
    assert "backward_flops" not in result.record.metrics
    assert result.flops("prefill") == work_of(LM, LM.random_ids(1, 5))["prefill"].flops


def test_a_model_that_keeps_its_state_inside_is_counted():
    result = measure_efficiency(as_model(Streaming()), seq_len=5, runner=NOT_TIMED)
    assert result.flops("decode") == work_of(LM, LM.random_ids(1, 5))["decode"].flops


# --------------------------------------------------------------------------------------------------------- roofline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_peaks_of_a_precision_are_measured_once_for_a_number_of_threads(dtype):
    load, threads = Load(sizes=(8, 16), nbytes=1 << 12, seconds=0.0), torch.get_num_threads()
    found = measured_peaks(CPU, dtype, load)
    assert found.flops > 0 < found.bandwidth
    assert (found.size in (8, 16), found.threads) == (True, threads)
    assert measured_peaks(CPU, dtype, load) is found
    torch.set_num_threads(threads + 1)
    try:
        assert measured_peaks(CPU, dtype, load).threads == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_the_fastest_of_the_repetitions_counts():
    times = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    assert fastest(lambda: None, CPU, budget=5.0, clock=lambda device: next(times)) == 1.0
