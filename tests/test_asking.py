"""`lmeval.task` and `lmeval.suite` as users call them: what is recorded and shown, and what a model's laws allow."""

import json

import pytest

OWN = """
    from pytest_lmeval import Choices, Generate, Suite, Task

    def ask(row):
        if row["n"] == {broken}:
            return Choices(row["text"], (" a",), 0)
        return Choices(f"Is {{row['n']}} even? It is", (" even", " odd"), row["n"] % 2)

    PARITY = Task("parity", [{{"n": n}} for n in range(40)], ask)
    NUMBERS = [{{"n": n}} for n in range(3)]
    SPEAKS = Task("speaks", NUMBERS, lambda row: Generate(f"{{row['n']}} is", ("x",), max_tokens=5), ("exact_match",))
    BOTH = Suite("both", (Task("first", [{{"n": n}} for n in range(30)], ask), PARITY))
"""


@pytest.fixture
def project(project):
    project.makepyfile(own=OWN.format(broken=-1))
    project.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\npythonpath = .\nlmeval_budget = 0.1\n")
    return project


def run(project, *options, lm="tiny:Tiny"):
    return project.runpytest_subprocess("-p", "no:cacheprovider", "--lm", lm, *options)


def records(project, kind="task"):
    written = json.loads((project.path / ".lmeval" / "metrics.json").read_text())["records"]
    return [record for record in written if record["kind"] == kind]


def test_a_task_is_recorded_with_every_answer_and_shown(project):
    project.makepyfile(
        test_own="""
        from own import PARITY, SPEAKS

        def test_knows(lmeval, lm):
            result = lmeval.task(lm, PARITY, shots=0)
            assert result.accuracy.low < result.chance < result.accuracy.high

        def test_speaks(lmeval, lm):
            assert lmeval.task(lm, SPEAKS).exact_match == 0
        """
    )
    result = run(project, "--lmeval-limit", "12")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*parity, 0-shot, exact-any-chunk*", "*accuracy * to *", "*chance *0.5*", "*exact match *0*"])
    record, spoken = records(project)
    assert (record["subject"], record["metrics"]["accuracy"]["n"]) == ("parity, 0-shot", 12)
    assert record["details"]["prefix_sharing"] == "prefix sharing: on"
    assert record["certificate"]["verdict"] == "exact-any-chunk"
    lines = [json.loads(line) for line in (project.path / ".lmeval" / record["examples"]).read_text().splitlines()]
    assert len(lines) == 12
    assert {"id", "prompt", "choices", "loglikelihoods", "output", "target", "scores", "read", "saved"} <= set(lines[0])
    lines = (project.path / ".lmeval" / spoken["examples"]).read_text().splitlines()
    assert all(isinstance(json.loads(line)["output"], str) for line in lines)
    assert "parity" in (project.path / ".lmeval" / "summary.md").read_text()


def test_what_is_not_exact_is_not_shared_and_the_answers_are_the_same(project):
    project.makepyfile(
        test_own="""
        from own import PARITY, SPEAKS

        def test_knows(lmeval, lm):
            said = lmeval.task(lm, PARITY)
            alone = lmeval.task(lm, PARITY, batch_size=1)
            for one, other in zip(said.examples, alone.examples):
                assert max(abs(a - b) for a, b in zip(one.loglikelihoods, other.loglikelihoods)) < 1e-3
            assert [e.output for e in lmeval.task(lm, SPEAKS).examples] == [
                e.output for e in lmeval.task(lm, SPEAKS, batch_size=1).examples
            ]
        """
    )
    result = run(project, "--lm", "tiny:Whole", "--lm", "tiny:Mixing", lm="tiny:Steps")
    result.assert_outcomes(passed=3)
    assert {record["lm"]["spec"]: record["details"]["prefix_sharing"] for record in records(project)} == {
        "tiny:Steps": "prefix sharing: off (exact-step-only)",
        "tiny:Whole": "prefix sharing: off (the model has no state to carry)",
        "tiny:Mixing": "prefix sharing: on",
    }


