"""Measure memory: weights, state, and the activations of a step, whose sum is what the model itself needs.

On the CPU everything is measured in a process of its own, and the allocations of torch are equal to the byte in every run with
the same number of threads (see `profiling._allocations` for what they leave out). One whole run comes before each number and
does not count: in it, libraries load their parts and models make the tables that they keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytest_lmeval.engine import Engine
from pytest_lmeval.engine._engine import likeliest
from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.measures._context import verb_of
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model, state_storages, weights
from pytest_lmeval.profiling._allocations import watched_allocations
from pytest_lmeval.profiling._child import TIMEOUT, CannotMoveError, in_child
from pytest_lmeval.profiling._failures import room_for
from pytest_lmeval.profiling._peak import peak_memory
from pytest_lmeval.profiling._runner import check_shape
from pytest_lmeval.profiling._work import storages
from pytest_lmeval.records._measured import Cost, MetricValue, Record, Result
from pytest_lmeval.records._metric import value_of

NEW_TOKENS = 8
SHOWN = (
    *("weights_bytes", "state_bytes", "activations_bytes", "peak_bytes", "growth_bytes", "tensors_peak_bytes"),
    *("allocated_bytes", "reserved_bytes"),
)
Sizes = dict[str, int | None]  # bytes by metric; None where they cannot be measured


@dataclass(frozen=True, repr=False)
class MemoryResult(Result):
    """Memory in bytes. KeyError for what cannot be measured here: `record.details["absent"]` says why."""

    weights_bytes = MetricValue()
    """Storages of parameters and buffers, each once; quantized weights as they are packed."""
    state_bytes = MetricValue()
    """Carried after the prompt."""
    activations_bytes = MetricValue()
    """The peak of the tensors, or on CUDA the growth, less the state: intermediate results, logits, copies of the state."""
    tensors_peak_bytes = MetricValue()
    """Most that torch's allocations of the run held at once, without the weights; on the CPU only, and exact."""
    peak_bytes = MetricValue()
    """CPU: most that the process had in memory (VmHWM), interpreter and libraries included; it varies from run to run by 0.2 to
    1 % of 260 MB, and `growth_bytes` of small models by up to a half. CUDA: most that torch had allocated on the device."""
    growth_bytes = MetricValue()
    """The peak, less what was held before the run."""
    allocated_bytes = MetricValue()
    """Held by torch on the device before the run, by other models too; on CUDA only."""
    reserved_bytes = MetricValue()
    """Most that torch's allocator had reserved on the device during the run; on CUDA only."""


def measure_memory(
    lm: Model,
    batch_size: int = 1,
    seq_len: int = 128,
    *,
    new_tokens: int = NEW_TOKENS,
    keep: int | None = 1,
    seed: int = 0,
    apart: bool = True,
    timeout: float = TIMEOUT,
) -> MemoryResult:
    """Weights, state and activations, and the peak of a process of its own, over a prompt of random tokens and `new_tokens`
    that are decoded greedily after it. Nothing is timed, so other tests may run at the same time.

    keep     number of logits of the prompt, from its end: 1 as for generation, None (all) as for scoring a text
    apart    False measures in this process on the CPU, too. A model that can neither be pickled nor loaded again is measured
             here in any case; `record.details["process"]` says where
    timeout  seconds that the process of its own may take

    Raises ProfilingError for a shape that cannot be run, OutOfMemory, and ChildFailed where the process of its own fails.
    """
    new_tokens = new_tokens if lm.stateful else min(new_tokens, 1)
    shape = {"batch_size": batch_size, "seq_len": seq_len, "new_tokens": new_tokens}
    check_shape(lm, **shape)
    if keep is not None and keep < 1:
        raise ProfilingError(f"keep is {keep}; it is at least 1, since the last logits choose the next token. None keeps all.")
    began, settings = time.perf_counter(), {**shape, "keep": keep, "seed": seed}
    found, process = _measured(lm, settings, apart, timeout)
    absent = {name: f"not available on {lm.device.type} or on this system" for name, size in found.items() if size is None}
    if "weights_bytes" in absent:
        absent["weights_bytes"] = f"{type(lm.source).__name__} is no torch module, so its weights are not known"
    record = Record(
        kind="memory",
        subject=f"batch {batch_size}, {seq_len} tokens",
        lm=facts(lm),
        settings={**settings, "threads": torch.get_num_threads()},
        details={"process": process, "absent": absent},
        metrics={name: value_of(name, size, n=1) for name in SHOWN if (size := found.get(name)) is not None},
        cost=Cost(
            seconds=time.perf_counter() - began,
            tokens=batch_size * (seq_len + new_tokens - 1),
            peak_bytes=found["peak_bytes"],
            state_bytes=found["state_bytes"],
        ),
    )
    return MemoryResult(record)


