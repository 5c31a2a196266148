"""How numbers, sizes, models and texts read."""

from __future__ import annotations

import math
import textwrap
from typing import Any

PREFIXES = "kMGTPE"


def number(value: float, unit: str = "") -> str:
    """Four digits that matter, and the unit.

    >>> number(31244.7, "tokens/s"), number(0.66683), number(3.0, "of 4"), number(0.000123)
    ('31,245 tokens/s', '0.6668', '3 of 4', '0.000123')
    >>> number(3912192, "bytes"), number(7.5712e12, "FLOP")
    ('3.7 MiB', '7.571 TFLOP')
    """
    if unit == "bytes":
        return size_of(value)
    if unit == "FLOP" and value >= 1000:
        power = min(int(math.log10(value)) // 3, len(PREFIXES))
        return f"{value / 1000**power:.4g} {PREFIXES[power - 1]}FLOP"
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def interval(metric: dict[str, Any]) -> str:
    return "" if metric["low"] is None else f"{number(metric['low'])} to {number(metric['high'])}"


def model_line(lm: dict[str, Any]) -> str:
    """The model in a line: spec, size, precision, place, fingerprint."""
    size = "" if lm.get("parameters") is None else f"{lm['parameters']:,} parameters, "
    weight = "" if lm.get("bytes") is None else f"{size_of(lm['bytes'])}, "
    return f"{lm['spec']}: {size}{weight}{lm['dtype']} on {lm['device']} ({lm['fingerprint']})"


def visible(text: str) -> str:
    """Text whose control characters are written out, so that they do nothing where it is shown.

    >>> visible("two\\nlines, bell \\x07, red \\x1b[31m")
    'two\\nlines, bell \\\\x07, red \\\\x1b[31m'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or character.isprintable() or (character.isspace() and character > "\x9f")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def size_of(count: float) -> str:
    """Bytes as people say them.

    >>> size_of(3912192)
    '3.7 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def told_apart(models: list[tuple[str, str]]) -> list[str]:
    """Names of models (spec, fingerprint): the spec, and the fingerprint where several go by one.

    >>> told_apart([("a", "01"), ("b", "02"), ("b", "03")])
    ['a', 'b (02)', 'b (03)']
    """
    specs = [spec for spec, _ in models]
    return [spec if specs.count(spec) == 1 else f"{spec} ({fingerprint[:8]})" for spec, fingerprint in models]


def wrapped(text: str, width: int, *, indent: int = 0) -> list[str]:
    """A remark as lines of the terminal; what follows the first stands two columns further in."""
    first, further = " " * indent, " " * (indent + 2)
    return textwrap.wrap(text, max(width, indent + 12), initial_indent=first, subsequent_indent=further, break_on_hyphens=False)
