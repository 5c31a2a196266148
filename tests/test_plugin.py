"""The plugin as users run it: options, fixtures, records, reports, and what happens where something is missing."""

import json
import re
import sys

import pytest

from pytest_lmeval.records._schema import json_schema

READS = """
    import pytest
    from tiny import Tiny

    def test_reads(lmeval, lm, corpus):
        result = lmeval.perplexity(lm, corpus("text:text.txt"))
        assert result.perplexity < 500
        assert result.perplexity.low < result.perplexity < result.perplexity.high
"""


def metrics(pytester, folder=".lmeval"):
    return json.loads((pytester.path / folder / "metrics.json").read_text())


def records(pytester, folder=".lmeval"):
    """Records by test."""
    return {record["test"].rpartition("::")[2]: record for record in metrics(pytester, folder)["records"]}


def run(pytester, *options, lm="tiny:Tiny"):
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *(["--lm", lm] if lm else []), *options)


def test_a_run_records_what_its_tests_measure(project):
    jsonschema = pytest.importorskip("jsonschema")
    project.makepyfile(
        test_reading=READS
        + """
    def test_laws(lmeval, lm):
        assert lmeval.equivalence(lm).verdict == "exact-any-chunk"

    def test_speed(lmeval, lm, benchmark):
        assert lmeval.latency(lm, seq_len=16, runs=3, warm_up=1).itl > 0
        assert lmeval.throughput(lm, batch_size=2, seq_len=16, runs=2).tokens_per_second > 0

    def test_own(lmeval, lm):
        lmeval.record(lm, "passkey", accuracy=0.5)

    def test_losses_go_to_a_file(lmeval, lm, corpus):
        import numpy as np
        result = lmeval.perplexity(lm, corpus("text:text.txt"), tokens=500, losses=True)
        assert np.load(".lmeval/" + result.record.examples).shape == (499,)

    class Mode(Tiny):
        def __init__(self, forget):
            super().__init__()
            self.forget = forget

        def forward(self, input_ids, state=None):
            return super().forward(input_ids, None if self.forget else state)

    alive = []

    def test_two_models_of_one_class_have_a_verdict_each(lmeval):
        import weakref
        model = Mode(True)
        alive.append(weakref.ref(model))
        assert lmeval.equivalence(Mode(False)).verdict == "exact-any-chunk"
        assert lmeval.equivalence(model).verdict == "inexact"

    def test_a_model_does_not_outlive_its_test():
        import gc
        gc.collect()
        assert alive[0]() is None
"""
    )
    result = run(project)
    result.assert_outcomes(passed=7)
    result.stdout.fnmatch_lines(
        [
            "*= lmeval =*",
            "tiny:Tiny: 4,784 parameters*",
            "test_reading.py::test_reads",
            "*text:text.txt?test?, exact-any-chunk, 11 of 11 laws, up to 320",
            "*perplexity * to *",
            "*bits per byte*",
            "written to .lmeval: metrics.json, summary.md, report.html",
        ]
    )
    document = metrics(project)
    jsonschema.validate(document, json_schema())
    record, *others = document["records"]
    assert [record["kind"] for record in others[:4]] == ["equivalence", "latency", "throughput", "custom"]
    assert (document["schema"], document["run"]["exit_status"]) == (2, 0)
    assert (record["test"], record["kind"], record["outcome"]) == ("test_reading.py::test_reads", "perplexity", "passed")
    assert record["certificate"]["verdict"] == "exact-any-chunk"
    assert record["cost"]["tokens"] == 60 * 59 - 2  # the file ends without a newline, and its first byte is no target
    assert (project.path / ".lmeval/report.html").read_text().startswith("<!doctype html>")
    summary = (project.path / ".lmeval/summary.md").read_text()
    assert "| test\\_reading.py::test\\_reads<br>tiny:Tiny, text:text.txt\\[test\\] | perplexity |" in summary


# ---------------------------------------------------------------------------------------------------- options


def test_a_fixture_of_the_project_replaces_the_model(project):
    project.makeconftest(
        "import pytest\nfrom tiny import Tiny\n@pytest.fixture(scope='session')\ndef lm():\n    return Tiny()\n"
    )
    project.makepyfile(test_reading=READS)
    run(project, lm=None).assert_outcomes(passed=1)
    assert records(project)["test_reads"]["lm"]["spec"] == "tiny:Tiny"


