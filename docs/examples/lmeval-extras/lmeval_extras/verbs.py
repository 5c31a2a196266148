"""A verb: a function that measures a model. In a test it is a method of the fixture `lmeval`."""

from __future__ import annotations

import time
from typing import Any

import torch

from pytest_lmeval import Record, as_model, record

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 10


def words_per_second(lm: Any, text: str = TEXT) -> Record:
    """How many words of a text the model reads a second, all in one step.

    lm  a model: what the fixture `lm` gives, a torch module, or an object with `step`
    """
    model, words = as_model(lm), len(text.split())
    input_ids = torch.tensor([list(model.tokenizer.encode(text)[0])], device=model.device)
    with torch.no_grad():
        model.step(input_ids)  # the first reading pays for what is set up once, and does not count
        began = now(model.device)
        model.step(input_ids)
        seconds = now(model.device) - began
    return record(model, f"{words} words", words_per_second=words / seconds)


def now(device: torch.device) -> float:
    """The time at which the device has done what it was asked for: a GPU works on when the call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
