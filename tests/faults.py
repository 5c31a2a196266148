"""A catalogue of planted faults: models of clean_models.py, each with one thing wrong, most of them seen in real systems.

Each docstring says what is wrong. F1 to F29 are the kinds of fault that any check of streaming should find; "+" are further
ones. All of them run without raising and give finite numbers.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from clean_models import (
    WIDTH,
    Attention,
    Blocked,
    CausalBK,
    Experts,
    GetSet,
    LinearAttention,
    Recurrent,
    Selective,
    Windowed,
    norm,
    scan,
)
from torch import nn


@dataclass(frozen=True)
class Fault:
    """A model with a fault of a kind, "F1" to "F29" or "+", and the laws that it breaks by construction."""

    name: str
    kind: str
    model: Callable[[], nn.Module]
    breaks: frozenset[str]


FAULTS: list[Fault] = []


def planted(kind: str, *breaks: str):
    """Enter a class in the catalogue."""

    def enter(model):
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", model.__name__).lower().replace("_", "-")
        FAULTS.append(Fault(name, kind, model, frozenset(breaks)))
        return model

    return enter


def method(base: type[nn.Module], name: str, kind: str, *breaks: str, **attributes):
    """Enter a `base` whose method `name` is replaced by the function, which gets the right method after `self`."""

    def enter(wrong):
        def replaced(self, *args):
            return wrong(self, getattr(super(model, self), name), *args)

        replaced.__signature__ = inspect.signature(getattr(base, name))
        model = type(wrong.__name__, (base,), {name: replaced, "__module__": __name__, **attributes})
        return planted(kind, *breaks)(model)

    return enter


# Positions


@method(Attention, "positions", "F1", "splits", "steps")
def positions_one_ahead(self, right, seen, t, layer):
    """After a boundary positions are one too high: the coming token is counted as read."""
    return right(seen + 1 if seen else 0, t, layer)


@method(Attention, "positions", "F2", "splits", "steps")
def positions_restart(self, right, seen, t, layer):
    """Each chunk's positions begin at zero (bamba in transformers 5.23; transformers#15751)."""
    return right(0, t, layer)


@method(Attention, "positions", "+", "splits")
def positions_advance_twice(self, right, seen, t, layer):
    """The first layer moves the counter that the second reads; equal chunks hide it (fla#747)."""
    return right(seen + layer * t, t, layer)


@method(Attention, "count", "+", "rows")
def positions_count_rows(self, right, seen, input_ids):
    """The tokens of all rows are counted as read in each."""
    return seen + input_ids.numel()


@method(Attention, "positions", "+", "splits", "steps")
def counter_wraps(self, right, seen, t, layer):
    """The tokens read are counted in eight bits, so that position 128 becomes -128."""
    return right((seen + 128) % 256 - 128, t, layer)


@planted("+", "fork", "resume")
class CounterInModule(Attention):
    """Keys are in the state, but their number is in the module (as mamba-ssm leaves it to its caller)."""

    read = 0

    def positions(self, seen, t, layer):
        self.read = self.read if seen else 0
        return super().positions(self.read, t, layer)

    def count(self, seen, input_ids):
        self.read += input_ids.shape[1]
        return self.read


@method(Attention, "join", "+", "splits", "steps")
def cached_keys_turned_again(self, right, cache, key, value):
    """Cached keys are rotated once more whenever they are used."""
    if cache is not None:
        keys = cache[0]
        cache = self.rotate(keys, torch.arange(keys.shape[-2]), None), cache[1]
    return right(cache, key, value)


@method(Attention, "frequencies", "F22", "prefix", "splits", "steps")
def base_follows_length(self, right, total):
    """Rotary frequencies depend on the number of tokens in all (dynamic NTK; transformers#25104)."""
    return right(total) * min(1.0, 16 / total)


@method(Attention, "frequencies", "F22", "splits", "steps", "isolation", longest=16)
def base_is_stale(self, right, total):
    """As above, and they stay as the longest text left them until a short one is read (dynamic_rope_update)."""
    self.longest = 16 if total < 16 else max(self.longest, total)
    return right(total) * 16 / self.longest


