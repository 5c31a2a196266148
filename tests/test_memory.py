"""Memory is attributed and counted to the byte, in a process of its own, and a failed test does not keep its model."""

import contextlib
import io
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import Functional, GetSetState, Stateless, Stepper
from torch import nn

from pytest_lmeval._frames import release_frames
from pytest_lmeval.errors import ModelError, OutOfMemory, ProfilingError
from pytest_lmeval.measures._memory import measure_memory
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.profiling import _child as child
from pytest_lmeval.profiling._allocations import watched_allocations
from pytest_lmeval.profiling._work import storages

MIB = 1 << 20


@pytest.fixture(autouse=True)
def found_by_a_child(monkeypatch):
    """A child finds this module by its name, `tests.test_memory`, whatever ran before in this process."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


class Known(nn.Module):
    """A step holds `steps` floats a token at once, besides the old state, the new one, and the logits."""

    def __init__(self, steps=1 << 18, kept=1 << 16):
        super().__init__()
        self.steps, self.kept = steps, kept
        self.weight = nn.Parameter(torch.zeros(1 << 16))

    def forward(self, input_ids, state=None):
        rows, tokens = input_ids.shape
        state = torch.ones(rows, self.kept)
        torch.ones(rows, tokens, self.steps)
        return torch.ones(rows, tokens, 2), state


# ------------------------------------------------------------------------------------------------- allocations


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=12))
def test_the_peak_is_the_sum_of_the_tensors_that_live_at_once(plan):
    """Each step makes a tensor of so many floats, and frees all earlier ones first, or none."""
    expected, kept = 0, []
    with watched_allocations() as seen:
        for floats, frees in plan:
            if frees:
                kept.clear()
            kept.append(torch.empty(floats))
            expected = max(expected, sum(tensor.nbytes for tensor in kept))
    assert seen.peak == expected


def test_earlier_allocations_do_not_count():
    with watched_allocations():
        earlier = torch.empty(MIB)  # the second block sees its end, not its beginning
    kept = [torch.empty(MIB), earlier]
    del earlier
    with watched_allocations() as seen:
        kept.clear()
        torch.empty(100)
    assert seen.peak == 400


def test_the_workspace_of_an_operator_counts():
    image, kernel = torch.ones(1, 1, 100, 100, dtype=torch.float64), torch.ones(1, 1, 3, 3, dtype=torch.float64)
    with watched_allocations() as seen:
        result = nn.functional.conv2d(image, kernel)
    assert seen.peak > result.nbytes + 8 * result.nbytes  # the image is unfolded: nine values for each position


def test_garbage_is_not_collected_in_the_block():
    with watched_allocations() as seen:
        for _ in range(2000):
            ring = [torch.empty(1000)]
            ring.append(ring)
    assert seen.peak == 2000 * 4000


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("rows", "tokens", "steps"), [(1, 16, 1 << 18), (2, 16, 1 << 18), (1, 64, 1 << 18), (1, 16, 65537)])
def test_a_known_pattern_is_attributed_to_the_byte(rows, tokens, steps):
    result = measure_memory(as_model(Known(steps=steps)), batch_size=rows, seq_len=tokens, apart=False)
    assert result.weights_bytes == 4 << 16
    assert result.state_bytes == 4 * rows << 16
    assert result.tensors_peak_bytes == 4 * rows * tokens * steps + result.state_bytes
    assert result.activations_bytes == result.tensors_peak_bytes - result.state_bytes


def test_all_logits_take_more_than_the_last():
    class Sparing(Functional):
        def step(self, input_ids, state=None, *, keep=None):
            hidden, state = self.cell(self.embed(input_ids), state)
            return self.head(hidden[:, -keep:] if keep else hidden), state

    lm = as_model(Sparing(vocab=5000))
    last, all_of_them = (measure_memory(lm, seq_len=64, keep=keep, apart=False) for keep in (1, None))
    assert all_of_them.activations_bytes - last.activations_bytes == pytest.approx(63 * 5000 * 4, rel=0.02)
    assert all_of_them.state_bytes == last.state_bytes == 16 * 4


def test_a_state_in_a_buffer_is_not_subtracted_from_the_activations():
    class Ring(Functional):
        def __init__(self):
            super().__init__()
            self.ring = nn.Buffer(torch.zeros(1 << 16))

        def forward(self, input_ids, state=None):
            return torch.ones(*input_ids.shape, 4), self.ring

    result = measure_memory(as_model(Ring()), seq_len=8, apart=False)
    assert result.state_bytes == 4 << 16
    assert result.activations_bytes == result.tensors_peak_bytes > 0


def test_a_shared_weight_counts_once():
    tied = nn.Linear(8, 32, bias=False)
    shared = nn.ModuleList([tied, tied, nn.Linear(8, 32, bias=False)])
    shared[2].weight = nn.Parameter(tied.weight[:16])  # a view
    assert sum(storages(shared.parameters()).values()) == 4 * 8 * 32


@pytest.mark.parametrize("toy", [GetSetState, Stepper])
def test_any_form_of_model_is_measured(toy):
    result = measure_memory(as_model(toy()), seq_len=8, new_tokens=3, apart=False)
    assert result.state_bytes == 16 * 4
    assert ("weights_bytes" in result.record.metrics) == (toy is GetSetState)
    assert list(result.record.details["absent"]) == ([] if toy is GetSetState else ["weights_bytes"])


def test_a_shape_that_does_not_fit_is_named_with_its_size():
    class Growing(Functional):
        def forward(self, input_ids, state=None):
            torch.empty(len(input_ids), input_ids.shape[1] ** 8)
            return super().forward(input_ids, state)

    with pytest.raises(OutOfMemory, match=r"batch 2, 64 tokens on cpu does not fit .*2,251,799,813,685,248 bytes.*fewer rows"):
        measure_memory(as_model(Growing()), batch_size=2, seq_len=64, apart=False)
    with pytest.raises(OutOfMemory, match=r"batch 1099511627776, 512 tokens on cpu does not fit"):  # nor does the prompt
        measure_memory(as_model(Growing()), batch_size=1 << 40, seq_len=512, apart=False)


@pytest.mark.parametrize(
    ("toy", "shape", "message"),
    [
        (Functional, {"new_tokens": 0}, "new_tokens is 0"),
        (Stateless, {"new_tokens": -3}, "new_tokens is -3"),
        (Functional, {"batch_size": 0}, "batch_size is 0"),
        (Functional, {"seq_len": -1}, "seq_len is -1"),
        (Functional, {"keep": 0}, "keep is 0"),
        (Functional, {"seq_len": 9, "new_tokens": 1}, "at most 8 tokens"),
        (Functional, {"seq_len": 8, "new_tokens": 2}, "at most 8 tokens"),
        (Stateless, {"seq_len": 9}, "at most 8 tokens"),
    ],
)
def test_a_shape_that_cannot_be_run_is_refused_before_a_step_is_taken(toy, shape, message):
    lm = replace(as_model(toy()), context_length=8, step_fn=None)
    with pytest.raises(ProfilingError, match=message):
        measure_memory(lm, **{"seq_len": 4, "new_tokens": 2, **shape}, apart=False)


@pytest.mark.parametrize(("toy", "seq_len"), [(Functional, 6), (Stateless, 8)])
def test_a_context_that_is_just_long_enough_suffices(toy, seq_len):
    lm = replace(as_model(toy()), context_length=8)
    assert measure_memory(lm, seq_len=seq_len, new_tokens=3, apart=False).activations_bytes > 0  # without a state, no decoding


# ----------------------------------------------------------------------------------------------- a process of its own


def exactly(result):
    return {name: float(result.record.metrics[f"{name}_bytes"]) for name in ("weights", "state", "activations", "tensors_peak")}


def test_the_memory_of_this_process_does_not_count_in_a_child():
    held = torch.ones(300 * MIB, dtype=torch.uint8)
    lm = as_model(Known())
    apart, here = measure_memory(lm, seq_len=32), measure_memory(lm, seq_len=32, apart=False)
    assert apart.record.details["process"] == "a child, moved there by pickle"
    assert exactly(apart) == exactly(here)
    if "peak_bytes" in here.record.metrics:
        assert here.peak_bytes - apart.peak_bytes > 0.9 * held.nbytes
        assert apart.growth_bytes == pytest.approx(float(apart.tensors_peak_bytes), rel=0.02)


def test_a_model_that_cannot_be_moved_is_measured_in_this_process():
    class Local(Known):
        pass

    result = measure_memory(as_model(Local()), seq_len=4)
    assert "this one: the peak includes what it did before. It cannot be pickled" in result.record.details["process"]
    assert result.weights_bytes == 4 << 16


def asked(lm, how):
    """What these tests ask a child to do."""
    if how == "look":
        return [os.getpid(), torch.get_num_threads(), sys.path, "conftest" in sys.modules, lm.spec, os.environ.get("ONLY_HERE")]
    if how == "context":
        return lm.context_length
    if how == "full":
        raise OutOfMemory("demo does not fit", 8)
    if how == "wrong":
        raise ModelError("it returned no state")
    print("some words of the model")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(600)
    raise RuntimeError("in the depths")


def here(folder, timeout):
    """Answer a request in this process, by the same code, since a process takes seconds to start."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        try:
            child.answer(folder)
        except SystemExit as end:
            return end.code, output.getvalue().encode()
    return 0, b""


