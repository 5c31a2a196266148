"""`automaton`: text that looks like words and whose entropy is known exactly, and the language model that is its source.

    source = automaton()
    entropy_rate(source)             what the best model pays for it, nats a byte: exp of it is the lowest perplexity there is
    entropy_in_window(source, 3)     what the best model pays that sees three bytes at a time
    load()                           the best model: its states are the automaton's, its loss is the entropy

The source walks from state to state. A state has three branches, each with a letter, a weight in 256ths and the state that it
leads to. No two branches of a state have the same letter (the source is unifilar): whoever knows the first state and reads the
text knows every state, and the entropy of the text is the mean entropy of the states that it goes through (Shannon, "A
Mathematical Theory of Communication", 1948, section 7). The last few letters do not tell the state, since each of them stands
on a dozen branches: the best model pays 1.24 bits a byte, one that sees the last 1, 3 or 6 bytes at least 2.18, 1.68 or 1.31.

Shapes: s states, t bytes, b rows, v = 256 bytes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.data._synthetic import options_in, tape
from pytest_lmeval.errors import CorpusError

STATES, CONSONANTS, VOWELS = 48, "dlmnrst", "aeio"
WEIGHTS = ((160, 64, 32), (128, 96, 32), (192, 48, 16))  # of a state's branches; 1.30, 1.41 and 1.01 bits
SIZES = {"train": 2_000_000, "validation": 200_000, "test": 200_000}
PART = 1 << 16  # bytes that are produced together
IMPOSSIBLE = 1e-12  # probability of a byte that cannot come: its loss is large, and a number


class Branch(NamedTuple):
    """Emit `letter`, one ASCII character, with a probability of `weight` / 256 and go to the state `to`."""

    letter: str
    weight: int
    to: int


@dataclass(frozen=True)
class Automaton:
    """The branches of each state; the first state is number 0. Raises ValueError where they are no unifilar source."""

    states: tuple[tuple[Branch, ...], ...]

    def __post_init__(self) -> None:
        for number, branches in enumerate(self.states):
            letters = {branch.letter for branch in branches}
            total = sum(branch.weight for branch in branches)
            possible = all(
                letter.isascii() and len(letter) == 1 and weight > 0 and 0 <= to < len(self.states)
                for letter, weight, to in branches
            )
            if not possible or total != 256 or len(letters) < len(branches):
                raise ValueError(
                    f"state {number} of {len(self.states)} has the branches {branches}, weights {total} in all. Letters must "
                    "be ASCII characters and differ, weights be positive and add up to 256, and each branch lead to a state: "
                    "else the entropy of the text is not known."
                )


@functools.cache
def automaton(seed: int = 0, states: int = STATES) -> Automaton:
    """An automaton drawn at random, always the same for a seed. Its `states` (a multiple of four) are for a consonant and for a
    vowel by turns, so that its text can be pronounced.

    The last branch of a state leads to the next one, round in a ring, so that each is reached from each. In every second state
    for a consonant the likeliest branch is a space, which leads to one of the others.
    """
    if states < 4 or states % 4:
        raise ValueError(f"{states} states cannot be for space, vowel, consonant and vowel by turns: take a multiple of four.")
    draws = iter(tape("automaton", "branches", seed, size=64 * states))

    def branches(state: int) -> tuple[Branch, ...]:
        letters, weights = list(VOWELS if state % 2 else CONSONANTS), WEIGHTS[next(draws) % 3]
        chosen = [letters.pop(next(draws) % len(letters)) for _ in weights]
        ends = [(state + 1 + 2 * (next(draws) % (states // 2))) % states for _ in weights[1:]] + [(state + 1) % states]
        if state % 4 == 0:
            chosen[0], ends[0] = " ", 4 * (next(draws) % (states // 4)) + 2
        return tuple(map(Branch, chosen, weights, ends))

    return Automaton(tuple(map(branches, range(states))))


def probabilities(source: Automaton) -> np.ndarray:
    """[s, v] of each byte in each state."""
    found = np.zeros((len(source.states), 256))
    for state, branches in enumerate(source.states):
        for letter, weight, _ in branches:
            found[state, ord(letter)] = weight / 256
    return found


def following(source: Automaton) -> np.ndarray:
    """[s, v] the state after each byte in each state; after a byte that cannot come, the first one."""
    found = np.zeros((len(source.states), 256), dtype=np.int64)
    for state, branches in enumerate(source.states):
        for letter, _, to in branches:
            found[state, ord(letter)] = to
    return found


# ------------------------------------------------------------------------------------------ its entropy


def entropy_rate(source: Automaton) -> float:
    """Entropy of a byte of an endless text given everything before it, nats: the states' entropies, by how often each is met.

    >>> print(f"{entropy_rate(automaton()) / np.log(2):.4f} bits a byte")
    1.2358 bits a byte
    """
    return float(stationary(source) @ entropies(probabilities(source)))


def entropy_of(source: Automaton, size: int) -> float:
    """Entropy of the first `size` bytes of a text together, nats."""
    visits, steps = np.zeros(len(source.states)), _moves(source).sum(0)
    state, sums = np.eye(len(steps))[0], np.eye(len(steps))
    while size:  # sums = 1 + steps + ... of as many powers as the block of steps that the bit stands for
        if size & 1:
            visits, state = visits + state @ sums, state @ steps
        sums, steps, size = sums + sums @ steps, steps @ steps, size >> 1
    return float(visits @ entropies(probabilities(source)))


def entropy_in_window(source: Automaton, window: int) -> float:
    """Entropy of a byte of an endless text given the `window` bytes before it alone, nats: the best that a model with that
    much memory can do. Goes through all texts of that length: 357 of three bytes, 21,710 of six, and so on."""
    beliefs, moves = stationary(source)[None], _moves(source)  # [texts, s]: the text was read and the source is in the state
    for _ in range(window):
        beliefs = np.concatenate([beliefs @ letter for letter in moves])
        beliefs = beliefs[beliefs.any(1)]
    chance = beliefs.sum(1)
    return float(chance @ entropies(beliefs / chance[:, None] @ probabilities(source)))


def surprisal(source: Automaton, text: bytes) -> np.ndarray:
    """[t] -log of the probability of each byte of this text given those before it, nats: what the best model pays for it.

    Raises CorpusError for a text that cannot come from this source, with the place.
    """
    chance, after = probabilities(source), following(source).tolist()
    states, state = [], 0
    for byte in text:
        states.append(state)
        state = after[state][byte]
    found = chance[states, np.frombuffer(text, np.uint8)]
    if not found.all():
        place = int(np.flatnonzero(found == 0)[0])
        raise CorpusError(
            f"byte {place} of the text is {text[place : place + 1]!r}, after {text[max(0, place - 10) : place]!r}: that cannot "
            "come from this automaton, so its surprisal is infinite. Read a text from its beginning, and of the same source."
        )
    nats: np.ndarray = -np.log(found)
    return nats


def stationary(source: Automaton) -> np.ndarray:
    """[s] the share of each state in an endless text."""
    balance = _moves(source).sum(0).T - np.eye(len(source.states))
    balance[-1] = 1  # one of the equations follows from the others; in its place: the shares add up to one
    found: np.ndarray = np.linalg.solve(balance, np.eye(len(balance))[-1])
    return found


def entropies(chances: np.ndarray) -> np.ndarray:
    """[n] the entropy of each row of [n, v], nats."""
    found: np.ndarray = -(chances * np.log(np.where(chances > 0, chances, 1))).sum(1)
    return found


def _moves(source: Automaton) -> np.ndarray:
    """[letters, s, s] the probability to emit the letter and to go from state to state."""
    letters = sorted({branch.letter for branches in source.states for branch in branches})
    found = np.zeros((len(letters), len(source.states), len(source.states)))
    for state, branches in enumerate(source.states):
        for letter, weight, to in branches:
            found[letters.index(letter), state, to] = weight / 256
    return found


# ----------------------------------------------------------------------------------- its text, its model


def write(source: Automaton, tapes: Iterable[bytes]) -> Iterator[str]:
    """The text that random bytes make of the source: each picks a branch, by the weights."""
    letters = ["".join(letter * weight for letter, weight, _ in branches) for branches in source.states]
    ends = [[to for _, weight, to in branches for _ in range(weight)] for branches in source.states]
    state = 0
    for random in tapes:
        text = []
        for byte in random:
            text.append(letters[state][byte])
            state = ends[state][byte]
        yield "".join(text)


def corpus(given: str, split: str) -> Corpus:
    """One long text; the options are its `size` in bytes and the `seed` of its letters (the automaton is always the same)."""
    options = options_in("automaton", given, {"size": SIZES[split], "seed": 0})
    size, seed, source = int(options["size"]), int(options["seed"]), automaton()
    if size < 2:
        raise CorpusError(f"automaton:{given}: a text of {size} byte(s) has nothing to predict; give it at least two.")
    name = f"automaton/{seed}/{split}"

    def documents() -> Iterator[Document]:
        tapes = (tape(name, begin // PART, size=min(PART, size - begin)) for begin in range(0, size, PART))
        return (Document(name, text) for text in write(source, tapes))

    digest = hashlib.sha256(f"{name}/{size}/{source}".encode()).hexdigest()
    entropy = (entropy_of(source, size) - entropy_of(source, 1)) / (size - 1)  # the first byte is no target
    return Corpus(f"automaton:{given}".rstrip(":"), split, documents, digest, size=size, entropy=entropy)


class AutomatonLM(nn.Module):
    """The language model that is the source: bytes in, the exact probabilities of the next byte out.

    A byte that cannot come leads back to the first state, so every text can be read.
    """

    constant_state = True

    def __init__(self, source: Automaton) -> None:
        super().__init__()
        chance = torch.from_numpy(np.maximum(probabilities(source), IMPOSSIBLE))
        self.logits = nn.Parameter(chance.log().float(), requires_grad=False)  # [s, v]
        self.register_buffer("following", torch.from_numpy(following(source)))  # [s, v]

    def forward(self, input_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [b, t, v] of the byte after each of `input_ids` [b, t], and the states [b] of the automaton."""
        # a state hangs on the one before it: plain lists walk some fifty times as fast as tensors of one element
        after, walks = self.get_buffer("following").tolist(), []
        states = [0] * len(input_ids) if state is None else state.tolist()
        for now, row in zip(states, input_ids.tolist(), strict=True):
            walks.append([now := after[now][byte] for byte in row])
        walked = torch.tensor(walks, device=input_ids.device)
        return self.logits[walked], walked[:, -1].clone()


def load() -> AutomatonLM:
    """The source of the corpus `automaton` as a language model."""
    return AutomatonLM(automaton()).eval()
