"""Compare fine-tuned answers with always giving the answer that is right most often among the training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec import structs

from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import Metric, metric as declared
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._answer_metrics import units_of
from pytest_lmeval.scoring._metrics import compute, scored
from pytest_lmeval.statistics._paired import paired_difference
from pytest_lmeval.tasks._questions import Choices
from pytest_lmeval.training._questions import TrainingRow


def majority_of(rows: Sequence[TrainingRow]) -> int | str:
    """The index of the choice that is right most often, or the text that is; the first of equally frequent ones."""
    questions = [row.question for row in rows]
    right = [one.answers[0] if isinstance(one, Choices) else next(filter(None, one.answers)) for one in questions]
    return Counter(right).most_common(1)[0][0]


def answered_by(majority: int | str, examples: Sequence[Example], metrics: Sequence[Metric]) -> list[Example]:
    """The examples as if the majority were the answer to each, scored in the metrics."""
    found = []
    for example in examples:
        if isinstance(majority, int) and example.choices:
            chosen = min(majority, len(example.choices) - 1)
            nats = tuple(float(index == chosen) - 1 for index in range(len(example.choices)))
            output = (example.texts or example.choices)[chosen].strip()
            one = structs.replace(example, chosen=chosen, loglikelihoods=nats, rounding=0.0, output=output, scores={})
        else:
            one = structs.replace(example, output=str(majority), outcome="answered", scores={})
        found.append(structs.replace(one, scores=scored(one, metrics)))
    return found


def beside_majority(
    majority: int | str, examples: Sequence[Example], metrics: Sequence[Metric], values: dict[str, Value]
) -> dict[str, Value]:
    """Of each metric that judges answers: its value for the majority, and how much more the answers have, with its interval.

    Means are compared question by question. Of a statistic, which has no score of a question, the interval is the distance of
    its own from the value of the majority.
    """
    judging = [metric for metric in metrics if metric.judges and metric.name in values]
    others = answered_by(majority, examples, judging)
    found: dict[str, Value] = {}
    for name, usual in compute(judging, others).items() if judging else ():
        value, of = values[name], declared(f"{name}_over_majority")
        ends = None if value.interval is None else (value.interval[0] - usual, value.interval[1] - usual)
        if declared(name).statistic is None:
            pairs = [
                (other.scores.get(name), one.scores.get(name), unit)
                for other, one, unit in zip(others, examples, units_of(examples).tolist(), strict=True)
            ]
            before, after, units = zip(*((b, a, u) for b, a, u in pairs if b is not None and a is not None), strict=True)
            difference = paired_difference(before, after, groups=units)
            low, high = difference.low, difference.high
            ends = None if low is None or high is None else (low, high)
        found[f"{name}_majority"] = declared(f"{name}_majority").value(float(usual), n=usual.n)
        found[f"{name}_over_majority"] = of.value(value - usual, ends, n=value.n)
    return found
