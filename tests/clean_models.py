"""Correct tiny language models, one of each architecture, exact for any chunking: the bases of the faults in faults.py.

Each is `logits, state = model(input_ids, state)` (but `GetSet`, which holds its state), made of small methods, so that a
fault is one wrong method. Weights are large, so that the past matters. A state is a new value at each call, never written in
place, and if `constant_state` is true it owns its memory: a view would keep its whole chunk alive.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, HEADS = 32, 16, 2


def norm(hidden):
    return F.rms_norm(hidden, hidden.shape[-1:])


def heads(hidden):
    """[b, t, width] -> [b, heads, t, width / heads]."""
    return hidden.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def scan(decay, drive, state):
    """[b, t, ...] all states of the recurrence `state = decay * state + drive`."""
    steps = zip(decay.unbind(1), drive.unbind(1), strict=True)
    return torch.stack([state := torch.addcmul(new, kept, state) for kept, new in steps], 1)


class Tiny(nn.Module):
    """An embedding, a head, seeded weights."""

    constant_state = True

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.build()
            self.head = nn.Linear(WIDTH, VOCAB)
            for parameter in self.parameters():
                parameter.normal_(0, 0.35)

    def logits(self, hidden):
        return self.head(norm(hidden))


class Attention(Tiny):
    """Two layers of causal attention with rotary positions; the keys and values of all tokens are kept."""

    constant_state = False
    layers = 2
    base = 100.0

    def build(self):
        self.inward = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(self.layers))
        self.outward = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(self.layers))

    def forward(self, input_ids, state=None):
        seen, caches = state or (0, (None,) * self.layers)
        hidden, kept = self.embed(input_ids), []
        for layer in range(self.layers):
            hidden, cache = self.attend(layer, hidden, seen, caches[layer])
            hidden = self.mix(layer, hidden)
            kept.append(cache)
        return self.logits(hidden), (self.count(seen, input_ids), tuple(kept))

    def attend(self, layer, hidden, seen, cache):
        query, key, value = map(heads, self.inward[layer](norm(hidden)).chunk(3, -1))
        positions = self.positions(seen, hidden.shape[1], layer)
        total = seen + hidden.shape[1]
        query, key = self.rotate(query, positions, total), self.rotate(key, positions, total)
        keys, values = self.join(cache, key, value)
        scores = query @ keys.mT * query.shape[-1] ** -0.5
        visible = self.mask(hidden.shape[1], keys.shape[-2])
        mixed = self.weigh(layer, scores.masked_fill(~visible, float("-inf"))) @ values
        return hidden + self.outward[layer](mixed.transpose(1, 2).flatten(-2)), self.remember(keys, values)

    def count(self, seen, input_ids):
        return seen + input_ids.shape[1]

    def positions(self, seen, t, layer):
        return torch.arange(seen, seen + t)

    def frequencies(self, total):
        """Of the rotation, fast to slow. They must not depend on `total`, the number of tokens read so far."""
        return self.base ** -torch.arange(0, 1, 2 * HEADS / WIDTH, dtype=torch.float64)

    def rotate(self, x, positions, total):
        angles = positions[:, None] * self.frequencies(total)
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        even, odd = x.chunk(2, -1)
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)

    def join(self, cache, key, value):
        return (key, value.clone()) if cache is None else (torch.cat([cache[0], key], -2), torch.cat([cache[1], value], -2))

    def age(self, t, keys):
        """[t, keys] how many tokens before a query its key was read; the last key is the last query's own."""
        return torch.arange(keys - t, keys)[:, None] - torch.arange(keys)

    def mask(self, t, keys):
        return self.age(t, keys) >= 0

    def weigh(self, layer, scores):
        return scores.softmax(-1)

    def remember(self, keys, values):
        return keys, values

    def mix(self, layer, hidden):
        return hidden


class Windowed(Attention):
    """Attention to the last eight tokens, its own included, and to a learned sink, which takes weight and gives nothing."""

    constant_state = True
    window = 8

    def build(self):
        super().build()
        self.sink = nn.Parameter(torch.empty(self.layers, HEADS, 1, 1))

    def mask(self, t, keys):
        age = self.age(t, keys)
        return (age >= 0) & (age < self.window) if t > 1 else age >= 0  # one token sees all that was kept, as decoders do

    def weigh(self, layer, scores):
        sink = self.sink[layer].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

    def remember(self, keys, values):
        first = max(keys.shape[-2] - (self.window - 1), 0)
        return keys[..., first:, :].clone(), values[..., first:, :].clone()


