"""Evaluations of language models as pytest tests: exact streaming, certified numbers, speed beside quality.

The names below are the public face, beside `pytest_lmeval.laws` and `pytest_lmeval.tasks`, `pytest_lmeval.errors` and
`pytest_lmeval.registry`; each is imported when it is first used, so that an installed but unused plugin costs nothing. What
they do not name is private.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Choices": "tasks.questions",
    "Codebooks": "models.model",
    "Corpus": "data.corpus",
    "Document": "data.corpus",
    "Example": "records.example",
    "Generate": "tasks.questions",
    "LanguageModel": "models.model",
    "Metric": "records.metric",
    "Model": "models.model",
    "Protocol": "training",
    "Record": "records.measured",
    "Rows": "data.rows",
    "Section": "records.document",
    "Series": "records.measured",
    "Suite": "tasks.questions",
    "Task": "tasks.questions",
    "Tokenizer": "models.model",
    "Value": "records.value",
    "agreement": "measures._agreement",
    "as_model": "models.sources",
    "corpus": "data",
    "efficiency": "measures._efficiency",
    "equivalence": "measures._equivalence",
    "fork": "models.model",
    "latency": "measures._latency",
    "latency_grid": "measures._latency_grid",
    "load": "models.sources",
    "load_weights": "training",
    "memory": "measures._memory",
    "perplexity": "measures._perplexity",
    "record": "measures._record",
    "replay": "laws",
    "score_rows": "scoring.rows",
    "state_bytes": "models.model",
    "streaming": "measures._streaming",
    "suite": "measures._suite",
    "task": "measures._task",
    "throughput": "measures._throughput",
    "train": "training.verb",
}
_ERRORS = "errors"  # every error of which is public too

__all__ = sorted([*_HOMES, *importlib.import_module("pytest_lmeval.errors").__all__])


def __getattr__(name: str) -> Any:
    if name not in __all__:
        from pytest_lmeval.errors import nearest

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{nearest(name, __all__)}")
    return getattr(importlib.import_module(f"pytest_lmeval.{_HOMES.get(name, _ERRORS)}"), name)


def __dir__() -> list[str]:
    return __all__
