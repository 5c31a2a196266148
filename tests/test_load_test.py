"""A server under load: each figure is that of the schedule, errors are counted, knee and service level are found."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from stub_server import StubServer
from virtual_time import run

from pytest_lmeval import load, load_test
from pytest_lmeval.errors import ProfilingError
from pytest_lmeval.measures._load import Load, Point
from pytest_lmeval.measures._load_test import _at_the_knee, _values
from pytest_lmeval.models._servers import _streamed as streamed


def event(count, *, text="x", end=None, ids=True):
    choice = {"text": text, "finish_reason": end} | ({"token_ids": list(range(count))} if ids else {})
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


class Scripted(httpx2.AsyncBaseTransport):
    """Answers each request by its script: (seconds to wait, text to send) of each part. `places`: requests answered at once."""

    def __init__(self, script, places=10**6):
        self.script, self.free = script, asyncio.Semaphore(places)

    async def handle_async_request(self, request):
        payload = json.loads(await request.aread())
        found = self.script(payload)
        return found if isinstance(found, httpx2.Response) else httpx2.Response(200, stream=Stream(self, found))


class Stream(httpx2.AsyncByteStream):
    def __init__(self, server, parts):
        self.server, self.parts = server, parts

    async def __aiter__(self):
        async with self.server.free:
            for seconds, text in self.parts:
                await asyncio.sleep(seconds)
                yield text.encode()


def steady(first, gap, tokens, *, each=1):
    """A script: the first token after `first` seconds, the others `gap` seconds apart, `each` of them in a piece."""
    parts = [(first, event(1)), *((gap * each, event(each)) for _ in range((tokens - 1) // each))]
    usage = f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\n"
    return lambda payload: [*parts, (0, event(0, text="", end="length")), (0, usage), (0, "data: [DONE]\n\n")]


def asked(script, requests, *, concurrency=None, moments=None, places=10**6):
    """What came of the requests, in virtual time."""

    async def work():
        server = Scripted(script, places)
        async with httpx2.AsyncClient(transport=server, base_url="http://server") as http:
            payloads = [{"number": number} for number in range(requests)]
            if moments is not None:
                return await streamed.open_loop(http, payloads, moments)
            return await streamed.closed_loop(http, payloads, concurrency)

    return run(work())


def under_way(requests):
    """The most requests at once."""
    return max(sum(other.sent <= one.sent < other.ended for other in requests) for one in requests)


def values(requests, load=None, slo=None):
    return _values(Point(load or Load(1, open=False), requests, 0.1), slo or {})


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 2), st.floats(0.001, 0.5), st.integers(1, 8), st.integers(1, 4), st.integers(1, 3))
def test_every_figure_is_that_of_the_schedule(first, gap, pieces, concurrency, each):
    tokens = 1 + pieces * each
    found = asked(steady(first, gap, tokens, each=each), 12, concurrency=concurrency)
    seen = values(found)
    whole = first + gap * (tokens - 1)
    expected = {"ttft": first, "itl": gap, "tpot": gap, "e2e": whole}
    assert {name: float(seen[name]) for name in expected} == pytest.approx(
        {name: 1000 * seconds for name, seconds in expected.items()}, rel=1e-6
    )
    assert under_way(found) == concurrency
    seconds = -(-12 // concurrency) * whole
    assert seen["requests_per_second"] == pytest.approx(12 / seconds, rel=1e-6)
    assert seen["output_tokens_per_second"] == pytest.approx(12 * tokens / seconds, rel=1e-6)


def test_an_open_loop_sends_when_requests_are_due_and_counts_their_waiting():
    moments = [0.0, 0.1, 0.2, 0.3]
    free = asked(steady(0.5, 0.1, 6), 4, moments=moments)
    assert [request.sent for request in free] == moments
    assert under_way(free) == 4
    queued = asked(steady(0.5, 0.1, 6), 4, moments=moments, places=1)  # each answer takes a second
    assert [request.ttft for request in queued] == pytest.approx([0.5, 1.4, 2.3, 3.2])
    assert [request.sent for request in queued] == moments  # a closed loop would have waited, and hidden it
    closed = asked(steady(0.5, 0.1, 6), 4, concurrency=1, places=1)
    assert [request.ttft for request in closed] == pytest.approx([0.5] * 4)


def test_failures_are_counted_and_named_and_the_others_stand():
    broken = {
        1: httpx2.Response(503, text="overloaded"),
        2: [(0.1, event(1)), (0.1, event(1))],  # ends without an end
        3: [(0.1, 'data: {"error": {"message": "out of memory"}}\n\n')],
        4: [(0.1, "data: no json\n\n")],
        5: [(0.1, event(0, text="", end="stop")), (0, "data: [DONE]\n\n")],
        6: [(0.1, event(1)), (0.1, event(1, end="abort")), (0, "data: [DONE]\n\n")],
    }
    good = steady(0.2, 0.05, 3)
    found = asked(lambda payload: broken.get(payload["number"]) or good(payload), 8, concurrency=8)
    errors = {number: request.error for number, request in enumerate(found) if request.error}
    assert set(errors) == set(broken)
    assert "status 503: overloaded" in errors[1]
    assert "broke off after 2 tokens" in errors[2]
    assert "out of memory" in errors[3]
    assert "no token" in errors[5]
    assert "given up: its finish reason is 'abort'" in errors[6]
    seen = values(found)
    assert seen["failed_requests"] == pytest.approx(6 / 8)
    assert seen["ttft"] == pytest.approx(200)


def test_lines_that_come_in_parts_and_comments_are_read_right():
    text = ": keep-alive\n\n" + event(2) + "event: ping\n\n" + event(1, text="é", end="length") + "data: [DONE]\n\n"
    raw = text.encode()
    parts = [(0.1, raw[at : at + 7].decode("latin1")) for at in range(0, len(raw), 7)]

    def script(payload):
        return [(seconds, part) for seconds, part in parts]

    class Latin(str):
        def encode(self, *_):
            return str.encode(self, "latin1")

    found = asked(lambda payload: [(seconds, Latin(part)) for seconds, part in script(payload)], 1, concurrency=1)
    assert (found[0].tokens, [count for _, count in found[0].pieces], found[0].error) == (3, [2, 1], "")


def test_without_token_ids_a_piece_is_a_token_and_the_server_says_how_many_there_were():
    usage = 'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n'
    parts = [(0.1, event(9, ids=False)), (0.1, event(9, ids=False, end="length")), (0, usage), (0, "data: [DONE]\n\n")]
    found = asked(lambda payload: parts, 1, concurrency=1)
    assert (found[0].tokens, len(found[0].pieces)) == (5, 2)
    assert found[0].tpot == pytest.approx(0.1 / 4)


def test_answers_of_unequal_length_are_timed_too():
    """One has a single token, and so no time per output token, and no gap."""
    scripts = {0: steady(0.1, 0.01, 1), 1: steady(0.1, 0.02, 3), 2: steady(0.1, 0.02, 5)}
    seen = values(asked(lambda payload: scripts[payload["number"] % 3](payload), 12, concurrency=12))
    assert {name: float(seen[name]) for name in ("ttft", "itl", "tpot")} == pytest.approx({"ttft": 100, "itl": 20, "tpot": 20})
    assert (seen["ttft"].n, seen["tpot"].n, seen["itl"].n) == (12, 8, 24)
    assert seen["itl"].interval is None


def test_goodput_counts_what_keeps_to_the_service_level():
    slow = {3, 7}
    fast, late = steady(0.1, 0.01, 5), steady(0.6, 0.01, 5)
    found = asked(lambda payload: (late if payload["number"] in slow else fast)(payload), 10, concurrency=10)
    seen = values(found, slo={"ttft": 500.0})
    seconds = 0.6 + 0.04
    assert seen["goodput"] == pytest.approx(8 / seconds)
    assert seen["goodput"].low < seen["goodput"] < seen["goodput"].high
    assert values(found, slo={"ttft": 500.0, "itl": 1.0})["goodput"] == 0


def test_the_knee_is_the_smallest_load_that_reaches_nearly_the_best_rate():
    points = []
    for size in (1, 2, 4, 8, 16):
        found = asked(steady(0.1, 0.1, 10), 32, concurrency=size, places=4)  # four are answered at once
        points.append(Point(Load(size, open=False), found, 0.1))
    point, knee = _at_the_knee(points)
    assert point.load.size == knee["load_knee"] == 4


class OverSockets(ThreadingHTTPServer):
    """A server that says it is vLLM, and writes each token when it is due."""

    daemon_threads = True

    def __init__(self, first=0.02, gap=0.004):
        super().__init__(("127.0.0.1", 0), Tokens)
        self.first, self.gap, self.asked, self.failing = first, gap, [], 0
        self.spec = f"server:http://127.0.0.1:{self.server_port},tokenizer=bytes@fp32"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Tokens(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *args):
        """Quiet."""

    def do_GET(self):
        known = {"/v1/models": {"data": [{"id": "stub", "owned_by": "vllm"}]}, "/version": {"version": "0"}}
        self.send_response(200 if self.path in known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(known.get(self.path, {})).encode())

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self.send_response(200)
            self.end_headers()
            return self.wfile.write(json.dumps({"tokens": list(payload["prompt"].encode())}).encode())
        if self.path != "/v1/completions":
            return self.send_error(404)
        self.server.asked.append(payload)
        if self.server.failing:
            return self.send_error(500)
        self.send_response(200)
        self.end_headers()
        for number in range(payload["max_tokens"]):
            time.sleep(self.server.gap if number else self.server.first)
            self.wfile.write(event(1).encode())
            self.wfile.flush()
        end = event(0, text="", end="length")
        return self.wfile.write(f"{end}data: [DONE]\n\n".encode())


@pytest.fixture
def server():
    with OverSockets() as found:
        yield found


def test_the_verb_asks_the_server_records_and_says_what_it_sent(server):
    result = load_test(load(server.spec), concurrency=3, requests=9, prompt_tokens=16, new_tokens=4, warm_up=2)
    assert len(server.asked) == 11
    assert {(one["max_tokens"], one["stream"], one["ignore_eos"], len(one["prompt"])) for one in server.asked} == {
        (4, True, True, 16)
    }
    assert len({tuple(one["prompt"][:8]) for one in server.asked}) == 11  # none is in a cache
    assert result.ttft >= 20
    assert result.itl >= 4
    assert result.failed == 0
    assert result.record.details["tokens_generated"] == 36
    assert {len(result.samples[name]) for name in ("ttft", "request")} == {9}
    with pytest.raises(AttributeError):
        result.nothing  # noqa: B018


def test_several_loads_are_curves_and_two_servers_are_raced_in_turns(server):
    result = load_test(load(server.spec), concurrency=[1, 2], requests=4, new_tokens=2, warm_up=0, slo={"ttft": 10_000})
    assert result.record.series["output_by_load"].x == [1, 2]
    assert result.goodput == result.requests_per_second
    with OverSockets(first=0.06) as slower:
        ratio = load_test(
            load(slower.spec), concurrency=1, requests=8, new_tokens=2, warm_up=0, against=server.spec, rounds=4
        ).record.metrics["ttft_ratio"]
    assert ratio.low > 1
    assert ratio.n == 4


def test_a_rate_sends_by_a_schedule_that_the_seed_decides(server):
    result = load_test(load(server.spec), rate=200, requests=20, new_tokens=1, warm_up=0)
    assert result.record.subject.startswith("200 requests a second")
    gaps = np.random.default_rng([0, 1, 1]).exponential(1 / 200, 20)
    assert result.record.cost.seconds >= gaps[1:].sum()


def test_a_server_that_answers_nothing_is_an_error_with_its_words(server):
    lm = load(server.spec)
    server.failing = True
    with pytest.raises(ProfilingError, match=r"none of 3 requests was answered: status 500"):
        load_test(lm, requests=3, warm_up=0, new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1, "concurrency": 1}, "give one of both"),
        ({"concurrency": 0}, "above 0"),
        ({"concurrency": [1, 2.5]}, "counts requests"),
        ({"rate": []}, "above 0, or several"),
        ({"slo": {"tftt": 1}}, "ttft"),
        ({"slo": {"ttft": 0}}, "above 0, in milliseconds"),
        ({"requests": 0}, "requests is 0"),
        ({"requests": 1.5}, "requests is 1.5"),
        ({"new_tokens": "2"}, "new_tokens is '2'"),
        ({"warm_up": -1}, "warm_up is -1; it is 0 or more"),
        ({"prompts": []}, r"list of texts that are not empty, or is left out; got \[\]"),
        ({"prompts": "one"}, "got 'one'"),
        ({"prompts": ["one", 3]}, "list of texts"),
        ({"slo": ["ttft"]}, "slo is a dict such as"),
        ({"slo": {"ttft": "1"}}, "slo allows '1' ms"),
        ({"against": "demo"}, "not behind an address"),
        ({"against": "nosuch"}, "is no server: unknown model spec"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused_before_anything_is_sent(server, options, message):
    with pytest.raises(ProfilingError, match=message):
        load_test(load(server.spec), **options)
    assert server.asked == []


def test_more_tokens_than_the_server_reads_are_refused():
    with StubServer(load("demo"), longest=64) as server, pytest.raises(ProfilingError, match="reads at most 64 tokens"):
        load_test(load(server.spec), prompt_tokens=60, new_tokens=5)


def test_a_model_that_is_not_served_is_refused():
    with pytest.raises(ProfilingError, match="not behind an address"):
        load_test("demo")
