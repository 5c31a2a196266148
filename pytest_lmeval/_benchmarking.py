"""Let pytest-benchmark drive the timed runs, and add the parts of a run to its table and its JSON.

It has one time for a test, that of a whole run, which alone `--benchmark-compare-fail` looks at. The parts of a run become rows
of their own (`test_latency[ttft]`), which `--benchmark-compare` and other tools find; percentiles, tokens a second and bytes
are in `extra_info["lmeval"]`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lmeval.profiling._clock import device_clock

if TYPE_CHECKING:
    from pytest_lmeval.profiling._runner import Runner
    from pytest_lmeval.records._measured import Record

OURS, PARTS = "lmeval", "parts"
ROWS = ("prefill", "ttft", "itl", "decode", "chunk", "request")  # parts that get a row
WHOLE = ("e2e", "batch", "stream")  # pytest-benchmark has their row, if the test measured one thing
COLUMNS = ("_mean", "_min", "_max", "_std")  # statistics that pytest-benchmark has columns for
LONGEST = 100  # characters of a parameter: pytest-benchmark would write whole tensors


class Driver:
    """The fixture `benchmark` of a test, if it uses it, times its first measurement; those after it run in a bare loop."""

    def __init__(self, benchmark: Any = None) -> None:
        self._benchmark, self._free = benchmark, benchmark is not None

    def runner(self) -> Runner:
        """The runner of the next measurement."""
        from pytest_lmeval.profiling._runner import Runner

        if self._benchmark is not None and self._benchmark.disabled:
            return self.idle("pytest-benchmark is disabled: the step ran once, untimed")
        return Runner(self._times, name="pytest-benchmark") if self._is_free() else Runner()

    def idle(self, why: str) -> Runner:
        """A runner that times nothing."""
        from pytest_lmeval.profiling._runner import Runner

        if self._benchmark is not None and self._benchmark.disabled:  # if enabled, it would keep the time of this call
            self._times(lambda: None)  # without a call, it warns that it was not used
        return Runner(not_measured=why)

    def _is_free(self) -> bool:
        return self._free and getattr(self._benchmark, "stats", None) is None  # the test may have used it itself

    def _times(self, run: Callable[[], Any], rounds: int = 1) -> None:
        if self._is_free():
            self._free = False
            self._benchmark.pedantic(run, rounds=rounds, iterations=1)

    def raise_error(self, error: Exception) -> None:
        """Raise the error inside pytest-benchmark, too, so that it leaves the test out."""

        def fail() -> None:
            raise error

        self._times(fail)
        raise error

    def describe(self, record: Record, samples: dict[str, list[float]]) -> None:
        """Add the metrics, and the times of the parts in seconds, to what pytest-benchmark keeps with the test's times."""
        if self._benchmark is None:
            return
        figures = {name: float(metric) for name, metric in record.metrics.items() if not name.endswith(COLUMNS)}
        where = {"device": record.lm.device, "threads": record.settings.get("threads")}
        info = {"lm": record.lm.spec, "kind": record.kind, "subject": record.subject, **where, **figures}
        if record.not_measured:
            info["not_measured"] = record.not_measured
        if samples:
            info[PARTS] = {name: _stats(times) for name, times in samples.items() if name in ROWS + WHOLE and times}
        self._benchmark.extra_info.setdefault(OURS, []).append(info)


def _stats(times: list[float]) -> dict[str, Any]:
    """The statistics in pytest-benchmark's columns."""
    from pytest_benchmark.stats import Stats

    stats: Any = Stats()  # type: ignore[no-untyped-call]
    for time in times:
        stats.update(time)
    return {**stats.as_dict(), "iterations": 1}


class BenchmarkHooks:
    """Implementations of pytest-benchmark's hooks; registered where it is active."""

    def __init__(self) -> None:
        self._compared: list[dict[str, Any]] = []

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_compare_machine_info(self, compared_benchmark: dict[str, Any]) -> None:
        """Keep a stored run that pytest-benchmark is about to compare with this one."""
        self._compared.append(compared_benchmark)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Set the clock, which waits for the device, unless the test or the command line names another one."""
        if not {"benchmark", "lmeval"} <= set(getattr(item, "fixturenames", ())):
            return
        marker = item.get_closest_marker("benchmark")
        chosen = str(item.config.getoption("benchmark_timer")) != "time.perf_counter"
        if not chosen and (marker is None or "timer" not in marker.kwargs):
            item.add_marker(pytest.mark.benchmark(**{"timer": device_clock, **(marker.kwargs if marker else {})}), append=False)

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """Add the version of torch from its metadata: pytest-benchmark asks before anything is loaded."""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine_info["torch"] = importlib.metadata.version("torch")

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Add a row for each part, without single times; shorten parameters."""
        rows = []
        for row in output_json["benchmarks"]:
            row["params"] = {name: _short(value) for name, value in (row["params"] or {}).items()} or None
            rows.append(_without_parts(row, row["extra_info"].get(OURS)))
            rows += [_without_parts({**row, **names, "stats": stats}, [info]) for names, stats, info in _parts(row)]
        output_json["benchmarks"] = rows

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_group_stats(self, benchmarks: list[dict[str, Any]]) -> None:
        """Add the same rows to the table, and those of the stored run that it is compared with."""
        for row in list(benchmarks):
            known = self._stored_columns(row) if row["path"] is not None else None
            for names, stats, _info in _parts(row):
                columns = stats if known is None else known.get(names["fullname"])
                if columns is not None:
                    benchmarks.append({**row, **names, **columns})

    def _stored_columns(self, row: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Statistics by full name of the stored run that this row comes from."""
        runs = ({stored["fullname"]: stored["stats"] for stored in run["benchmarks"]} for run in self._compared)
        return next((run for run in runs if run.get(row["fullname"], {}).get("total") == row["total"]), {})


class WithoutBenchmark:
    """Replaces pytest-benchmark where it is blocked, so that tests that use `benchmark` still run."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    @pytest.fixture(name="benchmark")
    def benchmark_fixture(self) -> WithoutBenchmark:
        return WithoutBenchmark()

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def pedantic(
        self, target: Callable[..., Any], args: Any = (), kwargs: Any = None, rounds: int = 1, warmup_rounds: int = 0, **_: Any
    ) -> Any:
        for _round in range(warmup_rounds + rounds - 1):
            target(*args, **(kwargs or {}))
        return target(*args, **(kwargs or {}))


def _parts(row: dict[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Names, statistics and info of a row's parts; the names have the subject if one test measured several."""
    infos = [info for info in row["extra_info"].get(OURS, []) if PARTS in info]
    for info in infos:
        subject = "" if len(infos) == 1 else f"{info['subject']}, "
        for part, stats in info[PARTS].items():
            if subject or part not in WHOLE:
                yield {key: f"{row[key]}[{subject}{part}]" for key in ("name", "fullname")}, stats, info


def _without_parts(row: dict[str, Any], infos: list[dict[str, Any]] | None) -> dict[str, Any]:
    if infos is None:
        return row
    bare = [{name: value for name, value in info.items() if name != PARTS} for info in infos]
    return {**row, "extra_info": {**row["extra_info"], OURS: bare}}


def _short(value: Any) -> Any:
    if isinstance(value, int | float | bool | None):
        return value
    return value[:LONGEST] if isinstance(value, str) else type(value).__name__