@method(Attention, "frequencies", "F22", "isolation", longest=16)
def base_never_falls_back(self, right, total):
    """As above, for ever: nothing shows once the longest text has been read."""
    self.longest = max(self.longest, total)
    return right(total) * 16 / self.longest


@method(Attention, "weigh", "+", "prefix", "splits", "steps")
def sharper_with_length(self, right, layer, scores):
    """Scores are scaled by the logarithm of all tokens read, not of those that each query sees (Qwen's logn attention)."""
    return right(layer, scores * math.log(8 + scores.shape[-1], 16))


# What a cache keeps


@method(Attention, "forward", "F3", "splits")
def prefill_starts_over(self, right, input_ids, state=None):
    """A call of more than one token is taken for the beginning of a sequence (mlxcel#1749)."""
    return right(input_ids, state if input_ids.shape[1] == 1 else None)


@method(Attention, "forward", "+", "splits", "steps")
def forgets_after_hundred(self, right, input_ids, state=None):
    """A cache that would hold more than a hundred tokens is emptied."""
    return right(input_ids, state if state and state[0] + input_ids.shape[1] <= 100 else None)


@method(Attention, "remember", "+", "splits", "steps")
def cache_clamped(self, right, keys, values):
    """The cache keeps its last 64 entries and says nothing (a stray sliding_window in a config does this to GPT-2)."""
    return keys[..., -64:, :], values[..., -64:, :]


@method(Attention, "remember", "+", "splits", "steps")
def cache_full(self, right, keys, values):
    """What no longer fits into a cache of 64 is not written, so that later chunks do not see it."""
    return keys[..., :64, :], values[..., :64, :]


@method(Attention, "remember", "+", "splits", "steps")
def last_key_not_kept(self, right, keys, values):
    """The last token of a call is left to be written by the next, as generate does, which never comes."""
    return keys[..., :-1, :], values[..., :-1, :]


@method(Attention, "join", "+", "splits", "steps")
def values_one_behind(self, right, cache, key, value):
    """Each cached key finds the value of the key before it."""
    return right(cache and (cache[0], cache[1].roll(1, -2)), key, value)


@method(Attention, "forward", "+", "splits", "steps")
def cache_of_first_layer(self, right, input_ids, state=None):
    """Every layer reads the cache of the first (an index that defaults to 0)."""
    return right(input_ids, state and (state[0], (state[1][0],) * self.layers))


@method(Attention, "remember", "+", "splits", "steps")
def cache_in_sixteen_bits(self, right, keys, values):
    """Keys and values are rounded to bfloat16 as they are cached."""
    return keys.bfloat16().to(keys), values.bfloat16().to(values)


@method(Windowed, "remember", "F7", "splits", "steps")
def evicts_one_too_many(self, right, keys, values):
    """The cache keeps one key less than the window needs."""
    keys, values = right(keys, values)
    return keys[..., -(self.window - 2) :, :], values[..., -(self.window - 2) :, :]


@method(Windowed, "remember", "F7", "steps")
def evicts_one_too_few(self, right, keys, values):
    """The cache keeps one key more than the window allows, and one token at a time sees it."""
    return keys[..., -self.window :, :].clone(), values[..., -self.window :, :].clone()


@method(Windowed, "join", "F8", "splits")
def evicts_before_attention(self, right, cache, key, value):
    """Old keys make room for a chunk before its first tokens have seen them (fla's window layers; vllm#4057)."""
    keys, values = right(cache, key, value)
    room = max(self.window, key.shape[-2])
    return keys[..., -room:, :], values[..., -room:, :]


@method(Windowed, "mask", "F8", "splits", "steps", "prefix")
def ring_overflows(self, right, t, keys):
    """A ring as long as the window is written before it is read, and holds only the last tokens of a longer chunk
    (executorch#20346, moshi's RingKVCache)."""
    return right(t, keys) & (torch.arange(keys) >= keys - self.window)


