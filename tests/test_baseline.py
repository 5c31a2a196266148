"""A baseline file has the same bytes for the same numbers, refuses edits, and gives each gated metric a verdict."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from msgspec.structs import replace
from reading import measure_perplexity
from tiny_models import Functional

from pytest_lmeval.__main__ import main
from pytest_lmeval.data._tokens import as_corpus
from pytest_lmeval.errors import BaselineError, DocumentError
from pytest_lmeval.gates._baseline import Baseline, BaselineFile, examples_file, read, write
from pytest_lmeval.gates._compare import Side, compare, pair
from pytest_lmeval.gates._entry import IRRELEVANT, differs, entry_of, gated, names_of
from pytest_lmeval.gates._explain import failure, table
from pytest_lmeval.gates._gate import speed_rows, unused_margins
from pytest_lmeval.gates._margins import Margins, read_marker
from pytest_lmeval.gates._scores import Scores, rounded, scores_of
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._comparison import Comparison, Flip
from pytest_lmeval.records._document import Environment, RunDocument, dump
from pytest_lmeval.records._example import Example, Unit
from pytest_lmeval.records._measured import Cost, ModelFacts, Record
from pytest_lmeval.records._metric import headline_of, value_of
from pytest_lmeval.records._schema import line_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.report._changes import comparison_notes

LM = ModelFacts(spec="demo", parameters=1, bytes=4, dtype="float32", device="cpu", fingerprint="f" * 16)
TEST, TASK = "test_a.py::test_a", "task boolq, 0-shot"
FINITE = st.floats(-1e9, 1e9)


def record(kind="task", subject="boolq, 0-shot", **fields):
    metrics = {"accuracy": value_of("accuracy", 0.5, (0.4, 0.6), n=2)}
    given = {"lm": LM, "test": TEST, "settings": {"shots": 0}, "metrics": metrics}
    return Record(kind=kind, subject=subject, **{**given, **fields})


def answers(scores, **fields):
    """A record of a task and its examples, from the accuracy of each question."""
    examples = [
        Example(id=f"q{number}", number=number, prompt="?", output="b", target="a", scores={"accuracy": score})
        for number, score in enumerate(scores)
    ]
    metrics = {"accuracy": value_of("accuracy", sum(scores) / len(scores), n=len(scores))}
    return record(**{"metrics": metrics, "examples": "examples/task.jsonl", "example": "question", **fields}), examples


def reading(n=40, **fields):
    """A record of a reading and its blocks."""
    sums = [{"tokens": 10 + k, "nats": 1.5 * (10 + k) + k % 7, "bytes": 20 + 2 * k, "top1": (10 + k) // 2} for k in range(n)]
    total = {name: sum(unit[name] for unit in sums) for name in sums[0]}
    nll = total["nats"] / total["tokens"]
    numbers = {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": total["nats"] / total["bytes"] / math.log(2)}
    numbers["token_accuracy_top1"] = total["top1"] / total["tokens"]
    metrics = {name: value_of(name, number, n=total["tokens"]) for name, number in numbers.items()}
    given = {"metrics": metrics, "units": "examples/units.jsonl", "example": "block"}
    return record("perplexity", "stdlib[test]", **{**given, **fields}), [Unit(f"b{k}", unit) for k, unit in enumerate(sums)]


def write_run(folder, *found):
    """Write the output folder of a run: records, each alone or with the lines of its file."""
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    records = []
    for one in found:
        made, lines = one if isinstance(one, tuple) else (one, None)
        if lines is not None:
            (folder / (made.units or made.examples)).write_text("".join(map(line_of, lines)))
        records.append(made)
    environment = Environment(python="3.11", device="cpu", cpu="x", threads=1, packages={"torch": "2"}, commit="c", dirty=True)
    (folder / "metrics.json").write_text(dump(RunDocument(environment=environment, records=records)))
    return records


def accept(*options):
    return main(["baseline", "accept", "--to", "b.json", *options])


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".lmeval"


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Both texts of a baseline of a task, a reading and a verdict, and the baseline itself."""
    folder = tmp_path_factory.mktemp("written")
    laws = record("equivalence", "laws", metrics={}, certificate=Certificate(verdict="exact-any-chunk", dtype="float32"))
    write_run(folder, answers([1, 0], cost=Cost(state_bytes=12)), reading(), laws)
    path = folder / "b.json"
    assert main(["baseline", "accept", "--from", str(folder), "--to", str(path)]) == 0
    return path.read_text(), examples_file(path).read_text(), read(path)


