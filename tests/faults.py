"""A catalogue of planted faults: models of clean_models.py, each with one thing wrong in it, most of them seen in the wild.

`FAULTS` names for each the clean model it is made from and the laws that it breaks. F1 to F29 are the kinds of fault that any
check of streaming should find; "+" are further ones. All of them run without raising and give finite numbers.
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from clean_models import (
    CLEAN,
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
    """A model that is wrong.

    number   of the kind of fault, "F1" to "F29", or "+"
    clean    name in CLEAN of the model that it would be without its fault
    breaks   the laws that it breaks, each of them by construction
    """

    name: str
    number: str
    model: Callable[[], nn.Module]
    clean: str
    breaks: frozenset[str]


FAULTS: list[Fault] = []


def planted(number: str, *breaks: str):
    """Enter a class in the catalogue, named by its own name."""

    def enter(model):
        clean = next(base.__name__ for base in model.__mro__ if base in CLEAN.values())
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", model.__name__).lower()
        FAULTS.append(Fault(name, number, model, clean, frozenset(breaks)))
        return model

    return enter


# Positions


@planted("F1", "splits", "steps")
class PositionsOneAhead(Attention):
    """Wrong: after a boundary positions are one too high, the token to come being counted as read."""

    def positions(self, seen, t, layer):
        return super().positions(seen + 1 if seen else 0, t, layer)


@planted("F2", "splits", "steps")
class PositionsRestart(Attention):
    """Wrong: each chunk's positions begin at zero (bamba in transformers 5.23; transformers#15751)."""

    def positions(self, seen, t, layer):
        return super().positions(0, t, layer)


@planted("+", "splits")
class PositionsAdvanceTwice(Attention):
    """Wrong: the first layer moves the counter that the second reads; equal chunks hide it (fla#747)."""

    def positions(self, seen, t, layer):
        return super().positions(seen + layer * t, t, layer)


@planted("+", "rows")
class PositionsCountRows(Attention):
    """Wrong: the tokens of all rows are counted as read in each."""

    def count(self, seen, input_ids):
        return seen + input_ids.numel()


@planted("+", "splits", "steps")
class CounterWraps(Attention):
    """Wrong: the tokens read are counted in eight bits, so that position 128 becomes -128."""

    def positions(self, seen, t, layer):
        return super().positions((seen + 128) % 256 - 128, t, layer)


@planted("+", "fork", "resume")
class CounterInModule(Attention):
    """Wrong: keys are in the state, but their number is in the module (as mamba-ssm leaves it to its caller)."""

    read = 0

    def positions(self, seen, t, layer):
        self.read = self.read if seen else 0
        return super().positions(self.read, t, layer)

    def count(self, seen, input_ids):
        self.read += input_ids.shape[1]
        return self.read


@planted("+", "splits", "steps")
class CachedKeysTurnedAgain(Attention):
    """Wrong: cached keys are rotated once more whenever they are used."""

    def join(self, cache, key, value):
        if cache is not None:
            keys = cache[0]
            cache = self.rotate(keys, torch.arange(keys.shape[-2]), None), cache[1]
        return super().join(cache, key, value)


@planted("F22", "prefix", "splits", "steps")
class BaseFollowsLength(Attention):
    """Wrong: rotary frequencies depend on how many tokens there are in all (dynamic NTK; transformers#25104)."""

    def frequencies(self, total):
        return super().frequencies(total) * min(1.0, 16 / total)


@planted("F22", "splits", "steps", "isolation")
class BaseIsStale(Attention):
    """Wrong: as above, and they stay as the longest text left them until a short one is read (dynamic_rope_update)."""

    longest = 16

    def frequencies(self, total):
        self.longest = 16 if total < 16 else max(self.longest, total)
        return super().frequencies(total) * 16 / self.longest


@planted("F22", "isolation")
class BaseNeverFallsBack(Attention):
    """Wrong: as above, for ever: nothing to be seen once the longest text has been read."""

    longest = 16

    def frequencies(self, total):
        self.longest = max(self.longest, total)
        return super().frequencies(total) * 16 / self.longest


