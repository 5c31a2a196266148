"""Count floating-point operations as they are called: those that torch's `FlopCounterMode` counts, and what it does not know.

    attention on the CPU     as on CUDA: 4 b h t s e forward; backward computes the scores again: 2.5 times that
    nn.LSTM, nn.GRU, nn.RNN  fused layers of oneDNN and cuDNN: 2 x tokens x the entries of their matrices; backward twice that
    grouped convolutions     the gradient by weight costs what forward costs; torch multiplies it by the number of groups
    nn.TransformerEncoder    in eval mode without gradients a layer is one operator, as is nn.MultiheadAttention
    grouped products         of a mixture of experts: each token with the matrices of its own expert
    quantized products       of int8 and int4 weights, by the size of the weights that they hold
    vector products          mv, dot and the like

A multiplication and an addition are two operations, on complex numbers as on real ones; a causal mask saves nothing. Not
counted: elementwise work (activations, norms, softmax, a scan of products and sums), lookups, sorting, Fourier transforms,
linear solvers and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

aten = torch.ops.aten
Shape = Sequence[int]


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass and of its backward pass."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times)


def count_flops(work: Callable[[], Any]) -> int:
    """The operations of `work()`, see the head of this file.

    >>> count_flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7))
    210
    """
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = _WholeModel()  # type: ignore[assignment]
    with counter:
        work()
    return int(counter.get_total_flops())


class _WholeModel(nullcontext[None]):
    """Replaces torch's tracker of single modules, which fails where a state holds a parameter."""

    parents = frozenset({"Global"})


def training_flops(loss: Callable[[], Tensor], backward: Callable[[Tensor], Any] = Tensor.backward) -> Flops:
    """The operations of computing a loss, and of the gradients that `backward(loss())` leaves in the parameters.

    >>> layer = torch.nn.Linear(5, 7, bias=False)
    >>> training_flops(lambda: layer(torch.ones(3, 5)).sum())
    Flops(forward=210, backward=210)
    """
    found: list[Tensor] = []
    forward = count_flops(lambda: found.append(loss()))
    return Flops(forward, count_flops(lambda: backward(found[0])))


# A formula takes the operator's arguments, with shapes in place of tensors, and `out_shape`, the shape of the result.
def _attention(query: Shape, key: Shape, value: Shape, *rest: Any, **options: Any) -> int:
    """Scores, and values weighted by them; query [b, h, t, e], key [b, g, s, e], value [b, g, s, f], h a multiple of g."""
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **options: Any) -> int:
    """Scores again; gradients of the weights and of the values; gradients of the queries and of the keys."""
    return 2 * prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


def _recurrent(inputs: Shape, *weights: Any, **options: Any) -> int:
    """One layer of oneDNN: inputs [t, b, d], then the matrix for the inputs and the one for the state."""
    matrices: int = prod(weights[0]) + prod(weights[1])
    return 2 * prod(inputs[:-1]) * matrices


def _recurrent_layers(inputs: Shape, weights: Sequence[Shape], *rest: Any, **options: Any) -> int:
    """All layers of cuDNN at once: inputs [t, b, d] (or packed, [tokens, d]), then all matrices and biases."""
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _convolution_backward(grad: Shape, inputs: Shape, weight: Shape, *rest: Any, **options: Any) -> int:
    """The products of forward, once for the gradient by input and once for the one by weight, if they are wanted."""
    *_, transposed, _output_padding, _groups, wanted = rest
    products: int = grad[0] * prod((inputs if transposed else grad)[2:]) * prod(weight)
    return 2 * products * (bool(wanted[0]) + bool(wanted[1]))


def _self_attention(query: Shape, key: Shape, value: Shape, width: int, *rest: Any, **options: Any) -> int:
    """Projections of query [b, t, d], and of key and value [b, s, d]; attention; the output projection."""
    tokens, others = prod(query[:-1]), prod(key[:-1])
    return 2 * width * width * (2 * tokens + 2 * others) + 4 * tokens * key[1] * width


def _encoder_layer(source: Shape, width: int, heads: int, *rest: Any, **options: Any) -> int:
    """Every token of source [b, t, d] with four matrices, of attention and of the feed-forward, and attention itself."""
    matrices: int = sum(prod(rest[index]) for index in (0, 2, 11, 13))
    return 2 * prod(source[:-1]) * matrices + 4 * prod(source[:-1]) * source[1] * width


def _product(left: Shape, right: Shape, *rest: Any, out_shape: Shape, **options: Any) -> int:
    """A matrix with a packed one, whose shape is not that of the weights it holds."""
    return 2 * prod(out_shape) * left[-1]


def _grouped_product(left: Shape, right: Shape, *rest: Any, out_shape: Shape, **options: Any) -> int:
    """Groups of rows, each with its own matrix; for two matrices [m, t] and [t, n], groups of t."""
    return 2 * prod(left) * right[1] if len(left) == len(right) == 2 else 2 * prod(out_shape) * left[-1]


def _twice(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *shapes, **options: 2 * formula(*shapes, **options)


BY_NAME: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "mkldnn_rnn_layer": _recurrent,
    "mkldnn_rnn_layer_backward": _twice(_recurrent),
    "_cudnn_rnn": _recurrent_layers,
    "_cudnn_rnn_backward": _twice(_recurrent_layers),
    "convolution_backward": _convolution_backward,
    "_native_multi_head_attention": _self_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "_grouped_mm": _grouped_product,
    "_int_mm": _product,
    "_weight_int8pack_mm": _product,
    "_weight_int4pack_mm": _product,
    "_weight_int4pack_mm_for_cpu": _product,
    "_addmm_activation": lambda added, left, right, **options: _product(left, right, **options),
    "mv": lambda matrix, vector, **options: 2 * prod(matrix),
    "addmv": lambda added, matrix, vector, **options: 2 * prod(matrix),
    "dot": lambda left, right, **options: 2 * prod(left),
    "vdot": lambda left, right, **options: 2 * prod(left),
}
FORMULAS = {getattr(aten, name): formula for name, formula in BY_NAME.items() if hasattr(aten, name)}  # older torch lacks some
