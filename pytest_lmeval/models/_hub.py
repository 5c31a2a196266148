"""Reach the Hugging Face hub within time limits, and say why it was not reached.

Within a `HubCall`, every request of huggingface_hub, and so of datasets and transformers, is limited:

    an attempt   ends after a third of the limit without the whole head of an answer: names, connections and redirects included
    a request    is tried again after errors that pass (ATTEMPTS), and ends after the limit, as does the body of metadata
    a body       of a file may take its time, but brings RATE bytes a second, averaged over the limit
    an upload    may take its time, but each of its reads and writes ends after the limit; huggingface_hub tries it again
    a call       ends with its first request that failed: what is in the cache is used, the rest raises HubError

The limit is LMEVAL_HUB_TIMEOUT seconds (60 by default), or what HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT set, if that is
more. Outside of a `HubCall` nothing is limited, and in offline mode nothing is sent.
"""

from __future__ import annotations

import contextvars
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from types import ModuleType, TracebackType
from typing import Any, ClassVar

from pytest_lmeval.errors import ArgumentError, HubError, described

VARIABLE = "LMEVAL_HUB_TIMEOUT"
LIMIT = 60.0
RATE = 1000  # bytes a second; an answer counts as ten seconds of it
ATTEMPTS = 4
PASSING = (408, 429, 500, 502, 503, 504)
AGAIN = 300.0  # seconds until a host that could not be reached is tried again, since each attempt takes long


def limit() -> float:
    """The limit, in seconds. Raises ArgumentError if the environment variable holds no positive number."""
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or LIMIT)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ArgumentError(f"{VARIABLE} is {text!r}; it is a number of seconds above 0, such as {LIMIT:.0f}.")
    return seconds


