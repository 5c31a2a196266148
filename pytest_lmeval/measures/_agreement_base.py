"""Keep what a reference says of a text, its likeliest tokens and their log-probabilities, so that later runs do without it.

lmeval.agreement(lm, "hf:FOLDER", "wikitext-2", tokens=20_000, save="base.safetensors")     once, with the reference
lmeval.agreement(lm, "base:base.safetensors", "wikitext-2")                                 from then on
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pytest_lmeval.errors import DocumentError, SpecError
from pytest_lmeval.measures._agreement_sums import Piece
from pytest_lmeval.models._identity import tokenizer_fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._measured import ModelFacts
from pytest_lmeval.records._replacing import regular, replacing
from pytest_lmeval.records._schema import StoredStruct

PREFIX = "base:"
FORMAT: Literal[1] = 1
TOP = 8  # likeliest tokens that are kept of each position
PIECE = 1024  # targets that are handed out at once
AGAIN = "Write it anew, with the reference: lmeval.agreement(lm, reference, corpus, save=FILE)"


class About(StoredStruct, frozen=True, kw_only=True):
    """What a base is of.

    lm         the reference
    tokenizer  fingerprint of its tokenizer
    corpus     the text, and `data` its fingerprint
    tokens, limit, by_document, window, overlap  how it was read, which a comparison takes over
    reading    the same in words
    """

    format: Literal[1] = FORMAT
    lm: ModelFacts
    tokenizer: str
    vocab_size: int
    corpus: str
    data: str | None = None
    tokens: int | None = None
    limit: int | None = None
    by_document: bool = False
    window: int | None = None
    overlap: int = 0
    reading: str = ""


@dataclass
class BaseWriter:
    """Collects what a reference says, piece by piece, and writes it."""

    pieces: list[dict[str, np.ndarray]] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        if piece.logits is None:
            ranked = [sorted(most.items(), key=lambda one: (-one[1], one[0]))[:TOP] for most in piece.top]
            width = min(map(len, ranked), default=0)
            top = np.array([[token for token, _ in most[:width]] for most in ranked]).reshape(len(ranked), width)
            logprobs = np.array([[value for _, value in most[:width]] for most in ranked]).reshape(len(ranked), width)
        else:
            logits = piece.logits.double()
            values, ids = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
            logprobs = (values - logits.logsumexp(-1, keepdim=True)).cpu().numpy()
            top = ids.cpu().numpy()
        self.pieces.append(
            {
                "document": np.full(len(piece.nll), piece.document, dtype=np.int32),
                "position": np.arange(piece.start, piece.start + len(piece.nll), dtype=np.int32),
                "offset": piece.offsets.astype(np.int32),
                "target": piece.ids.astype(np.int32),
                "nll": piece.nll.astype(np.float32),
                "top": top.astype(np.int32),
                "logprob": logprobs.astype(np.float32),
            }
        )

    def write(self, path: Path, about: About) -> None:
        """Replace the file in one move."""
        from safetensors.numpy import save_file

        width = min(one["top"].shape[1] for one in self.pieces)
        cut = [{name: part[:, :width] if part.ndim == 2 else part for name, part in one.items()} for one in self.pieces]
        arrays = {name: np.ascontiguousarray(np.concatenate([one[name] for one in cut])) for name in cut[0]}
        with replacing(path) as new:
            save_file(arrays, new, {"pytest_lmeval": json.dumps(schema.to_plain(about), sort_keys=True)})


@dataclass(frozen=True, eq=False)
class Base:
    """A file that stands for a reference."""

    path: Path
    about: About
    arrays: dict[str, np.ndarray]

    @cached_property
    def spec(self) -> str:
        """How it is named in words."""
        return f"{PREFIX}{self.path.name} ({self.about.lm.spec})"

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the reference computed in."""
        found: Any = getattr(torch, self.about.lm.dtype, None)
        return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.bfloat16

    @property
    def served(self) -> None:
        """It is no server."""

    @property
    def tokenizer(self) -> None:
        """It keeps ids only."""

    @cached_property
    def identity(self) -> str:
        """A hash of all that it says."""
        return hashlib.sha256(b"".join(self.arrays[name].tobytes() for name in sorted(self.arrays))).hexdigest()

    def taken_over(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of a reading, with those that the file was written with where none are given."""
        about = self.about
        own = {"tokens": about.tokens, "limit": about.limit, "as_stream": not about.by_document}
        return {name: own[name] if value is None else value for name, value in settings.items()}

    def check_reader(self, lm: Model, *, tokenized: bool) -> None:
        """Raise SpecError for a model whose predictions are of other tokens."""
        about = self.about
        if lm.codebooks or (lm.served is None and lm.vocab_size != about.vocab_size):  # a server tells that of its tokenizer
            size = "reads frames of codes" if lm.codebooks else f"has {lm.vocab_size:,} tokens"
            raise SpecError(
                f"{lm.spec} {size}, and {self.spec} {about.vocab_size:,} tokens, so their predictions cannot be compared."
            )
        if not tokenized and tokenizer_fingerprint(lm) != about.tokenizer:
            raise SpecError(f"{lm.spec} and {self.spec} have tokenizers that encode the same text differently. {AGAIN}.")

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.arrays["position"].max()) + 1

    @property
    def window(self) -> int | None:
        """Tokens of the windows in which it was read; None if all of a text was read at once."""
        return self.about.window if self.about.window is not None and self.about.window < self.longest else None

    def check_window(self, window: int | None, lm: Model) -> None:
        """Raise SpecError for another window than that of the file, and for a model that reads less at once than was read: what
        differs would be the context."""
        if window not in (None, self.about.window):
            how = f"in windows of {self.about.window:,} tokens" if self.about.window else "without windows"
            raise SpecError(
                f"{self.spec} was read {how}, and window={window!r} would compare predictions from other contexts. Leave it "
                "out, or write the file anew, with that window."
            )
        at_once = self.window or (self.longest if lm.served is not None else 0)
        if lm.limit is not None and at_once > lm.limit:
            raise SpecError(
                f"{self.spec} was read {at_once:,} tokens at once, and {lm.spec} reads at most {lm.limit:,}: predictions from "
                f"other contexts would be compared. Write the file anew, with window={min(lm.limit, 1024)}."
            )

    def longer(self, corpus: object) -> SpecError:
        """The error for a text that goes on after the end of that of the file."""
        return SpecError(
            f"{self.spec} has {len(self.arrays['nll']):,} targets of {self.about.corpus}, and {corpus} has more: another text "
            f"would be compared than was kept. Read as much with tokens= or limit=, or write the file anew."
        )

    def check_piece(self, ours: Piece, theirs: Piece, corpus: object) -> None:
        """Raise SpecError where the text is not the one of which the file was written."""
        place = (ours.document, ours.start), (theirs.document, theirs.start)
        if place[0] != place[1] or not np.array_equal(ours.ids, theirs.ids):
            raise SpecError(
                f"{self.spec} is of {self.about.corpus}, and {corpus} has other tokens, the first of them after target "
                f"{ours.start:,} of document {ours.document}. {AGAIN}."
            )

    def check_length(self, targets: int, corpus: object) -> None:
        """Raise SpecError where the text ends before, or after, that of the file."""
        if targets != len(self.arrays["nll"]):
            raise SpecError(
                f"{self.spec} has {len(self.arrays['nll']):,} targets of {self.about.corpus}, and {targets:,} were read of "
                f"{corpus}: another number would be compared than was kept. Leave out tokens= and limit=, which it knows."
            )

    def pieces(self) -> Iterator[Piece]:
        documents = self.arrays["document"]
        boundaries = np.flatnonzero(np.diff(documents)) + 1
        for begin, end in zip([0, *boundaries], [*boundaries, len(documents)], strict=True):
            for at in range(int(begin), int(end), PIECE):
                part = slice(at, min(at + PIECE, int(end)))
                rows = zip(self.arrays["top"][part].tolist(), self.arrays["logprob"][part].tolist(), strict=True)
                yield Piece(
                    int(documents[at]),
                    int(self.arrays["position"][at]),
                    self.arrays["target"][part].astype(np.int64),
                    self.arrays["nll"][part].astype(np.float64),
                    None,
                    tuple(dict(zip(tokens, values, strict=True)) for tokens, values in rows),
                    self.arrays["offset"][part],
                )


def check_path(path: str | Path, reference: object) -> None:
    """Raise SpecError, before anything is read, for a path that no base can be written to, and a base that would be copied."""
    if isinstance(reference, Base):
        raise SpecError(
            f"save={str(path)!r} writes what a reference says, and {reference.spec} is such a file. Copy that file."
        )
    if not str(path) or Path(path).is_dir():
        raise SpecError(f"save={str(path)!r} is {'a folder' if str(path) else 'empty'}; write the name of a file.")


def read(path: Path) -> Base:
    """The base at a path. Raises SpecError if there is none, and DocumentError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    what = f"the base {path}"
    try:
        with safe_open(regular(path), framework="numpy") as file:
            plain = schema.parse((file.metadata() or {}).get("pytest_lmeval", "null").encode(), what, AGAIN)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except FileNotFoundError:
        raise SpecError(f"{what} is not there. {AGAIN}.") from None
    except (SafetensorError, OSError) as error:
        raise DocumentError(f"{what} cannot be read ({error}). {AGAIN}.") from error
    if not isinstance(plain, dict):
        raise DocumentError(f"{what} is a safetensors file of something else. {AGAIN}.")
    schema.check_version(plain.get("format"), FORMAT, what, AGAIN)
    about = schema.build(plain, About, what, AGAIN)
    wanted = {"document", "position", "offset", "target", "nll", "top", "logprob"}
    if not wanted <= set(arrays) or len({len(arrays[name]) for name in wanted}) != 1 or not len(arrays["nll"]):
        raise DocumentError(f"{what} lacks a part of its targets. {AGAIN}.")
    return Base(path, about, arrays)
