"""The plugin as users run it: options, fixtures, records, reports, and what happens where something is missing."""

import json
import sys

import pytest

from pytest_lmeval.records._schema import json_schema

READS = """
    def test_reads(lmeval, lm, corpus):
        result = lmeval.perplexity(lm, corpus("text:text.txt"))
        assert result.perplexity < 500
        assert result.perplexity.low < result.perplexity < result.perplexity.high
"""


def metrics(pytester, folder=".lmeval"):
    return json.loads((pytester.path / folder / "metrics.json").read_text())


def run(pytester, *options, lm="tiny:Tiny"):
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *(["--lm", lm] if lm else []), *options)


def test_a_test_records_what_it_measures(project):
    project.makepyfile(test_reading=READS)
    result = run(project)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "*= lmeval =*",
            "tiny:Tiny: 4,784 parameters*",
            "test_reading.py::test_reads",
            "    text:text.txt?test?, exact-any-chunk",
            "*perplexity * to *",
            "*bits per byte*",
            "written to .lmeval: metrics.json, summary.md, report.html",
        ]
    )
    document = metrics(project)
    (record,) = document["records"]
    assert document["schema"] == 2
    assert document["run"]["exit_status"] == 0
    assert (record["test"], record["kind"], record["outcome"]) == ("test_reading.py::test_reads", "perplexity", "passed")
    assert record["certificate"]["verdict"] == "exact-any-chunk"
    assert record["cost"]["tokens"] == 60 * 59 - 2  # the file ends without a newline, and its first byte is no target
    assert (project.path / ".lmeval/report.html").read_text().startswith("<!doctype html>")
    assert (
        "| test\\_reading.py::test\\_reads<br>tiny:Tiny, text:text.txt\\[test\\] | perplexity |"
        in (project.path / ".lmeval/summary.md").read_text()
    )


def test_what_is_written_fits_the_published_schema(project):
    jsonschema = pytest.importorskip("jsonschema")

    project.makepyfile(
        test_all=READS
        + """
    def test_laws(lmeval, lm):
        assert lmeval.equivalence(lm).verdict == "exact-any-chunk"

    def test_speed(lmeval, lm, benchmark):
        assert lmeval.latency(lm, runs=20, warm_up=1).itl > 0
        assert lmeval.throughput(lm, batch_size=4, seq_len=16).tokens_per_second > 0

    def test_own(lmeval, lm):
        lmeval.record(lm, "passkey", accuracy=0.5)
"""
    )
    run(project).assert_outcomes(passed=4)
    schema = json_schema()
    jsonschema.validate(metrics(project), schema)
    assert [record["kind"] for record in metrics(project)["records"]] == [
        "perplexity", "equivalence", "latency", "throughput", "custom",
    ]  # fmt: skip


def test_a_fixture_of_ones_own_replaces_the_model(project):
    project.makeconftest(
        "import pytest\nfrom tiny import Tiny\n@pytest.fixture(scope='session')\ndef lm():\n    return Tiny()\n"
    )
    project.makepyfile(test_reading=READS)
    run(project, lm=None).assert_outcomes(passed=1)
    assert metrics(project)["records"][0]["lm"]["spec"] == "tiny:Tiny"


def test_several_models_are_parameters_and_one_is_not(project):
    project.makepyfile(test_reading=READS)
    result = run(project, "--lm", "tiny:Tiny@fp32", "-v")
    result.stdout.fnmatch_lines(["*test_reads?tiny:Tiny? PASSED*", "*test_reads?tiny:Tiny@fp32? PASSED*"])
    assert {record["lm"]["spec"] for record in metrics(project)["records"]} == {"tiny:Tiny", "tiny:Tiny@fp32"}
    run(project, "-v").stdout.fnmatch_lines(["*test_reading.py::test_reads PASSED*"])


def test_every_option_has_an_ini_twin(project):
    project.makefile(
        ".ini",
        pytest="""
            [pytest]
            lm = tiny:Tiny
            lmeval_dir = out/put
            lmeval_tokens = 1.1k
            lmeval_budget = 0.1
            lmeval_device = cpu
            lmeval_bits = 16
        """,
    )
    project.makepyfile(test_reading=READS)
    run(project, lm=None).assert_outcomes(passed=1)
    (record,) = metrics(project, "out/put")["records"]
    assert record["cost"]["tokens"] == 1099
    assert record["lm"]["dtype"] == "bfloat16"
    run(project, "--lmeval-tokens", "1500", "--lmeval-bits=32", lm=None).assert_outcomes(passed=1)
    (record,) = metrics(project, "out/put")["records"]
    assert (record["cost"]["tokens"], record["lm"]["dtype"]) == (1499, "float32")


