"""The page "What this precision cost" joins what one run recorded of a model and its reference, and measures nothing."""

import pytest
from documents import chosen, document, generated, model, task_of, write_run
from hypothesis import given, strategies as st
from msgspec.structs import replace

from pytest_lmeval.__main__ import main
from pytest_lmeval.gates._pairs import pair
from pytest_lmeval.gates._scores import scores_of
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import NamedRun, load
from pytest_lmeval.records._measured import Precision, Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.report import _pages as pages, _precision_cost as cost
from pytest_lmeval.report._words import interval, number


def holding(name, bits, stored):
    own = {"bytes_before": None, "bytes_after": 0, "converted": 1.0, "converted_multiplied": 1.0, "kept": {}}
    return Precision(name=name, bits_per_weight=bits, stored_bits_per_weight=stored, **own)


WHOLE = model("zoo:lstm", bytes=4_000_000, precision=holding("fp32", 32.0, 32.0))
FEW = model("zoo:lstm@int8", bytes=1_000_000, dtype="int8", precision=holding("int8", 8.0, 8.27))
SIDES = (WHOLE, FEW)


def agreement_of(lm=FEW, reference=WHOLE, *, kl="kl", subject="stdlib[test]", **changes):
    metrics = {
        "agreement": Value(0.9931, low=0.99, high=0.995, n=2000),
        kl: Value(0.00026, "nats/token", low=0.0002, high=0.0003),
        f"{kl}_p99": Value(0.0051, "nats/token"),
        f"{kl}_max": Value(0.0417, "nats/token"),
        "nll_difference": Value(0.00031, "nats/token", low=-0.0001, high=0.0007),
        "perplexity_ratio": Value(1.00031, low=0.9999, high=1.0007),
    }
    settings = {"reference": schema.to_plain(reference), "tokens": 2000}
    own = {"kind": "agreement", "subject": f"{subject} with {reference.spec}", "test": "t.py::test_near", "metrics": metrics}
    return Record(**{**own, "lm": lm, "settings": settings, **changes})


def latency_of(lm, itl, **settings):
    metrics = {"ttft": Value(10 * itl, "ms", low=9 * itl, high=11 * itl), "itl": Value(itl, "ms"), "prefill": Value(1.0, "ms")}
    own = {"kind": "latency", "subject": "batch 1, 64 tokens", "settings": {"seq_len": 64, "threads": 1, **settings}}
    return Record(lm=lm, metrics=metrics, test="t.py::test_fast", **own)


def throughput_of(lm, rate, runs):
    own = {"kind": "throughput", "subject": "batch 32, 512 tokens", "settings": {"seq_len": 512, "runs": runs}}
    return Record(lm=lm, metrics={"tokens_per_second": Value(rate, "tokens/s")}, test="t.py::test_wide", **own)


def asked(lm, right, file=None, **changes):
    """A task, of whose questions this share is answered right."""
    return task_of(lm=lm, examples=file, accuracy=right, **changes)


def rows(found, folder=None):
    """number -> the other cells."""
    return {row[0]: row[1:] for row in cost.section(found, folder).rows}


def flipped(folder, before, after, *, ask=chosen, records=(), **changes):
    """The page of a run in which two models answered a task: what each question scored, before and after."""
    sides = [[ask(at, is_right=right) for at, right in enumerate(side)] for side in (before, after)]
    names = ["before", "after"]
    told = [
        asked(lm, sum(side) / len(side), f"examples/{name}.jsonl", **changes)
        for lm, side, name in zip(SIDES, (before, after), names, strict=True)
    ]
    found = document(agreement_of(), *told, *records)
    return found, write_run(folder / "run", found, **dict(zip(names, sides, strict=True)))


def test_without_a_record_of_agreement_there_is_no_such_page(tmp_path):
    assert cost.section(document(asked(WHOLE, 0.5), asked(FEW, 0.4)), tmp_path) is None
    assert cost.section(document(), None) is None
    assert cost.section(document(agreement_of(metrics={}, not_measured="why")), tmp_path) is None
    assert cost.section(document(agreement_of(settings={})), tmp_path) is None
    assert cost.section(document(agreement_of()), tmp_path) is not None


