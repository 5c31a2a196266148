"""Train the demo model that the package ships: `python benchmarks/train_demo.py` (half an hour on two cores).

Muon (Jordan et al., 2024) updates the matrices, AdamW the rest; one cycle of warm-up and linear decay. Writes the weights in
half precision to `pytest_lmeval/zoo/demo.safetensors`; `benchmarks/test_demo.py` measures them.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pytest_lmeval.data import corpus
from pytest_lmeval.zoo._demo import WEIGHTS, Demo

ROWS, LENGTH = 16, 512


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1600)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", default=str(WEIGHTS))
    arguments = options.parse_args()

    torch.manual_seed(arguments.seed)
    text, held_out = read("train"), read("validation")
    model = Demo()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1.02 - step / arguments.steps, 1.0))
        for optimizer in optimizers
    ]

    started = time.perf_counter()
    for step in range(arguments.steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (ROWS,))
        crops = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
        loss = next_byte_loss(model, crops)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
            minutes = (time.perf_counter() - started) / 60
            with torch.no_grad():
                bits = next_byte_loss(model, held_out[None]).item() / math.log(2)
            print(f"step {step + 1}  loss {loss:.3f}  validation {bits:.3f} bits per byte  {minutes:.1f} min", flush=True)
            save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, arguments.out)


def read(split: str) -> Tensor:
    text = "".join(document.text for document in corpus("stdlib", split).documents())
    return torch.tensor(list(text.encode()))


def next_byte_loss(model: Demo, rows: Tensor) -> Tensor:
    logits, _ = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


if __name__ == "__main__":
    main()
