"""The shipped model: small, exact however it is cut, and its memory is bounded."""

import torch
from hypothesis import given, settings, strategies as st

from pytest_lmeval.models._model import state_bytes
from pytest_lmeval.zoo._demo import WEIGHTS, Demo, banded_attention, load


def test_the_weights_are_at_most_two_megabytes():
    assert WEIGHTS.stat().st_size <= 2_000_000


def test_it_has_learned_english():
    text = torch.tensor(list(b"Return the value of the argument if it is not None, otherwise return the default."))
    with torch.no_grad():
        logits, _ = load()(text[None, :-1])
    bits = torch.nn.functional.cross_entropy(logits[0], text[1:]).item() / torch.log(torch.tensor(2.0)).item()
    assert bits < 2.5


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_any_cut_gives_the_logits_of_one_pass(sizes):
    torch.manual_seed(0)
    model = Demo(width=16, layers=2, heads=2, window=9, kernel=3, hidden=16).double()
    ids = torch.randint(0, 256, (2, sum(sizes)))
    with torch.no_grad():
        full, _ = model(ids)
        state, parts = None, []
        for piece in torch.split(ids, sizes, dim=1):
            logits, state = model(piece, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-10)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 16), st.integers(0, 11))
def test_attention_in_blocks_is_attention_in_a_band(t, window, block, seen):
    seen = min(seen, window - 1)
    torch.manual_seed(t)
    q = torch.randn(1, 2, t, 4, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, window - 1 + t, 4, dtype=torch.float64).unbind(0)
    ages = torch.arange(t)[:, None] + window - 1 - torch.arange(window - 1 + t)
    visible = (ages >= 0) & (ages < window) & (torch.arange(window - 1 + t) >= window - 1 - seen)
    slopes = torch.tensor([0.25, 0.0625], dtype=torch.float64)[:, None, None]
    scores = 2 * q @ k.transpose(-1, -2) - slopes * ages
    expected = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(banded_attention(q, k, v, window, seen, block), expected, rtol=0, atol=1e-10)


def test_its_state_does_not_grow():
    model, state, sizes = load(), None, set()
    with torch.no_grad():
        for chunk in (1, 300, 1000, 7):
            _, state = model(torch.zeros(1, chunk, dtype=torch.long), state)
            sizes.add(state_bytes(state))
    assert len(sizes) == 1