def test_a_baseline_that_is_read_and_written_keeps_its_bytes(tmp_path, written):
    path, (summary, examples, baseline) = tmp_path / "again.json", written
    write(path, baseline)
    assert (path.read_text(), examples_file(path).read_text()) == (summary, examples)
    assert read(path) == baseline
    assert read(tmp_path / "none.json") is None


def test_a_metric_takes_one_line_and_paths_and_times_are_left_out(output):
    numbers = {"accuracy": 1 / 3, "ttft": 1.5, "tokens_per_second": 3e4}
    metrics = {name: value_of(name, number, n=3) for name, number in numbers.items()}
    cost = Cost(seconds=1.5, flops=10, peak_bytes=5)
    settings_ = {"rows": "jsonl:/home/me/rows.jsonl", "of": "OWNER/NAME", "data": "a" * 64}
    write_run(output, record(subject="text:/home/me/notes.txt[test]", metrics=metrics, cost=cost, settings=settings_))
    assert accept() == 0
    text = Path("b.json").read_text()
    (line,) = [line for line in text.splitlines() if '"accuracy": {' in line]
    assert json.loads("{" + line.strip().rstrip(",") + "}")["accuracy"]["value"] == 0.3333333
    for word in ("ttft", "tokens_per_second", "seconds", "peak_bytes", "/home", str(output), "a" * 17, '"commit"'):
        assert word not in text
    (entry,) = read(Path("b.json")).tests[TEST].values()
    assert entry.settings == {"rows": "jsonl:rows.jsonl", "of": "OWNER/NAME", "data": "a" * 16}


@given(FINITE)
def test_rounding_twice_is_rounding_once(value):
    assert rounded(rounded(value)) == rounded(value) == pytest.approx(value, rel=1e-6)
    assert json.loads(json.dumps(rounded(value))) == rounded(value)


def refused(folder, summary, examples):
    """The error of a baseline with these two texts; "" if there is none."""
    path = folder / "b.json"
    path.write_text(summary)
    examples_file(path).write_text(examples)
    try:
        read(path)
    except BaselineError as error:
        message = str(error)
    else:
        return ""
    assert "estore it, or write it anew: run all tests with --lmeval-gate=off, then lmeval baseline accept --prune" in message
    return message


@settings(max_examples=30)
@given(st.data())
def test_a_truncated_file_is_refused(tmp_path_factory, written, data):
    folder, (summary, examples, _) = tmp_path_factory.mktemp("cut"), written
    at = data.draw(st.integers(0, len(summary.rstrip()) - 1))
    assert "is not whole JSON" in refused(folder, summary[:at], examples)
    kept = data.draw(st.integers(0, len(examples.rstrip()) - 1))
    assert refused(folder, summary, examples[:kept])


JSON = st.recursive(
    st.sampled_from([None, True, 10**400, 1e999, 2**70]) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


def paths(plain, path=()):
    """The paths of all values of a JSON value."""
    parts = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    return [path, *(found for name, part in parts for found in paths(part, (*path, name)))]


def edited(data, plain, shallowest=1):
    """The text of a value with one part replaced, removed or added."""
    path = data.draw(st.sampled_from([path for path in paths(plain) if len(path) >= shallowest]))
    inner = plain
    for name in path[:-1]:
        inner = inner[name]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(JSON)
    elif data.draw(st.booleans()) or not isinstance(inner, dict):
        del inner[path[-1]]
    else:
        inner[data.draw(st.text(min_size=1, max_size=3))] = data.draw(JSON)
    return json.dumps(plain).replace("Infinity", "1e999")


@settings(max_examples=60)
@given(st.data())
def test_an_edit_is_refused_or_changes_nothing(tmp_path_factory, written, data):
    folder, (summary, examples, baseline) = tmp_path_factory.mktemp("edited"), written
    if data.draw(st.booleans()):
        document = json.loads(summary)
        summary = json.dumps({**document, "tests": json.loads(edited(data, document["tests"], shallowest=3))})
        summary = summary.replace("Infinity", "1e999")
    else:
        lines = examples.splitlines()
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at : at + 1] = data.draw(st.sampled_from([[], [lines[at]] * 2, [edited(data, json.loads(lines[at]))]]))
        examples = "\n".join(lines)
    if not refused(folder, summary, examples):
        found = read(folder / "b.json")
        assert found.tests == baseline.tests
        assert [one.checksum for one in found.scores.values()] == [one.checksum for one in baseline.scores.values()]