def killed(folder, timeout, loaded=True):
    if loaded:
        Path(folder, "loaded").touch()
    return -signal.SIGKILL, b""


def test_a_child_has_the_settings_of_this_process_but_not_its_modules(monkeypatch):
    monkeypatch.setenv("ONLY_HERE", "yes")
    found, how = child.in_child(load("zoo:lstm"), asked, {"how": "look"})
    process, *there = found
    assert process != os.getpid()
    assert there == [torch.get_num_threads(), sys.path, False, "zoo:lstm", "yes"]
    assert how == "a child, loaded by its spec zoo:lstm"


FAILURES = {
    "raise": (child.ChildFailed, r"(?s)ended with exit status 1 .*some words of the model.*RuntimeError: in the depths"),
    "killed": (OutOfMemory, r"(?s)was killed \(signal 9\).*when memory runs out.*fewer rows"),
    "full": (OutOfMemory, r"^demo does not fit$"),
    "wrong": (ModelError, r"^it returned no state$"),
}
in_a_process = [pytest.param(how, child.start_process, marks=pytest.mark.thorough) for how in ("raise", "killed")]


@pytest.mark.parametrize(
    ("how", "start"), [("raise", here), ("killed", killed), ("full", here), ("wrong", here), *in_a_process]
)
def test_the_failure_of_a_child_is_raised_here(how, start):
    error, message = FAILURES[how]
    with pytest.raises(error, match=message) as caught:
        child.in_child(load("demo"), asked, {"how": how}, start=start)
    assert isinstance(caught.value, ModelError)  # shown without a traceback
    assert caught.value.__cause__ is None
    assert how != "full" or caught.value.wanted == 8