memory = verb_of("memory", measure_memory)


def _measured(lm: Model, settings: dict[str, Any], apart: bool, timeout: float) -> tuple[Sizes, str]:
    """The sizes, and where they were measured."""
    if lm.device.type != "cpu":
        return measure(lm, **settings), "this one: the memory is that of the device"
    if not apart:
        return measure(lm, **settings), "this one, as requested: the peak includes what it did before"
    try:
        return in_child(lm, measure, settings, timeout=timeout)
    except CannotMoveError as error:
        reason = str(error)
    return measure(lm, **settings), f"this one: the peak includes what it did before. {reason}"


def measure(lm: Model, batch_size: int, seq_len: int, new_tokens: int, keep: int | None, seed: int) -> Sizes:
    """The metrics of `memory`, measured in this process."""

    def measured() -> Sizes:
        prompt = lm.random_ids(batch_size, seq_len, seed=seed)
        run = partial(read_and_decode, lm, prompt, new_tokens, keep)
        run()
        own = storages(weights(lm.module))
        found: Sizes = {"weights_bytes": sum(own.values()) if lm.module is not None else None}
        found["state_bytes"] = sum(run().values())
        return found | (_on_cuda(lm.device, run, own) if lm.device.type == "cuda" else _by_process(lm.device, run))

    return room_for(f"{lm.spec} with batch {batch_size}, {seq_len} tokens on {lm.device}", measured)


def read_and_decode(lm: Model, prompt: Tensor, new_tokens: int, keep: int | None) -> dict[int, int]:
    """The sizes of the state's storages after the prompt, by address."""
    engine = Engine(lm)
    logits, state = engine.prefill(prompt, keep=keep)
    after_prompt = state_storages(state)
    decoding = engine.decode(likeliest(logits, prompt), state, new_tokens - 1)
    del logits, state  # hold nothing besides what the next step needs
    for _ in decoding:
        pass
    return after_prompt


def _by_process(device: torch.device, run: Callable[[], dict[int, int]]) -> Sizes:
    with peak_memory(device) as peak:
        run()
    found: Sizes = {"peak_bytes": peak.bytes, "growth_bytes": peak.growth}
    if device.type != "cpu":
        return found | {"activations_bytes": None}
    with watched_allocations() as seen:
        state = run()
    new = sum(size for address, size in state.items() if address in seen.addresses)  # not a state that lies in buffers
    return found | {"activations_bytes": seen.peak - new, "tensors_peak_bytes": seen.peak}


def _on_cuda(device: torch.device, run: Callable[[], dict[int, int]], own: dict[int, int]) -> Sizes:
    torch.cuda.synchronize(device)
    allocated = torch.cuda.memory_allocated(device)
    with peak_memory(device) as peak:
        state = run()
        torch.cuda.synchronize(device)
    new = sum(size for address, size in state.items() if address not in own)
    return {
        "peak_bytes": peak.bytes,
        "growth_bytes": peak.growth,
        "activations_bytes": None if peak.growth is None else peak.growth - new,
        "allocated_bytes": allocated,
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
