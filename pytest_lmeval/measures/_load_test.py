"""Put a server under load: times by the client's clock, tokens and good requests a second, and where more load stops helping.

Requests are streamed. In an open loop a request counts from when it was due, so that a server that is late with one is not
forgiven for those that wait behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median as median_of
from typing import Any

import numpy as np

from pytest_lmeval.errors import ProfilingError, SpecError
from pytest_lmeval.measures._context import current, verb_of
from pytest_lmeval.measures._load import Load, Point, Sending, served_by
from pytest_lmeval.measures._load_checks import check_prompts, loads_of, objectives
from pytest_lmeval.models._identity import facts
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._servers import _streamed as streamed
from pytest_lmeval.models._servers._client import CONCURRENCY
from pytest_lmeval.profiling._cost_metrics import ENOUGH
from pytest_lmeval.profiling._runner import Runner, Timed, check_counts
from pytest_lmeval.profiling._samples import MILLISECONDS, median, spread
from pytest_lmeval.records._measured import Cost, MetricValue, Record, Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._paired import log_ratio
from pytest_lmeval.statistics._proportion import wilson

REQUESTS, PROMPT, NEW, WARM_UP, ROUNDS = 100, 128, 64, 4, 5
LATE, BUSY = 0.1, 0.8  # of the median time to first token; of a core: a client beyond them is the bottleneck
SHOWN = 3  # errors that a record quotes
FIRST_ROUND = 1000  # number of the first load of a race, whose prompts no other load has


@dataclass(frozen=True, repr=False)
class LoadTestResult(Timed):
    """Times in milliseconds, medians over the requests; rates over the whole load. Of several loads, those of the knee."""

    ttft = MetricValue()
    """From when a request was due to its first token."""
    itl = MetricValue()
    """Between tokens."""
    tpot = MetricValue()
    """Per output token after the first, of a request."""
    e2e = MetricValue()
    """From when a request was due to its last token."""
    requests_per_second = MetricValue()
    """Requests answered in a second."""
    output_tokens_per_second = MetricValue()
    """Tokens generated in a second, of all requests."""
    goodput = MetricValue()
    """Requests answered in a second that keep to the service level."""
    failed = MetricValue("failed_requests")
    """Fraction of the requests that failed."""
    knee = MetricValue("load_knee")
    """The smallest load that reaches nearly the best output rate of any load."""


def measure_load_test(
    lm: Model,
    *,
    rate: float | Sequence[float] | None = None,
    concurrency: int | Sequence[int] | None = None,
    requests: int = REQUESTS,
    prompts: Sequence[str] | None = None,
    prompt_tokens: int = PROMPT,
    new_tokens: int = NEW,
    warm_up: int = WARM_UP,
    slo: Mapping[str, float] | None = None,
    against: str | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
    runner: Runner | None = None,
) -> LoadTestResult:
    """Send `requests` streaming requests to a served model, and time them.

    rate           requests a second that are sent whatever is under way (open loop; gaps are exponential, drawn by `seed`), or
                   several rates, one after the other
    concurrency    requests under way at once, the next one sent as one ends (closed loop), or several numbers; by default 8
    prompts        texts, taken in turn; by default `prompt_tokens` random tokens each, no two of which share a beginning
    new_tokens     generated for each; servers that are known do not end before
    warm_up        requests before, which do not count
    slo            the service level: the most milliseconds of "ttft", "itl" (the mean of a request), "tpot" or "e2e"
    against        another server, asked the same in turns, `rounds` times each: metrics `ttft_ratio` and so on, new / base,
                   `lm` / `against`, with intervals from the pairs of rounds

    Raises ProfilingError for a model that is not served, for a load that makes no sense, and where every request failed.
    """
    longest = served_by(lm).facts.longest
    loads = loads_of(rate, concurrency)
    check_counts(requests=requests, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    check_counts(least=0, warm_up=warm_up, seed=seed)
    check_prompts(prompts)
    if prompts is None and longest is not None and prompt_tokens + new_tokens > longest:
        raise ProfilingError(
            f"{lm.spec} reads at most {longest:,} tokens, those that it generates included: fewer than a prompt of "
            f"{prompt_tokens:,} and {new_tokens:,} new ones."
        )
    slo = objectives({} if slo is None else slo)
    other = None if against is None else _other(against)
    runner = runner or Runner()
    settings = {
        "load": [str(load) for load in loads], "requests": requests, "prompt_tokens": None if prompts else prompt_tokens,
        "prompts": len(prompts) if prompts else None, "new_tokens": new_tokens, "warm_up": warm_up,
        "slo": dict(slo) or None, "against": against, "rounds": rounds if against else None, "seed": seed,
    }  # fmt: skip
    if runner.not_measured is not None:
        return LoadTestResult(_record(lm, settings, str(loads[0]), {}, not_measured=runner.not_measured))
    sending = Sending(prompts, prompt_tokens, new_tokens, seed)
    if warm_up:
        sending.ask(lm, Load(min(warm_up, CONCURRENCY), open=False), warm_up, -1)
    points: list[Point] = []
    runner.repeat(lambda: points.extend(sending.ask(lm, load, requests, number) for number, load in enumerate(loads)), 1)
    point, knee = _at_the_knee(points[: len(loads)])
    if not point.good:
        errors = "; ".join(dict.fromkeys(request.error for request in point.requests))
        raise ProfilingError(f"{lm.spec}: none of {len(point.requests)} requests was answered: {errors[:500]}.")
    metrics = _values(point, slo) | knee
    samples = point.samples()
    details = _details(points[: len(loads)])
    if other is not None:
        metrics |= _raced(lm, other, sending, loads[0], max(1, requests // rounds), rounds)
    record = _record(lm, settings, str(point.load), metrics, points=points[: len(loads)], slo=slo, details=details)
    return LoadTestResult(record, {"request" if name == "e2e" else name: times for name, times in samples.items()})


load_test = verb_of("load_test", measure_load_test)


def _other(against: str) -> Model:
    """The server that is raced. Raises ProfilingError for what is none."""
    try:
        other = current().model(against)
    except SpecError as error:
        raise ProfilingError(f"against={against!r} is no server: {error}") from error
    served_by(other)
    return other


def _at_the_knee(points: Sequence[Point]) -> tuple[Point, dict[str, Value]]:
    """The point that counts, and of several the load of the knee."""
    if len(points) == 1:
        return points[0], {}
    enough = ENOUGH * max(point.output_rate for point in points)
    found = next(point for point in points if point.output_rate >= enough)
    return found, {"load_knee": value_of("load_knee", found.load.size, n=len(points), unit=_unit(found.load))}


def _unit(load: Load) -> str:
    return "requests/s" if load.open else "requests"


def _values(point: Point, slo: Mapping[str, float]) -> dict[str, Value]:
    samples, count, seconds = point.samples(), len(point.requests), point.seconds
    found = {name: median(name, times) for name, times in samples.items() if times}
    if gaps := samples["itl"]:  # those of one request are alike: an interval takes as many of each
        even = len({len(request.gaps) for request in point.good}) == 1
        itl = median("itl", gaps, runs=len(point.good) if even else None)
        found["itl"] = itl if even else value_of("itl", float(itl), None, n=len(gaps))
    for name, times in samples.items():
        found |= spread(name, times) if times else {}
    within = [not request.error and _keeps(request, slo) for request in point.requests]
    low, high = wilson(within) or (0.0, 1.0)
    rate = count / seconds
    found |= {
        "requests_per_second": value_of("requests_per_second", len(point.good) / seconds, n=len(point.good)),
        "output_tokens_per_second": value_of("output_tokens_per_second", point.output_rate, n=len(point.good)),
        "failed_requests": value_of(
            "failed_requests", 1 - len(point.good) / count, wilson([bool(one.error) for one in point.requests]), n=count
        ),
        "client_busy": value_of("client_busy", point.busy, n=count),
    }
    if slo:
        found["goodput"] = value_of("goodput", sum(within) / seconds, (low * rate, high * rate), n=count)
    return found


def _keeps(request: streamed.Request, slo: Mapping[str, float]) -> bool:
    gaps = request.gaps
    times = {"ttft": request.ttft, "e2e": request.e2e, "tpot": request.tpot, "itl": sum(gaps) / len(gaps) if gaps else None}
    return all((time := times[name]) is None or MILLISECONDS * time <= most for name, most in slo.items())


def _details(points: Sequence[Point]) -> dict[str, Any]:
    errors = [request.error for point in points for request in point.requests if request.error]
    return {
        "tokens_generated": sum(request.tokens for point in points for request in point.good),
        "late_ms": max(MILLISECONDS * (request.sent - request.due) for point in points for request in point.requests),
        **({"errors": list(dict.fromkeys(errors))[:SHOWN]} if errors else {}),
    }


def _record(
    lm: Model,
    settings: dict[str, Any],
    load: str,
    metrics: dict[str, Value],
    *,
    points: Sequence[Point] = (),
    slo: Mapping[str, float] | None = None,
    details: dict[str, Any] | None = None,
    not_measured: str | None = None,
) -> Record:
    notes = []
    for point in points:
        first = median_of([request.ttft for request in point.good] or [math.inf])
        late = float(np.quantile([request.sent - request.due for request in point.requests], 0.95))
        if late > LATE * first or point.busy > BUSY:
            notes.append(
                f"at {point.load} this client was the bottleneck: requests were sent up to {MILLISECONDS * late:.3g} ms late, "
                f"and it took {point.busy:.0%} of a core"
            )
    if details and (errors := details.get("errors")):
        notes.append(f"failed: {'; '.join(errors)}")
    return Record(
        kind="load_test",
        subject=f"{load}, {settings['new_tokens']} tokens",
        lm=facts(lm),
        settings=settings,
        details=details or {},
        notes=notes,
        not_measured=not_measured,
        metrics=metrics,
        cost=Cost(
            seconds=sum(point.seconds for point in points), tokens=sum(one.tokens for point in points for one in point.good)
        ),
        series=_series(points, slo or {}) if len(points) > 1 else {},
    )


def _series(points: Sequence[Point], slo: Mapping[str, float]) -> dict[str, Series]:
    """Curves over the load."""
    x, unit = [point.load.size for point in points], _unit(points[0].load)
    answered = [point for point in points if point.good]
    loads = [point.load.size for point in answered]
    found = {
        "output_by_load": Series(x, [point.output_rate for point in points], unit, "tokens/s", "Output by load", "x"),
        "ttft_by_load": Series(
            loads, [MILLISECONDS * median_of(point.samples()["ttft"]) for point in answered], unit, "ms",
            "Time to first token by load", "xy",
        ),
    }  # fmt: skip
    if slo:
        good = [sum(not one.error and _keeps(one, slo) for one in point.requests) / point.seconds for point in points]
        found["goodput_by_load"] = Series(x, good, unit, "requests/s", "Requests within the service level, by load", "x")
    return found


def _raced(lm: Model, other: Model, sending: Sending, load: Load, requests: int, rounds: int) -> dict[str, Value]:
    """Ratios of two servers, asked in turns: what disturbs the machine disturbs both of a pair."""
    sides = {"base": other, "new": lm}
    found: dict[str, dict[str, list[float]]] = {who: {} for who in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 else list(sides)[::-1]
        for who in order:
            point = sending.ask(sides[who], load, requests, FIRST_ROUND + number)
            if not point.good:
                raise ProfilingError(
                    f"{sides[who].spec}: no request of round {number + 1} was answered: {point.requests[0].error}."
                )
            values = {name: median_of(times) for name, times in point.samples().items() if times}
            for name, value in (values | {"output_tokens_per_second": point.output_rate}).items():
                found[who].setdefault(name, []).append(value)
    ratios = {}
    for name in found["new"].keys() & found["base"].keys():
        if len(found["new"][name]) == len(found["base"][name]) == rounds:
            difference = log_ratio(found["base"][name], found["new"][name])
            low, high = difference.low, difference.high
            bounds = None if low is None or high is None else (math.exp(low), math.exp(high))
            ratios[f"{name}_ratio"] = value_of(f"{name}_ratio", math.exp(difference.value), bounds, n=rounds)
    return dict(sorted(ratios.items()))
