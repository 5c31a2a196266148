"""Read a text to its end: from where an interrupted run stopped, and with less at once where memory is short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._tokens import TokenReader, sequences
from pytest_lmeval.engine import Chunk, Engine
from pytest_lmeval.engine._tokens import naming
from pytest_lmeval.errors import Refused
from pytest_lmeval.measures._look_ahead import HeldDocument, documents
from pytest_lmeval.measures._text_audit import TextAudit, text_audit
from pytest_lmeval.models._failures import NoMemory, unless_full
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._journal import Checkpoints, Saver
from pytest_lmeval.records._share import WHOLE, Share
from pytest_lmeval.scoring import _fast_weights as fast_weights
from pytest_lmeval.scoring._loss_accumulator import BYTES, NATS, TOKENS, LossAccumulator
from pytest_lmeval.scoring._text_files import LossFile, read_checkpoint, write_checkpoint

LOOK_AHEAD = 16  # chunks after which it is estimated again whether as many more fit into memory

Progress = Callable[[int, float, int | None], None]
"""Called after each chunk with the tokens scored, the nats so far, and the tokens expected (None: unknown)."""


@dataclass(eq=False)
class TextReading:
    """The reading of a text, up to a point.

    sums   of all targets so far, with the state after the last one
    began  time at which an uninterrupted run would have begun

    The other fields are those of `measure_perplexity`.
    """

    engine: Engine
    source: Corpus
    by_document: bool
    tokens: int | None = None
    limit: int | None = None
    positions: tuple[int, ...] = ()
    losses: str | Path | None = None
    progress: Progress | None = None
    checkpoints: Checkpoints | None = None
    key: str = ""
    share: Share = WHOLE
    sums: LossAccumulator = field(init=False)
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self._go_back()
        self.began = time.perf_counter() - self.sums.seconds

    def to_the_end(self) -> TextAudit:
        """Read the rest. Returns the audit of the text."""
        if not self.source.fingerprint:  # it may be given only once: an iterator
            audit = self._read_on()
            assert audit is not None
            return audit
        while True:
            self.engine.fit_chunks(self.sums.scored, self.sums.peak_state_bytes, LOOK_AHEAD)
            found = unless_full(self._read_on)
            if isinstance(found, NoMemory):  # the state may be changed in part
                self.engine.take_smaller_chunks(found.wanted)
                self._go_back()
            elif found is not None:
                return found

    def _go_back(self) -> None:
        """Go back to the point that was saved last, or to the beginning."""
        saved = read_checkpoint(self.checkpoints, self.key, self.engine.lm)
        usable = saved is not None and LossFile.holds(self.losses, saved.tokens)
        self.sums = saved if saved is not None and usable else LossAccumulator(self.by_document, self.positions)

    def _read_on(self) -> TextAudit | None:
        """Read from where the sums end. Returns the audit of the text; None if less should be read at once from here on."""
        engine, sums, lm = self.engine, self.sums, self.engine.lm
        rolling, monitor = is_rolling(engine), fast_weights.monitor(lm, sums)
        of_documents, of_windows = (self.share, WHOLE) if self.by_document else (WHOLE, self.share)
        chosen: dict[str, Any] = {"limit": self.limit, "tokens": self.tokens, "rolling": rolling, "share": of_documents}
        texts = sequences(lm, self.source, by_document=self.by_document, **chosen)
        audit = text_audit(engine, sums, lambda: None if self.limit else self._expected, str(self.source))
        with LossFile(self.losses, already=sums.tokens) as file, self._nothing_kept_if_refused():
            saver = Saver(self._save_with(file) if self.checkpoints else None, "reading")
            for number, chunk in enumerate(read(engine, texts, sums, str(self.source), audit, of_windows), start=1):
                file.write(chunk.losses)
                if self.progress is not None:
                    self.progress(sums.tokens, float(sums.total[NATS]), self._expected)
                if monitor is not None and not monitor.measure(sums):
                    continue  # no point to resume from while a measurement is pending
                saver.save_if_due(sums)
                due = number % LOOK_AHEAD == 0 and self.source.fingerprint
                if due and engine.is_short(sums.scored, sums.peak_state_bytes, LOOK_AHEAD):
                    return None
            if monitor is not None:
                monitor.measure(sums, last=True)
        return audit

    def _save_with(self, file: LossFile) -> Callable[[LossAccumulator], None]:
        def save(sums: LossAccumulator) -> None:
            assert self.checkpoints is not None
            file.sync()
            sums.seconds = time.perf_counter() - self.began
            write_checkpoint(self.checkpoints, self.key, sums)

        return save

    @contextmanager
    def _nothing_kept_if_refused(self) -> Iterator[None]:
        """Delete the checkpoint and the losses of a text that is refused while it is read: they may be wrong."""
        try:
            yield
        except Refused:
            if self.checkpoints is not None:
                self.checkpoints.drop(self.key)
            if self.losses is not None:
                Path(self.losses).unlink(missing_ok=True)
            raise

    @property
    def _expected(self) -> int | None:
        return expected_tokens(self.engine.lm, self.source, self.sums, self.tokens)


def is_rolling(engine: Engine) -> bool:
    """Whether texts are read in the windows of lm-evaluation-harness."""
    return engine.policy.windows is not None and engine.policy.windows.anchored


def read(
    engine: Engine, texts: Iterable[TokenReader], sums: LossAccumulator, name: str, audit: TextAudit, share: Share = WHOLE
) -> Iterator[Chunk]:
    """Read the texts from where the sums end, and add each chunk to them, and to the audit. Documents without a target are
    skipped and counted.

    share  of the windows of a stream"""
    begun = bool(sums.scored)
    for ids in documents(engine, texts, sums):
        if not begun and sums.by_document and ids.is_empty:
            sums.skipped += 1
            continue
        if not begun:
            sums.start_document()
        with naming(f"{name}, document {ids.number}" if sums.by_document else name):
            if isinstance(ids, HeldDocument) and ids.batch:
                chunks, rows, width = _read_beside(engine, ids, sums, audit), len(ids.batch), ids.width
            else:
                chunks, rows, width = _read_alone(engine, ids, sums, audit, share), 1, 0
            for chunk in chunks:
                sums.add(chunk)
                audit.add(chunk)
                yield chunk
            audit.end(rows, width)
        sums.end_document(ids.hexdigest, ids.number)
        sums.special_tokens += ids.special
        begun = False


def _read_alone(
    engine: Engine, ids: TokenReader | HeldDocument, sums: LossAccumulator, audit: TextAudit, share: Share
) -> Iterator[Chunk]:
    ids.skip = sums.scored if engine.policy.windows is None else sums.window
    return engine.stream(audit.watched(ids), state=sums.state, position=sums.scored, window=sums.window, share=share)


def _read_beside(engine: Engine, ids: HeldDocument, sums: LossAccumulator, audit: TextAudit) -> Iterator[Chunk]:
    """The chunk of a document that is read in a batch; nothing if it was added before the reading was interrupted."""
    if sums.scored:
        return
    for _ in audit.watched(ids):
        pass
    yield ids.read(engine)


def expected_tokens(lm: Model, corpus: Corpus, sums: LossAccumulator, tokens: int | None) -> int | None:
    """The number of targets of the whole text; of text an estimate from the bytes so far, of frames an upper bound."""

    def targets(length: int) -> int:
        return length - 1 if lm.codebooks is None else length * len(lm.codebooks.scored)

    known = targets(tokens) if tokens and not sums.by_document else None
    if corpus.size is None or (sums.by_document and tokens):
        return known
    per_byte = sums.total[TOKENS] / max(sums.total[BYTES], 1)
    whole = targets(corpus.size) if corpus.tokenized else round(corpus.size * per_byte)
    return whole if known is None else min(known, whole)
