"""Ask a model a task, and record its metrics with intervals. `measures._task_reading` reads what the metrics are made of."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from msgspec import structs

from pytest_lmeval.data._rows import Rows
from pytest_lmeval.engine import Engine, Policy, policy_for
from pytest_lmeval.engine._memory import rows_that_fit
from pytest_lmeval.errors import ArgumentError, NotMeasuredError, Refused, TaskError, WithheldError, nearest
from pytest_lmeval.measures._context import VerbContext, current, shared_verb
from pytest_lmeval.measures._merging import EMPTY
from pytest_lmeval.measures._task_merging import merged as merged_record_of
from pytest_lmeval.measures._task_reading import Asking, Progress, TaskReading
from pytest_lmeval.measures._task_record import norm_of, number_of_questions, record_of, withheld
from pytest_lmeval.models._chat import with_end_of_turn, with_template_kwargs
from pytest_lmeval.models._identity import fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model, with_special_tokens
from pytest_lmeval.records._certificate import CONSISTENT
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import ANSWERS, key_of, warn
from pytest_lmeval.records._measured import Result, withheld_of
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._share import WHOLE, Share
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._answers import AnswerStore, write_examples
from pytest_lmeval.scoring._chat import ChatMode, Decision, decide
from pytest_lmeval.scoring._fewshot import Fewshot, identity_of, rows_of
from pytest_lmeval.scoring._metrics import combined_metrics, compute
from pytest_lmeval.scoring._requests import Truncate
from pytest_lmeval.scoring._row_scores import scorer_name
from pytest_lmeval.scoring._several import Spread
from pytest_lmeval.tasks import find
from pytest_lmeval.tasks._checks import template_kwargs
from pytest_lmeval.tasks._questions import Generate, Requests
from pytest_lmeval.tasks._task import Setting, Task

BATCH = 8  # rows
LOOKED_AT = 256  # questions, to choose a batch size


@shared_verb
def task(
    lm: Any,
    task: Task | str,
    shots: int | None = None,
    *,
    limit: int | None = None,
    batch_size: int | Literal["auto"] | None = None,
    fewshot: Literal["document", "lm_eval"] = "document",
    truncate: Literal["left", "refuse"] = "left",
    seed: int = 0,
    invariant: bool = False,
    chat: Literal["auto"] | bool | None = None,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TaskResult:
    """Ask a task, or the one of that name: its metrics with intervals, and every answer in a file (see `measure_task`).

    A prefix that questions share is read once, where the laws that the model was probed for allow it. With invariant=True,
    each request is read alone: its log-likelihood does not depend on batch size, order or limit, to the last bit.

    batch_size  rows of a batch; by default those of --lmeval-batch, else 8. "auto": as many as fit into the memory by estimate.
                Wherever memory runs out, half as many are read from there on, and a note says so.
    chat        whether the task is asked in turns, by the chat template of the model; by default as --lmeval-chat says, else
                "auto": if answers are generated, and the prompts are not to be those of lm_eval
    system      the system prompt of a chat, before the description of the task
    chat_template_kwargs  keywords of the chat template; they come before those of the same name of
                --lmeval-chat-template-kwargs, and these before those of the task
    """
    context = current()
    asked = find(task) if isinstance(task, str) else task
    if not isinstance(asked, Task):
        raise ArgumentError(f"a task is a Task, or the name of one; got {asked!r}.")
    model, certificate = context.certified(lm)
    limit = context.session.limit if limit is None else limit
    settings: dict[str, Any] = {"limit": limit, "fewshot": fewshot, "truncate": truncate, "seed": seed}
    settings |= {"chat": context.session.chat if chat is None else chat, "system": system}
    own = template_kwargs(asked.name, chat_template_kwargs or {})
    kwargs = {**asked.chat_template_kwargs, **template_kwargs(asked.name, context.session.chat_template_kwargs), **own}
    model = with_template_kwargs(model, kwargs)
    settings |= {"chat_template_kwargs": kwargs} if kwargs else {}
    if asked.prepare is not None:
        in_turns = decide(settings["chat"], model, asked, lambda: None, system).on
        may_run, say = asked.name in context.session.trusted, context.session.say
        setting = Setting(model, shots, limit, context.session.mirror, may_run, say, in_turns, system)
        asked, shots = asked.prepare(setting), 0
    settings["shots"] = shots or 0
    usual = BATCH if model.served is None else model.served.concurrency
    rows = batch_size or context.session.batch or usual
    if rows == "auto":
        asking = Asking(asked, **settings, data_dir=context.session.mirror)
        rows = usual if model.served is not None else _rows_that_fit(model, asking)
    policy = policy_for(model, certificate, batch_size=rows, invariant=invariant)
    data = [asked.name, asked.style, asked.special_tokens, rows_fingerprint(asked, context), tokenizer_fingerprint(model)]
    key = context.key("task", model, {**settings, "batch_size": policy.batch_size, "invariant": invariant}, data)
    written = context.file("examples.jsonl")
    with context.session.progress(f"{model.spec} answers {asked.name}", unit="questions") as progress:
        measure = partial(
            measure_task,
            model,
            asked,
            **settings,
            policy=policy,
            data_dir=context.session.mirror,
            examples=None if context.ranks is not None else context.path(written),
            kept=answers_file(context, model, asked),
            progress=progress,
        )
        ends_early = asked.threshold is not None  # the order of the answers decides when
        merge = partial(merged, asked)
        result: TaskResult = context.shared(key, model, lambda share: measure(share=share), merge, alone=ends_early)
        if context.ranks is not None and written is not None and context.session.writes:
            write_examples(result.examples, str(context.path(written)))
    if result.resumed:
        context.log.notes.append(f"{model.spec} on {asked.name}: {result.resumed:,} answers taken from an earlier run")
    return context.recorded(key, replace(result, record=structs.replace(result.record, examples=written)))


def _rows_that_fit(lm: Model, asking: Asking) -> int:
    """The rows of a batch that fit into memory by estimate, as long as the longest of the first 256 questions."""
    first = list(islice(asking.questions(lm).encoded, LOOKED_AT))
    longest = max((len(request.ids) for one in first for request in one.requests), default=1)
    ways = (way for one in first for way in (one.question.generated if isinstance(one.question, Requests) else (one.question,)))
    answers = (way.max_tokens if isinstance(way, Generate) else 0 for way in ways)
    scored = max((request.asked for one in first for request in one.requests), default=1)
    return rows_that_fit(lm, longest + max(answers, default=0), max(1, scored))


def answers_file(context: VerbContext, lm: Model, task: Task) -> Path | None:
    """The file that holds what this model read for the task, in whatever test, batches and number of questions.

    Each rank writes one of its own, and reads those of all. What a model reads that spans the ranks is not kept: all would have
    to know what is there."""
    version = importlib.metadata.version("pytest-lmeval")
    name = key_of(task=task.name, lm=[fingerprint(lm), str(lm.dtype), lm.device.type], version=version)
    ranks = context.session.ranks
    if ranks is not None and lm.spans_ranks:
        return None
    return context.path(f"{ANSWERS}/{name}{'' if ranks is None else f'-rank{ranks.rank}'}.jsonl")


def merged(task: Task, results: Sequence[TaskResult]) -> TaskResult:
    """One result of those of all shares of the questions."""
    answered = sorted((example for result in results for example in result.examples), key=lambda example: example.place)
    values = {number: value for result in results for number, value in result.values.items()}
    others = [] if task.combine is None else combined_metrics(task.combine, dict(sorted(values.items())))
    record = merged_record_of([result.record for result in results], answered, others)
    return TaskResult(record, tuple(answered), sum(result.resumed for result in results), values)


@dataclass(frozen=True, repr=False)
class TaskResult(Result):
    """The answers to a task, `resumed` of them from an earlier run. Every metric is an attribute with an interval."""

    examples: tuple[Example, ...] = ()
    resumed: int = 0
    values: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # of a task that another harness scores, by row

    def __getattr__(self, name: str) -> Value:
        if name.startswith("_") or "record" not in vars(self):  # of a copy that is being made
            raise AttributeError(name)
        metrics = self.record.metrics
        if self.record.not_measured is not None:
            raise NotMeasuredError(f"{self.record.subject}: {name} was not measured: {self.record.not_measured}.")
        if name not in metrics and (why := withheld_of(self.record).get(name)):
            raise WithheldError(f"{self.record.subject}: {name} was not measured. {why}")
        if name not in metrics:
            known = ", ".join(metrics)
            raise AttributeError(f"{self.record.subject} has no metric {name!r}.{nearest(name, metrics)} It has {known}.")
        return metrics[name]

    def __getitem__(self, name: str) -> Value:
        """The metric of a name that is no attribute: result["pass@5"]."""
        value: Value = getattr(self, name)
        return value


def measure_task(
    lm: Model,
    task: Task,
    *,
    policy: Policy | None = None,
    shots: int = 0,
    limit: int | None = None,
    fewshot: Fewshot = "document",
    truncate: Truncate = "left",
    seed: int = 0,
    chat: ChatMode = False,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    examples: str | Path | None = None,
    kept: str | Path | None = None,
    progress: Progress | None = None,
    share: Share = WHOLE,
) -> TaskResult:
    """Ask a model a task.

    policy    how the engine reads (see `engine.policy_for`); by default all that the model declares
    shots     few-shot examples before each question, drawn as `fewshot` says ("lm_eval": as that harness does)
    limit     ask the first `limit` questions only
    truncate  what does not fit the model's context: "left" drops few-shot examples, from the first on and each as a whole, then
              tokens on the left of the question, never the description, and counts both; "refuse" is an error
    chat      ask in turns, or "auto" (see `scoring._chat.decide`), with this `system` prompt, and with these
              `chat_template_kwargs` beside those of the task
    examples  write each answer to this file of JSON lines
    share     of the questions, by the hash of their rows, that is asked
    kept      keep in this file what is read, as each batch ends, and read nothing again that it holds (see `AnswerStore`)

    Scores and verdicts are computed anew from what was read; if the judge now says something else of an answer, it is generated
    again. One answer that an earlier call read is read again: if the model now answers otherwise, all are.

    Raises TaskError, CorpusError, NotFiniteError, with the row that cannot be asked, read, scored; earlier answers are kept.
    Raises Refused if the audit (`TaskAudit`) finds that an answer depends on the others; then none is kept.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit is {limit}: a task asks at least one question.")
    kwargs = {**task.chat_template_kwargs, **(chat_template_kwargs or {})}
    lm = with_template_kwargs(with_special_tokens(lm) if task.special_tokens else lm, kwargs)
    policy = Engine(lm, policy).policy
    certificate = policy.certificate
    proven = certificate is not None and certificate.verdict != CONSISTENT
    exchangeable = proven and not policy.invariant  # whose last bits are promised
    store = AnswerStore(kept, _plan(policy), alone=policy.invariant, exchangeable=exchangeable)

    asking = Asking(task, shots, limit, fewshot, truncate, seed, data_dir, chat, system, kwargs, share)
    in_turns = asking.in_turns(lm)
    asking = replace(asking, chat=in_turns.on)  # decided once: "auto" may have to read a row
    if in_turns.on:
        lm = with_end_of_turn(lm)

    def measured() -> TaskResult:
        began, reading = time.perf_counter(), TaskReading(Engine(lm, policy), asking, store, progress)
        try:
            reading.to_the_end()
        except Refused as refused:
            earlier = store.has_earlier
            store.forget()  # any answer may be wrong
            if not earlier:
                raise
            warn(
                f"the answers of {lm.spec} to {task} in {store.path} are not what it answers now "
                f"({str(refused).splitlines()[0]}). Something has changed that its fingerprint does not see; all are read "
                "again."
            )
            return measured()
        return _result_of(reading, began, in_turns)

    result = measured()
    if examples is not None:
        write_examples(result.examples, examples)
        result = replace(result, record=structs.replace(result.record, examples=str(examples)))
    return result


