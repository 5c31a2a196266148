"""What a reader should know of how two numbers were compared: the same words in the terminal, the failure and the pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_lmeval.report.words import number


def noun(record: dict[str, Any]) -> str:
    """What an example of a record is."""
    if record["kind"] == "perplexity":
        return "document" if record["settings"].get("by_document") else "block"
    return "question" if record["kind"] == "task" else "example"


def several(count: int, name: str) -> str:
    """
    >>> several(1, "question"), several(1200, "block")
    ('1 question', '1,200 blocks')
    """
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def remarks(row: dict[str, Any], example: str) -> Iterator[str]:
    """Of a row of a gate: why it was not paired, that some examples are of one run alone, what would have been found.

    example  what one is called (`noun`)
    """
    if note := row.get("note"):
        yield note
    if row.get("only_base") or row.get("only_new"):
        apart = f"{row.get('only_base') or 0:,} only in the baseline, {row.get('only_new') or 0:,} only here"
        yield f"on {several(row.get('n') or 0, example)} of both runs; {apart}"
    if row.get("verdict") == "unclear" and row.get("detectable") is not None:
        yield f"a loss of {number(abs(row['detectable']))} would have been found (with a probability of 80 %)"
    if row.get("verdict") == "unclear" and row.get("needed") and isinstance(row.get("margin"), int | float):
        yield f"if nothing was lost, {several(row['needed'], example)} would show it ({number(row['margin'])} is allowed)"
