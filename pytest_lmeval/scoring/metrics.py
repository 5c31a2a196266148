"""The metrics of a task, by the names that it asks for: each is computed from all its answered questions.

Those that a library defines are computed by it (extra `tasks`), which is imported when one of them is asked for:

    scikit-learn   f1, f1_macro, matthews                       torchmetrics   exact_match, squad_f1, and the parts of squadv2
    rouge-score    rouge1, rouge2, rougeL (no stemming)         sacrebleu      bleu (of the corpus, 13a)

All lie between 0 and 1, but for matthews (-1 to 1), perplexity (from 1), and bleu, which keeps the 0 to 100 of all published
numbers. What is undefined is 0, as in scikit-learn: matthews where all labels or all predictions are the same, f1 where neither
a label nor a prediction is positive. n is the number of questions.

Intervals are of 95 %; questions of one group are one unit. Shares have Wilson's; means and perplexity that of the bootstrap
over units; f1, f1_macro, matthews and bleu are computed anew for 500 draws of units, and have none if a draw leaves them
undefined. Below eight units only shares of independent questions have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from pytest_lmeval.errors import TaskError
from pytest_lmeval.records.value import Metric
from pytest_lmeval.scoring.examples import Example
from pytest_lmeval.scoring.measures import METRICS, READS, measured
from pytest_lmeval.statistics.sequential import confidence_sequence

LIBRARIES = {"sklearn": "scikit-learn", "sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "torchmetrics": "torchmetrics"}

LM_EVAL_NAMES = {
    "acc": "accuracy",  # of lambada: greedy_match
    "acc_norm": "accuracy_per_character",
    "acc_bytes": "accuracy_per_byte",
    "bleu": "bleu",
    "em": "exact_match",
    "exact": "exact_match",
    "exact_match": "exact_match",  # of choices: greedy_match
    "f1": "f1",  # of cb: f1_macro; of record and squadv2: squad_f1
    "mcc": "matthews",
    "perplexity": "perplexity",
    "HasAns_exact": "has_answer_exact_match",
    "HasAns_f1": "has_answer_f1",
    "NoAns_exact": "no_answer_accuracy",
}
"""Names of lm-evaluation-harness, and ours. It calls several things by one name; which is meant, its task tells."""


def compute(
    names: Sequence[str], examples: Sequence[Example], seed: int = 0, threshold: float | None = None
) -> dict[str, Metric]:
    """The metrics by their names. One about questions with an answer, or about those without, is left out if there are none.

    examples   in any order: it changes nothing
    threshold  `Task.threshold`, where asking ended as soon as the rate was certain to be above or below: its interval is
               then one that may be looked at after every answer (see `statistics.sequential`)

    Raises TaskError as `check` does, for no examples, and for examples that have not what a metric is computed from.
    """
    check(names, "this call")
    if not examples:
        raise TaskError(f"no question was answered, so that nothing can be said of {', '.join(names)}.")
    ordered = sorted(examples, key=lambda example: (example.id, example.number))
    check_examples(names, ordered)
    found = {name: metric for name in names if (metric := METRICS[name].compute(ordered, seed)) is not None}
    if threshold is not None and "rate" in found:
        found["rate"] = _at_any_time(found["rate"])
    return found


def check_examples(names: Sequence[str], examples: Sequence[Example]) -> None:
    """Raises TaskError where an example has not what a metric is computed from; to be asked as soon as there are some."""
    for name in names:
        for example in examples:
            if not READS[METRICS[name].reads](example):
                raise TaskError(
                    f"{name} is computed from {METRICS[name].reads}, and question {example.number} (id {example.id}) has "
                    f"{len(example.choices)} choices, right are {list(example.right)}, its output is {example.output!r}, its "
                    f"targets are {list(example.targets)!r}. Ask for another metric: {', '.join(METRICS)}."
                )


def check(names: Sequence[str], task: str) -> None:
    """Whether all of these can be computed here, to be asked before anything is scored. Imports their libraries.

    Raises TaskError for an unknown name, telling which there are, and for a library that is missing, telling how to get it.
    """
    for name in names:
        if name not in METRICS:
            ours = f" What lm_eval calls so is {LM_EVAL_NAMES[name]} here." if name in LM_EVAL_NAMES else ""
            raise TaskError(f"{task} asks for the metric {name!r}, which there is not.{ours} Metrics are {', '.join(METRICS)}.")
    for name in names:
        library = METRICS[name].library
        if library is None:
            continue
        try:
            import_module(library)
        except ImportError as error:
            raise TaskError(
                f"{task} asks for the metric {name!r}, which is computed by {LIBRARIES[library]}. That cannot be imported "
                f"({error}), so that no answer could be judged. Install it: pip install 'pytest-lmeval[tasks]'"
            ) from error


def tied(examples: Sequence[Example]) -> int:
    """Questions where another choice is exactly as likely: the first was taken, so that accuracy depends on their order."""
    return sum(example.tied for example in examples)


def _at_any_time(rate: Metric) -> Metric:
    n = rate.n or 0
    return measured(float(rate), confidence_sequence(round(rate * n), n), n, rate.higher_is_better)
