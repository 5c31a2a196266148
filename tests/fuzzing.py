"""Damage the bytes of a file or the values in a JSON text, and count what a reader makes of it."""

import copy
import json
import random
import warnings
from collections import Counter

from pytest_lmeval.errors import LmevalError

DEEP = 100_000
ODD = [
    None, True, 0, -1, 3, 1 << 70, 10**399, 1e308, -0.5, "", "x", "k0", "\ud800", "\x00", "\u4f60" * 80, "2024-01-01T00:00:00Z",
    [], {}, [[1]], [None], {"a": {}}, {"": 1}, ["x"], [[["x"]]], {"keys": [1]},
]  # fmt: skip


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """The bytes cut, flipped, doubled, overwritten, or with something nested without end."""
    begin = rng.randrange(len(raw) + 1)
    end = min(len(raw), begin + rng.choice([1, 2, 8, 60, 1000]))
    kinds = [
        raw[:begin],
        raw[:begin] + raw[end:],
        raw[:begin] + raw[begin:end] * 2 + raw[end:],
        raw[:begin] + rng.randbytes(end - begin) + raw[end:],
        raw[:begin] + bytes(end - begin) + raw[end:],
        raw[:begin] + bytes([rng.choice(b'"{}[],:0-\\\n')]) + raw[begin:],
        raw[:begin] + rng.choice([b"[", b'{"a":']) * rng.choice([5, 150, DEEP]) + raw[end:],
        raw[:begin] + b"9" * rng.choice([400, 5000]) + raw[end:],
        b"",
    ]
    return rng.choice(kinds)


def altered(plain, rng: random.Random, odd=ODD):
    """A copy of JSON values in which one to three, anywhere, are odd, missing, or stand under an odd name."""
    plain = copy.deepcopy(plain)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(plain))
        if not places:
            return copy.deepcopy(rng.choice(odd))
        whole, name = rng.choice(places if rng.random() < 0.6 else [place for place in places if place[0] is plain])
        what = rng.random()
        if what < 0.75:
            whole[name] = copy.deepcopy(rng.choice(odd))
        elif what < 0.9 or isinstance(whole, list):
            del whole[name]
        else:
            whole[rng.choice(["", "x", "more", "__more__", "schema"])] = whole.pop(name)
    return plain


def _places(plain):
    names = plain if isinstance(plain, dict) else range(len(plain)) if isinstance(plain, list) else ()
    for name in list(names):
        yield plain, name
        yield from _places(plain[name])


def text_of(plain) -> bytes:
    """Without spaces, on a line, as JSON has it; an integer may have 400 digits."""
    return json.dumps(plain, separators=(",", ":")).encode()


def outcomes(readings) -> Counter:
    """How many of these functions returned, returned with a warning of ours, or were refused by an error of ours.

    Any other exception is counted under its type and message.
    """
    counts = Counter()
    for reading in readings:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                noted = reading()
                counts["warned" if said or noted else "read"] += 1
            except LmevalError as error:
                counts["refused" if len(str(error)) > 20 else f"escaped: {error!r} says nothing"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                counts[f"escaped: {type(error).__name__}: {str(error)[:60]}"] += 1
    return counts


def escaped(counts: Counter) -> list[str]:
    return [name for name in counts if name.startswith("escaped")]
