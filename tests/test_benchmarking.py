"""pytest-benchmark's table, storage and comparisons show the parts of a measured run."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from tiny_models import Stateless

from pytest_lmeval._session import Session
from pytest_lmeval.errors import ProfilingError, SpecError
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.models._sources import as_model

PAGE = """
    import pytest

    @pytest.mark.parametrize("seq_len", [4, 8])
    def test_latency(lmeval, lm, benchmark, seq_len):
        lmeval.latency(lm, seq_len=seq_len, runs=5, warm_up=1)
"""
MORE = """
    import time, torch
    FEW = {"runs": 5, "warm_up": 1}

    def test_grid(lmeval, lm, benchmark):
        lmeval.latency_grid(lm, seq_lens=(4, 8), **FEW)
        assert len(benchmark.stats.stats.data) == 5

    @pytest.mark.parametrize("weights", [torch.zeros(1000)])
    @pytest.mark.benchmark(timer=time.monotonic)
    def test_timer(lmeval, lm, benchmark, weights):
        lmeval.latency(lm, seq_len=4, **FEW)

    @pytest.mark.benchmark(group="fast")
    def test_grouped(lmeval, lm, benchmark):
        lmeval.latency(lm, seq_len=4, **FEW)

    def test_without_lmeval(benchmark):
        benchmark(int)

    def test_after_another_benchmark(lmeval, lm, benchmark):
        benchmark(int)
        assert lmeval.latency(lm, seq_len=4, runs=1, warm_up=0).record.details["timed_by"] == "bare loop"
