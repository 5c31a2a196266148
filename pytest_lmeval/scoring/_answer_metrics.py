"""Declare the metrics of answers: the score of one example, and how examples add up (see `records._metric.Metric`).

A metric that a library defines is computed by that library (extra `tasks`), imported when the metric is asked for:

    scikit-learn   f1, f1_macro, matthews                       torchmetrics   exact_match, squad_f1, and the parts of squadv2
    rouge-score    rouge1, rouge2, rougeL (no stemming)         sacrebleu      bleu (of the corpus, 13a)

All lie between 0 and 1 except matthews (-1 to 1), perplexity (from 1) and bleu (0 to 100). An undefined value is 0, as in
scikit-learn: matthews where labels or predictions are all the same, f1 where none of either is positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import Answered, Estimate, Metric, Needs, Norm
from pytest_lmeval.scoring._several import majority, pass_all, pass_at
from pytest_lmeval.scoring._text_metrics import LOSS
from pytest_lmeval.statistics._estimate import FEWEST_UNITS
from pytest_lmeval.statistics._proportion import wilson
from pytest_lmeval.tasks.scores._texts import squad

NO_ANSWER = ("unanswerable", "")  # outputs that say that the text does not tell the answer
REPLICATES = 500


def answerable(example: Example) -> bool:
    """Whether the text contains the answer (SQuAD 2.0): there are targets, and none of them is empty."""
    return bool(example.targets) and "" not in example.targets


def exact_match(example: Example) -> float:
    """1 if the output is one of the targets, ignoring case, punctuation and articles (Rajpurkar et al. 2016)."""
    return squad(example.output, example.targets if answerable(example) else NO_ANSWER)[0]


def squad_f1(example: Example) -> float:
    """F1 over words, the best over the targets; 0 or 1 where the text does not tell the answer."""
    return squad(example.output, example.targets)[1] if answerable(example) else exact_match(example)


def is_right(example: Example) -> float:
    """1 if the chosen choice is a right one."""
    return float(example.chosen in example.right)


def units_of(examples: Sequence[Example]) -> np.ndarray:
    """Index of the unit of each example [n]: its group, or itself."""
    return indices_of([unit_of(example) for example in examples])


def unit_of(example: Example) -> Hashable:
    """What the unit of an example is known by: its group, or itself."""
    return (example.group,) if example.group is not None else (example.id, example.number)


def indices_of(keys: Sequence[Hashable]) -> np.ndarray:
    """The index of each key [n], in the order in which keys appear first."""
    index = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([index[key] for key in keys])


def _f1(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray, average: str = "binary") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, sample_weight=weights, average=average, zero_division=np.nan))


def _matthews(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if min(len(set(labels)), len(set(predictions))) < 2:
        return math.nan
    return float(matthews_corrcoef(labels, predictions, sample_weight=weights))


def _bleu(examples: Sequence[Example], seed: int) -> Estimate:
    """BLEU of the corpus, from the counts of each answer, which add up. Of a tie the first choice counts: counts are whole."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU()
    found = [bleu.corpus_score([example.output], [[target] for target in example.targets]) for example in examples]
    units = units_of(examples)
    sums = np.zeros((units.max() + 1, 2 + 2 * bleu.max_ngram_order), dtype=int)
    np.add.at(sums, units, [[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in found])

    def of(counts: np.ndarray) -> float:
        length, target_length, *grams = np.rint(counts).astype(int).tolist()
        matched, total = grams[: bleu.max_ngram_order], grams[bleu.max_ngram_order :]
        return float(bleu.compute_bleu(matched, total, length, target_length, smooth_method=bleu.smooth_method).score)

    length = sums.sum(axis=0) / len(found)  # of an answer none of whose words are right
    none = np.concatenate([length[:2], np.zeros(bleu.max_ngram_order), length[-bleu.max_ngram_order :]])
    return _resampled(sums, of, seed, unseen=none[None])


def _sentence_bleu(example: Example) -> float:
    """BLEU of one answer, over the n-gram orders that it is long enough for; that of a corpus is no mean of these."""
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU(effective_order=True).sentence_score(example.output, list(example.targets)).score)


