"""Ask a model a task, and record its metrics with intervals.

    row -> question -> prompt after its few-shot examples -> token ids    `_encoded`: the task, `Shots`, `Encoder`, row by row
        -> log-likelihoods of the choices, or a generated answer          `_answers`: the engine, block by block; kept as read
        -> example, scored in each metric                                 `_scored`
        -> metrics with intervals -> record                               `measure_task`

No answer depends on the others, or on their order or number.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from msgspec import structs

from pytest_lmeval.data._formats import Row
from pytest_lmeval.data._rows import Rows
from pytest_lmeval.engine import Engine, Policy, Prompt, Request, Scored, policy_for
from pytest_lmeval.engine._losses import token_rounding
from pytest_lmeval.engine._memory import rows_that_fit
from pytest_lmeval.errors import ArgumentError, NotFiniteError, Refused, TaskError, nearest
from pytest_lmeval.measures._context import VerbContext, current, verb
from pytest_lmeval.measures._task_audit import Answered, TaskAudit
from pytest_lmeval.measures._task_record import norm_of, number_of_questions, record_of
from pytest_lmeval.models._identity import fingerprint, tokenizer_fingerprint
from pytest_lmeval.models._model import Model, with_special_tokens
from pytest_lmeval.records._certificate import CONSISTENT
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import ANSWERS, key_of, warn
from pytest_lmeval.records._measured import Result
from pytest_lmeval.records._metric import Metric, judge_of, metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._answers import AnswerStore, write_examples
from pytest_lmeval.scoring._fewshot import Fewshot, Shots, identity_of, question_of, rows_of
from pytest_lmeval.scoring._metrics import compute, metrics_of, scored
from pytest_lmeval.scoring._requests import EncodedQuestion, Encoder, Truncate
from pytest_lmeval.statistics import _sequential as sequential
from pytest_lmeval.tasks import find
from pytest_lmeval.tasks._questions import Choices, Generate, Judge, Question, Task

BATCH = 8  # rows
LOOKED_AT = 256  # questions, to choose a batch size
BATCHES = 16  # in a block after the first: more questions share more, and a first block of one batch shows progress at once
BLOCK_TOKENS = 1 << 16  # of the prompts of a block, at most: progress is shown, and answers are audited, block by block

Asked: TypeAlias = "tuple[int, str, Row, Question]"  # a question, and the row that it is made of, with its number and name

Progress = Callable[[int, float, "int | None"], None]
"""Called after each block with the questions answered, those answered right, and the questions expected (None: unknown)."""


@verb
def task(
    lm: Any,
    task: Task | str,
    shots: int = 0,
    *,
    limit: int | None = None,
    batch_size: int | Literal["auto"] | None = None,
    fewshot: Literal["document", "lm_eval"] = "document",
    truncate: Literal["left", "refuse"] = "left",
    seed: int = 0,
    invariant: bool = False,
) -> TaskResult:
    """Ask a task, or the one of that name: its metrics with intervals, and every answer in a file (see `measure_task`).

    A prefix that questions share is read once, where the laws that the model was probed for allow it. With invariant=True,
    each request is read alone: its log-likelihood does not depend on batch size, order or limit, to the last bit.

    batch_size  rows of a batch; by default those of --lmeval-batch, else 8. "auto": as many as fit into the memory by estimate.
                Wherever memory runs out, half as many are read from there on, and a note says so.
    """
    context = current()
    asked = find(task) if isinstance(task, str) else task
    if not isinstance(asked, Task):
        raise ArgumentError(f"a task is a Task, or the name of one; got {asked!r}.")
    model, certificate = context.certified(lm)
    limit = context.session.limit if limit is None else limit
    settings: dict[str, Any] = {"shots": shots, "limit": limit, "fewshot": fewshot, "truncate": truncate, "seed": seed}
    rows = batch_size or context.session.batch or BATCH
    if rows == "auto":
        rows = _rows_that_fit(model, asked, shots, fewshot, truncate, seed, context.session.mirror)
    policy = policy_for(model, certificate, batch_size=rows, invariant=invariant)
    data = [asked.name, asked.style, asked.special_tokens, _rows_fingerprint(asked, context), tokenizer_fingerprint(model)]
    key = context.key("task", model, {**settings, "batch_size": policy.batch_size, "invariant": invariant}, data)
    written = context.file("examples.jsonl")
    with context.session.progress(f"{model.spec} answers {asked.name}", unit="questions") as progress:
        result = measure_task(
            model,
            asked,
            **settings,
            policy=policy,
            data_dir=context.session.mirror,
            examples=context.path(written),
            kept=context.path(f"{ANSWERS}/{_store_name(model, asked)}.jsonl"),
            progress=progress,
        )
    if result.resumed:
        context.log.notes.append(f"{model.spec} on {asked.name}: {result.resumed:,} answers taken from an earlier run")
    return context.recorded(key, replace(result, record=structs.replace(result.record, examples=written)))


def _rows_that_fit(
    lm: Model, task: Task, shots: int, fewshot: Fewshot, truncate: Truncate, seed: int, data_dir: str | Path | None
) -> int:
    """The rows of a batch that fit into memory by estimate, as long as the longest of the first 256 questions."""
    metrics, asked = _metrics_of(task, _questions(task, data_dir, []))
    encoder, drawn = Encoder(lm, task, truncate, seed), Shots(task, shots, fewshot, data_dir=data_dir, seed=seed)
    first = list(islice(_encoded(task, asked, metrics, encoder, drawn), LOOKED_AT))
    longest = max((len(request.ids) for one in first for request in one.requests), default=1)
    answers = (one.question.max_tokens if isinstance(one.question, Generate) else 0 for one in first)
    scored = max((request.asked for one in first for request in one.requests), default=1)
    return rows_that_fit(lm, longest + max(answers, default=0), max(1, scored))


def _store_name(lm: Model, task: Task) -> str:
    """The name of the file that holds what this model read for the task, in whatever test, batches and number of questions."""
    version = importlib.metadata.version("pytest-lmeval")
    return key_of(task=task.name, lm=[fingerprint(lm), str(lm.dtype), str(lm.device)], version=version)


@dataclass(frozen=True, repr=False)
class TaskResult(Result):
    """The answers to a task, `resumed` of them from an earlier run. Every metric is an attribute with an interval."""

    examples: tuple[Example, ...] = ()
    resumed: int = 0

    def __getattr__(self, name: str) -> Value:
        metrics = self.record.metrics if not name.startswith("_") else {}
        if name not in metrics:
            known = ", ".join(metrics)
            raise AttributeError(f"{self.record.subject} has no metric {name!r}.{nearest(name, metrics)} It has {known}.")
        return metrics[name]


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
    data_dir: str | Path | None = None,
    examples: str | Path | None = None,
    kept: str | Path | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Ask a model a task.

    policy    how the engine reads (see `engine.policy_for`); by default all that the model declares
    shots     few-shot examples before each question, drawn as `fewshot` says ("lm_eval": as that harness does)
    limit     ask the first `limit` questions only
    truncate  what does not fit the model's context: "left" drops few-shot examples, from the first on and each as a whole, then
              tokens on the left of the question, never the description, and counts both; "refuse" is an error
    examples  write each answer to this file of JSON lines
    kept      keep in this file what is read, as each batch ends, and read nothing again that it holds (see `AnswerStore`)

    Scores and verdicts are computed anew from what was read; if the judge now says something else of an answer, it is generated
    again. One answer that an earlier call read is read again: if the model now answers otherwise, all are.

    Raises TaskError, CorpusError, NotFiniteError, with the row that cannot be asked, read, scored; earlier answers are kept.
    Raises Refused if the audit (`TaskAudit`) finds that an answer depends on the others; then none is kept.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit is {limit}: a task asks at least one question.")
    lm = with_special_tokens(lm) if task.special_tokens else lm
    policy = Engine(lm, policy).policy
    certificate = policy.certificate
    proven = certificate is not None and certificate.verdict != CONSISTENT
    store = AnswerStore(kept, _plan(policy), alone=policy.invariant, exchangeable=proven)

    def measure() -> TaskResult:
        return _measured(lm, task, Engine(lm, policy), store, shots, limit, fewshot, truncate, seed, data_dir, progress)

    try:
        result = measure()
    except Refused as refused:
        if not store.has_earlier:
            store.forget()
            raise
        warn(
            f"the answers of {lm.spec} to {task} in {store.path} are not what it answers now ({str(refused).splitlines()[0]}). "
            "Something has changed that its fingerprint does not see; all are read again."
        )
        result = _after_forgetting(store, measure)
    if examples is not None:
        write_examples(result.examples, examples)
        result = replace(result, record=structs.replace(result.record, examples=str(examples)))
    return result


def _after_forgetting(store: AnswerStore, measure: Callable[[], TaskResult]) -> TaskResult:
    store.forget()
    try:
        return measure()
    except Refused:
        store.forget()
        raise


def _plan(policy: Policy) -> str:
    """A name for how questions are read, on which the last bits of an answer depend."""
    how = [policy.share, policy.decode, policy.multiple, policy.single, policy.longest]
    return key_of(plan=[policy.invariant, policy.batch_size, *how])[:12]


def _measured(
    lm: Model,
    task: Task,
    engine: Engine,
    store: AnswerStore,
    shots: int,
    limit: int | None,
    fewshot: Fewshot,
    truncate: Truncate,
    seed: int,
    data_dir: str | Path | None,
    progress: Progress | None,
) -> TaskResult:
    """Read what the store does not hold, and record the outcome."""
    began = time.perf_counter()
    not_questions = list[int]()
    asked = _questions(task, data_dir, not_questions)
    metrics, asked = _metrics_of(task, asked)
    judge = judge_of(metrics)
    encoder, drawn = Encoder(lm, task, truncate, seed), Shots(task, shots, fewshot, data_dir=data_dir, seed=seed)
    answered: list[Example] = []
    resumed, confirmed, from_other_batches = 0, False, 0
    verdict, generation = None, set[str]()
    audit = TaskAudit(engine, str(task), store)

    questions = islice(_encoded(task, asked, metrics, encoder, drawn), limit)
    for block in _blocks(questions, engine.asked.batch_size, grow=task.threshold is None):
        store.begin(block)
        other = [one for one in block if store.from_other_batches(one)]
        numbers = {one.number for one in other}
        read = [
            answer
            for some in (other, [one for one in block if one.number not in numbers])
            for answer in _answers(engine, some, metrics, task, seed, store)
        ]
        read.sort(key=lambda answer: answer.example.number)
        if not confirmed and (earlier := [answer for answer in read if answer.earlier]):
            audit.confirm(earlier)
            confirmed = True
        answered += [answer.example for answer in read]
        audit.block(read, answered)
        from_other_batches += len(other)
        resumed += sum(answer.kept for answer in read)
        generation |= {
            f"at most {way.max_tokens} tokens, temperature {way.temperature:g}, until {list(way.stop)!r}"
            for way in (one.question for one in block)
            if isinstance(way, Generate)
        }
        if progress is not None:
            right = sum(example.scores[judge.name] or 0.0 for example in answered) if judge else 0.0
            progress(len(answered), right, number_of_questions(task, limit))
        if task.threshold is not None and (verdict := _certain(task.threshold, answered)):
            break

    audit.end(answered)
    answered = [audit.audited.get(example.number, example) for example in answered]
    if not answered:
        raise TaskError(f"{task} has no question: {len(not_questions)} row(s) were read, and none was one.")
    settings = {
        "shots": shots,
        "fewshot": task.fewshot_strategy if task.fewshot_strategy == "first" else fewshot,
        "limit": limit,
        "seed": seed,
        "truncate": truncate,
        **({"generation": sorted(generation)} if generation else {}),
    }
    values = compute(metrics, answered, seed=seed, threshold=task.threshold)
    counts: dict[str, Any] = {"not_questions": len(not_questions), "audit_seconds": audit.seconds}
    if from_other_batches:
        counts["from_other_batches"] = from_other_batches
    if verdict is not None:  # asking ended because of the answers: only the interval of the rate allows for that
        why = "Asking ended because of the answers, and only the interval of the rate allows for that. Compare `.rate`."
        others = {name: value for name, value in values.items() if name != "rate"}
        values |= {name: metric(name).value(float(one), n=one.n, ties=one.ties, why=why) for name, one in others.items()}
        total = number_of_questions(task, limit, data_dir, len(not_questions))
        counts |= {"rate_is": verdict, "not_asked": None if total is None else total - len(answered)}
    record = record_of(engine, task, answered, values, norm_of(metrics), settings, counts, audit.result(answered))
    cost = structs.replace(record.cost, seconds=time.perf_counter() - began)
    return TaskResult(structs.replace(record, cost=cost), tuple(answered), resumed)


def _questions(task: Task, data_dir: str | Path | None, not_questions: list[int]) -> Iterator[Asked]:
    """The questions of the rows; the indices of rows that are none are appended to `not_questions`."""
    for number, (where, row) in enumerate(rows_of(task.rows, data_dir)):
        question = question_of(task, row, where)
        if question is None:
            not_questions.append(number)
        else:
            yield number, where, row, question


def _metrics_of(task: Task, questions: Iterator[Asked]) -> tuple[list[Metric], Iterator[Asked]]:
    """The metrics, and the questions again: the default metrics are those of the first."""
    names = task.metrics
    if names is None:
        first = list(islice(questions, 1))
        names = next((task.metrics_for(question, where) for _, where, _, question in first), ())
        questions = chain(first, questions)
    return metrics_of(list(dict.fromkeys((*names, "chance"))), task.name), questions


def _encoded(
    task: Task, questions: Iterator[Asked], metrics: list[Metric], encoder: Encoder, shots: Shots
) -> Iterator[EncodedQuestion]:
    """The questions as the model reads them. Raises TaskError for one from which a metric cannot be computed, before it is
    read."""
    for number, where, row, question in questions:
        own = identity_of(task, row, where)
        task.check(question, metrics, where)
        yield encoder.encode(question, task.description, shots.texts(row, own), id=own, number=number)


def _blocks(questions: Iterator[EncodedQuestion], batch_size: int, *, grow: bool) -> Iterator[list[EncodedQuestion]]:
    """Blocks of one batch; if they `grow`, the first is one batch and the others up to 16."""
    block: list[EncodedQuestion] = []
    size, tokens = batch_size, 0
    for question in questions:
        block.append(question)
        tokens += max(len(request.ids) for request in question.requests)
        if len(block) == size or tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
            size = BATCHES * batch_size if grow else size
    if block:
        yield block


def _answers(
    engine: Engine, some: Sequence[EncodedQuestion], metrics: list[Metric], task: Task, seed: int, store: AnswerStore
) -> Iterator[Answered]:
    """The answered and scored questions, in their order, each with what was read for it."""
    found: dict[int, dict[str, Any]] = {}
    judge, kept = task.judge, set[int]()
    readings: dict[int, list[tuple[Request, np.ndarray]]] = {}
    asked: dict[int, Prompt] = {}
    if choices := [(one, one.question) for one in some if isinstance(one.question, Choices)]:
        results = store.scored([one for one, _ in choices])
        numbered = enumerate(one.number for one, _ in choices for _ in one.requests)
        kept |= {one.number for one, _ in choices} - {owner for number, owner in numbered if number not in results.found}
        likelihoods = iter(engine.score([request for one, _ in choices for request in one.requests], results))
        for one, question in choices:
            scores = [next(likelihoods) for _ in one.requests]
            found[one.number] = _chosen(one, question, scores, engine.lm)
            pairs = zip(one.requests, scores, strict=True)
            readings[one.number] = [(request, scored.loglikelihood) for request, scored in pairs]
    if generated := [(one, one.question) for one in some if isinstance(one.question, Generate)]:
        prompts = [
            Prompt(one.requests[0].ids, one.id, way.max_tokens, way.stop, way.temperature, seed) for one, way in generated
        ]
        asked = {one.number: prompt for (one, _), prompt in zip(generated, prompts, strict=True)}
        judged = None if judge is None else _judging(judge, [one.id for one, _ in generated])
        there = store.answers([one for one, _ in generated], prompts, judged)
        kept |= {generated[number][0].number for number in there.found}
        answers = engine.generate(prompts, judged, there)
        for (one, way), answer in zip(generated, answers, strict=True):
            if answer.logprobs:
                prompt = one.requests[0].ids
                request = Request(np.concatenate([prompt, answer.ids]), len(prompt))
                readings[one.number] = [(request, np.array(answer.logprobs))]
            found[one.number] = {
                "targets": tuple(text.strip() for text in way.answers),
                "output": answer.text.strip(),
                "judged": answer.judged,
                "generated": "" if judge is None else answer.text,
                "read": answer.read,
                "saved": len(answer.prompt.ids) + max(0, len(answer.ids) - 1) - answer.read,
            }
    for one in some:
        fields = found[one.number]
        example = Example(
            id=one.id,
            number=one.number,
            prompt=one.prompt,
            key=one.key,
            group=one.question.group,
            target=next(iter(fields["targets"]), None),
            truncated=one.truncated,
            shots_dropped=one.shots_dropped,
            retokenized=one.retokenized,
            **fields,
        )
        scored = _scored(example, metrics, task, engine.lm)
        number = one.number
        yield Answered(scored, readings.get(number, ()), asked.get(number), number in kept, store.is_earlier(one))


def _chosen(asked: EncodedQuestion, question: Choices, scores: Sequence[Scored], lm: Model) -> dict[str, Any]:
    """The fields of an example whose choices have these scores."""
    for choice, score in zip(question.choices, scores, strict=True):
        if not np.isfinite(score.loglikelihood).all():
            raise NotFiniteError(
                f"{lm.spec} gave a log-likelihood of {score.loglikelihood.tolist()} for the choice {choice!r} of row "
                f"{asked.number} ({asked.id}), in {lm.dtype} on {lm.device}, not comparable. Finished answers are kept."
            )
    read = sum(score.read for score in scores)
    return {
        "targets": tuple((question.texts or question.choices)[index].strip() for index in question.answers),
        "choices": question.choices,
        "texts": question.texts,
        "right": question.answers,
        "loglikelihoods": tuple(float(score.loglikelihood.sum()) for score in scores),
        "tokens": tuple(len(score.loglikelihood) for score in scores),
        "greedy": tuple(bool(score.greedy) for score in scores),
        "read": read,
        "saved": sum(len(request.read) for request in asked.requests) - read,
    }


def _judging(judge: Judge, names: Sequence[str]) -> Callable[[int, str], bool | None]:
    """The judge as the engine calls it, for rows of these names; its errors name the row."""

    def judged(number: int, text: str) -> bool | None:
        row = names[number]
        try:
            verdict = judge(text)
        except Exception as error:
            raise TaskError(f"the judge raised {type(error).__name__}: {error}, on row {row}: {text[-200:]!r}.") from error
        if verdict is not None and not isinstance(verdict, bool | np.bool_):
            raise TaskError(f"the judge returned {verdict!r} for row {row}. Return True, False, or None while uncertain.")
        return None if verdict is None else bool(verdict)

    return judged


def _scored(example: Example, metrics: list[Metric], task: Task, lm: Model) -> Example:
    """The example with its scores. The first metric that compares choices says by which norm one is `chosen`; `output` is the
    likeliest without a norm, so that no metric of texts depends on the metrics beside it."""
    if example.choices:
        example = structs.replace(
            example,
            rounding=token_rounding(lm.dtype),
            tie_rule=task.tie_rule,
            chosen=example.predicted(norm_of(metrics)),
            output=(example.texts or example.choices)[example.predicted()].strip(),
        )
    return structs.replace(example, scores=scored(example, metrics))


def _certain(threshold: float, examples: Sequence[Example]) -> str | None:
    """Whether the rate of answers judged True is "above" or "below" the threshold; None while neither is certain."""
    if groups := [example.group for example in examples if example.group is not None]:
        why = "depend on one another, and a threshold is for independent ones"
        raise TaskError(f"answers of one group ({groups[0]}) {why}. Leave out `group` or `threshold`.")
    return sequential.verdict(sum(example.judged is True for example in examples), len(examples), threshold)


def _rows_fingerprint(task: Task, context: VerbContext) -> str:
    """Empty where it is unknown before the rows are read: of a function."""
    if isinstance(task.rows, Rows):
        return task.rows.fingerprint(context.session.mirror)
    if not isinstance(task.rows, list | tuple):
        return ""
    return key_of(rows=[identity_of(task, row, where) for where, row in rows_of(task.rows)])