class Experts(Attention):
    """Attention, and two of four experts for each token."""

    experts = 4

    def build(self):
        super().build()
        self.router = nn.ModuleList(nn.Linear(WIDTH, self.experts) for _ in range(self.layers))
        self.expert = nn.Parameter(torch.empty(self.layers, self.experts, WIDTH, WIDTH))

    def mix(self, layer, hidden):
        weights = self.route(layer, norm(hidden))
        every = torch.einsum("btw,ewo->bteo", norm(hidden), self.expert[layer])  # all: shapes must not follow the routes
        return hidden + (weights[..., None] * every.relu()).sum(-2)

    def route(self, layer, x, chosen=2):
        """[b, t, experts] the weight of each expert, zero for those not chosen."""
        weights = self.router[layer](x).softmax(-1)
        best = weights.topk(chosen)
        return torch.zeros_like(weights).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))


class Selective(Tiny):
    """A causal convolution, then a diagonal recurrence whose time steps depend on the token, as in Mamba."""

    kernel = 4
    slots = 4

    def build(self):
        self.inward = nn.Linear(WIDTH, 2 * WIDTH)
        self.filter = nn.Parameter(torch.empty(WIDTH, self.kernel))
        self.interval = nn.Linear(WIDTH, WIDTH)
        self.choose = nn.Linear(WIDTH, 2 * self.slots)
        self.outward = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, state=None):
        hidden, t = self.embed(input_ids), input_ids.shape[1]
        zeros = partial(hidden.new_zeros, len(hidden))
        tail, memory = state or (zeros(self.kernel - 1, WIDTH), zeros(WIDTH, self.slots))
        x, gate = self.inward(norm(hidden)).chunk(2, -1)
        inputs = self.join(tail, x)
        x = F.silu((inputs.unfold(1, self.kernel, 1) * self.filter).sum(-1)[:, -t:])
        decay, drive, read = self.discretise(x)
        states = self.scan(decay, drive, memory)
        hidden = hidden + self.outward(norm((states * read).sum(-1) + x) * F.silu(gate))
        return self.logits(hidden), (self.tail(inputs, t), self.carry(states[:, -1], t))

    def join(self, tail, x):
        return torch.cat([tail, x], 1)

    def tail(self, inputs, t):
        return inputs[:, 1 - self.kernel :].clone()

    def rates(self):
        """How fast each slot forgets: the first at once, the last hardly."""
        return torch.tensor([1.0, 0.3, 0.1, 0.01]).to(self.filter)

    def time_step(self, x):
        return F.softplus(self.interval(x) - 1)

    def discretise(self, x):
        write, read = self.choose(x)[:, :, None].chunk(2, -1)
        dt = self.time_step(x)[..., None]
        return torch.exp(-dt * self.rates()), dt * x[..., None] * write, read

    def scan(self, decay, drive, memory):
        return scan(decay, drive, memory)

    def carry(self, memory, t):
        return memory.clone()


class LinearAttention(Tiny):
    """A matrix for each head, gated and added to by each token; a last column of ones sums the divisor."""

    def build(self):
        self.inward = nn.Linear(WIDTH, 3 * WIDTH)
        self.gate = nn.Linear(WIDTH, HEADS)
        self.outward = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, state=None):
        hidden = self.embed(input_ids)
        x = norm(hidden)
        query, key, value = (part.unflatten(-1, (HEADS, -1)) for part in self.inward(x).chunk(3, -1))
        query, key = F.elu(query) + 1, F.elu(key) + 1
        drive = key[..., None] * F.pad(value, (0, 1), value=1.0)[..., None, :]
        start = torch.zeros_like(drive[:, 0]) if state is None else state
        states = self.scan(self.gates(x)[..., None, None], drive, start)
        total = (query[..., None, :] @ states).squeeze(-2)
        hidden = hidden + self.outward((total[..., :-1] / (total[..., -1:] + 0.1)).flatten(-2))
        return self.logits(hidden), self.carry(states[:, -1])

    def gates(self, x):
        """[b, t, heads] the fraction kept: one head forgets fast, and one hardly."""
        return torch.sigmoid(self.gate(x) + torch.tensor([-1.0, 5.0]).to(x))

    def scan(self, decay, drive, state):
        return scan(decay.expand_as(drive), drive, state)

    def carry(self, state):
        return state.clone()