"""
PARTS = ["", "[prefill]", "[ttft]", "[itl]"]


def saved(project, name="benchmark.json"):
    return json.loads((project.path / name).read_text())


def run(project, *options):
    return project.runpytest_subprocess("-p", "no:cacheprovider", "--lm", "tiny:Tiny", *options)


def test_each_part_of_a_run_is_a_row_in_the_table_and_in_the_file(project):
    project.makepyfile(test_speed=PAGE + MORE)
    run(project, "--benchmark-json=benchmark.json").assert_outcomes(passed=7)
    assert saved(project)["machine_info"]["torch"] == importlib.metadata.version("torch")
    rows = {row["name"]: row for row in saved(project)["benchmarks"]}
    assert list(rows)[:8] == [f"test_latency[{n}]{part}" for n in (4, 8) for part in PARTS]
    assert {row["fullname"].partition("::")[0] for row in rows.values()} == {"test_speed.py"}
    whole, itl = rows["test_latency[4]"], rows["test_latency[4][itl]"]
    assert (itl["stats"]["rounds"], whole["stats"]["rounds"]) == (5 * 7, 5)
    assert itl["stats"]["max"] < whole["stats"]["max"]

    (info,) = whole["extra_info"]["lmeval"]  # what has no column
    assert info["decode_tokens_per_second"] > 0
    assert (info["lm"], info["device"], info["threads"] >= 1) == ("tiny:Tiny", "cpu", True)
    assert not any("parts" in info for row in rows.values() for info in row["extra_info"].get("lmeval", []))
    assert not any("data" in rows[f"test_latency[4]{part}"]["stats"] for part in PARTS[1:])  # the file stays small

    parts = [name for name in rows if name.startswith("test_grid[")]  # of two measurements, named by their subjects
    assert parts == [f"test_grid[batch 1, {n} tokens, {part}]" for n in (4, 8) for part in ("prefill", "ttft", "e2e", "itl")]
    assert [len(rows[name]["extra_info"]["lmeval"]) for name in ("test_grid", *parts)] == [2] + [1] * 8

    timers = {name: row["options"]["timer"] for name, row in rows.items() if name.partition("[")[0] != "test_latency"}
    (weights,) = (name for name in rows if name.startswith("test_timer[") and name.endswith("]") and "][" not in name)
    assert rows[weights]["params"] == {"weights": "Tensor"}
    assert (timers[weights], timers["test_grouped"], timers["test_without_lmeval"]) == (
        "monotonic",
        "device_clock",
        "perf_counter",
    )
    assert rows["test_grouped"]["group"] == rows["test_grouped[itl]"]["group"] == "fast"


def test_a_stored_run_is_compared_part_by_part(project):
    project.makepyfile(test_speed=PAGE)
    options = ("--benchmark-group-by=param:seq_len", "--benchmark-timer=time.process_time")
    run(project, "--benchmark-save=base", *options).stdout.fnmatch_lines(
        ["*benchmark 'seq_len=4': 4 tests*", "test_latency?4??itl? *", "*benchmark 'seq_len=8': 4 tests*"]
    )
    (path,) = project.path.glob(".benchmarks/*/0001_base.json")
    stored = json.loads(path.read_text())
    assert stored["benchmarks"][0]["options"]["timer"] == "process_time"
    result = run(project, "--benchmark-compare", "-k", "4", "--benchmark-name=short")
    result.stdout.fnmatch_lines(["*benchmark: 8 tests*"])
    lines = [line.split(" ")[:2] for line in result.outlines if line.startswith("latency[4]")]
    assert sorted(lines) == sorted([f"latency[4]{part}", source] for part in PARTS for source in ("(0001)", "(NOW)"))
    listed = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare"], cwd=project.path, capture_output=True, text=True, check=True
    )
    assert "test_latency[4][ttft]" in listed.stdout

    stored["benchmarks"] = stored["benchmarks"][:1]  # an older run, without parts, is compared as a whole
    path.write_text(json.dumps(stored))
    run(project, "--benchmark-compare", "-k", "4").stdout.fnmatch_lines(["*benchmark: 5 tests*"])


def test_a_model_or_machine_that_fails_at_a_shape_fails_the_test_and_keeps_what_was_measured(project):
    project.makepyfile(
        test_speed="""
        import torch
        from tiny import Tiny

        class Failing(Tiny):
            error = RuntimeError("no kernel for four rows")

            def forward(self, input_ids, state=None):
                if len(input_ids) == 4:
                    raise self.error
                return super().forward(input_ids, state)

        def test_throughput(lmeval, benchmark):
            lmeval.throughput(Failing(), batch_size=4, seq_len=4, runs=2)

        def measure(lmeval, error):
            lm = Failing()
            lm.error = error
            lmeval.latency(lm, seq_len=8, runs=2)
            lmeval.latency(lm, batch_size=4, seq_len=8, runs=2)

        def test_memory(lmeval):
            measure(lmeval, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))

        def test_device(lmeval):
            measure(lmeval, RuntimeError("CUDA error: device-side assert triggered"))
        """
    )
    result = run(project)
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(["E * *:Failing failed at batch 4, 4 tokens: *no kernel for four rows*"])
    result.stdout.fnmatch_lines(["E *does not fit into memory*2.0 GiB*"])
    result.stdout.fnmatch_lines(["E *cpu was lost during latency of *Failing* with batch_size=4*"])
    result.stdout.no_fnmatch_line("*profiling/_*.py*")
    throughput, *latencies = saved(project, ".lmeval/metrics.json")["records"]
    assert throughput["series"]["batch_scaling"]["x"] == [1.0, 2.0]
    assert "no kernel" in throughput["details"]["failed"]["4"]
    assert [record["subject"] for record in latencies] == ["batch 1, 8 tokens"] * 2


@pytest.mark.parametrize("verb", ["latency", "throughput", "memory", "efficiency"])
def test_every_verb_refuses_a_length_of_zero(verb):
    with pytest.raises(ProfilingError, match="seq_len is 0"):
        getattr(Lmeval(VerbContext()), verb)(as_model(Stateless()), seq_len=0)


def test_a_model_in_other_bits_than_the_option_asks_for_is_refused():
    lmeval = Lmeval(VerbContext(Session(bits=16)))
    with pytest.raises(SpecError, match=r"--lmeval-bits 16 asks for bf16, and .*Stateless was handed over in fp32"):
        lmeval.latency(Stateless())
    assert lmeval.latency(Stateless().bfloat16(), seq_len=4, runs=1).prefill > 0
