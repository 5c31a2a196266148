"""`recall`: pairs of a key and its value, for ever, so that memory beyond a window is worth a known number of nats.

    source = Recall()                64 keys of one byte, 16 values
    entropy_at(source, 8001)         what the best model pays for a byte, having read all 8001 before it, nats
    entropy_in_window(source, 65)    what the best model pays for a byte on average that sees 65 of them at a time
    load(), load_windowed()          two models that reach these floors

Each document draws its own table from keys to values and keeps it to its end; then it draws keys, each independently of the
others, and emits them with their values. A value can only be known from an earlier time that its key was met: it costs
log(values) nats the first time and nothing ever after - or log(values) nats again, whenever the key was not met within the
window. This is associative recall (Ba et al., "Using Fast Weights to Attend to the Recent Past", 2016) with many queries
(Arora et al., "Zoology", 2023), without end.

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
DOCUMENT = 4096  # bytes of a document for training, some times a training sequence; the test is one document
PART = 1 << 14  # pairs that are produced together
IMPOSSIBLE = 1e-12  # probability of a byte that cannot come: its loss is large, and a number

DIGIT = {byte: number for number, byte in enumerate(DIGITS.encode())}
VALUE = {byte: number for number, byte in enumerate(VALUES.encode())}
FIRST, NEW, KNOWN, SECOND = 0, 1, 2, 2 + len(VALUES)  # rows of logits, see `_rows`
NEVER = -(1 << 40)  # the number of a pair before all others


@dataclass(frozen=True)
class Recall:
    """keys    how many there are, up to 4096; more than 64 take two bytes
    values  2, 4, 8 or 16
    skew    keys are drawn in proportion to 1 / rank ** skew (Zipf): 0 draws all alike, 1 some rarely, so that there is
            something new to be met for long
    """

    keys: int = 64
    values: int = 16
    skew: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= 4096 or self.values not in (2, 4, 8, 16) or not 0 <= self.skew <= 4:
            raise CorpusError(
                f"recall:keys={self.keys},values={self.values},skew={self.skew:g}: there can be 2 to 4096 keys (numbers of two "
                "digits, base 64), 2, 4, 8 or 16 values (so that random bits draw them exactly), and a skew from 0 to 4."
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
    """[n] how often each key is drawn, exactly: multiples of 1 / 65536, at least one of them."""
    return _draws(source) / DRAWS


def _draws(source: Recall) -> np.ndarray:
    """[n] of the 65536 numbers of two bytes, how many stand for each key."""
    wanted = np.arange(1.0, source.keys + 1) ** -source.skew
    upto = np.cumsum(wanted / wanted.sum()) * (DRAWS - source.keys)
    return np.diff(np.round(upto).astype(np.int64), prepend=0) + 1


# ------------------------------------------------------------------------------------------ its entropy


def entropy_at(source: Recall, position: int) -> float:
    """Entropy of the byte at `position` (the first is 0) given all before it in its document, nats."""
    pairs, place = divmod(position, source.pair)
    return _key_entropies(source)[place] if place < source.digits else _value_entropy(source, pairs)


def entropy_of(source: Recall, size: int) -> float:
    """Entropy of the first `size` bytes of a document together, nats."""
    whole, rest = divmod(size, source.pair)
    often = frequencies(source)
    new = float((1 - (1 - often) ** whole).sum())  # keys met in so many pairs, on average
    pairs = whole * sum(_key_entropies(source)) + new * math.log(source.values)
    return pairs + sum(entropy_at(source, position) for position in range(size - rest, size))


def entropy_in_window(source: Recall, window: int) -> float:
    """Entropy of a byte, on average over a long document, for a model that sees the `window` bytes before it alone, nats.

    A model of several layers of windowed attention sees further than one layer does: layers * (window - 1) + 1 bytes.
    Exact where the window holds whole pairs before the key at hand (pairs * pair + digits: 65 of one-byte keys). Elsewhere it
    shows a part of one more, which tells a little; then the floor is that of a window that shows all of it: nobody is below it.
    """
    if window < source.digits:
        raise ValueError(f"a window of {window} byte(s) shows no key of {source.digits}; its floor is not known here.")
    pairs = -(-(window - source.digits) // source.pair)
    return (sum(_key_entropies(source)) + _value_entropy(source, pairs)) / source.pair


def _value_entropy(source: Recall, pairs: int) -> float:
    """Entropy of a value whose key may have been met in so many pairs, nats."""
    often = frequencies(source)
    return float(often @ (1 - often) ** pairs) * math.log(source.values)


def _key_entropies(source: Recall) -> list[float]:
    """[d] entropy of each byte of a key given those before it, nats."""
    often, first = frequencies(source), _by_first_digit(source).sum(1)
    whole, leading = (float(-(chance * np.log(chance)).sum()) for chance in (often, first))
    return [leading, whole - leading][-source.digits :]  # of a single digit, a first one of 0 is known


def _by_first_digit(source: Recall) -> np.ndarray:
    """[first digits, 64] the frequencies of keys as numbers of two digits."""
    often = frequencies(source)
    return np.pad(often, (0, -len(often) % 64)).reshape(-1, 64)


# ----------------------------------------------------------------------------------- its text, its model


def write(source: Recall, name: str, size: int) -> Iterator[str]:
    """The first `size` bytes of the document of that name, in parts."""
    letters = np.frombuffer(DIGITS.encode(), np.uint8)
    numbers = np.repeat(np.arange(source.keys), _draws(source))
    table = np.frombuffer(tape(name, "table", size=source.keys), np.uint8) % source.values
    for part, begin in enumerate(range(0, size, PART * source.pair)):
        pairs = min(PART, -(-(size - begin) // source.pair))
        keys = numbers[np.frombuffer(tape(name, part, size=2 * pairs), "<u2")]
        columns = [letters[keys // 64**place % 64] for place in reversed(range(source.digits))]
        text = np.stack([*columns, np.frombuffer(VALUES.encode(), np.uint8)[table[keys]]], axis=1)
        yield text.tobytes()[: size - begin].decode()


def corpus(given: str, split: str) -> Corpus:
    """Documents of 4096 bytes, each with its own table, to train on and to validate; to test, one long document.

    Options: `keys`, `values`, `skew` (see `Recall`), `size` in bytes of all documents (to train
    and to validate, as many whole ones as fit), `seed` of keys and tables."""
    options = options_in("recall", given, {**vars(Recall()), "size": SIZES[split], "seed": 0})
    source = Recall(int(options["keys"]), int(options["values"]), options["skew"])
    size, seed = int(options["size"]), int(options["seed"])
    one = split == "test"
    length = size if one else min(size, DOCUMENT)
    if length < 2:
        raise CorpusError(f"recall:{given}: a text of {size} byte(s) has nothing to predict; give it at least two.")
    names = [f"recall/{seed}/{split}/{number}" for number in range(max(1, size // length))]

    def documents() -> Iterator[Document]:
        return (Document(name, part) for name in names for part in write(source, name, length))

    digest = hashlib.sha256(f"{names[0]}/{size}/{length}/{source}".encode()).hexdigest()
    entropy = (entropy_of(source, length) - entropy_of(source, 1)) / (length - 1)  # the first byte is no target
    name = f"recall:{given}".rstrip(":")
    return Corpus(name, split, documents, digest, as_stream=one, size=len(names) * length, entropy=entropy)


class Seen(NamedTuple):
    """What a reader of pairs remembers."""

    values: Tensor  # [b, n] the value of each key, by number
    met: Tensor  # [b, n] the pair that it last stood in; NEVER if in none
    key: Tensor  # [b] of the key that is being read, the digits so far
    at: Tensor  # [b] bytes read


class RecallLM(nn.Module):
    """The language model that is the source, with a memory of all pairs, or of those that a window shows whole.

    A byte that cannot come is read as the digit 0, or as no value at all, so every text can be read.
    """

    constant_state = True

    def __init__(self, source: Recall, window: int | None = None) -> None:
        super().__init__()
        self.keys, self.digits = source.keys, source.digits
        self.pairs = -NEVER // 2 if window is None else max(0, window - source.digits) // source.pair  # that it remembers
        self.logits = nn.Parameter(torch.from_numpy(_rows(source)).log().float(), requires_grad=False)  # [r, v]

    def forward(self, input_ids: Tensor, state: Seen | None = None) -> tuple[Tensor, Seen]:
        """Logits [b, t, v] of the byte after each of `input_ids` [b, t], and what is remembered."""
        b, n = len(input_ids), self.keys
        if state is None:
            state = Seen(torch.zeros(b, n).long(), torch.full((b, n), NEVER), torch.zeros(b).long(), torch.zeros(b).long())
        # one byte after the other, on plain lists: tensors of one element would take some fifty times as long
        memories = zip(*(part.tolist() for part in state), strict=True)
        read = [self._read(row, *memory) for row, memory in zip(input_ids.tolist(), memories, strict=True)]
        rows, *parts = (torch.tensor(part, device=input_ids.device) for part in zip(*read, strict=True))
        return self.logits[rows], Seen(*parts)

    def _read(self, row: list[int], values: list[int], met: list[int], key: int, at: int) -> tuple[object, ...]:
        """The row of logits after each byte of one text, and its memory."""
        rows = []
        for at, byte in enumerate(row, start=at):  # noqa: B020 - counts on from where the last call ended
            pair, place = divmod(at, self.digits + 1)
            if place == self.digits:
                if byte in VALUE:
                    values[key], met[key] = VALUE[byte], pair
                key = 0
                rows.append(FIRST)
                continue
            key = (64 * key + DIGIT.get(byte, 0)) % self.keys
            if place < self.digits - 1:
                rows.append(SECOND + key % -(-self.keys // 64))
            else:
                rows.append(KNOWN + values[key] if pair - met[key] <= self.pairs else NEW)
        return rows, values, met, key, at + 1


def _rows(source: Recall) -> np.ndarray:
    """[r, v] probabilities: of a key's first byte, of a new value, of each known one, of the second byte after each first."""
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
    """The source of the corpus `recall` as a language model that forgets nothing."""
    return RecallLM(Recall()).eval()


def load_windowed() -> RecallLM:
    """The same with a memory of the last 65 bytes: 32 pairs and a key."""
    return RecallLM(Recall(), window=65).eval()