@method(Windowed, "remember", "+", "steps", "size", window=1)
def minus_zero(self, right, keys, values):
    """With a window of one, the slice that should keep nothing is `-0:` and keeps all (transformers 5.23)."""
    return keys[..., -(self.window - 1) :, :].clone(), values[..., -(self.window - 1) :, :].clone()


@planted("F28", "size")
class NothingEvicted(Windowed):
    """Keys that have left the window are hidden by the mask, and kept (transformers: a cache made without its config)."""

    def mask(self, t, keys):
        age = self.age(t, keys)
        return (age >= 0) & (age < self.window)

    def remember(self, keys, values):
        return keys, values


@method(Windowed, "weigh", "+", "steps")
def no_sink_in_steps(self, right, layer, scores):
    """The kernel for one token has no sink."""
    return scores.softmax(-1) if scores.shape[-2] == 1 else right(layer, scores)


# Masks, and the future


@method(Attention, "mask", "F9", "splits")
def chunk_sees_itself(self, right, t, keys):
    """Beside a cache there is no mask, so that a chunk's tokens see each other."""
    return right(t, keys) | (keys > t)


@method(Attention, "mask", "F10", "splits", "steps")
def last_cached_key_hidden(self, right, t, keys):
    """The mask hides the key just before the boundary (Llama 4 chunked attention, transformers#37414, was one off)."""
    return right(t, keys) & (torch.arange(keys) != keys - t - 1)


@method(Attention, "mask", "+", "splits")
def mask_one_off(self, right, t, keys):
    """Beside a cache each query sees one key too many (mlx-swift-lm#39)."""
    return self.age(t, keys) >= -(keys > t)


@method(Attention, "mask", "+", "splits", "steps")
def mask_without_offset(self, right, t, keys):
    """A square mask is aligned to the wrong corner of the scores (llama#899; is_causal=True with a cache)."""
    return torch.ones(t, keys, dtype=torch.bool).tril()


@method(Attention, "mask", "F20", "causality", "splits", "steps")
def sees_next(self, right, t, keys):
    """Each token sees the next, if it is there."""
    return self.age(t, keys) >= -1


@method(Attention, "mask", "F20", "causality", "splits", "steps")
def sees_all(self, right, t, keys):
    """No mask at all; such models have fine perplexities (transformers#48745, nanochat#844)."""
    return torch.ones(t, keys, dtype=torch.bool)


@method(CausalBK, "resolve", "F21", "causality", "splits", "steps")
def two_sided(self, right, diagonal, carried):
    """The resolvent sums both sides; the future weighs four times less with each position (ResNet-BK as published)."""
    left = self.sweep(diagonal, carried)
    future = F.pad(self.sweep(diagonal.flip(1), torch.zeros_like(carried)).flip(1)[:, 1:], (0, 1))
    return (left.reciprocal() - future).reciprocal(), left[:, -1]


@method(Recurrent, "logits", "F21", "causality", "splits", "steps")
def leaks_faintly(self, right, hidden):
    """A thousandth of the future is seen, four times less with each position."""
    position = torch.arange(hidden.shape[1])
    reach = 1e-3 * torch.triu(0.25 ** (position - position[:, None]).abs(), 1).to(hidden)
    return right(hidden + reach @ hidden)


@method(LinearAttention, "logits", "+", "causality", "splits", "steps")
def norm_over_time(self, right, hidden):
    """The last norm takes its scale from the whole chunk (a GroupNorm over [b, c, t])."""
    return self.head(hidden * hidden.square().mean((1, 2), keepdim=True).rsqrt())


@method(Selective, "logits", "+", "causality", "splits", "rows")
def one_scale_for_all(self, right, hidden):
    """Activations are quantized to eight bits with one scale for a whole call, all rows and positions."""
    scale = hidden.abs().max() / 127
    return right((hidden / scale).round() * scale)


# Convolutions and recurrences


