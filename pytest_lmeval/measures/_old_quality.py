"""How well a model reads, predicts and answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_lmeval.data.corpus import Corpus
from pytest_lmeval.laws.permits import exact_chunk_size, how_to_share
from pytest_lmeval.measures.context import EXPECTED, Desk
from pytest_lmeval.models.identity import facts, fingerprint, tokenizer_fingerprint
from pytest_lmeval.records.journal import key_of
from pytest_lmeval.tasks.questions import Suite, Task

if TYPE_CHECKING:
    from pytest_lmeval.measures._agreement import AgreementResult
    from pytest_lmeval.measures._suite import SuiteResult
    from pytest_lmeval.measures._task import TaskResult
    from pytest_lmeval.scoring.result import PerplexityResult


def perplexity(
    desk: Desk,
    /,
    lm: Any,
    corpus: Corpus | Iterable[Any],
    chunk_size: int | None = None,
    tokens: int | None = None,
    *,
    limit: int | None = None,
    as_stream: bool | None = None,
    window: int | Literal["unlimited", "lm_eval"] | None = None,
    overlap: int | None = None,
    positions: tuple[int, ...] = (),
    losses: bool = False,
) -> PerplexityResult:
    """Read a corpus: perplexity, bits per byte, accuracy, loss by position (see `scoring.perplexity.perplexity`).

    The model's laws are probed first. Its state is carried only in a way that was found exact; the record says which.
    window="lm_eval" reads each document in the windows of lm-evaluation-harness, so that its numbers can be had again.
    losses=True writes the loss of every token to a file in the output folder.
    """
    from pytest_lmeval.measures._perplexity import bare_ids
    from pytest_lmeval.scoring.result import PerplexityResult

    corpus = corpus if isinstance(corpus, Corpus) else bare_ids(corpus)
    model, certificate = desk.certified(lm)
    settings: dict[str, Any] = {
        "chunk_size": exact_chunk_size(model, certificate, chunk_size, window),
        "tokens": tokens or desk.session.tokens,
        "limit": desk.session.limit if limit is None else limit,
        "as_stream": as_stream,
        "window": window,
        "overlap": overlap,
        "positions": positions,
    }
    data = [corpus.name, corpus.split, corpus.fingerprint, tokenizer_fingerprint(model), losses]
    key = desk.key("perplexity", model, settings, data)
    known = bool(corpus.fingerprint)  # an iterator may bring something else the next time
    if known and (finished := desk.finished(key)) is not None:
        return PerplexityResult(finished)
    examples, units = desk.file("losses.npy") if losses else None, desk.file("units.jsonl")
    with desk.session.progress(f"{model.spec} reads {corpus}") as progress:
        result = perplexity(
            model,
            corpus,
            **settings,
            losses=desk.session.folder / examples if examples else None,
            units=desk.session.folder / units,
            certificate=certificate.to_json(),
            progress=progress,
            checkpoints=desk.session.journal.checkpoints if known and "resume" not in certificate.broken else None,
            key=key,
        )
    if result.resumed_at:
        desk.log.notes.append(f"{model.spec} on {corpus}: went on from token {result.resumed_at:,} of an interrupted run")
    desk.log.notes += result.record.settings.get("warnings", [])
    return desk.recorded(key, replace(result, record=replace(result.record, examples=examples, units=units)))


def agreement(
    desk: Desk,
    /,
    lm: Any,
    reference: Any,
    corpus: Corpus | Iterable[Any],
    *,
    tokens: int | None = None,
    limit: int | None = None,
    as_stream: bool | None = None,
) -> AgreementResult:
    """How far the model predicts as `reference` (a model, or a spec) does (see `scoring.agreement.agreement`).

    Both models' laws are probed first, and each is read in chunks that were found exact for it.
    """
    from pytest_lmeval.measures._agreement import AgreementResult
    from pytest_lmeval.measures._perplexity import bare_ids

    corpus = corpus if isinstance(corpus, Corpus) else bare_ids(corpus)
    (model, certificate), (other, theirs) = desk.certified(lm), desk.certified(reference)
    settings: dict[str, Any] = {
        "chunk_size": exact_chunk_size(model, certificate, None, None),
        "reference_chunk_size": exact_chunk_size(other, theirs, None, None),
        "tokens": tokens or desk.session.tokens,
        "limit": desk.session.limit if limit is None else limit,
        "as_stream": as_stream,
    }
    about = [corpus.name, corpus.split, corpus.fingerprint, tokenizer_fingerprint(model), fingerprint(other), other.limit]
    key = desk.key("agreement", model, settings, about)
    if corpus.fingerprint and (finished := desk.finished(key)) is not None:
        return AgreementResult(finished)
    title = f"{model.spec} beside {other.spec} on {corpus}"
    with desk.session.progress(title) as progress:
        result = agreement(model, other, corpus, **settings, certificate=certificate.to_json(), progress=progress)
    verdict = {"reference_verdict": theirs.verdict}
    record = replace(result.record, settings={**result.record.settings, **verdict})
    return desk.recorded(key, replace(result, record=record))


def task(
    desk: Desk,
    /,
    lm: Any,
    task: Task | str,
    shots: int = 0,
    *,
    style: str = "lm_eval",
    limit: int | None = None,
    batch_size: int = 8,
    fewshot: Literal["document", "lm_eval"] = "document",
    truncate: Literal["left", "refuse"] = "left",
    seed: int = 0,
) -> TaskResult:
    """Ask a task (see `scoring.evaluate.evaluate`): its metrics with intervals, and every answer in a file.

    What questions have in common is read once, as far as the laws that the model was probed for allow it.
    """
    from pytest_lmeval.tasks import find

    task = find(task, style) if isinstance(task, str) else task
    model, certificate = desk.certified(lm)
    settings: dict[str, Any] = {
        "shots": shots,
        "limit": desk.session.limit if limit is None else limit,
        "batch_size": batch_size,
        "fewshot": fewshot,
        "truncate": truncate,
        "seed": seed,
    }
    key = desk.key("task", model, settings, [task.name, task.style, _rows(desk, task.rows), tokenizer_fingerprint(model)])
    written = desk.file("examples.jsonl")
    finished = desk.session.journal.get(key) or {}  # of an interrupted run: its answers, if the questions are the same
    with desk.session.progress(f"{model.spec} answers {task.name}", unit="questions") as progress:
        result = measure_task(
            model,
            task,
            **{**settings, **how_to_share(model, certificate, batch_size)},
            data_dir=desk.session.mirror,
            examples=desk.session.folder / written,
            partial=desk.session.folder / "partial" / f"{key}.jsonl",
            known=desk.session.folder / finished["examples"] if finished.get("examples") else None,
            certificate=certificate.to_json(),
            progress=progress,
        )
    if result.resumed:
        desk.log.notes.append(f"{model.spec} on {task.name}: {result.resumed:,} answers taken from an interrupted run")
    return desk.recorded(key, replace(result, record=replace(result.record, examples=written)))


def suite(desk: Desk, /, lm: Any, suite: Suite | str, shots: int = 0, *, style: str = "lm_eval", **options: Any) -> SuiteResult:
    """Ask every task of a suite (see `task`): the average of their first metrics, all of them named.

    A task that fails does not cost the others: they are recorded, and then it is told, since without it there is no
    average.
    """
    from pytest_lmeval.measures._suite import SuiteResult, refuse_failed, suite_record
    from pytest_lmeval.tasks import find_suite

    suite = find_suite(suite, style) if isinstance(suite, str) else suite
    results, failed = {}, {}
    for member in suite.tasks:
        try:
            results[member.name] = task(desk, lm, member, shots, **options)
        except EXPECTED as error:
            failed[member.name] = str(error)
    record = replace(suite_record(suite, shots, facts(desk.model(lm)), results, failed), test=desk.log.test)
    desk.log.records.append(record)
    refuse_failed(suite, failed)
    return SuiteResult(record, results)


def _rows(desk: Desk, rows: Any) -> str:
    """What the rows of a task are; empty where that cannot be known before they are read."""
    from pytest_lmeval.data.rows import Rows

    if isinstance(rows, Rows):
        return rows.fingerprint(desk.session.mirror)
    return key_of(rows=rows) if isinstance(rows, list | tuple) else ""
