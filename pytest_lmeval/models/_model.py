"""Define the language model protocol, the checked `Model` that adapters return, and helpers for states.

Axes, here and in every docstring of the package:

    b  rows of a batch        t  tokens, or frames (time)        v  vocabulary
    k  codebooks              s  those of them that are scored
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pytest_lmeval.errors import ModelError, SpecError
from pytest_lmeval.models._packed_layers import packed_layers
from pytest_lmeval.models._served import Served
from pytest_lmeval.models._tensors import is_split, rounds_activations

State: TypeAlias = Any
"""Whatever a model carries from step to step: caches, recurrent states, the last inputs of a convolution. None: nothing yet."""

StepFn: TypeAlias = Callable[[Tensor, "State | None", "int | None"], tuple[Tensor, State]]
"""(input_ids, state, keep) -> (logits, new state), as adapters provide it. May ignore `keep` and return all logits."""


@runtime_checkable
class LanguageModel(Protocol):
    """A language model: any object with this method."""

    def step(self, input_ids: Tensor, state: State | None = None, *, keep: int | None = None) -> tuple[Tensor, State]:
        """Read `input_ids` after all that `state` has read.

        input_ids   [b, t] int64, or [b, k, t] for models with several codebooks; t >= 1
        state       what an earlier step returned; None at the beginning of a sequence. A step may overwrite its state: to
                    continue one state twice, `fork` it first.
        keep        return the logits of the last `keep` positions only (default: all)

        Returns logits [b, t, v], logits[:, i] predicting the token after input_ids[:, i], and the new state. Models with
        several codebooks return [b, s, t, v], predicting the frames that were read themselves (see `Codebooks`).
        """


class Tokenizer(Protocol):
    """Encodes text as ids, with the offset in the UTF-8 bytes of the text where each token ends.

    Optional attributes: `name`; `bos`, an id put before a text so that its first token is scored too; for tasks, `prefix`, the
    ids before every prompt (default: (bos,)); for generated answers, `decode(ids) -> text` (with U+FFFD for bytes that are no
    character), `eos`, the id that ends an answer (`ends`, if there are several), and `special`, id -> text of the tokens that
    `decode` leaves out.

    `encode` reads special tokens that are written in a text, "<|im_end|>", as the characters that they are. `special` lets
    records say that there were some; `with_special_tokens()` gives the tokenizer that reads them as control tokens, of which
    `special_tokens` is True.

    For questions in turns, `apply_chat_template(messages, add_generation_prompt=..., tokenize=False) -> text`, with messages
    {"role", "content"}. Where the beginning of an answer is given, it is the last message, of the assistant, and
    `continue_final_message=True` is passed too; so are the `chat_template_kwargs` of a task. `templates`, the names of several
    templates, and `template`, the text of the one that is rendered, let errors and notes say more.
    """

    def encode(self, text: str) -> tuple[Any, Any]:
        """Ids [t] and byte offsets [t] (integers): token i ends before byte offsets[i]; offsets[-1] is the text's size."""


class Bytes:
    """The tokenizer of a byte-level model: every byte of the UTF-8 text is a token, and its value is the id."""

    name = "bytes"
    bos = eos = None

    def encode(self, text: str) -> tuple[Any, Any]:
        ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        return ids, np.arange(1, len(ids) + 1)

    def decode(self, ids: Any) -> str:
        """Return the text, with U+FFFD for bytes that are not UTF-8 (an incomplete character)."""
        return bytes(map(int, ids)).decode(errors="replace")


def tokenizer_for(given: Any, vocab_size: int) -> Tokenizer | None:
    """The tokenizer `given`; bytes for `"bytes"`, and for None if the vocabulary has exactly 256 entries."""
    if given == "bytes" or (given is None and vocab_size == 256):
        return Bytes()
    if given is not None and not hasattr(given, "encode"):
        raise SpecError(f"{type(given).__name__} is no tokenizer: it has no encode(text) -> (ids, byte_ends).")
    tokenizer: Tokenizer | None = given
    return tokenizer


def with_special_tokens(lm: Model) -> Model:
    """The model, which reads special tokens that are written in a text as control tokens. Raises SpecError if it cannot."""
    reading = getattr(lm.tokenizer, "with_special_tokens", None)
    if reading is None:
        raise SpecError(
            f"special_tokens=True, and the tokenizer of {lm.spec} has no special tokens that a text could hold. Leave it out, "
            "or give the tokenizer a method `with_special_tokens()`."
        )
    return replace(lm, tokenizer=reading())


