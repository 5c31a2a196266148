"""How much memory a model takes: its weights, its state, and what a step needs beside them, each apart.

A run reads a prompt of `seq_len` tokens and decodes `new_tokens` greedily, one a step from the carried state. Of it come

    weights      storages of parameters and buffers, each once; quantized weights as they are packed
    state        what is carried, after the prompt
    activations  most that the run held at once of what it allocated (tensors_peak), less the state after the prompt: all that
                 comes and goes in a step, its logits, and copies of the state where a step makes some
    peak         CPU: most that the process had in memory during a run (VmHWM), interpreter and libraries included
                 CUDA: most that torch had allocated on the device
    growth       peak, less what there was before the run

so that weights + state + activations is what the model itself needs. The tensors' peak comes from the events of torch's
allocator, and on the CPU it is the same to the byte in every run with as many threads (see `allocations` for what it does not
see). On the CPU everything is measured in a process of its own. Each number is taken after one whole run that is not counted:
libraries load their parts in it, and models make the tables that they keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from pytest_lmeval.profiling._storages import storages
from pytest_lmeval.records._measured import Cost, Record, Result
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value

NEW_TOKENS = 8
SHOWN = (
    *("weights_bytes", "state_bytes", "activations_bytes", "peak_bytes", "growth_bytes", "tensors_peak_bytes"),
    *("allocated_bytes", "reserved_bytes"),
)


@dataclass(frozen=True, repr=False)
class MemoryResult(Result):
    """Memory in bytes; see the head of this file. KeyError for what cannot be measured here: `record.details["absent"]`
    names it, and why."""

    @property
    def weights_bytes(self) -> Value:
        return self.record.metrics["weights_bytes"]

    @property
    def state_bytes(self) -> Value:
        """After the prompt."""
        return self.record.metrics["state_bytes"]

    @property
    def activations_bytes(self) -> Value:
        return self.record.metrics["activations_bytes"]

    @property
    def tensors_peak_bytes(self) -> Value:
        """Most that torch's allocations of the run held at once, weights not included; on the CPU only, and exact."""
        return self.record.metrics["tensors_peak_bytes"]

    @property
    def peak_bytes(self) -> Value:
        """Of the process on the CPU, of the device on CUDA. That of a process varies from run to run: by 0.2 to 1 % (0.6 to
        3 MB of 260 MB, eight runs each of two small models), and with it `growth_bytes`, of these models by up to a half."""
        return self.record.metrics["peak_bytes"]

    @property
    def growth_bytes(self) -> Value:
        return self.record.metrics["growth_bytes"]

    @property
    def allocated_bytes(self) -> Value:
        """Held by torch on the device before the run, by other models too; on CUDA only."""
        return self.record.metrics["allocated_bytes"]

    @property
    def reserved_bytes(self) -> Value:
        """Most that torch's allocator had taken of the device during the run; on CUDA only."""
        return self.record.metrics["reserved_bytes"]


@dataclass(frozen=True)
class Shape:
    """What a run reads and decodes; `keep` as in `Model.step`, None keeping the logits of the whole prompt."""

    batch_size: int
    seq_len: int
    new_tokens: int
    keep: int | None
    seed: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.seq_len} tokens"


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
    """Weights, state and activations apart, and the peak of a process of its own, over a prompt of random tokens and
    `new_tokens` that are decoded after it. Nothing is timed, and other tests do not disturb it.

    keep     logits that are wanted of the prompt: 1 as for generation, None (all) as for scoring a text
    apart    False measures on the CPU in this process too. What cannot be pickled or loaded again is measured here anyway;
             the record's settings say where ("process")
    timeout  seconds that the process of its own may take

    Raises ProfilingError for a shape that cannot be run, OutOfMemory for one that does not fit, and ChildFailed where the
    process of its own fails.
    """
    shape = Shape(batch_size, seq_len, new_tokens if lm.stateful else min(new_tokens, 1), keep, seed)
    _check(lm, shape)
    began = time.perf_counter()
    found, process = _measured(lm, asdict(shape), apart, timeout)
    sizes = {name: size for name, size in found.items() if size is not None}
    record = Record(
        kind="memory",
        subject=str(shape),
        lm=facts(lm),
        settings={
            **asdict(shape),
            "threads": torch.get_num_threads(),
        },
        details={"process": process, "absent": _absent(lm, found)},
        metrics={name: value_of(name, sizes[name], n=1) for name in SHOWN if name in sizes},
        cost=Cost(
            seconds=time.perf_counter() - began,
            tokens=batch_size * (seq_len + shape.new_tokens - 1),
            peak_bytes=found["peak_bytes"],
            state_bytes=found["state_bytes"],
        ),
    )
    return MemoryResult(record)


