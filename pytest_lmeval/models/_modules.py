"""Adapt torch modules and other objects to `Model`, with one step function for each form of state.

stateless       logits = module(input_ids)
functional      logits, state = module(input_ids, state)                  as nn.LSTM does
get_set_state   module.set_state(state); logits = module(input_ids); state = module.get_state()
streaming       with module.streaming(batch_size): logits = module.step(input_ids)
step            logits, state = source.step(input_ids, state)             the protocol itself

Functional modules and sources with `step` may also read several sequences in one row, with the methods in PACKING.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lmeval.errors import ModelError
from pytest_lmeval.models._identity import settings_of
from pytest_lmeval.models._model import Model, Packing, State, StepFn, codebooks_of, devices_note, fork, tokenizer_for, weights
from pytest_lmeval.models._weak_cache import WeakCache

# Names of a second argument that is no state.
NOT_A_STATE = frozenset({"targets", "target", "labels", "label", "attention_mask", "mask", "padding_mask", "key_padding_mask"})

PACKING = ("packed_step", "take_columns", "join_columns")  # methods that do what `Packing` describes

MUTABLE_BUFFERS = WeakCache[dict[str, set[str]]]()  # by module: form -> `Model.mutable_buffers`
BOUNDARIES = ("window", "window_size", "sliding_window", "kernel", "chunk_size", "mini_batch_size", "context", "block")


def form_of(source: Any) -> str:
    """The form of `source`, from its methods, and for a bare module from what it returns for one token."""
    if _has(source, "step"):
        return "streaming" if _has(source, "streaming") else "step"
    if not callable(source):
        raise ModelError(
            f"{type(source).__name__} is no language model: it is neither callable nor has `step`. Give a torch module, or an "
            "object with step(input_ids, state) -> (logits, state)."
        )
    if _has(source, "get_state") and _has(source, "set_state"):
        return "get_set_state"
    parameters = inspect.signature(source.forward if isinstance(source, nn.Module) else source).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 or positional[1] in NOT_A_STATE:
        return "stateless"
    output = _first_output(type(source).__name__, "functional", source, lambda first_token: source(first_token, None))
    return "functional" if isinstance(output, tuple) and len(output) == 2 and output[1] is not None else "stateless"


def _has(source: Any, name: str) -> bool:
    """Whether it has a method of that name; a submodule is none, though it can be called."""
    found = getattr(source, name, None)
    return callable(found) and not isinstance(found, nn.Module)


def adapt(source: Any, *, spec: str, form: str | None = None, tokenizer: Any = None) -> Model:
    module = source if isinstance(source, nn.Module) else None
    before = _snapshot(module)  # before the first step, since an attribute may change with the first token only
    form = form or form_of(source)
    step_fn = STEP_FNS[form](source)
    logits = _first_output(spec, form, source, lambda first_token: step_fn(first_token, None, None)[0])
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ModelError(f"{spec} ({form}) returned {type(logits).__name__} for one token; expected logits [b, t, v].")
    getattr(step_fn, "close", lambda: None)()  # close the stream that this step opened
    vocab_size, codebooks = logits.shape[-1], codebooks_of(source)
    given = tokenizer if tokenizer is not None else getattr(source, "tokenizer", None)
    mutable_buffers = _changed(before, _snapshot(module), buffers=form in ("get_set_state", "streaming"))
    if module is not None:  # what an earlier call of `adapt` changed may not change again
        all_changed = MUTABLE_BUFFERS.value(module, dict).setdefault(form, set())
        all_changed |= mutable_buffers
        mutable_buffers = frozenset(all_changed)
    sizes = [getattr(part, name, None) for part in (module.modules() if module is not None else ()) for name in BOUNDARIES]
    return Model(
        step_fn,
        spec,
        form,
        stateful=form != "stateless",
        vocab_size=vocab_size,
        module=module,
        rebuild=STEP_FNS[form] if module is not None else None,
        tokenizer=tokenizer_for(given, vocab_size) if codebooks is None else None,
        context_length=getattr(source, "context_length", None),
        boundaries=tuple(sorted({n for n in sizes if isinstance(n, int) and not isinstance(n, bool) and n > 1})),
        constant_state=bool(getattr(source, "constant_state", False)),
        mutable_buffers=mutable_buffers,
        codebooks=codebooks,
        fast_weights=getattr(source, "fast_weights", None),
        source=source,
    )


def stateless(source: Any) -> StepFn:
    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        return _logits(source(input_ids)), None

    return step_fn


def functional(source: Any) -> StepFn:
    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        output, new_state = source(input_ids, state)
        return _logits(output), new_state

    return _with_packing(step_fn, source)


def step(source: Any) -> StepFn:
    names = inspect.signature(source.step).parameters
    keeps = "keep" in names or any(p.kind is p.VAR_KEYWORD for p in names.values())

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        output, new_state = source.step(input_ids, state, keep=keep) if keeps else source.step(input_ids, state)
        return _logits(output), new_state

    return _with_packing(step_fn, source)


def _with_packing(step_fn: Any, source: Any) -> StepFn:
    """The step, with the methods by which the source reads several sequences in one row, if it has them (see `Packing`)."""
    if all(_has(source, name) for name in PACKING):
        step_fn.packing = Packing(*(getattr(source, name) for name in PACKING))
    found: StepFn = step_fn
    return found


def get_set_state(module: Any) -> StepFn:
    resets = hasattr(module, "reset_state")
    # Without reset_state, keep the state from before the first token, in the module: a later copy of it needs it too.
    if not resets and not hasattr(module, "_lmeval_fresh"):
        module._lmeval_fresh = (fork(module.get_state()),)

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        if state is None and resets:
            module.reset_state()
        else:
            module.set_state(fork(module._lmeval_fresh[0]) if state is None else state)
        logits = _logits(module(input_ids))
        return logits, fork(module.get_state())  # a copy, since the module may go on writing to what it returned

    return step_fn


@dataclass(frozen=True)
class InternalState:
    """Stands for a state that the model keeps inside; valid until the model's next step. Cannot be pickled or copied."""

    steps: int

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("the model keeps its state inside, where it cannot be saved")


