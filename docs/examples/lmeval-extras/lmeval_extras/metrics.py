"""Two metrics: one of answers, and one that a verb measures. Imported in every run, so nothing heavy is imported here."""

from __future__ import annotations

from pytest_lmeval import Example, Metric


def is_brief(example: Example) -> float:
    """1 for an output of at most five words."""
    return float(len(example.output.split()) <= 5)


BREVITY = Metric("brevity", score=is_brief, interval="proportion", about="share of outputs of at most five words")
WORDS_PER_SECOND = Metric("words_per_second", "words/s", aspect="speed", about="words of a text that are read a second")

METRICS = {metric.name: metric for metric in (BREVITY, WORDS_PER_SECOND)}
