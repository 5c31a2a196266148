"""Gates for answers that are drawn: how much chance changes, what a gate makes of it, and a baseline of several runs."""

import itertools
import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from reading import measure_task
from stub_server import StubServer
from tiny_models import Functional

from pytest_lmeval import Generate, Task, as_model, load
from pytest_lmeval.__main__ import main
from pytest_lmeval.gates._baseline import read
from pytest_lmeval.statistics._drawn import answers_needed, between_runs, dealt_again, drawn_difference
from pytest_lmeval.statistics._paired import mcnemar
from pytest_lmeval.statistics._verdict import judge_all

answer = st.integers(0, 1)
questions = st.lists(st.tuples(st.lists(answer, min_size=1, max_size=3), st.lists(answer, min_size=1, max_size=2)), max_size=4)


def every_deal(base, new):
    """The number of right answers of `new` for each way to deal the answers to each question to both runs."""
    dealt = [
        [sum(chosen) for chosen in itertools.combinations([*before, *after], len(after))]
        for before, after in zip(base, new, strict=True)
    ]
    return [sum(deal) for deal in itertools.product(*dealt)]


@given(questions.filter(len))
def test_the_exact_test_counts_all_ways_to_deal_the_answers(pairs):
    base, new = zip(*pairs, strict=True)
    sums, seen = every_deal(base, new), sum(map(sum, new))
    expected = (np.mean([one <= seen for one in sums]), np.mean([one >= seen for one in sums]))
    assert dealt_again(base, new) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(answer, answer), min_size=1, max_size=40))
def test_with_one_answer_in_each_run_it_is_the_test_of_mcnemar(pairs):
    lost, won = (sum(pair == changed for pair in pairs) for changed in ((1, 0), (0, 1)))
    base, new = [[was] for was, _ in pairs], [[now] for _, now in pairs]
    assert dealt_again(base, new) == pytest.approx((mcnemar(lost, won, "lower"), mcnemar(lost, won, "higher")), abs=1e-12)


def drawn(generator, rates, answers):
    return (generator.random((len(rates), answers)) < np.asarray(rates)[:, None]).astype(int).tolist()


def test_the_spread_of_the_answers_tells_how_much_runs_differ():
    generator = np.random.default_rng(0)
    rates = generator.beta(0.5, 0.5, size=80)
    runs = [drawn(generator, rates, 4) for _ in range(400)]
    seen = np.std([np.mean(run) for run in runs])
    assert between_runs(runs[0]) == pytest.approx(seen, rel=0.2)
    assert np.sqrt(np.mean([between_runs(run) ** 2 for run in runs])) == pytest.approx(seen, rel=0.1)
    of_all_answers = np.std(runs[0]) / math.sqrt(320)  # as if the questions, too, were drawn anew
    assert of_all_answers > 1.2 * seen


@pytest.mark.parametrize("answers", [(4, 4), (8, 1), (1, 6)])
def test_nothing_changed_is_hardly_ever_worse_where_a_fixed_bar_often_is(answers):
    generator, alarms, bars, runs = np.random.default_rng(1), 0, 0, 300
    rates = generator.beta(0.4, 0.6, size=60)
    for _ in range(runs):
        found = drawn_difference(drawn(generator, rates, answers[0]), drawn(generator, rates, answers[1]))
        alarms += judge_all([found], [0.01], [True])[0].name == "worse"
        bars += found.value < -0.01
    assert alarms <= 9  # of 300 at a level of 1 %: more come in one of 900 such tests
    assert bars > 0.2 * runs


def test_more_answers_find_a_smaller_loss():
    generator, runs = np.random.default_rng(2), 60
    rates = generator.beta(2, 2, size=80)
    found = {}
    for answers in (1, 16):
        calls = [
            judge_all(
                [drawn_difference(drawn(generator, rates, answers), drawn(generator, rates - 0.06 * (rates > 0.06), answers))],
                [0.01],
                [True],
            )[0].name
            for _ in range(runs)
        ]
        found[answers] = calls.count("worse") / runs
    assert found[1] < 0.2
    assert found[16] > 0.8


