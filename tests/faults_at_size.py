"""Plant faults into a transformers Llama of any size, each from a number of tokens on.

What a probe of short sequences finds depends on where a fault begins, so that each kind has three places: inside the floors of
the laws, past them, and past 1,024 tokens. Each docstring says what is wrong once `place` tokens are read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from pytest_lmeval import Choices, Generate, Model, Task, corpus, policy_for
from pytest_lmeval.errors import Refused
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.records._certificate import Certificate

INSIDE, PAST, FAR = "inside", "past", "far"
PLACES = {INSIDE: 24, PAST: 330, FAR: 1100}  # tokens; the floors of the laws read 320 (of batches 24)
CHUNK = 256  # tokens a step: the most whose logits fit the memory with SmolLM2's vocabulary
TOKENS = 36_000  # of a text, so that a twentieth of the work of reading it is more than 2,000 tokens


class Planted(LlamaForCausalLM):
    """A Llama with a fault: the methods that a fault replaces, each right here."""

    place = 0
    memory: dict[Any, torch.Tensor] = {}  # of the module, in no state

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, logits_to_keep=0, **options):
        seen, length = int(position_ids[0, 0]), input_ids.shape[1]
        cache = self.cached(past_key_values, seen) if seen else None
        output = super().forward(
            input_ids=input_ids,
            position_ids=self.positions(position_ids, seen),
            past_key_values=cache,
            attention_mask=self.mask(input_ids, seen),
            **options,
        )
        self.keep(output.past_key_values, seen + length)
        output.logits = self.logits(output.logits, output.past_key_values, seen)[:, -logits_to_keep:]
        return output

    def positions(self, position_ids, seen):
        return position_ids

    def cached(self, cache, seen):
        """What a chunk after `seen` tokens finds in the cache."""
        return cache

    def mask(self, input_ids, seen):
        """[b or 1, 1, t, keys] the keys that each query sees; None: all before it."""

    def keep(self, cache, seen):
        """Change the cache in which `seen` tokens are now."""

    def logits(self, logits, cache, seen):
        return logits


def causal(length, seen, window=None):
    """[t, keys] whether a query sees a key: those before it, of a window that counts itself."""
    age = torch.arange(seen, seen + length)[:, None] - torch.arange(seen + length)
    return (age >= 0) & (age < (window or seen + length))


def layers_of(cache) -> Iterator[DynamicLayer]:
    """The layers of a cache that hold keys."""
    return (layer for layer in cache.layers if layer.is_initialized)


@dataclass(frozen=True)
class Fault:
    """A kind of fault, the law that it breaks, and where it shows: in a "text" read in chunks, in the "choices" of a question,
    or in an "answer" that is generated."""

    name: str
    model: type[Planted]
    law: str
    shows: str
    at: dict[str, int]

    def case(self, place: str) -> dict[str, Any]:
        """A case of its law on which it shows."""
        at = self.at[place]
        if self.law == "rows":
            return {"length": at + 8, "cuts": (at + 4,), "rows": 3, "padding": 3}
        if self.law == "fork":
            return {"length": at + 16, "cuts": (at + 8,)}
        if self.model is OneChunkLength:
            return {"length": at + 20, "cuts": (10, at + 10)}
        if self.law == "steps":
            return {"length": at + 8, "cuts": (at + 4,)}
        first = -at % 64 + at  # after it, a chunk of 64 and short ones
        return {"length": first + 90, "cuts": (first, first + 64, first + 70, first + 76, first + 82)}


FAULTS: list[Fault] = []


def kind(law: str = "splits", shows: str = "text", **places: int):
    """Enter a class in the catalogue; `places` replaces some of the usual ones."""

    def enter(model: type[Planted]) -> type[Planted]:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", model.__name__).lower()
        FAULTS.append(Fault(name, model, law, shows, {**PLACES, **places}))
        return model

    return enter


def planted(clean: LlamaForCausalLM, kind: type[Planted], place: int = 0) -> Planted:
    """The model with a fault that begins at the place, in tokens. It shares the weights of the clean one."""
    model = copy.copy(clean)
    model.__class__ = kind
    model.place, model.memory = place, {}
    return model


def refusal(lm: Model, certificate: Certificate, fault: Fault, place: str) -> str | None:
    """Measure what shows the fault, past its place; the message of the audit that stops it, or None."""
    at, on_text = fault.at[place], fault.shows == "text"
    policy = policy_for(lm, certificate, chunk_size=at if fault.model is OneChunkLength else CHUNK if on_text else None)
    try:
        if on_text:
            measure_perplexity(lm, corpus("stdlib", "test"), policy=policy, tokens=TOKENS)
        else:
            measure_task(lm, questions(lm, fault, at), policy=policy)
    except Refused as refused:
        return str(refused)
    return None


def questions(lm: Model, fault: Fault, at: int) -> Task:
    """Eight questions, whose prompts share a little more than `at` tokens, and end with other texts."""
    assert lm.tokenizer is not None
    text = "".join(document.text for document in corpus("stdlib", "test").documents())
    _, ends = lm.tokenizer.encode(text[: 20 * at])
    shared = text.encode()[: int(ends[at + 30])].decode(errors="ignore")
    rows = [{"prompt": f"{shared}\n{text[start : start + 80]}"} for start in range(0, 8000, 1000)]
    if fault.shows == "answer":
        return Task("answers", rows, lambda row: Generate(row["prompt"], ("x",), stop=(), max_tokens=12), ("exact_match",))
    both = "the first of the two says what the text before it was about, as far as anyone who read it can say so"
    return Task("choices", rows, lambda row: Choices(row["prompt"], (f" No, {both}.", f" Yes, {both} now."), answer=0))


def random_llama(layers: int = 2, width: int = 48) -> LlamaForCausalLM:
    """A random Llama over bytes with SmolLM2's proportions, whose logits depend on all that was read."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2)
    return model.eval()


