"""Evaluations of language models as pytest tests: exact streaming, certified numbers, speed beside quality.

The names below are the public face, beside `pytest_lmeval.stream.stream` and `pytest_lmeval.laws.equivalence`;
each is imported when it is first used, so that an installed but unused plugin costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Choices": "pytest_lmeval.tasks.questions",
    "Corpus": "pytest_lmeval.data.corpus",
    "Document": "pytest_lmeval.data.corpus",
    "Codebooks": "pytest_lmeval.models.model",
    "CorpusError": "pytest_lmeval.data.corpus",
    "Generate": "pytest_lmeval.tasks.questions",
    "LanguageModel": "pytest_lmeval.models.model",
    "Metric": "pytest_lmeval.records.value",
    "Model": "pytest_lmeval.models.model",
    "Protocol": "pytest_lmeval.training",
    "Rows": "pytest_lmeval.data.rows",
    "Suite": "pytest_lmeval.tasks.questions",
    "Task": "pytest_lmeval.tasks.questions",
    "agreement": "pytest_lmeval.measures._agreement",
    "as_model": "pytest_lmeval.models.sources",
    "corpus": "pytest_lmeval.data",
    "efficiency": "pytest_lmeval.measures._efficiency",
    "evaluate": "pytest_lmeval.measures._task",
    "fork": "pytest_lmeval.models.model",
    "latency": "pytest_lmeval.measures._latency",
    "load": "pytest_lmeval.models.sources",
    "load_weights": "pytest_lmeval.training",
    "memory": "pytest_lmeval.measures._memory",
    "perplexity": "pytest_lmeval.measures._perplexity",
    "replay": "pytest_lmeval.laws.probe",
    "score_rows": "pytest_lmeval.scoring.rows",
    "state_bytes": "pytest_lmeval.models.model",
    "throughput": "pytest_lmeval.measures._throughput",
    "train": "pytest_lmeval.training",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