@pytest.mark.parametrize(
    ("spec", "names"),
    [("zoo:lstm", True), ("zoo:lstm@bf16", True), ("hf:folder/model", True), ("zoo:lstm trained", False), ("MADE_UP", False)],
)
def test_a_spec_names_weights_if_they_were_loaded_by_it(spec, names):
    lm = load("zoo:lstm")
    made_up = f"{type(lm.module).__module__}:{type(lm.module).__qualname__}"
    assert child._names_weights(replace(lm, spec=spec.replace("MADE_UP", made_up), source=None)) is names


def test_a_child_that_takes_too_long_is_ended():
    with pytest.raises(child.ChildFailed, match=r"took longer than 0.1 s and was ended.*timeout="):
        child.in_child(load("demo"), asked, {"how": "slow"}, timeout=0.1)


def test_a_child_that_cannot_load_the_model_is_no_failure_of_the_model():
    def no_process(folder, timeout):
        raise OSError("no more processes")

    with pytest.raises(child.CannotMoveError, match=r"No process can be started here \(no more processes\)"):
        child.in_child(load("zoo:lstm"), asked, {"how": "look"}, start=no_process)
    with pytest.raises(child.CannotMoveError, match="A child process was killed while it loaded the model"):
        child.in_child(load("zoo:lstm"), asked, {"how": "look"}, start=lambda *given: killed(*given, loaded=False))