@pytest.mark.parametrize(("before", "after", "message"), [
    ('"schema": 2', '"schema": 1', "schema version 1, and this pytest-lmeval reads version 2: .* of an older pytest-lmeval"),
    ('"schema": 2', '"schema": 3', "version 3, .* Install the version of pytest-lmeval that wrote it, or: restore it"),
    ('{"torch": "2"}', "[1]", r"environment > packages: Expected `object`, got `array`; it is \[1\]"),
    ('"value": 0.5}', '"value": "0.5"}', rf"tests > {TEST} > {TASK} > metrics > accuracy > value: Expected .*; it is \"0.5\""),
    ('"value": 0.5}', '"value": 0.98}', r"accuracy is 0\.98 of 2, but its examples give 0\.5 of 2"),
    ('"n": 2,', '"n": 3,', r"accuracy is 0\.5 of 3, but its examples give 0\.5 of 2"),
    ('"state_bytes": 12', '"state_bytes": 99', f"{TASK} does not match its checksum"),
    ('"exact-any-chunk"', '"inexact"', "equivalence laws does not match its checksum"),
    ('"verdict": "exact-any-chunk"', '"was": 1', "equivalence laws: Object missing required field `verdict`"),
    ('["q0",null,1]', '["q0",null,"x"]', "line 43 is .*: neither the head of a record nor an example of the one above"),
    ('["q0",null,1]', "[1", "line 43 is not whole JSON: .* at line 1, column"),
    ('["q0",null,1]', "[" * 100_000, "line 43 is nested more deeply"),
    ('["q0",null,1]\n["q1",null,0]', '["q0",null,0]\n["q1",null,1]', f"examples of {TEST}, {TASK} do not match their checksum"),
    ('"group", "accuracy"', '"group", "x", "x"', "line 42 is .*: neither the head"),
    ('["id", "group", "accuracy"]', "5", "line 42 was damaged or edited by hand: columns: Expected `array`"),
    (f'"record": "{TASK}"', '"record": "r"', f"examples of {TEST}, r, but .*b.json does not"),
])  # fmt: skip
def test_the_error_names_the_edit(tmp_path, written, before, after, message):
    assert re.search(message, refused(tmp_path, *(text.replace(before, after) for text in written[:2])))


def values(name="b.json"):
    """test -> its accuracy in the baseline."""
    tests = read(Path(name)).tests
    return {test.rpartition("::")[2]: float(entries[TASK].metrics["accuracy"]) for test, entries in tests.items()}


def test_accepting_some_tests_keeps_the_others(output, capsys):
    write_run(output, answers([1, 0]), record(test="test_a.py::test_a_b"))
    assert accept("-k", TEST) == 0  # the exact name of a test
    assert list(values()) == ["test_a"]
    assert accept() == 0
    better = {"accuracy": value_of("accuracy", 0.8, n=400)}
    write_run(output, record(metrics=better), record(test="test_a.py::test_a_b", metrics=better))
    assert accept("-k", "*_b") == 0
    assert values() == {"test_a": 0.5, "test_a_b": 0.8}
    assert read(Path("b.json")).scores[TEST, TASK].columns == {"accuracy": [1, 0]}
    write_run(output, record(test="test_a.py::test_c"))
    assert accept("--prune") == 0
    assert values() == {"test_c": 0.5}
    assert "written to b.json and b.examples.jsonl: commit both" in capsys.readouterr().out