class HubCall:
    """A context in which requests to the hub are limited; may be entered again, to continue the same reading.

    Raises HubError on leaving, if the block raised an error because of the hub.
    """

    active: ClassVar[list[HubCall]] = []
    resting: ClassVar[dict[str, tuple[float, HubError]]] = {}  # host -> until when it is not asked, and why
    _lock: ClassVar[threading.RLock] = threading.RLock()
    _xet_disabled: ClassVar[Any] = None

    def __init__(self) -> None:
        self.limit = limit()
        self.failed: dict[str, HubError] = {}  # by host
        self.refused: HubError | None = None  # the last answer with an error
        self.waited = 0.0  # for answers and bodies, since the rate was last checked
        self.received = 0.0
        self.broken = 0  # bodies, likewise

    def __enter__(self) -> HubCall:
        from huggingface_hub import constants, get_session

        with self._lock:
            client = get_session()
            if "send" not in vars(client):
                vars(client)["send"] = _limited(client)
            if not self.active:  # Xet's own client has no limits
                HubCall._xet_disabled, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
            self.active.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        from huggingface_hub import constants

        with self._lock:
            self.active.remove(self)
            if not self.active:
                constants.HF_HUB_DISABLE_XET = self._xet_disabled
        own = isinstance(error, HubError)  # it says itself what the hub did
        if isinstance(error, Exception) and not own and (found := self._reason_of(error)) is not None:
            raise found from error

    def _reason_of(self, error: Exception) -> HubError | None:
        """The failure of the hub that an error of a library is about; None if it is about something else."""
        from huggingface_hub import constants

        for cause in _chain(error):
            if found := getattr(cause, "hub_error", None):
                return found  # type: ignore[no-any-return]
            response = getattr(cause, "response", None)
            if (status := getattr(response, "status_code", 0)) >= 400:
                return HubError(f"{_answered(response)}.", status)
        here = self.failed.get(constants.ENDPOINT.partition("//")[2])
        return here or (self.refused if isinstance(error, FileNotFoundError) else None)

    def count(self, seconds: float, size: float, url: Any) -> None:
        """Count seconds of waiting and what they brought. Fails if it is too little."""
        self.waited, self.received = self.waited + seconds, self.received + size
        if self.waited >= self.limit:
            if self.received < RATE * self.waited:
                self.fail(url, f"it drips: {self.received:.0f} bytes in {self.waited:.0f} s, and {RATE} a second are expected")
            self.waited = self.received = self.broken = 0

    def broke(self, error: Exception, url: Any) -> None:
        """Count a body that ended too early; the libraries go on where it ended. Fails if that does not end."""
        self.broken += 1
        if self.broken > ATTEMPTS:
            self.fail(url, f"its answers break off ({described(error)})")

    def fail(self, url: Any, why: str, status: int = 0, rest: float = AGAIN) -> None:
        """Raise the error that makes libraries use what is in their caches, as in offline mode."""
        if not status:
            why = (
                f"{url.host} could not be reached: {why}. Check the network, the proxy and HF_ENDPOINT "
                f"({VARIABLE} sets the limit, {self.limit:g} s); without a network, use a folder or a mirror (--lmeval-data)"
            )
        found = self.failed.setdefault(_host(url), HubError(f"{why}.", status))
        self.resting[_host(url)] = time.monotonic() + rest, found
        raise _unreachable(found)

    def send(self, httpx: ModuleType, original: Callable[..., Any], request: Any, stream: bool, options: dict[str, Any]) -> Any:
        """Send a request as `original` does, within the limits."""
        import tenacity
        from huggingface_hub import constants

        url = request.url
        until, before = self.resting.get(_host(url), (0.0, None))
        if before is not None and (left := until - time.monotonic()) > 0:
            self.failed.setdefault(_host(url), HubError(f"{before} It is asked again after {left:.0f} s.", before.status))
        if _host(url) in self.failed:
            raise _unreachable(self.failed[_host(url)])
        if _is_upload(request):
            return self.upload(httpx, original, request, stream=stream, **options)
        given = request.extensions.get("timeout", {})
        names = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
        longest = max([0.0, *(getattr(constants, name) for name in names if name in os.environ)])
        total, each = max(self.limit, longest), max(self.limit / 3, longest)
        counted = request.method == "HEAD" and _host(url) != constants.ENDPOINT.partition("//")[2]  # a count of downloads
        metadata = not stream and "range" not in request.headers
        began = time.monotonic()

        def attempt() -> Any:
            started = time.monotonic()
            seconds = max(min(each, began + total - started), 0.001)
            request.extensions["timeout"] = {
                name: min(given.get(name) or each, seconds) for name in ("connect", "read", "write", "pool")
            }
            response = _within(seconds, original, request, stream=not metadata, **options)
            if response.status_code in PASSING:
                response.close()
                raise _Passing(response)
            if response.status_code >= 400:
                self.refused = HubError(f"{_answered(response)}.", response.status_code)
            self.count(time.monotonic() - started, 10 * RATE, url)
            if not metadata:
                response.stream = _counted(httpx, self, response)
                if not stream:
                    response.read()
            return response

        back_off = tenacity.wait_exponential(multiplier=self.limit / LIMIT)  # 1, 2, 4 s
        trying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(1 if counted else ATTEMPTS) | tenacity.stop_before_delay(total),
            wait=lambda state: max(_retry_after(state.outcome.exception() if state.outcome else None), back_off(state)),
            retry=tenacity.retry_if_exception_type((_Passing, TimeoutError, httpx.TransportError)),
            reraise=True,
        )
        try:
            return trying(attempt)
        except _Passing as error:
            status, seconds = error.response.status_code, _retry_after(error)
            self.fail(url, _answered(error.response), status, rest=seconds if status == 429 else 0)
        except TimeoutError:
            self.fail(url, f"no whole answer within {each:.3g} s, tried for {total:g} s")
        except httpx.TransportError as error:
            self.fail(url, described(error))

    def upload(self, httpx: ModuleType, original: Callable[..., Any], request: Any, **options: Any) -> Any:
        """Send a request whose body is a file or a commit, once: only the library can read its body again."""
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), self.limit)
        try:
            return original(request, **options)
        except httpx.TransportError as error:
            why = f"{request.url.host} could not be sent {request.url.path}: {described(error)}"
            error.hub_error = HubError(f"{why}. Check the network; the same call goes on with what is missing.")
            raise


class _Passing(Exception):
    """An answer with a status that may pass."""

    def __init__(self, response: Any) -> None:
        super().__init__(response)
        self.response = response