memory = verb_of("memory", measure_memory)


def _check(lm: Model, shape: Shape) -> None:
    check_shape(lm, batch_size=shape.batch_size, seq_len=shape.seq_len, new_tokens=shape.new_tokens)
    if shape.keep is not None and shape.keep < 1:
        raise ProfilingError(
            f"keep is {shape.keep}: the run chooses the next token by the last logits, so it keeps 1 at least. None keeps all."
        )


def _measured(lm: Model, shape: dict[str, Any], apart: bool, timeout: float) -> tuple[dict[str, int | None], str]:
    """What was found, and where it was measured."""
    if lm.device.type != "cpu":
        return measure(lm, **shape), "this one: the memory is that of the device"
    if not apart:
        return measure(lm, **shape), "this one, as was asked for: what it did before counts in the peak"
    try:
        return in_child(lm, measure, shape, timeout=timeout)
    except CannotMoveError as error:
        reason = str(error)
    return measure(lm, **shape), f"this one: what it did before counts in the peak. {reason}"


def _absent(lm: Model, found: dict[str, int | None]) -> dict[str, str]:
    reasons = {"weights_bytes": f"{type(lm.source).__name__} is no torch module: what its weights are is not known"}
    unknown = f"not told by {lm.device.type} or by this system"
    return {name: reasons.get(name, unknown) for name, size in found.items() if size is None}


def measure(lm: Model, batch_size: int, seq_len: int, new_tokens: int, keep: int | None, seed: int) -> dict[str, int | None]:
    """The metrics of `memory` in bytes, None for what cannot be measured; the run is made in this process."""

    def measured() -> dict[str, int | None]:
        prompt = lm.random_ids(batch_size, seq_len, seed=seed)

        def run() -> dict[int, int]:
            return read_and_decode(lm, prompt, new_tokens, keep)

        run()
        own = storages(weights(lm.module))
        found: dict[str, int | None] = {"weights_bytes": sum(own.values()) if lm.module is not None else None}
        found["state_bytes"] = sum(run().values())
        return found | (_on_cuda(lm.device, run, own) if lm.device.type == "cuda" else _by_process(lm.device, run))

    return room_for(f"{lm.spec} with batch {batch_size}, {seq_len} tokens on {lm.device}", measured)


def read_and_decode(lm: Model, prompt: Tensor, new_tokens: int, keep: int | None) -> dict[int, int]:
    """Read the prompt and decode greedily. Returns the addresses and sizes of the state's storages after the prompt."""
    engine = Engine(lm)
    logits, state = engine.prefill(prompt, keep=keep)
    after_prompt = state_storages(state)
    decoding = engine.decode(likeliest(logits, prompt), state, new_tokens - 1)
    del logits, state  # nothing is held beside what the next step needs
    for _ in decoding:
        pass
    return after_prompt


def _by_process(device: torch.device, run: Callable[[], dict[int, int]]) -> dict[str, int | None]:
    with peak_memory(device) as peak:
        run()
    found: dict[str, int | None] = {"peak_bytes": peak.bytes, "growth_bytes": peak.growth}
    if device.type != "cpu":
        return found | {"activations_bytes": None}
    with watched_allocations() as seen:
        state = run()
    new = sum(size for address, size in state.items() if address in seen.addresses)  # and not what lies in buffers
    return found | {"activations_bytes": seen.peak - new, "tensors_peak_bytes": seen.peak}


def _on_cuda(device: torch.device, run: Callable[[], dict[int, int]], own: dict[int, int]) -> dict[str, int | None]:
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
