"""Send streaming requests by a schedule, and note when each token came, by the clock of the client.

Closed loop: so many requests under way, the next one is sent as one ends. Open loop: requests are sent when they are due,
however many are under way, as those of users are. A request that fails is not tried again: it counts as failed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_lmeval.errors import described
from pytest_lmeval.models._servers._client import together
from pytest_lmeval.models._servers._kind import refuse_unfinished

PATH = "/v1/completions"
SAID = 200  # characters of an error that are kept


@dataclass
class Request:
    """One request under load; moments are seconds of the client's clock.

    due     when it should be sent
    sent    when it was
    pieces  (moment, tokens) of each piece of its answer
    ended   when its answer ended
    tokens  generated, as the server counts them; without its count, those of the pieces
    error   why it failed, in words; empty if it did not
    """

    due: float
    sent: float = 0.0
    pieces: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds from when it was due to its first token."""
        return self.pieces[0][0] - self.due

    @property
    def e2e(self) -> float:
        """Seconds from when it was due to its last token."""
        return self.pieces[-1][0] - self.due

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for a single one."""
        after = self.tokens - self.pieces[0][1]
        return (self.pieces[-1][0] - self.pieces[0][0]) / after if after > 0 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens. A piece of n tokens counts as n gaps of equal length."""
        found = []
        for (before, _), (moment, count) in zip(self.pieces, self.pieces[1:], strict=False):
            found += [(moment - before) / count] * count
        return found


def payload_of(facts: Any, prompt: Any, new_tokens: int) -> dict[str, Any]:
    """What asks for a streamed answer of so many tokens, which servers that are known generate whatever ends an answer."""
    known = {"ignore_eos": True} if facts.kind in ("vLLM", "SGLang", "llama.cpp") else {}
    ids = {"return_token_ids": True} if facts.kind == "vLLM" else {}
    return {
        "model": facts.model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **known,
        **ids,
    }


async def closed_loop(http: Any, payloads: Sequence[dict[str, Any]], concurrency: int) -> list[Request]:
    """Send all, at most `concurrency` of them under way."""
    clock, found, waiting = asyncio.get_running_loop().time, list[Request](), iter(payloads)

    async def worker() -> None:
        for payload in waiting:
            request = Request(clock())
            found.append(request)
            await _send(http, payload, request, clock)

    await together([worker() for _ in range(min(concurrency, len(payloads)))])
    return found


async def open_loop(http: Any, payloads: Sequence[dict[str, Any]], moments: Sequence[float]) -> list[Request]:
    """Send each at its moment, in seconds from the beginning."""
    clock = asyncio.get_running_loop().time
    began = clock()
    requests = [Request(began + moment) for moment in moments]

    async def one(payload: dict[str, Any], request: Request) -> None:
        await asyncio.sleep(request.due - clock())
        await _send(http, payload, request, clock)

    await together([one(payload, request) for payload, request in zip(payloads, requests, strict=True)])
    return requests


async def _send(http: Any, payload: dict[str, Any], request: Request, clock: Callable[[], float]) -> None:
    request.sent = clock()
    try:
        async with http.stream("POST", PATH, json=payload) as response:
            if response.status_code >= 400:
                body = (await response.aread()).decode(errors="replace")
                request.error = f"status {response.status_code}: {' '.join(body.split())[:SAID]}"
            else:
                await _read(response.aiter_lines(), request, clock)
    except Exception as error:  # noqa: BLE001 - of the connection, or an answer that is none
        request.error = described(error)[:SAID]
    request.ended = clock()


async def _read(lines: AsyncIterator[str], request: Request, clock: Callable[[], float]) -> None:
    """Read the events of an answer, `data: {...}` each, up to `data: [DONE]`."""
    finished, counted = False, None
    async for line in lines:
        moment = clock()
        if not line.startswith("data:"):
            continue  # blank lines, comments that keep the connection alive, other fields
        text = line[5:].strip()
        if text == "[DONE]":
            finished = True
            break
        event = json.loads(text)
        if event.get("error"):
            raise ValueError(f"the server says {json.dumps(event['error'])}")
        usage = event.get("usage") or {}
        counted = usage.get("completion_tokens", counted)
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids")
            count = len(ids) if ids is not None else int(bool(choice.get("text")))
            if count:
                request.pieces.append((moment, count))
            refuse_unfinished(choice.get("finish_reason"))
            finished = finished or choice.get("finish_reason") is not None
    if not finished:
        raise ValueError(f"the stream broke off after {sum(count for _, count in request.pieces)} tokens")
    if not request.pieces:
        raise ValueError("the answer has no token")
    request.tokens = sum(count for _, count in request.pieces) if counted is None else int(counted)
