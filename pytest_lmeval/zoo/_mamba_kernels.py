"""Compile the selective scan of `mamba` with numba, for float32 on the CPU; the recurrence is in `_mamba.py`.

What `SelectiveScan` does in seventeen passes over the states of a block is one pass forward and two back, and a state does not
leave the processor's cache. A token's arithmetic does not depend on the chunk that it is in. The passes are operators of torch,
so that operations can be counted, and that `torch.compile` calls them.

Shapes: b rows, t tokens, d channels, n numbers of state each.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import factorial, log, prod
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

BLOCK = 16  # tokens; of their states only the first is kept for the gradient, and the others are computed again
Floats = NDArray[np.float32]
Shape = Sequence[int]
F = TypeVar("F", bound=Callable[..., Any])


def compiled(kernel: F) -> F:
    """`kernel`, compiled at its first call; the result is kept beside Python's own, for compiling takes seconds."""
    fastmath = {"reassoc", "contract", "arcp", "nsz"}  # sums in any order; NaN and infinities stay what they are
    kept = os.access(Path(__file__).parent, os.W_OK)
    jit: Any = numba.njit(fastmath=fastmath, error_model="numpy", nogil=True, cache=kept)
    return jit(kernel)  # type: ignore[no-any-return]


SERIES = tuple(np.float32(1 / factorial(i)) for i in range(7, -1, -1))
HALF, ZERO, PER_LN2 = np.float32(0.5), np.float32(0), np.float32(1 / log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(log(2) - 0.693359375)  # the first times an exponent has no rounding
LOWEST = np.float32(-87)  # its exponential is the smallest normal number, as good as zero


@compiled
def exp(x: np.float32) -> np.float32:
    """e^x of x <= 0: a power of two times e^r, |r| <= ln(2) / 2, by seven terms of its series; loops over it vectorize."""
    x = max(x, LOWEST)
    exponent = np.floor(x * PER_LN2 + HALF)
    r = x - exponent * LN2_HIGH - exponent * LN2_LOW
    series = SERIES[0]
    for factor in SERIES[1:]:
        series = series * r + factor
    return series * np.int32((np.int32(exponent) + 127) << 23).view(np.float32)


@compiled
def advance(a: Floats, u: Floats, dt: Floats, b_in: Floats, decays: Floats, states: Floats) -> None:
    """Write the decays [t, n, d] and the states [1 + t, n, d] of a block; the first of the states is given."""
    for t in range(len(u)):
        for i in range(len(a)):
            rate, x, step, into = a[i], u[t], dt[t], b_in[t, i]
            before, decay, after = states[t, i], decays[t, i], states[t + 1, i]
            for j in range(len(x)):
                decay[j] = exp(step[j] * rate[j])
                after[j] = decay[j] * before[j] + into * (step[j] * x[j])


@compiled
def forward(a: Floats, u: Floats, dt: Floats, b_in: Floats, c_out: Floats, hidden: Floats, y: Floats, starts: Floats) -> None:
    """Write y = C h [b, t, d]; the state before each block to `starts` [b, blocks, n, d], the last one to `hidden`."""
    decays, states = np.empty((BLOCK, *a.shape), a.dtype), np.empty((BLOCK + 1, *a.shape), a.dtype)
    for row in range(len(u)):
        for block in range(starts.shape[1]):
            tokens = slice(block * BLOCK, (block + 1) * BLOCK)
            starts[row, block] = states[0] = hidden[row]
            advance(a, u[row, tokens], dt[row, tokens], b_in[row, tokens], decays, states)
            outputs, out = y[row, tokens], c_out[row, tokens]
            outputs[:] = ZERO
            for t in range(len(outputs)):
                for i in range(len(a)):
                    output, state, c = outputs[t], states[t + 1, i], out[t, i]
                    for j in range(len(output)):
                        output[j] += c * state[j]
            hidden[row] = states[len(outputs)]


@compiled
def backward(
    a: Floats, u: Floats, dt: Floats, b_in: Floats, c_out: Floats, starts: Floats, by_y: Floats, by_h: Floats,
    by_a: Floats, by_u: Floats, by_dt: Floats, by_b: Floats, by_c: Floats,
) -> None:  # fmt: skip
    """Add to by_a [b, n, d], write the other gradients; `by_h` of the last state becomes that of the first."""
    decays, states = np.empty((BLOCK, *a.shape), a.dtype), np.empty((BLOCK + 1, *a.shape), a.dtype)
    by_drive = np.empty(a.shape[1], a.dtype)  # by dt u
    for row in range(len(u)):
        for block in range(starts.shape[1] - 1, -1, -1):
            first, end = block * BLOCK, min((block + 1) * BLOCK, u.shape[1])
            states[0] = starts[row, block]
            advance(a, u[row, first:end], dt[row, first:end], b_in[row, first:end], decays, states)
            for t in range(end - 1, first - 1, -1):
                x, step, wanted, by_x, by_step = u[row, t], dt[row, t], by_y[row, t], by_u[row, t], by_dt[row, t]
                by_drive[:] = by_step[:] = ZERO
                for i in range(len(a)):
                    rate, into, out, decay = a[i], b_in[row, t, i], c_out[row, t, i], decays[t - first, i]
                    before, after = states[t - first, i], states[t - first + 1, i]
                    by_state, by_rate = by_h[row, i], by_a[row, i]
                    by_into, by_out = ZERO, ZERO
                    for j in range(len(x)):
                        by_after = by_state[j] + out * wanted[j]
                        by_out += wanted[j] * after[j]
                        by_into += by_after * (step[j] * x[j])
                        by_drive[j] += into * by_after
                        by_state[j] = decay[j] * by_after
                        by_exponent = by_state[j] * before[j]
                        by_step[j] += by_exponent * rate[j]
                        by_rate[j] += by_exponent * step[j]
                    by_b[row, t, i], by_c[row, t, i] = by_into, by_out
                for j in range(len(x)):
                    by_x[j] = by_drive[j] * step[j]
                    by_step[j] += by_drive[j] * x[j]


def by_rows(kernel: Callable[..., None], a: Tensor, *by_row: Tensor) -> None:
    """Call a kernel with the rows of `by_row`, in as many threads as torch uses; what it writes to is contiguous."""
    shared, *arrays = (x.contiguous().numpy(force=True) for x in (a, *by_row))
    threads = min(torch.get_num_threads(), len(by_row[0]))
    if threads == 1:
        kernel(shared, *arrays)
    else:
        parts = zip(*(np.array_split(x, threads) for x in arrays), strict=True)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: kernel(shared, *part), parts))


