"""Compare the shipped model with a smoothed 4-gram model: bits per byte on held-out text.

The 4-gram model is also an example of a language model that is no torch module, only an object with `step`.
"""

from collections import defaultdict

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.benchmark

ORDER = 4
DISCOUNT = 0.75


class KneserNey:
    """Interpolated Kneser-Ney over bytes (Chen and Goodman 1999, one discount); the state is the last three bytes."""

    vocab_size = 256
    tokenizer = "bytes"

    def __init__(self, text: bytes) -> None:
        # counts[n][context of n bytes][next byte]; below the highest order, the number of different bytes before it
        self.counts = [defaultdict(lambda: defaultdict(int)) for _ in range(ORDER)]
        for index in range(ORDER - 1, len(text)):
            self.counts[-1][text[index - ORDER + 1 : index]][text[index]] += 1
        for n in range(ORDER - 1, 0, -1):
            for context, following in self.counts[n].items():
                for byte in following:
                    self.counts[n - 1][context[1:]][byte] += 1

    def step(self, input_ids, state=None):
        before = state or b""
        seen = before + bytes(input_ids[0].tolist())
        ends = range(len(before) + 1, len(seen) + 1)
        rows = [np.log(self.probabilities(seen[max(0, end - ORDER + 1) : end])) for end in ends]
        return torch.from_numpy(np.stack(rows))[None], seen[-ORDER + 1 :]

    def probabilities(self, context: bytes) -> np.ndarray:
        probabilities = np.full(256, 1 / 256)
        for n in range(min(len(context), ORDER - 1) + 1):
            if (found := self.counts[n].get(context[len(context) - n :])) is not None:
                following, counts = list(found), np.array(list(found.values()))
                total = counts.sum()
                probabilities *= DISCOUNT * len(counts) / total
                probabilities[following] += (counts - DISCOUNT) / total
        return probabilities


@pytest.fixture(scope="module")
def four_gram(corpus):
    return KneserNey("".join(document.text for document in corpus("stdlib", "train").documents()).encode())


def test_probabilities_add_up(four_gram):
    for context in (b"", b"t", b"the", b"\xff\xfe\xfd"):
        assert four_gram.probabilities(context).sum() == pytest.approx(1)


def test_the_demo_model_beats_a_four_gram_model(lmeval, load_lm, corpus, four_gram):
    held_out = corpus("stdlib", "test")
    demo = lmeval.perplexity(load_lm("demo"), held_out)
    grams = lmeval.perplexity(four_gram, held_out)

    assert demo.bits_per_byte.high < grams.bits_per_byte.low