@method(LinearAttention, "forward", "F3", "splits", "steps")
def state_dropped(self, right, input_ids, state=None):
    """A state is returned, and never read (fla#285; transformers#46741)."""
    return right(input_ids, None)


@method(Selective, "scan", "F4", "splits")
def recurrence_dropped(self, right, decay, drive, memory):
    """The convolution goes on and the recurrence starts over (mamba, jamba, zamba in transformers 5.23)."""
    return right(decay, drive, memory if drive.shape[1] == 1 else torch.zeros_like(memory))


@method(Selective, "join", "F5", "splits")
def convolution_dropped(self, right, tail, x):
    """The recurrence goes on and the convolution starts over (transformers#45513)."""
    return right(tail if x.shape[1] == 1 else torch.zeros_like(tail), x)


@method(Selective, "tail", "F6", "splits", "steps")
def tail_shifted(self, right, inputs, t):
    """The convolution's tail is taken one position too early."""
    return right(F.pad(inputs, (0, 0, 1, -1)), t)


@method(Selective, "tail", "F6", "splits", "steps")
def tail_of_short_chunk(self, right, inputs, t):
    """A chunk shorter than the tail leaves zeros in it instead of what came before (vllm#56196)."""
    return right(F.pad(inputs[:, -t:], (0, 0, self.kernel - 1, 0)), t)


@method(Selective, "tail", "+", "splits")
def tail_of_equal_chunk(self, right, inputs, t):
    """A chunk exactly as long as the kernel is taken for a shorter one, and leaves its beginning."""
    return right(inputs[:, :-1] if t == self.kernel else inputs, t)


@method(Selective, "join", "+", "splits", "causality")
def convolution_wraps(self, right, tail, x):
    """Done by an FFT that is padded to a power of two, the convolution of just so many tokens wraps around."""
    t = x.shape[1]
    return right(x[:, 1 - self.kernel :] if t in (4, 8, 16, 32, 64, 128) else tail, x)


@method(Selective, "tail", "F28", "size")
def tail_of_all(self, right, inputs, t):
    """The convolution's tail is never cut; the numbers are right."""
    return inputs


@method(Selective, "carry", "F11", "splits", "steps")
def memory_in_sixteen_bits(self, right, memory, t):
    """The recurrent state is returned in bfloat16 (vllm#13466)."""
    return memory.bfloat16().to(memory)


@method(Selective, "carry", "+", "steps")
def memory_in_sixteen_bits_in_steps(self, right, memory, t):
    """The kernel for one token stores bfloat16 (mlx-lm#988)."""
    return memory.bfloat16().to(memory) if t == 1 else memory.clone()


@method(Selective, "time_step", "F17", "steps")
def clamped_in_steps(self, right, x):
    """The time step has a smallest value when tokens come one at a time (nemotron_h, zamba2 in transformers 5.23)."""
    return right(x).clamp(min=0.02 if x.shape[1] == 1 else 0)


@method(Selective, "discretise", "F18", "splits")
def other_formula_from_64(self, right, x):
    """64 tokens and more go through a kernel that discretises otherwise."""
    decay, drive, read = right(x)
    exact = (1 - decay) / (self.time_step(x)[..., None] * self.rates())
    return decay, drive * exact if x.shape[1] >= 64 else drive, read


@method(LinearAttention, "gates", "F18", "splits")
def other_formula_above_64(self, right, x):
    """More than 64 tokens go through a kernel that limits how fast is forgotten (fla changes kernels there)."""
    return right(x).clamp(min=0.1 if x.shape[1] > 64 else 0)


@method(Selective, "scan", "+", "splits", "steps")
def blocks_forget(self, right, decay, drive, memory):
    """Inside a call, blocks of 16 hand on only what the last one added (transformers#35154)."""
    parts = []
    for kept, new in zip(decay.split(16, 1), drive.split(16, 1), strict=True):
        parts.append(scan(kept, new, memory))
        memory = scan(kept, new, torch.zeros_like(memory))[:, -1]
    return torch.cat(parts, 1)