def test_runs_side_by_side_have_no_such_page():
    assert cost.section(document(agreement_of(), runs=[NamedRun(label="one")]), None) is None


def test_the_numbers_are_those_of_the_records():
    record = agreement_of()
    found = rows(document(record, *(latency_of(*one) for one in zip(SIDES, (2.0, 3.0), strict=True))))
    assert found["precision of the weights"][:2] == ["fp32", "int8"]
    assert found["bytes"] == ["3.8 MiB", "976.6 KiB", "x 0.25", ""]
    assert found["bits per weight, value"] == ["32", "8", "x 0.25", ""]
    assert found["bits per weight, stored"] == ["32", "8.27", "x 0.2584", ""]
    named = {"same top token": "agreement", "mean KL": "kl", "KL, p99": "kl_p99", "largest KL": "kl_max"}
    for label, name in {**named, "loss minus that of the reference": "nll_difference"}.items():
        value = record.metrics[name]
        assert found[f"{label}: stdlib[test], 2,000 tokens"] == ["", "", number(value, value.unit), interval(value)]
    assert found["perplexity ratio: stdlib[test], 2,000 tokens"][2:] == ["x 1.0003", "0.9999 to 1.001"]
    assert found["itl: batch 1, 64 tokens"] == ["2 ms", "3 ms", "x 1.5", ""]
    assert found["ttft: batch 1, 64 tokens"] == ["20 ms (18 to 22)", "30 ms (27 to 33)", "x 1.5", ""]
    assert not any("prefill" in name for name in found)


def test_a_kl_of_a_kept_file_is_said_to_be_a_lower_bound_and_both_corpora_have_rows():
    base = agreement_of(kl="kl_at_least")
    base = replace(base, subject="wiki with base:kept.safetensors (zoo:lstm)")
    found = rows(document(agreement_of(), base))
    assert (
        found["mean KL, a lower bound: wiki with base:kept.safetensors (zoo:lstm), 2,000 tokens"][2]
        == "at least 0.00026 nats/token"
    )
    assert (
        found["largest KL, a lower bound: wiki with base:kept.safetensors (zoo:lstm), 2,000 tokens"][2]
        == "at least 0.0417 nats/token"
    )
    assert found["mean KL: stdlib[test], 2,000 tokens"][2] == "0.00026 nats/token"
    assert list(found).count("bytes") == 1


def test_a_percentile_that_too_few_tokens_tell_is_replaced_by_the_next():
    record = agreement_of()
    record.metrics.pop("kl_p99")
    record.metrics["kl_p95"] = Value(0.004, "nats/token")
    assert rows(document(record))["KL, p95: stdlib[test], 2,000 tokens"][2] == "0.004 nats/token"


def test_of_a_served_model_its_weights_are_left_out():
    served = model("server:local", bytes=0, server={"model": "lstm"})
    found = rows(document(agreement_of(served)))
    assert not {"bytes", "precision of the weights", "bits per weight, value"} & set(found)


def test_questions_lost_and_won_are_counted_and_swapped_models_are_seen(tmp_path):
    before, after = [1] * 30 + [0] * 10, [0] * 5 + [1] * 25 + [1] * 2 + [0] * 8
    found, folder = flipped(tmp_path, before, after)
    was, now, text, between = rows(found, folder)["brackets: accuracy"]
    assert (was, now) == ("0.75", "0.675")
    assert text == "-0.075 (5 lost, 2 won of 40 questions)"
    low, high = map(float, between.split(" to "))
    assert low < -0.075 < high
    swapped = document(agreement_of(WHOLE, FEW), *found.records[1:])
    was, now, text, between = rows(swapped, folder)["brackets: accuracy"]
    assert (was, now) == ("0.675", "0.75")
    assert text == "+0.075 (2 lost, 5 won of 40 questions)"
    assert tuple(map(float, between.split(" to "))) == pytest.approx((-high, -low), rel=1e-3)


