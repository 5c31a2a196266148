"""Format numbers, sizes, models and texts for people."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

from pytest_lmeval.errors import some
from pytest_lmeval.records._measured import ModelFacts
from pytest_lmeval.records._value import Value

PREFIXES = "kMGTPE"
COMMAND = re.compile(r"(?<!\S)::+|##(?=\[)")  # GitHub Actions: the first at the beginning of a line, the other anywhere


def number(value: float, unit: str = "") -> str:
    """Four significant digits and the unit.

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


def interval(value: Value) -> str:
    """The 95 % interval, if there is one, and the number of ties, if they are many."""
    between = "" if value.interval is None else " to ".join(map(number, value.interval))
    ties = f"{value.ties:,} of {value.n:,} tied" if value.has_many_ties else ""
    return ", ".join(filter(None, (between, ties)))


def model_line(lm: ModelFacts) -> str:
    """Spec, size, precision, device and fingerprint of a model in one line, and the weights of its checkpoint that it lacks;
    of a served model what its server tells."""
    if lm.server is not None:
        told = [str(lm.server.get("model", "")), str(lm.server.get("server", "")), f"{lm.dtype} precision"]
        return f"{lm.spec}: {', '.join(filter(None, told))} ({lm.fingerprint})"
    parameters = "" if lm.parameters is None else f"{lm.parameters:,} parameters, "
    unused = f"; {several(len(lm.unused), 'tensor')} of its checkpoint not used: {some(lm.unused)}" if lm.unused else ""
    return f"{lm.spec}: {parameters}{size_of(lm.bytes)}, {lm.dtype} on {lm.device} ({lm.fingerprint}){unused}"


def several(count: int, name: str) -> str:
    """The number of things, with their name in the singular or plural.

    >>> several(1, "question"), several(1200, "block")
    ('1 question', '1,200 blocks')
    """
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def visible(text: str) -> str:
    """Escape control characters, so that they have no effect where the text is shown.

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


def one_line(text: str) -> str:
    """A name as one line that no terminal or log takes for a command: control characters and ends of lines are escaped, and so
    is what GitHub Actions reads as a workflow command.

    >>> one_line("two\\nlines \\x1b[31m, ::error::forged, test_x.py::test_y")
    'two\\\\nlines \\\\x1b[31m, : :error::forged, test_x.py::test_y'
    """
    if COMMAND.search(text):
        text = COMMAND.sub(lambda found: " ".join(found[0]), text)
    if text.isascii() and text.isprintable():
        return text
    return visible(text).replace("\n", "\\n").replace("\t", " ").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def safe_lines(text: str) -> str:
    """A text of several lines, each of them as `one_line`."""
    return "\n".join(map(one_line, text.split("\n")))


def size_of(count: float) -> str:
    """Bytes in a unit that fits their number.

    >>> size_of(1023), size_of(3912192)
    ('1023 B', '3.7 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def disambiguate(names: Sequence[tuple[str, str]]) -> list[str]:
    """The specs of models (spec, fingerprint), followed by the fingerprint if several models have the spec.

    >>> disambiguate([("a", "01"), ("b", "02"), ("b", "03")])
    ['a', 'b (02)', 'b (03)']
    """
    specs = [spec for spec, _ in names]
    return [spec if specs.count(spec) == 1 else f"{spec} ({fingerprint[:8]})" for spec, fingerprint in names]


def wrapped(text: str, width: int, *, indent: int = 0) -> list[str]:
    """Wrap a note for the terminal, as `one_line`; lines after the first are indented by two more columns."""
    first, further = " " * indent, " " * (indent + 2)
    text = one_line(" ".join(text.split()))
    return textwrap.wrap(text, max(width, indent + 12), initial_indent=first, subsequent_indent=further, break_on_hyphens=False)
