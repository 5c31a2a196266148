"""The verbs of the `lmeval` fixture: measure, record under the test's name, and go on where a killed run stopped.

Each verb is the plain function of the same name (usable without pytest) with four things around it: the defaults of
the command line, the journal, the verdict that a streamed number stands on, and a progress bar.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pytest_lmeval.adapters import as_model
from pytest_lmeval.benchmarking import Driver
from pytest_lmeval.data.corpus import Corpus, CorpusError
from pytest_lmeval.equivalence.permits import Refused, exact_chunk_size, how_to_share
from pytest_lmeval.identity import facts, fingerprint, tokenizer_fingerprint
from pytest_lmeval.lm import Model, ModelError, SpecError
from pytest_lmeval.profiling.runner import ProfilingError, Runner
from pytest_lmeval.results.journal import key_of
from pytest_lmeval.results.metric import Metric
from pytest_lmeval.results.record import Record
from pytest_lmeval.session import Session, TestLog
from pytest_lmeval.stream import StreamError
from pytest_lmeval.task import Suite, Task, TaskError

if TYPE_CHECKING:
    from pytest_lmeval.equivalence.probe import EquivalenceResult
    from pytest_lmeval.profiling.efficiency import EfficiencyResult
    from pytest_lmeval.profiling.grid import Grid
    from pytest_lmeval.profiling.latency import LatencyResult
    from pytest_lmeval.profiling.memory import MemoryResult
    from pytest_lmeval.profiling.streaming import StreamingResult
    from pytest_lmeval.profiling.throughput import ThroughputResult
    from pytest_lmeval.scoring.agreement import AgreementResult
    from pytest_lmeval.scoring.evaluate import TaskResult
    from pytest_lmeval.scoring.result import PerplexityResult
    from pytest_lmeval.scoring.suite import SuiteResult
    from pytest_lmeval.training import TrainResult

EXPECTED = (CorpusError, ModelError, ProfilingError, SpecError, StreamError, TaskError)
R = TypeVar("R")
V = TypeVar("V", bound=Callable[..., Any])


def verb(method: V) -> V:
    """Let an error that was meant for the user arrive as its message at their own line, without our frames."""

    @functools.wraps(method)
    def shown_at_the_call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            return method(*args, **kwargs)
        except EXPECTED as error:
            raise error.with_traceback(None) from None

    return shown_at_the_call  # type: ignore[return-value]


class Lmeval:
    """What a test measures with. Every call returns a result and keeps its record for the reports."""

    def __init__(self, session: Session, log: TestLog, benchmark: Any = None) -> None:
        self._session, self._log, self._driver = session, log, Driver(benchmark)
        self._models: dict[int, tuple[Any, Model]] = {}

    def __repr__(self) -> str:
        return f"<lmeval of {self._log.test}>"

    @verb
    def perplexity(
        self,
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
        from pytest_lmeval.scoring.perplexity import bare_ids, perplexity
        from pytest_lmeval.scoring.result import PerplexityResult

        model = self._model(lm)
        corpus = corpus if isinstance(corpus, Corpus) else bare_ids(corpus)
        certificate = self._session.verdict(model).certificate
        if certificate.limit_tokens and not certificate.limit_is_step:  # found, though the model did not declare it
            model = replace(model, context_length=certificate.limit_tokens)
        settings: dict[str, Any] = {
            "chunk_size": exact_chunk_size(model, certificate, chunk_size, window),
            "tokens": tokens or self._session.tokens,
            "limit": self._session.limit if limit is None else limit,
            "as_stream": as_stream,
            "window": window,
            "overlap": overlap,
            "positions": positions,
        }
        data = [corpus.name, corpus.split, corpus.fingerprint, tokenizer_fingerprint(model), losses]
        key = self._key("perplexity", model, settings, data)
        known = bool(corpus.fingerprint)  # an iterator may bring something else the next time
        if known and (finished := self._finished(key)) is not None:
            return PerplexityResult(finished)
        examples, units = self._file("losses.npy") if losses else None, self._file("units.jsonl")
        with self._session.progress(f"{model.spec} reads {corpus}") as progress:
            result = perplexity(
                model,
                corpus,
                **settings,
                losses=self._session.folder / examples if examples else None,
                units=self._session.folder / units,
                certificate=certificate.to_json(),
                progress=progress,
                checkpoints=self._session.journal.checkpoints if known and "resume" not in certificate.broken else None,
                key=key,
            )
        if result.resumed_at:
            self._log.notes.append(f"{model.spec} on {corpus}: went on from token {result.resumed_at:,} of an interrupted run")
        self._log.notes += result.record.settings.get("warnings", [])
        return self._recorded(key, replace(result, record=replace(result.record, examples=examples, units=units)))

    @verb
    def agreement(
        self,
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
        from pytest_lmeval.scoring.agreement import AgreementResult, agreement
        from pytest_lmeval.scoring.perplexity import bare_ids

        corpus = corpus if isinstance(corpus, Corpus) else bare_ids(corpus)
        models = [self._model(lm), self._model(reference)]
        certificates = [self._session.verdict(model).certificate for model in models]
        sizes = [exact_chunk_size(model, found, None, None) for model, found in zip(models, certificates, strict=True)]
        for place, found in enumerate(certificates):
            if found.limit_tokens and not found.limit_is_step:
                models[place] = replace(models[place], context_length=found.limit_tokens)
        settings: dict[str, Any] = {
            "chunk_size": sizes[0],
            "reference_chunk_size": sizes[1],
            "tokens": tokens or self._session.tokens,
            "limit": self._session.limit if limit is None else limit,
            "as_stream": as_stream,
        }
        about = [corpus.name, corpus.split, corpus.fingerprint, tokenizer_fingerprint(models[0]), fingerprint(models[1])]
        key = self._key("agreement", models[0], settings, about)
        if corpus.fingerprint and (finished := self._finished(key)) is not None:
            return AgreementResult(finished)
        title = f"{models[0].spec} beside {models[1].spec} on {corpus}"
        with self._session.progress(title) as progress:
            result = agreement(
                models[0], models[1], corpus, **settings, certificate=certificates[0].to_json(), progress=progress
            )
        verdict = {"reference_verdict": certificates[1].verdict}
        record = replace(result.record, settings={**result.record.settings, **verdict})
        return self._recorded(key, replace(result, record=record))

    @verb
    def task(
        self,
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
        from pytest_lmeval.scoring.evaluate import evaluate
        from pytest_lmeval.tasks import find

        model = self._model(lm)
        task = find(task, style) if isinstance(task, str) else task
        certificate = self._session.verdict(model).certificate
        if certificate.limit_tokens and not certificate.limit_is_step:
            model = replace(model, context_length=certificate.limit_tokens)
        settings: dict[str, Any] = {
            "shots": shots,
            "limit": self._session.limit if limit is None else limit,
            "batch_size": batch_size,
            "fewshot": fewshot,
            "truncate": truncate,
            "seed": seed,
        }
        key = self._key("task", model, settings, [task.name, task.style, self._rows(task.rows), tokenizer_fingerprint(model)])
        written = self._file("examples.jsonl")
        finished = self._session.journal.get(key) or {}  # of an interrupted run: its answers, if the questions are the same
        with self._session.progress(f"{model.spec} answers {task.name}", unit="questions") as progress:
            result = evaluate(
                model,
                task,
                **{**settings, **how_to_share(model, certificate, batch_size)},
                data_dir=self._session.mirror,
                examples=self._session.folder / written,
                partial=self._session.folder / "partial" / f"{key}.jsonl",
                known=self._session.folder / finished["examples"] if finished.get("examples") else None,
                certificate=certificate.to_json(),
                progress=progress,
            )
        if result.resumed:
            self._log.notes.append(f"{model.spec} on {task.name}: {result.resumed:,} answers taken from an interrupted run")
        return self._recorded(key, replace(result, record=replace(result.record, examples=written)))

    @verb
    def suite(self, lm: Any, suite: Suite | str, shots: int = 0, *, style: str = "lm_eval", **options: Any) -> SuiteResult:
        """Ask every task of a suite (see `task`): the average of their first metrics, all of them named.

        A task that fails does not cost the others: they are recorded, and then it is told, since without it there is no
        average.
        """
        from pytest_lmeval.scoring.suite import SuiteResult, refuse_failed, suite_record
        from pytest_lmeval.tasks import find_suite

        suite = find_suite(suite, style) if isinstance(suite, str) else suite
        results, failed = {}, {}
        for task in suite.tasks:
            try:
                results[task.name] = self.task(lm, task, shots, **options)
            except EXPECTED as error:
                failed[task.name] = str(error)
        record = replace(suite_record(suite, shots, facts(self._model(lm)), results, failed), test=self._log.test)
        self._log.records.append(record)
        refuse_failed(suite, failed)
        return SuiteResult(record, results)

    def _rows(self, rows: Any) -> str:
        """What the rows of a task are; empty where that cannot be known before they are read."""
        from pytest_lmeval.data.rows import Rows

        if isinstance(rows, Rows):
            return rows.fingerprint(self._session.mirror)
        return key_of(rows=rows) if isinstance(rows, list | tuple) else ""

    @verb
    def equivalence(self, lm: Any, **options: Any) -> EquivalenceResult:
        """Which laws of streaming the model keeps (see `equivalence.probe.equivalence`); probed once in a session."""
        from pytest_lmeval.equivalence.probe import equivalence, restore

        model = self._model(lm)
        key = self._key("equivalence", model, options)
        if (finished := self._finished(key)) is not None:
            return restore(finished)
        probed = equivalence(model, **{**self._session.probe, **options}) if options else self._session.verdict(model)
        return self._recorded(key, probed)

    @verb
    def train(self, lm: Any, corpus: Corpus, *, held_out: Corpus | None = None, **protocol: Any) -> TrainResult:
        """Train a copy of the model by the one protocol for all models (see `training.train`); `.lm` of the result is it.

        lm        a spec, or a model, which stays as it is
        held_out  the text that decides which weights are best; the validation split of the same corpus by default
        protocol  fields of `training.Protocol`: steps, batch_size, seq_len, lr, seed, ...

        A model that was trained by the same protocol before is taken from the output folder.
        """
        from pytest_lmeval.scoring.perplexity import bare_ids
        from pytest_lmeval.training import Protocol, train

        model = self._model(lm)
        certificate = self._session.verdict(model).certificate
        if "causality" in certificate.broken:
            raise Refused(
                f"{model.spec} is {certificate.verdict}:\n{certificate.why_not()}\nTrained, it would learn to look at the "
                "token that it is to predict, and its perplexity would look good and mean nothing."
            )
        corpus = corpus if isinstance(corpus, Corpus) else bare_ids(corpus)
        defaults: dict[str, Any] = {"seq_len": self._seq_len(None, Protocol.seq_len)}
        if self._session.tokens:
            defaults["tokens"] = self._session.tokens
        chosen = Protocol.of(**{**defaults, **protocol})
        held_out = self._validation(corpus) if held_out is None else held_out
        with self._session.progress(f"{model.spec} learns {corpus}") as progress:
            result = train(
                model,
                corpus,
                held_out=held_out,
                protocol=chosen,
                folder=self._session.folder,
                progress=progress,
                spec=f"{model.spec} trained",
                fresh=self._session.fresh,
            )
        if result.cached:
            self._log.notes.append(f"{model.spec} on {corpus}: trained before by the same protocol")
        elif result.resumed_at:
            self._log.notes.append(f"{model.spec} on {corpus}: went on from step {result.resumed_at:,} of an interrupted run")
        record = replace(
            result.record, certificate={**certificate.to_json(), "chunking_used": "crops, each from an empty state"}
        )
        data = [corpus.fingerprint, getattr(held_out, "fingerprint", "")]
        return self._recorded(self._key("train", model, chosen.to_json(), data), replace(result, record=record))

    def _validation(self, corpus: Corpus) -> Corpus:
        """The text to hold out where none was given."""
        try:
            found = self._session.corpus(corpus.name, "validation")
        except CorpusError as error:
            raise CorpusError(
                f"{corpus} has no validation split to hold out ({error}) Give another text: held_out=..."
            ) from None
        if found.fingerprint == corpus.fingerprint:
            raise CorpusError(f"{corpus.name} has one text for all splits. Give another one to hold out: held_out=corpus(...).")
        return found

    @verb
    def latency(self, lm: Any, batch_size: int = 1, seq_len: int | None = None, **options: Any) -> LatencyResult:
        """Prefill, time to first token, inter-token latency (see `profiling.latency.latency`).

        In a test that asks for the fixture `benchmark`, pytest-benchmark drives the runs and keeps their times. Where nothing
        was timed (under xdist, or with --benchmark-disable), the record says so, and a test that looks at a time is skipped.
        """
        from pytest_lmeval.profiling.latency import latency

        shape = {"batch_size": batch_size, "seq_len": self._seq_len(seq_len, 128)}
        return self._timed("latency", self._model(lm), {**shape, **options}, latency)

    @verb
    def latency_grid(self, lm: Any, **options: Any) -> Grid:
        """`latency` at every one of `batch_sizes` and `seq_lens` (see `profiling.grid.latency_grid`), a record each.

        Where the model fails, for example for want of memory, that cell is marked with why, and the others are measured.
        """
        from pytest_lmeval.profiling.grid import SEQ_LENS, latency_grid
        from pytest_lmeval.profiling.latency import latency

        def measure(model: Model, **settings: Any) -> LatencyResult:
            return latency(model, **settings, runner=self._runner())

        model, options = self._model(lm), {"seq_lens": self._session.seq_lens or SEQ_LENS, **options}
        grid = latency_grid(model, **options, measure=measure)
        cells = {shape: self._kept("latency", model, {**options, "shape": shape}, cell) for shape, cell in grid.items()}
        return replace(grid, cells=cells)

    @verb
    def throughput(self, lm: Any, batch_size: int = 32, seq_len: int | None = None, **options: Any) -> ThroughputResult:
        """Tokens a second in batches, and by the size of the batch (see `profiling.throughput.throughput`)."""
        from pytest_lmeval.profiling.throughput import throughput

        shape = {"batch_size": batch_size, "seq_len": self._seq_len(seq_len, 512)}
        return self._timed("throughput", self._model(lm), {**shape, **options}, throughput)

    @verb
    def streaming(self, lm: Any, chunk_size: int | None = None, **options: Any) -> StreamingResult:
        """The latency of each chunk of a stream and what the state weighs after it (see `profiling.streaming.streaming`).

        The chunk size is one in which the model was found to be exact: how fast a wrong number comes is of no use.
        """
        from pytest_lmeval.profiling.streaming import CHUNK_SIZE, streaming

        model = self._model(lm)
        certificate = self._session.verdict(model).certificate
        chunk_size = exact_chunk_size(model, certificate, chunk_size, None) or CHUNK_SIZE
        return self._timed("streaming", model, {"chunk_size": chunk_size, **options}, streaming)

    @verb
    def memory(self, lm: Any, batch_size: int = 1, seq_len: int | None = None, **options: Any) -> MemoryResult:
        """Weights, state and activations apart, and the peak of a process of its own (see `profiling.memory.memory`).

        Nothing is timed, and other tests do not disturb it: it is measured under xdist too.
        """
        from pytest_lmeval.profiling.memory import memory

        model = self._model(lm)
        settings = {"batch_size": batch_size, "seq_len": self._seq_len(seq_len, 128), **options}
        return self._kept("memory", model, settings, memory(model, **settings))

    @verb
    def efficiency(self, lm: Any, batch_size: int = 1, seq_len: int | None = None, **options: Any) -> EfficiencyResult:
        """Operations and bytes of a step, and how near to this machine's roofline it runs (see `profiling.efficiency`).

        Timed like `latency`. Where nothing was timed, what is counted is recorded.
        """
        from pytest_lmeval.profiling.efficiency import efficiency

        shape = {"batch_size": batch_size, "seq_len": self._seq_len(seq_len, 128)}
        return self._timed("efficiency", self._model(lm), {**shape, **options}, efficiency)

    @verb
    def record(self, lm: Any, subject: str, **metrics: float) -> Record:
        """Record numbers of your own beside ours: they stand in the summary and the reports like any other.

        lmeval.record(lm, "passkey at 8k", accuracy=Metric(0.97, n=100, higher_is_better=True))
        """
        kept = {name: value if isinstance(value, Metric) else Metric(value) for name, value in metrics.items()}
        record = Record(kind="custom", subject=subject, lm=facts(self._model(lm)), metrics=kept, test=self._log.test)
        self._log.records.append(record)
        return record

    def _model(self, lm: Any) -> Model:
        """What the test handed over (a spec, too), adapted once a test, and let go with it."""
        if isinstance(lm, str):
            return self._session.load(lm)
        if id(lm) not in self._models:
            self._models[id(lm)] = (lm, as_model(lm))
        return self._models[id(lm)][1]

    def _key(self, kind: str, lm: Model, settings: dict[str, Any], data: Any = None) -> str:
        return key_of(
            test=self._log.test,
            kind=kind,
            lm=[fingerprint(lm), str(lm.dtype), str(lm.device)],
            settings=settings,
            data=data,
            version=importlib.metadata.version("pytest-lmeval"),
            call=len(self._log.records),
        )

    def _finished(self, key: str) -> Record | None:
        """The record of this call from a run that was interrupted later on."""
        data = self._session.journal.get(key)
        if data is None:
            return None
        record = Record.from_json(data)
        self._log.keys.append(key)
        self._log.records.append(record)
        self._log.notes.append(f"{record.lm['spec']} on {record.subject}: result taken from an interrupted run")
        self._log.notes += record.settings.get("warnings", [])
        return record

    def _recorded(self, key: str, result: R) -> R:
        record = replace(result.record, test=self._log.test)  # type: ignore[attr-defined]
        self._session.journal.add(key, record.to_json())
        self._log.keys.append(key)
        self._log.records.append(record)
        return replace(result, record=record)  # type: ignore[type-var]

    def _timed(self, kind: str, lm: Model, settings: dict[str, Any], measure: Callable[..., R]) -> R:
        result = self._kept(kind, lm, settings, measure(lm, **settings, runner=self._runner()))
        record: Record = result.record  # type: ignore[attr-defined]
        if failure := record.settings.get("failure"):
            self._driver.raise_error(ProfilingError(f"{lm.spec} failed at {record.subject}: {failure}"))
        return result

    def _kept(self, kind: str, lm: Model, settings: dict[str, Any], result: R) -> R:
        """The result, recorded, and left with pytest-benchmark where the test asked for its fixture."""
        result = self._recorded(self._key(kind, lm, settings), result)
        self._driver.describe(result.record, getattr(result, "samples", {}))  # type: ignore[attr-defined]
        return result

    def _runner(self) -> Runner:
        """Who calls what is timed next: pytest-benchmark once a test, if the test asks for it, else a bare loop."""
        if self._session.parallel:
            return Runner(not_measured="other tests run at the same time (xdist): the step ran once, untimed")
        return self._driver.runner()

    def _seq_len(self, given: int | None, default: int) -> int:
        lengths = self._session.seq_lens
        if given is None and len(lengths) > 1:
            raise SpecError(
                f"several --lmeval-seq-len were given ({', '.join(map(str, lengths))}) and the test does not say which it "
                "means: take the fixture `seq_len` and pass it on."
            )
        return given or (lengths[0] if lengths else default)

    def _file(self, ending: str) -> str:
        """A file for per-example values of this call, relative to the output folder."""
        (self._session.folder / "examples").mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]+", "-", self._log.test.rpartition("::")[2])[:80]
        return f"examples/{name}-{key_of(test=self._log.test)[:8]}-{len(self._log.records)}-{ending}"
