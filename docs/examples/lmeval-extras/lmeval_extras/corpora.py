"""A corpus: documents under a name and a split, made when they are read."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_lmeval import Corpus, CorpusError, Document

SPLITS = ("train", "validation", "test")


def counting(rest: str, split: str) -> Corpus:
    """`counting`, or `counting:500`: so many numbers (a thousand) as one text. Each split begins at another one."""
    count, name = rest or "1000", f"counting:{rest}".rstrip(":")
    if not count.isdigit() or int(count) < 1:
        raise CorpusError(f"{name}: {rest!r} is no number of numbers. Write, for example, counting:500.")
    begin = 1_000_000 * SPLITS.index(split)

    def documents() -> Iterator[Document]:
        yield Document(name, "".join(f"{number} " for number in range(begin, begin + int(count))))

    return Corpus(name, split, documents, fingerprint=f"{name}/{split}")