def test_a_child_has_the_weights_the_context_and_the_precision_of_the_model():
    lm = replace(load("zoo:lstm"), context_length=64)
    changed = replace(load("zoo:lstm"), context_length=64)
    with torch.no_grad():
        changed.module.embed.weight[0, 0] += 1
    pickled = "its spec names other weights than it has). It was moved there by pickle"
    for model, how in ((lm, "its spec zoo:lstm"), (replace(lm, spec="no spec"), "by pickle"), (changed, pickled)):
        context, moved = child.in_child(model, asked, {"how": "context"}, start=here)
        assert (context, moved.endswith(how)) == (64, True)
    assert child.in_child(load("demo", bits=16), asked, {"how": "look"}, start=here)[1].endswith("its spec demo@bf16")


def test_a_child_does_not_import_a_conftest(monkeypatch):
    monkeypatch.setattr(Known, "__module__", "conftest")
    monkeypatch.setitem(sys.modules, "conftest", sys.modules[__name__])
    monkeypatch.setattr(sys, "meta_path", [child.WithoutConftest(), *sys.meta_path])

    def elsewhere(folder, timeout):
        del sys.modules["conftest"]
        return here(folder, timeout)

    refused = r"It cannot be loaded again \(ImportError: its class comes from a conftest.py"
    with pytest.raises(child.CannotMoveError, match=refused):
        child.in_child(as_model(Known()), asked, {"how": "look"}, start=elsewhere)


# ------------------------------------------------------------------------------------------------ failed tests

FAILS = """
    import gc, pytest, weakref

    class Tiny:
        def step(self, input_ids, state=None):
            raise ValueError("it reads nothing")

    seen = []

    @pytest.fixture
    def lm():
        seen.append(weakref.ref(model := Tiny()))
        return model

    def reads(lm):
        try:
            lm.step(None)
        except ValueError as error:
            raise RuntimeError("as was feared") from error

    def test_fails(lm, {fixture}):
        inside = Tiny()
        seen.append(weakref.ref(inside))
        reads(inside)

    @pytest.fixture
    def loads_the_next():
        gc.collect()
        return [model() is None for model in seen]

    def test_next(loads_the_next):
        assert loads_the_next == {gone}
"""


@pytest.mark.parametrize(
    ("fixture", "options", "gone"),
    [
        ("lmeval", ["--showlocals"], [True, True]),
        ("lmeval", ["--pdb", "--pdbcls=quiet:Quiet"], [False, False]),  # the debugger reads the frames
        ("request", [], [False, False]),  # not a test of this plugin
    ],
    ids=["ours", "debugged", "not ours"],
)
def test_a_failed_test_does_not_keep_its_model(pytester, monkeypatch, fixture, options, gone):
    pytester.makepyfile(
        quiet="import pdb\nclass Quiet(pdb.Pdb):\n    def interaction(self, *_):\n        pass\n",
        test_it=FAILS.format(fixture=fixture, gone=gone),
    )
    # a fixture of that name, without the models
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef lmeval():\n    pass\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*RuntimeError: as was feared*"])
    if "--showlocals" in options:
        result.stdout.fnmatch_lines(["inside *= <test_it.Tiny object*"])


def test_a_fixture_that_waits_at_its_yield_is_torn_down():
    torn_down = []

    def fixture():
        try:
            raise ValueError("at first")
        except ValueError as error:
            yield error
        torn_down.append(True)

    waiting = fixture()
    error = next(waiting)
    release_frames(error)
    assert next(waiting, "done") == "done"
    assert torn_down == [True]
