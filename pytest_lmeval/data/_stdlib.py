"""Build the corpus `stdlib` from the documentation that every CPython contains: the topics of `pydoc_data` (the language
reference, ~0.5 MB), and the docstrings of the standard library, in source order, parsed and never imported (~1.6 MB).

A document is one topic or one module; a hash of its name determines its split (80, 10 and 10 %). Repeated docstrings are
dropped, and so are long paragraphs of a held-out document that occur in another split. The text differs a little between
Python versions, and so does the fingerprint.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pytest_lmeval.data._corpus import SPLITS, Corpus, Document
from pytest_lmeval.errors import CorpusError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# Folders in the library's that are not the library: tests, other packages, programs.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib"}
NOT_LIBRARY |= {"lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
STATEMENTS = ("body", "orelse", "handlers", "finalbody", "cases")  # the parts of a statement that hold statements
LONG = 80  # characters of a paragraph that is unlikely to be written twice independently


def load(given: str, split: str) -> Corpus:
    """The corpus `stdlib`, read as one stream; `given` must be empty, since it has no options."""
    if given:
        raise CorpusError(f"stdlib:{given}: stdlib has no options.")
    documents = _documents()[split]
    content = "".join(document.text for document in documents).encode()
    digest = hashlib.sha256(content).hexdigest()
    return Corpus("stdlib", split, lambda: iter(documents), fingerprint=digest, size=len(content))


def split_of(name: str) -> str:
    """The split of a document, from a hash of its name."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else ("validation" if bucket == 8 else "test")


@functools.cache
def _documents() -> dict[str, tuple[Document, ...]]:
    found: dict[str, list[tuple[str, list[str]]]] = {split: [] for split in SPLITS}
    for name, docstrings in _all_docstrings():
        found[split_of(name)].append((name, docstrings))
    if not all(found.values()):
        raise CorpusError(
            "the corpus `stdlib` is empty: this Python has neither pydoc topics nor the sources of its library "
            f"({LIBRARY}). Use another corpus, for example text:PATH."
        )
    splits, docstrings_before, paragraphs_before = {}, set[str](), set[str]()
    for split, documents in found.items():  # train first: the others must not repeat its paragraphs
        kept, paragraphs_here = [], set[str]()
        for name, docstrings in documents:
            parts = []
            for docstring in docstrings:
                if docstring in docstrings_before:
                    continue
                docstrings_before.add(docstring)
                paragraphs = [p for p in docstring.split("\n\n") if len(p) < LONG or p not in paragraphs_before]
                paragraphs_here.update(paragraphs)
                parts.append("\n\n".join(paragraphs))
            if text := "\n\n".join(filter(None, parts)):
                kept.append(Document(name, text + "\n\n\n"))
        splits[split] = tuple(kept)
        paragraphs_before |= paragraphs_here
    return splits


def _all_docstrings() -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the docstrings of each topic and of each module."""
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        for name, text in sorted(topics.items()):
            yield f"topic:{name}", [text.strip()]
    for path in sorted(_sources()):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        if not NOT_LIBRARY.intersection(parts):
            yield ".".join(parts), list(_docstrings(path))


def _sources() -> Iterator[Path]:
    for folder, below, files in os.walk(LIBRARY):
        below[:] = set(below) - NOT_LIBRARY  # other packages may be many times as many files
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    nodes: list[ast.AST] = [ast.parse(path.read_bytes())]
    for node in nodes:  # expressions, the most of a tree, define nothing that has a docstring
        for part in STATEMENTS:
            nodes += getattr(node, part, ())
    documented = [node for node in nodes if isinstance(node, DOCUMENTED)]
    for node in sorted(documented, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text