def test_several_models_are_parameters(project):
    project.makepyfile(test_reading=READS)
    run(project, "--lm", "tiny:Tiny@fp32").assert_outcomes(passed=2)
    named = {name: record["lm"]["spec"] for name, record in records(project).items()}
    assert named == {f"test_reads[{spec}]": spec for spec in ("tiny:Tiny", "tiny:Tiny@fp32")}


def test_every_option_has_an_ini_option(project):
    folder = project.path / "mirror/Salesforce/wikitext/wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": f" = Title {n} = \n"}) + "\n" for n in range(50)))
    project.makefile(
        ".ini",
        pytest="""
            [pytest]
            lm = tiny:Tiny
            lmeval_dir = out/put
            lmeval_tokens = 2.1k
            lmeval_budget = 1000
            lmeval_device = cpu
            lmeval_bits = 16
            lmeval_seq_len = 8
            lmeval_data = mirror
        """,
    )
    project.makepyfile(
        test_reading=READS
        + """
    def test_a_mirror_replaces_the_hub(lmeval, lm, corpus):
        assert lmeval.perplexity(lm, corpus("wikitext-2", "test")).tokens > 500

    def test_length(lmeval, lm):
        lmeval.latency(lm, runs=1, warm_up=0)
"""
    )
    run(project, lm=None).assert_outcomes(passed=3)
    found = records(project, "out/put")
    assert (found["test_reads"]["cost"]["tokens"], found["test_reads"]["lm"]["dtype"]) == (2099, "bfloat16")
    assert found["test_length"]["settings"]["seq_len"] == 8
    run(project, "--lmeval-tokens", "2500", "--lmeval-bits=32", "-k", "reads", lm=None).assert_outcomes(passed=1, deselected=2)
    record = records(project, "out/put")["test_reads"]
    assert (record["cost"]["tokens"], record["lm"]["dtype"]) == (2499, "float32")


def test_several_lengths_are_parameters_of_a_fixture_and_a_test_without_it_is_refused(project):
    project.makepyfile(
        """
        def test_length(seq_len, lmeval, lm):
            lmeval.latency(lm, seq_len=seq_len, runs=1, warm_up=0)

        def test_ambiguous(lmeval, lm):
            lmeval.latency(lm, runs=1, warm_up=0)
        """
    )
    result = run(project, "--lmeval-seq-len=8", "--lmeval-seq-len=16")
    result.assert_outcomes(passed=2, failed=1)
    assert [record["settings"]["seq_len"] for record in metrics(project)["records"]] == [8, 16]
    result.stdout.fnmatch_lines(["*several --lmeval-seq-len were given (8, 16)*take the fixture `seq_len`*"])


def test_a_refused_option_ends_the_run_before_collection_without_a_traceback(project):
    project.makepyfile(test_reading=READS)
    result = run(project, "--lmeval-tokens=many")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *got 'many'."])
    assert "collected" not in result.stdout.str()
    assert "Traceback" not in result.stderr.str()


# ---------------------------------------------------------------------------------------------- failures in words


def test_a_model_that_cannot_be_loaded_is_an_error_in_one_line(project):
    project.makepyfile(test_reading=READS)
    result = run(project, "--lm=tiny:Tiny@int4", lm="tiny:Tinny")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*tiny:Tinny: cannot be imported (*)*"])
    result.stdout.fnmatch_lines(["*tiny:Tiny@int4 cannot be *: 0.0% of the*"])
    assert "Traceback" not in result.stdout.str()
    assert "def load" not in result.stdout.str()


FORGETFUL = """
    class Forgetful(Tiny):
        def forward(self, input_ids, state=None):
            return super().forward(input_ids, None)
"""


