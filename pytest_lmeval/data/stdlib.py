"""`stdlib`: the English that every CPython carries - the language reference and the docstrings.

Two sources, both read without importing or running anything:

* the topics of `pydoc_data` (what `help("while")` prints: the language reference, ~0.5 MB);
* the docstrings of the standard library's modules, in source order (~1.6 MB).

A document is one topic or one module. Its split is fixed by a hash of its name - 80 % train,
10 % validation, 10 % test - so a module is held out in every version of Python alike. A docstring
that was seen before, in any document, is dropped: a copy must not leak from one split to another.
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

from pytest_lmeval.data.corpus import Corpus, CorpusError, Document

# Not the library itself: its tests, other people's packages, and the program `idle`.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib"}
NOT_LIBRARY |= {"lib2to3", "turtledemo", "ensurepip", "pydoc_data"}


def load(split: str) -> Corpus:
    """The stdlib corpus of a split, read as one stream."""
    documents = _documents()[split]
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode())
    return Corpus("stdlib", split, lambda: iter(documents), fingerprint=digest.hexdigest())


def split_of(name: str) -> str:
    """The split that a document belongs to, by the hash of its name.

    >>> split_of("json.decoder"), split_of("json.decoder") == split_of("json.decoder")
    ('train', True)
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else ("validation" if bucket == 8 else "test")


@functools.cache
def _documents() -> dict[str, tuple[Document, ...]]:
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for name, paragraphs in (*_topics(), *_modules()):
        fresh = [text for text in paragraphs if not (text in seen or seen.add(text))]  # type: ignore[func-returns-value]
        if fresh:
            splits[split_of(name)].append(Document(name, "\n\n".join(fresh) + "\n\n\n"))
    if not all(splits.values()):
        raise CorpusError(
            "the corpus `stdlib` is empty: this Python carries neither pydoc topics nor the sources of its "
            f"library ({_library_folder()}), as trimmed installations do. Use another corpus, for example text:PATH."
        )
    return {split: tuple(documents) for split, documents in splits.items()}


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
