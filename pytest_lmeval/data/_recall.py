"""Generate the corpus `recall`, an endless text of key-value pairs, and provide optimal language models for it.

Each document draws a table from keys to values; then it draws keys independently and emits each with its value. A value costs
log(values) nats at the first occurrence of its key and nothing later, but log(values) nats again if the key is not in the
window: so the value of memory beyond a window is exactly known. This is associative recall (Ba et al., "Using Fast Weights to
Attend to the Recent Past", 2016) with many queries (Arora et al., "Zoology", 2023).

Shapes: n keys, d bytes of a key, b rows, t bytes, r rows of logits, v = 256 bytes.
"""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.data._synthetic import options_in, tape
from pytest_lmeval.errors import CorpusError

DIGITS = string.ascii_letters + string.digits + "/@"  # keys are numbers of base 64
VALUES = "+-*=<>!?.,:;#%&$"
DRAWS = 1 << 16  # frequencies are multiples of 1 / DRAWS, so that two random bytes draw a key exactly
SIZES = {"train": 2_000_000, "validation": 200_000, "test": 200_000}
DOCUMENT = 4096  # bytes of a document for training, several training sequences; the test split is one document
PART = 1 << 14  # pairs that are generated together
IMPOSSIBLE = 1e-12  # probability of an impossible byte: its loss is large, but finite

DIGIT = {byte: number for number, byte in enumerate(DIGITS.encode())}
VALUE = {byte: number for number, byte in enumerate(VALUES.encode())}
FIRST, NEW, KNOWN, SECOND = 0, 1, 2, 2 + len(VALUES)  # rows of logits, see `_rows`
NEVER = -(1 << 40)  # the number of the last pair of a key that has not occurred


@dataclass(frozen=True)
class Recall:
    """The parameters of a text."""

    keys: int = 64  # 2 to 4096; more than 64 take two bytes
    values: int = 16  # 2, 4, 8 or 16
    skew: float = 0.0  # 0 to 4: keys are drawn in proportion to 1 / rank ** skew (Zipf)

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= 4096 or self.values not in (2, 4, 8, 16) or not 0 <= self.skew <= 4:
            raise CorpusError(
                f"recall:keys={self.keys},values={self.values},skew={self.skew:g}: there can be 2 to 4096 keys, 2, 4, 8 or 16 "
                "values, and a skew from 0 to 4."
            )

    @property
    def digits(self) -> int:
        """Bytes of a key."""
        return 1 if self.keys <= 64 else 2

    @property
    def pair(self) -> int:
        """Bytes of a key and its value."""
        return self.digits + 1


def frequencies(source: Recall) -> np.ndarray:
    """[n] the exact probability of each key."""
    return _draws(source) / DRAWS


def _draws(source: Recall) -> np.ndarray:
    """[n] the number of the 65536 numbers of two bytes that draw each key, at least one."""
    wanted = np.arange(1.0, source.keys + 1) ** -source.skew
    upto = np.cumsum(wanted / wanted.sum()) * (DRAWS - source.keys)
    return np.diff(np.round(upto).astype(np.int64), prepend=0) + 1


def entropy_at(source: Recall, position: int) -> float:
    """Entropy of the byte at `position` (the first is 0) given all before it in its document, nats."""
    pairs, digit = divmod(position, source.pair)
    return _key_entropies(source)[digit] if digit < source.digits else _value_entropy(source, pairs)


def entropy_of(source: Recall, size: int) -> float:
    """Entropy of the first `size` bytes of a document together, nats."""
    whole, rest = divmod(size, source.pair)
    often = frequencies(source)
    new = float((1 - (1 - often) ** whole).sum())  # expected number of different keys in so many pairs
    pairs = whole * sum(_key_entropies(source)) + new * math.log(source.values)
    return pairs + sum(entropy_at(source, position) for position in range(size - rest, size))