@method(Selective, "scan", "+", "splits")
def whole_blocks_only(self, right, decay, drive, memory):
    """A state is continued only by chunks that are a multiple of the kernel's block (TensorRT-LLM#6334)."""
    t = drive.shape[1]
    return right(decay, drive, memory if t == 1 or t % 8 == 0 else torch.zeros_like(memory))


@method(Selective, "forward", "+", "splits")
def first_token_only(self, right, input_ids, state=None):
    """Of a chunk that continues a state, only the first token is read (transformers#46032)."""
    logits, state = right(input_ids if state is None else input_ids[:, :1], state)
    return logits.expand(-1, input_ids.shape[1], -1), state


@method(LinearAttention, "carry", "+", "splits", "steps")
def divisor_restarts(self, right, state):
    """The sum is carried, and its divisor is not."""
    return F.pad(state[..., :-1], (0, 1))


@method(CausalBK, "carry", "+", "splits", "steps")
def imaginary_part_lost(self, right, carried):
    """A complex state is kept in a real buffer."""
    return torch.complex(carried.real, torch.zeros_like(carried.real))


@method(Recurrent, "forward", "F11", "splits", "steps")
def state_rounded(self, right, input_ids, state=None):
    """The state is rounded to bfloat16 at each boundary."""
    logits, state = right(input_ids, state)
    return logits, state.bfloat16().to(state)


@method(Recurrent, "forward", "+", "splits")
def odd_chunk(self, right, input_ids, state=None):
    """Tokens are read in pairs, and the last one of an odd chunk does not enter the state."""
    t = input_ids.shape[1]
    logits, after = right(input_ids, state)
    return logits, right(input_ids[:, :-1], state)[1] if t > 1 and t % 2 else after


@method(Recurrent, "forward", "+", "splits", "steps")
def zero_starts_over(self, right, input_ids, state=None):
    """A chunk that begins with token 0 is taken for the beginning of a text."""
    return right(input_ids, None if state is None else state * (input_ids[:, :1] != 0).to(state))


@method(Recurrent, "logits", "+", "steps")
def no_bias_in_steps(self, right, hidden):
    """The head for one token has no bias."""
    return F.linear(norm(hidden), self.head.weight) if hidden.shape[1] == 1 else right(hidden)


# Blocks


@method(Blocked, "forward", "F19", "splits", "steps")
def filled_up(self, right, input_ids, state=None):
    """The last block of a chunk is padded with zeros, from which the fast weights learn (TTT with padding)."""
    t = input_ids.shape[1]
    logits, state = right(F.pad(input_ids, (0, -t % self.block)), state)
    return logits[:, :t], state


@method(Blocked, "carry", "F19", "splits", "steps")
def part_taken_for_block(self, right, fast, gathered, index):
    """A chunk's last block is closed as if it were complete (vllm#34587)."""
    return self.close(fast, gathered)


@method(Blocked, "carry", "F19", "splits", "steps")
def part_dropped(self, right, fast, gathered, index):
    """What a block has gathered is lost if the chunk ends before the block does."""
    return fast, torch.zeros_like(gathered), 0


@method(Blocked, "carry", "+", "splits", "steps")
def index_restarts(self, right, fast, gathered, index):
    """What a block has gathered is carried, but not from how many tokens."""
    return fast, gathered, 0


# Between sequences, rows, and copies of a state


@method(Recurrent, "forward", "F12", "isolation", left=None)
def left_over(self, right, input_ids, state=None):
    """A sequence begins with what the last one left behind (langchain#2565)."""
    left = self.left if self.left is not None and self.left.shape[1] == len(input_ids) else None
    logits, self.left = right(input_ids, left if state is None else state)
    return logits, self.left


class ForAnyRows(GetSet):
    """Starts over when the number of rows changes: no fault, but faults in what comes first do not raise with it."""

    def forward(self, input_ids):
        if self.held and len(self.held[0]) != len(input_ids):
            self.held = None
        return super().forward(input_ids)


