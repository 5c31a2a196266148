"""Read what named modules of a model return while the engine steps it: its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pytest_lmeval.errors import ModelError, some
from pytest_lmeval.models._model import State
from pytest_lmeval.models._tensors import whole

if TYPE_CHECKING:
    from pytest_lmeval.engine._engine import Engine


def hidden_states(
    engine: Engine, input_ids: Tensor, state: State, modules: Mapping[str, nn.Module], take: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], State]:
    """Step once. Returns what `take` makes of the output [b, t, d] of each module, by name, and the new state.

    Raises ModelError for a module that does not return one vector a token, or is not called once.
    """
    b, t = input_ids.shape[0], input_ids.shape[-1]
    with _captured(modules, lambda name, output: take(_vectors(name, output, b, t))) as found:
        _, state = engine.step(input_ids, state, keep=1)
    if missing := [name for name in modules if name not in found]:
        compiled = f" It is compiled by {engine.lm.compiled}, which leaves hooks out: load it without." * bool(
            engine.lm.compiled
        )
        raise ModelError(
            f"{some(missing)} of {engine.lm.spec}: not called in a step, so there are no hidden states of it. Name a module "
            f"that every token goes through.{compiled}"
        )
    return found, state


@contextmanager
def _captured(modules: Mapping[str, nn.Module], take: Callable[[str, Any], Tensor]) -> Iterator[dict[str, Tensor]]:
    """What `take(name, output)` makes of the output of each module in the block, by name."""
    found: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            if name in found:
                raise ModelError(
                    f"{name} is called several times in a step, so its hidden states are of several depths. Name the modules "
                    "around it, which are called once."
                )
            found[name] = take(name, output)

        return keep

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _vectors(name: str, output: Any, b: int, t: int) -> Tensor:
    """The output of a module as [b, t, d]: itself, the first of several, or the rows of all tokens."""
    first = output[0] if isinstance(output, tuple | list) and output else getattr(output, "last_hidden_state", output)
    if isinstance(first, Tensor) and first.is_floating_point():
        hidden: Tensor = whole(first.detach())
        if hidden.ndim == 2 and len(hidden) == b * t:
            return hidden.reshape(b, t, -1)
        if hidden.ndim == 3 and hidden.shape[:2] == (b, t):
            return hidden
    returned = f"shape {list(first.shape)} of {first.dtype}" if isinstance(first, Tensor) else type(first).__name__
    raise ModelError(
        f"{name} was called for {b} rows of {t} tokens and returned {returned}, where a vector for each token, [{b}, {t}, d], "
        "was expected. Name a module that returns one."
    )
