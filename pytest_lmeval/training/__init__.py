"""Train models by one protocol: the same tokens in the same order, the same optimizer, the same seed.

result = run_training(load("zoo:mamba"), corpus("stdlib", "train"), held_out=corpus("stdlib", "validation"))
result.lm, result.perplexity, result.curve
"""

from pytest_lmeval.errors import ProtocolError, TrainingError
from pytest_lmeval.training._loop import run_training
from pytest_lmeval.training._protocol import Protocol
from pytest_lmeval.training._result import TrainResult
from pytest_lmeval.training._weights import load_weights

__all__ = ["Protocol", "ProtocolError", "TrainResult", "TrainingError", "load_weights", "run_training"]
