"""Say which examples a process scores, where several processes share the examples of a run.

Each process reads all rows, and asks the model about its own. Whole files of a dataset are not shared out: the place of a row,
by which examples are ordered and which `limit` counts, is known only once the rows before it are read, and an example would
change its share with the files of the dataset. Rows cost little beside the model that reads them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from pytest_lmeval.errors import ArgumentError


@dataclass(frozen=True)
class Share:
    """One of `count` shares of the examples, `index` of 1 to `count`.

    What is in it depends on the hash of an example alone: not on the order, the limit, or the other examples.
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ArgumentError(f"there is no shard {self.index} of {self.count}: they are numbered from 1 to {self.count}.")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    def owns(self, name: object) -> bool:
        """Whether an example of this name is in it: a question, a document, a window, or a measurement as a whole."""
        if self.is_whole:
            return True
        digest = hashlib.sha256(str(name).encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1


WHOLE = Share()


def parsed(text: str) -> Share:
    """The share that I/N names. Raises ArgumentError for anything else.

    >>> parsed("3/8")
    Share(index=3, count=8)
    """
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if found is None:
        raise ArgumentError(f"a shard is named I/N, its number and how many there are, such as 3/8; got {text!r}.")
    return Share(int(found[1]), int(found[2]))