def special_pattern(lm: Model) -> re.Pattern[bytes] | None:
    """What finds a special token of the model's tokenizer in the UTF-8 bytes of a text; None if it knows none."""
    special = getattr(lm.tokenizer, "special", {}).values()
    longest_first = sorted((text.encode() for text in special if text), key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, longest_first))) if longest_first else None


@dataclass(frozen=True)
class Codebooks:
    """Codebooks of a model that reads frames of several codes [b, k, t], as Moshi does.

    Its logits [b, s, t, v] predict the frames that it reads, from all frames before and the codes before in the same frame.

    The model gets the codes undelayed and delays them itself: at position t, its logits for a codebook of delay d predict the
    code of frame t - d. Logits where t < d predict nothing and are ignored.

    sizes   entries of each codebook, [k]
    scored  indices of the codebooks that logits predict, [s], in the order in which the depth model reads them
    delays  frames by which each of these is delayed, [s]
    gaps    whether a code may be -1: no code, which is no input and no target
    recent  (state) -> the frames [b, k, d] read last, d at least the longest delay: their delayed codes are scored later
    """

    sizes: tuple[int, ...]
    scored: tuple[int, ...]
    delays: tuple[int, ...]
    gaps: bool = False
    recent: Callable[[State], Tensor] | None = None

    def targets(self, codes: np.ndarray, state: State | None) -> np.ndarray:
        """The codes [n, s] that logits predict when frames [n, k] are read after `state`; -1 where they predict none."""
        longest = max(self.delays)
        before = np.full((longest, len(self.sizes)), -1)
        if longest and state is not None and self.recent is not None:
            before = self.recent(state)[0, :, -longest:].T.cpu().numpy()
        frames = np.concatenate([before, codes])
        frames = np.where(frames < self.sizes, frames, -1)  # initial codes, from before the first frame
        columns = zip(self.scored, self.delays, strict=True)
        return np.stack([frames[longest - delay : len(frames) - delay, book] for book, delay in columns], axis=1)


def codebooks_of(source: Any) -> Codebooks | None:
    """Read the attribute `codebooks` of a model (fields as in `Codebooks`) and its method `recent`; None if it has none.

    Raises ModelError if they contradict each other.
    """
    own: Any = getattr(source, "codebooks", None)
    if not all(hasattr(own, name) for name in ("sizes", "scored", "delays")):
        return None
    sizes, scored, delays = (tuple(part) for part in (own.sizes, own.scored, own.delays))
    found = Codebooks(sizes, scored, delays, bool(getattr(own, "gaps", False)), getattr(source, "recent", None))
    if len(scored) != len(delays) or not set(scored) <= set(range(len(sizes))) or (max(delays) and found.recent is None):
        raise ModelError(
            f"{type(source).__name__} reads frames of {len(sizes)} codes, and says that codebooks {list(scored)} are scored, "
            f"delayed by {list(delays)}. Each scored codebook needs one delay, and a model with delays needs a method "
            "recent(state) -> the frames [b, k, longest delay] read last."
        )
    return found


@dataclass(frozen=True)
class Packing:
    """How a model reads tokens of several sequences in one row, each with its own past; an attribute of its `step_fn`.

    The state has a column for each token that it has read. Column c + i is that of token i of those that are read after c.

    step  (input_ids [1, t], state, positions [t], visible [t, c + t], wanted [n], more) -> (logits [n, v], new state): token i
          is at position positions[i] of its sequence, and sees the columns j where visible[i, j]; the logits are those of the
          tokens `wanted`. Only if `more` is there a new state; otherwise the state given stays as it is
    take  (state, columns [m]) -> a state of these columns, which shares no storage with it
    join  ([states]) -> a state of the columns of all, in order
    """

    step: Callable[[Tensor, State | None, Tensor, Tensor, Tensor, bool], tuple[Tensor, State]]
    take: Callable[[State, Tensor], State]
    join: Callable[[Sequence[State]], State]


