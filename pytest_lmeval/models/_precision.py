"""Convert a torch module to a precision (@fp32 @bf16 @fp16 @int8 @int4) and verify that it computes in it.

int8 and int4 are weight-only quantization by torchao: the weights of `nn.Linear` become integers with a scale for each row
(int8) or for each 32 numbers of a row (int4). An int4 value takes a byte and is multiplied as a float: this measures what the
rounding costs in quality, and saves no time. Laws are tested against the rounded weights (`laws._weights.copy_of`).

A precision is refused unless nine tenths of the weights in matrix products (`_model.multiplied`) are in it, half of the
multiply-adds are done in it (fp32, bf16 and fp16), and the logits of one token are finite. In the zoo, int8 covers 97 to 100 %,
but 29 % of moshi (one tensor for all codebooks) and none of lstm; int4 covers 95 % of mamba and 78 % of transformer.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._identity import NEARLY_ALL, held, precision
from pytest_lmeval.models._model import Model, multiplied, weights
from pytest_lmeval.models._specs import BITS as BITS, PACKED
from pytest_lmeval.models._tensors import FLOATS, is_packed, nbytes, precision_of

DTYPES = {name: dtype for dtype, name in FLOATS.items() if name in specs.FLOATS}
GROUP = 32  # numbers of a row that share a scale, in int4
COMPUTED = 0.5  # fraction of the multiply-adds that must be done in a float precision
NAMED = 3  # tensors that an error message names


def convert(module: nn.Module, wanted: str, spec: str) -> int:
    """Convert the module in place, and return its bytes before. Raises SpecError if too few weights can be converted."""
    before = sum(map(nbytes, weights(module)))
    if held(module):
        refuse_kept(module, wanted, spec)
        return before
    if wanted in DTYPES and not any(map(is_packed, module.parameters())):
        module.to(DTYPES[wanted])
    elif wanted in PACKED:
        _pack(module, wanted, spec)
    refuse_kept(module, wanted, spec)
    return before


def refuse_kept(module: nn.Module, wanted: str, spec: str) -> None:
    """Raise SpecError unless nine tenths of the weights in matrix products are in the precision."""
    if precision(module).name == wanted:
        return
    if layers := held(module):
        kinds = Counter(weight.precision for _, weight in layers)
        told = ", ".join(f"{count} layers of {name}" for name, count in kinds.items())
        raise SpecError(
            f"{spec} cannot be had: the checkpoint is quantized already ({told}), and rounding it again, or to more bits, "
            "would make another model of it. Leave the suffix out to measure what it holds."
        )
    chosen = list(multiplied(module))
    left = [(name, tensor) for name, tensor in chosen if precision_of(tensor) != wanted]
    left.sort(key=lambda item: -item[1].numel())
    listed = [f"{name} {list(tensor.shape)} {_why(module, name, tensor, wanted)}" for name, tensor in left[:NAMED]]
    more = [f"and {len(left) - NAMED} more"] if len(left) > NAMED else []
    total = sum(tensor.numel() for _, tensor in chosen)
    fraction = 1 - sum(tensor.numel() for _, tensor in left) / total if total else 0
    raise SpecError(
        f"{spec} cannot be had: {fraction:.1%} of the {total:,} weights that the model multiplies by can be {wanted}, and "
        f"{NEARLY_ALL:.0%} must be. Not so: {'; '.join(listed + more) or 'it has no such weights'}. Choose another precision."
    )


def proven(lm: Model, wanted: str, *, bytes_before: int | None) -> Model:
    """The model with `bytes_before`. Raises SpecError unless it reads one token in the precision."""
    counter = _FlopCounter()
    logits = _first_logits(lm, wanted, counter)
    if not logits.isfinite().all():
        wrong = int((~logits.isfinite()).sum())
        raise SpecError(
            f"{lm.spec}: with its weights in {wanted}, {wrong} of {logits.numel()} logits of one token are no finite numbers. "
            "Use a precision of a larger range, @bf16 or @fp32."
        )
    total, own = sum(counter.flops.values()), counter.flops[wanted]
    if wanted in DTYPES and own < COMPUTED * total:
        others = ", ".join(f"{count / total:.0%} in {name}" for name, count in counter.flops.items() if name != wanted)
        raise SpecError(
            f"{lm.spec}: its weights are in {wanted}, but {own / total:.0%} of its multiply-adds are done in it ({others}), so "
            "its speed and errors are not those of this precision. Change the module, or leave the suffix out."
        )
    return replace(lm, bytes_before=bytes_before)


def _first_logits(lm: Model, wanted: str, counter: _FlopCounter) -> Tensor:
    """The logits of one token; without the counter if the model fails under it."""
    ids, failed = lm.random_ids(1, 1), None
    for counting in (counter, nullcontext()):
        try:
            with torch.no_grad(), counting:
                return lm.step(ids)[0]
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            failed = error
            counter.flops.clear()
        finally:
            getattr(lm.step_fn, "close", lambda: None)()
    raise SpecError(f"{lm.spec}: with its weights in {wanted}, it raised {type(failed).__name__}: {failed}.") from failed


def _pack(module: nn.Module, wanted: str, spec: str) -> None:
    """Quantize the weight of each `nn.Linear` that is not tied to an embedding; shared weights stay shared."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    except ImportError as error:
        raise SpecError(f"{spec} needs torchao ({error}): pip install 'pytest-lmeval[precision]'") from error
    config: Any = Int8WeightOnlyConfig()
    if wanted == "int4":
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)}
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeps the old weights alive, so that no id is reused
    for name, part in module.named_modules():
        if not _is_linear(part) or id(weight := part._parameters["weight"]) in tables or is_packed(weight):
            continue
        if id(weight) in done:
            part.weight = done[id(weight)][1]
        if id(weight) in done or (wanted == "int4" and weight.shape[-1] % GROUP):
            continue
        try:
            quantize_(part, config)
        except Exception as error:
            raise SpecError(
                f"{spec}: torchao could not pack {name}.weight ({list(weight.shape)}, {precision_of(weight)}) as {wanted}: it "
                f"raised {type(error).__name__}: {error}."
            ) from error
        done[id(weight)] = weight, part.weight


def _is_linear(part: nn.Module) -> bool:
    """Whether its weight is a parameter that only its own forward uses."""
    borrowed = nn.modules.linear.NonDynamicallyQuantizableLinear  # torch's attention uses the weight directly
    return isinstance(part, nn.Linear) and not isinstance(part, borrowed) and part._parameters.get("weight") is not None


def _why(module: nn.Module, name: str, tensor: Tensor, wanted: str) -> str:
    owner = module.get_submodule(name.rpartition(".")[0])
    if wanted in DTYPES or is_packed(tensor):
        return f"is {precision_of(tensor)}"
    if _is_linear(owner) and wanted == "int4" and tensor.shape[-1] % GROUP:
        return f"has rows that are no multiple of {GROUP}"
    return f"of {type(owner).__name__} is no weight of an nn.Linear"


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiply-adds in each precision, by torch's own formulas."""

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
