"""How each metric of a task is computed: from a list of examples to a number with its interval (see `scoring.metrics`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from pytest_lmeval.errors import TaskError
from pytest_lmeval.records.value import Metric
from pytest_lmeval.scoring.examples import Example, Norm
from pytest_lmeval.statistics.bootstrap import FEWEST_UNITS, ratio_intervals
from pytest_lmeval.statistics.proportion import wilson

NO_ANSWER = ("unanswerable", "")  # what says that the text does not tell
REPLICATES = 500

READS: dict[str, Callable[[Example], bool]] = {
    "an answer": lambda example: True,
    "choices": lambda example: bool(example.choices),
    "one right choice": lambda example: len(example.right) == 1,
    "two choices, one of them right": lambda example: len(example.choices) == 2 and len(example.right) == 1,
    "targets to compare with": lambda example: bool(example.targets),
    "an output to be judged": lambda example: example.output is not None,
}


@dataclass(frozen=True)
class Measure:
    """compute  (examples, seed) -> the metric; None where none of them is of the kind that it is about
    reads    what each example must have
    library  the package that must be there
    score    where it is a mean: what each example counts; None for one that the mean is not about
    scale    what is made of that mean
    """

    compute: Callable[[Sequence[Example], int], Metric | None]
    reads: str = "an answer"
    library: str | None = None
    score: Callable[[Example], float | None] | None = None
    scale: Callable[[float], float] = float


def answerable(example: Example) -> bool:
    """Whether the text tells the answer (SQuAD 2.0): there are targets, and none of them is empty."""
    return bool(example.targets) and "" not in example.targets


def exact_match(example: Example) -> float:
    """1 if the answer is one of the targets, but for case, punctuation and articles (Rajpurkar et al. 2016)."""
    return _squad(example.answer, example.targets if answerable(example) else NO_ANSWER)[0]


def squad_f1(example: Example) -> float:
    """F1 over words, the best over the targets. To say that there is no answer is right or wrong, and nothing between."""
    return _squad(example.answer, example.targets)[1] if answerable(example) else exact_match(example)


@lru_cache(maxsize=2**15)  # several metrics ask for the same
def _squad(answer: str, targets: tuple[str, ...]) -> tuple[float, float]:
    from torchmetrics.functional.text.squad import squad

    found = squad({"id": "", "prediction_text": answer}, {"id": "", "answers": {"text": list(targets)}})
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100


@lru_cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind])


def _average(
    score: Callable[[Example], float],
    reads: str = "an answer",
    library: str | None = None,
    *,
    share: bool = False,
    among: Callable[[Example], bool] = lambda example: True,
    scale: Callable[[float], float] = float,
    higher_is_better: bool | None = True,
) -> Measure:
    """`scale` of the mean of a score; a `share` where it is yes or no, with the interval of one."""

    def compute(examples: Sequence[Example], seed: int) -> Metric | None:
        examples = list(filter(among, examples))
        if not examples:
            return None
        scores = [float(score(example)) for example in examples]
        units = _units(examples)
        sums = np.column_stack([np.bincount(units, weights=scores), np.bincount(units)])
        interval = wilson(scores, units.tolist()) if share else ratio_intervals(sums, [(0, 1)], seed=seed)[0]
        mean = math.fsum(scores) / len(scores)
        try:
            return measured(scale(mean), interval and (scale(interval[0]), scale(interval[1])), len(scores), higher_is_better)
        except OverflowError as error:
            raise TaskError(f"a mean loss of {mean:.6g} nats is a perplexity that no float holds.") from error

    def counted(example: Example) -> float | None:
        return float(score(example)) if among(example) else None

    return Measure(compute, reads, library, counted, scale)


def _of_cells(statistic: Callable[[np.ndarray, np.ndarray, np.ndarray], float], reads: str = "one right choice") -> Measure:
    """Of how often each label was predicted as each: a statistic of labels, predictions and weights [cells]; NaN: undefined."""

    def compute(examples: Sequence[Example], seed: int) -> Metric:
        k = max(len(example.choices) for example in examples)
        cells = np.array([example.right[0] * k + example.predicted() for example in examples])
        units = _units(examples)
        counts = np.bincount(units * k * k + cells, minlength=(units.max() + 1) * k * k).reshape(-1, k * k)

        def of(weights: np.ndarray) -> float:
            seen = np.flatnonzero(weights)
            return statistic(seen // k, seen % k, weights[seen])

        return measured(*_drawn_again(counts, of, seed), len(examples))

    return Measure(compute, reads, "sklearn")


def _f1(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray, average: str = "binary") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, sample_weight=weights, average=average, zero_division=np.nan))


def _matthews(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if min(len(set(labels)), len(set(predictions))) < 2:
        return math.nan
    return float(matthews_corrcoef(labels, predictions, sample_weight=weights))


def _bleu(examples: Sequence[Example], seed: int) -> Metric:
    """From the counts that sacrebleu finds in each answer: they add up to those of the corpus, or of a draw from it."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU()
    found = [bleu.corpus_score([example.answer], [[target] for target in example.targets]) for example in examples]
    units = _units(examples)
    sums = np.zeros((units.max() + 1, 2 + 2 * bleu.max_ngram_order), dtype=int)
    np.add.at(sums, units, [[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in found])

    def of(counts: np.ndarray) -> float:
        answer, target, *grams = counts.tolist()
        matched, all_grams = grams[: bleu.max_ngram_order], grams[bleu.max_ngram_order :]
        return float(bleu.compute_bleu(matched, all_grams, answer, target, smooth_method=bleu.smooth_method).score)

    return measured(*_drawn_again(sums, of, seed), len(examples), unit="BLEU")


def _drawn_again(
    sums: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int
) -> tuple[float, tuple[float, float] | None]:
    """A statistic of the total of `sums` [units, columns], and its percentile interval; undefined is 0, without one."""
    value = statistic(sums.sum(axis=0))
    if math.isnan(value) or len(sums) < FEWEST_UNITS:
        return (0.0 if math.isnan(value) else value), None
    kinds, counts = np.unique(sums, axis=0, return_counts=True)  # equal units are drawn together: there are few kinds of them
    generator = np.random.default_rng(seed)
    draws = (generator.multinomial(len(sums), counts / len(sums)) @ kinds for _ in range(REPLICATES))
    values = [statistic(drawn) for drawn in draws]
    if any(map(math.isnan, values)):
        return value, None
    low, high = np.quantile(values, [0.025, 0.975])
    return value, (float(low), float(high))


def _units(examples: Sequence[Example]) -> np.ndarray:
    """The number of each example's unit [n]: those of one group are one, an example without a group is its own."""
    keys = [(example.group,) if example.group is not None else (example.id, example.number) for example in examples]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def measured(
    value: float, interval: tuple[float, float] | None, n: int, higher_is_better: bool | None = True, unit: str = ""
) -> Metric:
    """The interval is stretched to the value, where rounding, or the percentiles of a biased statistic, leave it out."""
    low, high = (None, None) if interval is None else (min(value, interval[0]), max(value, interval[1]))
    return Metric(value, unit, low=low, high=high, n=n, higher_is_better=higher_is_better)


def _chance(examples: Sequence[Example], seed: int) -> Metric:
    """What guessing would be right in: a property of the questions, without an interval."""
    return Metric(math.fsum(len(example.right) / len(example.choices) for example in examples) / len(examples), n=len(examples))


def _accuracy(norm: Norm) -> Measure:
    return _average(lambda example: example.predicted(norm) in example.right, "choices", share=True)


def _rouge(kind: str) -> Measure:
    def score(example: Example) -> float:
        return float(_rouge_scorer(kind).score_multi(example.targets, example.answer)[kind].fmeasure)

    return _average(score, "targets to compare with", "rouge_score")


_of_squad = partial(_average, library="torchmetrics")

METRICS: dict[str, Measure] = {
    "accuracy": _accuracy("sum"),
    "accuracy_per_character": _accuracy("character"),
    "accuracy_per_byte": _accuracy("byte"),
    "accuracy_per_token": _accuracy("token"),
    "greedy_match": _average(lambda example: example.greedy[example.right[0]], "choices", share=True),
    "perplexity": _average(
        lambda example: -example.loglikelihoods[example.right[0]], "choices", scale=math.exp, higher_is_better=False
    ),
    "exact_match": _of_squad(exact_match, "targets to compare with", share=True),
    "squad_f1": _of_squad(squad_f1, "targets to compare with"),
    "has_answer_exact_match": _of_squad(exact_match, share=True, among=answerable),
    "has_answer_f1": _of_squad(squad_f1, among=answerable),
    "no_answer_accuracy": _of_squad(exact_match, share=True, among=lambda example: not answerable(example)),
    "f1": _of_cells(_f1, "two choices, one of them right"),
    "f1_macro": _of_cells(partial(_f1, average="macro")),
    "matthews": _of_cells(_matthews),
    "bleu": Measure(_bleu, "targets to compare with", "sacrebleu"),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "chance": Measure(_chance, "choices"),
    "rate": _average(lambda example: example.judged is True, "an output to be judged", share=True, higher_is_better=None),
}
"""By name: what a task may ask for.

accuracy             share of questions whose likeliest choice is right; of equal ones the first is taken
accuracy_per_...     of choices compared by their log-likelihood a character, byte or token
greedy_match         share of right choices (the first, of several) that the model would say
perplexity           exp of the mean loss of the right choice (the first, of several), all its tokens together, as LAMBADA's
has_answer_..., no_answer_accuracy   the parts of SQuAD 2.0: an empty answer, or "unanswerable", says that there is none
f1                   of choice 1 against choice 0
matthews             correlation of labels and predictions (Matthews 1975; Gorodkin 2004)
bleu, rouge...       Papineni et al. 2002; Lin 2004, F-measure, the best over the targets
chance               what guessing would be right in
rate                 share of outputs judged True; one whose judge was never certain is not
"""