@dataclass(frozen=True, repr=False)
class Model:
    """A language model that can be stepped, with the facts that records need.

    step_fn         the step, by an adapter
    spec            the name that the user gave
    form            the adapter
    stateful        whether it carries a state; if not, it is scored in windows
    module          its torch module, if it has one
    rebuild         makes `step_fn` for a copy of the module (the float64 copy that is the reference)
    context_length  most tokens of a sequence (learned or trained positions); None: no known limit
    boundaries      lengths at which its computation changes (window, kernel, block)
    constant_state  whether it declares that its state does not grow with the text; the law `size` tests that
    mutable_buffers names of buffers and attributes that reading changes
    codebooks       how it reads frames of several codes; None: it reads single tokens
    fast_weights    (state) -> name -> tensor: the weights that reading changes; for None, those before the first token
    source          the object of the user
    built_by        the function of a spec that built it; its code is part of who the model is
    unused_weights  names of tensors of its checkpoint that it has no place for
    loaded          (name, text) pairs that its source tells of what was loaded and how: adapter, revision, attention, ...
    bytes_before    size of the module's tensors before its precision was set; None: it was not set
    compiled        the backend of torch.compile that `step_fn` was compiled with; "" if it was not
    found_limit     most tokens of a sequence as the probe found it, if none is declared; not part of the fingerprint
    classes         of a classifier: the choices that its logits are over, in place of a vocabulary (see `models._classifier`)

    `dataclasses.replace` gives another value of the same loaded model, which is identified by `step_fn`.
    """

    step_fn: StepFn
    spec: str
    form: str
    stateful: bool
    vocab_size: int
    module: nn.Module | None = None
    rebuild: Callable[[nn.Module], StepFn] | None = None
    tokenizer: Tokenizer | None = None
    context_length: int | None = None
    boundaries: tuple[int, ...] = ()
    constant_state: bool = False
    mutable_buffers: frozenset[str] = frozenset()
    codebooks: Codebooks | None = None
    fast_weights: Callable[[State | None], dict[str, Tensor]] | None = None
    source: Any = None
    built_by: Any = None
    unused_weights: tuple[str, ...] = ()
    loaded: tuple[tuple[str, str], ...] = ()
    bytes_before: int | None = None
    compiled: str = ""
    found_limit: int | None = None
    classes: tuple[str, ...] = ()

    def step(self, input_ids: Tensor, state: State | None = None, *, keep: int | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.step`. Raises ModelError if logits have another shape, or a stateful model returns no state."""
        positions = input_ids.shape[-1]
        scored = () if self.codebooks is None else (len(self.codebooks.scored),)
        expected = (input_ids.shape[0], *scored, positions if keep is None else keep)
        logits, new_state = self.step_fn(input_ids, state, keep)
        if not isinstance(logits, Tensor):
            raise ModelError(f"{self.spec} returned {type(logits).__name__} where logits (a tensor) were expected.")
        if keep is not None and logits.ndim > 1 and logits.shape[-2] == positions:
            logits = logits[..., positions - keep :, :]
        if tuple(logits.shape[:-1]) != expected:
            raise ModelError(
                f"{self.spec} was given input_ids of shape {list(input_ids.shape)} and returned logits of shape "
                f"{list(logits.shape)}; expected {[*expected, self.vocab_size]}: one row of logits for each position. "
                "Return the logits of every position and of every sequence."
            )
        if self.stateful and new_state is None:
            raise ModelError(
                f"{self.spec} ({self.form}) returned no state after {positions} token(s): the next chunk would be read as if "
                "nothing came before. Return the new state, or, if it has none, load it with form='stateless'."
            )
        return logits, new_state

    @property
    def packing(self) -> Packing | None:
        """How it reads several sequences in one row; None if it cannot."""
        found: Packing | None = getattr(self.step_fn, "packing", None)
        return found

    @property
    def served(self) -> Served | None:
        """How sequences are scored and answered where there are no logits; None for a model that steps."""
        found: Served | None = getattr(self.step_fn, "served", None)
        return found

    def packed_step(
        self, input_ids: Tensor, state: State | None, positions: Tensor, visible: Tensor, wanted: Tensor, *, more: bool = False
    ) -> tuple[Tensor, State]:
        """See `Packing.step`. Raises ModelError if it has none, or returns logits of another shape."""
        if self.packing is None:
            raise ModelError(f"{self.spec} ({self.form}) does not read several sequences in one row: it has no `packing`.")
        logits, new_state = self.packing.step(input_ids, state, positions, visible, wanted, more)
        if tuple(logits.shape) != (len(wanted), self.vocab_size):
            raise ModelError(
                f"{self.spec} returned logits of shape {list(logits.shape)} for {len(wanted)} of {input_ids.shape[-1]} tokens "
                f"that were read in one row; expected {[len(wanted), self.vocab_size]}."
            )
        return logits, new_state

    def random_ids(self, rows: int, length: int, *, seed: int = 0) -> Tensor:
        """Ids [b, t], or codes [b, k, t], drawn uniformly from each vocabulary, on the device of the model."""
        generator = torch.Generator().manual_seed(seed)
        sizes = (self.vocab_size,) if self.codebooks is None else self.codebooks.sizes
        drawn = torch.stack([torch.randint(0, size, (rows, length), generator=generator) for size in sizes], dim=1)
        return (drawn[:, 0] if self.codebooks is None else drawn).to(self.device)

    def __repr__(self) -> str:
        return f"<{self.spec}: {self.form}, {self.dtype} on {self.device}>"

    @property
    def spans_ranks(self) -> bool:
        """Whether each process of a distributed run holds a part of its weights, so that all have to step it together."""
        return self.module is not None and any(is_split(tensor) for tensor in self.module.parameters())

    @property
    def limit(self) -> int | None:
        """Most tokens of a sequence, as declared, or else as the probe found; None: no known limit."""
        return self.found_limit if self.context_length is None else self.context_length

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in weights(self.module)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest precision that it computes in: that of the unpacked weights, or that packed layers name; bfloat16 if
        activations are rounded to eight bits. Of a served model, as the server tells; bfloat16 if it does not."""
        if self.served is not None:
            told: torch.dtype = getattr(torch, self.served.facts.dtype or "bfloat16", torch.bfloat16)
            return told
        found = {torch.bfloat16 if rounds_activations(tensor) else tensor.dtype for tensor in weights(self.module)}
        for _, _, weight in () if self.module is None else packed_layers(self.module):
            found |= {torch.bfloat16 if weight.rounds else weight.computes or torch.float32}
        floats = found & {torch.float64, torch.float32, torch.bfloat16, torch.float16}
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def weights(module: nn.Module | None) -> Iterator[Tensor]:
    """Yield the parameters, then the buffers."""
    if module is not None:
        yield from module.parameters()
        yield from module.buffers()


def multiplied(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the weights in matrix products: parameters of two dimensions or more, except embeddings (and
    heads tied to one), depthwise convolutions, and vectors stored with extra dimensions of size one."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)}
    filters = {id(part.weight) for part in module.modules() if isinstance(part, _ConvNd) and part.weight.shape[1] == 1}
    for name, tensor in module.named_parameters():
        if tensor.ndim > 1 and min(tensor.shape[-2:]) > 1 and id(tensor) not in tables | filters:
            yield name, tensor


def devices_note(module: nn.Module | None) -> str:
    """The devices of a module's tensors as the end of an error message; empty if it is one device with memory."""
    counts = Counter(str(tensor.device) for tensor in weights(module))
    if len(counts) < 2 and "meta" not in counts:
        return ""
    listed = ", ".join(f"{n} tensors on {device}" for device, n in counts.items())
    return f" Its weights lie on {'several devices' if len(counts) > 1 else 'a device without memory'}: {listed}."


def fork(state: State) -> State:
    """A copy that shares no storage with `state`, so that each can be continued independently."""
    memo: dict[int, Any] = {}
    for part in _walk(state):
        if isinstance(part, Tensor):
            memo[id(part)] = part.detach().clone()
        elif isinstance(part, nn.Module):
            memo[id(part)] = part
    return copy.deepcopy(state, memo)


def state_bytes(state: State) -> int:
    """Bytes of memory that the state keeps alive: whole storages, each counted once."""
    return sum(state_storages(state).values())


def state_storages(state: State) -> dict[int, int]:
    """Address -> bytes of each storage that the state keeps alive."""
    tensors = [part for part in _walk(state) if isinstance(part, Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def state_dtypes(state: State) -> list[str]:
    """Sorted dtypes of the tensors of a state, such as float32."""
    return sorted({str(part.dtype).removeprefix("torch.") for part in _walk(state) if isinstance(part, Tensor)})


def state_types(state: State) -> set[type]:
    """The classes of all objects in a state."""
    return {part if isinstance(part, type) else type(part) for part in _walk(state)}


def _walk(value: Any) -> Iterator[Any]:
    """Yield all objects in containers and plain objects; not those in modules, which a state does not own."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if item is None or isinstance(item, str | bytes | int | float | complex) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, Tensor | nn.Module | type):
            continue
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        if hasattr(item, "__dict__") and not callable(item):
            stack.extend(vars(item).values())