def test_fields_of_a_later_version_survive(output):
    later = replace(entry_of(record()), more={"later": 1})
    file = BaselineFile(tests={TEST: {TASK: later}}, more={"later": [2]})
    write(Path("b.json"), Baseline(file, {(TEST, TASK): Scores(["a"], [None], {"f1": [1]}, more={"later": 3})}))
    write_run(output, record(test="test_a.py::test_b"))
    assert accept() == 0
    found = read(Path("b.json"))
    assert (found.file.more, found.tests[TEST][TASK].more) == ({"later": [2]}, {"later": 1})
    assert (len(found.tests), found.scores[TEST, TASK].more) == (2, {"later": 3})


def test_a_test_that_failed_only_for_its_baseline_is_accepted(output, capsys):
    worse = Comparison(verdict="worse", base=0.9, new=0.7)
    for_baseline = record(outcome="failed", gate={"accuracy": replace(worse, failed=True)})
    for_itself = [record(test="test_a.py::test_b", outcome="failed", gate=gate) for gate in (None, {"accuracy": worse})]
    write_run(output, for_baseline, *for_itself)
    assert accept() == 0
    assert list(values()) == ["test_a"]
    assert "not accepted: test_a.py::test_b (it failed for another reason than its baseline)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (None, [], ".lmeval cannot be read (No such file or directory). A run writes metrics.json"),
        ([], [], "holds no record"),
        ([record()], ["-k", "other"], "no test in it matches 'other'; it has test_a.py::test_a."),
        ([record(outcome="failed")], [], "test_a.py::test_a failed for another reason than the baseline"),
        ([answers([1, 0], metrics={"accuracy": value_of("accuracy", 1, n=2)})], [], "1 of 2, but its examples give 0.5 of 2"),
        ([record(metrics={"perplexity": value_of("perplexity", 0)})], [], "perplexity is 0, and an exponential is above 0"),
        ([record(metrics={"f1": value_of("f1", 1, n=12345)})], [], '> f1 > n: Expected `int | null`, got `str`; it is "x"'),
        ([(answers([1])[0], [Unit("u", {"tokens": 1})])], [], "task.jsonl, line 1 was damaged or edited by hand"),
        ([record()], ["--to", "file/b.json", "--prune"], "file/b.json cannot be written ("),
    ],
)
def test_the_error_says_why_nothing_can_be_accepted(output, capsys, records, options, message):
    Path("file").touch()
    if records is not None:
        write_run(output, *records)
        metrics = output / "metrics.json"
        metrics.write_text(metrics.read_text().replace('"n": 12345', '"n": "x"'))
    assert accept(*options) == 2
    assert message in capsys.readouterr().err
    assert not Path("b.json").exists()


def test_one_metric_per_record_is_gated_and_those_that_the_marker_names():
    entry = entry_of(reading()[0])
    assert gated(entry, Margins()) == ["bits_per_byte"]
    assert gated(entry, read_marker((), {"perplexity": "1%"})) == ["perplexity"]  # the same losses in another unit
    assert gated(entry, read_marker((), {"token_accuracy_top1": 0.1})) == ["bits_per_byte", "token_accuracy_top1"]
    assert gated(entry, read_marker((), {"bits_per_byte": "off"})) == []
    assert gated(entry, read_marker(("off",), {})) == []
    assert gated(entry_of(answers([1])[0]), Margins()) == ["accuracy"]
    assert gated(entry_of(record("custom", "passkey")), Margins()) == []  # it keeps no examples


def test_the_headline_is_the_first_quality_metric_or_the_one_it_stands_for():
    metrics = {name: value_of(name, 0.5) for name in ("tokens_per_second", "chance", "nll", "token_accuracy_top1")}
    assert headline_of(metrics) == "nll"
    assert headline_of({**metrics, "bits_per_byte": value_of("bits_per_byte", 2.0)}) == "bits_per_byte"
    assert headline_of({"ttft": value_of("ttft", 1.0), "found": Value(1.0)}) is None


