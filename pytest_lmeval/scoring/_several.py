"""Score questions that are answered several times: pass@K, pass^K, the majority of K answers, and how much chance changes."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from msgspec import structs

from pytest_lmeval.errors import TaskError
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import Answered, Metric, judge_of, metric as declared
from pytest_lmeval.statistics._drawn import between_runs
from pytest_lmeval.tasks._task import Task


def pass_at(answers: Sequence[Answered], k: int) -> float:
    """The probability that one of k of the n answers, c of them right, is right: 1 - C(n-c, k) / C(n, k), without bias.

    Chen et al. 2021, arXiv:2107.03374. Raises ValueError for a score between right and wrong.

    >>> pass_at([(1, "a"), (0, "b"), (0, "c"), (0, "d")], 2)
    0.5
    """
    n, right = len(answers), _right(answers)
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def pass_all(answers: Sequence[Answered], k: int) -> float:
    """The probability that all of k of the n answers, c of them right, are right: C(c, k) / C(n, k), without bias.

    Yao et al. 2024, arXiv:2406.12045. Raises as `pass_at`.

    >>> pass_all([(1, "a"), (1, "a"), (0, "b")], 2)
    0.3333333333333333
    """
    return math.comb(_right(answers), k) / math.comb(len(answers), k)


def majority(answers: Sequence[Answered], k: int) -> float:
    """The score of what most of k answers say, the mean over as many k in a row as there are; of equally many, their mean.

    An answer that says None has no vote. Wang et al. 2022, arXiv:2203.11171.

    >>> majority([(1, "a"), (0, "b"), (1, "a"), (0, "b")], 3), majority([(1, "a"), (0, "b")], 2)
    (1.0, 0.5)
    """
    votes = [_vote(answers[start : start + k]) for start in range(0, len(answers) - k + 1, k)]
    return math.fsum(votes) / len(votes)


def _right(answers: Sequence[Answered]) -> int:
    if partly := [score for score, _ in answers if score not in (0, 1)]:
        raise ValueError(f"an answer scores {partly[0]:g}, and answers are counted that are right (1) or wrong (0)")
    return round(math.fsum(score for score, _ in answers))


def _vote(answers: Sequence[Answered]) -> float:
    counts = Counter(said for _, said in answers if said is not None)
    most = max(counts.values(), default=0)
    scores = [score for score, said in answers if said is not None and counts[said] == most]
    return math.fsum(scores) / len(scores) if scores else 0.0


class Spread:
    """How much the means of metrics vary from run to run, where each draws as many answers to the same questions: from answers
    that are added one by one. Only of metrics that score each answer of a question, and not all of them at once."""

    def __init__(self, names: Iterable[str]) -> None:
        known = (declared(name) for name in names)
        self._metrics = [one for one in known if one.several is None and one.statistic is None]
        self._numbers = array("q")  # of the question of each answer
        self._scores = {one.name: array("d") for one in self._metrics}  # of each answer; nan where the metric is not about it
        self._several = False

    def add(self, example: Example) -> None:
        self._several |= example.repeat > 0
        self._numbers.append(example.number)
        for name, scores in self._scores.items():
            score = example.scores.get(name)
            scores.append(math.nan if score is None else score)

    def values(self) -> dict[str, float]:
        """Metric -> the standard deviation of its mean; nothing if each question has one answer."""
        if not self._several:
            return {}
        spreads = ((one, between_runs(self._answers(one.name))) for one in self._metrics)
        return {one.name: one.scale * spread for one, spread in spreads if spread is not None}

    def _answers(self, name: str) -> list[list[float]]:
        by_question = defaultdict[int, list[float]](list)
        for number, score in zip(self._numbers, self._scores[name], strict=True):
            if not math.isnan(score):
                by_question[number].append(score)
        return [*by_question.values()]


def with_several(examples: Sequence[Example], metrics: Sequence[Metric], task: Task) -> list[Example]:
    """The examples with the scores of metrics of several answers: the first of each question has them, the others None.

    What an answer says is what the scorer of the task extracted, or its output if it extracts nothing from any. An answer at
    temperature 0 stands for all `repeats` of it. Raises TaskError where nothing says which answers are right.
    """
    several = [metric for metric in metrics if metric.several is not None]
    if not several:
        return list(examples)
    if (judge := judge_of(metrics)) is None:
        raise TaskError(
            f"{task}: {several[0]} is of right answers, and no metric says which are. Give a `score`, or exact_match."
        )
    extracts = any(judge.name in example.extracted for example in examples)
    answers: defaultdict[int, list[Answered]] = defaultdict(list)
    for example in examples:
        said = example.extracted.get(judge.name) if extracts else example.output
        answers[example.number].append((example.scores[judge.name] or 0.0, said))
    found = []
    for example in examples:
        own = answers[example.number]
        own = own * task.repeats if len(own) == 1 else own
        scores: dict[str, float | None] = dict.fromkeys(metric.name for metric in several)
        if not example.repeat:
            scores = {metric.name: _score(metric, own, task, example) for metric in several}
        found.append(structs.replace(example, scores=example.scores | scores))
    return found


def _score(metric: Metric, answers: Sequence[Answered], task: Task, example: Example) -> float:
    assert metric.several is not None
    try:
        return float(metric.several(answers, int(metric.name.replace("^", "@").partition("@")[2])))
    except ValueError as error:
        raise TaskError(f"{task}, row {example.number} ({example.id}): {metric}: {error}.") from error
