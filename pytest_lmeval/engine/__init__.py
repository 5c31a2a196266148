"""Step a model: stream texts, score requests and generate answers, within what a policy allows."""

from pytest_lmeval.engine._engine import Engine
from pytest_lmeval.engine._executor import Choose, Executor
from pytest_lmeval.engine._generation import Answer, OnText, Prompt
from pytest_lmeval.engine._policy import Policy, Windows, policy_for
from pytest_lmeval.engine._results import Counts, Results, Scored
from pytest_lmeval.engine._stream import Chunk
from pytest_lmeval.engine._tree import Request

__all__ = [
    "Answer", "Choose", "Chunk", "Counts", "Engine", "Executor", "OnText", "Policy", "Prompt", "Request", "Results", "Scored",
    "Windows", "policy_for",
]  # fmt: skip