def test_a_suite_names_all_its_members(project):
    project.makepyfile(
        test_own="""
        import pytest
        from own import BOTH

        def test_both(lmeval, lm):
            result = lmeval.suite(lm, BOTH)
            assert result.average == pytest.approx((result["first"].accuracy + result["parity"].accuracy) / 2)
            assert result.average.low < result.average < result.average.high
        """
    )
    run(project).assert_outcomes(passed=1)
    (suite,) = records(project, "suite")
    assert suite["settings"]["members"] == {"first": "accuracy", "parity": "accuracy"}
    assert set(suite["metrics"]) == {"average", "first", "parity"}
    assert len(records(project)) == 2


def test_a_task_that_fails_is_shown_as_failed_and_there_is_no_average_without_it(project):
    project.makepyfile(own=OWN.format(broken=35))
    project.makepyfile(test_own="from own import BOTH\n\ndef test_both(lmeval, lm):\n    lmeval.suite(lm, BOTH)\n")
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*1 of the 2 tasks of both failed, so there is no average: ?parity? parity, row 35 cannot be *"]
    )
    assert "site-packages" not in result.stdout.str()
    (suite,) = records(project, "suite")
    assert list(suite["details"]["failed"]) == ["parity"]
    assert set(suite["metrics"]) == {"first"}


def test_an_interrupted_task_goes_on_where_it_stopped(project):
    project.makepyfile(own=OWN.format(broken=35))
    project.makepyfile(
        test_own="from own import PARITY\n\ndef test_p(lmeval, lm):\n    lmeval.task(lm, PARITY, batch_size=2)\n"
    )
    run(project).assert_outcomes(failed=1)
    (partial,) = (project.path / ".lmeval" / "partial").glob("*.jsonl")
    assert len(partial.read_text().splitlines()) == 34
    project.makepyfile(own=OWN.format(broken=-1))
    result = run(project)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*parity: 34 answers taken from an interrupted run*"])


def test_datasets_come_from_a_mirror(project):
    file = project.path / "mirror/nyu-mll/glue/sst2/validation.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"sentence": f"film {n}", "label": n % 2, "idx": n}) + "\n" for n in range(20)))
    project.makepyfile(
        test_own="""
        import pytest

        @pytest.mark.parametrize("name", ["sst2", "smallbench:sst2"])
        def test_sst2(lmeval, lm, name):
            assert lmeval.task(lm, name).chance == 0.5

        def test_rte(lmeval, lm):
            lmeval.task(lm, "rte")
        """
    )
    result = run(project, "--lmeval-data", "mirror")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*mirror does not hold nyu-mll/glue: looked for *rte/validation.parquet and .jsonl*"])
    assert [record["subject"] for record in records(project)] == ["sst2, 0-shot", "smallbench:sst2, 0-shot"]


REFUSED = [
    ('lmeval.task(lm, "mmlu")', "*mmlu is a suite*lmeval.suite*"),
    ('lmeval.task(lm, "bolq")', "*bolq*boolq*"),
    ('lmeval.suite(lm, "gleu")', "*gleu*glue*"),
    ('lmeval.task("zoo:bk", PARITY)', "*zoo:bk is non-causal*"),
    ("lmeval.task(lm, PARITY, shots=2)", "*shown 2 example*none*"),
    ('lmeval.task("zoo:moshi", PARITY)', "*reads frames of codes*"),
]


def test_what_cannot_be_asked_says_so_without_a_traceback(project):
    tests = [f"def test_{number}(lmeval, lm):\n    {call}\n" for number, (call, _) in enumerate(REFUSED)]
    project.makepyfile(test_own="from own import PARITY\n\n" + "\n".join(tests))
    result = run(project)
    result.assert_outcomes(failed=len(REFUSED))
    for number, (_, message) in enumerate(REFUSED):
        result.stdout.fnmatch_lines([f"*_ test_{number} _*", message])
    assert "site-packages" not in result.stdout.str()
