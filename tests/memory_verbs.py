"""Each verb on a tiny model, in this process, to be tried with memory that runs out at one of its calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from probing import certificate
from reading import ids_of, measure_agreement, texts
from running_out import ERRORS, Layered, running_out
from test_audit import CHOOSES, GENERATES, ROWS, ask
from tiny_models import Growing, small_transformer

from pytest_lmeval import Task, as_model, policy_for
from pytest_lmeval.laws import probe
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._measured import Record
from pytest_lmeval.training import Protocol, run_training

CERTIFIED = certificate(packed=True)
SHOTS = Task("shots", ROWS, ask, shots=ROWS[:9])
PAGES = [("It was a dark and stormy night; the rain fell in torrents. " * 4)[part:] for part in range(0, 50, 10)]
SHORT = Protocol(steps=6, batch_size=4, seq_len=16, eval_every=2, eval_tokens=64)
COUNTS = ("tokens", "documents", "questions", "answers", "chunks", "steps", "skipped")
UNSTEADY = ("seconds", "per_second", "memory", "_bytes", "worst_ratio", "cases", "laws_kept", "flops", "calls")
RELATIVE = 1e-3  # of float32: the certificate allows a token 16 times the error of a full run


def _text(lm: Model, window: Any = "unlimited", documents: bool = False) -> Record:
    source = texts(*PAGES, as_stream=False) if documents else ids_of(2000)
    policy = policy_for(lm, CERTIFIED, chunk_size=None if isinstance(window, int) else 64, window=window)
    return measure_perplexity(lm, source, policy=policy).record


def _task(lm: Model, task: Task, shots: int = 0) -> Record:
    return measure_task(lm, task, shots=shots, policy=policy_for(lm, CERTIFIED, batch_size=8)).record


def _agreement(lm: Model) -> Record:
    other = as_model(Layered(vocab=256, width=12))
    return measure_agreement(lm, other, ids_of(1000), chunk_size=64, reference_chunk_size=64).record


VERBS: dict[str, Callable[[Model], Record]] = {
    "perplexity, carried": _text,
    "perplexity, windows": partial(_text, window=400),
    "perplexity, documents": partial(_text, documents=True),
    "choices": partial(_task, task=CHOOSES),
    "choices, 2 shots": partial(_task, task=SHOTS, shots=2),
    "generation": partial(_task, task=GENERATES),
    "choices, packed": partial(_task, task=CHOOSES),
    "choices, packed, 2 shots": partial(_task, task=SHOTS, shots=2),
    "generation, packed": partial(_task, task=GENERATES),
    "choices, growing, 2 shots": partial(_task, task=SHOTS, shots=2),
    "generation, growing": partial(_task, task=GENERATES),
    "agreement": _agreement,
    "training": lambda lm: run_training(lm, ids_of(300), held_out=ids_of(200, 1), protocol=SHORT).record,
    "probe": lambda lm: probe(lm, budget=1).record,
}


def read(verb: str, at: int = 0) -> tuple[Record, int]:
    """What a verb records of a tiny model whose memory runs out at a call, and the number of calls.

    The kind of the error, and whether the state was partly changed before, go by turns.
    """
    kinds = {"packed": small_transformer, "growing": partial(Growing, vocab=256)}  # the others have states of one shape
    make = next((make for name, make in kinds.items() if name in verb), partial(Layered, vocab=256))
    lm = as_model(module := make())
    kind = sorted(ERRORS)[at % len(ERRORS)]
    with running_out(module, at=at, error=kind, in_place=at % 2 == 0, backward=verb == "training" and at % 4 == 1) as memory:
        return VERBS[verb](lm), memory.calls


def differences(verb: str, found: Record, expected: Record) -> list[str]:
    """What differs by more than rounding, in words; of a probe, a law that is broken."""
    if verb == "probe":
        assert found.certificate is not None
        untried = found.certificate.with_status("untried")
        reasons = [found.certificate.laws[law].missing or "" for law in untried]
        return [*found.certificate.broken, *[reason for reason in reasons if not reason.startswith("out of memory at")]]
    wrong = []
    for name, value in expected.metrics.items():
        if any(part in name for part in UNSTEADY):
            continue
        other = found.metrics.get(name)
        if other is None or not np.isclose(float(other), float(value), rtol=RELATIVE, atol=1e-6) or other.n != value.n:
            wrong.append(f"{name}: {value} / {other}")
    return wrong
