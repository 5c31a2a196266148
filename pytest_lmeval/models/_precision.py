"""The precision that a spec asks for, given to a torch module, and proven: the suffixes @fp32 @bf16 @fp16 @int8 @int4.

fp32, bf16 and fp16 change the type of all parameters and buffers. int8 and int4 are weight-only quantization by torchao: the
weights of `nn.Linear` become integers with a scale for each row (int8) or for 32 numbers of a row (int4), and everything else,
the activations too, stays as it was. Four bits lie in a byte each here, and are multiplied as floats: this form says what the
rounding costs in quality, and neither saves as much memory as packed files do nor any time; the record says how many bits are
stored (see `_identity.precision`). Weights that were rounded once are part of the model, so that in float32 arithmetic its
laws can be proven, and in bfloat16 it can be consistent (see `laws._weights.copy_of`).

A precision that cannot be had is refused. It is had where, found out by looking and by reading one token:

* nine tenths of the weights that are multiplied (`_model.multiplied`) are in it. An embedding stays as it was, and so does a
  head that is tied to it, so that they are one tensor still. Most models of the zoo have 97 to 100 % of their weights in int8,
  but moshi 29 % (the matrices of all its codebooks are one tensor) and lstm none; in int4, mamba has 95 % (a projection from 10
  numbers holds no group of 32), and transformer and windowed have 78 % (344 are no groups either). Below 90 % are refused.
* for fp32, bf16 and fp16, half of the multiply-adds are done in it: of the models in the zoo, 75 to 100 % are. The rest are
  recurrences and attention over a state that is deliberately held in float32. A module that converts its weights back before it
  multiplies has only their rounding, and is refused.
* the logits of one token are finite numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._identity import NEARLY_ALL, precision
from pytest_lmeval.models._model import Model, multiplied, weights
from pytest_lmeval.models._specs import BITS as BITS, PACKED
from pytest_lmeval.models._tensors import FLOATS, is_packed, nbytes, precision_of

DTYPES = {name: dtype for dtype, name in FLOATS.items() if name in specs.FLOATS}
GROUP = 32  # numbers of a row that share a scale, in int4
COMPUTED = 0.5  # share of the multiply-adds that must be done in a float precision
NAMED = 3  # tensors that a refusal names


def convert(module: nn.Module, wanted: str, spec: str) -> int:
    """Bring the module to a precision, where it lies. Returns the bytes that its tensors took before.

    Raises SpecError, with the figures, where too few of its weights can be had in it, and where torchao is missing.
    """
    before = sum(map(nbytes, weights(module)))
    if wanted in DTYPES and not any(map(is_packed, module.parameters())):
        module.to(DTYPES[wanted])
    elif wanted in PACKED:
        _pack(module, wanted, spec)
    refuse_kept(module, wanted, spec)
    return before


def refuse_kept(module: nn.Module, wanted: str, spec: str) -> None:
    """Raise SpecError, with the figures, unless nine tenths of the weights that are multiplied are in the precision."""
    if precision(module).name == wanted:
        return
    chosen = list(multiplied(module))
    left = [(name, tensor) for name, tensor in chosen if precision_of(tensor) != wanted]
    left.sort(key=lambda item: -item[1].numel())
    listed = [f"{name} {list(tensor.shape)} {_why(module, name, tensor, wanted)}" for name, tensor in left[:NAMED]]
    more = [f"and {len(left) - NAMED} more"] if len(left) > NAMED else []
    total = sum(tensor.numel() for _, tensor in chosen)
    share = sum(tensor.numel() for _, tensor in chosen if precision_of(tensor) == wanted) / max(1, total)
    raise SpecError(
        f"{spec} cannot be had: {share:.1%} of the {total:,} weights that the model multiplies by can be {wanted}, and "
        f"{NEARLY_ALL:.0%} must be. Not so: {'; '.join(listed + more) or 'it has no such weights'}. What was measured with "
        f"it would not be about {wanted}. Choose another precision, or none."
    )


def proven(lm: Model, wanted: str, *, bytes_before: int | None) -> Model:
    """The model, after it was watched reading one token. Raises SpecError where that is not done in the precision."""
    watch = _Products()
    logits = _one_token(lm, wanted, watch)
    if not logits.isfinite().all():
        wrong = int((~logits.isfinite()).sum())
        raise SpecError(
            f"{lm.spec}: with its weights in {wanted}, {wrong} of {logits.numel()} logits of one token are no finite numbers. "
            "Nothing can be measured with it. Use a precision of a larger range, @bf16 or @fp32."
        )
    total, own = sum(watch.flops.values()), watch.flops[wanted]
    if wanted in DTYPES and own < COMPUTED * total:
        others = ", ".join(f"{count / total:.0%} in {name}" for name, count in watch.flops.items() if name != wanted)
        raise SpecError(
            f"{lm.spec}: its weights are in {wanted}, but {own / total:.0%} of its multiply-adds are done in it ({others}). It "
            "converts them itself, so that its speed and its errors would not be those of this precision. Change the module, "
            "or leave the suffix out."
        )
    return replace(lm, bytes_before=bytes_before)


def _one_token(lm: Model, wanted: str, watch: _Products) -> Tensor:
    """The logits of one token, read under the eyes of `watch`, or unwatched where that is what fails."""
    ids, failed = lm.random_ids(1, 1), None
    for watching in (watch, nullcontext()):
        try:
            with torch.no_grad(), watching:
                return lm.step(ids)[0]
        except Exception as error:  # noqa: BLE001 - a model may raise anything; it is told below
            failed = error
            watch.flops.clear()
        finally:
            getattr(lm.step_fn, "close", lambda: None)()
    raise SpecError(f"{lm.spec}: with its weights in {wanted}, it raised {type(failed).__name__}: {failed}.") from failed


def _pack(module: nn.Module, wanted: str, spec: str) -> None:
    """Give each `nn.Linear` that can be packed integers for its weight; what was one tensor for several of them still is."""
    quantize_, config = _torchao(wanted, spec)
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)}
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # holds on to what was there, so that no address comes twice
    for name, part in module.named_modules():
        if not _is_linear(part) or id(weight := part._parameters["weight"]) in tables or is_packed(weight):
            continue
        if _no_group(weight, wanted):
            continue
        if id(weight) in done:
            part.weight = done[id(weight)][1]
            continue
        try:
            quantize_(part, config)
        except Exception as error:
            raise SpecError(
                f"{spec}: torchao could not pack {name}.weight ({list(weight.shape)}, {precision_of(weight)}) as {wanted}: it "
                f"raised {type(error).__name__}: {error}."
            ) from error
        done[id(weight)] = weight, part.weight


def _torchao(wanted: str, spec: str) -> tuple[Callable[..., Any], Any]:
    """torchao's function that packs, and what it is to do."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    except ImportError as error:
        raise SpecError(f"{spec} needs torchao ({error}): pip install 'pytest-lmeval[precision]'") from error
    if wanted == "int8":
        return quantize_, Int8WeightOnlyConfig()
    return quantize_, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]


def _is_linear(part: nn.Module) -> bool:
    """Whether its weight is a parameter that only its own forward multiplies by."""
    borrowed = nn.modules.linear.NonDynamicallyQuantizableLinear  # the attention of torch takes the weight out of it
    return isinstance(part, nn.Linear) and not isinstance(part, borrowed) and part._parameters.get("weight") is not None


def _no_group(weight: Tensor, wanted: str) -> bool:
    return wanted == "int4" and weight.shape[-1] % GROUP != 0


def _why(module: nn.Module, name: str, tensor: Tensor, wanted: str) -> str:
    owner = module.get_submodule(name.rpartition(".")[0])
    if wanted in DTYPES or is_packed(tensor):
        return f"is {precision_of(tensor)}"
    if _is_linear(owner) and _no_group(tensor, wanted):
        return f"has rows that are no multiple of {GROUP}"
    return f"of {type(owner).__name__} is no weight of an nn.Linear"


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiply-adds that are done in each precision, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        first = next((value for value in args if isinstance(value, Tensor)), None)
        if count is not None and first is not None:
            self.flops[FLOATS.get(first.dtype, str(first.dtype))] += count(*args, **(kwargs or {}), out_val=out)
        return out