def test_sequence_lengths_are_parameters(project):
    project.makepyfile("def test_length(seq_len, lmeval, lm):\n    lmeval.latency(lm, seq_len=seq_len, runs=1, warm_up=0)\n")
    result = run(project, "--lmeval-seq-len=8", "--lmeval-seq-len=16")
    result.assert_outcomes(passed=2)
    assert [record["settings"]["seq_len"] for record in metrics(project)["records"]] == [8, 16]


def test_several_lengths_and_a_test_that_does_not_say_which(project):
    project.makepyfile("def test_length(lmeval, lm):\n    lmeval.latency(lm, runs=1, warm_up=0)\n")
    result = run(project, "--lmeval-seq-len=8", "--lmeval-seq-len=16")
    result.stdout.fnmatch_lines(["*several --lmeval-seq-len were given (8, 16)*take the fixture `seq_len`*"])
    run(project, "--lmeval-seq-len=8").assert_outcomes(passed=1)
    assert metrics(project)["records"][0]["settings"]["seq_len"] == 8


def test_a_local_mirror_replaces_the_hub(project):
    folder = project.path / "mirror/Salesforce/wikitext/wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": f" = Title {n} = \n"}) + "\n" for n in range(50)))
    project.makepyfile(
        "def test_wiki(lmeval, lm, corpus):\n    assert lmeval.perplexity(lm, corpus('wikitext-2', 'test')).tokens > 500\n"
    )
    run(project, "--lmeval-data", "mirror").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lmeval-tokens=many"], "--lmeval-tokens takes a positive number such as 500, 200k or 1M; got 'many'."),
        (["--lmeval-budget=soon"], "--lmeval-budget takes seconds"),
        (["--lmeval-budget=-1"], "--lmeval-budget takes seconds"),
        (["--lmeval-profile=hard"], "--lmeval-profile takes dev, ci or nightly"),
        (["--lmeval-limit=0"], "--lmeval-limit takes a positive number"),
        (["--lmeval-seq-len=abc"], "--lmeval-seq-len takes a positive number; got 'abc'."),
        (["--lmeval-bits=3"], "--lmeval-bits takes 32, 16, 8, 4; got '3'."),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_at_once(project, options, says):
    project.makepyfile(test_reading=READS)
    result = run(project, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{says}*"])
    assert "Traceback" not in result.stderr.str()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lm=tiny:Tinny"], "tiny:Tinny: cannot be imported (*)*"),
        (["--lm=tiny:Tiny", "--lmeval-bits=4"], "*tiny:Tiny@int4 cannot be had: 0.0% of the*"),
    ],
)
def test_a_model_that_cannot_be_had_is_told_in_a_line(project, options, says):
    project.makepyfile(test_reading=READS)
    result = run(project, *options, lm=None)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([says])
    assert "Traceback" not in result.stdout.str()
    assert "def load" not in result.stdout.str()


def test_a_bad_corpus_fails_its_own_test_only(project):
    project.makepyfile(
        test_reading=READS
        + """
    def test_unknown(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("wikitext"))

    def test_empty(lmeval, lm, corpus):
        lmeval.perplexity(lm, [])
"""
    )
    result = run(project)
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        ["*no corpus 'wikitext'. Did you mean wikitext-2?*", "*a stream of fewer than two tokens has nothing to score*"]
    )
    assert "pytest_lmeval/" not in result.stdout.str().partition("= lmeval =")[0]
    assert len(metrics(project)["records"]) == 1


