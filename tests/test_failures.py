"""Errors of torch are classified by what they say about the machine."""

import gc
import weakref

import pytest
import torch

from pytest_lmeval.errors import ModelError, OutOfMemory
from pytest_lmeval.models._failures import NoMemory, halving, unless_full
from pytest_lmeval.profiling._failures import DEVICE_LOST, OUT_OF_MEMORY, bytes_wanted, failure_of, room_for

TOO_MUCH = 1 << 48  # bytes: more than a process can address
CUDA_OOM = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1.2 GiB is free."
MPS_OOM = "MPS backend out of memory (MPS allocated: 17 GiB). Tried to allocate 512.00 MiB"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
ACCELERATOR = getattr(torch, "AcceleratorError", RuntimeError)


@pytest.mark.parametrize(
    ("error", "failure", "wanted"),
    [
        (torch.OutOfMemoryError(CUDA_OOM), OUT_OF_MEMORY, 5 << 29),
        (RuntimeError(MPS_OOM), OUT_OF_MEMORY, 1 << 29),
        (RuntimeError(CUBLAS), OUT_OF_MEMORY, None),
        (ACCELERATOR("CUDA error: out of memory"), OUT_OF_MEMORY, None),
        (MemoryError(), OUT_OF_MEMORY, None),
        (OutOfMemory("demo does not fit", 8), OUT_OF_MEMORY, 8),
        (ACCELERATOR("CUDA error: device-side assert triggered"), DEVICE_LOST, None),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), DEVICE_LOST, None),
        (RuntimeError("No CUDA GPUs are available"), DEVICE_LOST, None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None, None),
        (ValueError("the station is out of memory"), None, None),
        (ModelError("it returned no state"), None, None),
    ],
    ids=str,
)
def test_an_error_is_classified_by_its_message(error, failure, wanted):
    assert (failure_of(error), bytes_wanted(error)) == (failure, wanted)


@pytest.mark.parametrize(("shape", "wanted"), [((TOO_MUCH,), TOO_MUCH), ((1 << 40, 1 << 40), None)], ids=["large", "overflow"])
def test_memory_that_the_cpu_lacks_is_out_of_memory(shape, wanted):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(shape, dtype=torch.uint8)
    assert (failure_of(caught.value), bytes_wanted(caught.value)) == (OUT_OF_MEMORY, wanted)


def test_an_error_is_classified_by_its_cause_but_not_by_its_context():
    outer = ModelError("the step failed")
    outer.__cause__ = MemoryError()
    assert failure_of(outer) == OUT_OF_MEMORY
    outer.__cause__, outer.__context__ = None, MemoryError()
    assert failure_of(outer) is None


def test_a_shape_that_does_not_fit_is_named_with_its_size():
    said = r"demo with batch 64.* does not fit.*281,474,976,710,656 bytes.*batch_size"
    with pytest.raises(OutOfMemory, match=said) as caught:
        room_for("demo with batch 64", lambda: torch.empty(TOO_MUCH, dtype=torch.uint8))
    assert caught.value.wanted == TOO_MUCH


def test_other_errors_are_not_changed():
    with pytest.raises(ZeroDivisionError):
        room_for("demo", lambda: 1 / 0)
    assert room_for("demo", lambda: 7) == 7


@pytest.mark.parametrize("through_room_for", [True, False])
def test_the_error_of_room_for_does_not_hold_tensors_of_the_frames_it_passed(through_room_for):
    """An error that does not pass through `room_for` does."""
    tensors = []

    def work():
        tensor = torch.zeros(1)
        tensors.append(weakref.ref(tensor))
        torch.empty(TOO_MUCH, dtype=torch.uint8)

    with pytest.raises((OutOfMemory, RuntimeError)) as caught:
        room_for("demo", work) if through_room_for else work()
    gc.collect()
    assert caught.value
    assert (tensors[0]() is None) == through_room_for


def test_work_that_did_not_fit_leaves_nothing_in_memory_and_is_done_again_with_half():
    tensors, tried = [], []

    def work(rows):
        assert [tensor() for tensor in tensors] == [None] * len(tried)
        tensor = torch.zeros(1)
        tensors.append(weakref.ref(tensor))
        tried.append(rows)
        torch.empty(TOO_MUCH if rows > 4 else 1, dtype=torch.uint8)
        return "read"

    assert halving(work, 20) == ("read", 2)
    assert tried == [20, 10, 5, 2]


def test_halving_ends_with_one_and_other_errors_end_it_at_once():
    tried = []

    def work(rows):
        tried.append(rows)
        raise OutOfMemory("demo does not fit", 8)

    assert halving(work, 5) == (NoMemory(8), 1)
    assert tried == [5, 2, 1]
    with pytest.raises(ZeroDivisionError):
        unless_full(lambda: 1 / 0)
