"""Torch modules and other objects that are language models, each kind of state driven by one small function.

    stateless       logits = module(input_ids)
    functional      logits, state = module(input_ids, state)                  as nn.LSTM does
    get_set_state   module.set_state(state); logits = module(input_ids); state = module.get_state()
    streaming       with module.streaming(batch_size): logits = module.step(input_ids)
    step            logits, state = source.step(input_ids, state)             the protocol itself

Each function below returns the `step_fn` of a `Model` (see `_model.py`).
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
from pytest_lmeval.models._model import Model, State, StepFn, codebooks_of, fork, places, tokenizer_for, weights
from pytest_lmeval.models._weak_cache import WeakCache

# A second argument of one of these names is something else than a state.
NOT_A_STATE = frozenset({"targets", "target", "labels", "label", "attention_mask", "mask", "padding_mask", "key_padding_mask"})
HOLD_STATE = ("get_set_state", "streaming")  # forms whose state lies in the module, possibly in a buffer
MUTABLE_BUFFERS = WeakCache[dict[str, set[str]]]()  # of modules, by form: `Model.mutable_buffers`
BOUNDARIES = ("window", "window_size", "sliding_window", "kernel", "chunk_size", "mini_batch_size", "context", "block")


def form_of(source: Any) -> str:
    """Which of the forms above drives `source`; found by looking, and for a bare module by asking it for one token."""
    steps = _has(source, "step")
    if steps and _has(source, "streaming"):
        return "streaming"
    if steps:
        return "step"
    if not callable(source):
        raise ModelError(
            f"{type(source).__name__} is no language model that can be driven: it is neither callable nor has `step`. "
            "Give a torch module, or an object with step(input_ids, state) -> (logits, state)."
        )
    if _has(source, "get_state") and _has(source, "set_state"):
        return "get_set_state"
    return "functional" if _takes_state(source) and _returns_state(source) else "stateless"


def _has(source: Any, name: str) -> bool:
    """Whether it has a method of that name; a part of it that is a module is none, though it can be called."""
    found = getattr(source, name, None)
    return callable(found) and not isinstance(found, nn.Module)


def adapt(source: Any, *, spec: str, form: str | None = None, tokenizer: Any = None) -> Model:
    module = source if isinstance(source, nn.Module) else None
    before = _snapshot(module)  # before the first question, since an attribute may change with the first token only
    form = form or form_of(source)
    step_fn = STEP_FNS[form](source)
    logits = _ask(spec, form, lambda: step_fn(_one_token(source), None, None)[0], source)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ModelError(f"{spec} ({form}) returned {type(logits).__name__} for one token; expected logits [b, t, v].")
    getattr(step_fn, "close", lambda: None)()  # a stream that was opened to ask is closed again
    vocab_size, codebooks = logits.shape[-1], codebooks_of(source)
    given = tokenizer if tokenizer is not None else getattr(source, "tokenizer", None)
    mutable_buffers = _changed(before, _snapshot(module), buffers=form in HOLD_STATE)
    if module is not None:  # what changed when it was adapted before need not change again
        known = MUTABLE_BUFFERS.value(module, dict).setdefault(form, set())
        known |= mutable_buffers
        mutable_buffers = frozenset(known)
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
        boundaries=_borders(module),
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

    return step_fn


def step(source: Any) -> StepFn:
    names = inspect.signature(source.step).parameters
    keeps = "keep" in names or any(p.kind is p.VAR_KEYWORD for p in names.values())

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        output, new_state = source.step(input_ids, state, keep=keep) if keeps else source.step(input_ids, state)
        return _logits(output), new_state

    return step_fn


def get_set_state(module: Any) -> StepFn:
    # A module without reset_state is brought back to the state that it had before its first token; so is a copy of it, which is
    # made when it has read some.
    if not hasattr(module, "reset_state") and not hasattr(module, "_lmeval_fresh"):
        module._lmeval_fresh = (fork(module.get_state()),)
    fresh = None if hasattr(module, "reset_state") else module._lmeval_fresh[0]

    def step_fn(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        if state is not None:
            module.set_state(state)
        elif hasattr(module, "reset_state"):
            module.reset_state()
        else:
            module.set_state(fork(fresh))
        logits = _logits(module(input_ids))
        return logits, fork(module.get_state())  # a copy: it may have returned what it goes on writing to

    return step_fn


@dataclass(frozen=True)
class Held:
    """The state of a model that keeps its state to itself: a number, valid until the model's next step."""

    steps: int

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("the model keeps its state inside, where it cannot be saved")


