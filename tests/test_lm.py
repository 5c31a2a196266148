"""States can be forked and weighed."""

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


def test_a_fork_shares_nothing_with_the_state():
    cache = Cache()
    copy = fork(cache)
    copy.layers[0].keys.zero_()
    copy.layers[1].seen = 9
    assert cache.layers[0].keys.sum() == 32
    assert cache.layers[1].seen == 3


def test_a_fork_keeps_pointing_at_the_same_model():
    cache = Cache()
    assert fork(cache).model is cache.model


def test_tensors_that_carry_a_graph_can_be_forked():
    weight = torch.ones(3, requires_grad=True)
    assert fork([weight * 2])[0].tolist() == [2, 2, 2]


def test_bytes_are_counted_once_and_not_those_of_the_model():
    cache = Cache()
    cache.again = cache.layers[0].keys[:2]
    assert state_bytes(cache) == 2 * 4 * 8 * 4


def test_a_view_weighs_what_it_keeps_alive():
    assert state_bytes({"tail": torch.zeros(1000, 4)[-1:]}) == 16_000


def test_nothing_weighs_nothing():
    assert state_bytes(None) == 0


@pytest.mark.parametrize("toy", [toy for toy in CARRYING if toy is not Streaming])
def test_two_forks_do_not_see_each_other(toy):
    lm = as_model(toy())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        _, state = lm.step(ids[:, :4])
        branch = fork(state)
        straight, _ = lm.step(ids[:, 4:], state)
        lm.step(torch.zeros(1, 5, dtype=torch.long), fork(branch))
        forked, _ = lm.step(ids[:, 4:], branch)
    torch.testing.assert_close(forked, straight, rtol=0, atol=0)


def test_a_state_that_cannot_be_taken_out_cannot_be_used_out_of_turn():
    lm = as_model(Streaming())
    ids = torch.arange(4)[None]
    with torch.no_grad():
        _, first = lm.step(ids)
        lm.step(ids, first)
        with pytest.raises(ModelError, match="one sequence at a time"):
            lm.step(ids, first)


@pytest.mark.parametrize("toy", CARRYING)
@pytest.mark.parametrize("keep", [0, 1, 3, 6])
def test_keep_returns_the_last_positions(toy, keep):
    lm = as_model(toy())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        everything, _ = lm.step(ids)
        kept, _ = lm.step(ids, keep=keep)
    assert torch.equal(kept, everything[:, 6 - keep :])


def test_no_twin_is_made_where_it_would_not_fit(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    assert float64_copy(as_model(Functional())) is None


def test_the_twin_has_the_same_weights_in_float64():
    lm = as_model(Functional())
    double = float64_copy(lm)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        low, high = lm.step(ids)[0], double.step(ids)[0]
    assert high.dtype == torch.float64
    torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-5)
    assert lm.dtype == torch.float32