def test_all_settings_are_compared_except_irrelevant_ones():
    base = record(settings={"shots": 0, "window": None, "nested": {"a": [1, 2]}})
    same = record(settings={"shots": 0, "nested": {"a": (1, 2)}, **dict.fromkeys(IRRELEVANT, "another")})
    other = record(settings={"shots": 5, "chat": "on"}, lm=replace(LM, dtype="bfloat16"))
    assert names_of([base, same]) == [TASK, f"{TASK} #2"]
    assert differs(entry_of(base), entry_of(same)) == []
    assert differs(entry_of(base), entry_of(other)) == [
        "dtype was float32, is bfloat16",
        "shots was 0, is 5",
        "nested was {'a': [1, 2]}, is not set",
        "chat was not set, is on",
    ]


def test_table_failure_and_row_name_another_sampling_temperature(output):
    ways = [[f"at most 32 tokens, temperature {heat}, until ['\\n']"] for heat in (0, 1.5)]
    write_run(output, answers([1] * 30, settings={"generation": ways[0]}))
    assert accept() == 0
    (sampled,) = write_run(output, answers([1] * 27 + [0] * 3, settings={"generation": ways[1]}))
    baseline = read(Path("b.json"))
    base = Side(baseline.tests[TEST][TASK], baseline.scores[TEST, TASK])
    (rows,) = compare([(base, Side(entry_of(sampled), scores_of(sampled, output)))], Margins(), 1)
    row = rows["accuracy"]
    assert (row.verdict, row.differences) == ("unclear", [f"generation was {ways[0]}, is {ways[1]}"])
    said = f"the two runs differ: {row.differences[0]}"
    assert f"    {said}" in table([replace(sampled, gate=rows)], width=200)
    worse = replace(row, verdict="worse")
    assert f"  {said}" in failure(TEST, [(sampled, "accuracy", worse)], baseline="b.json", accept="").splitlines()
    assert (row.flipped[0].output, row.flipped[0].target, row.flipped[0].after) == ("b", "a", 0)


def scores(**columns):
    """Scores of independent examples e0, e1, ..."""
    ids = [f"e{index}" for index in range(len(next(iter(columns.values()))))]
    return Scores(ids, [None] * len(ids), columns)


def test_examples_without_a_score_in_both_runs_are_not_counted_as_missing():
    _, _, row = pair("accuracy", scores(accuracy=[1, None, None]), scores(accuracy=[0, None, 1]), up=True)
    assert (row.only_base, row.only_new) == (0, 1)


def test_scores_of_an_unregistered_metric_are_refused(output):
    made, lines = answers([1, 0])
    lines = [replace(line, scores={"brevity": 1.0}) for line in lines]
    (found,) = write_run(output, (replace(made, metrics={"brevity": Value(1.0, n=2, higher_is_better=True)}), lines))
    with pytest.raises(DocumentError, match=r"registers the metric brevity.* Install the package that does"):
        scores_of(found, output)


@pytest.mark.parametrize(("name", "said"), [("accuracy", "q: wrong -> right"), ("perplexity", "q: 0 -> 1")])
def test_only_scores_that_judge_answers_are_shown_as_right_or_wrong(name, said):
    flips = [Flip(id="q", before=0.0, after=1.0)]
    row = Comparison(verdict="worse", base=0.5, new=0.4, margin=0.01, lost=0, won=1, flipped=flips)
    assert f"  {said}" in failure(TEST, [(record(), name, row)], baseline="b.json", accept="")


def test_recorded_scores_are_not_recomputed(output):
    examples = [Example(id="q", number=0, prompt="?", output="b", target="a", scores={"accuracy": 0.25, "f1": 1.0})]
    metrics = {"accuracy": value_of("accuracy", 0.25, n=1), "f1": value_of("f1", 0.9, n=1)}
    (made,) = write_run(output, (record(metrics=metrics, examples="examples/x.jsonl"), examples))
    found = scores_of(made, output)
    assert (found.columns, found.texts) == ({"accuracy": [0.25]}, {"q": ("b", "a")})
    assert found.mean_of("f1") is None  # f1 is no mean of scores


def test_the_same_text_in_other_tokens_is_paired_only_by_bytes():
    old = scores(tokens=[10, 20], nats=[20, 40], bytes=[30, 60], top1=[5, 9])
    new = scores(tokens=[5, 9], nats=[21, 40], bytes=[30, 60], top1=[3, 4])
    assert pair("nll", old, new, up=False) is None
    assert pair("token_accuracy_top1", old, new, up=True) is None
    assert pair("bits_per_byte", old, new, up=False)[0].value > 0


