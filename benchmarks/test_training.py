"""What does the harness cost in training? Tokens a second of `train` over those of a bare loop.

Processor time, not wall time, and the two sides by turns: this holds on a machine that does other things as well.
"""

import copy
import math
import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from pytest_lmeval import Metric
from pytest_lmeval.training import Protocol, train

pytestmark = pytest.mark.benchmark

STEPS = {"demo": 100, "zoo:lstm": 120}
ROUNDS = 5
BATCH_SIZE, SEQ_LEN = 4, 128


@pytest.fixture(autouse=True)
def one_thread():
    """A second thread waits for work in a busy loop, and its waiting would count as processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bare_loop(module, ids, steps):
    """What one writes without a harness: the same crops of the text, AdamW, a warm-up and a cosine."""
    module = copy.deepcopy(module).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.95))
    rising = steps / 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - SEQ_LEN - 1, (BATCH_SIZE, 1))
        crops = ids[starts + torch.arange(SEQ_LEN + 1)]
        logits, _ = module(crops[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


def processor_seconds(work):
    began = time.process_time()
    work()
    return time.process_time() - began


@pytest.mark.parametrize("spec", STEPS)
def test_processor_time_of_training_over_a_bare_loop(lmeval, load_lm, tmp_path, spec):
    """Everything is in it but evaluations, which a bare loop has not: the copy, counting operations, points to go on from."""
    lm, steps = load_lm(spec), STEPS[spec]
    ids = torch.randint(0, lm.vocab_size, (200_000,), generator=torch.Generator().manual_seed(0))
    ratios = []
    for round_ in range(ROUNDS + 1):
        taken = {}

        def ours(taken=taken, round_=round_):
            protocol = Protocol(steps=steps, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=round_)
            taken["ours"] = processor_seconds(lambda: train(lm, ids, protocol=protocol, folder=tmp_path))

        def bare(taken=taken):
            taken["bare"] = processor_seconds(lambda: bare_loop(lm.module, ids, steps))

        for side in (ours, bare) if round_ % 2 else (bare, ours):
            side()
        ratios.append(taken["bare"] / taken["ours"])

    ratios = sorted(ratios[1:])  # of neighbours in time, in turns first and second; the first round warms up
    ratio = Metric(statistics.median(ratios), "x", low=ratios[0], high=ratios[-1], n=ROUNDS, higher_is_better=True)
    lmeval.record(lm, "training over a bare loop", tokens_per_processor_second_ratio=ratio)
