"""Evaluations of language models as pytest tests: exact streaming, certified numbers, speed beside quality.

The names below are the public face, beside those of `pytest_lmeval.laws`, `.tasks`, `.records`, `.errors` and
`.registry`; each is imported when it is first used, so that an installed but unused plugin costs nothing. A module whose name
begins with an underscore is private.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Choices": "tasks",
    "Codebooks": "models._model",
    "Corpus": "data._corpus",
    "Document": "data._corpus",
    "Example": "records._example",
    "Generate": "tasks",
    "LanguageModel": "models._model",
    "Loaded": "models._sources",
    "Metric": "records._metric",
    "Model": "models._model",
    "Protocol": "training",
    "Record": "records._measured",
    "Rows": "data._rows",
    "Section": "records._document",
    "Series": "records._measured",
    "Suite": "tasks",
    "Task": "tasks",
    "Tokenizer": "models._model",
    "Value": "records._value",
    "agreement": "measures._agreement",
    "as_model": "models._sources",
    "corpus": "data",
    "efficiency": "measures._efficiency",
    "equivalence": "measures._equivalence",
    "fork": "models._model",
    "latency": "measures._latency",
    "latency_grid": "measures._latency_grid",
    "load": "models._sources",
    "load_weights": "training",
    "memory": "measures._memory",
    "perplexity": "measures._perplexity",
    "record": "measures._record",
    "replay": "laws",
    "score_rows": "scoring._rows",
    "state_bytes": "models._model",
    "streaming": "measures._streaming",
    "suite": "measures._suite",
    "task": "measures._task",
    "throughput": "measures._throughput",
    "train": "training._verb",
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
