"""Runs of pytest against a baseline: which test fails, what it says, and what happens if run and baseline do not fit."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from msgspec import structs

from pytest_lmeval import perplexity, task  # noqa: F401 - loads torch, which a run in this process would forget and cannot load twice
from pytest_lmeval.__main__ import main
from pytest_lmeval.gates._baseline import Baseline, read, write
from pytest_lmeval.gates._margins import Margin, check_sign, parse, read_marker
from pytest_lmeval.records._schema import json_schema

MODEL = """
    import os, pytest, torch
    from torch import nn

    class Knows(nn.Module):
        '''Answers numbers of three digits with "a", those in WRONG with "b". BLUR is the logit of "x", which never comes.'''

        def __init__(self):
            super().__init__()
            self.wrong = nn.Buffer(torch.zeros(1000, dtype=torch.bool))
            self.wrong[[int(number) for number in os.environ.get("WRONG", "").split()]] = True
            self.blur = nn.Buffer(torch.tensor(float(os.environ.get("BLUR", "3"))))

        def forward(self, input_ids, state=None):
            before = input_ids.new_zeros(len(input_ids), 3) if state is None else state
            seen = torch.cat([before, input_ids], 1)
            last = seen.unfold(1, 3, 1)[:, 1:]
            number = ((last - 48) * last.new_tensor([100, 10, 1])).sum(-1).clamp(0, 999)
            logits = torch.zeros(*input_ids.shape, 256)
            logits[..., 101] = 2 + 0.1 * torch.sin(last.sum(-1).float())
            logits[..., 120] = self.blur
            logits[..., 97] += ((last >= 48) & (last <= 57)).all(-1) * (1.0 - 2.0 * self.wrong[number])
            return logits, seen[:, -3:]

    @pytest.fixture(scope="session")
    def lm():
        return Knows()
"""
TESTS = """
    import os, pytest
    from pytest_lmeval import Choices, Task

    ROWS = [{"n": n} for n in range(int(os.environ.get("FIRST", "0")), int(os.environ.get("LAST", "150")))]
    NUMBERS = Task("numbers", ROWS, lambda row: Choices(f"{row['n']:03d}", ("a", "b"), answer=0))

    def test_numbers(lmeval, lm):
        lmeval.task(lm, NUMBERS)

    def test_reads(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("text:text.txt"))
