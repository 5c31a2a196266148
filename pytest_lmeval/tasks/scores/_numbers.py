"""Scorers that compare numbers: as they are written, or as expressions of algebra."""

from __future__ import annotations

import re
import threading
from fractions import Fraction

from pytest_lmeval.data._formats import Row
from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks._task import Extracted, Scorer
from pytest_lmeval.tasks.scores._texts import Right, rights

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_FRACTION = r"\\[dt]?frac\{\s*-?\d+\s*\}\{\s*\d+\s*\}|\d+\s*/\s*\d+"
NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-\u2212])?[$€£]?(?P<minus>-)?"
    rf"(?:(?P<fraction>{_FRACTION})|(?P<digits>{_DIGITS})(?P<power>[eE][-+]?\d{{1,3}}(?!\w))?)"
    r"\s?(?P<percent>\\?%)?"
)
LONGEST = 300  # characters of a number: a model that repeats a digit for ever gives none
MARKED = (r"\\boxed\s*\{", r"####")
"""What the final number stands after; the last of them counts, and without any the last number of the text does."""


def numeric(right: Right) -> Scorer:
    """The number of the answer is the right one: in its last \\boxed{}, else after its last ####, else its last one.

    Compared as numbers: 1,234.50 is 1234.5, $5 is 5, 1/2 and \\frac{1}{2} are 0.5, 1e3 is 1000. 50% is 50 and 0.5: which is
    meant, a text does not say. The right number may stand in a longer text, too, such as the solution of a row of GSM8K.

    >>> numeric("answer")({"answer": "6 * 7 = 42\\n#### 42"}, "So there are $42.00 in all.")
    Extracted(text='42', score=True)
    """

    def score(row: Row, answer: str) -> Extracted | None:
        wanted = set[Fraction]()
        for text in rights(right, row):
            if (one := _found(text)) is None:
                raise TaskError(f"the right answer {text[-80:]!r} has no number, and a numeric scorer compares numbers")
            wanted |= one[1]
        found = _found(answer)
        return None if found is None else Extracted(found[0], bool(found[1] & wanted))

    return score


def number_in(text: str) -> Fraction | None:
    """The number that `numeric` finds in a text, exactly; None if there is none. A percentage is the number before the sign.

    >>> number_in("A dozen is 12, half of it \\\\boxed{6}, and a third 4"), number_in("none")
    (Fraction(6, 1), None)
    """
    found = _found(text)
    return None if found is None else max(found[1], key=abs)


def symbolic(right: Right) -> Scorer:
    """The expression of the answer equals the right one, as math-verify finds and compares them: \\boxed{x(x+1)} is x^2 + x.

    Needs the extra `math`. What it cannot read in an answer is refused; what it cannot read in a right one raises TaskError. It
    ends what takes longer than five seconds, in the main thread: elsewhere nothing can, and nothing does.
    """
    try:
        import math_verify
    except ImportError as error:
        raise TaskError(f"scores.symbolic needs math-verify ({error}): pip install 'pytest-lmeval[math]'") from None

    def score(row: Row, answer: str) -> Extracted | None:
        seconds = 5 if threading.current_thread() is threading.main_thread() else None
        golds = []
        for text in rights(right, row):
            marked = text if "$" in text or "\\boxed" in text else f"${text}$"
            if not (gold := math_verify.parse(marked, parsing_timeout=seconds)):
                raise TaskError(f"math-verify finds no expression in the right answer {text[-80:]!r}")
            golds.append(gold)
        if not (found := math_verify.parse(answer, parsing_timeout=seconds)):
            return None
        right_one = any(math_verify.verify(gold, found, timeout_seconds=seconds) for gold in golds)
        return Extracted(str(found[0]), bool(right_one))

    return score


def _found(text: str) -> tuple[str, frozenset[Fraction]] | None:
    """A number of a text in one way of writing it, and what it may stand for."""
    matches = [match for match in NUMBER.finditer(text) if len(match[0]) <= LONGEST]
    for mark in MARKED:
        ends = [match.end() for match in re.finditer(mark, text)]
        if ends and (after := [match for match in matches if match.start() >= ends[-1]]):
            return _value(after[0])
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> tuple[str, frozenset[Fraction]]:
    if match["fraction"]:
        above, below = map(int, re.findall(r"-?\d+", match["fraction"]))
        number = Fraction(above, below) if below else Fraction(0)
    else:
        number = Fraction(match["digits"].replace(",", "") + (match["power"] or ""))
    number = -number if match["sign"] or match["minus"] else number
    written = str(number) if number.denominator == 1 else f"{float(number):.15g}"
    return (f"{written}%", frozenset({number, number / 100})) if match["percent"] else (written, frozenset({number}))
