"""pytest-benchmark as its users know it: its table, its storage and its comparisons show the parts of our runs."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

PAGE = """
    import pytest

    @pytest.mark.parametrize("seq_len", [4, 8])
    def test_latency(lmeval, lm, benchmark, seq_len):
        lmeval.latency(lm, seq_len=seq_len, runs=5, warm_up=1)
"""
PARTS = ["", "[prefill]", "[ttft]", "[itl]"]


@pytest.fixture
def project(pytester):
    pytester.makepyfile(test_speed=PAGE)
    pytester.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\n")
    return pytester


def saved(project, name="benchmark.json"):
    return json.loads((project.path / name).read_text())


def test_each_part_of_a_run_is_a_row_in_the_table_and_in_the_file_and_brings_its_figures(project):
    result = project.runpytest_subprocess("--benchmark-json=benchmark.json", "--benchmark-group-by=param:seq_len")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        ["*benchmark 'seq_len=4': 4 tests*", "test_latency?4??itl? *", "*benchmark 'seq_len=8': 4 tests*"]
    )
    rows = saved(project)["benchmarks"]
    assert [row["name"] for row in rows] == [f"test_latency[{n}]{part}" for n in (4, 8) for part in PARTS]
    assert {row["fullname"].partition("::")[0] for row in rows} == {"test_speed.py"}
    itl, whole = rows[3], rows[0]
    assert (itl["stats"]["rounds"], whole["stats"]["rounds"]) == (5 * 7, 5)
    assert itl["stats"]["max"] < whole["stats"]["min"]

    (info,) = whole["extra_info"]["lmeval"]  # what it has no column for
    assert info["decode_tokens_per_second"] > 0
    assert (info["lm"], info["device"], info["threads"] >= 1) == ("demo", "cpu", True)
    assert whole["options"]["timer"] == "device_clock"
    assert saved(project)["machine_info"]["torch"] == importlib.metadata.version("torch")
    assert not any("parts" in row["extra_info"]["lmeval"][0] for row in rows)  # and the file stays small
    assert not any("data" in row["stats"] for row in rows[1:4])


def test_a_parameter_that_is_a_tensor_is_not_written_down(project):
    project.makepyfile(
        test_speed="""
        import pytest, torch

        @pytest.mark.parametrize("weights", [torch.zeros(1000)])
        def test_latency(lmeval, lm, benchmark, weights):
            lmeval.latency(lm, seq_len=4, runs=5, warm_up=1)
        """
    )
    project.runpytest_subprocess("--benchmark-json=benchmark.json").assert_outcomes(passed=1)
    assert saved(project)["benchmarks"][0]["params"] == {"weights": "Tensor"}


def test_a_stored_run_is_compared_part_by_part(project):
    project.runpytest_subprocess("--benchmark-save=base", "-k", "4")
    result = project.runpytest_subprocess("--benchmark-compare", "-k", "4", "--benchmark-name=short")
    result.stdout.fnmatch_lines(["*benchmark: 8 tests*"])
    lines = [line.split(" ")[:2] for line in result.outlines if line.startswith("latency[4]")]
    assert sorted(lines) == sorted([f"latency[4]{part}", source] for part in PARTS for source in ("(0001)", "(NOW)"))
    listed = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare"], cwd=project.path, capture_output=True, text=True, check=True
    )
    assert "test_latency[4][ttft]" in listed.stdout

    (path,) = project.path.glob(".benchmarks/*/0001_base.json")  # one of before, without parts, is compared as far as it goes
    stored = json.loads(path.read_text())
    stored["benchmarks"] = stored["benchmarks"][:1]
    path.write_text(json.dumps(stored))
    project.runpytest_subprocess("--benchmark-compare", "-k", "4").stdout.fnmatch_lines(["*benchmark: 5 tests*"])


def test_a_second_measurement_in_a_test_has_rows_that_say_which_it_is(project):
    project.makepyfile(
        test_speed="""
        def test_grid(lmeval, lm, benchmark):
            grid = lmeval.latency_grid(lm, seq_lens=(4, 8), runs=5, warm_up=1)
            assert len(benchmark.stats.stats.data) == 5
        """
    )
    project.runpytest_subprocess("--benchmark-json=benchmark.json").assert_outcomes(passed=1)
    names = [row["name"] for row in saved(project)["benchmarks"]]
    assert "test_grid[batch 1, 4 tokens, itl]" in names
    assert "test_grid[batch 1, 8 tokens, itl]" in names
    assert "test_grid[batch 1, 8 tokens, e2e]" in names
    infos = [row["extra_info"]["lmeval"] for row in saved(project)["benchmarks"]]
    assert [len(info) for info in infos] == [2] + [1] * 8  # a part says what is known of its own measurement alone


def test_the_timer_of_a_test_or_of_the_command_line_is_kept(project):
    project.makepyfile(
        test_speed="""
        import time, pytest

        @pytest.mark.benchmark(timer=time.monotonic)
        def test_latency(lmeval, lm, benchmark):
            lmeval.latency(lm, seq_len=4, runs=5, warm_up=1)

        @pytest.mark.benchmark(group="fast")
        def test_grouped(lmeval, lm, benchmark):
            lmeval.latency(lm, seq_len=4, runs=5, warm_up=1)

        def test_not_of_ours(benchmark):
            benchmark(int)
        """
    )
    project.runpytest_subprocess("--benchmark-json=benchmark.json").assert_outcomes(passed=3)
    rows = {row["name"]: row for row in saved(project)["benchmarks"]}
    timers = {name: row["options"]["timer"] for name, row in rows.items() if "][" not in name and not name.endswith("]")}
    assert timers == {"test_latency": "monotonic", "test_grouped": "device_clock", "test_not_of_ours": "perf_counter"}
    assert rows["test_grouped"]["group"] == rows["test_grouped[itl]"]["group"] == "fast"
    project.runpytest_subprocess("--benchmark-json=benchmark.json", "--benchmark-timer=time.process_time", "-k", "grouped")
    assert saved(project)["benchmarks"][0]["options"]["timer"] == "process_time"


def test_a_model_that_fails_at_a_shape_fails_the_test_and_keeps_what_was_measured(project):
    project.makepyfile(
        choosy="""
        from torch import nn

        class Choosy(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(256, 8)

            def forward(self, ids):
                if ids.shape[0] == 4:
                    raise RuntimeError("no kernel for four rows")
                return self.embed(ids) @ self.embed.weight.T
        """,
        test_speed="""
        def test_throughput(lmeval, lm, benchmark):
            lmeval.throughput(lm, batch_size=4, seq_len=4, runs=2)
        """,
    )
    result = project.runpytest_subprocess("--lm", "choosy:Choosy", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E * choosy:Choosy failed at batch 4, 4 tokens: *no kernel for four rows*"])
    (record,) = saved(project, ".lmeval/metrics.json")["records"]
    assert record["series"]["batch_scaling"]["x"] == [1.0, 2.0]
    assert "no kernel" in record["details"]["failed"]["4"]


GIVING_OUT = {
    'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")': "does not fit into memory*2.0 GiB*",
    'RuntimeError("CUDA error: device-side assert triggered")': "cpu was lost during latency of *Failing* with batch_size=1*",
}


@pytest.mark.parametrize(("raised", "said"), GIVING_OUT.items(), ids=["memory", "device"])
def test_a_machine_that_gives_out_fails_the_test_in_words_and_keeps_what_was_measured(project, raised, said):
    project.makepyfile(
        test_speed=f"""
        import torch
        from torch import nn

        class Failing(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.calls = nn.Embedding(256, 8), 0

            def forward(self, ids):
                self.calls += 1
                if ids.shape[1] == 77:
                    raise {raised}
                return self.embed(ids) @ self.embed.weight.T

        def test_latency(lmeval):
            lm = Failing()
            lmeval.latency(lm, seq_len=8, runs=2)
            lmeval.latency(lm, seq_len=77, runs=2)
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"E *{said}"])
    result.stdout.no_fnmatch_line("*profiling/latency.py*")
    assert [record["subject"] for record in saved(project, ".lmeval/metrics.json")["records"]] == ["batch 1, 8 tokens"]


