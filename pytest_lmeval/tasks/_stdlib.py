"""The task `stdlib_next`: which of four texts continues a passage of CPython's documentation. Nothing is downloaded.

A passage is some 200 bytes of the corpus `stdlib`, its right continuation the next 60; three others continue passages of the
same document. Hashes decide all draws: questions are the same in every run with the same version of Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from pytest_lmeval.data import Document, Row, corpus
from pytest_lmeval.tasks import Choices, Task, by_name, id_of

QUESTIONS = 200
PASSAGE = re.compile(r"(?<!\S)(\S.{198,}?\S)( \S.{58})", re.DOTALL)  # whole words, and 60 bytes more


def stdlib_next(row: Row) -> Choices:
    """Passages of one document share its subject and continuations, so they are one group."""
    return Choices(row["passage"], tuple(row["continuations"]), row["answer"], group=row["document"])


def rows() -> Iterator[Row]:
    """Questions in the order of their hashes, so that the first ones come from many documents."""
    questions = [row for document in corpus("stdlib", "test").documents() for row in _of_document(document)]
    yield from sorted(questions, key=id_of)[:QUESTIONS]


def _of_document(document: Document) -> Iterator[Row]:
    found = [match.groups() for match in PASSAGE.finditer(document.text) if match.group().isascii()]
    texts = sorted({text for _, text in found})  # once: a document has thousands of passages
    for passage, right in found:
        others = [text for text in texts if text != right]
        if len(others) < 3:
            continue
        by_hash = random.Random(id_of({"passage": passage}))
        continuations = [right, *by_hash.sample(others, 3)]
        by_hash.shuffle(continuations)
        answer = continuations.index(right)
        yield {"document": document.name, "passage": passage, "continuations": continuations, "answer": answer}


REGISTERED = by_name(Task("stdlib_next", rows, stdlib_next, ("accuracy",)))