@pytest.mark.parametrize(("up", "first"), [(True, "e0"), (False, "e29")])
def test_the_largest_losses_are_listed_first(up, first):
    _, _, row = pair("grade", scores(grade=[0] * 30), scores(grade=[index - 14.5 for index in range(30)]), up=up)
    assert (row.flipped[0].id, len(row.flipped), row.lost, row.won) == (first, 20, 15, 15)


def test_the_id_of_a_block_depends_on_its_tokens_and_not_on_chunks(tmp_path):
    def rows(ids, chunk_size):
        measure_perplexity(as_model(Functional()), as_corpus(ids), chunk_size=chunk_size, units=tmp_path / "units")
        return [json.loads(line) for line in (tmp_path / "units").read_text().splitlines()]

    ids = [index % 32 for index in range(200)]
    whole, cut, later = rows(ids, None), rows(ids, 7), rows(ids[1:], None)
    assert [row["sums"]["tokens"] for row in whole] == [64, 64, 64, 7]
    assert [row["id"] for row in whole] == [row["id"] for row in cut]
    assert [row["sums"]["nats"] for row in whole] == pytest.approx([row["sums"]["nats"] for row in cut])
    assert later[0]["id"] != whole[0]["id"]


def test_the_worst_verdict_comes_first():
    good = Comparison(verdict="identical", base=1, new=1)
    bad = Comparison(verdict="worse", base=1, new=0, difference=-1, low=-1.5, high=-0.5, margin=0, n=9)
    both = record(test="b.py::bad", gate={"good": good, "bad": bad})
    lines = [line.split() for line in table([record(test="a.py::fine", gate={"good": good}), both], width=100)]
    assert lines[:2] == [["b.py::bad"], ["worse", "bad", "1", "->", "0", "-1", "(-1.5", "to", "-0.5)"]]
    assert [line[0] for line in lines[2:4]] == ["identical", "a.py::fine"]


def compared(before, after, margins=None):
    """The rows of one record whose examples the baseline does not have."""
    sides = [Side(entry_of(one), None) for one in (before, after)]
    return compare([tuple(sides)], read_marker((), margins or {}), 1)[0]


def test_a_number_without_an_interval_is_compared_exactly_if_the_marker_has_its_margin():
    before, after = (record("custom", metrics={"found": Value(value, higher_is_better=True)}) for value in (0.9, 0.8))
    assert compared(before, after) == {}
    assert compared(before, after, {"found": 0.05})["found"].verdict == "worse"
    assert compared(before, after, {"found": "20%"})["found"].verdict == "same"
    neither = [record("custom", metrics={"found": Value(value)}) for value in (0.9, 0.8)]
    assert compared(*neither, {"found": 0.05}) == {}


def test_a_question_that_became_a_tie_is_a_pair_of_its_weight():
    """Right before, and one of two equally likely choices now: half of it is lost, and signs are flipped."""
    before, after = [1.0] * 30 + [0.0] * 10, [0.5] * 12 + [1.0] * 18 + [0.0] * 10
    ids = [f"{number}" for number in range(40)]
    sides = [Scores(ids, [None] * 40, {"accuracy": scores}) for scores in (before, after)]
    difference, base, row = pair("accuracy", *sides, up=True)
    assert (base, difference.value, difference.test) == (
        0.75,
        pytest.approx(-0.15),
        "a sign-flip permutation test and Student's t of skewed changes",
    )
    assert (row.lost, row.won, {(flip.before, flip.after) for flip in row.flipped}) == (12, 0, {(1, 0.5)})
    untied = Scores(ids, [None] * 40, {"accuracy": [0.0] * 12 + after[12:]})
    assert pair("accuracy", sides[0], untied, up=True)[0].test == "McNemar's exact test"


