"""Memory is told apart and counted to the byte, in a process of its own, and no failed test keeps a model."""

import gc
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
from pytest_lmeval.measures import _memory as measurement
from pytest_lmeval.measures._memory import measure_memory
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.profiling import _child as child
from pytest_lmeval.profiling._allocations import watched_allocations
from pytest_lmeval.profiling._storages import storages

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """What was made before these tests is not searched for garbage at each measurement: that would take most of their time."""
    with watched_allocations():  # the first one imports a lot
        pass
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def found_by_a_child(monkeypatch):
    """A child finds this module by its name, `tests.test_memory`, whatever ran before in this process."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


class Known(nn.Module):
    """A step holds `steps` floats a token at once, beside the state that it was given, the new one, and the logits."""

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
def test_the_peak_is_that_of_the_tensors_that_live_at_once(plan):
    """Each step makes a tensor of so many floats, and lets all go before it or none."""
    expected = held = 0
    for floats, lets_go in plan:
        held = 4 * floats + (0 if lets_go else held)
        expected = max(expected, held)

    def work():
        kept = []
        for floats, lets_go in plan:
            if lets_go:
                kept.clear()
            kept.append(torch.empty(floats))

    with watched_allocations() as seen:
        work()
    assert seen.peak == expected


def test_what_was_there_before_is_no_part_of_the_peak():
    with watched_allocations():
        earlier = torch.empty(MIB)  # its end is seen, its beginning not
    kept = [torch.empty(MIB), earlier]
    del earlier
    with watched_allocations() as seen:
        kept.clear()
        torch.empty(100)
    assert seen.peak == 400


def test_what_an_operator_takes_to_work_in_is_seen():
    image, kernel = torch.ones(1, 1, 100, 100, dtype=torch.float64), torch.ones(1, 1, 3, 3, dtype=torch.float64)
    with watched_allocations() as seen:
        result = nn.functional.conv2d(image, kernel)
    assert seen.peak > result.nbytes + 8 * result.nbytes  # the image is unfolded: nine values for each place


def test_garbage_is_collected_before_and_not_meanwhile():
    class Ring:
        pass

    def ring():
        one = Ring()
        one.itself, one.tensor = one, torch.empty(1000)

    with watched_allocations() as seen:
        for _ in range(2000):
            ring()
    assert seen.peak == 2000 * 4000


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("rows", "tokens"), [(1, 16), (2, 16), (1, 64)])
def test_a_known_pattern_is_told_apart_to_the_byte(rows, tokens):
    result = measure_memory(as_model(Known()), batch_size=rows, seq_len=tokens, apart=False)
    assert result.weights_bytes == 4 << 16
    assert result.state_bytes == 4 * rows << 16
    assert result.tensors_peak_bytes == 4 * rows * (tokens << 18) + result.state_bytes
    assert result.activations_bytes == result.tensors_peak_bytes - result.state_bytes


def test_this_test_can_fail():
    one = measure_memory(as_model(Known()), seq_len=16, apart=False).tensors_peak_bytes
    more = measure_memory(as_model(Known(steps=(1 << 18) + 1)), seq_len=16, apart=False).tensors_peak_bytes
    assert more == one + 4 * 16


def test_all_logits_take_more_than_the_last():
    class Sparing(Functional):
        def step(self, input_ids, state=None, *, keep=None):
            hidden, state = self.cell(self.embed(input_ids), state)
            return self.head(hidden[:, -keep:] if keep else hidden), state

    lm = as_model(Sparing(vocab=5000))
    last, all_of_them = (measure_memory(lm, seq_len=64, keep=keep, apart=False) for keep in (1, None))
    assert all_of_them.activations_bytes - last.activations_bytes == pytest.approx(63 * 5000 * 4, rel=0.02)
    assert all_of_them.state_bytes == last.state_bytes == 16 * 4


def test_a_state_that_lies_in_the_weights_is_not_taken_from_the_activations():
    class Ring(Functional):
        def __init__(self):
            super().__init__()
            self.ring = nn.Buffer(torch.zeros(1 << 16))

        def forward(self, input_ids, state=None):
            return torch.ones(*input_ids.shape, 4), self.ring

    result = measure_memory(as_model(Ring()), seq_len=8, apart=False)
    assert result.state_bytes == 4 << 16
    assert result.activations_bytes == result.tensors_peak_bytes > 0


def test_a_weight_that_is_shared_counts_once():
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


def test_a_shape_that_does_not_fit_is_named():
    class Growing(Functional):
        def forward(self, input_ids, state=None):
            torch.empty(len(input_ids), input_ids.shape[1] ** 8)
            return super().forward(input_ids, state)

    with pytest.raises(OutOfMemory, match=r"batch 2, 64 tokens on cpu does not fit .*2,251,799,813,685,248 bytes.*fewer rows"):
        measure_memory(as_model(Growing()), batch_size=2, seq_len=64, apart=False)
    with pytest.raises(OutOfMemory, match=r"batch 1099511627776, 512 tokens on cpu does not fit"):  # not even the prompt
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
def test_a_shape_that_cannot_be_run_is_refused_before_anything_is(monkeypatch, toy, shape, message):
    monkeypatch.setattr(measurement, "_measured", None)
    with pytest.raises(ProfilingError, match=message):
        measure_memory(replace(as_model(toy()), context_length=8), **{"seq_len": 4, "new_tokens": 2, **shape})


@pytest.mark.parametrize(("toy", "seq_len"), [(Functional, 6), (Stateless, 8)])
def test_a_context_that_is_just_long_enough_is_measured(toy, seq_len):
    lm = replace(as_model(toy()), context_length=8)
    result = measure_memory(
        lm, seq_len=seq_len, new_tokens=3, apart=False
    )  # without a state nothing is decoded after the prompt
    assert result.activations_bytes > 0


# ----------------------------------------------------------------------------------------------- a process of its own


def exactly(result):
    return {name: float(result.record.metrics[f"{name}_bytes"]) for name in ("weights", "state", "activations", "tensors_peak")}


def test_what_this_process_holds_does_not_count_there():
    held = torch.ones(300 * MIB, dtype=torch.uint8)
    lm = as_model(Known())
    apart, here = measure_memory(lm, seq_len=32), measure_memory(lm, seq_len=32, apart=False)
    assert apart.record.details["process"] == "a child, moved there by pickle"
    assert exactly(apart) == exactly(here)
    if "peak_bytes" in here.record.metrics:
        assert here.peak_bytes - apart.peak_bytes > 0.9 * held.nbytes
        assert apart.growth_bytes == pytest.approx(float(apart.tensors_peak_bytes), rel=0.02)


def test_a_model_that_cannot_be_moved_is_measured_here(monkeypatch):
    class Local(Known):
        pass

    monkeypatch.setattr(child.subprocess, "run", None)  # no process is started in vain
    result = measure_memory(as_model(Local()), seq_len=4)
    assert "this one: what it did before counts in the peak. It cannot be pickled" in result.record.details["process"]
    assert result.weights_bytes == 4 << 16


def asked(lm, how):
    """What a child is asked to do in these tests."""
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


def test_a_child_has_what_this_process_has_but_its_past(monkeypatch):
    monkeypatch.setenv("ONLY_HERE", "yes")
    found, how = child.in_child(load("zoo:lstm"), asked, {"how": "look"})
    process, *there = found
    assert process != os.getpid()
    assert there == [torch.get_num_threads(), sys.path, False, "zoo:lstm", "yes"]
    assert how == "a child, loaded by its spec zoo:lstm"


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", child.ChildFailed, r"(?s)ended with exit status 1 .*some words of the model.*RuntimeError: in the depths"),
        ("killed", OutOfMemory, r"(?s)was killed \(signal 9\).*when memory runs out.*fewer rows"),
    ],
    ids=["raise", "killed"],
)
def test_a_child_that_fails_is_told_in_place(how, error, message):
    with pytest.raises(error, match=message) as caught:
        child.in_child(load("demo"), asked, {"how": how})
    assert isinstance(caught.value, ModelError)  # shown as its message alone
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("spec", "names"),
    [("zoo:lstm", True), ("zoo:lstm@bf16", True), ("hf:folder/model", True), ("zoo:lstm trained", False), ("MADE_UP", False)],
)
def test_a_spec_names_weights_if_it_was_loaded_by_it(spec, names):
    lm = load("zoo:lstm")
    made_up = f"{type(lm.module).__module__}:{type(lm.module).__qualname__}"
    assert child._names_weights(replace(lm, spec=spec.replace("MADE_UP", made_up), source=None)) is names


def test_a_child_has_its_time():
    with pytest.raises(child.ChildFailed, match=r"was not done after 0.1 s and was ended.*timeout="):
        child.in_child(load("demo"), asked, {"how": "slow"}, timeout=0.1)


def in_here(monkeypatch):
    """Requests are answered in this process, by the same code: a process takes seconds to start."""

    def run(command, **_):
        child.answer(command[-1])
        return child.subprocess.CompletedProcess(command, 0, b"")

    monkeypatch.setattr(child, "_be_killed_first", lambda: None)
    monkeypatch.setattr(child.subprocess, "run", run)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


def test_what_does_not_fit_there_is_told_here(monkeypatch):
    in_here(monkeypatch)
    with pytest.raises(OutOfMemory, match=r"^demo does not fit$") as caught:
        child.in_child(load("demo"), asked, {"how": "full"})
    assert caught.value.wanted == 8


def test_what_a_model_does_wrong_there_is_told_here(monkeypatch):
    in_here(monkeypatch)
    with pytest.raises(ModelError, match=r"^it returned no state$"):
        child.in_child(load("demo"), asked, {"how": "wrong"})


def test_a_child_that_is_killed_as_it_loads_says_nothing_of_the_step(monkeypatch):
    monkeypatch.setattr(child.subprocess, "run", lambda command, **_: child.subprocess.CompletedProcess(command, -9, b""))
    result = measure_memory(load("zoo:lstm"), seq_len=4)
    assert "this one: what it did before counts in the peak. A child" in result.record.details["process"]


def test_a_model_that_was_changed_after_it_was_loaded_is_moved_as_it_is(monkeypatch):
    in_here(monkeypatch)
    lm = load("demo")
    with torch.no_grad():
        lm.module.embed.weight[0, 0] += 1
    _, how = child.in_child(lm, asked, {"how": "look"})
    assert "its spec names other weights than it has" in how
    assert how.endswith("It was moved there by pickle")


def test_a_context_that_was_declared_after_it_was_loaded_is_declared_there_too(monkeypatch):
    in_here(monkeypatch)
    for lm in (load("zoo:lstm"), replace(as_model(load("zoo:lstm").module), spec="no spec")):
        assert child.in_child(replace(lm, context_length=64), asked, {"how": "context"})[0] == 64
    assert child.in_child(replace(load("zoo:lstm"), context_length=64), asked, {"how": "look"})[1].endswith("spec zoo:lstm")


def test_a_precision_that_an_option_gave_is_had_again(monkeypatch):
    in_here(monkeypatch)
    _, how = child.in_child(load("demo", bits=16), asked, {"how": "look"})
    assert how == "a child, loaded by its spec demo@bf16"


def test_a_class_of_a_conftest_is_not_fetched_from_there(monkeypatch):
    in_here(monkeypatch)
    monkeypatch.setattr(Known, "__module__", "conftest")
    monkeypatch.setitem(sys.modules, "conftest", sys.modules[__name__])
    lm = as_model(Known())
    save = child._save
    monkeypatch.setattr(child, "_save", lambda *given: (save(*given), sys.modules.pop("conftest")))
    with pytest.raises(
        child.CannotMoveError, match=r"It cannot be loaded again \(ImportError: its class comes from a conftest.py"
    ):
        child.in_child(lm, asked, {"how": "look"})


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
        ("lmeval", ["--pdb", "--pdbcls=quiet:Quiet"], [False, False]),  # they are looked into
        ("request", [], [False, False]),  # not ours
    ],
    ids=["ours", "debugged", "not ours"],
)
def test_a_failed_test_does_not_keep_its_model(pytester, monkeypatch, fixture, options, gone):
    pytester.makepyfile(
        quiet="import pdb\nclass Quiet(pdb.Pdb):\n    def interaction(self, *_):\n        pass\n",
        test_it=FAILS.format(fixture=fixture, gone=gone),
    )
    # a fixture of that name, without the seconds that it takes to import torch
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef lmeval():\n    pass\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*RuntimeError: as was feared*"])
    if "--showlocals" in options:
        result.stdout.fnmatch_lines(["inside *= <test_it.Tiny object*"])


def test_a_fixture_that_waits_behind_its_yield_is_torn_down_all_the_same():
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