def test_a_length_of_zero_is_refused_by_every_verb_and_so_is_a_model_in_other_bits(project):
    project.makepyfile(
        test_speed="""
        import pytest
        from torch import nn
        from pytest_lmeval.models._model import SpecError
        from pytest_lmeval.profiling._runner import ProfilingError

        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(256, 8)

            def forward(self, ids):
                return self.embed(ids) @ self.embed.weight.T

        @pytest.mark.parametrize("verb", ["latency", "throughput", "memory", "efficiency"])
        def test_zero(lmeval, lm, verb):
            with pytest.raises(ProfilingError, match="seq_len is 0"):
                getattr(lmeval, verb)(lm, seq_len=0)

        def test_bits(lmeval):
            with pytest.raises(SpecError, match="--lmeval-bits 16 asks for bf16, and .*Own was handed over in fp32"):
                lmeval.latency(Own())
            assert lmeval.latency(Own().bfloat16(), seq_len=4, runs=1).prefill > 0

        def test_a_verb_after_a_benchmark_of_ones_own(lmeval, lm, benchmark):
            benchmark(int)
            assert lmeval.latency(lm, seq_len=4, runs=1, warm_up=0).record.details["timed_by"] == "bare loop"
        """
    )
    project.runpytest_subprocess("--lmeval-bits", "16").assert_outcomes(passed=6)
