"""The laws of a language model that streams, and the probe that finds out which of them a model keeps."""

from pytest_lmeval.equivalence.probe import equivalence

__all__ = ["equivalence"]
