"""Text to read: `corpus(name, split)`.

    stdlib               documentation that every CPython carries (the default; needs no network)
    text:PATH            a UTF-8 file, or a folder with SPLIT.txt
    jsonl:PATH#FIELD     a document a line (field `text` if none is named)
    tokens:PATH          a .npy file of integer ids, memory-mapped; needs no tokenizer
    automaton            text that looks like words, of exactly known entropy
    recall               pairs of key and value, where what memory beyond a window is worth is exactly known
    wikitext-2, wikitext-103, ptb, c4, pile, pg19
    OWNER/NAME[:CONFIG][#FIELD]        any dataset of the Hugging Face hub

The synthetic texts take options in their names: `automaton:size=1M,seed=3`, `recall:keys=1024`.
Datasets of the hub are streamed, never downloaded whole; `data_dir` replaces the hub by a local mirror.
"""

from __future__ import annotations

from pathlib import Path

from pytest_lmeval.data.corpus import SPLITS, Corpus, Document
from pytest_lmeval.errors import CorpusError

__all__ = ["Corpus", "CorpusError", "Document", "corpus"]


def corpus(name: str, split: str = "test", *, data_dir: str | Path | None = None) -> Corpus:
    """The corpus called `name`. Raises CorpusError for an unknown name or split, and for a file that is not there."""
    if split not in SPLITS:
        raise CorpusError(f"unknown split {split!r}; splits are {', '.join(SPLITS)}.")
    from pytest_lmeval.data import automaton, files, hub, recall, stdlib

    scheme, colon, rest = name.partition(":")
    if name == "stdlib":
        return stdlib.load(split)
    if scheme == "automaton":
        return automaton.corpus(rest, split)
    if scheme == "recall":
        return recall.corpus(rest, split)
    if colon and scheme in files.SCHEMES:
        return files.SCHEMES[scheme](rest, split)
    if name in hub.KNOWN or "/" in scheme:
        return hub.load(name, split, data_dir=data_dir)
    raise CorpusError(
        f"unknown corpus {name!r}. Corpora are stdlib, automaton, recall, text:PATH, jsonl:PATH#FIELD, tokens:PATH, "
        f"{', '.join(hub.KNOWN)}, and OWNER/NAME of the Hugging Face hub."
    )
