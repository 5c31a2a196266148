"""Generate the corpus `automaton`, synthetic words of exactly known entropy, and provide the optimal language model for it.

The source is a finite automaton. A state has three branches, each with a letter, a weight in 256ths and a next state. The
branches of a state have different letters, so the first state and the text determine every state, and the entropy of the text
is the mean entropy of its states (Shannon, "A Mathematical Theory of Communication", 1948, section 7). The best model reaches
1.24 bits per byte, one that sees the last 1, 3 or 6 bytes at best 2.18, 1.68 or 1.31.

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
WEIGHTS = ((160, 64, 32), (128, 96, 32), (192, 48, 16))  # of the branches of a state; 1.30, 1.41 and 1.01 bits
SIZES = {"train": 2_000_000, "validation": 200_000, "test": 200_000}
PART = 1 << 16  # bytes that are generated together
IMPOSSIBLE = 1e-12  # probability of an impossible byte: its loss is large, but finite


class Branch(NamedTuple):
    """With probability `weight` / 256, emit `letter`, one ASCII character, and go to state `to`."""

    letter: str
    weight: int
    to: int


@dataclass(frozen=True)
class Automaton:
    """The branches of each state; the first state is number 0. Raises ValueError if they are no unifilar source."""

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
                    f"state {number} of {len(self.states)} has the branches {branches}, weights {total} in all. The entropy is "
                    "known only if letters are ASCII and differ, positive weights add up to 256, and branches lead to states."
                )


@functools.cache
def automaton(seed: int = 0, states: int = STATES) -> Automaton:
    """A random automaton, determined by the seed. Its `states` (a multiple of four) emit consonants and vowels alternately.

    The last branch of a state leads to the next one, so that each state is reachable. In every second consonant state, the
    likeliest branch is a space, which leads to one of the other consonant states.
    """
    if states < 4 or states % 4:
        raise ValueError(f"{states} states do not alternate space, vowel, consonant and vowel: use a multiple of four.")
    draws = iter(tape("automaton", "branches", seed, size=64 * states))

    def branches(state: int) -> tuple[Branch, ...]:
        letters, weights = list(VOWELS if state % 2 else CONSONANTS), WEIGHTS[next(draws) % 3]
        chosen = [letters.pop(next(draws) % len(letters)) for _ in weights]
        ends = [(state + 1 + 2 * (next(draws) % (states // 2))) % states for _ in weights[1:]] + [(state + 1) % states]
        if state % 4 == 0:
            chosen[0], ends[0] = " ", 4 * (next(draws) % (states // 4)) + 2
        return tuple(map(Branch, chosen, weights, ends))

    return Automaton(tuple(map(branches, range(states))))


def tables(source: Automaton) -> tuple[np.ndarray, np.ndarray]:
    """[s, v] each: the probability of each byte in each state, and the next state (0 after an impossible byte)."""
    chance, after = np.zeros((len(source.states), 256)), np.zeros((len(source.states), 256), dtype=np.int64)
    for state, branches in enumerate(source.states):
        for letter, weight, to in branches:
            chance[state, ord(letter)], after[state, ord(letter)] = weight / 256, to
    return chance, after


def entropy_rate(source: Automaton) -> float:
    """Entropy per byte of an endless text given all bytes before, nats: the loss of the best model."""
    return float(stationary(source) @ entropies(tables(source)[0]))


def entropy_of(source: Automaton, size: int) -> float:
    """Entropy of the first `size` bytes of a text together, nats."""
    visits, steps = np.zeros(len(source.states)), _transitions(source).sum(0)
    state, sums = np.eye(len(steps))[0], np.eye(len(steps))
    while size:  # by binary powers: `steps` is the transition matrix to the power 2 ** i, `sums` the sum of all lower powers
        if size & 1:
            visits, state = visits + state @ sums, state @ steps
        sums, steps, size = sums + sums @ steps, steps @ steps, size >> 1
    return float(visits @ entropies(tables(source)[0]))


def entropy_in_window(source: Automaton, window: int) -> float:
    """Entropy per byte of an endless text given only the `window` bytes before, nats: a lower bound for models with that much
    memory. Enumerates all texts of that length: 357 of three bytes, 21,710 of six."""
    joint, transitions = stationary(source)[None], _transitions(source)  # [texts, s]: P(text, state after it)
    for _ in range(window):
        joint = np.concatenate([joint @ letter for letter in transitions])
        joint = joint[joint.any(1)]
    chance = joint.sum(1)
    return float(chance @ entropies(joint / chance[:, None] @ tables(source)[0]))


def surprisal(source: Automaton, text: bytes) -> np.ndarray:
    """[t] -log of the probability of each byte of this text given those before it, nats: the loss of the best model.

    Raises CorpusError for a text that this source cannot emit.
    """
    chance, after = tables(source)
    states, state, following = [], 0, after.tolist()
    for byte in text:
        states.append(state)
        state = following[state][byte]
    found = chance[states, np.frombuffer(text, np.uint8)]
    if not found.all():
        at = int(np.flatnonzero(found == 0)[0])
        raise CorpusError(
            f"byte {at} of the text is {text[at : at + 1]!r}, after {text[max(0, at - 10) : at]!r}: that cannot come from this "
            "automaton, so its surprisal is infinite. Read a text from its beginning, and of the same source."
        )
    return np.asarray(-np.log(found))


def stationary(source: Automaton) -> np.ndarray:
    """[s] the fraction of each state in an endless text."""
    balance = _transitions(source).sum(0).T - np.eye(len(source.states))
    balance[-1] = 1  # replaces a redundant equation: the fractions add up to one
    return np.linalg.solve(balance, np.eye(len(balance))[-1])


def entropies(chances: np.ndarray) -> np.ndarray:
    """[n] the entropy of each row of [n, v], nats."""
    return np.asarray(-(chances * np.log(np.where(chances > 0, chances, 1))).sum(1))


def _transitions(source: Automaton) -> np.ndarray:
    """[letters, s, s] the probability to emit the letter and to go from state to state."""
    chance, after = tables(source)
    letters = np.flatnonzero(chance.any(0))
    return np.asarray(chance.T[letters, :, None] * np.eye(len(chance))[after.T[letters]])


def write(source: Automaton, tapes: Iterable[bytes]) -> Iterator[str]:
    """Yield the text for random bytes: each byte chooses a branch, by the weights."""
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
    """One text. Options: `size` in bytes, and the `seed` of its letters (the automaton is always the same)."""
    options = options_in("automaton", given, {"size": SIZES[split], "seed": 0})
    size, seed, source = int(options["size"]), int(options["seed"]), automaton()
    if size < 2:
        raise CorpusError(f"automaton:{given}: a text of {size} byte(s) has nothing to predict; use at least two.")
    name = f"automaton/{seed}/{split}"

    def documents() -> Iterator[Document]:
        tapes = (tape(name, begin // PART, size=min(PART, size - begin)) for begin in range(0, size, PART))
        return (Document(name, text) for text in write(source, tapes))

    digest = hashlib.sha256(f"{name}/{size}/{source}".encode()).hexdigest()
    entropy = (entropy_of(source, size) - entropy_of(source, 1)) / (size - 1)  # the first byte is no target
    return Corpus(f"automaton:{given}".rstrip(":"), split, documents, digest, size=size, entropy=entropy)


class AutomatonLM(nn.Module):
    """The optimal language model of an automaton. An impossible byte leads to the first state, so every text can be read."""

    constant_state = True

    def __init__(self, source: Automaton) -> None:
        super().__init__()
        chance, after = map(torch.from_numpy, tables(source))
        self.logits = nn.Parameter(chance.clamp(min=IMPOSSIBLE).log().float(), requires_grad=False)  # [s, v]
        self.register_buffer("following", after)  # [s, v]

    def forward(self, input_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [b, t, v] of the byte after each of `input_ids` [b, t], and the states [b] of the automaton."""
        # one state depends on the last: lists are about fifty times as fast as tensors of one element
        after, paths = self.get_buffer("following").tolist(), []
        states = [0] * len(input_ids) if state is None else state.tolist()
        for now, row in zip(states, input_ids.tolist(), strict=True):
            paths.append([now := after[now][byte] for byte in row])
        visited = torch.tensor(paths, device=input_ids.device)
        return self.logits[visited], visited[:, -1].clone()


def load() -> AutomatonLM:
    """The optimal model of the corpus `automaton`."""
    return AutomatonLM(automaton()).eval()