def test_a_failure_is_told_in_words_and_fails_its_own_test_only(project):
    project.makepyfile(
        test_wrong=READS
        + FORGETFUL
        + """
    import torch
    from tiny import Steps

    class Seeing(Tiny):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return logits + logits.mean(1, keepdim=True), state

    class Rows(Tiny):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return logits + 0.01 * (logits.mean(0, keepdim=True) - logits), state

    class Noisy(Tiny):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return logits + torch.randn(()), state * 1.0 + torch.randn(())

    def test_unknown(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("wikitext"))

    def test_empty(lmeval, lm, corpus):
        lmeval.perplexity(lm, [])

    @pytest.mark.parametrize("model", [Forgetful, Seeing])
    def test_refused(lmeval, corpus, model):
        lmeval.perplexity(model(), corpus("text:text.txt"), tokens=200)

    def test_chunks_of_a_step_only_model(lmeval, corpus):
        lmeval.perplexity(Steps(), corpus("text:text.txt"), chunk_size=16)

    def test_noisy(lmeval, corpus):
        lmeval.perplexity(Noisy(), corpus("text:text.txt"), window=100)

    def test_hopeless(lmeval, lm, corpus):
        assert lmeval.perplexity(lm, corpus("text:text.txt")).perplexity < 1

    def test_windows(lmeval, corpus):
        result = lmeval.perplexity(Forgetful(), corpus("text:text.txt"), tokens=200, window=50)
        assert result.certificate.verdict == "inexact"

    def test_steps(lmeval, corpus):
        result = lmeval.perplexity(Steps(), corpus("text:text.txt"), tokens=100)
        assert (result.chunks, result.certificate.chunking_used) == (99, "carried in chunks of 1")
        exact = lmeval.perplexity(Tiny(), corpus("text:text.txt"), tokens=100)
        assert float(result.nll) == pytest.approx(float(exact.nll))
"""
    )
    result = run(project)
    result.assert_outcomes(passed=3, failed=7)
    output = result.stdout.str()
    for pattern in [
        r"no corpus 'wikitext'\. Did you mean wikitext-2\?",
        r"a stream of fewer than two tokens has nothing to score",
        r"Forgetful is inexact:[\s\S]*splits: .* tokens \(seed 0\) in chunks of .*: log-probabilities off by",
        r'pytest_lmeval\.replay\(lm, "splits", length=',
        r"Seeing is non-causal:",
        r"It is exact one token at a time only, and chunk_size=16 was asked for",
        r"Noisy is inexact[\s\S]*Repair what makes the same text read differently the second time",
        r"E +(AssertionError: )?assert \d+\.?\d* \[\d.*, .*\] < 1",
        r"E .*perplexity of tiny:Tiny on text:text.txt\[test\]",
    ]:
        assert re.search(pattern, output), pattern
    assert "pytest_lmeval/" not in output.partition("= lmeval =")[0]
    outcomes = {name: record["outcome"] for name, record in records(project).items()}
    passed = dict.fromkeys(["test_reads", "test_windows", "test_steps"], "passed")
    assert outcomes == {"test_hopeless": "failed", **passed}


