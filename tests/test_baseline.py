"""The file that runs are compared with: the same bytes for the same numbers, and a plain word where it was damaged."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lmeval.__main__ import main
from pytest_lmeval.data.ids import as_corpus
from pytest_lmeval.errors import BaselineError
from pytest_lmeval.gates.baseline import Baseline, examples_file, read, write
from pytest_lmeval.gates.compare import Side, compare
from pytest_lmeval.gates.entry import differs, entry_of, gated, names_of
from pytest_lmeval.gates.explain import remarks, table
from pytest_lmeval.gates.gate import unheard
from pytest_lmeval.gates.margins import COSTS, Margins, read_marker
from pytest_lmeval.gates.pairing import pair
from pytest_lmeval.gates.scores import Scores, rounded
from pytest_lmeval.records.record import Record
from pytest_lmeval.records.value import Metric
from pytest_lmeval.training import result

LM = {"spec": "demo", "parameters": 1, "bytes": 4, "dtype": "float32", "device": "cpu", "fingerprint": "f" * 16}
ENTRY = ("tests", "test_a.py::test_a", "task boolq, 0-shot")
WORSE = {"verdict": "worse", "base": 0.9, "new": 0.7}
LEFT_OUT = object()
FINITE = st.floats(-1e9, 1e9)


def record(kind="task", subject="boolq, 0-shot", *, outcome="passed", test="test_a.py::test_a", **changes):
    metrics = {"accuracy": Metric(0.5, low=0.4, high=0.6, n=2, higher_is_better=True)}
    made = Record(
        kind=kind, subject=subject, lm=LM, settings={"shots": 0}, metrics=changes.pop("metrics", metrics), test=test, **changes
    )
    return {**made.to_json(), "outcome": outcome}


def baseline(*records):
    tests = {"test_a.py::test_a": {name: entry_of(one) for name, one in zip(names_of(records), records, strict=True)}}
    scores = {("test_a.py::test_a", names_of(records)[0]): Scores(["a", "b"], [None, "g"], {"accuracy": [1, 0]})}
    return Baseline({"python": "3.11", "packages": {"torch": "2"}}, tests, scores)


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """Writes the metrics.json of a run."""
    monkeypatch.chdir(tmp_path)

    def wrote(*records, folder=".lmeval"):
        (tmp_path / folder).mkdir(exist_ok=True)
        environment = {
            "python": "3.11",
            "device": "cpu",
            "cpu": "x",
            "threads": 1,
            "packages": {},
            "commit": "c",
            "dirty": True,
        }
        document = {"schema": 1, "run": {}, "environment": environment, "records": list(records)}
        (tmp_path / folder / "metrics.json").write_text(json.dumps(document))

    return wrote


def accept(*options):
    return main(["baseline", "accept", "--to", "b.json", *options])


# ------------------------------------------------------------------------------------------- the file


def test_what_is_written_reads_the_same_and_writes_the_same_bytes(tmp_path):
    path, again = tmp_path / "b.json", tmp_path / "again.json"
    write(path, baseline(record(), record("perplexity", "stdlib[test]", cost={"state_bytes": 12})))
    found = read(path)
    assert found == baseline(record(), record("perplexity", "stdlib[test]", cost={"state_bytes": 12}))
    write(again, found)
    assert again.read_bytes() == path.read_bytes()
    assert examples_file(again).read_bytes() == examples_file(path).read_bytes()


def test_a_metric_is_a_line_and_nothing_of_the_machine_or_the_clock_is_in_it(tmp_path):
    path = tmp_path / "b.json"
    timed = {
        "accuracy": Metric(1 / 3, n=3, higher_is_better=True),
        "ttft": Metric(1.5, "ms"),
        "tokens_per_second": Metric(3e4, "tokens/s"),
    }
    cost = {"seconds": 1.5, "flops": 10, "peak_bytes": 5}
    write(path, baseline(record("task", "text:/home/me/notes.txt[test]", metrics=timed, cost=cost)))
    (line,) = [line for line in path.read_text().splitlines() if '"accuracy": {' in line]
    assert json.loads("{" + line.strip().rstrip(",") + "}")["accuracy"]["value"] == 0.3333333
    for word in ("ttft", "tokens_per_second", "seconds", "peak_bytes", "/home", str(tmp_path)):
        assert word not in path.read_text()


@given(FINITE)
def test_rounding_twice_is_rounding_once(value):
    assert rounded(rounded(value)) == rounded(value) == pytest.approx(value, rel=1e-6)
    assert json.loads(json.dumps(rounded(value))) == rounded(value)


def test_no_file_is_no_baseline(tmp_path):
    assert read(tmp_path / "none.json") is None


@settings(max_examples=40)
@given(st.data())
def test_a_file_that_was_cut_off_is_told_with_its_place(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "b.json"
    write(path, baseline(record()))
    whole = path.read_text().rstrip()
    path.write_text(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(BaselineError, match=r"b\.json is no JSON: .* at line \d+, column \d+\. It was cut off"):
        read(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema",), 2, r"is of schema 2, and this version of pytest-lmeval reads schema 1"),
        (("tests",), [], r"tests is a list, where an object stands"),
        (("tests", "test_a.py::test_a", "task boolq, 0-shot", "headline"), 1, r"headline is 1, where a text or null stands"),
        (
            ("tests", "test_a.py::test_a", "task boolq, 0-shot", "metrics", "accuracy", "value"),
            "0.9",
            r"accuracy > value is \"0\.9\"",
        ),
        (
            ("tests", "test_a.py::test_a", "task boolq, 0-shot", "metrics", "accuracy"),
            0.9,
            r"accuracy is 0\.9, where an object stands",
        ),
        (
            ("tests", "test_a.py::test_a", "task boolq, 0-shot", "costs"),
            {"flops": "many"},
            r"costs > flops is \"many\", where a number",
        ),
        (("environment", "packages"), [1], r"environment > packages is a list, where an object or null stands"),
        ((*ENTRY, "verdict"), LEFT_OUT, r"boolq, 0-shot > verdict is missing, where a text or null stands"),
        ((*ENTRY, "lm"), {}, r"lm > spec is missing, where a text stands"),
        ((*ENTRY, "headline"), "f1", r"headline is \"f1\", which is none of its metrics"),
        ((*ENTRY, "metrics", "accuracy", "value"), float("inf"), r"accuracy > value is Infinity, where a number stands"),
        ((*ENTRY, "metrics", "accuracy", "value"), 10**400, r"accuracy > value is 1000.*, where a number stands"),
        ((*ENTRY, "metrics", "accuracy", "n"), 2.5, r"accuracy > n is 2\.5, where a whole number or null stands"),
        ((*ENTRY, "metrics", "perplexity"), {"value": 0}, r"perplexity > value is 0, where a number above 0 stands"),
        ((*ENTRY, "metrics", "accuracy", "value"), 0.98, r"accuracy is 0\.98 of 2, and its examples make 0\.5 of 2"),
        ((*ENTRY, "metrics", "accuracy", "n"), 3, r"accuracy is 0\.5 of 3, and its examples make 0\.5 of 2"),
    ],
)
def test_a_file_that_was_edited_by_hand_is_told_with_the_field(tmp_path, place, value, message):
    path = tmp_path / "b.json"
    write(path, baseline(record()))
    document = json.loads(path.read_text())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is LEFT_OUT:
        del inner[place[-1]]
    path.write_text(json.dumps(document).replace("Infinity", "1e999"))
    with pytest.raises(BaselineError, match=message):
        read(path)


@pytest.mark.parametrize("text", ['["a",null,1]', '{"test": 1}', "NaN", '["a",null]', '["a",null,"x"]', "[1"])
def test_examples_that_were_edited_are_told_with_the_line(tmp_path, text):
    path = tmp_path / "b.json"
    write(path, baseline(record()))
    lines = examples_file(path).read_text().splitlines()
    lines[0 if text == '["a",null,1]' else 1] = text
    examples_file(path).write_text("\n".join(lines) + "\n")
    with pytest.raises(BaselineError, match=r"b\.examples\.jsonl.*line [12]"):
        read(path)


@pytest.mark.parametrize("columns", [5, ["id", "group", ["x"]], ["id"], ["id", "group", "x", "x"], None])
def test_a_head_of_examples_that_was_edited_is_told_with_the_line(tmp_path, columns):
    path = tmp_path / "b.json"
    write(path, baseline(record()))
    head, *rest = examples_file(path).read_text().splitlines()
    examples_file(path).write_text("\n".join([json.dumps({**json.loads(head), "columns": columns}), *rest]))
    with pytest.raises(BaselineError, match=r"b\.examples\.jsonl, line 1 is .*neither the head of a record"):
        read(path)


@pytest.mark.parametrize("which", [Path, examples_file])
def test_a_file_that_is_nested_without_end_is_told(tmp_path, which):
    path = tmp_path / "b.json"
    write(path, baseline(record()))
    which(path).write_text("[" * 100_000)
    with pytest.raises(BaselineError, match="is nested more deeply than any baseline"):
        read(path)


def reading(n=40):
    """A baseline of a reading of n blocks, whose metrics are what its columns make of them."""
    tokens, nats = [10 + place for place in range(n)], [1.5 * (10 + place) + place % 7 for place in range(n)]
    columns = {
        "tokens": tokens,
        "nats": nats,
        "bytes": [2 * count for count in tokens],
        "top1": [count // 2 for count in tokens],
    }
    nll = sum(nats) / sum(tokens)
    values = {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / 2 / math.log(2)}
    values["token_accuracy_top1"] = sum(columns["top1"]) / sum(tokens)
    metrics = {name: Metric(value, n=sum(tokens), higher_is_better=False) for name, value in values.items()}
    entry = entry_of(record("perplexity", "s", metrics=metrics))
    scores = Scores([f"b{place}" for place in range(n)], [None] * n, columns)
    return Baseline({}, {"t": {"perplexity s": entry}}, {("t", "perplexity s"): scores})


def test_the_summary_of_a_reading_is_what_its_examples_make(tmp_path):
    write(tmp_path / "b.json", reading())
    assert read(tmp_path / "b.json") == reading()


@settings(max_examples=30)
@given(st.integers(1, 40), st.sampled_from([("task", baseline), ("reading", reading)]))
def test_of_examples_that_were_cut_off_no_line_may_be_missing(tmp_path_factory, kept, kind):
    """The head alone, or some of the lines: what is left agrees with the run, so the gate would pass."""
    path, make = tmp_path_factory.mktemp("cut") / "b.json", kind[1]
    write(path, make() if kind[0] == "reading" else make(record()))
    lines = examples_file(path).read_text().splitlines()
    examples_file(path).write_text("\n".join(lines[: min(kept, len(lines) - 1)]))
    with pytest.raises(BaselineError, match=r"do not fit together: .* and its examples make .* of .*Restore both"):
        read(path)


def test_answers_that_were_emptied_are_told(tmp_path):
    path = tmp_path / "b.json"
    write(path, baseline(record()))
    examples_file(path).write_text(examples_file(path).read_text().replace(",1]", ",null]"))
    with pytest.raises(BaselineError, match=r"accuracy is 0\.5 of 2, and its examples make 0 of 1"):
        read(path)


# ------------------------------------------------------------------------------------------ accepting


def test_accepting_some_tests_leaves_the_others_as_they_were(run_folder, capsys):
    run_folder(record(), record(test="test_a.py::test_b"))
    assert accept() == 0
    better = {"accuracy": Metric(0.8, n=400, higher_is_better=True)}
    run_folder(record(metrics=better), record(test="test_a.py::test_b", metrics=better))
    assert accept("-k", "test_b") == 0
    tests = json.loads(Path("b.json").read_text())["tests"]
    values = [tests[f"test_a.py::test_{name}"]["task boolq, 0-shot"]["metrics"]["accuracy"]["value"] for name in "ab"]
    assert values == [0.5, 0.8]
    run_folder(record(test="test_a.py::test_c"))
    assert accept("--prune") == 0
    assert list(json.loads(Path("b.json").read_text())["tests"]) == ["test_a.py::test_c"]
    assert "written to b.json and b.examples.jsonl: commit both" in capsys.readouterr().out


def test_the_very_name_of_a_test_does_not_take_in_others_that_begin_so(run_folder):
    run_folder(record(), record(test="test_a.py::test_a_and_more"))
    assert accept("-k", "test_a.py::test_a") == 0
    assert list(json.loads(Path("b.json").read_text())["tests"]) == ["test_a.py::test_a"]
    assert accept("-k", "*more") == 0
    assert len(json.loads(Path("b.json").read_text())["tests"]) == 2


def test_what_failed_for_its_baseline_is_accepted_and_what_failed_for_itself_is_not(run_folder, capsys):
    worse = record(outcome="failed", gate={"accuracy": {**WORSE, "failed": True}})
    for_itself = [record(test="test_a.py::test_b", outcome="failed", gate=gate) for gate in (None, {"accuracy": WORSE})]
    run_folder(worse, *for_itself)
    assert accept() == 0
    assert list(json.loads(Path("b.json").read_text())["tests"]) == ["test_a.py::test_a"]
    assert "not accepted: test_a.py::test_b (it failed, and not for its baseline)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (None, [], ".lmeval cannot be read (No such file or directory). A run writes metrics.json"),
        ([], [], "holds no record"),
        ([record()], ["-k", "other"], "no test in it matches 'other'; it has test_a.py::test_a."),
        ([record(outcome="failed")], [], "test_a.py::test_a failed, and not for the baseline"),
    ],
)
def test_where_nothing_can_be_accepted_it_is_said_why(run_folder, capsys, tmp_path, records, options, message):
    if records is not None:
        run_folder(*records)
    assert accept(*options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("records",), 3, "holds no list of records"),
        (("records", 0), 3, "record 1 is 3, no object"),
        (("records", 0, "test"), 3, "record 1 (3): test is 3, no text"),
        (("records", 0, "gate"), 3, "gate is 3, no object"),
        (("records", 0, "metrics", "accuracy"), 0.5, "accuracy has no value, and was left out"),
        (("records", 0, "metrics", "accuracy", "n"), "x", 'accuracy: n is "x", no number'),
        (("records", 0, "cost", "flops"), "x", 'cost: flops is "x", no number'),
        (("records", 0, "examples"), 3, "examples is 3, no text"),
        (("environment", "packages"), [1], "environment: packages is [1], no object"),
    ],
)
def test_a_run_that_was_edited_is_not_accepted_and_the_field_is_told(run_folder, capsys, tmp_path, place, value, message):
    run_folder(record())
    document = json.loads(Path(".lmeval/metrics.json").read_text())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    Path(".lmeval/metrics.json").write_text(json.dumps(document))
    assert accept() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()


def test_a_file_that_cannot_be_written_is_told(run_folder, capsys):
    run_folder(record())
    Path("taken").write_text("a file where a folder should be")
    assert accept("--to", "taken/b.json", "--prune") == 2
    assert "taken/b.json cannot be written (" in capsys.readouterr().err


def test_a_command_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["nonsense"])
    assert ended.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- what is compared


def test_one_number_a_record_is_gated_and_the_marker_says_which_else():
    reading = {name: Metric(2.0, n=9, higher_is_better=False) for name in ("nll", "bits_per_byte", "perplexity")}
    entry = entry_of(record("perplexity", "stdlib[test]", metrics=reading))
    assert gated(entry, Margins()) == ["bits_per_byte"]
    assert gated(entry, read_marker((), {"perplexity": "1%"})) == ["perplexity"]  # the same losses in another unit
    assert gated(entry, read_marker((), {"bits_per_byte": "off"})) == []
    assert gated(entry, read_marker(("off",), {})) == []
    assert gated(entry_of(record()), Margins()) == ["accuracy"]
    assert gated(entry_of(record("custom", "passkey")), Margins()) == []


def test_records_of_one_name_are_numbered_and_settings_that_differ_are_told():
    assert names_of([record(), record()]) == ["task boolq, 0-shot", "task boolq, 0-shot #2"]
    base, new = entry_of(record()), entry_of(record())
    new["settings"]["shots"], new["lm"]["dtype"] = 5, "bfloat16"
    assert differs(base, new) == ["dtype was float32, is bfloat16", "shots was 0, is 5"]


def test_the_same_text_in_other_tokens_has_no_pairs_but_by_its_bytes():
    old = Scores(["a", "b"], [None] * 2, {"tokens": [10, 20], "nats": [20, 40], "bytes": [30, 60], "top1": [5, 9]})
    new = Scores(["a", "b"], [None] * 2, {"tokens": [5, 9], "nats": [21, 40], "bytes": [30, 60], "top1": [3, 4]})
    assert pair("nll", old, new, up=False) is None
    assert pair("token_accuracy_top1", old, new, up=True) is None
    assert pair("bits_per_byte", old, new, up=False).difference.value > 0


@pytest.mark.parametrize(("up", "first"), [(True, "e0"), (False, "e29")])
def test_of_many_that_changed_those_that_lost_most_are_named(up, first):
    ids = [f"e{place}" for place in range(30)]
    old = Scores(ids, [None] * 30, {"grade": [0] * 30})
    new = Scores(ids, [None] * 30, {"grade": [place - 14.5 for place in range(30)]})
    row = pair("grade", old, new, up=up).row
    assert (row["flipped"][0]["id"], len(row["flipped"])) == (first, 20)
    assert (row["lost"], row["won"]) == (15, 15)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_blocks_are_called_by_what_they_hold_however_they_were_read(tmp_path, chunk_size):
    from toys import Functional

    from pytest_lmeval.measures._perplexity import measure_perplexity
    from pytest_lmeval.models.sources import as_model

    lm = as_model(Functional())
    ids = [place % lm.vocab_size for place in range(200)]
    for name, size in (("a", None), ("b", chunk_size)):
        measure_perplexity(lm, as_corpus(ids), chunk_size=size, units=tmp_path / name)
    rows = {name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab"}
    assert [row["id"] for row in rows["a"]] == [row["id"] for row in rows["b"]]
    assert [row["tokens"] for row in rows["a"]] == [64, 64, 64, 7]
    assert [row["nats"] for row in rows["a"]] == pytest.approx([row["nats"] for row in rows["b"]])
    measure_perplexity(lm, as_corpus(ids[1:]), units=tmp_path / "c")
    assert json.loads((tmp_path / "c").read_text().splitlines()[0])["id"] != rows["a"][0]["id"]


def test_the_worst_stands_first():
    rows = {
        "good": {"verdict": "identical", "base": 1, "new": 1},
        "bad": {"verdict": "worse", "base": 1, "new": 0, "difference": -1, "low": -1.5, "high": -0.5, "margin": 0, "n": 9},
    }
    lines = table([record(test="a.py::fine", gate={"good": rows["good"]}), record(test="b.py::bad", gate=rows)], width=100)
    assert lines[0] == "b.py::bad"
    assert lines[1].split() == ["worse", "bad", "1", "->", "0", "-1", "(-1.5", "to", "-0.5)"]
    assert lines[2].split()[0] == "identical"
    assert lines[3] == "a.py::fine"


def compared(before, after, margins=None, *, kind="custom", **changes):
    """The rows of one record of which there are no examples, before and after."""
    sides = [Side(entry_of(record(kind, "s", metrics=metrics, **changes)), None) for metrics in (before, after)]
    return compare([tuple(sides)], read_marker((), margins or {}), 1)[0]


def test_a_number_without_an_interval_is_compared_as_it_is_where_its_margin_was_chosen():
    before, after = {"found": Metric(0.9, higher_is_better=True)}, {"found": Metric(0.8, higher_is_better=True)}
    assert compared(before, after) == {}
    assert compared(before, after, {"found": 0.05})["found"]["verdict"] == "worse"
    assert compared(before, after, {"found": "20%"})["found"]["verdict"] == "same"


def test_with_intervals_alone_much_has_to_be_lost():
    before, little, much = (
        {"f1": Metric(value, low=value - 0.05, high=value + 0.05, n=400, higher_is_better=True)} for value in (0.8, 0.74, 0.6)
    )
    assert compared(before, little, kind="task")["f1"]["verdict"] == "unclear"
    assert compared(before, much, kind="task")["f1"]["verdict"] == "worse"
    assert "only the intervals are compared" in compared(before, much, kind="task")["f1"]["note"]


def test_costs_are_compared_to_the_last_byte_where_both_runs_did_the_same():
    def costs(base, new, margins=None, **changes):
        old, now = (entry_of(record(cost={"state_bytes": count, "flops": 7})) for count in (base, new))
        now["settings"].update(changes)
        return compare([(Side(old, None), Side(now, None))], read_marker((), margins or {}), 1)[0].get("state_bytes")

    assert costs(1000, 1001)["verdict"] == "worse"
    assert costs(1000, 999)["verdict"] == "better"
    assert costs(1000, 1009, {"state_bytes": "1%"})["verdict"] == "same"
    assert costs(1000, 2000, shots=5) is None


def test_costs_are_the_names_that_verbs_record_and_no_others():
    """A name that is written another way gates nothing, and nobody sees it."""
    from pytest_lmeval.measures._efficiency import measure_efficiency
    from pytest_lmeval.measures._memory import measure_memory
    from pytest_lmeval.models.sources import load

    small = {"batch_size": 1, "seq_len": 8, "new_tokens": 2}
    found = [
        measure_efficiency(load("zoo:lstm"), **small, runs=2).record,
        measure_memory(load("zoo:lstm"), **small, apart=False).record,
    ]
    entries = {one.kind: entry_of({**one.to_json(), "lm": {**one.lm, "device": "cuda:0"}}) for one in found}
    recorded = {name for entry in entries.values() for part in ("metrics", "costs") for name in entry[part]}
    trained = {"flops_forward", "flops_backward", "flops_total", "model_bytes", "parameters"}
    assert trained <= set(re.findall(r'"(\w+)": ', Path(result.__file__).read_text()))
    assert set(COSTS) == {name for name in recorded if name in COSTS} | trained | {"verdict"}
    on_cpu = entry_of({**found[1].to_json(), "test": "t"})
    assert set(on_cpu["metrics"]) == {"weights_bytes", "state_bytes", "activations_bytes", "tensors_peak_bytes"}
    assert set(on_cpu["costs"]) == {"state_bytes"}


def test_the_memory_of_a_process_is_never_gated_and_the_flops_of_timed_runs_are_not_either():
    process = {"peak_bytes": Metric(252.5, "bytes", n=1, higher_is_better=False), "growth_bytes": Metric(3, "bytes")}
    entry = entry_of(record("memory", "s", metrics=process, cost={"peak_bytes": 252}))
    assert (entry["metrics"], entry["costs"]) == ({}, {})
    assert entry_of(record("latency", "s", metrics={}, cost={"flops": 30}))["costs"] == {}
    (told,) = unheard([record("memory", "s", metrics=process)], read_marker((), {"peak_bytes": "5%"}))
    assert "names peak_bytes, which is another one in every run" in told


@pytest.mark.parametrize(("before", "after", "verdict"), [
    ("exact-any-chunk", "exact-any-chunk", "identical"),
    ("exact-any-chunk", "exact-step-only", "worse"),
    ("non-causal", "stateless", "better"),
    ("exact-multiple-of-4", "exact-multiple-of-8", "unclear"),
])  # fmt: skip
def test_a_verdict_on_the_laws_is_better_or_worse_too(before, after, verdict):
    old, new = (entry_of(record("equivalence", "laws", metrics={}, certificate={"verdict": name})) for name in (before, after))
    rows = compare([(Side(old, None), Side(new, None))], Margins(), 1)[0]
    assert rows["verdict"]["verdict"] == verdict


def test_a_number_per_token_is_not_compared_across_tokenizers():
    before = {"perplexity": Metric(3.0, low=2.9, high=3.1, n=99, higher_is_better=False)}
    after = {"perplexity": Metric(30.0, low=29, high=31, n=50, higher_is_better=False)}
    old, new = (entry_of(record("perplexity", "s", metrics=metrics)) for metrics in (before, after))
    old["settings"]["tokenizer"], new["settings"]["tokenizer"] = "bytes", "bpe"
    (row,) = compare([(Side(old, None), Side(new, None))], Margins(), 1)[0].values()
    assert row["verdict"] == "unclear"
    assert "a number per token says nothing then" in row["note"]


def test_of_a_collapse_in_too_few_passages_it_is_said_why_it_is_not_called_worse():
    ids, groups = [f"e{place}" for place in range(300)], [f"g{place % 6}" for place in range(300)]
    sides = [
        Side(entry_of(record(metrics={"accuracy": Metric(value, n=300, higher_is_better=True)})), Scores(ids, groups, columns))
        for value, columns in ((1.0, {"accuracy": [1] * 300}), (0.0, {"accuracy": [0] * 300}))
    ]
    row = compare([tuple(sides)], Margins(), 1)[0]["accuracy"]
    assert (row["verdict"], row["detectable"], row["needed"]) == ("unclear", None, None)
    assert row["note"] == (
        "no loss in 6 independent groups is called worse: even of all, it comes about by chance in one of 64 comparisons, and "
        "one of 100 is asked for; it takes 7 at least"
    )
    assert row["note"] in remarks(row, "question")