@torch.library.custom_op("lmeval::mamba_scan", mutates_args=(), device_types="cpu")
def scan(u: Tensor, dt: Tensor, a: Tensor, b_in: Tensor, c_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [b, t, d], the last h [b, n, d], and the h before each block, [b, blocks, n, d]."""
    y, last, starts = scanned(u, dt, a, b_in, c_out, hidden)
    by_rows(forward, a, u, dt, b_in, c_out, last.copy_(hidden), y, starts)
    return y, last, starts


@scan.register_fake
def scanned(u: Tensor, dt: Tensor, a: Tensor, b_in: Tensor, c_out: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    blocks = -(-dt.shape[1] // BLOCK)
    return dt.new_empty(dt.shape), hidden.new_empty(hidden.shape), hidden.new_empty(len(dt), blocks, *a.shape)


@torch.library.custom_op("lmeval::mamba_scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    u: Tensor, dt: Tensor, a: Tensor, b_in: Tensor, c_out: Tensor, starts: Tensor, by_y: Tensor, by_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients by u, dt, A, B, C and the first h."""
    by_u, by_dt, _, by_b, by_c, by_h = gradients(u, dt, a, b_in, c_out, starts, by_y, by_last)
    by_a = a.new_zeros(len(dt), *a.shape)
    found = (by_a, by_u, by_dt, by_b, by_c)
    by_rows(backward, a, u, dt, b_in, c_out, starts, by_y, by_h.copy_(by_last), *found)
    return by_u, by_dt, by_a.sum(0), by_b, by_c, by_h


@scan_backward.register_fake
def gradients(
    u: Tensor, dt: Tensor, a: Tensor, b_in: Tensor, c_out: Tensor, starts: Tensor, by_y: Tensor, by_last: Tensor
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (u, dt, a, b_in, c_out, by_last))


@register_flop_formula(torch.ops.lmeval.mamba_scan)
def _products(u: Shape, dt: Shape, a: Shape, *rest: Any, **options: Any) -> int:
    """y = C h, as `SelectiveScan` computes it by a matrix product."""
    return 2 * prod(dt) * a[0]


@register_flop_formula(torch.ops.lmeval.mamba_scan_backward)
def _products_backward(*shapes: Any, **options: Any) -> int:
    """The gradients by C, by u and by B."""
    return 3 * _products(*shapes)


class CompiledScan(torch.autograd.Function):
    """`SelectiveScan`, compiled."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, last, starts = scan(*inputs)
        ctx.save_for_backward(*inputs[:-1], starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor, by_last: Tensor) -> tuple[Tensor, ...]:
        return scan_backward(*ctx.saved_tensors, by_y, by_last)  # type: ignore[no-any-return]