def test_the_answers_that_are_needed_show_that_nothing_was_lost():
    generator, runs = np.random.default_rng(3), 60
    rates = generator.beta(2, 2, size=200)
    few = drawn_difference(drawn(generator, rates, 2), drawn(generator, rates, 2))
    needed = answers_needed(few, 0.02, (2, 2))
    assert 8 < needed < 60
    same = 0
    for _ in range(runs):
        found = drawn_difference(drawn(generator, rates, needed), drawn(generator, rates, needed))
        same += judge_all([found], [0.02], [True])[0].name in ("same", "better")
    assert same / runs > 0.6  # 80 % planned; the spread that planned it was itself estimated
    assert answers_needed(few, 0.0001, (2, 2)) is None


def test_without_two_answers_to_any_question_nothing_is_known_about_chance():
    found = drawn_difference([[1], [0]] * 10, [[1], [1]] * 10)
    assert found.noise is None
    assert between_runs([[1], [0]]) is None
    assert answers_needed(found, 0.01, (1, 1)) is None
    with pytest.raises(ValueError, match="without an answer"):
        drawn_difference([[1], []], [[1], [0]])


class Fickle(StubServer):
    """A server whose logits are never the same."""

    def logprobs(self, ids):
        found = super().logprobs(ids)
        return torch.log_softmax(found + 2 * torch.rand(found.shape, generator=self.generator), -1)


@pytest.mark.parametrize("kind", [Fickle, StubServer])
def test_a_server_that_does_not_repeat_itself_is_asked_again_even_at_temperature_0(kind):
    """A model here answers the same, and is asked once."""
    lm = as_model(Functional(vocab=256))
    task = Task("t", [{"n": n} for n in range(8)], lambda row: Generate(f"{row['n']}", ("x",), max_tokens=6), repeats=3)
    task = replace(task, score=lambda row, answer: (len(set(answer)) % 3) / 2, most_cut_off=1)
    with kind(lm) as server:
        result = measure_task(load(server.spec), task)
    assert result.record.details["answers"] == 24
    spread = result.record.details["between_runs"]["score"]
    assert (spread > 0) is (kind is Fickle)
    assert "between_runs" not in measure_task(lm, task).record.details


MODEL = """
    import os, pytest, torch
    from torch import nn

    class Unsure(nn.Module):
        '''After a digit d it says "a" with a probability that grows with d, and with SURE; else "b"; then it ends.'''

        def __init__(self):
            super().__init__()
            self.sure = nn.Buffer(torch.tensor(float(os.environ.get("SURE", "0"))))

        def forward(self, input_ids, state=None):
            logits = torch.full((*input_ids.shape, 256), -30.0)
            digit = (input_ids >= 48) & (input_ids <= 57)
            logits[..., 97] = torch.where(digit, (input_ids - 52.5) / 2 + self.sure, -30.0)
            logits[..., 98] = torch.where(digit, 0.0, -30.0)
            logits[..., 10] = torch.where(digit, -30.0, 10.0)
            return logits, input_ids[:, -1:]

    @pytest.fixture(scope="session")
    def lm():
        return Unsure()
"""
TESTS = """
    import os
    from pytest_lmeval import Generate, Task

    ROWS = [{"n": n} for n in range(60)]
    TASK = Task(
        "says_a",
        ROWS,
        lambda row: Generate(f"{row['n'] // 10:02d} {row['n'] % 10}", ("a",), max_tokens=2, stop=("\\n",), temperature=1.0),
        metrics=("exact_match",),
        repeats=int(os.environ.get("REPEATS", "8")),
    )

    def test_says_a(lmeval, lm):
        lmeval.task(lm, TASK, seed=int(os.environ.get("SEED", "0")))
"""