def test_a_model_that_cannot_be_streamed_is_refused_with_the_counterexample(project):
    project.makepyfile(
        test_wrong="""
        import pytest
        from tiny import Tiny

        class Forgetful(Tiny):
            def forward(self, input_ids, state=None):
                return super().forward(input_ids, None)

        class Seeing(Tiny):
            def forward(self, input_ids, state=None):
                logits, state = super().forward(input_ids, state)
                return logits + logits.mean(1, keepdim=True), state

        class StepOnly(Tiny):
            def forward(self, input_ids, state=None):
                return super().forward(input_ids, state if input_ids.shape[1] == 1 else None)

        @pytest.mark.parametrize("model", [Forgetful, Seeing])
        def test_refused(lmeval, corpus, model):
            lmeval.perplexity(model(), corpus("text:text.txt"), tokens=200)

        def test_windows(lmeval, corpus):
            result = lmeval.perplexity(Forgetful(), corpus("text:text.txt"), tokens=200, window=50)
            assert result.certificate.verdict == "inexact"

        def test_steps(lmeval, corpus):
            result = lmeval.perplexity(StepOnly(), corpus("text:text.txt"), tokens=100)
            assert (result.chunks, result.certificate.chunking_used) == (99, "carried in chunks of 1")
            exact = lmeval.perplexity(Tiny(), corpus("text:text.txt"), tokens=100)
            assert float(result.nll) == pytest.approx(float(exact.nll))

        class InFours(Tiny):
            def forward(self, input_ids, state=None):
                logits, state = super().forward(input_ids, state)
                return logits, state * 0.9 if input_ids.shape[1] % 4 else state

        class Rows(Tiny):
            def forward(self, input_ids, state=None):
                logits, state = super().forward(input_ids, state)
                return logits + 0.01 * (logits.mean(0, keepdim=True) - logits), state

        def test_multiples(lmeval, corpus):
            exact = lmeval.perplexity(Tiny(), corpus("text:text.txt"), tokens=201)
            model = InFours()
            result = lmeval.perplexity(model, corpus("text:text.txt"), tokens=201, chunk_size=8)
            assert result.certificate.verdict == "exact-multiple-of-4"
            assert float(result.nll) == pytest.approx(float(exact.nll))
            assert lmeval.perplexity(model, corpus("text:text.txt"), tokens=201).record.settings["chunk_size"] == 1024
            with pytest.raises(Exception, match="in multiples of 4 only, and chunk_size=6"):
                lmeval.perplexity(model, corpus("text:text.txt"), tokens=201, chunk_size=6)

        def test_one_row_does_not_mind_its_neighbours(lmeval, corpus):
            result = lmeval.perplexity(Rows(), corpus("text:text.txt"), tokens=201)
            assert result.certificate.verdict == "inexact"

        def test_chunks_of_a_step_only_model(lmeval, corpus):
            lmeval.perplexity(StepOnly(), corpus("text:text.txt"), chunk_size=16)
        """
    )
    result = run(project, "--lmeval-budget=60")  # which multiple is exact shows only after all cases
    result.assert_outcomes(passed=4, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*Forgetful is inexact:*",
            "*splits: * tokens (seed 0) in pieces of *: log-probabilities off by*",
            '*pytest_lmeval.replay(lm, "splits", length=*',
            "*Seeing is non-causal:*",
            "*It is exact one token at a time only, and chunk_size=16 was asked for*",
        ]
    )


def test_a_counterexample_is_kept_and_tried_first_in_the_next_run(project):
    project.makepyfile(
        test_wrong="""
        from tiny import Steps, Tiny

        class Rare(Tiny):
            def forward(self, input_ids, state=None):
                hidden, seen = state or (None, 0)
                wrong = seen == 70 and input_ids.shape[1] == 3
                logits, hidden = super().forward(input_ids, None if wrong else hidden)
                return logits, (hidden, seen + input_ids.shape[1])

        def test_verdicts(lmeval):
            result, rare = lmeval.equivalence(Steps()), lmeval.equivalence(Rare())
            assert result.verdict == "exact-step-only"
            print("looked", result.record.settings["profile"], result.record.settings["budget"], rare.laws["splits"].kept)
        """
    )
    first = run(project, "-s", "--lmeval-budget=0", "--lmeval-profile=nightly")
    first.stdout.fnmatch_lines(["*looked nightly 0.0 True*"])
    file = project.path / ".lmeval/counterexamples.jsonl"
    (kept,) = [json.loads(line) for line in file.read_text().splitlines() if '"law": "splits"' in line]
    with file.open("a") as lines:
        lines.write(json.dumps({**kept, "lm": "test_wrong:Rare", "case": {"length": 90, "cuts": [70, 73]}}) + "\n")
    run(project, "-s", "--lmeval-budget=0").stdout.fnmatch_lines(["*looked * False*"])