"""


def marked(decorator):
    return TESTS.replace("def test_numbers", f"{decorator}\n    def test_numbers")


@pytest.fixture
def project(pytester, monkeypatch):
    """A project with two tests, and a model whose wrong answers the environment chooses."""
    monkeypatch.setenv("COLUMNS", "200")  # no note is wrapped
    pytester.makeconftest(MODEL)
    pytester.makepyfile(test_quality=TESTS)
    pytester.makefile(".txt", text="It was a dark and stormy night; the rain fell in torrents.\n" * 40)
    pytester.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\nlmeval_budget = 0\n")
    monkeypatch.setenv("WRONG", FEW_WRONG)
    return pytester


def run(project, *options, shows=(), **outcomes):
    """Run pytest with a baseline; it must print the lines `shows`, and have these outcomes if any are given."""
    result = project.runpytest_subprocess("-p", "no:cacheprovider", "--lmeval-baseline=baseline.json", *options)
    result.stdout.fnmatch_lines(shows)
    if outcomes:
        result.assert_outcomes(**outcomes)
    return result


def accept(*options):
    return main(["baseline", "accept", "--to", "baseline.json", *options])


def gates(project):
    """(test, metric) -> row of the last run."""
    document = json.loads((project.path / ".lmeval/metrics.json").read_text())
    return {
        (record["test"].rpartition("::")[2], name): row
        for record in document["records"]
        for name, row in (record["gate"] or {}).items()
    }


def verdicts(project):
    return {key: row["verdict"] for key, row in gates(project).items()}


FEW_WRONG = "1 2 3 50 51 52"
MANY_WRONG = " ".join([FEW_WRONG, *map(str, range(100, 115))])
FILES = ("baseline.json", "baseline.examples.jsonl")
KEPT = {}  # the baseline for all tests: it does not depend on the folder


@pytest.fixture
def accepted(project):
    for name, content in KEPT.items():
        (project.path / name).write_bytes(content)
    if not KEPT:
        new = "there is no baseline.json yet, so everything is new*"
        run(project, shows=["*lmeval: against baseline.json*", "*new*accuracy*0.96*", new], passed=2)
        assert accept() == 0
        KEPT.update({name: (project.path / name).read_bytes() for name in FILES})
    return project


def test_an_unchanged_run_is_identical_and_writes_the_same_baseline(accepted, capsys):
    run(accepted, passed=2)
    assert set(verdicts(accepted).values()) == {"identical"}
    assert accept() == 0
    assert {name: (accepted.path / name).read_bytes() for name in FILES} == KEPT


def test_a_regression_fails_its_test_with_an_explanation(accepted, monkeypatch):
    monkeypatch.setenv("WRONG", MANY_WRONG)
    monkeypatch.setenv("BLUR", "4")
    result = run(accepted, "--junitxml=junit.xml", failed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "accuracy 0.96 -> 0.86: worse than baseline.json allows",
            "accuracy of conftest:Knows on numbers, 0-shot",
            "  was 0.96, is 0.86: 0.1 lower (-10 %), and with 95 % confidence between -0.*",
            "  allowed are 0.01 lower (by default)",
            "  Had nothing changed, chance would make so large a loss in about one of 33,000 comparisons*",
            "  than allowed, and rarer than one of 200, is called worse (McNemar's exact test, 150 questions)",
            "  15 questions lost, 0 won:",
            "    *: right -> wrong, says 'b', right is 'a'",
            "    ... and 10 more; *",
            "  lmeval baseline accept --from .lmeval --to baseline.json -k test_quality.py::test_numbers",
            "*@pytest.mark.lmeval_gate(accuracy=...)",
            "*lmeval: against baseline.json*",
            "test_quality.py::test_numbers",
            "    worse *accuracy *0.96 -> 0.86 *-0.1 (-0.1* to -0.*)",
            "test_quality.py::test_reads",
            "    worse *bits per byte*",
            "FAILED test_quality.py::test_numbers - Failed: accuracy 0.96 -> 0.86:*",
        ]
    )
    row = gates(accepted)["test_numbers", "accuracy"]
    assert (row["lost"], row["won"], row["n"]) == (15, 0, 150)
    assert {(one["before"], one["after"]) for one in row["flipped"]} == {(1, 0)}
    row = gates(accepted)["test_reads", "bits_per_byte"]
    assert row["low"] > row["margin"]
    for case in ElementTree.parse(accepted.path / "junit.xml").iter("testcase"):
        assert "worse than baseline.json allows" in case.find("failure").get("message")
    pytest.importorskip("jsonschema").validate(json.loads((accepted.path / ".lmeval/metrics.json").read_text()), json_schema())
    assert accept("-k", "test_numbers") == 0  # as the failure suggests
    run(accepted, failed=1, passed=1)


def test_a_gain_is_better_and_a_few_flips_are_unclear(accepted, monkeypatch):
    monkeypatch.setenv("WRONG", f"{FEW_WRONG} 100")
    monkeypatch.setenv("BLUR", "0")
    found = "*a loss of * would have been found (with a probability of 80 %)"
    run(accepted, shows=[found, "*if nothing was lost, * questions would show it (0.01 is allowed)"], passed=2)
    assert verdicts(accepted)["test_reads", "bits_per_byte"] == "better"
    row = gates(accepted)["test_numbers", "accuracy"]
    assert row["verdict"] == "unclear"
    assert row["needed"] > 150


def test_warn_and_off_fail_nothing_and_a_marker_allows_more(accepted, monkeypatch):
    monkeypatch.setenv("WRONG", MANY_WRONG)
    run(accepted, "--lmeval-gate=warn", "--junitxml=junit.xml", shows=["    worse *accuracy*"], passed=2)
    properties = {one.get("name"): one.get("value") for one in ElementTree.parse(accepted.path / "junit.xml").iter("property")}
    of = "lmeval conftest:Knows, numbers, 0-shot, accuracy"
    assert [properties[of + key] for key in (", verdict", ", base", "", ", margin")] == ["worse", "0.96", "0.86", "0.01"]
    assert verdicts(accepted)["test_numbers", "accuracy"] == "worse"
    summary = (accepted.path / ".lmeval/summary.md").read_text()
    assert summary.startswith("# lmeval: All 2 tests passed; 1 is worse than the baseline\n")
    run(accepted, "--lmeval-gate=off", passed=2).stdout.no_fnmatch_line("*against baseline.json*")
    gate = '@pytest.mark.lmeval_gate(accuracy="20%", f1=0.1, throughput="-10%", tokens_per_second="-10%")'
    accepted.makepyfile(test_quality=marked(gate))
    unused = "*names f1, which the test does not record; it records accuracy, chance*"
    run(accepted, shows=[unused, "    same *accuracy*"], passed=2)
    accepted.makepyfile(test_quality=marked('@pytest.mark.lmeval_gate("off")'))
    run(accepted, passed=2)
    assert not [test for test, _ in verdicts(accepted) if test == "test_numbers"]


def test_tests_that_fail_by_themselves_keep_their_failure_and_are_not_accepted(accepted, monkeypatch, capsys):
    monkeypatch.setenv("WRONG", MANY_WRONG)
    monkeypatch.setenv("BLUR", "0")
    failing = "        assert not 'mine'\n"
    accepted.makepyfile(test_quality=TESTS.replace("(lm, NUMBERS)\n", f"(lm, NUMBERS)\n{failing}") + f"\n{failing}")
    run(accepted, shows=["*assert not 'mine'*", "    worse *accuracy*", "    better *bits per byte*"], failed=2)
    assert accept() == 2
    refused = "test_quality.py::test_numbers, test_quality.py::test_reads failed for another reason than the baseline"
    assert refused in capsys.readouterr().err


def test_a_worker_of_xdist_fails_the_test(accepted, monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setenv("WRONG", MANY_WRONG)
    options = ("-n", "1", "--dist", "loadgroup", "-k", "numbers")
    result = run(accepted, *options, shows=["*    worse *accuracy*"], failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.no_fnmatch_line("not measured:*")


def test_only_examples_that_both_runs_have_are_compared(accepted, monkeypatch):
    monkeypatch.setenv("FIRST", "20")
    monkeypatch.setenv("LAST", "160")
    shows = ["*on 130 questions of both runs; 20 only in the baseline, 10 only here"]
    run(accepted, "-k", "numbers", shows=shows, passed=1, deselected=1)
    row = gates(accepted)["test_numbers", "accuracy"]
    assert (row["verdict"], row["base"]) == ("identical", pytest.approx(127 / 130))


def test_another_text_is_unclear_and_missing_examples_leave_the_intervals(accepted):
    (accepted.path / "text.txt").write_text("Once upon a midnight dreary, while I pondered, weak and weary,\n" * 12)
    run(accepted, "-k", "reads", shows=["    unclear *", "*no example in common, so they cannot be compared"])
    (accepted.path / "baseline.examples.jsonl").unlink()
    run(accepted, shows=["*baseline's file of examples is missing*", "its file of examples is missing*"])
    assert gates(accepted)["test_numbers", "accuracy"]["test"] == "the intervals alone, not example by example"


def test_what_only_one_side_has_is_shown_and_fails_nothing(accepted):
    path, test, record = Path("baseline.json"), "test_quality.py::test_numbers", "task numbers, 0-shot"
    old = read(path)
    platform, entry = old.file.environment, old.tests[test][record]
    other = structs.replace(entry, metrics={"exact_match": entry.metrics["accuracy"]}, headline="exact_match")
    platform = structs.replace(platform, packages={**platform.packages, "torch": "1.0"})
    file = structs.replace(old.file, environment=platform, tests={test: {record: other, "task other, 0-shot": other}})
    write(path, Baseline(file, {(test, record): old.scores[test, record]}))
    shows = [
        "*the baseline has 'task other, 0-shot' of it, which this run did not record",
        "*missing *exact match *-> not measured",
        "*new *bits per byte*",
        "made on another platform: torch was 1.0, is *",
    ]
    run(accepted, shows=shows, passed=2)


SKIPPED = marked("@pytest.mark.skip(reason='no time')")


def test_skipped_and_renamed_tests_of_the_baseline_are_reported(accepted):
    accepted.makepyfile(test_quality=SKIPPED.replace("test_reads", "test_reads_well"))
    no_time = "not measured: test_quality.py::test_numbers (skipped: no time)"
    run(accepted, shows=[no_time, "not measured: test_quality.py::test_reads (no test*"], passed=1, skipped=1)
    skipped = json.loads((accepted.path / ".lmeval/metrics.json").read_text())["skipped"]
    reasons = {(one["test"].rpartition("::")[2], one["reason"].partition(":")[0]) for one in skipped}
    assert reasons == {(test, "in the baseline, and not measured") for test in ("test_numbers", "test_reads")}
    run(accepted, "-k", "numbers", shows=["*lmeval: against baseline.json*", no_time])


@pytest.mark.parametrize("options", [["-k", "reads"], ["test_quality.py::test_reads"], ["-x", "test_other.py"]])
def test_tests_that_were_left_out_on_purpose_are_ignored(accepted, options):
    accepted.makepyfile(test_quality=SKIPPED, test_other="def test_other(): pass")
    run(accepted, *options).stdout.no_fnmatch_line("not measured:*")


def test_tests_that_recorded_nothing_or_did_not_run_are_reported(accepted):
    accepted.makepyfile(test_quality=TESTS.replace("lmeval.task(lm, NUMBERS)", "assert lm is None"))
    quiet = "not measured: test_quality.py::test_numbers (it ran, and recorded nothing)"
    run(accepted, "-x", shows=[quiet, "not measured: test_quality.py::test_reads (it did not run)"])


@pytest.mark.parametrize(
    ("marker", "options", "message"),
    [
        ("accuracy='much'", [], "*test_quality.py::test_numbers: @pytest.mark.lmeval_gate: accuracy='much' is no margin*"),
        ("'on'", [], "*takes metrics by name, accuracy=0.01, or \"off\" alone; got 'on'*"),
        ("", ["--lmeval-gate=maybe"], "*--lmeval-gate takes fail, warn or off; got 'maybe'.*"),
        ("", ["--lmeval-baseline=damaged.json"], "*damaged.json is not whole JSON: * at line *, column *"),
    ],
)
def test_an_invalid_marker_gate_or_baseline_stops_the_run_before_the_first_test(project, marker, options, message):
    project.makepyfile(test_quality=marked(f"@pytest.mark.lmeval_gate({marker})"))
    (project.path / "damaged.json").write_text('{"schema": 2, "env')
    result = run(project, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_margin_is_a_number_or_a_percentage(size, base):
    assert parse(size).of(base) == parse(repr(size) if "e" not in repr(size) else size).of(base) == size
    assert parse("1.5%").of(base) == pytest.approx(0.015 * base)
    assert parse("-10%", "throughput") == Margin(0.1, relative=True, sign="-", given=True)


@pytest.mark.parametrize("value", [None, True, "", "%", "5 percent", "1e-3", float("nan"), float("inf"), [0.1]])
def test_other_values_are_no_margin(value):
    with pytest.raises(ValueError, match="is no margin"):
        parse(value, "accuracy")


def test_a_sign_in_the_better_direction_is_reported():
    margins = read_marker((), {"accuracy": "-1%", "perplexity": "-0.5%"}).given
    assert check_sign("accuracy", margins["accuracy"], True) is None
    wrong = check_sign("perplexity", margins["perplexity"], False)
    assert "perplexity gets worse when it rises, so its margin is +0.5 %" in wrong