@pytest.mark.thorough
def test_a_model_that_is_exact_in_multiples_of_four_is_read_in_those(project):
    project.makepyfile(
        test_fours="""
        import pytest
        from tiny import Tiny

        class InFours(Tiny):
            def forward(self, input_ids, state=None):
                logits, state = super().forward(input_ids, state)
                return logits, state * 0.9 if input_ids.shape[1] % 4 else state

        def test_multiples(lmeval, corpus):
            exact = lmeval.perplexity(Tiny(), corpus("text:text.txt"), tokens=201)
            model = InFours()
            result = lmeval.perplexity(model, corpus("text:text.txt"), tokens=201, chunk_size=8)
            assert result.certificate.verdict == "exact-multiple-of-4"
            assert float(result.nll) == pytest.approx(float(exact.nll))
            assert lmeval.perplexity(model, corpus("text:text.txt"), tokens=201).record.settings["chunk_size"] == 1024
            with pytest.raises(Exception, match="in multiples of 4 only, and chunk_size=6"):
                lmeval.perplexity(model, corpus("text:text.txt"), tokens=201, chunk_size=6)
        """
    )
    run(project, "--lmeval-budget=200k", "--lmeval-profile=ci").assert_outcomes(passed=1)


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
            print("probed", result.record.settings["profile"], result.record.settings["budget"], rare.laws["splits"].kept)
        """
    )
    run(project, "-s", "--lmeval-profile=dev").stdout.fnmatch_lines(["*probed dev 1000 True*"])
    file = project.path / ".lmeval/counterexamples.jsonl"
    (kept,) = [json.loads(line) for line in file.read_text().splitlines() if '"law": "splits"' in line]
    with file.open("a") as lines:
        lines.write(json.dumps({**kept, "lm": "test_wrong:Rare", "case": {"length": 90, "cuts": [70, 73]}}) + "\n")
    run(project, "-s", "--lmeval-profile=ci").stdout.fnmatch_lines(["*probed ci 1000 False*"])


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_an_output_folder_that_cannot_be_written_ends_the_run_before_the_first_test(project, workers):
    if workers:
        pytest.importorskip("xdist")
    (project.path / "file").write_text("in the way")
    project.makepyfile(test_reading="def test_never_runs(lmeval):\n    open('ran', 'w')\n")
    result = run(project, "--lmeval-dir=file/out", *workers)
    (result.stdout if workers else result.stderr).fnmatch_lines(
        ["*nothing can be written to the output folder*file/out*--lmeval-dir*"]
    )
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if workers else pytest.ExitCode.USAGE_ERROR)
    assert "INTERNALERROR" not in result.stdout.str()
    assert not (project.path / "ran").exists()


# ----------------------------------------------------------------------------------------- what costs nothing


def test_a_project_with_a_fixture_corpus_of_its_own_imports_nothing_heavy(project):
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
    bare = project.run(sys.executable, "-m", "pytest", "--lm", "tiny:Tiny")  # a fork would have imported it
    bare.assert_outcomes(passed=1)
    assert not (project.path / ".lmeval").exists()


def test_collecting_writes_nothing_and_loads_no_model(project):
    project.makepyfile(test_reading=READS, broken="raise RuntimeError('was imported')")
    result = run(project, "--collect-only", "-q", lm="broken:build")
    result.stdout.fnmatch_lines(["test_reading.py::test_reads"])
    assert not (project.path / ".lmeval").exists()


def test_a_marker_deselects_evaluations(project):
    project.makepyfile(test_reading=READS, test_other="def test_other():\n    pass\n")
    run(project, "-m", "not lmeval", "--strict-markers").assert_outcomes(passed=1, deselected=1)


# ------------------------------------------------------------------------------- with and without other plugins

SPEED = """
    import pytest

    @pytest.mark.benchmark
    def test_speed(lmeval, lm, benchmark):
        result = lmeval.latency(lm, seq_len=8, runs=3, warm_up=1)
        if result.not_measured is None:
            assert result.prefill.n == 3

    def test_reads_a_time(lmeval, lm, benchmark):
        assert lmeval.latency(lm, seq_len=8).ttft < 1e9

    @pytest.fixture
    def ttft(lmeval, lm, benchmark):
        return lmeval.latency(lm, seq_len=8).ttft

    def test_reads_a_time_by_a_fixture(ttft):
        assert ttft < 1e9

    @pytest.mark.parametrize("tokens", [50, 100, 150])
    def test_reads(lmeval, lm, corpus, tokens):
        lmeval.perplexity(lm, corpus("text:text.txt"), tokens=tokens)
"""
STRICT = "[pytest]\naddopts = --strict-markers\nlmeval_budget = 1000\n"


def test_where_pytest_benchmark_is_blocked_speed_is_measured_without_it(project):
    project.makefile(".ini", pytest=STRICT)
    project.makepyfile(test_speed=SPEED)
    run(project, "-p", "no:benchmark", "-k", "speed and test_speed").assert_outcomes(passed=6)
    assert records(project)["test_speed"]["metrics"]["prefill"]["n"] == 3


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.thorough)])
def test_what_is_not_timed_has_no_times_and_a_test_that_reads_one_is_skipped(project, workers):
    pytest.importorskip("xdist")
    project.makefile(".ini", pytest=STRICT)
    project.makepyfile(test_speed=SPEED)
    losses = []
    for options in (["--benchmark-disable"], ["-n", workers]):
        result = run(project, *options, "-rs")
        result.assert_outcomes(passed=4, skipped=2)
        result.stdout.fnmatch_lines(["SKIPPED * test_speed.py:10: ttft was not measured: *untimed*"])
        result.stdout.fnmatch_lines(["*not measured*"])
        found = records(project)
        assert found["test_speed"]["metrics"] == {}
        assert "untimed" in found["test_speed"]["not_measured"]
        losses.append({name: record["metrics"]["nll"]["value"] for name, record in found.items() if "test_reads[" in name})
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1])  # workers send theirs


@pytest.mark.parametrize(
    "options",
    [
        ["-p", "no:terminalreporter"],
        ["-p", "no:capture"],
        pytest.param(["-p", "no:xdist"], marks=pytest.mark.thorough),
        pytest.param(["-s"], marks=pytest.mark.thorough),
    ],
)
def test_a_run_works_without_optional_plugins(project, options):
    project.makepyfile(test_reading=READS)
    assert run(project, *options).ret == 0
    assert len(metrics(project)["records"]) == 1