@pytest.fixture
def project(pytester, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    pytester.makeconftest(MODEL)
    pytester.makepyfile(test_drawn=TESTS)
    pytester.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\nlmeval_budget = 0\n")
    return pytester


def run(project, folder=".lmeval", *, baseline=True, env=None, **outcomes):
    for name, value in (env or {}).items():
        os.environ[name] = str(value)
    try:
        gate = ["--lmeval-baseline=baseline.json"] if baseline else []
        result = project.runpytest_subprocess("-p", "no:cacheprovider", f"--lmeval-dir={folder}", *gate)
    finally:
        for name in env or {}:
            del os.environ[name]
    result.assert_outcomes(**(outcomes or {"passed": 1}))
    return result


def accept(*sources):
    return main(["baseline", "accept", "--to", "baseline.json", "--from", *sources])


def record(project, folder=".lmeval"):
    return json.loads((project.path / folder / "metrics.json").read_text())["records"][0]


def test_a_baseline_keeps_how_much_chance_changes_and_says_what_can_be_found(project, capsys):
    result = run(project, baseline=False)
    result.stdout.fnmatch_lines(["*between runs, exact_match varies by 0.0*"])
    spread = record(project)["details"]["between_runs"]["exact_match"]
    assert 0.01 < spread < 0.025  # the square root of p (1 - p) / 480 at most
    assert accept(".lmeval") == 0
    said = capsys.readouterr().out
    assert "varies by 0.01" in said
    assert "is found in 80 % of such runs, and 1 % of those without one raise an alarm" in said
    (entry,) = read(project.path / "baseline.json").tests["test_drawn.py::test_says_a"].values()
    assert entry.between_runs["exact_match"] == pytest.approx(spread, rel=1e-6)


def test_another_draw_passes_in_any_number_of_answers_and_a_worse_model_fails(project, capsys):
    run(project, baseline=False)
    assert accept(".lmeval") == 0
    for env in ({"SEED": 1}, {"SEED": 2, "REPEATS": 3}, {"SEED": 3, "REPEATS": 1}):
        run(project, "other", env=env)
        gate = record(project, "other")["gate"]["exact_match"]
        assert gate["verdict"] in ("unclear", "same", "better"), gate
        assert gate["answers"] == [8, env.get("REPEATS", 8)]
        assert gate["n"] == 60
        assert gate["differences"] == [f"seed was 0, is {env['SEED']}"]
        assert gate["noise"] > 0.01
    result = run(project, "worse", env={"SEED": 4, "SURE": -1}, failed=1)
    result.stdout.fnmatch_lines(
        ["*worse than baseline.json allows*", "*an exact test of answers dealt again*", "*questions answered 8 and 8 times*"]
    )


def test_several_runs_make_one_baseline_and_equal_ones_add_nothing(project, capsys):
    for number, seed in enumerate((0, 1, 2, 2)):
        run(project, f"run{number}", baseline=False, env={"SEED": seed, "REPEATS": 1})
    assert accept("run2", "run3") == 0  # the same random numbers
    (entry,) = read(project.path / "baseline.json").tests["test_drawn.py::test_says_a"].values()
    assert entry.between_runs == {}
    assert entry.metrics["exact_match"].n == 60
    assert accept("run0", "run1", "run2") == 0
    baseline = read(project.path / "baseline.json")
    (entry,) = baseline.tests["test_drawn.py::test_says_a"].values()
    means = [record(project, f"run{number}")["metrics"]["exact_match"]["value"] for number in range(3)]
    value = entry.metrics["exact_match"]
    assert value == pytest.approx(np.mean(means), rel=1e-6)
    assert value.n == 180
    assert value.low < value < value.high
    assert 0.02 < entry.between_runs["exact_match"] < 0.05
    run(project, "next", env={"SEED": 9, "REPEATS": 1})
    assert record(project, "next")["gate"]["exact_match"]["answers"] == [3, 1]


def test_runs_that_differ_in_more_than_chance_are_not_pooled(project, capsys):
    run(project, "one", baseline=False)
    run(project, "two", baseline=False, env={"SURE": 2})
    assert accept("one", "two") == 2
    assert "was measured in different ways: model's fingerprint" in capsys.readouterr().err
    (project.path / "test_drawn.py").write_text((project.path / "test_drawn.py").read_text() + "\n    lmeval.task(lm, TASK)\n")
    run(project, "three", baseline=False)
    assert accept("three", "one") == 2
    assert "several runs are pooled where they measured the same" in capsys.readouterr().err
