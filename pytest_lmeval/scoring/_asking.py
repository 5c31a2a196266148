"""From rows to answers: questions are made as they are needed, asked in blocks, and each answer is kept.

The first block is one batch, so that the first answers are there at once; later ones are larger, since more of them share more.
No answer depends on the block that its question stood in, nor on the order or the number of questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from pytest_lmeval.errors import NotFiniteError, TaskError
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import Metric, Norm, judge_of
from pytest_lmeval.scoring._answers import AnswerFile
from pytest_lmeval.scoring._fewshot import Shots, question_of, rows_of
from pytest_lmeval.scoring._generation import generate
from pytest_lmeval.scoring._metrics import scored
from pytest_lmeval.scoring._requests import Asked, Encoder
from pytest_lmeval.scoring._sharing import Scored, Sharing
from pytest_lmeval.statistics import _sequential as sequential
from pytest_lmeval.tasks._questions import Choices, Generate, Task, id_of

LARGEST = 16  # batches in a block after the first
BLOCK = 1 << 16  # tokens of the prompts in a block


@dataclass
class Run:
    """A task on the way, and what is counted of it.

    metrics      that its answers are counted in
    examples     the answers so far, scored, in the order of their questions
    resumed      how many of them an interrupted run had given
    right        how many are right, by the first metric that says so of an answer
    generation   the ways in which answers were generated
    no_question  rows that were none
    verdict      above or below the threshold, as soon as that is certain
    """

    task: Task
    metrics: list[Metric]
    sharing: Sharing
    file: AnswerFile
    seed: int = 0
    examples: list[Example] = field(default_factory=list)
    resumed: int = 0
    right: float = 0.0
    generation: set[str] = field(default_factory=set)
    no_question: int = 0
    verdict: str | None = None

    def blocks(self, questions: Iterator[Asked], known: dict[int, Example]) -> Iterator[None]:
        """Ask the questions, block by block, but for those whose very answer is `known`. Ends early with a verdict."""
        judge = judge_of(self.metrics)
        for block in in_blocks(questions, self.sharing.batch_size, grow=self.task.threshold is None):
            fresh = [asked for asked in block if (old := known.get(asked.number)) is None or old.key != asked.key]
            found = {example.number: example for example in self._answers(fresh)}
            self.file.append(found[asked.number] for asked in fresh)
            answered = [found.get(asked.number) or self._scored(known[asked.number]) for asked in block]
            self.examples += answered
            self.resumed += len(block) - len(fresh)
            self.right += sum((judge is not None and example.scores[judge.name]) or 0.0 for example in answered)
            yield
            if self.task.threshold is not None and (verdict := _certain(self.task.threshold, self.examples)):
                self.verdict = verdict
                return

    @property
    def norm(self) -> Norm:
        """What choices are compared by: as the first metric that compares them does."""
        return next((metric.norm for metric in self.metrics if metric.norm is not None), "sum")

    def _scored(self, example: Example) -> Example:
        """The example with what it counts in each metric, and for choices the one that was chosen.

        Its output, which metrics of texts compare, depends on no metric; what was chosen does.
        """
        if example.choices:
            output = (example.texts or example.choices)[example.predicted()].strip()
            example = replace(example, chosen=example.predicted(self.norm), output=output)
        return replace(example, scores=scored(example, self.metrics))

    def _answers(self, block: Sequence[Asked]) -> Iterator[Example]:
        chosen = [asked for asked in block if isinstance(asked.question, Choices)]
        likelihoods = iter(self.sharing.score([request for asked in chosen for request in asked.requests]) if chosen else [])
        for asked in chosen:
            yield self._scored(_chosen(asked, [next(likelihoods) for _ in asked.requests], self.sharing.lm))
        if spoken := [asked for asked in block if isinstance(asked.question, Generate)]:
            yield from map(self._scored, self._spoken(spoken))

    def _spoken(self, block: Sequence[Asked]) -> Iterator[Example]:
        prompts, questions = zip(*((asked.requests[0], asked.question) for asked in block), strict=True)
        names = [asked.id for asked in block]
        answers = generate(self.sharing, prompts, questions, names, judge=self.task.judge, seed=self.seed)
        for asked, answer in zip(block, answers, strict=True):
            way = answer.question
            self.generation.add(f"at most {way.max_tokens} tokens, temperature {way.temperature:g}, until {list(way.stop)!r}")
            yield _example(
                asked,
                tuple(text.strip() for text in way.answers),
                output=answer.text.strip(),
                judged=answer.judged,
                read=answer.read,
                saved=len(asked.requests[0].ids) + max(0, len(answer.ids) - 1) - answer.read,
            )


def asked_of(run: Run, encoder: Encoder, shots: Shots, limit: int | None, data_dir: str | Path | None) -> Iterator[Asked]:
    """The questions as the model reads them, each made when it is needed."""
    asked = 0
    for number, row in enumerate(rows_of(run.task.rows, data_dir)):
        question = question_of(run.task, row, f"row {number}")
        if question is None:
            run.no_question += 1
            continue
        own = id_of(row)
        yield encoder.encode(question, shots.of(row, own), id=own, number=number)
        asked += 1
        if asked == limit:
            return


def in_blocks(questions: Iterator[Asked], batch_size: int, *, grow: bool) -> Iterator[list[Asked]]:
    """One batch first, so that there are answers at once; then many, so that there are some of each length - but no more than
    one would care to lose where a run is killed, since a block is kept when it is answered."""
    block: list[Asked] = []
    size, tokens = batch_size, 0
    for asked in questions:
        block.append(asked)
        tokens += max(len(request.ids) for request in asked.requests)
        if len(block) == size or tokens >= BLOCK:
            yield block
            block, tokens = [], 0
            size = LARGEST * batch_size if grow else size
    if block:
        yield block


def _chosen(asked: Asked, found: Sequence[Scored], lm: Model) -> Example:
    question = asked.question
    assert isinstance(question, Choices)
    for choice, score in zip(question.choices, found, strict=True):
        if not np.isfinite(score.loglikelihood).all():
            raise NotFiniteError(
                f"{lm.spec} gave a log-likelihood of {score.loglikelihood.tolist()} for the choice {choice!r} of row "
                f"{asked.number} ({asked.id}), in {lm.dtype} on {lm.device}. Such a number cannot be compared, so the run "
                "stops here; what was finished before is kept."
            )
    read = sum(score.read for score in found)
    return _example(
        asked,
        tuple((question.texts or question.choices)[index].strip() for index in question.answers),
        choices=question.choices,
        texts=question.texts,
        right=question.answers,
        loglikelihoods=tuple(float(score.loglikelihood.sum()) for score in found),
        tokens=tuple(len(score.loglikelihood) for score in found),
        greedy=tuple(bool(score.greedy) for score in found),
        read=read,
        saved=asked.alone - read,
    )


def _example(asked: Asked, targets: tuple[str, ...], **answer: Any) -> Example:
    return Example(
        id=asked.id,
        number=asked.number,
        prompt=asked.prompt,
        key=asked.key,
        group=asked.question.group,
        targets=targets,
        target=targets[0] if targets else None,
        truncated=asked.truncated,
        retokenized=asked.retokenized,
        **answer,
    )


def _certain(threshold: float, examples: Sequence[Example]) -> str | None:
    """Whether the rate of answers that were judged True is above or below the threshold, if that is certain by now."""
    if groups := [example.group for example in examples if example.group is not None]:
        raise TaskError(
            f"answers of one group ({groups[0]}) depend on one another, and when a rate is certain is only known of "
            "independent ones. Leave `group` out, or `threshold`."
        )
    judged = sum(example.judged is True for example in examples)
    return sequential.verdict(judged, len(examples), threshold)