class Blocked(Tiny):
    """Fast weights that learn to map keys to values by gradient descent in blocks of four, as in TTT-Linear.

    Gradients are taken at the weights of the block's beginning. What a block has gathered is carried with the index in it.
    """

    block = 4

    def build(self):
        self.inward = nn.Linear(WIDTH, 3 * WIDTH)
        self.rate = nn.Linear(WIDTH, 1)
        self.first = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.outward = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, state=None):
        hidden = self.embed(input_ids)
        query, key, value = self.inward(norm(hidden)).chunk(3, -1)
        key = F.normalize(key, dim=-1)
        rate = torch.sigmoid(self.rate(norm(hidden)))
        zeros = hidden.new_zeros(len(hidden), WIDTH, WIDTH)
        fast, gathered, index = state or (self.first + zeros, zeros, 0)
        parts, begin, t = [], 0, input_ids.shape[1]
        while begin < t:
            end = min(begin + self.block - index, t)
            part = slice(begin, end)
            q, k = query[:, part], key[:, part]
            error = rate[:, part] * (k @ fast - value[:, part])
            # a token weighs less the later it is in its block, from 1 down to 1/4
            pull = (1 / torch.arange(index + 1, index + end - begin + 1))[:, None].to(hidden)
            parts.append(q @ fast - pull * (q @ gathered + (q @ k.mT).tril() @ error))
            gathered = gathered + k.mT @ error
            index, begin = index + end - begin, end
            if index == self.block:
                fast, gathered, index = self.close(fast, gathered)
        hidden = hidden + self.outward(norm(torch.cat(parts, 1)))
        return self.logits(hidden), self.carry(fast, gathered, index)

    def close(self, fast, gathered):
        return fast - gathered / self.block, torch.zeros_like(gathered), 0

    def carry(self, fast, gathered, index):
        return fast, gathered, index


class Recurrent(Tiny):
    """A GRU."""

    def build(self):
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, input_ids, state=None):
        hidden, state = self.cell(self.embed(input_ids), state)
        return self.logits(hidden), state


class CausalBK(Tiny):
    """The diagonal of a tridiagonal matrix's resolvent, summed from the left only (ResNet-BK without its right sweep): a
    continued fraction, one complex number of state a layer."""

    layers = 2
    height = 0.2  # of the resolvent above the middle of the band: the lower, the longer the memory

    def build(self):
        self.potential = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(self.layers))
        self.features = nn.ModuleList(nn.Linear(2, WIDTH) for _ in range(self.layers))
        self.local = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(self.layers))

    def forward(self, input_ids, state=None):
        hidden, kept = self.embed(input_ids), []
        for layer in range(self.layers):
            x = norm(hidden)
            potential = self.potential[layer](x)[..., 0]
            potential = potential if potential.dtype == torch.float64 else potential.float()  # bfloat16 has no complex numbers
            diagonal = torch.complex(torch.tanh(potential), torch.full_like(potential, -self.height))
            resolvent, carried = self.resolve(diagonal, torch.zeros_like(diagonal[:, 0]) if state is None else state[layer])
            kept.append(self.carry(carried))
            hidden = hidden + self.features[layer](torch.view_as_real(resolvent).to(x)) + F.gelu(self.local[layer](x))
        return self.logits(hidden), tuple(kept)

    def sweep(self, diagonal, carried):
        """[b, t] all of `carried = 1 / (diagonal - carried)`."""
        found = [carried := (entry - carried).reciprocal() for entry in diagonal.unbind(1)]
        return torch.stack(found, 1)

    def resolve(self, diagonal, carried):
        left = self.sweep(diagonal, carried)
        return left, left[:, -1]

    def carry(self, carried):
        return carried.clone()


class GetSet(nn.Module):
    """A model that holds its state itself: get_state, set_state, reset_state."""

    constant_state = True

    def __init__(self):
        super().__init__()
        self.inner = Selective()
        self.held = None

    def forward(self, input_ids):
        logits, self.held = self.inner(input_ids, self.held)
        return logits

    def get_state(self):
        return self.held

    def set_state(self, state):
        self.held = state

    def reset_state(self):
        self.held = None


CLEAN: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (Attention, Windowed, Experts, Selective, LinearAttention, Blocked, Recurrent, CausalBK, GetSet)
}
