"""Seed the random numbers that a model draws, on one device.

`torch.manual_seed` seeds every kind of device, and is more than thirty times slower if one is missing.
"""

from __future__ import annotations

import torch


def reseed(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of this device."""
    torch.default_generator.manual_seed(seed)
    generator_of(device).manual_seed(seed)


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that dropout on this device draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator
