"""Finished runs are rendered, compared and exported; projects and packages add numbers, sections and formats."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from documents import (
    HOSTILE,
    chosen,
    data_of,
    document,
    everything,
    generated,
    perplexity_of,
    task_of,
    write_run,
)

from pytest_lmeval.__main__ import main
from pytest_lmeval.records._document import load
from pytest_lmeval.records._schema import json_schema
from pytest_lmeval.records._value import Value
from pytest_lmeval.report import _pages as pages, _write as write
from pytest_lmeval.report._words import visible

# ---------------------------------------------------------------------------------------- finished runs


def test_rendering_a_finished_run_again_gives_the_same_bytes(tmp_path, capsys):
    folder = write_run(tmp_path / "a", everything())
    assert main(["render", str(folder)]) == 0
    assert main(["render", str(folder / "metrics.json"), "--to", str(folder / "again")]) == 0
    for name in pages.PAGES:
        assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert "written to" in capsys.readouterr().out


def test_compared_runs_are_sorted_by_a_metric(tmp_path, capsys):
    runs = {"old": 0.3, "new": 0.7, "other": 0.5}
    folders = [write_run(tmp_path / name, document(task_of(accuracy=value))) for name, value in runs.items()]
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


def test_sorting_by_an_unknown_metric_is_refused_with_the_known_ones(tmp_path, capsys):
    assert main(["compare", str(write_run(tmp_path / "a", document(task_of()))), "--sort", "elegance"]) == 2
    assert "no run has a metric 'elegance' to sort by. There are: accuracy." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["render", "compare"])
def test_a_file_that_is_no_document_is_refused(tmp_path, capsys, command):
    (tmp_path / "metrics.json").write_text('{"schema": 1, "records": []}')
    assert main([command, str(tmp_path)]) == 2
    assert "is of schema version 1" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_an_error_in_a_template_is_reported_with_its_line(tmp_path, capsys):
    folder = write_run(tmp_path / "a", document(task_of()))
    own = folder / "report.html"
    own.write_text("{% extends 'lmeval/report.html' %}\n{% block footer %}\n{{ nothing }}\n{% endblock %}")
    assert main(["render", str(folder), "--to", str(tmp_path), "--templates", str(folder)]) == 2
    assert f"report.html cannot be rendered: {own}, line 3: UndefinedError" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


# ---------------------------------------------------------------------------------------- examples


def page_of(tmp_path, *records, **files):
    """report.html of a run with these records and files of examples, and its example tables."""
    folder = write_run(tmp_path / "run", document(*records), **files)
    html = pages.render("report.html", load(folder), folders=[folder])
    return html, data_of(html)["examples"]


def test_flips_between_two_runs_are_found_by_question_id(tmp_path):
    a, b = [chosen(1), chosen(2, is_right=False), chosen(3)], [chosen(n, is_right=n != 1) for n in (3, 2, 1, 4)]
    for name, lines in (("a", a), ("b", b)):
        write_run(tmp_path / name, document(task_of("demo", "examples/x.jsonl")), x=lines)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path)]) == 0
    (table,) = data_of((tmp_path / "comparison.html").read_text())["examples"]
    marks = {row[1]: tuple(column["marks"][index] for column in table["columns"]) for index, row in enumerate(table["rows"])}
    assert marks == {"id1": ("1", "0"), "id2": ("0", "1"), "id3": ("1", "1"), "id4": (".", "1")}


def test_a_question_has_its_prompt_target_outputs_and_scores(tmp_path):
    lines = [generated(7, "yes"), generated(7, "no", score=0.0, prompt="Really?", thought="So?", outcome="cut off")]
    records = [task_of(name, f"examples/{name}.jsonl", metrics={"exact_match": Value(1.0)}) for name in ("a", "b", "c")]
    _, (table,) = page_of(tmp_path, *records, a=lines[:1], b=lines[1:], c=lines[:1])
    assert (table["metrics"], table["example"]) == (["exact match"], "question")
    question, (prompts, answers, _, scores, marked, thoughts) = table["rows"][0][:6], table["rows"][0][6:]
    assert question == [7, "id7", None, [], [], "yes"]
    assert prompts == ["Question 7?", "Really?", None]  # the third is equal to the first
    assert (answers, scores, marked) == (["yes", "no", "yes"], [[1.0], [0.0], [1.0]], [1.0, 0.0, 1.0])
    assert (thoughts, [column["outcomes"] for column in table["columns"]]) == (["", "So?", ""], ["", "c", ""])


@pytest.mark.parametrize(
    ("line", "metrics", "mark"),
    [
        (chosen(1), ["accuracy"], "1"),
        (chosen(1, is_right=False), ["accuracy"], "0"),
        (generated(1, "x", scores={"squad_f1": 0.25, "exact_match": 0.0}), ["squad_f1", "exact_match"], "~"),
        (generated(1, "x", scores={"squad_f1": 0.25, "exact_match": 0.0}), ["exact_match", "squad_f1"], "0"),
        (generated(1, "x", scores={"exact_match": 1.0}), ["squad_f1", "exact_match"], "-"),
        (generated(1, "x", scores={"squad_f1": None, "exact_match": 1.0}), ["squad_f1", "exact_match"], "-"),
        (generated(1, "x", scores={}), ["exact_match"], "-"),
        (generated(1, "yes", scores={"perplexity": 1.0, "bleu": 1.0}), ["perplexity", "bleu"], "-"),  # neither judges an answer
    ],
)
def test_an_answer_is_marked_by_its_score_in_the_first_metric_that_judges(tmp_path, line, metrics, mark):
    record = task_of("demo", "examples/x.jsonl", metrics={name: Value(0.5, higher_is_better=True) for name in metrics})
    _, (table,) = page_of(tmp_path, record, x=[line])
    assert table["columns"][0]["marks"] == mark


def test_the_page_shows_the_chosen_choice_even_if_another_is_likelier(tmp_path):
    choices = {"choices": (" yes", " certainly not"), "loglikelihoods": (-2.0, -3.0)}
    lines = [chosen(1, **choices | {"chosen": 1, "scores": {"greedy_match": 0.0}}), chosen(2, **choices)]
    _, (table,) = page_of(tmp_path, task_of("demo", "examples/x.jsonl"), x=lines)
    assert [row[7] for row in table["rows"]] == [[1], [0]]


def test_hostile_answers_are_escaped_and_do_not_end_the_script(tmp_path):
    hostile = f"</script>{HOSTILE} \x1b[31m \x00 \ud800"
    line = generated(1, hostile, target=hostile, prompt=hostile, group=hostile)
    html, (table,) = page_of(tmp_path, task_of("demo", "examples/x.jsonl"), x=[line])
    html.encode()
    assert "alert('x')" not in html.replace("\\u0027", "'").partition("<body>")[0]
    assert "<img" not in html
    (row,) = table["rows"]
    assert row[5] == row[7][0] == row[6][0] == visible(hostile)
    assert "\x1b" not in row[5]


def test_long_texts_are_shortened_in_the_page_and_whole_in_the_file(tmp_path):
    long = "word " * 20_000
    html, _ = page_of(tmp_path, task_of("demo", "examples/x.jsonl"), x=[generated(1, long, prompt=long + "?")])
    assert "the first 1,000 of 100,000 characters" in html
    assert "(the last 1,000 of 100,001 characters)" in html
    assert len(html) < 100_000
    assert long in (tmp_path / "run" / "examples" / "x.jsonl").read_text()


def test_the_page_embeds_flips_first_and_says_what_does_not_fit(tmp_path):
    flip, long = 210, {"choices": ("c" * 1000,) * 20, "loglikelihoods": (-1.0,) * 20}
    same, other = ([chosen(n, is_right=n != flip or right, **long) for n in range(220)] for right in (False, True))
    html, (table,) = page_of(tmp_path, task_of("a", "examples/x.jsonl"), task_of("b", "examples/y.jsonl"), x=same, y=other)
    embedded = [index for index, row in enumerate(table["rows"]) if row]
    assert embedded == [*range(len(embedded) - 1), flip]
    assert len(table["rows"]) == len(table["columns"][0]["marks"]) == 220
    assert f"the texts of {len(embedded):,} of 220 questions are in this page" in html
    assert "all are in examples/x.jsonl, examples/y.jsonl" in html
    assert 3_950_000 < len(html) < 4_200_000


def test_missing_damaged_and_outside_files_of_examples_are_reported(tmp_path):
    gone, damaged, outside = "gone/examples/x.jsonl", "examples/x.jsonl", "../b/examples/x.jsonl"
    records = [task_of("a", gone, subject="1"), task_of("b", damaged), task_of("c", outside)]
    write_run(tmp_path / "b", document(task_of()), x=[chosen(1)])
    folder = write_run(tmp_path / "a", document(*records), x=[chosen(1)])
    file = folder / damaged
    whole = file.read_text()
    file.write_text(whole + whole.replace("-1.0", "NaN") + whole.replace("[-1.0,", "[") + "[1]\n" + whole[:-20])
    html = pages.render("report.html", load(folder), folders=[folder])
    assert "the examples of gone/examples/x.jsonl are not shown: No such file or directory" in html
    assert "4 of 5 lines of examples/x.jsonl cannot be read and are not shown" in html
    assert "the examples of ../b/examples/x.jsonl are not shown: it lies outside of the folder" in html
    assert [len(table["rows"]) for table in data_of(html)["examples"]] == [1]


# ---------------------------------------------------------------------------------------- packages

OTHER = """
from pytest_lmeval import Section

