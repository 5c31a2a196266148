"""The random numbers that a model draws, set for one device.

`torch.manual_seed` sets those of every kind of device there could be, and where one is not there it writes down who asked, with
the whole stack. That takes thirty times as long and more, in each of the thousands of cases of a probe.
"""

from __future__ import annotations

import torch


def reseed(device: torch.device, seed: int) -> None:
    """What a model on this device draws from now on, there or on the CPU, is what it drew after this seed before. Other
    devices, over which the parts of a model may be spread, are left as they are."""
    torch.default_generator.manual_seed(seed)
    generator_of(device).manual_seed(seed)


def generator_of(device: torch.device) -> torch.Generator:
    """The one that dropout on this device draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator
