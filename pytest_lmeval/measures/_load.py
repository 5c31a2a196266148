"""Send the requests of one load to a server, and hold what came of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._servers import _streamed as streamed


@dataclass(frozen=True)
class Load:
    """How requests are sent: `size` of them under way at once, or, if `open`, `size` of them a second."""

    size: float
    open: bool

    def __str__(self) -> str:
        return f"{self.size:g} requests a second" if self.open else f"{self.size:g} at once"


@dataclass(frozen=True)
class Point:
    """What one load did.

    requests  in the order in which they were sent
    busy      processor time of this process, over the time of the load
    """

    load: Load
    requests: Sequence[streamed.Request]
    busy: float

    @property
    def good(self) -> list[streamed.Request]:
        return [request for request in self.requests if not request.error]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(request.ended for request in self.requests) - min(request.due for request in self.requests)

    @property
    def output_rate(self) -> float:
        return sum(request.tokens for request in self.good) / self.seconds

    def samples(self) -> dict[str, list[float]]:
        """Seconds by name."""
        good = self.good
        return {
            "ttft": [request.ttft for request in good],
            "itl": [gap for request in good for gap in request.gaps],
            "tpot": [tpot for request in good if (tpot := request.tpot) is not None],
            "e2e": [request.e2e for request in good],
        }


@dataclass(frozen=True)
class Sending:
    """What is sent: the `prompts` in turn, or random ones of `prompt_tokens` tokens, for answers of `new_tokens`."""

    prompts: Sequence[str] | None
    prompt_tokens: int
    new_tokens: int
    seed: int

    def ask(self, lm: Model, load: Load, requests: int, number: int) -> Point:
        """Send the requests of one load. Each `number` has random prompts of its own, so that none is in a cache."""
        served = served_by(lm)
        if self.prompts:
            texts: list[Any] = [self.prompts[index % len(self.prompts)] for index in range(requests)]
        else:
            generator = np.random.default_rng([self.seed, number + 1])
            texts = generator.integers(0, lm.vocab_size, (requests, self.prompt_tokens)).tolist()
            if served.facts.text_only:
                texts = [str(getattr(lm.tokenizer, "decode")(ids)) for ids in texts]  # noqa: B009 - not every tokenizer has it
        payloads = [streamed.payload_of(served.facts, text, self.new_tokens) for text in texts]
        gaps = np.random.default_rng([self.seed, number + 1, 1]).exponential(1 / load.size, requests)
        moments = (np.cumsum(gaps) - gaps[0]).tolist()

        async def work() -> list[streamed.Request]:
            async with served.client.connections(None) as http:
                if load.open:
                    return await streamed.open_loop(http, payloads, moments)
                return await streamed.closed_loop(http, payloads, int(load.size))

        collecting = gc.isenabled()
        gc.disable()
        began, processor = time.perf_counter(), time.process_time()
        try:
            found = served.client.run(work())
        finally:
            if collecting:
                gc.enable()
        return Point(load, found, (time.process_time() - processor) / (time.perf_counter() - began))


def served_by(lm: Model) -> Any:
    """The server of a model. Raises ProfilingError for a model that is not behind an address."""
    if lm.served is None or not hasattr(lm.served, "client"):
        raise ProfilingError(
            f"{lm.spec} is not behind an address, so no requests can be sent to it. Give server:URL, or measure the model "
            "itself with lmeval.latency and lmeval.throughput."
        )
    return lm.served