def _resampled(sums: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int, unseen: np.ndarray) -> Estimate:
    """A statistic of the total of `sums` [units, columns], and its percentile interval; 0 without one if undefined (NaN).

    Each draw weights the units anew (the Bayesian bootstrap: Rubin 1981), and with them answers that may not have been seen yet
    [answers, columns], one in all: what is right ten times in ten is not right for sure (Goutte and Gaussier, "A probabilistic
    interpretation of precision, recall and F-score", 2005).
    """
    value = statistic(sums.sum(axis=0))
    if math.isnan(value) or len(sums) < FEWEST_UNITS:
        return (0.0 if math.isnan(value) else value), None
    kinds, counts = np.unique(sums, axis=0, return_counts=True)  # few kinds: equal units are drawn together
    shapes = np.concatenate([counts, np.full(len(unseen), 1 / len(unseen))])
    rows, generator = np.concatenate([kinds, unseen]), np.random.default_rng(seed)
    values = [statistic(drawn) for drawn in generator.dirichlet(shapes, REPLICATES) * shapes.sum() @ rows]
    if any(map(math.isnan, values)):
        return value, None
    low, high = np.quantile(values, [0.025, 0.975])
    return value, (float(low), float(high))


def _mean(name: str, about: str, score: Callable[[Example], float | None], **options: Any) -> Metric:
    return Metric(name, about=about, score=score, **{"interval": "mean", "judges": True, **options})


def _proportion(name: str, about: str, score: Callable[[Example], float | None], **options: Any) -> Metric:
    return _mean(name, about, score, interval="proportion", **options)


def _where(included: Callable[[Example], bool], score: Callable[[Example], float]) -> Callable[[Example], float | None]:
    """The score of included examples, None of others."""
    return lambda example: score(example) if included(example) else None


def _accuracy(name: str, about: str, norm: Norm) -> Metric:
    return _proportion(name, about, is_right, needs="choices", norm=norm)