good = lambda found, folder: Section("Energy <b>", f"of {folder.name}", ["records"], [[len(found.records)]])
quiet = lambda *_: None
broken = lambda *_: {}["no meter"]
text = lambda *_: "Energy: 3"
torn = lambda *_: Section("Torn", rows=[3])
odd = lambda *_: Section("Odd", rows=[[float("nan")]])

csv = lambda found: {"a.csv": "metric,value\\n", "a.json": [3]}
divides = lambda found: 1 / 0
number = lambda found: 3
no_function = 7
"""


def test_pages_show_registered_sections_and_a_failing_one_costs_only_itself(tmp_path, packages):
    names = ("good", "quiet", "broken", "text", "torn", "odd")
    packages("other", OTHER, reports={name: f"other:{name}" for name in names})
    folder = write_run(tmp_path / "run", document())
    before = (folder / "metrics.json").read_text()
    assert main(["render", str(folder)]) == 0
    summary, html = ((folder / name).read_text() for name in pages.PAGES)
    for page in (summary, html):
        assert "of run" in page
        for name, said in (("broken", "KeyError"), ("text", "a str and no Section"), ("torn", "rows"), ("odd", "not JSON")):
            assert any(name in line and said in line for line in page.splitlines()), (name, said)
        assert "Torn" not in page
    assert "Energy &lt;b&gt;" in html
    assert "| 3 |" in summary
    assert (folder / "metrics.json").read_text() == before
    told = write.reports(tmp_path / "again", document().records, run=document().run, root=tmp_path).lines
    assert "the section 'broken' of other failed and is left out (KeyError: 'no meter')" in told


def test_a_registered_exporter_writes_its_files(tmp_path, packages):
    packages("other", OTHER, exporters={"csv": "other:csv"})
    folder = write_run(tmp_path / "run", document())
    assert main(["render", str(folder), "--format", "csv"]) == 0
    assert (folder / "a.csv").read_text() == "metric,value\n"
    assert json.loads((folder / "a.json").read_text()) == [3]
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["divides", "number", "no_function"])
def test_a_failing_exporter_is_reported_by_name(tmp_path, packages, capsys, name):
    packages("other", OTHER, exporters={name: f"other:{name}"})
    assert main(["render", str(write_run(tmp_path / "run", document())), "--format", name]) == 2
    assert f"the export format {name!r} failed with" in capsys.readouterr().err


def test_each_number_is_exported_once_and_to_the_file_of_its_direction(tmp_path, capsys):
    found = document(perplexity_of(), task_of(), task_of("b"))
    folder = write_run(tmp_path / "run", found)
    for name in ("bencher", "github-action-benchmark"):
        assert main(["render", str(folder), "--format", name]) == 0
    values = [(name, value) for record in found.records for name, value in record.metrics.items()]
    for file, higher in (("customBiggerIsBetter", True), ("customSmallerIsBetter", False)):
        entries = json.loads((folder / f"{file}.json").read_text())
        wanted = [(name, float(value)) for name, value in values if value.higher_is_better is higher]
        assert [(entry["name"].rpartition(" ")[2], entry["value"]) for entry in entries] == wanted
    measures = json.loads((folder / "bencher.json").read_text())
    bounds = {"value": 3.5, "lower_value": 3.25, "upper_value": 3.75}
    assert measures["t.py::test_reads (demo, stdlib[test])"]["perplexity"] == bounds
    assert sum(map(len, measures.values())) == len(values)
    assert main(["render", str(folder), "--format", "benchr"]) == 2
    assert "there is no export format 'benchr'. Did you mean bencher?" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- projects

TESTS = """
    import pytest
    from pytest_lmeval import Value

    def test_good(lmeval, lm):
        lmeval.record(lm, "passkey", accuracy=Value(0.5, n=10, higher_is_better=True))

    def test_bad(lmeval, lm):
        lmeval.record(lm, "passkey", accuracy=0.25)
        assert 0.25 > 0.5, "a passkey was forgotten"

    def test_unrelated():
        assert False
