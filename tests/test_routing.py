"""A router of a mixture of experts that flips on a tie is no fault; one that flips without a tie is."""

import pytest
import torch
from tiny_models import VOCAB, Functional

from pytest_lmeval.laws import probe
from pytest_lmeval.laws._moe_routing import recorded, until_first_tie
from pytest_lmeval.models._sources import as_model


class Experts(Functional):
    """Two experts; for every seventh id the router scores them alike, but for a rounding that goes with the chunk's length."""

    tilt = 1e-7

    def __init__(self, **options):
        super().__init__(**options)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.route = torch.nn.Embedding(VOCAB, 2)
            self.experts = torch.nn.Parameter(torch.randn(2, VOCAB, VOCAB) * 0.3)
        with torch.no_grad():
            self.route.weight[::7] = 0.25

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        scores = self.route(input_ids)
        scores = scores + torch.tensor([0.0, self.tilt if input_ids.shape[1] % 2 else -self.tilt]).to(scores)
        chosen = scores.topk(1, dim=-1).indices[..., 0]
        return logits + torch.einsum("btv,btvw->btw", logits.tanh(), self.experts[chosen]), state


@pytest.mark.parametrize("tilt", [1e-7, -1e-8])  # the smaller one is there in float64 only: the reference flips
def test_a_flip_on_a_tie_is_recognised_and_counted(tilt):
    model = Experts()
    model.tilt = tilt
    result = probe(as_model(model))
    assert result.certificate.worst_ratio < 8
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.flips > 0


def test_a_router_that_goes_another_way_without_a_tie_is_caught():
    class Tilted(Experts):
        tilt = 1.0

    result = probe(as_model(Tilted()))
    assert "splits" in result.certificate.broken
    assert result.certificate.flips == 0


def test_rounding_that_goes_with_the_other_tokens_of_an_expert_is_no_view_of_the_future():
    class Grouped(Experts):
        """As grouped matrix products round: by how many tokens of the whole call an expert has."""

        def leak(self, dtype):
            return torch.finfo(dtype).eps

        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            first = logits[..., :1] + self.leak(logits.dtype) * (input_ids % 2).sum()
            return torch.cat([first, logits[..., 1:]], -1), state

    class Leaking(Grouped):
        """As far as float32 rounds, and no less in float64."""

        def leak(self, dtype):
            return 2e-7

    assert probe(as_model(Grouped())).laws["causality"].kept
    assert probe(as_model(Leaking())).verdict == "non-causal"


@pytest.mark.parametrize("small", [1e-7, 1e-8])
def test_a_dropped_state_is_not_excused_by_ties(small):
    class Forgetting(Experts):
        tilt = small

        def forward(self, input_ids, state=None):
            return super().forward(input_ids, state if input_ids.shape[1] == 1 else None)

    assert "splits" in probe(as_model(Forgetting())).certificate.broken


def scores(*rows):
    return [(torch.tensor(rows, dtype=torch.float64), 1)]


def test_the_first_flip_decides_and_must_be_a_tie():
    one = scores([1.0, 0.0], [0.5, 0.5 + 1e-9], [0.0, 1.0])
    assert until_first_tie(one, scores([1.0, 0.0], [0.5 + 1e-9, 0.5], [0.0, 1.0]), torch.float32) == 1
    assert until_first_tie(one, scores([0.0, 1.0], [0.5 + 1e-9, 0.5], [0.0, 1.0]), torch.float32) is None
    assert until_first_tie(one, one, torch.float32) is None


@pytest.mark.parametrize("pieces", [[6], [2, 4], [1] * 6])
def test_what_a_router_chose_is_recorded_token_by_token(pieces):
    lm = as_model(Experts())
    ids = torch.arange(12).view(2, 6)

    def run():
        state = None
        for piece in torch.split(ids, pieces, dim=1):
            _, state = lm.step(piece, state)

    ((found, k),) = recorded(run, rows=2, row=1, pieces=pieces)
    assert (k, list(found.shape)) == (1, [6, 2])
    assert torch.allclose(found, lm.module.route(ids[1]).double(), atol=1e-6)


def test_a_model_without_routers_has_none():
    lm = as_model(Functional())
    assert recorded(lambda: lm.step(torch.zeros(1, 4, dtype=torch.long)), rows=1, row=0, pieces=[4]) == []
