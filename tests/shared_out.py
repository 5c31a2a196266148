"""Verbs whose examples several processes share, and what of their records does not depend on how."""

from dataclasses import replace

import pytest
import torch
from tiny import Tiny

from pytest_lmeval import Choices, Generate, NotMeasuredError, Task, as_model
from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import Journal
from pytest_lmeval.records._share import WHOLE

LM = replace(as_model(Tiny()), context_length=40)
OTHER = Tiny()
with torch.no_grad():
    OTHER.head.weight.add_(0.05)
OTHER = replace(as_model(OTHER), context_length=40)
PROBED = Session(budget=1000)
TEXTS = [f"{n} bottles of beer on the wall, {n * n} bottles of beer. " * (1 + n % 3) for n in range(9)]
DOCUMENTS = Corpus("songs", "test", lambda: (Document(str(n), text) for n, text in enumerate(TEXTS)), "songs", as_stream=False)
ROWS = [{"n": n} for n in range(12)]


def of_choices(row):
    return Choices(f"Is {row['n']} even? It is", (" even", " odd"), row["n"] % 2, group=f"group {row['n'] // 3}")


def of_answers(row):
    return Generate(f"{row['n']} is", ("x",), (), max_tokens=3, temperature=1.0)


def scored(row, output):
    return {"length": len(output) / 3, "vowels": sum(map(output.count, "aeiou"))}


CHOICES = Task("parity", ROWS, of_choices, ("accuracy", "accuracy_per_byte", "f1_macro"))
ANSWERS = Task("answers", ROWS, of_answers, score=scored, repeats=2)
VERBS = {
    "choices": lambda lmeval: lmeval.task(LM, CHOICES, invariant=True),
    "shots of lm_eval": lambda lmeval: lmeval.task(LM, replace(CHOICES, shots=ROWS), 2, fewshot="lm_eval", invariant=True),
    "answers": lambda lmeval: lmeval.task(LM, ANSWERS, invariant=True),
    "documents": lambda lmeval: lmeval.perplexity(LM, DOCUMENTS, invariant=True, positions=(20, 30)),
    "windows": lambda lmeval: lmeval.perplexity(LM, DOCUMENTS, as_stream=True, window=16, invariant=True),
    "windows of documents": lambda lmeval: lmeval.perplexity(LM, DOCUMENTS, window="lm_eval", invariant=True),
    "agreement": lambda lmeval: lmeval.agreement(LM, OTHER, DOCUMENTS, limit=7),
    "agreement in windows": lambda lmeval: lmeval.agreement(LM, OTHER, DOCUMENTS, as_stream=True, window=16),
}
OWN = ("seconds", "audit_seconds", "tokens_per_second", "chunk_seconds", "calls", "padding", "tokens_read", "tokens_alone",
       "audit", "outcome", "examples", "units", "cost", "difference_by_position", "state_bytes", "chunks", "worst")  # fmt: skip


def measured(folder, verb, share=WHOLE, **options):
    """Call a verb as a test of a run does that scores a share."""
    context = VerbContext(Session(folder, budget=1000, verdicts=PROBED.verdicts, share=share, **options), Log("t.py::test"))
    journal = Journal(folder)
    if not share.is_whole:
        journal.begin(str(share))
    try:
        result = verb(Lmeval(context))
    except NotMeasuredError as error:  # pytest would skip the test
        raise AssertionError(f"the verb itself fails in shard {share}") from error
    journal.end(context.log.keys)
    return result, context


def numbers_of(record):
    """All of a record that does not depend on how it was shared out, as plain values."""

    def kept(plain):
        if isinstance(plain, dict):
            return {name: kept(value) for name, value in plain.items() if name not in OWN}
        return [kept(one) for one in plain] if isinstance(plain, list) else plain

    return kept(schema.to_plain(record))


def lines_of(folder, record):
    name = record.units or record.examples
    return [] if name is None else sorted((folder / name).read_text().splitlines())


def close(one, other, where=""):
    """Equal, but for the last bits of numbers; fails with the place of the first difference."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys(), where
        return all(close(one[name], other[name], f"{where}/{name}") for name in one)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(close(left, right, f"{where}[{at}]") for at, (left, right) in enumerate(zip(one, other, strict=True)))
    number = isinstance(one, int | float) and isinstance(other, int | float)
    assert one == (pytest.approx(other, rel=1e-12, abs=1e-15) if number else other), where
    return True