"""
HOOK = """
    from pytest_lmeval import Section, Value

    def pytest_lmeval_report(config, data):
        for record in data.records:
            record.metrics["doubled"] = Value(2 * record.metrics["accuracy"], "times", n=10)
        data.sections.append(Section("Energy", columns=["machine", "Wh"], rows=[["ci-3", 12.5]]))
"""


def test_a_project_adds_numbers_sections_and_templates_and_ci_gets_the_failures(pytester, monkeypatch):
    jsonschema = pytest.importorskip("jsonschema")
    folder, step = pytester.path / ".lmeval", pytester.path / "step.md"
    pytester.makepyfile(test_own=TESTS)
    pytester.makeini("[pytest]\nfilterwarnings = error\nlmeval_templates = templates\n")
    pytester.makeconftest(HOOK)
    templates = pytester.mkdir("templates")
    (templates / "summary.md").write_text("{% extends 'lmeval/summary.md' %}{% block heading %}# Ours\n{% endblock %}")
    (templates / "report.html").write_text("{{ 1 / 0 }}")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--junitxml=junit.xml")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "written to .lmeval: metrics.json, summary.md",
            "report.html was not rendered: *templates/report.html, line 1: ZeroDivisionError: division by zero. All numbers*",
            "::error file=test_own.py,line=7,*a passkey was forgotten*",
        ]
    )
    assert result.stdout.str().count("::error") == 1
    summary = (folder / "summary.md").read_text()
    assert summary.startswith("# Ours\n")
    assert "| ci-3 | 12.5 |" in summary
    assert step.read_text().strip() == summary.strip()
    found = load(folder)
    jsonschema.validate(json.loads((folder / "metrics.json").read_text()), json_schema())
    assert [repr(record.metrics["doubled"]) for record in found.records] == ["1 times", "0.5 times"]
    assert [failure.test.rpartition("::")[2] for failure in found.failures] == ["test_bad"]
    cases = ElementTree.parse(pytester.path / "junit.xml").getroot().iter("testcase")
    properties = {case.get("name"): [(p.get("name"), p.get("value")) for p in case.iter("property")] for case in cases}
    assert properties == {
        "test_good": [("lmeval demo, passkey, accuracy", "0.5")],
        "test_bad": [("lmeval demo, passkey, accuracy", "0.25")],
        "test_unrelated": [],
    }


def test_a_missing_folder_of_templates_is_refused_before_the_first_test(pytester):
    pytester.makepyfile("def test_nothing():\n    pass\n")
    result = pytester.runpytest_subprocess("--lmeval-templates", "nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--lmeval-templates names no folder: *nowhere*"])
