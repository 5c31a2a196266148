"""Measure what the harness costs in training: tokens a second of `train` over those of a bare loop; and models of the zoo.

Processor time, not wall time, by turns: a busy machine changes little.
"""

import copy
import math
import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from pytest_lmeval import Value
from pytest_lmeval.models._flops import training_flops
from pytest_lmeval.training import Protocol, run_training

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]

STEPS = {"demo": 50, "zoo:lstm": 100}
ROUNDS = 5
BATCH_SIZE, SEQ_LEN = 4, 128


def bare_loop(module, ids, steps, on_step):
    """Training without a harness: the same crops of the text, AdamW, a warm-up and a cosine."""
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
        on_step(loss.item())


def processor_seconds(work):
    """Seconds in all, and of the steps after the first; `work` is given a function to call after each step."""
    times = []
    began = time.process_time()
    work(lambda *_: times.append(time.process_time()))
    return time.process_time() - began, times[-1] - times[0]


@pytest.mark.parametrize("spec", STEPS)
def test_processor_time_of_training_over_a_bare_loop(lmeval, load_lm, tmp_path, spec):
    """Saving checkpoints is part of the steps; work done once is recorded by itself: copying, counting operations."""
    lm, steps = load_lm(spec), STEPS[spec]
    ids = torch.randint(0, lm.vocab_size, (200_000,), generator=torch.Generator().manual_seed(0))

    def ours(on_step, seed):
        protocol = Protocol(steps=steps, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=seed)
        run_training(lm, ids, protocol=protocol, folder=tmp_path, progress=on_step)

    def bare(on_step, seed):
        bare_loop(lm.module, ids, steps, on_step)

    ratios, once = [], []
    for seed in range(ROUNDS + 1):
        taken = {}
        for side in (ours, bare) if seed % 2 else (bare, ours):
            taken[side] = processor_seconds(lambda on_step, side=side, seed=seed: side(on_step, seed))
        ratios.append(taken[bare][1] / taken[ours][1])
        once.append(taken[ours][0] - taken[ours][1] * steps / (steps - 1))

    ratios = sorted(ratios[1:])  # of neighbours in time, each side first by turns; the first round warms up
    ratio = Value(statistics.median(ratios), "x", low=ratios[0], high=ratios[-1], n=ROUNDS, higher_is_better=True)
    around = Value(statistics.median(once[1:]), "s", n=ROUNDS, higher_is_better=False)
    lmeval.record(lm, "training over a bare loop", tokens_per_processor_second_ratio=ratio, processor_time_done_once=around)


SLOWEST = {"mamba": 0.6, "mamba2": 0.35}  # of causal-bk, almost only products of matrices; reached: 0.66 to 0.71, 0.40 to 0.46


def test_mamba_trains_at_a_fraction_of_the_speed_of_causal_bk(lmeval, load_lm):
    """One step of the default protocol, 16 crops of 128 tokens: forward, loss, backward."""
    pytest.importorskip("numba")  # compiles the scan of mamba
    ids = torch.randint(0, 256, (16, 129), generator=torch.Generator().manual_seed(0))
    modules = {name: copy.deepcopy(load_lm(f"zoo:{name}").module).train() for name in (*SLOWEST, "causal-bk")}

    def loss(module):
        return F.cross_entropy(module(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())

    times = {name: [] for name in modules}
    for round_ in range(ROUNDS + 1):
        for name in modules if round_ % 2 else reversed(modules):
            began = time.process_time()
            loss(modules[name]).backward()
            times[name].append(time.process_time() - began)
    work = {name: training_flops(lambda module=module: loss(module)).total for name, module in modules.items()}
    for name, slowest in SLOWEST.items():
        pairs = zip(times["causal-bk"][1:], times[name][1:], strict=True)  # the first round warms up
        ratios = sorted(bk / own for bk, own in pairs)
        ratio = Value(statistics.median(ratios), "x", low=ratios[0], high=ratios[-1], n=ROUNDS, higher_is_better=True)
        operations = Value(float(ratio) * work[name] / work["causal-bk"], "x", n=ROUNDS, higher_is_better=True)
        fractions = {"tokens_per_processor_second_ratio": ratio, "operations_per_processor_second_ratio": operations}
        lmeval.record(load_lm(f"zoo:{name}"), "training over causal-bk", **fractions)
        assert ratio > slowest, f"{name} trains at {float(ratio):.2f} of the speed of causal-bk"