scores = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 1.0])] * 2, st.integers(0, 4)), min_size=1, max_size=30)


@given(scores, st.booleans(), st.integers(1, 3))
def test_the_questions_lost_and_won_are_those_of_a_gate(tmp_path_factory, scored, grouped, repeats):
    folder = tmp_path_factory.mktemp("flips")
    metrics = {"squad_f1": Value(0.5, higher_is_better=True)}
    sides = [
        [
            generated(at, "", repeat=repeat, scores={"squad_f1": one[side]}, group=f"text {one[2]}" if grouped else None)
            for at, one in enumerate(scored)
            for repeat in range(repeats)
        ]
        for side in (0, 1)
    ]
    told = [asked(lm, 0.5, f"examples/{at}.jsonl", metrics=metrics) for at, lm in enumerate(SIDES)]
    folder = write_run(folder / "run", document(*told), **{"0": sides[0], "1": sides[1]})
    base, new = (scores_of(record, folder) for record in told)
    difference, _, row = pair("squad_f1", base, new, up=True, drawn=repeats > 1)
    found = cost.flips(*sides, metric("squad_f1"))
    assert (found.lost, found.won, found.questions) == (row.lost, row.won, len(scored))
    assert found.difference == pytest.approx(difference.value)
    assert found.interval == (None if difference.low is None else pytest.approx((difference.low, difference.high)))


def test_questions_that_only_one_model_answered_are_not_counted():
    base, new = ([chosen(at) for at in numbers] for numbers in ((0, 1, 2), (2, 3)))
    assert cost.flips(base, new, metric("accuracy")).questions == 1
    assert cost.flips(base, new[1:], metric("accuracy")) is None


def test_without_the_files_of_examples_the_page_says_that_flips_are_unknown(tmp_path):
    found, folder = flipped(tmp_path, [1, 1], [0, 1])
    (folder / "examples" / "after.jsonl").unlink()
    was, now, text, between = rows(found, folder)["brackets: accuracy"]
    assert (was, now, between) == ("1", "0.5", "")
    assert text == (
        "questions lost and won: unknown; the examples of examples/after.jsonl are not shown: No such file or directory"
    )
    assert "no files of examples" in rows(found, None)["brackets: accuracy"][2]
    assert main(["render", str(folder)]) == 0


def test_damaged_lines_are_counted_beside_what_the_others_say(tmp_path):
    found, folder = flipped(tmp_path, [1, 1, 1], [0, 1, 1])
    file = folder / "examples" / "after.jsonl"
    file.write_text(file.read_text().replace('"id": "id2"', '"id": 2'))
    text = rows(found, folder)["brackets: accuracy"][2]
    assert text.startswith("-0.5 (1 lost, 0 won of 2 questions); 1 of 3 lines of examples/after.jsonl cannot be read")


def test_a_metric_that_was_withheld_is_said_to_be_and_a_task_without_a_judge_is_left_out():
    why = {"withheld": {"accuracy": "3 of 10 generated answers were cut off."}}
    cut = asked(FEW, 0.5, metrics={"cut_off": Value(0.3)}, details=why)
    assert rows(document(agreement_of(), asked(WHOLE, 0.5), cut))["brackets: accuracy"] == [
        "0.5", "not measured", "3 of 10 generated answers were cut off.", ""
    ]  # fmt: skip
    neither = [asked(lm, 0.5, metrics={"word_perplexity": Value(3.0)}) for lm in SIDES]
    assert not any(name.startswith("brackets") for name in rows(document(agreement_of(), *neither)))


