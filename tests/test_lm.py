"""States can be forked, measured and continued; `keep` and the float64 copy work for every form of model."""

from dataclasses import dataclass

import pytest
import torch
from tiny_models import CARRYING, Functional, Streaming

from pytest_lmeval.errors import ModelError
from pytest_lmeval.laws._weights import float64_copy
from pytest_lmeval.models._model import fork, state_bytes
from pytest_lmeval.models._sources import as_model


@dataclass
class Layer:
    keys: torch.Tensor
    seen: int = 3


class Cache:
    def __init__(self):
        self.layers = [Layer(torch.ones(4, 8)), Layer(torch.ones(4, 8))]
        self.model = torch.nn.Linear(100, 100)


def test_a_fork_shares_the_model_and_nothing_else():
    cache = Cache()
    copy = fork(cache)
    copy.layers[0].keys.zero_()
    copy.layers[1].seen = 9
    assert (cache.layers[0].keys.sum(), cache.layers[1].seen) == (32, 3)
    assert copy.model is cache.model
    assert fork([torch.ones(3, requires_grad=True) * 2])[0].tolist() == [2, 2, 2]  # a tensor with a graph


def test_the_size_of_a_state_is_that_of_its_storages_without_the_model():
    cache = Cache()
    cache.again = cache.layers[0].keys[:2]
    assert state_bytes(cache) == 2 * 4 * 8 * 4
    assert state_bytes({"tail": torch.zeros(1000, 4)[-1:]}) == 16_000  # a view keeps its storage alive
    assert state_bytes(None) == 0


@pytest.mark.parametrize("kind", [kind for kind in CARRYING if kind is not Streaming])
def test_two_forks_are_independent(kind):
    lm = as_model(kind())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        _, state = lm.step(ids[:, :4])
        branch = fork(state)
        first, _ = lm.step(ids[:, 4:], state)
        lm.step(torch.zeros(1, 5, dtype=torch.long), fork(branch))
        assert torch.equal(first, lm.step(ids[:, 4:], branch)[0])


def test_only_the_latest_internal_state_can_be_continued():
    lm = as_model(Streaming())
    ids = torch.arange(4)[None]
    with torch.no_grad():
        _, first = lm.step(ids)
        lm.step(ids, first)
        with pytest.raises(ModelError, match="one sequence at a time"):
            lm.step(ids, first)


@pytest.mark.parametrize("kind", CARRYING)
@pytest.mark.parametrize("keep", [0, 1, 6])
def test_keep_returns_the_last_positions(kind, keep):
    lm = as_model(kind())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        everything, _ = lm.step(ids)
        kept, _ = lm.step(ids, keep=keep)
    assert torch.equal(kept, everything[:, 6 - keep :])


def test_the_float64_copy_has_the_same_weights_and_needs_memory(monkeypatch):
    lm = as_model(Functional())
    double = float64_copy(lm)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        low, high = lm.step(ids)[0], double.step(ids)[0]
    assert (lm.dtype, high.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-5)
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    assert float64_copy(lm) is None