def entropy_in_window(source: Recall, window: int) -> float:
    """Mean entropy per byte of a long document given only the `window` bytes before, nats.

    Exact if the window holds whole pairs before the current key (pairs * pair + digits: 65 for one-byte keys); otherwise the
    entropy for the next such window, a lower bound. Raises ValueError if the window is smaller than a key.
    """
    if window < source.digits:
        raise ValueError(f"a window of {window} byte(s) is smaller than a key of {source.digits}: its entropy is unknown.")
    pairs = -(-(window - source.digits) // source.pair)
    return (sum(_key_entropies(source)) + _value_entropy(source, pairs)) / source.pair


def _value_entropy(source: Recall, pairs: int) -> float:
    """Entropy of a value given so many pairs before it, nats."""
    often = frequencies(source)
    return float(often @ (1 - often) ** pairs) * math.log(source.values)


def _key_entropies(source: Recall) -> list[float]:
    """[d] entropy of each byte of a key given those before it, nats."""
    often, first = frequencies(source), _by_first_digit(source).sum(1)
    whole, leading = (float(-(chance * np.log(chance)).sum()) for chance in (often, first))
    return [leading, whole - leading][-source.digits :]  # with one digit, `leading` is 0


def _by_first_digit(source: Recall) -> np.ndarray:
    """[first digits, 64] the frequencies of keys, as numbers of two digits."""
    often = frequencies(source)
    return np.pad(often, (0, -len(often) % 64)).reshape(-1, 64)


def write(source: Recall, name: str, size: int) -> Iterator[str]:
    """Yield the first `size` bytes of the document of that name, in parts."""
    letters = np.frombuffer(DIGITS.encode(), np.uint8)
    numbers = np.repeat(np.arange(source.keys), _draws(source))
    table = np.frombuffer(tape(name, "table", size=source.keys), np.uint8) % source.values
    for part, begin in enumerate(range(0, size, PART * source.pair)):
        pairs = min(PART, -(-(size - begin) // source.pair))
        keys = numbers[np.frombuffer(tape(name, part, size=2 * pairs), "<u2")]
        columns = [letters[keys // 64**digit % 64] for digit in reversed(range(source.digits))]
        text = np.stack([*columns, np.frombuffer(VALUES.encode(), np.uint8)[table[keys]]], axis=1)
        yield text.tobytes()[: size - begin].decode()


def corpus(given: str, split: str) -> Corpus:
    """Documents of 4096 bytes, each with its own table, for training and validation; one long document for the test split.

    Options: `keys`, `values`, `skew` (see `Recall`), `size` in bytes of all documents together, `seed` of keys and tables."""
    options = options_in("recall", given, {**vars(Recall()), "size": SIZES[split], "seed": 0})
    source = Recall(int(options["keys"]), int(options["values"]), options["skew"])
    size, seed = int(options["size"]), int(options["seed"])
    one = split == "test"
    length = size if one else min(size, DOCUMENT)
    if length < 2:
        raise CorpusError(f"recall:{given}: a text of {size} byte(s) has nothing to predict; use at least two.")
    names = [f"recall/{seed}/{split}/{number}" for number in range(max(1, size // length))]

    def documents() -> Iterator[Document]:
        return (Document(name, part) for name in names for part in write(source, name, length))

    digest = hashlib.sha256(f"{names[0]}/{size}/{length}/{source}".encode()).hexdigest()
    entropy = (entropy_of(source, length) - entropy_of(source, 1)) / (length - 1)  # the first byte is no target
    name = f"recall:{given}".rstrip(":")
    return Corpus(name, split, documents, digest, as_stream=one, size=len(names) * length, entropy=entropy)


class RecallState(NamedTuple):
    """The state of `RecallLM`."""

    values: Tensor  # [b, n] the number of the value of each key
    last: Tensor  # [b, n] the number of the last pair with each key, or NEVER
    key: Tensor  # [b] the digits of the current key so far
    position: Tensor  # [b] bytes read


class RecallLM(nn.Module):
    """The optimal language model of `recall`: it remembers all pairs, or those that are completely within a window. An
    impossible byte counts as the digit 0, or as no value, so every text can be read."""

    constant_state = True

    def __init__(self, source: Recall, window: int | None = None) -> None:
        super().__init__()
        self.keys, self.digits = source.keys, source.digits
        self.pairs = -NEVER // 2 if window is None else max(0, window - source.digits) // source.pair  # pairs in its memory
        self.logits = nn.Parameter(torch.from_numpy(_rows(source)).log().float(), requires_grad=False)  # [r, v]

    def forward(self, input_ids: Tensor, state: RecallState | None = None) -> tuple[Tensor, RecallState]:
        """Logits [b, t, v] of the byte after each of `input_ids` [b, t], and the new state."""
        b, n = len(input_ids), self.keys
        if state is None:
            one = torch.zeros(b, dtype=torch.long)
            state = RecallState(torch.zeros(b, n).long(), torch.full((b, n), NEVER), one, one)
        # byte by byte on lists: tensors of one element would be about fifty times slower
        states = zip(*(part.tolist() for part in state), strict=True)
        read = [self._read(row, *row_state) for row, row_state in zip(input_ids.tolist(), states, strict=True)]
        rows, *parts = (torch.tensor(part, device=input_ids.device) for part in zip(*read, strict=True))
        return self.logits[rows], RecallState(*parts)

    def _read(self, ids: list[int], values: list[int], last: list[int], key: int, begin: int) -> tuple[object, ...]:
        """The row of `logits` after each byte of one text, and the fields of its new state."""
        rows = []
        for position, byte in enumerate(ids, start=begin):
            pair, digit = divmod(position, self.digits + 1)
            if digit == self.digits:
                if byte in VALUE:
                    values[key], last[key] = VALUE[byte], pair
                key = 0
                rows.append(FIRST)
                continue
            key = (64 * key + DIGIT.get(byte, 0)) % self.keys
            if digit < self.digits - 1:
                rows.append(SECOND + key % -(-self.keys // 64))
            else:
                rows.append(KNOWN + values[key] if pair - last[key] <= self.pairs else NEW)
        return rows, values, last, key, begin + len(ids)


def _rows(source: Recall) -> np.ndarray:
    """[r, v] probabilities of: a key's first byte; a new value; each known value; the second byte after each first byte."""
    digits, values = list(DIGITS.encode()), list(VALUES[: source.values].encode())
    often = frequencies(source) if source.digits == 1 else _by_first_digit(source).sum(1)
    seconds = _by_first_digit(source) if source.digits == 2 else np.empty((0, 64))
    rows = np.full((SECOND + len(seconds), 256), IMPOSSIBLE)
    rows[FIRST, digits[: len(often)]] = often
    rows[NEW, values] = 1 / source.values
    rows[range(KNOWN, KNOWN + len(values)), values] = 1
    rows[SECOND:, digits] = np.maximum(seconds / seconds.sum(1, keepdims=True), IMPOSSIBLE)
    return rows


def load() -> RecallLM:
    """The optimal model of the corpus `recall`, which remembers all pairs."""
    return RecallLM(Recall()).eval()


def load_windowed() -> RecallLM:
    """The optimal model that sees the last 65 bytes: 32 pairs and a key."""
    return RecallLM(Recall(), window=65).eval()
