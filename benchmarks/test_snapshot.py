"""Measure what it costs to undo a change of weights, and undo twenty: directions found in hidden states, ablated and put back.

pytest benchmarks/test_snapshot.py --lm hf:FOLDER -s
"""

import copy
import gc
import time
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pytest_lmeval import Value, load, policy_for, score_rows, snapshot
from pytest_lmeval.measures._hidden_states import measure_hidden_states
from pytest_lmeval.profiling._peak import peak_memory

pytestmark = pytest.mark.benchmark
ATTENTION, WRITING = (
    ("*.o_proj.weight", "*.out.weight"),
    ("*.o_proj.weight", "*.down_proj.weight", "*.out.weight", "*.down.weight"),
)
FOUND = 10  # of twenty directions; the others are random
SET, TRIED = 24, 8  # texts of a set, and others whose loss is measured


def present(module, patterns):
    """The patterns that match a tensor of the module."""
    names = [name for name, _ in module.named_parameters()]
    return [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)]


@torch.no_grad()
def change(module, patterns, how):
    for name, weight in module.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            how(weight)


def bits(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def with_state_dict(lm, patterns, how):
    saved = copy.deepcopy(lm.module.state_dict())
    change(lm.module, patterns, how)
    lm.module.load_state_dict(saved)


def with_reload(lm, patterns, how):
    change(lm.module, patterns, how)
    again = load(lm.spec, device=lm.device)
    return again.spec


def test_what_it_costs_to_undo_a_change(lmeval, lm, tmp_path):
    patterns = present(lm.module, ATTENTION)
    before, values = bits(lm.module), {}

    def kept(on):
        def work(lm, patterns, how):
            with snapshot(lm, *patterns, on=on):
                change(lm.module, patterns, how)

        return work

    ways = {
        "snapshot_on_the_cpu": kept("cpu"),
        "snapshot_on_the_device": kept("device"),
        "snapshot_in_a_file": kept(tmp_path / "kept.safetensors"),
        "state_dict": with_state_dict,
        "reload": with_reload,
    }
    for name, work in ways.items():
        work(lm, patterns, lambda weight: weight.neg_())  # once, so that nothing is loaded or imported while it is timed
        if name == "reload":
            change(lm.module, patterns, lambda weight: weight.neg_())
            change(lm.module, patterns, lambda weight: weight.neg_())
            lm.module.load_state_dict(before)
        gc.collect()
        with peak_memory(lm.device) as peak:
            began = time.perf_counter()
            work(lm, patterns, lambda weight: weight.neg_())
            values[f"{name}_seconds"] = Value(time.perf_counter() - began, "s", higher_is_better=False)
        if name == "reload":
            lm.module.load_state_dict(before)
        assert all(torch.equal(tensor, before[own]) for own, tensor in lm.module.state_dict().items()), name
        if peak.growth is not None:
            values[f"{name}_memory"] = Value(peak.growth, "bytes", higher_is_better=False)
    for other in ("state_dict", "reload"):
        for what in ("seconds", "memory"):
            mine, theirs = values.get(f"snapshot_on_the_cpu_{what}"), values.get(f"{other}_{what}")
            if mine and theirs:
                values[f"{what}_over_{other}"] = Value(mine / theirs, "x", higher_is_better=False)
    size = snapshot(lm, *patterns)
    values["bytes_kept"] = Value(size.nbytes, "bytes")
    print(f"\n{lm.spec}, {len(size.names)} tensors: " + ", ".join(f"{name} {value!r}" for name, value in values.items()))
    lmeval.record(lm, f"undo a change of {', '.join(patterns)}", **values)


def test_twenty_directions_are_ablated_and_undone(lmeval, lm, corpus):
    parts = "".join(document.text for document in corpus("stdlib", "train").documents()).split("\n\n")
    short = [part for part in parts if 60 < len(part) < 240]
    items = [part for part in short if part.lstrip().startswith(("*", "-"))][: SET + TRIED]
    sentences = [part for part in short if part[0].isupper()][: SET + TRIED]
    found = measure_hidden_states(lm, items[:SET], sentences[:SET], token="mean", policy=policy_for(lm)).states
    rows = [[np.asarray(lm.tokenizer.encode(part)[0]) for part in texts[SET:]] for texts in (items, sentences)]
    width, generator = len(found[0].direction), torch.Generator().manual_seed(0)
    chosen = np.linspace(0, len(found) - 1, FOUND).round().astype(int).tolist()
    directions = [found[layer].direction.float() for layer in chosen]
    directions += [*normalize(torch.randn(20 - FOUND, width, generator=generator))]
    patterns = present(lm.module, WRITING)

    def losses():
        return np.array([np.concatenate(score_rows(lm, own)).mean() for own in rows])

    def ablate(direction):
        direction = direction.to(lm.device, lm.dtype)
        change(lm.module, patterns, lambda weight: weight.sub_(torch.outer(direction, direction @ weight)))

    before, worse, undone = losses(), [], 0.0
    with snapshot(lm, *patterns) as kept:
        for direction in directions:
            ablate(direction)
            worse.append(losses() - before)
            began = time.perf_counter()
            kept.restore()
            undone += time.perf_counter() - began
    assert losses().tolist() == before.tolist()
    table = np.array(worse)
    values = {
        f"{kind}_of_{name}": Value(float(rows_of[:, column].mean()), "nats/token")
        for kind, rows_of in (("found", table[:FOUND]), ("random", table[FOUND:]))
        for column, name in enumerate(("items", "sentences"))
    }
    values |= {"undone_seconds": Value(undone / 20, "s", higher_is_better=False), "separation": found[chosen[-1]].separation}
    print(f"\n{lm.spec}: " + ", ".join(f"{name} {value!r}" for name, value in values.items()))
    for layer, row in zip([*chosen, *["random"] * (20 - FOUND)], table, strict=True):
        print(f"  {layer}: {row[0]:+.4f} {row[1]:+.4f}")
    lmeval.record(lm, "ablated directions", **values)