@planted("+", "prefix", "splits", "steps")
class SharperWithLength(Attention):
    """Wrong: scores are scaled by the logarithm of all that was read, not of what each query sees (Qwen's logn attention)."""

    def weigh(self, layer, scores):
        return super().weigh(layer, scores * math.log(8 + scores.shape[-1], 16))


# What a cache keeps


@planted("F3", "splits")
class PrefillStartsOver(Attention):
    """Wrong: a call of more than one token is taken for the beginning of a sequence (mlxcel#1749)."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, state if input_ids.shape[1] == 1 else None)


@planted("+", "splits", "steps")
class ForgetsAfterHundred(Attention):
    """Wrong: a cache that would hold more than a hundred tokens is emptied."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, state if state and state[0] + input_ids.shape[1] <= 100 else None)


@planted("+", "splits", "steps")
class CacheClamped(Attention):
    """Wrong: the cache keeps its last 64 entries and says nothing (a stray sliding_window in a config does this to GPT-2)."""

    def remember(self, keys, values):
        return keys[..., -64:, :], values[..., -64:, :]


@planted("+", "splits", "steps")
class CacheFull(Attention):
    """Wrong: what no longer fits into a cache of 64 is not written, so that later chunks do not see it."""

    def remember(self, keys, values):
        return keys[..., :64, :], values[..., :64, :]


@planted("+", "splits", "steps")
class LastKeyNotKept(Attention):
    """Wrong: the last token of a call is left to be written by the next, as generate does, which never comes."""

    def remember(self, keys, values):
        return keys[..., :-1, :], values[..., :-1, :]


@planted("+", "splits", "steps")
class ValuesOneBehind(Attention):
    """Wrong: each cached key finds the value of the key before it."""

    def join(self, cache, key, value):
        return super().join(cache and (cache[0], cache[1].roll(1, -2)), key, value)


