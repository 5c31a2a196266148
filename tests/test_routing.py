"""A router of a mixture of experts that flips on a tie is no fault; one that flips without a tie is."""

import pytest
import torch
from probing import first_failure, probed
from tiny_models import VOCAB, Functional

from pytest_lmeval.laws import Harness
from pytest_lmeval.laws._moe_routing import first_tie, record_routing
from pytest_lmeval.models._sources import as_model


class Experts(Functional):
    """Two experts; the router scores them alike for every seventh id, but for a rounding that follows the chunk's length."""

    tilt = 1e-7

    def __init__(self):
        super().__init__()
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


def tilted(tilt, kind=Experts):
    model = kind()
    model.tilt = tilt
    return model


@pytest.mark.parametrize("tilt", [1e-7, -1e-8])  # the smaller one changes float64 only: the reference flips
def test_a_flip_on_a_tie_breaks_nothing_and_is_counted(tilt):
    result = probed(tilted(tilt))
    assert result.certificate.worst_ratio < 8
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.routing_ties > 0


def test_a_flip_without_a_tie_breaks_the_law():
    harness = Harness(as_model(tilted(1.0)))
    assert first_failure(["splits"], harness)
    assert harness.routing_ties == 0


@pytest.mark.parametrize("tilt", [1e-7, 1e-8])
def test_ties_do_not_excuse_a_dropped_state(tilt):
    class Forgetting(Experts):
        def forward(self, input_ids, state=None):
            return super().forward(input_ids, state if input_ids.shape[1] == 1 else None)

    assert first_failure(["splits"], Harness(as_model(tilted(tilt, Forgetting))))


def test_rounding_that_depends_on_the_other_tokens_of_an_expert_is_no_view_of_the_future():
    class Grouped(Experts):
        """Rounds as grouped matrix products do: by how many tokens of the whole call an expert has."""

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

    assert not first_failure(["causality"], Harness(as_model(Grouped())))
    assert first_failure(["causality"], Harness(as_model(Leaking())))


def scores(*rows):
    return [(torch.tensor(rows, dtype=torch.float64), 1)]


def test_the_first_flip_decides_and_must_be_a_tie():
    one = scores([1.0, 0.0], [0.5, 0.5 + 1e-9], [0.0, 1.0])
    assert first_tie(one, scores([1.0, 0.0], [0.5 + 1e-9, 0.5], [0.0, 1.0]), torch.float32) == 1
    assert first_tie(one, scores([0.0, 1.0], [0.5 + 1e-9, 0.5], [0.0, 1.0]), torch.float32) is None
    assert first_tie(one, one, torch.float32) is None


@pytest.mark.parametrize("sizes", [[6], [2, 4], [1] * 6])
def test_the_scores_of_a_router_are_recorded_token_by_token(sizes):
    lm = as_model(Experts())
    ids = torch.arange(12).view(2, 6)

    def run():
        state = None
        for chunk in torch.split(ids, sizes, dim=1):
            _, state = lm.step(chunk, state)

    ((found, k),) = record_routing(run, rows=2, row=1, sizes=sizes)
    assert (k, list(found.shape)) == (1, [6, 2])
    assert torch.allclose(found, lm.module.route(ids[1]).double(), atol=1e-6)


def test_nothing_is_recorded_of_a_model_without_routers():
    lm = as_model(Functional())
    assert record_routing(lambda: lm.step(torch.zeros(1, 4, dtype=torch.long)), rows=1, row=0, sizes=[4]) == []