def test_intervals_alone_find_only_large_losses():
    f1 = (value_of("f1", value, (value - 0.05, value + 0.05), n=400) for value in (0.8, 0.74, 0.6))
    before, little, much = (answers([1], metrics={"f1": value})[0] for value in f1)
    assert compared(before, little)["f1"].verdict == "unclear"
    assert compared(before, much)["f1"].verdict == "worse"
    assert "only the intervals are compared" in compared(before, much)["f1"].note


def test_costs_are_compared_exactly_if_both_runs_did_the_same_work():
    def costs(base, new, margins=None, **changes):
        old, now = (record(cost=Cost(state_bytes=count, flops=7)) for count in (base, new))
        return compared(old, replace(now, settings={**now.settings, **changes}), margins).get("state_bytes")

    assert costs(1000, 1001).verdict == "worse"
    assert costs(1000, 999).verdict == "better"
    assert costs(1000, 1009, {"state_bytes": "1%"}).verdict == "same"
    assert costs(1000, 2000, threads=3).verdict == "worse"
    assert costs(1000, 2000, shots=5) is None
    assert costs(1000, 2000, chunk_size=5) is None  # memory depends on it


def test_process_memory_and_flops_of_timed_runs_are_not_gated():
    process = {name: value_of(name, 252.5, n=1) for name in ("peak_bytes", "growth_bytes")}
    made = record("memory", "s", metrics=process, cost=Cost(peak_bytes=252, flops=30))
    assert (entry_of(made).metrics, entry_of(made).costs) == ({}, {"flops": 30})
    assert entry_of(replace(made, details={"timed_by": "bare loop"})).costs == {}
    assert entry_of(replace(made, lm=replace(LM, device="cuda:0"))).costs == {"flops": 30, "peak_bytes": 252}
    (note,) = unused_margins([replace(made, cost=Cost())], read_marker((), {"peak_bytes": "5%"}))
    assert "names peak_bytes, which differs between runs of the same code" in note


def test_unused_margins_are_reported():
    margins = {"f1": 0.1, "accuracy": "+1%", "found": 0.1, "latency": "10%", "state_bytes": "1%", "flops": "off"}
    metrics = {"accuracy": value_of("accuracy", 0.5), "found": Value(1.0), "ttft": value_of("ttft", 3.0)}
    notes = unused_margins([record(metrics=metrics, cost=Cost(state_bytes=1, flops=2))], read_marker((), margins))
    assert [notes[0].partition(";")[0], *notes[1:]] == [
        "the marker lmeval_gate names f1, which the test does not record",
        "the marker lmeval_gate: accuracy gets worse when it falls, so its margin is -1 % or 1 %, and not +1 %; it was taken "
        "for the latter",
        "the marker lmeval_gate names found, which has no better direction: it is not gated",
    ]


def test_speeds_that_the_marker_names_are_shown_and_not_judged():
    metrics = {name: value_of(name, 3.0) for name in ("ttft", "itl_p95", "accuracy")}
    rows = speed_rows(record(metrics=metrics), read_marker((), {"latency": "10%", "ttft": 0.5, "accuracy": 0.1}))
    assert {name: (row.verdict, row.new, row.margin) for name, row in rows.items()} == {"ttft": ("not judged", 3.0, "0.5")}
    assert speed_rows(record(metrics=metrics), read_marker((), {"latency": "off"})) == {}


@pytest.mark.parametrize(("before", "after", "verdict"), [
    ("exact-any-chunk", "exact-any-chunk", "identical"),
    ("exact-any-chunk", "exact-step-only", "worse"),
    ("non-causal", "stateless", "better"),
    ("exact-multiple-of-4", "exact-multiple-of-8", "unclear"),
    ("exact-any-chunk", "unproven", "unclear"),
])  # fmt: skip
def test_verdicts_on_the_laws_are_compared(before, after, verdict):
    laws = [record("equivalence", metrics={}, certificate=Certificate(verdict=one, dtype="float32")) for one in (before, after)]
    row = compared(*laws)["verdict"]
    assert (row.verdict, row.base, row.new) == (verdict, before, after)


def test_numbers_per_token_are_not_compared_across_tokenizers():
    metrics = {value: {"perplexity": value_of("perplexity", value, (value - 1, value + 1), n=99)} for value in (3.0, 30.0)}
    before, after = reading(metrics=metrics[3.0])[0], reading(metrics=metrics[30.0], settings={"tokenizer": "bpe"})[0]
    row = compared(before, after)["perplexity"]
    assert row.verdict == "unclear"
    assert "numbers per token cannot be compared" in row.note


