"""Scorers that compare texts: exact, by patterns, what an answer contains, words in common, the letter of a choice."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

from pytest_lmeval.data._formats import Row
from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks._checks import texts
from pytest_lmeval.tasks._task import Extracted, Score, Scorer

Right: TypeAlias = "str | Callable[[Row], Any]"
"""What is right for a row: the name of the field that has it, or a function of the row."""

Ignored = Literal["case", "punctuation", "whitespace", "articles"]
Pattern: TypeAlias = "str | tuple[str, int]"
"""A regular expression, and which of its matches counts: the first, or the one of this index (-1: the last)."""

STRICT: Pattern = r"#### (\-?[0-9\.\,]+)"
"""The filter `strict-match` of lm-evaluation-harness's gsm8k: the first number after ####."""
FLEXIBLE: Pattern = (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
"""Its filter `flexible-extract`: the last number."""

_LETTER = r"(?:\\boxed\{\s*(?:\\text\{)?|\\text\{)?[\(\[\*\s\"']*([A-Z])(?![A-Za-z'])"
LETTERS = (
    r"\\boxed\{\s*(?:\\text(?:bf)?\{)?\(?([A-Z])\b",
    rf"(?i:answer|choice|option)\b(?:\s*(?i:is|would be|should be))?\s*[:=]?\s*{_LETTER}",
    r"^\s*[\(\[\*]*([A-Z])(?:[\)\]\*\.:,]|\s*$)",
    r"[\(\[]([A-Z])[\)\]]",
)
"""Where the letter of a choice stands, the surest place first; of several matches the last counts, but at the beginning."""


def exact(right: Right, *, ignore: Sequence[Ignored] = ()) -> Scorer:
    """The answer is the right one, but for blanks around it and what is to be ignored.

    ignore  "case"; "punctuation" (ASCII); "whitespace": any run of it is as one blank; "articles": a, an, the

    >>> exact("answer", ignore=("case", "punctuation"))({"answer": "Paris"}, "paris.")
    True
    """
    ignored = texts("ignore", ignore)
    if unknown := [one for one in ignored if one not in get_args(Ignored)]:
        raise TaskError(f"exact cannot ignore {unknown[0]!r}: it ignores {', '.join(get_args(Ignored))}.")

    def score(row: Row, answer: str) -> bool:
        return _plain(answer, ignored) in [_plain(text, ignored) for text in rights(right, row)]

    return score


def by_pattern(
    right: Right,
    patterns: Pattern | Mapping[str, Pattern],
    *,
    remove: Sequence[str] = (",", r"\$", r"(?s).*#### ", r"\.$"),
    ignore_case: bool = True,
) -> Scorer:
    """What a regular expression finds in the answer is the right text: its match, or the group of it that matched.

    Several patterns by name are one metric each: {"strict_match": STRICT, "flexible_extract": FLEXIBLE} are the filters of
    lm-evaluation-harness's gsm8k, and `remove` what that does not compare. Where nothing is found, the answer is refused.

    remove  regular expressions; what they match is removed from both texts, one after the other

    >>> score = by_pattern("answer", {"strict": STRICT, "flexible": FLEXIBLE})
    >>> found = score({"answer": "2 + 2 = 4\\n#### 4"}, "It is $4.")
    >>> found["strict"], found["flexible"].text, found["flexible"].score
    (None, '4', True)
    """
    several = tuple(patterns.items()) if isinstance(patterns, Mapping) else (("", patterns),)
    named = tuple((name, *((one, 0) if isinstance(one, str) else one)) for name, one in several)
    removed = texts("remove", remove)
    for expression in (*(pattern for _, pattern, _ in named), *removed):
        try:
            re.compile(expression)
        except re.error as error:
            raise TaskError(f"{expression!r} is no regular expression: {error}.") from None

    def compared(text: str) -> str:
        for expression in removed:
            text = re.sub(expression, "", text)
        return text.lower() if ignore_case else text

    def judged(pattern: str, which: int, answer: str, wanted: list[str]) -> Extracted | None:
        found = _match(pattern, which, answer)
        return None if found is None else Extracted(compared(found), compared(found) in wanted)

    def score(row: Row, answer: str) -> Score:
        wanted = [compared(text) for text in rights(right, row)]
        found = {name: judged(pattern, which, answer, wanted) for name, pattern, which in named}
        return found.get("", found)

    return score


def contains(right: Right, *, every: bool = False, ignore_case: bool = True) -> Scorer:
    """The answer contains one of the right texts, or `every` one.

    >>> contains("answer")({"answer": ["Paris", "Lutetia"]}, "It is paris, of course.")
    True
    """

    def score(row: Row, answer: str) -> bool:
        found = [text.lower() in answer.lower() if ignore_case else text in answer for text in rights(right, row)]
        return all(found) if every else any(found)

    return score


def f1(right: Right) -> Scorer:
    """F1 over words, the best over the right texts, without case, punctuation and articles, as SQuAD's. Needs torchmetrics."""

    def score(row: Row, answer: str) -> float:
        return squad(answer, rights(right, row))[1]

    return score


def letter(right: Right, letters: str = "ABCD") -> Scorer:
    """The letter of a choice, as models write it: \\boxed{B}, "the answer is (B)", "B.", "(B)". `right`: a letter or an index.

    The surest of these counts, and of several of a kind the last, since models correct themselves. A letter that is none of
    `letters` is no answer.

    >>> letter("answer")({"answer": 1}, "Let's see. The answer is (B).")
    Extracted(text='B', score=True)
    """

    def score(row: Row, answer: str) -> Extracted | None:
        given = [letters[one] if _is_index(one, letters) else str(one) for one in _several(right, row)]
        if wrong := [one for one in given if len(one) != 1 or one not in letters]:
            raise TaskError(f"{wrong[0]!r} is neither one of the letters {letters!r} nor an index of one")
        for pattern in LETTERS:
            if found := [one for one in re.findall(pattern, answer) if one in letters]:
                return Extracted(found[-1], found[-1] in given)
        return None

    return score


def rights(right: Right, row: Row) -> tuple[str, ...]:
    """The right texts of a row. Raises TaskError if it has none."""
    return tuple(str(one).strip() for one in _several(right, row))


@lru_cache(maxsize=2**15)  # for several metrics
def squad(answer: str, targets: tuple[str, ...]) -> tuple[float, float]:
    """Exact match and F1 over words as SQuAD's, the best over the targets."""
    from torchmetrics.functional.text.squad import squad as score

    found = score({"id": "", "prediction_text": answer}, {"id": "", "answers": {"text": list(targets)}})
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100


def _several(right: Right, row: Row) -> list[Any]:
    value = right(row) if callable(right) else row.get(right)
    found = list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]
    if not found or any(one is None or isinstance(one, Mapping) for one in found):
        what = "the function `right`" if callable(right) else f"the field {right!r}"
        raise TaskError(f"{what} gives {value!r}, and what is right is a text, a number, or several")
    return found


def _is_index(value: Any, letters: str) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters)


def _plain(text: str, ignored: Sequence[str]) -> str:
    if "case" in ignored:
        text = text.lower()
    if "punctuation" in ignored:
        text = text.translate(str.maketrans("", "", string.punctuation))
    if "articles" in ignored:
        text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split()) if "whitespace" in ignored or "articles" in ignored else text.strip()


def _match(pattern: str, which: int, answer: str) -> str | None:
    """What matched, or the first group that did; None if nothing, or not so often."""
    matches = re.findall(pattern, answer)
    if not -len(matches) <= which < len(matches):
        return None
    found = matches[which]
    text = next(filter(None, found), "") if isinstance(found, tuple) else found
    return text.strip() or None