def _label(name: str, about: str, statistic: Callable[..., float], needs: Needs) -> Metric:
    """A statistic of labels, predictions and weights [cells], the nonzero cells of the confusion matrix; NaN if undefined.

    A tie of k choices adds 1/k to the cell of each, as predictions drawn among them would on average.
    """

    def estimate(examples: Sequence[Example], seed: int) -> Estimate:
        k = max(len(example.choices) for example in examples)
        units = units_of(examples)
        counts = np.zeros((units.max() + 1, k * k))
        for unit, example in zip(units, examples, strict=True):
            predicted = example.counted()
            counts[unit, [example.right[0] * k + index for index in predicted]] += 1 / len(predicted)

        def of(weights: np.ndarray) -> float:
            seen = np.flatnonzero(weights)
            return statistic(seen // k, seen % k, weights[seen])

        return _resampled(counts, of, seed, unseen=np.eye(k * k))

    return _mean(name, about, is_right, needs=needs, interval=None, statistic=estimate, library="sklearn", norm="sum")


def _of_whole_questions(examples: Sequence[Example], seed: int) -> Estimate:
    """The mean over questions of the probability that all of their rows are right, where ties are guessed."""
    found: dict[Any, tuple[float, Any]] = {}
    for example, unit in zip(examples, units_of(examples).tolist(), strict=True):
        key = (example.id, example.number) if example.question is None else example.question
        found[key] = found.get(key, (1.0, unit))[0] * (example.scores["question_exact_match"] or 0.0), unit
    scores, units = map(list, zip(*found.values(), strict=True))
    return math.fsum(scores) / len(scores), wilson(scores, units)


def _several(name: str, about: str, score: Callable[[Sequence[Answered], int], float]) -> Metric:
    return Metric(name, about=about, several=score, interval="proportion")


def _rouge(kind: str) -> Metric:
    def score(example: Example) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        return float(RougeScorer([kind]).score_multi(example.targets, example.output)[kind].fmeasure)

    about = "F-measure, the best over the targets (Lin 2004)"
    return _mean(kind, about, score, needs="targets to compare with", library="rouge_score")


TARGETS: dict[str, Any] = {"needs": "targets to compare with", "library": "torchmetrics"}
IN_TEXT = "where the text contains the answer (SQuAD 2.0)"
METRICS = {
    metric.name: metric
    for metric in (
        _accuracy("accuracy", "fraction of questions whose likeliest choice is right; a tie of k counts 1/k each", "sum"),
        _accuracy("accuracy_per_character", "of choices compared by their log-likelihood a character", "character"),
        _accuracy("accuracy_per_byte", "of choices compared by their log-likelihood a byte", "byte"),
        _accuracy("accuracy_per_token", "of choices compared by their log-likelihood a token", "token"),
        _proportion(
            "greedy_match",
            "fraction of right choices (the first, of several) that the model would generate",
            lambda example: float(example.greedy[example.right[0]]),
            needs="a right choice",
        ),
        _mean(
            "perplexity",
            "exp of the mean loss of a token of a text; of a task, of a right choice with all its tokens, as LAMBADA's",
            lambda example: -example.loglikelihoods[example.right[0]],
            needs="a right choice",
            judges=False,
            higher_is_better=False,
            exponential=True,
            sums=("nats", "tokens"),
            stands_for="bits_per_byte",
            margin=LOSS,
        ),
        _proportion("exact_match", "fraction of outputs that are one of the targets", exact_match, **TARGETS),
        _mean("squad_f1", "F1 over words, the best over the targets", squad_f1, **TARGETS),
        _proportion(
            "has_answer_exact_match", f"exact_match {IN_TEXT}", _where(answerable, exact_match), library="torchmetrics"
        ),
        _mean("has_answer_f1", f"squad_f1 {IN_TEXT}", _where(answerable, squad_f1), library="torchmetrics"),
        _proportion(
            "no_answer_accuracy",
            'fraction of outputs that are empty or "unanswerable", where the text does not tell the answer',
            _where(lambda example: not answerable(example), exact_match),
            library="torchmetrics",
        ),
        _label("f1", "F1 of choice 1 against choice 0", _f1, "two choices, one of them right"),
        _label("f1_macro", "mean over the labels of the F1 of each", partial(_f1, average="macro"), "one right choice"),
        _label(
            "matthews", "correlation of labels and predictions (Matthews 1975; Gorodkin 2004)", _matthews, "one right choice"
        ),
        _mean(
            "question_exact_match",
            "fraction of questions all of whose rows are right, as EM of MultiRC",
            is_right,
            needs="one right choice",
            interval=None,
            statistic=_of_whole_questions,
            norm="sum",
        ),
        Metric(
            "bleu",
            "BLEU",
            about="of the corpus (Papineni et al. 2002)",
            score=_sentence_bleu,
            statistic=_bleu,
            needs="targets to compare with",
            library="sacrebleu",
            margin=0.5,
        ),
        *map(_rouge, ("rouge1", "rouge2", "rougeL")),
        _mean(
            "chance",
            "fraction that guessing would get right: a property of the questions",
            _where(lambda example: len(example.choices) > 1, lambda example: len(example.right) / len(example.choices)),
            judges=False,
            higher_is_better=None,
            interval=None,
        ),
        _proportion(
            "rate",
            "fraction of outputs judged True; an output whose judge was never certain counts as not",
            lambda example: float(example.judged is True),
            needs="an output to be judged",
            higher_is_better=None,
        ),
        _mean(
            "score",
            "mean of what the scorer of the task says of an answer and its row: 1 right; 0 wrong, or nothing to be taken",
            lambda example: example.scores["score"],
        ),
        _proportion(
            "cut_off",
            "fraction of generated answers that reached their largest length before an end, or did not end thinking",
            _where(lambda example: not example.choices, lambda example: float(example.outcome == "cut off")),
            judges=False,
            higher_is_better=False,
            headline="above 0",
        ),
        _several("pass@*", "probability that one of K answers to a question is right: 1 - C(n-c, K) / C(n, K)", pass_at),
        _several("pass^*", "probability that all of K answers to a question are right: C(c, K) / C(n, K)", pass_all),
        _several("maj@*", "fraction of questions of which most of K answers are right, of equally many 1/k each", majority),
        Metric("average", about="mean of the first metrics of the tasks of a suite"),
    )
}