def test_the_note_says_why_a_total_loss_in_few_groups_is_not_worse():
    ids, groups = [f"e{index}" for index in range(300)], [f"g{index % 6}" for index in range(300)]
    sides = [Side(entry_of(answers([value])[0]), Scores(ids, groups, {"accuracy": [value] * 300})) for value in (1, 0)]
    row = compare([tuple(sides)], Margins(), 1)[0]["accuracy"]
    assert (row.verdict, row.detectable, row.needed) == ("unclear", None, None)
    assert row.note == (
        "6 independent groups are too few for any loss to be called worse: they do not show how much such numbers vary; at "
        "least 8 are needed"
    )


def flipped(lost, won, *, right=900, n=1000):
    """Two sides of a task: `lost` of the right answers turn wrong, and `won` of the wrong ones right."""
    ids, base = [f"e{index}" for index in range(n)], [1.0] * right + [0.0] * (n - right)
    new = [0.0] * lost + [1.0] * (right - lost) + [1.0] * won + [0.0] * (n - right - won)
    scores = (Scores(ids, [None] * n, {"accuracy": side}) for side in (base, new))
    return [Side(entry_of(answers([sum(one.columns["accuracy"]) / n])[0]), one) for one in scores]


def test_a_loss_that_is_certain_is_not_said_to_be_open():
    row = compare([tuple(flipped(9, 0))], Margins(), 1)[0]["accuracy"]
    assert (row.verdict, row.difference) == ("unclear", -0.009)
    assert row.high < 0
    assert row.note == "something was lost, at least 0.0047; open is whether more than the margin"
    assert not any("if nothing was lost" in note for note in comparison_notes(row, "question"))
    open_ = compare([tuple(flipped(12, 9))], Margins(), 1)[0]["accuracy"]
    assert not open_.note
    assert any("if nothing was lost" in note for note in comparison_notes(open_, "question"))


def test_few_documents_say_with_which_probability_chance_explains_their_loss():
    sums = [{"tokens": 100, "nats": 300.0 + nats} for nats in (0, 4, 6, 7, 9, 11, 12, 8, 5, 10)]
    sides = []
    for units in ([{"tokens": 100, "nats": 300.0}] * 10, sums):
        columns = {name: [unit[name] for unit in units] for name in ("tokens", "nats")}
        nll = sum(columns["nats"]) / 1000
        made = record("perplexity", metrics={"nll": value_of("nll", nll, n=1000)}, units="u.jsonl", example="document")
        sides.append(Side(entry_of(made), Scores([f"d{index}" for index in range(10)], [None] * 10, columns)))
    row = compare([tuple(sides)], read_marker((), {"nll": 0.01}), 1)[0]["nll"]
    assert row.verdict == "unclear"
    assert re.search(
        r"10 examples are few: with one more that changed the other way, .* by chance in \d.* % of comparisons", row.note
    )


def test_small_losses_that_are_accepted_one_after_another_are_added_up(output):
    """Each within the margin of 0.01: the third says what all have lost together, and another setting begins anew."""
    rows = [[1] * right + [0] * (1000 - right) for right in (900, 894, 888, 882)]
    for right in rows[:3]:
        write_run(output, answers(right))
        assert accept() == 0
    (entry,) = read(Path("b.json")).tests[TEST].values()
    assert (entry.first, float(entry.metrics["accuracy"])) == ({"accuracy": 0.9}, 0.888)
    again = Path("b.json").read_text()
    assert accept() == 0
    assert Path("b.json").read_text() == again
    made, _ = answers(rows[3])
    row = compare([(Side(entry, None), Side(entry_of(made), None))], Margins(), 1)[0]["accuracy"]
    assert "accepted little by little: it was 0.9 in the first baseline, and is 0.882" in row.note
    write_run(output, answers(rows[3], settings={"shots": 5}))
    assert accept() == 0
    (entry,) = read(Path("b.json")).tests[TEST].values()
    assert entry.first == {}
