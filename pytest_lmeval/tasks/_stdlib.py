"""Which of four texts goes on from here? From the documentation that every CPython carries, so nothing is downloaded.

The passage is some 200 bytes of one document of the corpus `stdlib` (test split), and the right continuation is the 60 bytes
after it. The three others go on from other passages of the same document, so that they are of its subject and its style; all
are equally long, so that no score needs to be divided by a length. Guessing is right in one of four.

Everything is drawn by hashes: the questions are the same in every run with the same version of Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from pytest_lmeval.data import Document, Row, corpus
from pytest_lmeval.tasks import Choices, Task, by_name, id_of

QUESTIONS = 200
PASSAGE = re.compile(r"(?<!\S)(\S.{198,}?\S)( \S.{58})", re.DOTALL)  # from a word's beginning to a word's end, and 60 more


def stdlib_next(row: Row) -> Choices:
    """Passages of one document share its subject, and each other's continuations."""
    return Choices(row["passage"], tuple(row["continuations"]), row["answer"], group=row["document"])


def rows() -> Iterator[Row]:
    """Questions in the order of their hashes, so that the first ones are from everywhere.

    >>> row = next(rows())
    >>> len(row["continuations"]), {len(text) for text in row["continuations"]}
    (4, {60})
    """
    questions = [row for document in corpus("stdlib", "test").documents() for row in _of_document(document)]
    yield from sorted(questions, key=id_of)[:QUESTIONS]


def _of_document(document: Document) -> Iterator[Row]:
    found = [match.groups() for match in PASSAGE.finditer(document.text) if match.group().isascii()]
    for passage, right in found:
        others = sorted({text for _, text in found} - {right})
        if len(others) < 3:
            continue
        by_hash = random.Random(id_of({"passage": passage}))
        continuations = [right, *by_hash.sample(others, 3)]
        by_hash.shuffle(continuations)
        answer = continuations.index(right)
        yield {"document": document.name, "passage": passage, "continuations": continuations, "answer": answer}


TASK = Task("stdlib_next", rows, stdlib_next)
REGISTERED = by_name(TASK)