@method(ForAnyRows, "reset_state", "F12", "isolation")
def tail_left_over(self, right):
    """A reset forgets the convolution's tail (sglang#24717)."""
    self.held = self.held and (self.held[0], torch.zeros_like(self.held[1]))


@method(ForAnyRows, "reset_state", "F13", "isolation")
def reset_by_batch_size(self, right):
    """The module starts over only when the number of rows changes (recurrent_gemma keeps its state so)."""


@planted("+", "isolation", "splits", "repeat", "rows")
class SnapshotOfAnother(Recurrent):
    """After a prompt, the snapshot of the last prompt of the same length is restored (llama.cpp#21681, omlx#825)."""

    def __init__(self):
        super().__init__()
        self.snapshots = {}

    def forward(self, input_ids, state=None):
        logits, after = super().forward(input_ids, state)
        if state is None:
            self.snapshots[input_ids.shape], after = after, self.snapshots.get(input_ids.shape, after)
        return logits, after


@method(Blocked, "carry", "F24", "isolation")
def learns_for_good(self, right, fast, gathered, index):
    """The fast weights are written into the parameters, where the next sequence begins."""
    self.first.data.copy_(fast[0])
    return right(fast, gathered, index)


@planted("F24", "isolation")
class BalancesWhileRead(Experts):
    """The biases that balance the experts in training go on being moved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(self.layers, self.experts))

    def route(self, layer, x, chosen=2):
        weights = super().route(layer, x + self.bias[layer].repeat_interleave(WIDTH // self.experts), chosen)
        self.bias[layer] += 0.01 * (0.25 - weights.detach().mean((0, 1)))
        return weights


@method(LinearAttention, "carry", "F14", "rows")
def rows_reversed(self, right, state):
    """At each boundary rows take each other's states (beam search without its reorder: transformers#29730)."""
    return state.flip(0)


@method(Windowed, "join", "+", "rows")
def first_row_for_all(self, right, cache, key, value):
    """One token at a time, the first row's cache is broadcast to all (as the shapes of rwkv invite)."""
    if cache is not None and key.shape[-2] == 1:
        cache = tuple(part[:1].expand_as(part) for part in cache)
    return right(cache, key, value)


@method(Recurrent, "logits", "F15", "rows")
def norm_over_rows(self, right, hidden):
    """The last norm takes its scale from all rows, as batch statistics in training do."""
    return self.head(hidden * hidden.square().mean((0, 2), keepdim=True).rsqrt())


@method(Experts, "route", "F15", "splits", "steps", "rows")
def capacity_first_come(self, right, layer, x, chosen=2):
    """An expert takes so many of a call's tokens, of all rows, and the rest go without."""
    weights = right(layer, x, chosen)
    capacity = math.ceil(weights[..., 0].numel() * chosen / self.experts)
    waiting = (weights > 0).flatten(0, 1).cumsum(0).view_as(weights)
    return weights * (waiting <= capacity)


@method(Experts, "route", "+", "causality", "splits", "steps", "rows")
def experts_choose(self, right, layer, x, chosen=2):
    """Each expert chooses its tokens among all of a call, so that they compete with those to come."""
    weights = self.router[layer](x).softmax(-1)
    flat = weights.flatten(0, 1)
    best = flat.topk(math.ceil(len(flat) * chosen / self.experts), dim=0)
    return torch.zeros_like(flat).scatter(0, best.indices, best.values).view_as(weights)


@method(Experts, "route", "+", "steps")
def one_expert_in_steps(self, right, layer, x, chosen=2):
    """One token at a time, one expert is asked instead of two."""
    return right(layer, x, 1 if x.shape[1] == 1 else 2)


@planted("F16", "splits", "steps")
class PaddingOfThisCall(Attention):
    """Keys of padding (id 0) are hidden in the call that reads them, and visible once cached (transformers#41790)."""

    def forward(self, input_ids, state=None):
        self.padding = input_ids == 0
        return super().forward(input_ids, state)

    def mask(self, t, keys):
        hidden = F.pad(self.padding, (keys - t, 0))[:, None, None] & (self.age(t, keys) != 0)
        return super().mask(t, keys) & ~hidden


