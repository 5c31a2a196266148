"""What a reader should know of how two numbers were compared: the same words in the terminal, in a failure and on the pages."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_lmeval.records._comparison import Comparison
from pytest_lmeval.report._words import number, several


def remarks(found: Comparison, example: str) -> Iterator[str]:
    """Why it was not paired, that some examples are of one run alone, what would have been found.

    example  what one is called (`Record.example`)
    """
    if found.note:
        yield found.note
    if found.only_base or found.only_new:
        alone = f"{found.only_base:,} only in the baseline, {found.only_new:,} only here"
        yield f"on {several(found.n or 0, example)} of both runs; {alone}"
    if found.verdict == "unclear" and found.detectable is not None:
        yield f"a loss of {number(abs(found.detectable))} would have been found (with a probability of 80 %)"
    if found.verdict == "unclear" and found.needed and isinstance(found.margin, int | float):
        yield f"if nothing was lost, {several(found.needed, example)} would show it ({number(found.margin)} is allowed)"
