"""`stdlib`: the English that every CPython carries - the language reference and the docstrings.

Two sources, both read without importing or running anything:

* the topics of `pydoc_data` (what `help("while")` prints: the language reference, ~0.5 MB);
* the docstrings of the standard library's modules, in source order (~1.6 MB).

A document is one topic or one module. Its split is fixed by a hash of its name - 80 % train,
10 % validation, 10 % test - so a module is held out in every version of Python alike. A docstring
that was seen before is dropped, and so is a longer paragraph of a held-out document that also stands
in another split: a copy must not leak from one split to another.
The text differs a little between Python versions; the corpus fingerprint tells them apart.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pytest_lmeval.data._corpus import SPLITS, Corpus, Document
from pytest_lmeval.errors import CorpusError

# Not the library itself: its tests, other people's packages, and the program `idle`.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib"}
NOT_LIBRARY |= {"lib2to3", "turtledemo", "ensurepip", "pydoc_data"}


LONG = 80  # characters from which on a paragraph is no phrase that anybody would write again


def load(given: str, split: str) -> Corpus:
    """The corpus `stdlib`, read as one stream. It has no options: nothing is `given`."""
    if given:
        raise CorpusError(f"stdlib:{given}: stdlib has no options.")
    documents = _documents()[split]
    content = "".join(document.text for document in documents).encode()
    digest = hashlib.sha256(content).hexdigest()
    return Corpus("stdlib", split, lambda: iter(documents), fingerprint=digest, size=len(content))


def split_of(name: str) -> str:
    """The split that a document belongs to, by the hash of its name.

    >>> split_of("typing"), split_of("json"), split_of("topic:while")
    ('train', 'test', 'train')
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else ("validation" if bucket == 8 else "test")


@functools.cache
def _documents() -> dict[str, tuple[Document, ...]]:
    found: dict[str, list[tuple[str, list[str]]]] = {split: [] for split in SPLITS}
    for name, docstrings in (*_topics(), *_modules()):
        found[split_of(name)].append((name, docstrings))
    if not all(found.values()):
        raise CorpusError(
            "the corpus `stdlib` is empty: this Python carries neither pydoc topics nor the sources of its "
            f"library ({_library_folder()}), as trimmed installations do. Use another corpus, for example text:PATH."
        )
    splits, copies = {}, Copies()
    for split, documents in found.items():  # train first: what it holds, the others must not
        texts = [(name, "\n\n".join(filter(None, map(copies.without, docstrings)))) for name, docstrings in documents]
        splits[split] = tuple(Document(name, text + "\n\n\n") for name, text in texts if text)
        copies.close_split()
    return splits


class Copies:
    """Remembers what was read, to leave out what comes again."""

    def __init__(self) -> None:
        self.docstrings: set[str] = set()
        self.paragraphs: set[str] = set()  # of this split and those before it
        self.elsewhere: frozenset[str] = frozenset()  # of those before it

    def without(self, docstring: str) -> str:
        """The docstring without its long paragraphs that stand in an earlier split; empty if it came before as a whole."""
        if docstring in self.docstrings:
            return ""
        self.docstrings.add(docstring)
        paragraphs = [text for text in docstring.split("\n\n") if len(text) < LONG or text not in self.elsewhere]
        self.paragraphs.update(paragraphs)
        return "\n\n".join(paragraphs)

    def close_split(self) -> None:
        self.elsewhere = frozenset(self.paragraphs)


def _topics() -> Iterator[tuple[str, list[str]]]:
    if importlib.util.find_spec("pydoc_data") is None:
        return
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic:{name}", [text.strip()]


def _modules() -> Iterator[tuple[str, list[str]]]:
    root = _library_folder()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not NOT_LIBRARY.intersection(parts):
            yield ".".join(parts), list(_docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text


def _library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