def test_only_what_was_asked_and_timed_alike_is_joined_and_what_is_missing_is_named():
    other = asked(FEW, 0.5, settings={"limit": 5})
    timed = [latency_of(WHOLE, 2.0), latency_of(FEW, 3.0, threads=2), latency_of(model("demo"), 1.0)]
    found = rows(document(agreement_of(), asked(WHOLE, 0.5), other, *timed))
    assert found["tasks"][2].startswith("lmeval.task of both")
    assert found["speed"][2].startswith("lmeval.latency or lmeval.throughput of both")
    assert not any(name.startswith(("brackets", "itl")) for name in found)
    elsewhere = replace(FEW, device="cuda:0")
    assert "speed" in rows(document(agreement_of(elsewhere), latency_of(WHOLE, 2.0), latency_of(elsewhere, 1.0)))


def test_how_often_something_was_timed_and_in_what_batches_does_not_part_it():
    alike = [
        asked(lm, 0.5, settings={"limit": 5, "batch_size": size, **more})
        for lm, size, more in zip(SIDES, (8, 16), ({}, {"invariant": True}), strict=True)
    ]
    found = rows(document(agreement_of(), *alike, throughput_of(WHOLE, 4000.0, 9), throughput_of(FEW, 1000.0, 4)))
    assert found["tokens per second: batch 32, 512 tokens"] == ["4,000 tokens/s", "1,000 tokens/s", "x 0.25", ""]
    assert "brackets: accuracy" in found
    assert not {"tasks", "speed"} & set(found)


def test_weights_that_changed_under_the_same_spec_are_another_model():
    found = rows(document(agreement_of(), latency_of(replace(WHOLE, fingerprint="other"), 2.0), latency_of(FEW, 3.0)))
    assert "speed" in found


def test_several_models_have_a_block_each_and_text_of_models_is_escaped(tmp_path):
    hostile = model("<script>alert(1)</script>|`@none`", bytes=2_000_000)
    found = document(agreement_of(), agreement_of(hostile))
    section = cost.section(found, tmp_path)
    assert section.columns[0] == "model"
    names = [row[0] for row in section.rows]
    assert set(names) == {f"{lm.spec} against zoo:lstm" for lm in (FEW, hostile)}
    shown = replace_sections(found, [section])
    assert "<script>alert(1)" not in pages.render("report.html", shown)
    assert "<script>" not in pages.render("summary.md", shown)


def replace_sections(found, sections):
    return type(found)(run=found.run, environment=found.environment, records=found.records, sections=sections)


REAL = """
import pytest
from pytest_lmeval import Choices, Task

ROWS = [{"opens": name + bracket} for name in ("f", "x = ", "return ", "items", "print") for bracket in "(["]


def ask(row):
    return Choices(f"{row['opens']}a, b", (")", "]"), answer="([".index(row["opens"][-1]))


def test_near(lmeval):
    lmeval.agreement("zoo:lstm@bf16", "zoo:lstm", "stdlib", tokens=300)


@pytest.mark.parametrize("spec", ["zoo:lstm", "zoo:lstm@bf16"])
def test_closes(lmeval, load_lm, spec):
    lmeval.task(load_lm(spec), Task("brackets", ROWS, ask))
    lmeval.latency(load_lm(spec), seq_len=16, runs=2, warm_up=1)
"""


@pytest.mark.thorough
def test_a_real_run_shows_what_bfloat16_cost(pytester):
    pytester.makepyfile(REAL)
    pytester.runpytest_subprocess("-p", "no:xdist").assert_outcomes(passed=3)
    folder = pytester.path / ".lmeval"
    found = load(folder)
    near = next(record for record in found.records if record.kind == "agreement")
    shown = rows(found, folder)
    assert shown["precision of the weights"][:2] == ["fp32", "bf16"]
    assert shown["bytes"][2] == "x 0.5"
    assert shown["same top token: stdlib[test], 299 tokens"][2] == number(near.metrics["agreement"])
    assert shown["brackets, 0-shot: accuracy"][2].endswith("won of 10 questions)")
    first, second = (float(record.metrics["itl"]) for record in found.records if record.kind == "latency")
    assert shown["itl: batch 1, 16 tokens"][2] == f"x {second / first:.3g}"
    for page in ("summary.md", "report.html"):
        assert cost.TITLE in (folder / page).read_text()
