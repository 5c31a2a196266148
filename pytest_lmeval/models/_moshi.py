"""Step the language models of the package `moshi` (kyutai), which read frames of text and audio codes.

`LMModel.forward` prepends an initial frame and delays the codes in each call, and `LMGen.step` returns no logits. So a step
calls the parts of both: `forward_text`, whose transformer carries a state, with the delayed frame before, and
`forward_depformer_training`, which starts fresh in each frame, with the delayed frame itself.

The package pins an older torch: pip install 'pytest-lmeval[moshi]' && pip install --no-deps moshi
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._model import Codebooks, Model, State, StepFn

ATTRIBUTES = ("forward_text", "forward_depformer_training", "n_q", "dep_q", "delays")


@dataclass
class StreamState:
    recent: Tensor  # [b, k, longest delay + 1] the last frames, undelayed
    parts: dict[str, Any]  # the streaming state of each submodule, by name


def is_moshi(source: Any) -> bool:
    """Whether it has the attributes of `moshi.models.LMModel`; does not import moshi."""
    return isinstance(source, nn.Module) and all(hasattr(source, name) for name in ATTRIBUTES)


def adapt(module: Any, *, spec: str) -> Model:
    """A `Model` that is scored on the audio codes of its own voice.

    Raises SpecError if it has none, is conditioned, or has no limited context (the size of its cache).
    """
    if not module.dep_q or module.context is None or module.fuser is not None:
        raise SpecError(
            f"{spec} cannot be streamed: it has {module.dep_q} codebooks of its own (at least one is scored), a context of "
            f"{module.context} frames (it must be limited), and {'a' if module.fuser is not None else 'no'} condition fuser "
            "(conditions are not supported)."
        )
    scored = tuple(range(module.audio_offset, module.audio_offset + module.dep_q))
    return Model(
        step_fn_of(module),
        spec,
        form="moshi",
        stateful=True,
        vocab_size=module.card,
        module=module,
        rebuild=step_fn_of,
        boundaries=(module.context,),
        constant_state=True,
        codebooks=Codebooks(
            sizes=(module.text_card, *[module.card] * module.n_q),
            scored=scored,
            delays=tuple(module.delays[book] for book in scored),
            gaps=module.zero_token_id == -1,
            recent=attrgetter("recent"),
        ),
        source=module,
    )


def step_fn_of(module: Any) -> StepFn:
    longest = max(module.delays)

    def step_fn(codes: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        t = codes.shape[2]
        if state is None:
            with module.streaming(codes.shape[0]):
                parts = module.get_streaming_state()
            before = module._get_initial_token().expand(codes.shape[0], -1, 1 + longest)
        else:
            before, parts = state.recent, state.parts
        frames = torch.cat([before, codes], dim=2)
        first = [longest - delay for delay in module.delays]
        delayed = torch.stack([frames[:, k, begin : begin + t + 1] for k, begin in enumerate(first)], dim=1)
        with streaming(module, parts, t if state is None else 0), uncompiled(module):
            hidden, _ = module.forward_text(delayed[:, :, :-1])
            logits = module.forward_depformer_training(delayed[:, :, 1:], hidden)
        return logits, StreamState(frames[:, :, -1 - longest :].clone(), parts)

    return step_fn


@contextmanager
def streaming(module: Any, parts: dict[str, Any], frames: int) -> Iterator[None]:
    """Continue from these states, which are overwritten, and remove them from the module afterwards.

    Ring buffers are enlarged to the length of a first chunk (`frames`), which is written before it is read and would overwrite
    itself; afterwards each holds what single steps would have left in it.
    """
    caches = [cache for part in parts.values() if (cache := getattr(part, "kv_cache", None)) and cache.capacity < frames]
    capacities = [cache.capacity for cache in caches]
    for cache in caches:
        cache.cache = cache.cache.new_zeros(*cache.cache.shape[:3], frames, cache.cache.shape[4])
        cache.capacity = frames
    module.set_streaming_state(parts)
    try:
        yield
    finally:
        module.set_streaming_state(dict.fromkeys(parts))
    for cache, capacity in zip(caches, capacities, strict=True):
        cache.cache = cache.cache[:, :, :, -capacity:].roll(frames % capacity, dims=3)
        cache.capacity = capacity


def uncompiled(module: Any) -> AbstractContextManager[None]:
    """Switch torch.compile off on a CPU, where the output norm would take half a minute to compile."""
    package: Any = sys.modules.get("moshi.utils.compile")
    return nullcontext() if package is None or module.device.type == "cuda" else package.no_compile()