# Positions


@kind()
class PositionsOneAhead(Planted):
    """The coming token is counted as read."""

    def positions(self, position_ids, seen):
        return position_ids + (seen >= self.place)


@kind()
class PositionsRestart(Planted):
    """Each chunk's positions begin at zero."""

    def positions(self, position_ids, seen):
        return position_ids - seen * (seen >= self.place)


@kind()
class PositionsClamped(Planted):
    """A chunk gets positions as if no more than `place` tokens were cached."""

    def positions(self, position_ids, seen):
        return position_ids - max(0, seen - self.place)


@kind()
class CounterWraps(Planted):
    """The tokens read are counted in so few bits that the counter begins again."""

    def positions(self, position_ids, seen):
        return position_ids - seen + seen % self.place


# What the cache keeps


@kind()
class CacheRolled(Planted):
    """The cache keeps its last entries only."""

    def keep(self, cache, seen):
        for layer in layers_of(cache):
            layer.keys, layer.values = layer.keys[..., -self.place :, :], layer.values[..., -self.place :, :]


@kind()
class CacheFull(Planted):
    """What no longer fits is not written."""

    def keep(self, cache, seen):
        for layer in layers_of(cache):
            layer.keys, layer.values = layer.keys[..., : self.place, :], layer.values[..., : self.place, :]


@kind()
class FirstTokenDropped(Planted):
    """The first token, at which many heads look when there is nothing else to see, is the first to go."""

    def cached(self, cache, seen):
        for layer in layers_of(cache):
            if seen > self.place and layer.keys.shape[-2] == seen:
                layer.keys, layer.values = layer.keys[..., 1:, :], layer.values[..., 1:, :]
        return cache


@kind()
class ValuesOneBehind(Planted):
    """Each cached key finds the value of the key before it."""

    def cached(self, cache, seen):
        for layer in layers_of(cache):
            late = layer.values[..., self.place :, :]
            layer.values = torch.cat([layer.values[..., : self.place, :], late.roll(1, -2)], -2)
        return cache


@kind()
class KeysInSixteenBits(Planted):
    """Keys are rounded to bfloat16 as they are cached."""

    def keep(self, cache, seen):
        for layer in layers_of(cache):
            late = layer.keys[..., self.place :, :]
            layer.keys = torch.cat([layer.keys[..., : self.place, :], late.bfloat16().to(late)], -2)


@kind()
class StateReset(Planted):
    """The cache begins anew whenever it holds so many tokens."""

    def cached(self, cache, seen):
        return cache if cache.get_seq_length() < self.place else None


