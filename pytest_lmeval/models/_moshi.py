"""The language models of the package `moshi` (kyutai): frames of text and audio codes, streamed as they were spoken.

`LMModel.forward` puts an initial frame before what it is given and delays the codes anew in each call, so it reads a whole
and no chunk of one; `LMGen.step` samples, and gives no logits. What both are made of can be streamed: the delayed frame
before goes through `forward_text`, whose transformer remembers, and the delayed frame itself through
`forward_depformer_training`, which begins anew in every frame.

The package is an extra with an instruction, since its pins ask for an older torch:

    pip install 'pytest-lmeval[moshi]' && pip install --no-deps moshi
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._model import Codebooks, Model, State, StepFn

LOOKS = ("forward_text", "forward_depformer_training", "n_q", "dep_q", "delays")


@dataclass
class StreamState:
    """What a model of this package carries.

    recent  the last frames as they were given [b, k, longest delay + 1]
    parts   the streaming state of each of its parts, by name
    """

    recent: Tensor
    parts: dict[str, Any]


def is_moshi(source: Any) -> bool:
    """Whether it looks like `moshi.models.LMModel`; never imports moshi to find out."""
    return isinstance(source, nn.Module) and all(hasattr(source, name) for name in LOOKS)


def adapt(module: Any, *, spec: str) -> Model:
    """The model, scored on the audio codes of its own voice. Raises SpecError for one that has none, or is conditioned on
    something else, or whose context has no limit: its cache is made of that size."""
    if not module.dep_q or module.context is None or module.fuser is not None:
        raise SpecError(
            f"{spec} cannot be streamed: it has {module.dep_q} codebooks of its own, a context of {module.context} frames, and "
            f"{'a' if module.fuser is not None else 'no'} condition fuser. It needs at least one codebook to score, a limited "
            "context, and no conditions."
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
            recent=recent,
        ),
        source=module,
    )


def recent(state: StreamState) -> Tensor:
    return state.recent


def step_fn_of(module: Any) -> StepFn:
    longest = max(module.delays)

    def step_fn(codes: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
        places = codes.shape[2]
        before, parts = (state.recent, state.parts) if state is not None else beginning(module, codes.shape[0])
        frames = torch.cat([before, codes], dim=2)
        first = [longest - delay for delay in module.delays]
        delayed = torch.stack([frames[:, k, begin : begin + places + 1] for k, begin in enumerate(first)], dim=1)
        with streaming(module, parts), wide(parts, places if state is None else 0), uncompiled(module):
            hidden, _ = module.forward_text(delayed[:, :, :-1])
            logits = module.forward_depformer_training(delayed[:, :, 1:], hidden)
        return logits, StreamState(frames[:, :, -1 - longest :].clone(), parts)

    return step_fn


def beginning(module: Any, rows: int) -> tuple[Tensor, dict[str, Any]]:
    """Initial codes, and the streaming states of a sequence that has not begun: they are made when `streaming` is called."""
    with module.streaming(rows):
        parts = module.get_streaming_state()
    return module._get_initial_token().expand(rows, -1, 1 + max(module.delays)), parts


@contextmanager
def streaming(module: Any, parts: dict[str, Any]) -> Iterator[None]:
    """Go on from these states, which are written to, and leave the module without any."""
    module.set_streaming_state(parts)
    try:
        yield
    finally:
        module.set_streaming_state(dict.fromkeys(parts))


@contextmanager
def wide(parts: dict[str, Any], places: int) -> Iterator[None]:
    """Make the empty rings of a new sequence as wide as its first piece, if that is longer than they are.

    A piece is written into a ring at once, before it is read, and one that is longer than the ring would overwrite itself.
    Afterwards each ring holds what single steps would have left in it.
    """
    caches = [cache for part in parts.values() if (cache := getattr(part, "kv_cache", None)) and cache.capacity < places]
    capacities = [cache.capacity for cache in caches]
    for cache in caches:
        cache.cache = cache.cache.new_zeros(*cache.cache.shape[:3], places, cache.cache.shape[4])
        cache.capacity = places
    yield
    for cache, capacity in zip(caches, capacities, strict=True):
        cache.cache = cache.cache[:, :, :, -capacity:].roll(places % capacity, dims=3)
        cache.capacity = capacity


def uncompiled(module: Any) -> AbstractContextManager[None]:
    """On a processor without torch.compile, as its layers have it; the norm after them would take half a minute to compile."""
    package: Any = sys.modules.get("moshi.utils.compile")
    return nullcontext() if package is None or module.device.type == "cuda" else package.no_compile()
