"""Measure what the audit and `invariant=True` cost, as a share of the time of what they are part of.

pytest benchmarks/test_audit.py                             the demo model
LMEVAL_REAL_MODEL=FOLDER pytest benchmarks/test_audit.py    a model of real size, on a text of 100,000 tokens and 200 questions
"""

import os
import random

import pytest

from pytest_lmeval import Choices, Task, Value
from pytest_lmeval.measures._audit import SHARE

pytestmark = pytest.mark.benchmark
TOKENS, QUESTIONS = 100_000, 200
REAL = os.environ.get("LMEVAL_REAL_MODEL")
THINGS = ("house", "car", "door", "dog", "book") * 3
WORDS = ("red", "blue", "green", "black", "white", "brown", "grey")


def colour(row):
    """A question with a passage of its own, and choices of a few tokens."""
    words = random.Random(row).choices(WORDS, k=len(THINGS))
    said = " ".join(f"The {thing} is {word}." for thing, word in zip(THINGS, words, strict=True))
    return Choices(f"{said} The house is", tuple(f" {word}" for word in WORDS[:4]), row % 4)


COLOURS = Task("colours", list(range(QUESTIONS)), colour)


@pytest.fixture
def model(lm):
    return f"hf:{REAL}" if REAL else lm


def audited(lmeval, model, result, what):
    """Record the share of the audit: of the work, as the certificate says, and of the seconds."""
    record = result.record
    audit, seconds = record.certificate.audit, record.details["audit_seconds"]
    share = {"work": Value(audit.share), "seconds": Value(seconds / (record.cost.seconds - seconds))}
    lmeval.record(model, f"audit of {what}: {audit}", **share, difference=Value(audit.difference, "nats"))
    return audit


def test_of_a_text(lmeval, model, corpus):
    audit = audited(lmeval, model, lmeval.perplexity(model, corpus("stdlib", "train"), tokens=TOKENS), f"{TOKENS:,} tokens")
    assert audit.share <= 1.02 * SHARE


def test_of_a_task(lmeval, model):
    audit = audited(lmeval, model, lmeval.task(model, COLOURS), f"{QUESTIONS} questions")
    assert audit.share <= 1.02 * SHARE


def test_invariant_in_sixteen_bits(lmeval, model, corpus):
    """Seconds of a task and of a text with `invariant=True` over those without, and how far the numbers are apart."""
    spec = f"{model if isinstance(model, str) else model.spec}@bf16"
    plain, fixed = (lmeval.task(spec, COLOURS, limit=50, invariant=invariant) for invariant in (False, True))
    pairs = zip(plain.examples, fixed.examples, strict=True)
    apart = max(abs(a - b) for one, other in pairs for a, b in zip(one.loglikelihoods, other.loglikelihoods, strict=True))
    price = {"task": fixed.record.cost.seconds / plain.record.cost.seconds}
    plain, fixed = (lmeval.perplexity(spec, corpus("stdlib"), tokens=3000, invariant=invariant) for invariant in (False, True))
    price["text"] = fixed.seconds / plain.seconds
    lmeval.record(spec, "price of invariant=True", **{name: Value(ratio, "x") for name, ratio in price.items()})
    lmeval.record(
        spec, "spread without it", choice=Value(apart, "nats"), audited=Value(plain.certificate.audit.difference, "nats")
    )