def test_an_output_folder_that_cannot_be_written_is_told_before_the_work(project):
    (project.path / "file").write_text("in the way")
    project.makepyfile(test_reading="def test_never_runs(lmeval):\n    open('ran', 'w')\n")
    result = run(project, "--lmeval-dir=file/out")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*nothing can be written to the output folder*file/out*--lmeval-dir*"])
    assert not (project.path / "ran").exists()


def test_under_xdist_too(project):
    pytest.importorskip("xdist")
    (project.path / "file").write_text("in the way")
    project.makepyfile(test_reading="def test_never_runs(lmeval):\n    open('ran', 'w')\n")
    result = run(project, "--lmeval-dir=file/out", "-n", "2")
    result.stdout.fnmatch_lines(["*nothing can be written to the output folder*file/out*--lmeval-dir*"])
    assert "INTERNALERROR" not in result.stdout.str()
    assert not (project.path / "ran").exists()


def test_a_project_with_a_corpus_of_its_own_pays_nothing(project):
    project.makepyfile(
        """
        import sys, pytest

        @pytest.fixture
        def corpus():
            return ["a", "b"]

        def test_own(corpus):
            assert "torch" not in sys.modules
        """
    )
    bare = project.run(sys.executable, "-m", "pytest", "--lm", "tiny:Tiny")  # in no process that has imported it before
    bare.assert_outcomes(passed=1)
    assert not (project.path / ".lmeval").exists()


def test_a_windowed_number_is_refused_where_something_is_left_over(project):
    project.makepyfile(
        """
        import pytest, torch
        from tiny import Tiny

        class Noisy(Tiny):
            def forward(self, input_ids, state=None):
                logits, state = super().forward(input_ids, state)
                return logits + torch.randn(()), state * 1.0 + torch.randn(())

        def test_noisy(lmeval, corpus):
            lmeval.perplexity(Noisy(), corpus("text:text.txt"), window=100)
        """
    )
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*is inexact*", "*Repair what makes the same text read differently the second time*"])


def test_two_models_of_one_class_get_a_verdict_each(project):
    project.makepyfile(
        """
        from tiny import Tiny

        class Mode(Tiny):
            def __init__(self, forget):
                super().__init__()
                self.forget = forget

            def forward(self, input_ids, state=None):
                return super().forward(input_ids, None if self.forget else state)

        def test_both(lmeval):
            assert lmeval.equivalence(Mode(False)).verdict == "exact-any-chunk"
            assert lmeval.equivalence(Mode(True)).verdict == "inexact"
        """
    )
    run(project).assert_outcomes(passed=1)


def test_a_model_is_let_go_after_its_test(project):
    project.makepyfile(
        """
        import gc, weakref
        from tiny import Tiny

        alive = []

        def test_measures(lmeval, corpus):
            model = Tiny()
            alive.append(weakref.ref(model))
            lmeval.perplexity(model, corpus("text:text.txt"), tokens=200)

        def test_is_gone():
            gc.collect()
            assert alive[0]() is None
        """
    )
    run(project).assert_outcomes(passed=2)


def test_collecting_writes_nothing_and_loads_no_model(project):
    project.makepyfile(test_reading=READS, broken="raise RuntimeError('was imported')")
    result = run(project, "--collect-only", "-q", lm="broken:build")
    result.stdout.fnmatch_lines(["test_reading.py::test_reads"])
    assert not (project.path / ".lmeval").exists()


def test_evaluations_can_be_left_out_by_their_marker(project):
    project.makepyfile(test_reading=READS, test_other="def test_other():\n    pass\n")
    run(project, "-m", "not lmeval", "--strict-markers").assert_outcomes(passed=1, deselected=1)


SPEED = """
    import pytest

    @pytest.mark.benchmark
    def test_speed(lmeval, lm, benchmark):
        result = lmeval.latency(lm, runs=12, warm_up=2)
        if result.not_measured is None:
            assert result.prefill.n == 12
            assert len(benchmark.stats.stats.data) == 12
            assert benchmark.extra_info["lmeval"][0]["itl"] > 0
"""


def test_pytest_benchmark_keeps_the_times(project):
    project.makepyfile(test_speed=SPEED)
    result = run(project, "--benchmark-json=benchmark.json")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*benchmark: 4 tests*"])
    row, *_parts = json.loads((project.path / "benchmark.json").read_text())["benchmarks"]
    assert row["stats"]["rounds"] == 12
    assert row["extra_info"]["lmeval"][0]["lm"] == "tiny:Tiny"


