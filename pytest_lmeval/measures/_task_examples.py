"""Make an example of a question and what was read for it: likelihoods of its choices, a generated answer, or what another
harness asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import structs

from pytest_lmeval.engine import Answer, Scored
from pytest_lmeval.engine._losses import token_rounding
from pytest_lmeval.errors import NotFiniteError, TaskError, described
from pytest_lmeval.measures._task_record import norm_of
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._example import Example, Outcome
from pytest_lmeval.records._metric import Metric
from pytest_lmeval.scoring._encoded import EncodedQuestion
from pytest_lmeval.scoring._metrics import scored
from pytest_lmeval.tasks._questions import Choices, Generate, Requests
from pytest_lmeval.tasks._task import Judge, Task


def example_of(
    one: EncodedQuestion, scores: Sequence[Scored], answers: Sequence[Answer], metrics: list[Metric], task: Task, lm: Model
) -> tuple[Example, Mapping[str, Any]]:
    """The example, scored in the metrics; and its numbers where another harness scores it, of which not all are floats.

    Raises NotFiniteError for a likelihood that cannot be compared, and TaskError for a metric that fails, with the row.
    """
    values: Mapping[str, Any] = {}
    if isinstance(one.question, Choices):
        fields = _chosen(one, one.question, scores, lm)
    elif isinstance(one.question, Generate):
        fields = _written(one.question, answers[0], task.judge, lm)
    else:
        fields, values = _of_requests(one, one.question, scores, answers, task, lm)
    example = Example(
        id=one.id,
        number=one.number,
        repeat=one.repeat,
        prompt=one.prompt,
        key=one.key,
        group=one.question.group,
        target=next(iter(fields["targets"]), None),
        truncated=one.truncated,
        shots_dropped=one.shots_dropped,
        retokenized=one.retokenized,
        **fields,
    )
    return _scored(example, metrics, task, lm), values


def _chosen(asked: EncodedQuestion, question: Choices, scores: Sequence[Scored], lm: Model) -> dict[str, Any]:
    """The fields of an example whose choices have these scores."""
    _refuse_not_finite(asked, question.choices, scores, lm)
    read = sum(score.read for score in scores)
    return {
        "targets": tuple((question.texts or question.choices)[index].strip() for index in question.answers),
        "choices": question.choices,
        "texts": question.texts,
        "right": question.answers,
        "question": question.question,
        "loglikelihoods": tuple(float(score.loglikelihood.sum()) for score in scores),
        "tokens": tuple(len(score.loglikelihood) for score in scores),
        "greedy": tuple(bool(score.greedy) for score in scores),
        "read": read,
        "saved": sum(len(request.read) for request in asked.requests) - read,
    }


def _written(question: Generate, answer: Answer, judge: Judge | None, lm: Model) -> dict[str, Any]:
    """The fields of an example whose answer was generated."""
    return {
        "targets": tuple(text.strip() for text in question.answers),
        "output": answer.text.strip(),
        "outcome": outcome_of(answer, question, lm, judged=judge is not None),
        "thought": answer.thought,
        "judged": answer.judged,
        "generated": "" if judge is None else answer.text,
        "read": answer.read,
        "saved": _saved(answer),
    }


def _saved(answer: Answer) -> int:
    return len(answer.prompt.ids) + max(0, len(answer.ids) - 1) - answer.read


def _of_requests(
    one: EncodedQuestion, question: Requests, scores: Sequence[Scored], answers: Sequence[Answer], task: Task, lm: Model
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of an example that another harness scores, and its numbers, of which not all are floats."""
    texts = tuple(text for _, text in question.scored)
    _refuse_not_finite(one, [*texts, *question.rolling], scores, lm)
    sums, greedy = [float(score.loglikelihood.sum()) for score in scores], [bool(score.greedy) for score in scores]
    choices, ends = len(question.scored), np.cumsum((0, *one.sizes)).tolist()
    results: dict[str, Sequence[Any]] = {
        "scored": list(zip(sums, greedy, strict=True))[:choices],
        "rolling": [sum(sums[begin:end]) for begin, end in zip(ends[choices:], ends[choices + 1 :], strict=False)],
        "generated": [answer.text for answer in answers],
    }
    try:
        values = question.score(results)
    except Exception as error:
        raise TaskError(
            f"{task}, row {one.number} ({one.id}) was answered, and its filters or its scores failed with {described(error)}. "
            f"What was read: {str(results)[:300]}. It is kept: repair them, and ask again."
        ) from error
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float | np.number | np.bool_)}
    return {
        "targets": () if question.target is None else (question.target,),
        "choices": texts,
        "right": tuple(index for index, text in enumerate(texts) if text.strip() == question.target),
        "loglikelihoods": tuple(sums[:choices]),
        "tokens": tuple(len(score.loglikelihood) for score in scores[:choices]),
        "greedy": tuple(greedy[:choices]),
        "output": answers[0].text.strip() if answers else "",
        "outcome": outcome_of(answers[0], question.generated[0], lm, judged=False) if answers else "",
        "scores": {name: number for name, number in numbers.items() if math.isfinite(number)},
        "read": sum(score.read for score in scores) + sum(answer.read for answer in answers),
        "saved": sum(len(request.read) - score.read for request, score in zip(one.scored, scores, strict=True))
        + sum(map(_saved, answers)),
    }, values


def _refuse_not_finite(asked: EncodedQuestion, texts: Sequence[str], scores: Sequence[Scored], lm: Model) -> None:
    for text, score in zip(texts, scores, strict=False):
        if not np.isfinite(score.loglikelihood).all():
            raise NotFiniteError(
                f"{lm.spec} gave a log-likelihood of {score.loglikelihood.tolist()[:20]} for the choice {text[:200]!r} of row "
                f"{asked.number} ({asked.id}), in {lm.dtype} on {lm.device}, not comparable. Finished answers are kept."
            )


def outcome_of(answer: Answer, question: Generate, lm: Model, *, judged: bool) -> Outcome:
    """What became of a generated answer (see `Example.outcome`).

    One that reached its largest length is cut off if it could have ended before: it has a stop text, or the model a token that
    ends answers, and more than one token to reach it. Nor is one that a judge reads: what that is never certain of, counts.
    """
    ends = getattr(lm.tokenizer, "ends", (getattr(lm.tokenizer, "eos", None),))
    could_end = question.max_tokens > 1 and not judged and bool(question.stop or any(end is not None for end in ends))
    if answer.why == "thinking" or (answer.why == "length" and could_end):
        return "cut off"
    return "answered" if answer.text.strip() else "empty"


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
    return structs.replace(example, scores=example.scores | scored(example, metrics))
