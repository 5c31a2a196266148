"""Ready scorers: each function makes a `score` for a `Task`, which judges a finished answer with its row.

    Task("gsm8k", ROWS, ask, score=scores.numeric("answer"))

`right` says what is right for a row: the name of its field, or a function of the row; a text, a number, or several of which any
is right. What a scorer takes from an answer is shown beside it (`Extracted`); None means that there is nothing to be taken.
"""

from __future__ import annotations

from pytest_lmeval.tasks.scores._instructions import NEED_DOWNLOADS, ifeval
from pytest_lmeval.tasks.scores._numbers import number_in, numeric, symbolic
from pytest_lmeval.tasks.scores._texts import FLEXIBLE, STRICT, Right, by_pattern, contains, exact, f1, letter

__all__ = [
    "FLEXIBLE", "NEED_DOWNLOADS", "STRICT", "Right", "by_pattern", "contains", "exact", "f1", "ifeval", "letter", "number_in",
    "numeric", "symbolic",
]  # fmt: skip
