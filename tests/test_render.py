"""Pages of runs that are over, several runs side by side, what a project adds, and files that are not as they should be."""

import functools
import json
import xml.etree.ElementTree as ElementTree
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_lmeval.__main__ import main
from pytest_lmeval.errors import DocumentError
from pytest_lmeval.report import examples, pages
from pytest_lmeval.report.document import complete, load
from pytest_lmeval.report.formats import bencher, github_action_benchmark
from pytest_lmeval.report.words import visible

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics-1.json").read_text())
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> </script> \x1b[31m \x00 \ud800 {{ 7 * 7 }}"


def question(number, *, right=True, **more):
    """A line of the file of examples, as a task with two choices writes it."""
    scores = [-1.0, -2.0] if right else [-2.0, -1.0]
    own = {"id": f"id{number}", "number": number, "choices": [" yes", " no"], "right": [0], "loglikelihoods": scores}
    return {**own, "targets": ["yes"], "prediction": "yes" if right else "no", "target": "yes", **more}


def record(spec, file=None, **more):
    (reading,) = [record for record in GOLDEN["records"] if record["kind"] == "perplexity"][:1]
    own = {"kind": "task", "subject": "brackets, 0-shot", "settings": {}, "series": {}, "examples": file, "certificate": None}
    own["metrics"] = {"accuracy": {"value": 0.5, "unit": "", "low": 0.4, "high": 0.6, "n": 10, "higher_is_better": True}}
    return {**reading, "lm": {**reading["lm"], "spec": spec, "fingerprint": spec}, **own, **more}


@pytest.fixture
def run(tmp_path):
    """A function that writes a run: its folder, its records, and files of examples."""

    def write(name, records, **files):
        folder = tmp_path / name
        (folder / "examples").mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({**GOLDEN, "records": records}))
        for file, lines in files.items():
            (folder / "examples" / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def data_of(html):
    """What the page's script reads."""
    return json.loads(html.partition('id="data">')[2].partition("</script>")[0])


def test_a_run_that_is_over_is_rendered_anew_to_the_same_bytes(run, capsys):
    folder = run("a", GOLDEN["records"])
    assert main(["render", str(folder)]) == 0
    first = (folder / "report.html").read_bytes()
    assert main(["render", str(folder / "metrics.json"), "--to", str(folder / "again")]) == 0
    assert (folder / "again" / "report.html").read_bytes() == first
    assert (folder / "again" / "summary.md").read_text() == (folder / "summary.md").read_text()
    assert "written to" in capsys.readouterr().out


def test_runs_stand_side_by_side_and_the_best_of_a_metric_first(run, capsys):
    def at(value):
        return [record("demo", metrics={"accuracy": {**record("demo")["metrics"]["accuracy"], "value": value}})]

    folders = [run(name, at(value)) for name, value in (("old", 0.3), ("new", 0.7), ("other", 0.5))]
    assert main(["compare", *map(str, folders), "--sort", "accuracy", "--to", str(folders[0].parent / "out")]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.index("demo \u00b7 new ", shown.index("accuracy")) < shown.index("0.7") < shown.index("0.5") < shown.index("0.3")
    )
    markdown = (folders[0].parent / "out" / "comparison.md").read_text()
    html = (folders[0].parent / "out" / "comparison.html").read_text()
    for page in (markdown, html):
        assert page.index("0.7") < page.index("0.5") < page.index("0.3")
    assert "3 runs side by side" in html
    assert "new: The test passed" in markdown


def test_flips_between_two_runs_are_found_by_the_identity_of_the_question(run):
    a = run("a", [record("demo", "examples/x.jsonl")], x=[question(1), question(2, right=False), question(3)])
    b = run("b", [record("demo", "examples/x.jsonl")], x=[question(3), question(2), question(1, right=False), question(4)])
    assert main(["compare", str(a), str(b), "--to", str(a.parent)]) == 0
    (board,) = data_of((a.parent / "comparison.html").read_text())["boards"]
    marks = {row[1]: tuple(column["marks"][place] for column in board["columns"]) for place, row in enumerate(board["rows"])}
    assert marks == {"id1": ("1", "0"), "id2": ("0", "1"), "id3": ("1", "1"), "id4": (".", "1")}


def test_a_metric_that_no_run_has_is_refused_with_those_there_are(run, capsys):
    assert main(["compare", str(run("a", [record("demo")])), "--sort", "elegance"]) == 2
    assert "no run has a metric 'elegance' to sort by. There are: accuracy." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 1, "records": [{"te', "is not whole JSON"),
        ('{"schema": 7, "records": []}', "is of schema version 7, and this pytest-lmeval reads version 1"),
        ("[1, 2]", "holds no list of records"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_metrics_document_is_refused_in_words(tmp_path, capsys, text, said):
    file = tmp_path / "metrics.json"
    if text is not None:
        file.write_text(text)
    for command in ("render", "compare"):
        assert main([command, str(file)]) == 2
        assert f"{file} {said}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def places(value, path=()):
    """The paths of all fields in a document, but for the points of curves."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield (*path, name)
        if name not in ("x", "y"):
            yield from places(part, (*path, name))


def spoiled(path, *, remove):
    """The golden document without one of its fields, or with null in its place."""
    document = json.loads(json.dumps(GOLDEN))
    parent = functools.reduce(lambda value, name: value[name], path[:-1], document)
    if remove:
        del parent[path[-1]]
    else:
        parent[path[-1]] = None
    return document


@settings(max_examples=25)
@given(st.sampled_from([path for path in places(GOLDEN) if path != ("records",)]), st.booleans())
def test_a_document_that_lacks_any_one_field_is_rendered(path, remove):
    for name in pages.PAGES:
        assert pages.render(name, spoiled(path, remove=remove))


ODD = [3, "x", True, [1], ["x"], {"a": 1}]


def edited(path, value):
    """The golden document with a gate and a section, and one of its fields as somebody edited it."""
    document = json.loads(json.dumps(GATED))
    functools.reduce(lambda part, name: part[name], path[:-1], document)[path[-1]] = value
    return document


FLIP = {"id": "a", "before": 1, "after": 0, "answer": "b", "target": None}
ROW = {"verdict": "unclear", "base": 0.5, "new": 0.4, "difference": -0.1, "low": -0.3, "high": 0.1, "margin": 0.01, "p": 0.1}
ROW |= {"detectable": 0.2, "needed": 900, "only_base": 1, "only_new": 2, "n": 10, "units": 10, "test": "mcnemar"}
ROW |= {"lost": 1, "won": 0, "flipped": [FLIP], "note": "a note", "unlike": ["shots was 0, is 1"]}
GATED = {**GOLDEN, "sections": [{"title": "a", "text": "b", "columns": ["c"], "rows": [[1]]}]}
GATED["records"] = [{**record, "gate": {"nll": ROW}} for record in GOLDEN["records"]]


@settings(max_examples=30)
@given(st.sampled_from([path for path in places(GATED) if path != ("records",)]), st.sampled_from(ODD))
@example(("run", "seconds"), "x")
@example(("records", 0, "metrics"), "x")
@example(("records", 0, "series"), [1])
@example(("records", 0, "certificate", "laws"), [1])
@example(("records", 0, "cost"), "q")
@example(("records", 0, "gate", "nll"), "x")
@example(("sections", 0, "rows"), 3)
def test_a_document_that_was_edited_at_any_one_place_is_rendered(path, value):
    for name in pages.PAGES:
        assert pages.render(name, edited(path, value))


def test_what_is_of_another_kind_is_said_with_its_place():
    assert complete(edited(("run", "seconds"), "x"))["problems"] == ['run: seconds is "x", no number, and was left out']
    (said,) = complete(edited(("records", 0, "cost"), "q"))["problems"]
    assert said.startswith("record 1 (")
    assert said.endswith('): cost is "q", no object, and was left out')
    assert (
        complete(complete(edited(("run", "seconds"), "x")))["problems"] == complete(edited(("run", "seconds"), "x"))["problems"]
    )


def test_this_test_can_fail(monkeypatch):
    monkeypatch.setattr(pages, "complete", lambda document: document)
    with pytest.raises(KeyError):
        pages.render("summary.md", spoiled(("records", 0, "metrics"), remove=True))


def test_what_has_to_be_left_out_of_a_document_is_said():
    half = {
        "metrics": {"accuracy": {"unit": "%"}, "nll": {"value": 1.5}},
        "series": {"curve": {"x": [1], "y": []}},
        "lm": None,
    }
    document = complete({"records": [half, "no record"]})
    assert list(document["records"][0]["metrics"]) == ["nll"]
    assert document["problems"] == [
        'record 2 is "no record", no object, and was left out',
        "record 1 (nameless): accuracy has no value, and was left out",
        "record 1 (nameless): the series curve is no curve, and was left out",
    ]
    assert "accuracy has no value" in pages.render("report.html", document)
    assert complete(document) == document


def test_a_golden_document_lacks_nothing(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(GOLDEN))
    document = load(tmp_path)
    assert document["problems"] == []
    assert document["records"] == GOLDEN["records"]
    with pytest.raises(DocumentError):
        load(tmp_path / "elsewhere")


def test_an_answer_of_any_text_stays_text_and_does_not_end_the_script(run):
    asked = question(1, choices=[], prediction=HOSTILE, target=HOSTILE, targets=[HOSTILE])
    folder = run("a", [record("demo", "examples/x.jsonl")], x=[asked])
    html = pages.render("report.html", load(folder), folders=[folder])
    html.encode()
    assert "alert('x')" not in html.replace("\\u0027", "'").partition("<body>")[0]
    assert "<img" not in html
    (row,) = data_of(html)["boards"][0]["rows"]
    assert row[5] == visible(HOSTILE)
    assert "\x1b" not in row[5]


@pytest.mark.parametrize(
    ("more", "mark"),
    [
        ({}, "1"),
        ({"right": False}, "0"),
        ({"loglikelihoods": [-1.0, float("nan")]}, "-"),
        ({"loglikelihoods": None}, "-"),
        ({"choices": [], "prediction": "yes"}, "1"),
        ({"choices": [], "prediction": "Yes"}, "0"),
        ({"choices": [], "prediction": "x", "judged": True}, "1"),
        ({"choices": [], "targets": [], "target": None}, "-"),
        ({"choices": [], "targets": ["no", "maybe"], "prediction": "maybe"}, "1"),
    ],
)
def test_an_answer_is_marked_as_accuracy_has_it_and_what_cannot_be_judged_is_not(run, more, mark):
    folder = run("a", [record("demo", "examples/x.jsonl")], x=[question(1, **more)])
    (board,) = data_of(pages.render("report.html", load(folder), folders=[folder]))["boards"]
    assert board["columns"][0]["marks"] == mark


def test_a_text_of_ten_megabytes_is_shortened_in_the_page_and_whole_in_the_file(run):
    long = "word " * 2_000_000
    folder = run("a", [record("demo", "examples/x.jsonl")], x=[question(1, choices=[], prediction=long, target="word")])
    html = pages.render("report.html", load(folder), folders=[folder])
    assert "the first 1,000 of 10,000,000 characters" in html
    assert len(html) < 100_000
    assert long in (folder / "examples" / "x.jsonl").read_text()


def test_what_does_not_fit_the_page_is_said_and_flips_come_first(run, monkeypatch):
    monkeypatch.setattr(examples, "EMBEDDED", 2_000)
    same, other = ([question(n, right=n != 77 or flip) for n in range(100)] for flip in (False, True))
    folder = run("a", [record("a", "examples/x.jsonl"), record("b", "examples/y.jsonl")], x=same, y=other)
    html = pages.render("report.html", load(folder), folders=[folder])
    (board,) = data_of(html)["boards"]
    kept = [place for place, row in enumerate(board["rows"]) if row]
    assert 77 in kept
    assert kept[:3] == [0, 1, 2]
    assert len(board["rows"]) == len(board["columns"][0]["marks"]) == 100
    assert f"the texts of {len(kept)} of 100 questions are in this page" in html
    assert "all are in examples/x.jsonl, examples/y.jsonl" in html


def test_files_of_examples_that_are_gone_torn_or_elsewhere_are_said(run):
    folder = run(
        "a",
        [
            record("a", "examples/gone.jsonl", subject="1"),
            record("b", "examples/x.jsonl"),
            record("c", "../b/examples/x.jsonl"),
        ],
        x=[question(1), question(2)],
    )
    run("b", [], x=[question(1)])
    torn = folder / "examples" / "x.jsonl"
    torn.write_bytes(torn.read_bytes()[:-20])
    html = pages.render("report.html", load(folder), folders=[folder])
    assert "the examples of examples/gone.jsonl are not shown: No such file or directory" in html
    assert "1 of 2 lines of examples/x.jsonl cannot be read" in html
    assert "../b/examples/x.jsonl lies outside of the output folder and was not read" in html


def test_a_template_at_fault_is_named_with_its_line(run, capsys):
    folder = run("a", [record("demo")])
    own = folder / "own"
    own.mkdir()
    (own / "report.html").write_text("{% extends 'lmeval/report.html' %}\n{% block footer %}\n{{ nothing }}\n{% endblock %}")
    assert main(["render", str(folder), "--templates", str(own)]) == 2
    assert f"report.html cannot be rendered: {own / 'report.html'}, line 3: UndefinedError" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_services_that_keep_numbers_are_given_them_in_their_formats(run):
    folder = run("a", GOLDEN["records"])
    for name in ("bencher", "github-action-benchmark"):
        assert main(["render", str(folder), "--format", name]) == 0
    kept = json.loads((folder / "bencher.json").read_text())
    reading = next(measures for name, measures in kept.items() if "perplexity" in measures)
    golden = next(record for record in GOLDEN["records"] if record["kind"] == "perplexity")["metrics"]["perplexity"]
    assert reading["perplexity"] == {"value": golden["value"], "lower_value": golden["low"], "upper_value": golden["high"]}
    bigger, smaller = (
        [entry["name"].rpartition(" ")[2] for entry in json.loads((folder / f"custom{name}IsBetter.json").read_text())]
        for name in ("Bigger", "Smaller")
    )
    assert "perplexity" in smaller
    assert "tokens_per_second" in bigger
    assert not set(bigger) & set(smaller)


@pytest.mark.parametrize("higher", [True, False])
def test_each_number_of_a_direction_goes_into_the_file_of_that_direction_once(higher):
    document = complete(GOLDEN)
    wanted = [
        metric["value"]
        for record in document["records"]
        for metric in record["metrics"].values()
        if metric["higher_is_better"] is higher
    ]
    assert [entry["value"] for entry in github_action_benchmark(document, higher_is_better=higher)] == wanted
    assert sum(map(len, bencher(document).values())) == sum(len(record["metrics"]) for record in document["records"])


TESTS = """
    import pytest
    from pytest_lmeval import Metric

    def test_good(lmeval, lm):
        lmeval.record(lm, "passkey", accuracy=Metric(0.5, n=10, higher_is_better=True))

    def test_bad(lmeval, lm):
        lmeval.record(lm, "passkey", accuracy=0.25)
        assert 0.25 > 0.5, "a passkey was forgotten"

    def test_unrelated():
        assert False
"""
HOOK = """
    def pytest_lmeval_report(config, data):
        for record in data["records"]:
            record["metrics"]["doubled"] = {"value": 2 * record["metrics"]["accuracy"]["value"], "unit": "", "n": 10}
        data["sections"].append({"title": "Energy", "columns": ["machine", "Wh"], "rows": [["ci-3", 12.5]]})
"""


@pytest.fixture
def project(pytester, monkeypatch):
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    pytester.makepyfile(TESTS)
    pytester.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\nlmeval_templates = templates\n")
    (pytester.path / "templates").mkdir()
    return pytester


def test_a_project_adds_numbers_sections_and_templates_and_ci_is_told_what_failed(project, monkeypatch):
    jsonschema = pytest.importorskip("jsonschema")
    project.makeconftest(HOOK)
    (project.path / "templates" / "summary.md").write_text(
        "{% extends 'lmeval/summary.md' %}{% block heading %}# Ours\n{% endblock %}"
    )
    (project.path / "templates" / "report.html").write_text("{{ 1 / 0 }}")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project.path / "step.md"))
    result = project.runpytest_subprocess("-p", "no:cacheprovider", "--junitxml=junit.xml")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "written to .lmeval: metrics.json, summary.md",
            "report.html was not rendered: *templates/report.html, line 1: ZeroDivisionError: division by zero. All numbers*",
        ]
    )
    (line,) = [line for line in result.stdout.lines if line.startswith("::error")]
    assert line.startswith(
        "::error file=test_a_project_adds_numbers_sections_and_templates_and_ci_is_told_what_failed.py,line=7,"
    )
    assert "a passkey was forgotten" in line
    summary = (project.path / ".lmeval" / "summary.md").read_text()
    assert summary.startswith("# Ours\n")
    assert "| ci-3 | 12.5 |" in summary
    assert (project.path / "step.md").read_text().strip() == summary.strip()
    document = json.loads((project.path / ".lmeval" / "metrics.json").read_text())
    jsonschema.validate(document, json.loads(resources.files("pytest_lmeval.records").joinpath("schema.json").read_text()))
    assert [record["metrics"]["doubled"]["value"] for record in document["records"]] == [1.0, 0.5]
    assert [failure["test"].rpartition("::")[2] for failure in document["failures"]] == ["test_bad"]
    cases = ElementTree.parse(project.path / "junit.xml").getroot().iter("testcase")
    properties = {case.get("name"): [(p.get("name"), p.get("value")) for p in case.iter("property")] for case in cases}
    assert properties == {
        "test_good": [("lmeval demo, passkey, accuracy", "0.5")],
        "test_bad": [("lmeval demo, passkey, accuracy", "0.25")],
        "test_unrelated": [],
    }


def test_a_folder_of_templates_that_is_not_there_is_refused_before_the_first_test(pytester):
    pytester.makepyfile("def test_nothing():\n    pass\n")
    result = pytester.runpytest_subprocess("--lmeval-templates", "nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--lmeval-templates names no folder: *nowhere*"])