@planted("+", "splits", "steps")
class CacheOfFirstLayer(Attention):
    """Wrong: every layer reads the cache of the first (an index that defaults to 0)."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, state and (state[0], (state[1][0],) * self.layers))


@planted("+", "splits", "steps")
class CacheInSixteenBits(Attention):
    """Wrong: keys and values are rounded to bfloat16 as they are cached."""

    def remember(self, keys, values):
        return keys.bfloat16().to(keys), values.bfloat16().to(values)


@planted("F7", "splits", "steps")
class EvictsOneTooMany(Windowed):
    """Wrong: the cache keeps one key less than the window needs."""

    def remember(self, keys, values):
        keys, values = super().remember(keys, values)
        return keys[..., -(self.window - 2) :, :], values[..., -(self.window - 2) :, :]


@planted("F7", "steps")
class EvictsOneTooFew(Windowed):
    """Wrong: the cache keeps one key more than the window allows, and one token at a time sees it."""

    def remember(self, keys, values):
        return keys[..., -self.window :, :].clone(), values[..., -self.window :, :].clone()


@planted("F8", "splits")
class EvictsBeforeAttention(Windowed):
    """Wrong: old keys make room for a chunk before its first tokens have seen them (fla's window layers; vllm#4057)."""

    def join(self, cache, key, value):
        keys, values = super().join(cache, key, value)
        room = max(self.window, key.shape[-2])
        return keys[..., -room:, :], values[..., -room:, :]


@planted("F8", "splits", "steps", "prefix")
class RingOverflows(Windowed):
    """Wrong: a ring as long as the window is written before it is read: of a longer chunk the last tokens alone are in it
    (executorch#20346, moshi's RingKVCache)."""

    def mask(self, t, keys):
        return super().mask(t, keys) & (torch.arange(keys) >= keys - self.window)


@planted("+", "steps", "size")
class MinusZero(Windowed):
    """Wrong: with a window of one, the slice that should keep nothing is `-0:` and keeps all (transformers 5.23)."""

    window = 1

    def remember(self, keys, values):
        return keys[..., -(self.window - 1) :, :].clone(), values[..., -(self.window - 1) :, :].clone()


@planted("F28", "size")
class NothingEvicted(Windowed):
    """Wrong: what has left the window is hidden by the mask, and kept (transformers: a cache made without its config)."""

    def mask(self, t, keys):
        age = self.age(t, keys)
        return (age >= 0) & (age < self.window)

    def remember(self, keys, values):
        return keys, values


@planted("+", "steps")
class NoSinkInSteps(Windowed):
    """Wrong: the kernel for one token knows no sink."""

    def weigh(self, layer, scores):
        return scores.softmax(-1) if scores.shape[-2] == 1 else super().weigh(layer, scores)


# Masks, and what comes later


@planted("F9", "splits")
class ChunkSeesItself(Attention):
    """Wrong: beside a cache there is no mask, so that a chunk's tokens see each other."""

    def mask(self, t, keys):
        return super().mask(t, keys) | (keys > t)


@planted("F10", "splits", "steps")
class LastCachedKeyHidden(Attention):
    """Wrong: the mask hides the key just before the boundary (Llama 4 chunked attention, transformers#37414, was one off)."""

    def mask(self, t, keys):
        return super().mask(t, keys) & (torch.arange(keys) != keys - t - 1)


@planted("+", "splits")
class MaskOneOff(Attention):
    """Wrong: beside a cache each query sees one key too many (mlx-swift-lm#39)."""

    def mask(self, t, keys):
        return self.age(t, keys) >= -(keys > t)


@planted("+", "splits", "steps")
class MaskWithoutOffset(Attention):
    """Wrong: a square mask is laid on the wrong corner of the scores (llama#899; is_causal=True with a cache)."""

    def mask(self, t, keys):
        return torch.ones(t, keys, dtype=torch.bool).tril()


@planted("F20", "causality", "splits", "steps")
class SeesNext(Attention):
    """Wrong: each token sees the next, if it is there."""

    def mask(self, t, keys):
        return self.age(t, keys) >= -1


@planted("F20", "causality", "splits", "steps")
class SeesAll(Attention):
    """Wrong: no mask at all; such models have fine perplexities (transformers#48745, nanochat#844)."""

    def mask(self, t, keys):
        return torch.ones(t, keys, dtype=torch.bool)


@planted("F21", "causality", "splits", "steps")
class TwoSided(CausalBK):
    """Wrong: the resolvent sums what stands to the right as well; four times less with each place (ResNet-BK as published)."""

    def resolve(self, diagonal, carried):
        left = self.sweep(diagonal, carried)
        right = F.pad(self.sweep(diagonal.flip(1), torch.zeros_like(carried)).flip(1)[:, 1:], (0, 1))
        return (left.reciprocal() - right).reciprocal(), left[:, -1]


@planted("F21", "causality", "splits", "steps")
class LeaksFaintly(Recurrent):
    """Wrong: a thousandth of what is to come is seen, four times less with each place."""

    def logits(self, hidden):
        place = torch.arange(hidden.shape[1])
        reach = 1e-3 * torch.triu(0.25 ** (place - place[:, None]).abs(), 1).to(hidden)
        return super().logits(hidden + reach @ hidden)


@planted("+", "causality", "splits", "steps")
class NormOverTime(LinearAttention):
    """Wrong: the last norm takes its scale from the whole chunk (a GroupNorm over [b, c, t])."""

    def logits(self, hidden):
        return self.head(hidden * hidden.square().mean((1, 2), keepdim=True).rsqrt())


@planted("+", "causality", "splits", "rows")
class OneScaleForAll(Selective):
    """Wrong: activations are quantized to eight bits with one scale for a whole call, all rows and positions."""

    def logits(self, hidden):
        scale = hidden.abs().max() / 127
        return super().logits((hidden / scale).round() * scale)


# Convolutions and recurrences


@planted("F3", "splits", "steps")
class StateDropped(LinearAttention):
    """Wrong: a state is returned, and never read (fla#285; transformers#46741)."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, None)


@planted("F4", "splits")
class RecurrenceDropped(Selective):
    """Wrong: the convolution goes on and the recurrence starts over (mamba, jamba, zamba in transformers 5.23)."""

    def scan(self, decay, drive, memory):
        return super().scan(decay, drive, memory if drive.shape[1] == 1 else torch.zeros_like(memory))


@planted("F5", "splits")
class ConvolutionDropped(Selective):
    """Wrong: the recurrence goes on and the convolution starts over (transformers#45513)."""

    def join(self, tail, x):
        return super().join(tail if x.shape[1] == 1 else torch.zeros_like(tail), x)


@planted("F6", "splits", "steps")
class TailShifted(Selective):
    """Wrong: the convolution's tail is taken one place too early."""

    def tail(self, inputs, t):
        return super().tail(F.pad(inputs, (0, 0, 1, -1)), t)


@planted("F6", "splits", "steps")
class TailOfShortChunk(Selective):
    """Wrong: a chunk shorter than the tail leaves zeros in it instead of what came before (vllm#56196)."""

    def tail(self, inputs, t):
        return super().tail(F.pad(inputs[:, -t:], (0, 0, self.kernel - 1, 0)), t)


@planted("+", "splits")
class TailOfEqualChunk(Selective):
    """Wrong: a chunk exactly as long as the kernel is taken for a shorter one, and leaves its beginning."""

    def tail(self, inputs, t):
        return super().tail(inputs[:, :-1] if t == self.kernel else inputs, t)


@planted("+", "splits", "causality")
class ConvolutionWraps(Selective):
    """Wrong: done by an FFT that is padded to a power of two, the convolution of just so many tokens wraps around."""

    def join(self, tail, x):
        t = x.shape[1]
        return super().join(x[:, 1 - self.kernel :] if t in (4, 8, 16, 32, 64, 128) else tail, x)


@planted("F28", "size")
class TailOfAll(Selective):
    """Wrong: the convolution's tail is never cut; the numbers are right."""

    def tail(self, inputs, t):
        return inputs


@planted("F11", "splits", "steps")
class MemoryInSixteenBits(Selective):
    """Wrong: the recurrent state is returned in bfloat16 (vllm#13466)."""

    def carry(self, memory, t):
        return memory.bfloat16().to(memory)


@planted("+", "steps")
class MemoryInSixteenBitsInSteps(Selective):
    """Wrong: the kernel for one token stores bfloat16 (mlx-lm#988)."""

    def carry(self, memory, t):
        return memory.bfloat16().to(memory) if t == 1 else memory.clone()


@planted("F17", "steps")
class ClampedInSteps(Selective):
    """Wrong: the time step has a smallest value when tokens come one at a time (nemotron_h, zamba2 in transformers 5.23)."""

    def time_step(self, x):
        return super().time_step(x).clamp(min=0.02 if x.shape[1] == 1 else 0)


@planted("F18", "splits")
class OtherFormulaFrom64(Selective):
    """Wrong: 64 tokens and more go through a kernel that discretises otherwise."""

    def discretise(self, x):
        decay, drive, read = super().discretise(x)
        exact = (1 - decay) / (self.time_step(x)[..., None] * self.rates())
        return decay, drive * exact if x.shape[1] >= 64 else drive, read


@planted("F18", "splits")
class OtherFormulaAbove64(LinearAttention):
    """Wrong: more than 64 tokens go through a kernel that limits how fast is forgotten (fla changes kernels there)."""

    def gates(self, x):
        return super().gates(x).clamp(min=0.1 if x.shape[1] > 64 else 0)


@planted("+", "splits", "steps")
class BlocksForget(Selective):
    """Wrong: inside a call, blocks of 16 hand on only what the last one added (transformers#35154)."""

    def scan(self, decay, drive, memory):
        parts = []
        for kept, new in zip(decay.split(16, 1), drive.split(16, 1), strict=True):
            parts.append(scan(kept, new, memory))
            memory = scan(kept, new, torch.zeros_like(memory))[:, -1]
        return torch.cat(parts, 1)


@planted("+", "splits")
class WholeBlocksOnly(Selective):
    """Wrong: a state is begun from only where the chunk is a multiple of the kernel's block (TensorRT-LLM#6334)."""

    def scan(self, decay, drive, memory):
        t = drive.shape[1]
        return super().scan(decay, drive, memory if t == 1 or t % 8 == 0 else torch.zeros_like(memory))


@planted("+", "splits")
class FirstTokenOnly(Selective):
    """Wrong: of a chunk that goes on, the first token alone is read (transformers#46032)."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids if state is None else input_ids[:, :1], state)
        return logits.expand(-1, input_ids.shape[1], -1), state


@planted("+", "splits", "steps")
class DivisorRestarts(LinearAttention):
    """Wrong: the sum is carried, and what it is divided by is not."""

    def carry(self, state):
        return F.pad(state[..., :-1], (0, 1))


@planted("+", "splits", "steps")
class ImaginaryPartLost(CausalBK):
    """Wrong: a state that is complex is kept in a real buffer."""

    def carry(self, carried):
        return torch.complex(carried.real, torch.zeros_like(carried.real))


@planted("F11", "splits", "steps")
class StateRounded(Recurrent):
    """Wrong: the state is rounded to bfloat16 at each boundary."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits, state.bfloat16().to(state)


@planted("+", "splits")
class OddChunk(Recurrent):
    """Wrong: tokens are read in pairs, and the last one of an odd chunk does not enter the state."""

    def forward(self, input_ids, state=None):
        t = input_ids.shape[1]
        logits, after = super().forward(input_ids, state)
        return logits, super().forward(input_ids[:, :-1], state)[1] if t > 1 and t % 2 else after


@planted("+", "splits", "steps")
class ZeroStartsOver(Recurrent):
    """Wrong: a chunk that begins with token 0 is taken for the beginning of a text."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, None if state is None else state * (input_ids[:, :1] != 0).to(state))


@planted("+", "steps")
class NoBiasInSteps(Recurrent):
    """Wrong: the head for one token has no bias."""

    def logits(self, hidden):
        return F.linear(norm(hidden), self.head.weight) if hidden.shape[1] == 1 else super().logits(hidden)


# Blocks


@planted("F19", "splits", "steps")
class FilledUp(Blocked):
    """Wrong: the last block of a chunk is filled up with zeros, from which the fast weights learn (TTT with padding)."""

    def forward(self, input_ids, state=None):
        t = input_ids.shape[1]
        logits, state = super().forward(F.pad(input_ids, (0, -t % self.block)), state)
        return logits[:, :t], state


@planted("F19", "splits", "steps")
class PartTakenForBlock(Blocked):
    """Wrong: a chunk's last block is closed as if it were complete (vllm#34587)."""

    def carry(self, fast, gathered, place):
        return self.close(fast, gathered)


@planted("F19", "splits", "steps")
class PartDropped(Blocked):
    """Wrong: what a block has gathered is lost if the chunk ends before the block does."""

    def carry(self, fast, gathered, place):
        return fast, torch.zeros_like(gathered), 0


@planted("+", "splits", "steps")
class PlaceRestarts(Blocked):
    """Wrong: what a block has gathered is carried, but not how many tokens that was."""

    def carry(self, fast, gathered, place):
        return fast, gathered, 0


# Between sequences, rows, and copies of a state


@planted("F12", "isolation")
class LeftOver(Recurrent):
    """Wrong: a sequence begins with what the last one left behind (langchain#2565)."""

    left = None

    def forward(self, input_ids, state=None):
        left = self.left if self.left is not None and self.left.shape[1] == len(input_ids) else None
        logits, self.left = super().forward(input_ids, left if state is None else state)
        return logits, self.left


class ForAnyRows(GetSet):
    """Starts over when the number of rows changes: no fault, but with it a fault in what comes first does not raise."""

    def forward(self, input_ids):
        if self.held and len(self.held[0]) != len(input_ids):
            self.held = None
        return super().forward(input_ids)


@planted("F12", "isolation")
class TailLeftOver(ForAnyRows):
    """Wrong: a reset forgets the convolution's tail (sglang#24717)."""

    def reset_state(self):
        self.held = self.held and (self.held[0], torch.zeros_like(self.held[1]))


@planted("F13", "isolation")
class ResetByBatchSize(ForAnyRows):
    """Wrong: the module starts over only when the number of rows changes (recurrent_gemma keeps its state so)."""

    def reset_state(self):
        pass


@planted("+", "isolation", "splits")
class SnapshotOfAnother(Recurrent):
    """Wrong: after a prompt, the snapshot of the last prompt of the same length is restored (llama.cpp#21681, omlx#825)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.snapshots = {}

    def forward(self, input_ids, state=None):
        logits, after = super().forward(input_ids, state)
        if state is None:
            self.snapshots[input_ids.shape], after = after, self.snapshots.get(input_ids.shape, after)
        return logits, after


@planted("F24", "isolation")
class LearnsForGood(Blocked):
    """Wrong: the fast weights are written into the parameters, where the next sequence begins."""

    def carry(self, fast, gathered, place):
        self.first.data.copy_(fast[0])
        return super().carry(fast, gathered, place)


@planted("F24", "isolation")
class BalancesWhileRead(Experts):
    """Wrong: the biases that balance the experts in training go on being moved."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.register_buffer("bias", torch.zeros(self.layers, self.experts))

    def route(self, layer, x, chosen=2):
        share = super().route(layer, x + self.bias[layer].repeat_interleave(WIDTH // self.experts), chosen)
        self.bias[layer] += 0.01 * (0.25 - share.detach().mean((0, 1)))
        return share


@planted("F14", "rows")
class RowsReversed(LinearAttention):
    """Wrong: at each boundary rows take each other's states (beam search without its reorder: transformers#29730)."""

    def carry(self, state):
        return state.flip(0)


@planted("+", "rows")
class FirstRowForAll(Windowed):
    """Wrong: one token at a time, the first row's cache is broadcast to all (as the shapes of rwkv invite)."""

    def join(self, cache, key, value):
        if cache is not None and key.shape[-2] == 1:
            cache = tuple(part[:1].expand_as(part) for part in cache)
        return super().join(cache, key, value)


@planted("F15", "rows")
class NormOverRows(Recurrent):
    """Wrong: the last norm takes its scale from all rows, as batch statistics in training do."""

    def logits(self, hidden):
        return self.head(hidden * hidden.square().mean((0, 2), keepdim=True).rsqrt())


@planted("F15", "splits", "steps", "rows")
class CapacityFirstCome(Experts):
    """Wrong: an expert takes its share of a call's tokens, of all rows, and the rest go without."""

    def route(self, layer, x, chosen=2):
        share = super().route(layer, x, chosen)
        capacity = math.ceil(share[..., 0].numel() * chosen / self.experts)
        waiting = (share > 0).flatten(0, 1).cumsum(0).view_as(share)
        return share * (waiting <= capacity)


@planted("+", "causality", "splits", "steps", "rows")
class ExpertsChoose(Experts):
    """Wrong: each expert chooses its tokens among all of a call, so that they compete with those to come."""

    def route(self, layer, x, chosen=2):
        share = self.router[layer](x).softmax(-1)
        flat = share.flatten(0, 1)
        best = flat.topk(math.ceil(len(flat) * chosen / self.experts), dim=0)
        return torch.zeros_like(flat).scatter(0, best.indices, best.values).view_as(share)


@planted("+", "steps")
class OneExpertInSteps(Experts):
    """Wrong: one token at a time, one expert is asked instead of two."""

    def route(self, layer, x, chosen=2):
        return super().route(layer, x, 1 if x.shape[1] == 1 else 2)


@planted("F16", "splits", "steps")
class PaddingOfThisCall(Attention):
    """Wrong: keys of padding (id 0) are hidden in the call that reads them, and visible once cached (transformers#41790)."""

    def forward(self, input_ids, state=None):
        self.padding = input_ids == 0
        return super().forward(input_ids, state)

    def mask(self, t, keys):
        hidden = F.pad(self.padding, (keys - t, 0))[:, None, None] & (self.age(t, keys) != 0)
        return super().mask(t, keys) & ~hidden


@planted("F16", "steps")
class PaddingInSteps(Selective):
    """Wrong: padding (id 0) stays out of the memory, but a token that comes alone is never padding (transformers#47087)."""

    def forward(self, input_ids, state=None):
        self.padding = input_ids == 0
        return super().forward(input_ids, state)

    def time_step(self, x):
        return super().time_step(x) * ~self.padding[..., None] if x.shape[1] > 1 else super().time_step(x)


@planted("F16", "rows")
class PaddingOfOthers(Recurrent):
    """Wrong: where one row ends in padding (id 0), the states of all are taken before it (mamba#66, on the other side)."""

    def forward(self, input_ids, state=None):
        logits, after = super().forward(input_ids, state)
        padding = int((input_ids.flip(1) != 0).int().argmax(1).max())
        return logits, super().forward(input_ids[:, :-padding], state)[1] if padding else after


@planted("F23", "fork")
class StateIsAHandle(Recurrent):
    """Wrong: the state is a number, under which the module keeps what it stands for; a copy is the same number."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.kept = {}

    def forward(self, input_ids, state=None):
        number = len(self.kept) if state is None else state[0]
        logits, self.kept[number] = super().forward(input_ids, self.kept.get(number))
        return logits, [number]


@planted("F23", "fork")
class PagesShared(Attention):
    """Wrong: keys lie in the module's pages and the state says how many are its own; two continuations that take turns
    write to the same places (textgen#1354)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.pages = {}

    def forward(self, input_ids, state=None):
        seen, number = state or (0, len(self.pages))
        caches = self.pages.get(number, (None,) * self.layers)
        caches = [cache and tuple(part[..., :seen, :] for part in cache) for cache in caches]
        logits, (seen, self.pages[number]) = super().forward(input_ids, (seen, caches))
        return logits, (seen, number)


@planted("F23", "fork")
class FourSlots(GetSet):
    """Wrong: get_state gives the number of one of four slots (imp#500: `id % cap`)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
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


@planted("+", "fork")
class SetsOnlyOnce(ForAnyRows):
    """Wrong: a state is taken only by a module that has none yet."""

    def set_state(self, state):
        self.held = self.held or state


@planted("+", "fork", "resume")
class HalfTheState(ForAnyRows):
    """Wrong: get_state forgets the convolution's tail, which goes on in the module."""

    def get_state(self):
        return self.held and self.held[1]

    def set_state(self, state):
        self.held = (self.held[0] if self.held else state.new_zeros(len(state), 3, WIDTH), state)


@planted("+", "isolation")
class NoneIsIgnored(ForAnyRows):
    """Wrong: set_state(None) does nothing, and a reset is no more than that."""

    def set_state(self, state):
        self.held = self.held if state is None else state

    def reset_state(self):
        self.set_state(None)


@planted("+", "resume")
class KeptByReference(Recurrent):
    """Wrong: a state is a new number each time, so that copies are safe, but what it stands for stays in this process."""

    kept: ClassVar = weakref.WeakKeyDictionary()

    def forward(self, input_ids, state=None):
        kept = self.kept.setdefault(self, {})
        logits, kept[len(kept) + 1] = super().forward(input_ids, kept.get(state and state[0]))
        return logits, [len(kept)]


class Rounded:
    """A state that loses half its bits when it is saved, and none when it is copied."""

    def __init__(self, hidden):
        self.hidden = hidden

    def __deepcopy__(self, memo):
        return Rounded(copy.deepcopy(self.hidden, memo))

    def __reduce__(self):
        return Rounded, (self.hidden.bfloat16().to(self.hidden),)


@planted("+", "resume")
class SavedInSixteenBits(Recurrent):
    """Wrong: a state is saved in bfloat16."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state and state.hidden)
        return logits, Rounded(state)


# Tokens that are left out or read twice, and numbers that are not the same again


@planted("F25", "splits", "steps")
class LogitsShifted(Recurrent):
    """Wrong: after a boundary, the logits are those of the token before."""

    def forward(self, input_ids, state=None):
        hidden, last = state or (None, None)
        logits, hidden = super().forward(input_ids, hidden)
        shifted = logits if last is None else torch.cat([last, logits[:, :-1]], 1)
        return shifted, (hidden, logits[:, -1:].clone())


@planted("F25", "splits")
class FirstTokenSkipped(Recurrent):
    """Wrong: the first token of a chunk is taken for a start token, which is already in the state."""

    def forward(self, input_ids, state=None):
        if state is None or input_ids.shape[1] == 1:
            return super().forward(input_ids, state)
        logits, state = super().forward(input_ids[:, 1:], state)
        return torch.cat([logits[:, :1], logits], 1), state


@planted("F25", "splits", "steps")
class LastTokenReadTwice(Recurrent):
    """Wrong: chunks overlap by a token, which enters the state twice (as overlapping windows do)."""

    def forward(self, input_ids, state=None):
        hidden, last = state or (None, input_ids[:, :0])
        logits, hidden = super().forward(torch.cat([last, input_ids], 1), hidden)
        return logits[:, last.shape[1] :], (hidden, input_ids[:, -1:].clone())


@planted("+", "splits", "steps")
class StartTokenInEachChunk(Recurrent):
    """Wrong: a start token is put before every chunk (moshi's LMModel.forward, called for chunks)."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(F.pad(input_ids, (1, 0)), state)
        return logits[:, 1:], state


@planted("+", "splits", "steps")
class CapSkipsTokens(Attention):
    """Wrong: of a longer chunk 48 tokens are read, and the rest passed over (SharpMind#57)."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids[:, :48], state)
        return torch.cat([logits, logits[:, -1:].expand(-1, input_ids.shape[1] - logits.shape[1], -1)], 1), state


@planted("F26", "splits", "steps")
class SkipsWhatDoesNotFit(Recurrent):
    """Wrong: a chunk of more than 96 tokens runs out of memory, which is caught: zeros, and the state as it was."""

    def forward(self, input_ids, state=None):
        logits, after = super().forward(input_ids, state)
        if input_ids.shape[1] <= 96:
            return logits, after
        return torch.zeros_like(logits), torch.zeros_like(after) if state is None else state


@planted("F26", "splits")
class OverflowIsZero(LinearAttention):
    """Wrong: long chunks divide by a product of gates that underflows, and what is then no number is set to zero."""

    def scan(self, decay, drive, state):
        product = decay.cumprod(1)
        return (product * (state[:, None] + (drive / product).cumsum(1))).nan_to_num(0, 0, 0)


@planted("F27", "repeat", "splits")
class DropoutLeftOn(Attention):
    """Wrong: F.dropout, which is on unless told otherwise."""

    def mix(self, layer, hidden):
        return F.dropout(hidden, 0.1)


@planted("F27", "repeat", "splits")
class RouterJitters(Experts):
    """Wrong: the noise that spreads tokens over experts in training is still there."""

    def route(self, layer, x, chosen=2):
        return super().route(layer, x * (1 + 0.02 * torch.rand_like(x)), chosen)


@planted("F29", "repeat", "splits")
class KernelsTakeTurns(CausalBK):
    """Wrong: every other call takes another kernel, a thousandth off (as autotuning may do; mamba#1024)."""

    calls = 0

    def logits(self, hidden):
        self.calls += 1
        return super().logits(hidden) * (1 + 1e-3 * (self.calls % 2))


@planted("F29", "splits", "repeat")
class RoundsAtRandom(LinearAttention):
    """Wrong: the state is rounded up or down at random; without a boundary there is nothing to see."""

    def carry(self, state):
        return (state * 64 + torch.rand_like(state)).floor() / 64
