"""Send many requests to one server at a time, and try again where that helps.

One thread runs the requests of a client, so that they work in a test of any kind. The key of the server is read from the
environment (LMEVAL_API_KEY, or OPENAI_API_KEY) and stands in no message and no record.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import tenacity

from pytest_lmeval.errors import ServerError, SpecError, described

CONCURRENCY = 8
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers after which the same request may succeed
MISSING = (*range(300, 400), 400, 404, 405, 422, 500, 501)  # answers where a server has no such path, or does not take this
ATTEMPTS = 6
CONNECT, ANSWER = 10.0, 900.0  # seconds to connect; without a byte of an answer
CLOSING = 1.0  # seconds that the end of a client is waited for
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts
KEYS = ("LMEVAL_API_KEY", "OPENAI_API_KEY")
SAID = 300  # characters of a server's own message that are shown


T = TypeVar("T")


class _Passing(Exception):
    """An answer after which the same request may succeed."""

    def __init__(self, status: int, body: bytes, retry_after: float) -> None:
        super().__init__(status)
        self.status, self.body, self.retry_after = status, body, retry_after


class Client:
    """Requests to the server at an address."""

    def __init__(self, url: str, spec: str, concurrency: int | None = None) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise SpecError(f"{spec} needs httpx2: pip install 'pytest-lmeval[server]'") from error
        self.url, self.spec, self.concurrency = url, spec, concurrency or CONCURRENCY
        self._httpx = httpx2
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(self._loop,), daemon=True, name="lmeval-server")
        thread.start()
        self._http = self.connections(self.concurrency)
        self._close = weakref.finalize(self, _shut, self._loop, thread, self._http)

    def connections(self, most: int | None) -> Any:
        """An HTTP client for the server, which opens at most so many connections (None: as many as are asked for), and tries
        nothing again."""
        key = next(filter(None, map(os.environ.get, KEYS)), None)
        return self._httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self._httpx.Timeout(ANSWER, connect=CONNECT, pool=None),
            limits=self._httpx.Limits(max_connections=most, max_keepalive_connections=most),
            trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),  # no proxy leads back here
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns that runs in the thread of the requests; it ends with this call."""
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result()
        finally:
            running.cancel()

    def described(self, path: str, missing: tuple[int, ...] = MISSING) -> dict[str, Any]:
        """The JSON object of a path; empty where the server has no such path, or something else there. Raises ServerError if it
        cannot be reached, and for an error that is not of `missing`."""
        found = self._wait(self._asked("GET", path, None, missing=missing, attempts=2))
        return found if isinstance(found, dict) else {}

    def text(self, path: str) -> str:
        """The text of a path; empty where there is none."""
        return str(self._wait(self._asked("GET", path, None, missing=MISSING, attempts=2, as_text=True)) or "")

    def post(self, path: str, payload: dict[str, Any], *, missing: bool = False) -> Any:
        """The JSON that answers a payload; with `missing`, None where the server does not take it. Raises ServerError."""
        return self._wait(self._asked("POST", path, payload, missing=MISSING if missing else ()))

    def each(
        self, jobs: Sequence[tuple[str, dict[str, Any]]], done: Callable[[int, Any], None], *, at_once: int | None = None
    ) -> None:
        """Post (path, payload) of each job, several at once, and call `done` in this thread with its number and its JSON as it
        ends. Raises the first error, after what ended before it was passed on."""
        ended: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._all(jobs, at_once or self.concurrency, ended.put), self._loop)
        work.add_done_callback(lambda _: ended.put(None))
        try:
            while (one := ended.get()) is not None:
                done(*one)
            work.result()
        finally:
            work.cancel()

    async def _all(self, jobs: Sequence[Any], at_once: int, put: Callable[[tuple[int, Any]], None]) -> None:
        waiting = enumerate(jobs)

        async def worker() -> None:
            for number, (path, payload) in waiting:
                put((number, await self._asked("POST", path, payload)))

        await together([worker() for _ in range(min(at_once, len(jobs)))])

    async def _asked(
        self,
        method: str,
        path: str,
        payload: Any,
        *,
        missing: tuple[int, ...] = (),
        attempts: int | None = None,
        as_text: bool = False,
    ) -> Any:
        content = None if payload is None else msgspec.json.encode(payload)
        attempts = attempts or ATTEMPTS

        async def once() -> Any:
            response = await self._http.request(
                method, path, content=content, headers={"Content-Type": "application/json"} if content else None
            )
            if response.status_code in PASSING and response.status_code not in missing:
                raise _Passing(response.status_code, response.content, _seconds(response.headers.get("retry-after", "")))
            return response

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((_Passing, self._httpx.TransportError)),
            stop=tenacity.stop_after_attempt(attempts),
            wait=_pause,
            reraise=True,
        )
        try:
            response: Any = await retrying(once)
        except _Passing as error:
            raise self._refused(method, path, error.status, error.body, attempts) from None
        except self._httpx.TransportError as error:
            raise ServerError(
                f"{self.spec}: {self.url}{path} gave no answer in {attempts} attempts ({described(error)}). Is the server "
                "up, and is this its address? What was answered before is kept: run the same again to continue."
            ) from error
        if response.status_code >= 300:
            if response.status_code in missing:
                return None
            raise self._refused(method, path, response.status_code, response.content, 1, response.headers.get("location", ""))
        return response.text if as_text else self._read(path, response.content, missing=bool(missing))

    def _read(self, path: str, content: bytes, *, missing: bool) -> Any:
        try:
            return msgspec.json.decode(content)
        except msgspec.DecodeError:
            pass
        try:
            return json.loads(content)  # knows NaN, which is no JSON
        except ValueError as error:
            if missing:
                return None
            raise ServerError(
                f"{self.spec}: {self.url}{path} answered no JSON, but {content[:80]!r}. Is it the address of the server's API?"
            ) from error

    def _refused(self, method: str, path: str, status: int, body: bytes, attempts: int, moved: str = "") -> ServerError:
        key = " It asks for a key: set LMEVAL_API_KEY." if status in (401, 403) else ""
        busy = " It is overloaded, or starts: ask less at once (--lmeval-concurrency)." if status in (429, 503) else ""
        there = f" It sends requests on to {moved}: give that address." if moved else ""
        tried = f" after {attempts} attempts" if attempts > 1 else ""
        return ServerError(
            f"{self.spec}: {method} {self.url}{path} was answered with {status}{tried}: {_said(body) or 'no message'}.{key}"
            f"{busy}{there} What was answered before is kept.",
            status,
        )

    def _wait(self, work: Awaitable[Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()  # type: ignore[arg-type]


async def together(work: Sequence[Awaitable[None]]) -> None:
    """Wait for all; where one raises, the others are ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: as long as the server asks for, or twice as long as before."""
    error = state.outcome.exception() if state.outcome else None
    doubled = tenacity.wait_random_exponential(multiplier=2 * FIRST_PAUSE, max=LONGEST_PAUSE, min=FIRST_PAUSE)(state)
    return max(doubled, min(getattr(error, "retry_after", 0.0), 10 * LONGEST_PAUSE))


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _said(body: bytes) -> str:
    """The message in the body of an error."""
    try:
        found = list(_texts(json.loads(body)))
    except ValueError:
        found = [body.decode(errors="replace")]
    return " ".join(" ".join(found).split())[:SAID].rstrip(". ")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        named = [value[name] for name in ("message", "error", "detail", "msg") if name in value]
        for one in named[:1]:
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _shut(loop: asyncio.AbstractEventLoop, thread: threading.Thread, http: Any) -> None:
    """Close the connections, and end the thread. It may be called in that thread, by the collector of garbage, and cannot wait
    there."""

    async def close() -> None:
        try:
            await http.aclose()
        finally:
            loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
    if threading.current_thread() is threading.main_thread():
        thread.join(CLOSING)
