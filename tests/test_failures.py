"""An error of torch is read for what it says of the machine."""

import gc
import weakref

import pytest
import torch

from pytest_lmeval.errors import ModelError, OutOfMemory
from pytest_lmeval.profiling._failures import DEVICE_LOST, OUT_OF_MEMORY, bytes_wanted, failure_of, room_for

TOO_MUCH = 1 << 48  # bytes: more than a process can address
CUDA_OOM = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1.2 GiB is free."
ACCELERATOR = getattr(torch, "AcceleratorError", RuntimeError)
READ_AS = {
    "cuda": (torch.OutOfMemoryError(CUDA_OOM), OUT_OF_MEMORY, 5 << 29),
    "mps": (
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GiB). Tried to allocate 512.00 MiB"),
        OUT_OF_MEMORY,
        1 << 29,
    ),
    "cublas": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OUT_OF_MEMORY, None),
    "kernel launch": (ACCELERATOR("CUDA error: out of memory"), OUT_OF_MEMORY, None),
    "python": (MemoryError(), OUT_OF_MEMORY, None),
    "own": (OutOfMemory("demo does not fit", 8), OUT_OF_MEMORY, 8),
    "assert": (ACCELERATOR("CUDA error: device-side assert triggered"), DEVICE_LOST, None),
    "unplugged": (RuntimeError("CUDA error: the launch timed out and was terminated"), DEVICE_LOST, None),
    "no device": (RuntimeError("No CUDA GPUs are available"), DEVICE_LOST, None),
    "shape": (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None, None),
    "somebody else's": (ValueError("the station is out of memory"), None, None),
    "a model's": (ModelError("it returned no state"), None, None),
}


@pytest.mark.parametrize("name", READ_AS)
def test_an_error_is_read_for_what_it_says(name):
    error, failure, wanted = READ_AS[name]
    assert (failure_of(error), bytes_wanted(error)) == (failure, wanted)


@pytest.mark.parametrize("shape", [(TOO_MUCH,), (1 << 40, 1 << 40)], ids=["more than there is", "more than can be counted"])
def test_memory_that_the_cpu_does_not_have(shape):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one it is, is what is asked
        torch.empty(shape, dtype=torch.uint8)
    assert failure_of(caught.value) == OUT_OF_MEMORY
    assert bytes_wanted(caught.value) == (TOO_MUCH if shape == (TOO_MUCH,) else None)


def test_an_error_is_what_it_was_raised_from():
    outer = ModelError("the step failed")
    outer.__cause__ = MemoryError()
    assert failure_of(outer) == OUT_OF_MEMORY
    outer.__cause__, outer.__context__ = None, MemoryError()  # it was raised while that one was handled, for another reason
    assert failure_of(outer) is None


def test_what_does_not_fit_is_named_with_its_size():
    with pytest.raises(
        OutOfMemory, match=r"demo with batch 64.* does not fit.*281,474,976,710,656 bytes.*batch_size"
    ) as caught:
        room_for("demo with batch 64", lambda: torch.empty(TOO_MUCH, dtype=torch.uint8))
    assert caught.value.wanted == TOO_MUCH


def test_other_errors_stay_what_they_are():
    with pytest.raises(ZeroDivisionError):
        room_for("demo", lambda: 1 / 0)
    assert room_for("demo", lambda: 7) == 7


def holding(error_with):
    """An error from a frame that holds a tensor, and a reference to that."""
    seen = []

    def work():
        tensor = torch.zeros(1)
        seen.append(weakref.ref(tensor))
        torch.empty(TOO_MUCH, dtype=torch.uint8)

    try:
        error_with(work)
    except (OutOfMemory, RuntimeError) as error:
        kept = error
    gc.collect()
    return kept, seen[0]


def test_the_error_does_not_keep_what_did_not_fit():
    _error, tensor = holding(lambda work: room_for("demo", work))
    assert tensor() is None


def test_this_test_can_fail():
    _error, tensor = holding(lambda work: work())
    assert tensor() is not None