def _limited(client: Any) -> Callable[..., Any]:
    """The `send` of a client, limited while there is a `HubCall`."""
    original = client.send
    named = next(kind for kind in type(client).__mro__ if kind.__name__ == "Client")
    httpx = sys.modules[named.__module__.partition(".")[0]]  # huggingface_hub 1 has httpx, 2 has httpx2

    def send(request: Any, *, stream: bool = False, **options: Any) -> Any:
        if not HubCall.active:
            return original(request, stream=stream, **options)
        return HubCall.active[-1].send(httpx, original, request, stream, options)

    return send


def _within(seconds: float, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function in a thread. Raises TimeoutError after so many seconds, and leaves the thread, which nothing can end."""
    done: futures.Future[Any] = futures.Future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            found = context.run(function, *args, **options)
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
            done.set_exception(error)
        else:
            done.set_result(found)

    threading.Thread(target=work, daemon=True, name="lmeval-hub").start()
    try:
        return done.result(seconds)
    except futures.TimeoutError:
        done.add_done_callback(lambda late: late.exception() or late.result().close())
        raise TimeoutError from None


def _counted(httpx: ModuleType, call: HubCall, response: Any) -> Any:
    """The body of a response, counted."""
    body, url = response.stream, response.request.url

    class Counted(httpx.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            began = time.monotonic()
            try:
                for part in body:
                    call.count(time.monotonic() - began, len(part), url)
                    yield part
                    began = time.monotonic()
            except httpx.TransportError as error:
                call.count(time.monotonic() - began, 0, url)
                call.broke(error, url)
                raise

        def close(self) -> None:
            body.close()

    return Counted()


def _is_upload(request: Any) -> bool:
    return request.method == "PUT" or (request.method == "POST" and "/commit/" in request.url.path)


def _is_writing(request: Any) -> bool:
    return request.method in ("PUT", "POST") and "/paths-info/" not in request.url.path


def _host(url: Any) -> str:
    return str(url.netloc.decode())


def _unreachable(failed: HubError) -> Exception:
    """The error that libraries answer by their caches, and do not try again."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    error = OfflineModeIsEnabled(str(failed))
    error.hub_error = failed  # type: ignore[attr-defined]
    return error


def _answered(response: Any) -> str:
    """What an answer of the hub with an error means, and what to do."""
    status, url = response.status_code, response.request.url
    said = f"{url.host} answered {status} to {url.path}"
    if status == 403 and response.request.method == "PUT":  # a link to the storage, which carries its own permission
        return f"{said}: it refused a file, perhaps since its link has expired. Send it again: the same call goes on"
    if status in (401, 403) and _is_writing(response.request):
        token = "the token may not write there" if "authorization" in response.request.headers else "nobody is logged in"
        how = "Log in (`hf auth login`) or set HF_TOKEN, with a token that may write; or propose it (--create-pr)"
        return f"{said}: {token}. {how}"
    if status == 401:
        token = "the token was refused" if "authorization" in response.request.headers else "nobody is logged in"
        return f"{said}: it is private or gated, or does not exist, and {token}. Log in (`hf auth login`), or set HF_TOKEN"
    if status == 403:
        found = re.match(r"/(?:api/)?(?:models/)?((?:datasets/)?[^/]+/[^/]+)", url.path)
        page = f"{url.scheme}://{_host(url)}/{found[1] if found else ''}"
        return f"{said}: it is gated, and your account has no access. Ask for it at {page}, and set HF_TOKEN"
    if status == 404:
        return (
            f"{said}: there is no such repository, revision or file, or it is private. Check the name; log in if it is private"
        )
    if status == 429:
        seconds = _retry_after(_Passing(response))
        wait = f"Wait {seconds:g} s" if seconds else "Wait some minutes"
        return f"{said}: too many requests. {wait} before the next run; with HF_TOKEN the limit is higher"
    if status >= 500:
        return f"{said}: it is down or overloaded, also after some attempts. Nothing is wrong with the name; run again later"
    return f"{said} ({response.reason_phrase})"


def _retry_after(error: BaseException | None) -> float:
    """The seconds that an answer asks to wait; 0 if it does not."""
    text = error.response.headers.get("retry-after", "") if isinstance(error, _Passing) else ""
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