def streaming(module: Any) -> StepFn:
    """The step of modules with `streaming(batch_size)` and `step`, like kyutai's moshi.

    Without `get_streaming_state` and `set_streaming_state`, only the latest state can be continued.
    """
    if hasattr(module, "get_streaming_state") and hasattr(module, "set_streaming_state"):
        return _portable_streaming(module)
    open_stream = ExitStack()
    steps = 0

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        nonlocal steps
        steps += 1
        if state is None:
            open_stream.close()
            open_stream.enter_context(module.streaming(input_ids.shape[0]))
        elif state.steps != steps - 1:
            raise ModelError(
                f"{type(module).__name__} keeps its state inside, so it can read one sequence at a time, and was asked to go "
                "on from an earlier state. Give it get_streaming_state and set_streaming_state to fork or resume."
            )
        return _logits(module.step(input_ids)), InternalState(steps)

    weakref.finalize(step_fn, open_stream.close)  # close the last stream with the model
    step_fn.close = open_stream.close  # type: ignore[attr-defined]
    return step_fn


def _portable_streaming(module: Any) -> StepFn:
    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        with module.streaming(input_ids.shape[0]):
            if state is not None:
                module.set_streaming_state(state)
            logits = _logits(module.step(input_ids))
            return logits, fork(module.get_streaming_state())

    return step_fn


STEP_FNS = {make.__name__: make for make in (stateless, functional, step, get_set_state, streaming)}


def _logits(output: Any) -> Tensor:
    if isinstance(output, tuple):  # (logits, loss), as in nanoGPT
        output = output[0]
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _first_output(spec: str, form: str, source: Any, call: Callable[[Tensor], Any]) -> Any:
    """Call `call` with one token (id 0) of shape [1, 1], or [1, k, 1] for a model that reads frames."""
    module, codebooks = source if isinstance(source, nn.Module) else None, codebooks_of(source)
    shape = (1, 1) if codebooks is None else (1, len(codebooks.sizes), 1)
    first_token = torch.zeros(shape, dtype=torch.long, device=next((tensor.device for tensor in weights(module)), None))
    try:
        with torch.no_grad():
            return call(first_token)
    except Exception as error:
        raise ModelError(
            f"{spec}, stepped as {form!r}, raised {type(error).__name__} for one token (id 0, shape {list(shape)}): {error}. "
            f"Forms are {', '.join(STEP_FNS)}.{devices_note(module)}"
        ) from error


def _snapshot(module: nn.Module | None) -> dict[str, Any]:
    """Buffers and plain attributes by name: what reading may change."""
    if module is None:
        return {}
    return {**{name: buffer.clone() for name, buffer in module.named_buffers()}, **settings_of(module)}


def _changed(before: dict[str, Any], after: dict[str, Any], *, buffers: bool) -> frozenset[str]:
    """Names of what one token has changed; buffers only for forms that may keep their state in one."""

    def same(name: str) -> bool:
        old, new = before.get(name), after.get(name)
        if isinstance(old, Tensor) or isinstance(new, Tensor):
            return not buffers or (isinstance(old, Tensor) and isinstance(new, Tensor) and torch.equal(old, new))
        return bool(old == new)

    return frozenset(name for name in {*before, *after} if not same(name))