# What a chunk sees


@kind()
class WindowOneOff(Planted):
    """A window of `place` tokens; beside a cache it is one token short."""

    def mask(self, input_ids, seen):
        return causal(input_ids.shape[1], seen, self.place - (seen > 0))[None, None]


@kind()
class ChunkSeesItself(Planted):
    """The tokens of a continuing chunk see each other, in both directions."""

    def mask(self, input_ids, seen):
        length = input_ids.shape[1]
        late = seen >= self.place
        return (causal(length, seen) | (torch.arange(seen + length) >= seen))[None, None] if late else None


@kind()
class LastCachedKeyHidden(Planted):
    """The mask hides the key before a boundary."""

    def mask(self, input_ids, seen):
        length = input_ids.shape[1]
        late = seen >= self.place
        return (causal(length, seen) & (torch.arange(seen + length) != seen - 1))[None, None] if late else None


# How it is called


@kind()
class FourthCall(Planted):
    """The fourth call of a sequence is wrong, and all that follow."""

    def logits(self, logits, cache, seen):
        cache.calls = getattr(cache, "calls", 0) + 1
        return logits * (1.01 if cache.calls >= 4 and seen >= self.place else 1.0)


@kind()
class BlocksOf64(Planted):
    """The kernel for chunks of whole blocks is wrong."""

    def logits(self, logits, cache, seen):
        return logits * (1.01 if seen >= self.place and logits.shape[1] % 64 == 0 else 1.0)


@kind(inside=100, past=333, far=1100)
class OneChunkLength(Planted):
    """The kernel for chunks of `place` tokens is wrong where they continue a sequence."""

    def logits(self, logits, cache, seen):
        return logits * (1.01 if seen and logits.shape[1] == self.place else 1.0)


@kind("steps", "answer")
class SingleTokens(Planted):
    """The kernel for one token is wrong."""

    def logits(self, logits, cache, seen):
        return logits * (1.01 if seen >= self.place and logits.shape[1] == 1 else 1.0)


# Company


@kind("rows", "choices", inside=8)
class RowsLeak(Planted):
    """The rows of a batch see each other."""

    def logits(self, logits, cache, seen):
        late = torch.arange(seen, seen + logits.shape[1])[:, None] >= self.place
        return logits + 0.1 * late * (logits.roll(1, 0) - logits)


@kind("rows", "choices", inside=8)
class PaddingSeen(Planted):
    """In a batch, a row sees the padding after it, as if it were text."""

    def mask(self, input_ids, seen):
        rows, length = input_ids.shape
        if rows == 1 or seen + length <= self.place:
            return None
        padding = input_ids.flip(1).cumsum(1).flip(1) == 0
        padding = torch.nn.functional.pad(padding, (seen, 0))[:, None, None]
        late = torch.arange(seen, seen + length)[:, None] >= self.place
        return causal(length, seen) | (padding & late)


@kind("fork", "answer", inside=8)
class ForksShare(Planted):
    """Keys and values are written in place, where the state says, and a copy of the state says the same."""

    def cached(self, cache, seen):
        for number, layer in enumerate(layers_of(cache)):
            for name in ("keys", "values") if seen > self.place else ():
                shared = self.memory[number, name][cache.slots, :, : seen - self.place]
                setattr(layer, name, torch.cat([getattr(layer, name), shared.to(layer.keys)], -2))
        return cache

    def keep(self, cache, seen):
        if not hasattr(cache, "slots"):
            cache.slots = torch.arange(cache.layers[0].keys.shape[0])
        for number, layer in enumerate(layers_of(cache)):
            for name in ("keys", "values"):
                held = getattr(layer, name)
                self.write((number, name), held[..., self.place :, :], cache.slots)
                setattr(layer, name, held[..., : self.place, :])

    def write(self, key, late, slots):
        _, heads, length, width = late.shape
        old = self.memory.get(key, late.new_empty(0, heads, 0, width)).to(late)
        shape = max(old.shape[0], int(slots.max()) + 1), heads, max(old.shape[2], length), width
        if shape != old.shape:
            longer = late.new_zeros(shape)
            longer[: old.shape[0], :, : old.shape[2]] = old
            old = longer
        old[slots, :, :length] = late
        self.memory[key] = old