def test_where_pytest_benchmark_is_blocked_speed_is_measured_without_it(project):
    project.makefile(".ini", pytest="[pytest]\naddopts = --strict-markers\nlmeval_budget = 0.1\n")
    project.makepyfile(
        """
        import pytest

        @pytest.mark.benchmark
        def test_speed(lmeval, lm, benchmark):
            assert lmeval.latency(lm, runs=12, warm_up=2).prefill.n == 12
        """
    )
    run(project, "-p", "no:benchmark").assert_outcomes(passed=1)


@pytest.mark.parametrize("options", [["--benchmark-disable"], ["-n", "2"]], ids=["disabled", "xdist"])
def test_a_test_that_looks_at_a_time_that_was_not_taken_is_skipped_with_the_reason(project, options):
    project.makepyfile(
        """
        import pytest

        def test_answers_at_once(lmeval, lm, benchmark):
            assert lmeval.latency(lm).ttft < 1e9

        @pytest.fixture
        def ttft(lmeval, lm, benchmark):
            return lmeval.latency(lm).ttft

        def test_by_a_fixture(ttft):
            assert ttft < 1e9
        """
    )
    result = run(project, *options, "-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED * test_a_test_that_looks_*.py:4: ttft was not measured: *untimed*"])


@pytest.mark.parametrize("options", [["--benchmark-disable"], ["-n", "2"]], ids=["disabled", "xdist"])
def test_without_pytest_benchmark_speed_is_not_measured_and_quality_is(project, options):
    if "-n" in options:
        pytest.importorskip("xdist")
    project.makefile(".ini", pytest="[pytest]\naddopts = --strict-markers\nlmeval_budget = 0.1\n")
    project.makepyfile(test_speed=SPEED, test_reading=READS)
    result = run(project, *options)
    result.assert_outcomes(passed=2)
    records = {record["kind"]: record for record in metrics(project)["records"]}
    assert "perplexity" in records["perplexity"]["metrics"]
    assert records["latency"]["metrics"] == {}
    assert "untimed" in records["latency"]["not_measured"]
    result.stdout.fnmatch_lines(["*not measured*"])


def test_xdist_workers_send_their_records(project):
    pytest.importorskip("xdist")
    project.makepyfile(
        test_many="""
        import pytest

        @pytest.mark.parametrize("tokens", [50, 100, 150, 200])
        def test_reads(lmeval, lm, corpus, tokens):
            lmeval.perplexity(lm, corpus("text:text.txt"), tokens=tokens)
        """
    )
    run(project, "-n", "2").assert_outcomes(passed=4)
    parallel = {record["test"]: record["metrics"]["nll"] for record in metrics(project)["records"]}
    run(project).assert_outcomes(passed=4)
    alone = {record["test"]: record["metrics"]["nll"] for record in metrics(project)["records"]}
    assert {name: nll["value"] for name, nll in parallel.items()} == pytest.approx(
        {name: nll["value"] for name, nll in alone.items()}
    )


@pytest.mark.parametrize("options", [["-p", "no:xdist"], ["-p", "no:terminalreporter"], ["-s"], ["-p", "no:capture"]])
def test_it_works_without_what_it_can_do_without(project, options):
    project.makepyfile(test_reading=READS)
    assert run(project, *options).ret == 0
    assert len(metrics(project)["records"]) == 1


def test_losses_go_to_a_file_on_request(project):
    project.makepyfile(
        """
        import numpy as np

        def test_losses(lmeval, lm, corpus):
            result = lmeval.perplexity(lm, corpus("text:text.txt"), tokens=500, losses=True)
            losses = np.load(".lmeval/" + result.record.examples)
            assert losses.shape == (499,)
        """
    )
    run(project).assert_outcomes(passed=1)


def test_a_failed_assertion_shows_the_number_with_its_interval(project):
    project.makepyfile(
        "def test_hopeless(lmeval, lm, corpus):\n    assert lmeval.perplexity(lm, corpus('text:text.txt')).perplexity < 1\n"
    )
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines(
        [r"E +(AssertionError: )?assert \d+\.?\d* \[\d.*, .*\] < 1", r"E .*perplexity of tiny:Tiny on text:text.txt\[test\]"]
    )
    assert metrics(project)["records"][0]["outcome"] == "failed"
