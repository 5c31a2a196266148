"""Pages of runs that are over, several runs side by side, answered questions, and what projects and packages add."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from documents import HOSTILE, answered, asked, data_of, document, everything, generated, reading, register, write_run

from pytest_lmeval.__main__ import main
from pytest_lmeval.records._document import Section, load
from pytest_lmeval.records._schema import json_schema
from pytest_lmeval.records._value import Value
from pytest_lmeval.report import _examples as examples, _pages as pages, _write as write
from pytest_lmeval.report._formats import bencher, github_action_benchmark
from pytest_lmeval.report._words import visible

# ---------------------------------------------------------------------------------------- runs that are over


def test_a_run_that_is_over_is_rendered_again_to_the_same_bytes(tmp_path, capsys):
    folder = write_run(tmp_path / "a", everything())
    assert main(["render", str(folder)]) == 0
    first = (folder / "report.html").read_bytes()
    assert main(["render", str(folder / "metrics.json"), "--to", str(folder / "again")]) == 0
    assert (folder / "again" / "report.html").read_bytes() == first
    assert (folder / "again" / "summary.md").read_text() == (folder / "summary.md").read_text()
    assert "written to" in capsys.readouterr().out


def test_runs_stand_side_by_side_and_the_best_of_a_metric_first(tmp_path, capsys):
    runs = {"old": 0.3, "new": 0.7, "other": 0.5}
    folders = [write_run(tmp_path / name, document(asked(accuracy=value))) for name, value in runs.items()]
    assert main(["compare", *map(str, folders), "--sort", "accuracy", "--to", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.index("demo \u00b7 new ", shown.index("accuracy")) < shown.index("0.7") < shown.index("0.5") < shown.index("0.3")
    )
    markdown, html = ((tmp_path / "out" / f"comparison.{kind}").read_text() for kind in ("md", "html"))
    for page in (markdown, html):
        assert page.index("0.7") < page.index("0.5") < page.index("0.3")
    assert "3 runs side by side" in html
    assert "new: The test passed" in markdown


def test_a_metric_that_no_run_has_is_refused_with_those_there_are(tmp_path, capsys):
    assert main(["compare", str(write_run(tmp_path / "a", document(asked()))), "--sort", "elegance"]) == 2
    assert "no run has a metric 'elegance' to sort by. There are: accuracy." in capsys.readouterr().err


def test_a_file_that_is_no_document_is_refused_in_words(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text('{"schema": 1, "records": []}')
    for command in ("render", "compare"):
        assert main([command, str(tmp_path)]) == 2
        assert "is of schema version 1" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_template_at_fault_is_named_with_its_line(tmp_path, capsys):
    folder = write_run(tmp_path / "a", document(asked()))
    own = folder / "own"
    own.mkdir()
    (own / "report.html").write_text("{% extends 'lmeval/report.html' %}\n{% block footer %}\n{{ nothing }}\n{% endblock %}")
    assert main(["render", str(folder), "--templates", str(own)]) == 2
    assert f"report.html cannot be rendered: {own / 'report.html'}, line 3: UndefinedError" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


# ---------------------------------------------------------------------------------------- answered questions


def tables_of(folder):
    return data_of(pages.render("report.html", load(folder), folders=[folder]))["examples"]


def test_flips_between_two_runs_are_found_by_the_identity_of_the_question(tmp_path):
    a, b = [answered(1), answered(2, is_right=False), answered(3)], [answered(n, is_right=n != 1) for n in (3, 2, 1, 4)]
    for name, lines in (("a", a), ("b", b)):
        write_run(tmp_path / name, document(asked("demo", "examples/x.jsonl")), x=lines)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path)]) == 0
    (table,) = data_of((tmp_path / "comparison.html").read_text())["examples"]
    marks = {row[1]: tuple(column["marks"][index] for column in table["columns"]) for index, row in enumerate(table["rows"])}
    assert marks == {"id1": ("1", "0"), "id2": ("0", "1"), "id3": ("1", "1"), "id4": (".", "1")}


def test_a_question_has_its_prompt_target_outputs_and_scores(tmp_path):
    lines = [generated(7, "yes"), generated(7, "no", score=0.0, prompt="Really?")]
    records = [asked(name, f"examples/{name}.jsonl", metrics={"exact_match": Value(1.0)}) for name in ("a", "b", "c")]
    folder = write_run(tmp_path / "run", document(*records), a=lines[:1], b=lines[1:], c=lines[:1])
    (table,) = tables_of(folder)
    assert (table["metrics"], table["example"]) == (["exact match"], "question")
    number, identity, group, choices, right, target, prompts, answers, _, scores, marked = table["rows"][0]
    assert (number, identity, group, choices, right, target) == (7, "id7", None, [], [], "yes")
    assert prompts == ["Question 7?", "Really?", None]  # the third read what the first did
    assert (answers, scores, marked) == (["yes", "no", "yes"], [[1.0], [0.0], [1.0]], [1.0, 0.0, 1.0])


TWO = {"squad_f1": Value(0.5, higher_is_better=True), "exact_match": Value(0.5, higher_is_better=True)}


@pytest.mark.parametrize(
    ("line", "metrics", "mark"),
    [
        (answered(1), ["accuracy"], "1"),
        (answered(1, is_right=False), ["accuracy"], "0"),
        (generated(1, "x", scores={"squad_f1": 0.25, "exact_match": 0.0}), ["squad_f1", "exact_match"], "~"),
        (generated(1, "x", scores={"squad_f1": 0.25, "exact_match": 0.0}), ["exact_match", "squad_f1"], "0"),
        (generated(1, "x", scores={"exact_match": 1.0}), ["squad_f1", "exact_match"], "-"),
        (generated(1, "x", scores={"squad_f1": None, "exact_match": 1.0}), ["squad_f1", "exact_match"], "-"),
        (generated(1, "x", scores={}), ["exact_match"], "-"),
        (generated(1, "yes", scores={"perplexity": 1.0, "bleu": 1.0}), ["perplexity", "bleu"], "-"),  # neither judges an answer
    ],
)
def test_an_answer_is_marked_by_its_score_in_the_first_metric_that_judges_it(tmp_path, line, metrics, mark):
    record = asked("demo", "examples/x.jsonl", metrics={name: Value(0.5, higher_is_better=True) for name in metrics})
    (table,) = tables_of(write_run(tmp_path / "run", document(record), x=[line]))
    assert table["columns"][0]["marks"] == mark


def test_the_answer_shown_is_the_choice_that_the_example_says_was_chosen(tmp_path):
    """Not one that the page finds by a rule of its own: here the first choice is the likeliest."""
    choices = {"choices": (" yes", " certainly not"), "loglikelihoods": (-2.0, -3.0)}
    lines = [answered(1, **choices, chosen=1, scores={"greedy_match": 0.0}), answered(2, **choices, chosen=0)]
    (table,) = tables_of(write_run(tmp_path / "run", document(asked("demo", "examples/x.jsonl")), x=lines))
    assert [row[7] for row in table["rows"]] == [[1], [0]]


def test_an_answer_of_any_text_stays_text_and_does_not_end_the_script(tmp_path):
    hostile = f"</script>{HOSTILE} \x1b[31m \x00 \ud800"
    line = generated(1, hostile, target=hostile, prompt=hostile, group=hostile)
    folder = write_run(tmp_path / "run", document(asked("demo", "examples/x.jsonl")), x=[line])
    html = pages.render("report.html", load(folder), folders=[folder])
    html.encode()
    assert "alert('x')" not in html.replace("\\u0027", "'").partition("<body>")[0]
    assert "<img" not in html
    (row,) = data_of(html)["examples"][0]["rows"]
    assert row[5] == row[7][0] == row[6][0] == visible(hostile)
    assert "\x1b" not in row[5]


def test_a_text_of_ten_megabytes_is_shortened_in_the_page_and_whole_in_the_file(tmp_path):
    long = "word " * 2_000_000
    line = generated(1, long, prompt=long + "?")
    folder = write_run(tmp_path / "run", document(asked("demo", "examples/x.jsonl")), x=[line])
    html = pages.render("report.html", load(folder), folders=[folder])
    assert "the first 1,000 of 10,000,000 characters" in html
    assert "(the last 1,000 of 10,000,001 characters)" in html
    assert len(html) < 100_000
    assert long in (folder / "examples" / "x.jsonl").read_text()


def test_what_does_not_fit_the_page_is_said_and_flips_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "EMBEDDED", 2_000)
    same, other = ([answered(n, is_right=n != 77 or flip) for n in range(100)] for flip in (False, True))
    records = [asked("a", "examples/x.jsonl"), asked("b", "examples/y.jsonl")]
    folder = write_run(tmp_path / "run", document(*records), x=same, y=other)
    html = pages.render("report.html", load(folder), folders=[folder])
    (table,) = data_of(html)["examples"]
    kept = [index for index, row in enumerate(table["rows"]) if row]
    assert 77 in kept
    assert kept[:3] == [0, 1, 2]
    assert len(table["rows"]) == len(table["columns"][0]["marks"]) == 100
    assert f"the texts of {len(kept)} of 100 questions are in this page" in html
    assert "all are in examples/x.jsonl, examples/y.jsonl" in html


def test_files_of_examples_that_are_gone_damaged_or_elsewhere_are_said(tmp_path):
    gone, damaged, elsewhere = (f"{name}/examples/x.jsonl".removeprefix("./") for name in ("gone", ".", "../b"))
    records = [asked("a", gone, subject="1"), asked("b", damaged), asked("c", elsewhere)]
    folder = write_run(tmp_path / "a", document(*records), x=[answered(1)])
    write_run(tmp_path / "b", document(asked()), x=[answered(1)])
    file = folder / "examples" / "x.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole.replace("-1.0", "NaN") + whole.replace("[-1.0,", "[") + "[1]\n" + whole[:-20])
    html = pages.render("report.html", load(folder), folders=[folder])
    assert "the examples of gone/examples/x.jsonl are not shown: No such file or directory" in html
    assert "4 of 5 lines of examples/x.jsonl cannot be read and are not shown" in html
    assert "../b/examples/x.jsonl lies outside of the output folder and was not read" in html
    assert [len(table["rows"]) for table in data_of(html)["examples"]] == [1]


# ---------------------------------------------------------------------------------------- what packages add


def test_registered_sections_stand_on_the_pages_and_one_that_fails_costs_only_itself(tmp_path, monkeypatch):
    def counted(found, folder):
        return Section("Energy", f"of {folder.name}", ["records"], [[len(found.records)]])

    def broken(found, folder):
        raise KeyError("no meter")

    sections = {"good": counted, "quiet": lambda *_: None, "broken": broken, "text": lambda *_: "Energy: 3"}
    sections |= {"torn": lambda *_: Section("Torn", rows=[3]), "odd": lambda *_: Section("Odd", rows=[[float("nan")]])}
    register(monkeypatch, reports={"other": sections})
    folder = write_run(tmp_path / "run", document())
    before = (folder / "metrics.json").read_text()
    assert main(["render", str(folder)]) == 0
    summary, html = ((folder / name).read_text() for name in pages.PAGES)
    for page in (summary, html):
        assert "Energy" in page
        assert "of run" in page
        for name, said in (("broken", "KeyError"), ("text", "a str and no Section"), ("torn", "rows"), ("odd", "not JSON")):
            assert any(name in line and said in line for line in page.splitlines()), (name, said)
        assert "Torn" not in page
    assert "| 3 |" in summary
    assert (folder / "metrics.json").read_text() == before
    told = write.reports(tmp_path / "again", document().records, run=document().run, root=tmp_path)
    assert "the section 'broken' of other failed and is left out (KeyError: 'no meter')" in told


def test_a_registered_exporter_writes_its_files(tmp_path, monkeypatch, capsys):
    files = {"a.csv": "metric,value\n", "a.json": [3]}
    register(monkeypatch, exporters={"other": {"csv": lambda found: files}})
    folder = write_run(tmp_path / "run", document())
    assert main(["render", str(folder), "--format", "csv"]) == 0
    assert (folder / "a.csv").read_text() == "metric,value\n"
    assert json.loads((folder / "a.json").read_text()) == [3]
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("export", [lambda found: 1 / 0, lambda found: 3, 7])
def test_an_exporter_that_fails_is_told_with_its_name(tmp_path, monkeypatch, capsys, export):
    register(monkeypatch, exporters={"other": {"csv": export}})
    assert main(["render", str(write_run(tmp_path / "run", document())), "--format", "csv"]) == 2
    assert "the export format 'csv' failed with" in capsys.readouterr().err


def test_services_that_keep_numbers_are_given_them_in_their_formats(tmp_path, capsys):
    folder = write_run(tmp_path / "run", document())
    for name in ("bencher", "github-action-benchmark"):
        assert main(["render", str(folder), "--format", name]) == 0
    kept = json.loads((folder / "bencher.json").read_text())
    assert kept["t.py::test_reads (demo, stdlib[test])"]["perplexity"] == {
        "value": 3.5,
        "lower_value": 3.25,
        "upper_value": 3.75,
    }
    names = [
        [entry["name"].rpartition(" ")[2] for entry in json.loads((folder / f"custom{name}IsBetter.json").read_text())]
        for name in ("Bigger", "Smaller")
    ]
    assert names == [["tokens_per_second", "accuracy"], ["perplexity", "nll", "bits_per_byte"]]
    assert main(["render", str(folder), "--format", "benchr"]) == 2
    assert "there is no export format 'benchr'. Did you mean bencher?" in capsys.readouterr().err


def test_each_number_of_a_direction_goes_into_the_file_of_that_direction_once():
    found = document(reading(), asked(), asked("b"))
    values = [value for record in found.records for value in record.metrics.values()]
    for file, higher in (("customBiggerIsBetter.json", True), ("customSmallerIsBetter.json", False)):
        wanted = [float(value) for value in values if value.higher_is_better is higher]
        assert [entry["value"] for entry in github_action_benchmark(found)[file]] == wanted
    assert sum(map(len, bencher(found)["bencher.json"].values())) == len(values)


# ---------------------------------------------------------------------------------------- what projects add

TESTS = """
    import pytest
    from pytest_lmeval.records._value import Value

    def test_good(lmeval, lm):
        lmeval.record(lm, "passkey", accuracy=Value(0.5, n=10, higher_is_better=True))

    def test_bad(lmeval, lm):
        lmeval.record(lm, "passkey", accuracy=0.25)
        assert 0.25 > 0.5, "a passkey was forgotten"

    def test_unrelated():
        assert False
"""
HOOK = """
    from pytest_lmeval.records._document import Section
    from pytest_lmeval.records._value import Value

    def pytest_lmeval_report(config, data):
        for record in data.records:
            record.metrics["doubled"] = Value(2 * record.metrics["accuracy"], n=10)
        data.sections.append(Section("Energy", columns=["machine", "Wh"], rows=[["ci-3", 12.5]]))
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
    found = load(project.path / ".lmeval")
    jsonschema.validate(json.loads((project.path / ".lmeval" / "metrics.json").read_text()), json_schema())
    assert [record.metrics["doubled"] for record in found.records] == [1.0, 0.5]
    assert [failure.test.rpartition("::")[2] for failure in found.failures] == ["test_bad"]
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