def _plan(policy: Policy) -> str:
    """A name for how questions are read, on which the last bits of an answer depend."""
    costs = policy.costs and [policy.costs.call, policy.costs.reach]
    how = [policy.share, policy.pack, policy.decode, policy.multiple, policy.single, policy.longest, costs]
    return key_of(plan=[policy.invariant, policy.batch_size, *how])[:12]


def _result_of(reading: TaskReading, began: float, in_turns: Decision) -> TaskResult:
    """The recorded answers of a task that was read to its end."""
    asking, task, answered = reading.asking, reading.asking.task, reading.answered
    settings = {
        "shots": asking.shots or task.shown,
        "fewshot": task.fewshot_strategy if task.fewshot_strategy == "first" else asking.fewshot,
        "limit": asking.limit,
        "seed": asking.seed,
        "truncate": asking.truncate,
        "chat": "on" if in_turns.on else "off",
        **({"system": asking.system} if asking.system else {}),
        **({"chat_template_kwargs": asking.chat_template_kwargs} if in_turns.on and asking.chat_template_kwargs else {}),
        **({"generation": sorted(reading.generation)} if reading.generation else {}),
        **({} if task.score is None else {"score": scorer_name(task.score)}),
        **({} if task.repeats == 1 else {"repeats": task.repeats}),
        **({"thinking": sorted(reading.thinking)} if reading.thinking else {}),
    }
    try:
        nothing = not (answered or asking.share.is_whole)
        values = {} if nothing else compute(reading.metrics, answered, seed=asking.seed, threshold=task.threshold)
    except TaskError as error:
        raise TaskError(f"{task}: {error}") from error
    not_questions = len(reading.questions.not_questions)
    counts: dict[str, Any] = {
        "not_questions": not_questions, "audit_seconds": reading.audit.seconds, "most_cut_off": task.most_cut_off
    }  # fmt: skip
    if reading.with_special:
        counts["special_tokens"] = reading.with_special
    if means := {name: one for name, one in reading.by_row.items() if one.score is not None}:
        within = {name: all(0 <= (one.scores.get(name) or 0.0) <= 1 for one in answered) for name in means}
        counts["scored"] = {name: one.judges and within[name] for name, one in means.items()}
    values, kept_back = withheld(task.most_cut_off, reading.metrics, values)
    if kept_back:
        counts["withheld"] = kept_back
    spread = Spread(values)
    for example in answered:
        spread.add(example)
    if varying := spread.values():
        counts["between_runs"] = varying
    if reading.from_other_batches:
        counts["from_other_batches"] = reading.from_other_batches
    if reading.verdict is not None:  # asking ended because of the answers: only the interval of the rate allows for that
        why = "Asking ended because of the answers, and only the interval of the rate allows for that. Compare `.rate`."
        others = {name: value for name, value in values.items() if name != "rate"}
        values |= {name: metric(name).value(float(one), n=one.n, ties=one.ties, why=why) for name, one in others.items()}
        total = number_of_questions(task, asking.limit, asking.data_dir, not_questions)
        counts |= {"rate_is": reading.verdict, "not_asked": None if total is None else total - len(answered)}
    audit = reading.audit.result(answered)
    record = record_of(reading.engine, task, answered, values, norm_of(reading.metrics), settings, counts, audit)
    cost, notes = structs.replace(record.cost, seconds=time.perf_counter() - began), [*in_turns.notes, *record.notes]
    record = structs.replace(record, cost=cost, notes=notes, not_measured=EMPTY if nothing else None)
    return TaskResult(record, tuple(answered), reading.resumed, reading.values)


def rows_fingerprint(task: Task, context: VerbContext) -> str:
    """Empty where it is unknown before the rows are read: of a function."""
    if isinstance(task.rows, Rows):
        return task.rows.fingerprint(context.session.mirror)
    if not isinstance(task.rows, list | tuple):
        return ""
    return key_of(rows=[identity_of(task, row, where) for where, row in rows_of(task.rows)])