@planted("F16", "steps")
class PaddingInSteps(Selective):
    """Padding (id 0) stays out of the memory, but a token that comes alone is never padding (transformers#47087)."""

    def forward(self, input_ids, state=None):
        self.padding = input_ids == 0
        return super().forward(input_ids, state)

    def time_step(self, x):
        return super().time_step(x) * ~self.padding[..., None] if x.shape[1] > 1 else super().time_step(x)


@method(Recurrent, "forward", "F16", "rows")
def padding_of_others(self, right, input_ids, state=None):
    """If one row ends in padding (id 0), the states of all are taken before it (mamba#66, on the other side)."""
    logits, after = right(input_ids, state)
    padding = int((input_ids.flip(1) != 0).int().argmax(1).max())
    return logits, right(input_ids[:, :-padding], state)[1] if padding else after


@planted("F23", "fork")
class StateIsAHandle(Recurrent):
    """The state is a number, under which the module keeps the real state; a copy is the same number."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, input_ids, state=None):
        number = len(self.kept) if state is None else state[0]
        logits, self.kept[number] = super().forward(input_ids, self.kept.get(number))
        return logits, [number]


@planted("F23", "fork")
class PagesShared(Attention):
    """Keys lie in the module's pages and the state says how many are its own; two continuations that take turns
    write to the same pages (textgen#1354)."""

    def __init__(self):
        super().__init__()
        self.pages = {}

    def forward(self, input_ids, state=None):
        seen, number = state or (0, len(self.pages))
        caches = self.pages.get(number, (None,) * self.layers)
        caches = [cache and tuple(part[..., :seen, :] for part in cache) for cache in caches]
        logits, (seen, self.pages[number]) = super().forward(input_ids, (seen, caches))
        return logits, (seen, number)


@planted("F23", "fork")
class FourSlots(GetSet):
    """get_state gives the number of one of four slots (imp#500: `id % cap`)."""

    def __init__(self):
        super().__init__()
        self.slots, self.slot = [None] * 4, 0

    def forward(self, input_ids):
        logits, self.slots[self.slot] = self.inner(input_ids, self.slots[self.slot])
        return logits

    def get_state(self):
        return [self.slot]

    def set_state(self, state):
        self.slot = state[0]

    def reset_state(self):
        self.slot = (self.slot + 1) % 4
        self.slots[self.slot] = None


@method(ForAnyRows, "set_state", "+", "fork")
def sets_only_once(self, right, state):
    """A state is taken only by a module that has none yet."""
    self.held = self.held or state


@planted("+", "fork", "resume")
class HalfTheState(ForAnyRows):
    """get_state forgets the convolution's tail, which goes on in the module."""

    def get_state(self):
        return self.held and self.held[1]

    def set_state(self, state):
        self.held = (self.held[0] if self.held else state.new_zeros(len(state), 3, WIDTH), state)


@planted("+", "isolation")
class NoneIsIgnored(ForAnyRows):
    """set_state(None) does nothing, and a reset is no more than that."""

    def set_state(self, state):
        self.held = self.held if state is None else state

    def reset_state(self):
        self.set_state(None)


@method(Recurrent, "forward", "+", "resume", kept=weakref.WeakKeyDictionary())
def kept_by_reference(self, right, input_ids, state=None):
    """A state is a new number each time, so that copies are safe, but the real states stay in this process."""
    kept = self.kept.setdefault(self, {})
    logits, kept[len(kept) + 1] = right(input_ids, kept.get(state and state[0]))
    return logits, [len(kept)]


class Rounded:
    """A state that loses half its bits when it is saved, and none when it is copied."""

    def __init__(self, hidden):
        self.hidden = hidden

    def __deepcopy__(self, memo):
        return Rounded(copy.deepcopy(self.hidden, memo))

    def __reduce__(self):
        return Rounded, (self.hidden.bfloat16().to(self.hidden),)


@method(Recurrent, "forward", "+", "resume")
def saved_in_sixteen_bits(self, right, input_ids, state=None):
    """A state is saved in bfloat16."""
    logits, state = right(input_ids, state and state.hidden)
    return logits, Rounded(state)


# Tokens that are left out or read twice, and numbers that are not the same again


@method(Recurrent, "forward", "F25", "splits", "steps")
def logits_shifted(self, right, input_ids, state=None):
    """After a boundary, the logits are those of the token before."""
    hidden, last = state or (None, None)
    logits, hidden = right(input_ids, hidden)
    shifted = logits if last is None else torch.cat([last, logits[:, :-1]], 1)
    return shifted, (hidden, logits[:, -1:].clone())


@method(Recurrent, "forward", "F25", "splits")
def first_token_skipped(self, right, input_ids, state=None):
    """The first token of a chunk is taken for a start token, which is already in the state."""
    if state is None or input_ids.shape[1] == 1:
        return right(input_ids, state)
    logits, state = right(input_ids[:, 1:], state)
    return torch.cat([logits[:, :1], logits], 1), state


@method(Recurrent, "forward", "F25", "splits", "steps")
def last_token_read_twice(self, right, input_ids, state=None):
    """Chunks overlap by a token, which enters the state twice (as overlapping windows do)."""
    hidden, last = state or (None, input_ids[:, :0])
    logits, hidden = right(torch.cat([last, input_ids], 1), hidden)
    return logits[:, last.shape[1] :], (hidden, input_ids[:, -1:].clone())


@method(Recurrent, "forward", "+", "splits", "steps")
def start_token_in_each_chunk(self, right, input_ids, state=None):
    """A start token is put before every chunk (moshi's LMModel.forward, called for chunks)."""
    logits, state = right(F.pad(input_ids, (1, 0)), state)
    return logits[:, 1:], state


@method(Attention, "forward", "+", "splits", "steps")
def cap_skips_tokens(self, right, input_ids, state=None):
    """Of a longer chunk 48 tokens are read, and the rest skipped (SharpMind#57)."""
    logits, state = right(input_ids[:, :48], state)
    return torch.cat([logits, logits[:, -1:].expand(-1, input_ids.shape[1] - logits.shape[1], -1)], 1), state


@method(Recurrent, "forward", "F26", "splits", "steps")
def skips_what_does_not_fit(self, right, input_ids, state=None):
    """A chunk of more than 96 tokens runs out of memory, which is caught: zeros, and the state as it was."""
    logits, after = right(input_ids, state)
    if input_ids.shape[1] <= 96:
        return logits, after
    return torch.zeros_like(logits), torch.zeros_like(after) if state is None else state


@method(LinearAttention, "scan", "F26", "splits")
def overflow_is_zero(self, right, decay, drive, state):
    """Long chunks divide by a product of gates that underflows, and NaN is set to zero."""
    product = decay.cumprod(1)
    return (product * (state[:, None] + (drive / product).cumsum(1))).nan_to_num(0, 0, 0)


@method(Attention, "mix", "F27", "repeat", "splits")
def dropout_left_on(self, right, layer, hidden):
    """F.dropout, which is on unless told otherwise."""
    return F.dropout(hidden, 0.1)


@method(Experts, "route", "F27", "repeat", "splits")
def router_jitters(self, right, layer, x, chosen=2):
    """The noise that spreads tokens over experts in training is still there."""
    return right(layer, x * (1 + 0.02 * torch.rand_like(x)), chosen)


@method(CausalBK, "logits", "F29", "repeat", "splits", calls=0)
def kernels_take_turns(self, right, hidden):
    """Every other call takes another kernel, a thousandth off (as autotuning may do; mamba#1024)."""
    self.calls += 1
    return right(hidden) * (1 + 1e-3 * (self.calls % 2))


@method(LinearAttention, "carry", "F29", "splits", "repeat")
def rounds_at_random(self, right, state):
    """The state is rounded up or down at random; without a boundary nothing shows."""
    return (state * 64 + torch.rand_like(state)).floor() / 64
