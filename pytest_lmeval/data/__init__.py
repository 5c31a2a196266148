"""Load a corpus by name: `corpus(name, split)`.

    stdlib               documentation in every CPython (the default; needs no network)
    text:PATH            a UTF-8 file, or a folder with SPLIT.txt
    jsonl:PATH#FIELD     a document for each row of a file, from this field (default: text); json, csv and parquet alike
    tokens:PATH          a .npy file of integer ids, memory-mapped; needs no tokenizer
    automaton            synthetic words of exactly known entropy; options as in `automaton:size=1M,seed=3`
    recall               synthetic key-value pairs, for which the value of memory beyond a window is exactly known
    wikitext-2, wikitext-103, ptb, c4, pile, pg19
    OWNER/NAME[:CONFIG][#FIELD]        any dataset of the Hugging Face hub, streamed; `data_dir` is a local mirror instead

Another package registers a corpus as a function `(rest, split) -> Corpus`, with a keyword `data_dir` if it reads the mirror;
`rest` is the text behind the first colon of the name (see `pytest_lmeval.registry`).
"""

from __future__ import annotations

import os.path
from dataclasses import replace
from pathlib import Path

from pytest_lmeval import registry
from pytest_lmeval.data._corpus import SPLITS, Corpus, Document
from pytest_lmeval.data._formats import READERS, Row
from pytest_lmeval.data._rows import Rows
from pytest_lmeval.errors import CorpusError, RegistryError

__all__ = ["Corpus", "Document", "Row", "Rows", "check", "corpus"]


def corpus(name: str, split: str = "test", *, data_dir: str | Path | None = None, special_tokens: bool = False) -> Corpus:
    """The corpus of this name and split; `special_tokens` as in `Corpus`.

    Raises RegistryError for an unknown name, with the nearest, and CorpusError for an unknown split or a missing file.
    """
    if not isinstance(name, str):
        raise CorpusError(f"a corpus is named by a text such as stdlib or text:FILE; got {name!r}.")
    if split not in SPLITS:
        raise CorpusError(f"unknown split {split!r}; splits are {', '.join(SPLITS)}.")
    if registered := registry.resolve("corpora", name):
        factory, rest = registered[0], registered[1] or ""
    elif _is_of_the_hub(name):
        from pytest_lmeval.data import _hub as hub

        factory, rest = hub.load, name
    else:
        raise _unknown(name)
    found = factory(rest, split, **registry.accepted(factory, data_dir=data_dir))
    if not isinstance(found, Corpus):
        raise CorpusError(f"the function registered as corpus {name!r} returned a {type(found).__name__}; expected a Corpus.")
    return replace(found, special_tokens=True) if special_tokens else found


def check(name: str) -> None:
    """Raise RegistryError for an unknown name and CorpusError for a missing file, without reading the corpus."""
    known = registry.names("corpora")
    head, _, rest = name.partition(":")
    own = name if name in known else head
    if own not in known and not _is_of_the_hub(name):
        raise _unknown(name)
    if known.count(own) > 1:
        raise registry.ambiguous("corpora", own)
    path = rest.partition("#")[0]
    if head in ("text", "tokens", *READERS) and path and not os.path.exists(os.path.expanduser(path)):
        raise CorpusError(f"{name}: there is no file or folder {path!r} (looked from {os.getcwd()}).")


def _is_of_the_hub(name: str) -> bool:
    return "/" in name.partition(":")[0] and not name.startswith((".", "/", "~")) and not os.path.isfile(name)


def _unknown(name: str) -> RegistryError:
    also = ", and OWNER/NAME of the Hugging Face hub"
    return registry.unknown("corpora", name, f"{also}. A file is named as text:{name}" if os.path.isfile(name) else also)
