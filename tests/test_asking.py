"""Call `lmeval.task` and `lmeval.suite` as users do: records, files, output, and what the laws of a model allow."""

import dataclasses
import json

import pytest
from tiny import Mixing, Steps, Tiny, Whole
from tiny_models import Seeing

from pytest_lmeval import Choices, CorpusError, Generate, LmevalError, Suite, Task, TaskError, as_model, policy_for
from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.laws import probe
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.measures._task import measure_task


def ask(row):
    return Choices(f"Is {row['n']} even? It is", (" even", " odd"), row["n"] % 2)


PARITY = Task("parity", [{"n": n} for n in range(40)], ask)
BROKEN = dataclasses.replace(PARITY, ask=lambda row: ask(row) if row["n"] != 35 else row["text"])
FIRST = Task("first", [{"n": n} for n in range(30)], ask)
GENERATES = Task(
    "generates", PARITY.rows[:3], lambda row: Generate(f"{row['n']} is", ("x",), (), max_tokens=5), ("exact_match",)
)
SHORT = 40  # tokens of context: the probe of its laws is short too
LM, NON_CAUSAL = (dataclasses.replace(as_model(module), context_length=SHORT) for module in (Whole(), Seeing(vocab=256)))
PROBED = Session(budget=1000)


def context_of(folder, **options):
    return VerbContext(Session(folder, budget=1000, verdicts=PROBED.verdicts, **options), Log("t.py::test_it"))


def test_a_task_is_recorded_with_every_answer_and_shown(project):
    project.makepyfile(
        short="import tiny\n\nclass Short(tiny.Tiny):\n    context_length = 40\n",  # so is the probe of its laws
        test_own="""
        from pytest_lmeval import Choices, Generate, Task

        ROWS = [{"n": n} for n in range(40)]
        PARITY = Task("parity", ROWS, lambda row: Choices(f"Is {row['n']} even? It is", (" even", " odd"), row["n"] % 2))
        GENERATES = Task("generates", ROWS, lambda row: Generate(f"{row['n']} is", ("x",), (), max_tokens=5), ("exact_match",))

        def test_knows(lmeval, lm):
            result = lmeval.task(lm, PARITY, shots=0)
            assert result.accuracy.low < result.chance < result.accuracy.high

        def test_generates(lmeval, lm):
            assert lmeval.task(lm, GENERATES).exact_match == 0

        def test_wrong(lmeval, lm):
            lmeval.task(lm, "mmlu")
        """,
    )
    options = ("--lm", "short:Short", "--lmeval-limit", "12", "--lmeval-budget", "1000")
    result = project.runpytest_subprocess("-p", "no:cacheprovider", *options)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*_ test_wrong _*", "*mmlu is a suite*lmeval.suite*"])
    assert "site-packages" not in result.stdout.str()
    result.stdout.fnmatch_lines(["*parity, 0-shot, exact-any-chunk*", "*accuracy * to *", "*chance *0.5*", "*exact match *0*"])
    folder = project.path / ".lmeval"
    record, generated = json.loads((folder / "metrics.json").read_text())["records"]
    assert (record["kind"], record["subject"], record["metrics"]["accuracy"]["n"]) == ("task", "parity, 0-shot", 12)
    assert record["details"]["prefix_sharing"] == "prefix sharing: on"
    assert record["certificate"]["verdict"] == "exact-any-chunk"
    lines = [json.loads(line) for line in (folder / record["examples"]).read_text().splitlines()]
    assert len(lines) == 12
    assert {"id", "prompt", "choices", "loglikelihoods", "output", "target", "scores", "read", "saved"} <= set(lines[0])
    outputs = [json.loads(line)["output"] for line in (folder / generated["examples"]).read_text().splitlines()]
    assert {type(output) for output in outputs} == {str}
    assert "parity" in (folder / "summary.md").read_text()


@pytest.mark.parametrize(
    ("module", "sharing"),
    [
        pytest.param(Tiny, "prefix sharing: on", marks=pytest.mark.thorough),
        (Steps, "prefix sharing: off (exact-step-only)"),
        (Whole, "prefix sharing: off (the model has no state to carry)"),
        pytest.param(Mixing, "prefix sharing: on", marks=pytest.mark.thorough),
    ],
)
def test_prefixes_are_shared_where_the_laws_allow_it_and_answers_are_the_same(module, sharing):
    lm = as_model(module())
    certificate = probe(lm, budget=1000).certificate
    policies = [policy_for(lm, certificate, batch_size=batch_size) for batch_size in (8, 1)]
    together, alone = (measure_task(lm, PARITY, policy=policy, limit=16) for policy in policies)
    assert together.record.details["prefix_sharing"] == sharing
    for one, other in zip(together.examples, alone.examples, strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-3)
    together, alone = (measure_task(lm, GENERATES, policy=policy).examples for policy in policies)
    assert [example.output for example in together] == [example.output for example in alone]


def test_a_suite_averages_all_its_members_unless_one_failed():
    context = context_of(None)
    result = Lmeval(context).suite(LM, Suite("both", (FIRST, PARITY)))
    assert result.average == pytest.approx((result["first"].accuracy + result["parity"].accuracy) / 2)
    assert result.average.low < result.average < result.average.high
    assert [record.kind for record in context.log.records] == ["task", "task", "suite"]
    assert result.record.settings["members"] == {"first": "accuracy", "parity": "accuracy"}
    assert set(result.record.metrics) == {"average", "first", "parity"}
    with pytest.raises(TaskError, match=r"1 of the 2 tasks of both failed, so .*: \[parity\] parity, row 35 cannot be asked"):
        Lmeval(context).suite(LM, Suite("both", (FIRST, BROKEN)))
    suite = context.log.records[-1]
    assert list(suite.details["failed"]) == ["parity"]
    assert set(suite.metrics) == {"first"}


def test_an_interrupted_task_continues_where_it_stopped(tmp_path):
    with pytest.raises(TaskError, match="row 35 cannot be asked"):
        Lmeval(context_of(tmp_path)).task(LM, BROKEN, batch_size=2)
    context = context_of(tmp_path)
    assert Lmeval(context).task(LM, PARITY, batch_size=2).resumed == 34
    assert "34 answers taken from an earlier run" in context.log.notes[0]
    again = Lmeval(context_of(tmp_path)).task(LM, PARITY, batch_size=2)  # of a run that was killed after this call
    assert again.resumed == 40


def test_datasets_come_from_a_mirror(tmp_path):
    file = tmp_path / "nyu-mll/glue/sst2/validation.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"sentence": f"film {n}", "label": n % 2, "idx": n}) + "\n" for n in range(20)))
    lmeval = Lmeval(context_of(None, mirror=str(tmp_path)))
    for name in ("sst2", "smallbench:sst2"):
        result = lmeval.task(LM, name)
        assert (result.chance, result.record.subject) == (0.5, f"{name}, 0-shot")
    with pytest.raises(CorpusError, match=r"does not hold nyu-mll/glue: looked for .*rte/validation with the ends .parquet"):
        lmeval.task(LM, "rte")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lmeval: lmeval.task(LM, "bolq"), "bolq.*boolq"),
        (lambda lmeval: lmeval.suite(LM, "gleu"), "gleu.*glue"),
        (lambda lmeval: lmeval.task(NON_CAUSAL, PARITY), "is non-causal"),
        (lambda lmeval: lmeval.task(LM, PARITY, shots=2), "shown 2 example.*none"),
    ],
)
def test_a_wrong_call_is_refused_with_the_reason(call, message):
    with pytest.raises(LmevalError, match=f"(?s){message}"):
        call(Lmeval(context_of(None)))
