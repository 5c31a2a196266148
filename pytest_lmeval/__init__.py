"""Evaluations of language models as pytest tests: exact streaming, certified numbers, speed beside quality.

The names below are the public face, beside `pytest_lmeval.stream.stream` and `pytest_lmeval.equivalence.equivalence`;
each is imported when it is first used, so that an installed but unused plugin costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Choices": "pytest_lmeval.task",
    "Corpus": "pytest_lmeval.data.corpus",
    "Document": "pytest_lmeval.data.corpus",
    "Codebooks": "pytest_lmeval.lm",
    "CorpusError": "pytest_lmeval.data.corpus",
    "Generate": "pytest_lmeval.task",
    "LanguageModel": "pytest_lmeval.lm",
    "Metric": "pytest_lmeval.results.metric",
    "Model": "pytest_lmeval.lm",
    "Protocol": "pytest_lmeval.training",
    "Rows": "pytest_lmeval.data.rows",
    "Suite": "pytest_lmeval.task",
    "Task": "pytest_lmeval.task",
    "agreement": "pytest_lmeval.scoring.agreement",
    "as_model": "pytest_lmeval.adapters",
    "corpus": "pytest_lmeval.data",
    "efficiency": "pytest_lmeval.profiling.efficiency",
    "evaluate": "pytest_lmeval.scoring.evaluate",
    "fork": "pytest_lmeval.lm",
    "latency": "pytest_lmeval.profiling.latency",
    "load": "pytest_lmeval.adapters",
    "load_weights": "pytest_lmeval.training",
    "memory": "pytest_lmeval.profiling.memory",
    "perplexity": "pytest_lmeval.scoring.perplexity",
    "replay": "pytest_lmeval.equivalence.probe",
    "score_rows": "pytest_lmeval.scoring.rows",
    "state_bytes": "pytest_lmeval.lm",
    "throughput": "pytest_lmeval.profiling.throughput",
    "train": "pytest_lmeval.training",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