def streaming(module: Any) -> StepFn:
    """Modules with `streaming(batch_size)` and `step`, like kyutai's moshi.

    Where the state can be taken out and put back (`get_streaming_state`, `set_streaming_state`) it is carried
    like any other. Where it cannot, there is one sequence at a time, and a state is used in its turn only.
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
                f"{type(module).__name__} keeps its streaming state inside and was asked to go on from an earlier one. "
                "It can read one sequence at a time. Give it get_streaming_state and set_streaming_state to fork or resume."
            )
        return _logits(module.step(input_ids)), Held(steps)

    weakref.finalize(step_fn, open_stream.close)  # the last stream ends with the model that read it
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


STEP_FNS: dict[str, Callable[[Any], StepFn]] = {
    "stateless": stateless,
    "functional": functional,
    "step": step,
    "get_set_state": get_set_state,
    "streaming": streaming,
}


def _logits(output: Any) -> Tensor:
    if isinstance(output, tuple):  # (logits, loss), as nanoGPT and its children return
        output = output[0]
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _one_token(source: Any) -> Tensor:
    """[1, 1] id 0, or [1, k, 1] of a model that reads frames."""
    device = next((tensor.device for tensor in weights(source)), None) if isinstance(source, nn.Module) else None
    codebooks = codebooks_of(source)
    shape = (1, 1) if codebooks is None else (1, len(codebooks.sizes), 1)
    return torch.zeros(shape, dtype=torch.long, device=device)


def _takes_state(source: Any) -> bool:
    parameters = inspect.signature(source.forward if isinstance(source, nn.Module) else source).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and positional[1].name not in NOT_A_STATE


def _ask(spec: str, form: str, question: Callable[[], Any], source: Any) -> Any:
    try:
        with torch.no_grad():
            return question()
    except Exception as error:
        raise ModelError(
            f"{spec} was asked for the logits of one token (id 0, shape {list(_one_token(source).shape)}) and raised "
            f"{type(error).__name__}: {error}. It was driven as {form!r}; forms are {', '.join(STEP_FNS)}."
            f"{places(source if isinstance(source, nn.Module) else None)}"
        ) from error


def _returns_state(source: Any) -> bool:
    output = _ask(type(source).__name__, "functional", lambda: source(_one_token(source), None), source)
    return isinstance(output, tuple) and len(output) == 2 and output[1] is not None


def _borders(module: nn.Module | None) -> tuple[int, ...]:
    parts = module.modules() if module is not None else ()
    found = [getattr(part, name, None) for part in parts for name in BOUNDARIES]
    return tuple(sorted({value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 1}))


def _snapshot(module: nn.Module | None) -> dict[str, Any]:
    """What reading may change although it should not matter: buffers and plain attributes."""
    if module is None:
        return {}
    return {**{name: buffer.clone() for name, buffer in module.named_buffers()}, **settings_of(module)}


def _changed(before: dict[str, Any], after: dict[str, Any], *, buffers: bool) -> frozenset[str]:
    """Names of what one token has changed; of buffers only for forms that may keep their state in one."""

    def same(name: str) -> bool:
        if isinstance(after[name], Tensor):
            return not buffers or (name in before and torch.equal(before[name], after[name]))
        return name in before and bool(before[name] == after[name])

    return frozenset(name for name in after if not same(name))
