"""Parse the options in the names of synthetic corpora, and generate random bytes that no library version changes."""

from __future__ import annotations

import hashlib
import re
from fractions import Fraction

from pytest_lmeval.errors import CorpusError

UNITS = {"": 1, "k": 1000, "M": 1_000_000}


def options_in(name: str, given: str, known: dict[str, float]) -> dict[str, float]:
    """The options in `given`, such as "size=1M,seed=3", with the defaults in `known`. An integer default needs an integer.

    >>> options_in("automaton", "size=2.3M", {"size": 10, "seed": 0})
    {'size': 2300000, 'seed': 0}

    Raises CorpusError for an unknown option or a bad number.
    """
    values = dict(known)
    for item in filter(None, given.split(",")):
        option, _, number = item.partition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", number)
        value = Fraction(match[1]) * UNITS[match[2]] if match else None
        if option not in known or value is None or (isinstance(known[option], int) and value.denominator > 1):
            example = ",".join(f"{key}={default}" for key, default in known.items())
            raise CorpusError(f"{name}:{given}: {item!r} is no option of {name}. Options and defaults: {name}:{example}.")
        values[option] = type(known[option])(value)
    return values


def tape(*name: object, size: int) -> bytes:
    """`size` random bytes for this name: its SHAKE-256, independent of those of other names."""
    return hashlib.shake_256("/".join(map(str, name)).encode()).digest(size)
