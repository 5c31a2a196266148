"""Pages escape what models wrote, fit their width, and cost only themselves if they fail."""

import hashlib
import re
from pathlib import Path

import pytest
from documents import GATE, HOSTILE, document, everything, laws_of, model, perplexity_of, task_of
from hypothesis import given, strategies as st
from msgspec.structs import replace

from pytest_lmeval.records import _history as history
from pytest_lmeval.records._comparison import Comparison, Flip
from pytest_lmeval.records._document import BaselineUse, Failure, Section, Skipped, load
from pytest_lmeval.records._measured import Series
from pytest_lmeval.records._value import Value
from pytest_lmeval.report import _github as github, _pages as pages, _terminal as terminal, _write as write
from pytest_lmeval.report._changes import changes
from pytest_lmeval.report._figures import figures
from pytest_lmeval.report._grids import grids
from pytest_lmeval.report._overview import overview
from pytest_lmeval.report._tables import groups, headlines, side_by_side
from pytest_lmeval.report._words import interval, number, size_of, visible

RUN = write.run(0.0, ["-m", "a b"], 0)


def rendered(found):
    """summary.md and report.html."""
    return [pages.render(name, found) for name in pages.PAGES]


def markup(html):
    """The page without its scripts and styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)


def test_both_pages_show_every_record_and_law():
    for page in rendered(everything()):
        for word in ("exact-step-only", "bits per byte", "splits", "causality", "978,048 parameters", "windows of 64 tokens"):
            assert word in page


def test_many_ties_are_said_beside_the_number_wherever_it_is_shown():
    tied = {"accuracy": Value(0.5, low=0.4, high=0.6, n=100, ties=40, higher_is_better=True)}
    for records in ([task_of(metrics=tied)], [task_of(metrics=tied), task_of("other")]):  # alone, and side by side
        pages_ = [*rendered(document(*records)), "\n".join(terminal.lines(records, width=100))]
        assert all("0.4 to 0.6, 40 of 100 tied" in page for page in pages_)


def test_the_report_is_one_file_that_loads_nothing():
    html = pages.render("report.html", document())
    for word in ("http://", "https://", "<link", "<img", "<iframe", " src=", "@import", "url("):
        assert word not in markup(html)
    for word in ("<link", " src=", "@import", "url("):
        assert word not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert "default-src 'none'" in html


def test_vendored_files_have_the_published_hashes():
    vendor = Path(pages.__file__).parent / "vendor"
    listed = re.findall(r"^\| (\S+\.js) \|.*\| ([0-9a-f]{64}) \|$", (vendor / "README.md").read_text(), flags=re.MULTILINE)
    assert {(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in vendor.glob("*.js")} == set(listed)


def test_only_pages_with_plots_contain_the_plot_library():
    assert len(pages.render("report.html", document(perplexity_of(series={})))) < 100_000
    assert len(pages.render("report.html", document(perplexity_of()))) > 400_000


@pytest.mark.parametrize("field", ["test", "subject"])
def test_text_of_a_record_is_escaped(field):
    markdown, html = rendered(document(perplexity_of(**{field: HOSTILE}, series={})))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "{{ 7 * 7 }}" in html
    assert "\x07" not in html
    (line,) = [line for line in markdown.splitlines() if "alert" in line]
    assert line.startswith("|")
    for special in ("<script>", "`code`", "**bold**", "[link]("):
        assert special not in line
    assert line.replace("\\|", "").count("|") == 7


@pytest.mark.parametrize(
    ("part", "name"), [("run", "started"), *(("environment", name) for name in ("python", "torch", "cpu", "commit"))]
)
def test_text_of_run_and_environment_is_escaped(part, name):
    found = document()
    setattr(found, part, replace(getattr(found, part), **{name: "<img src=x> **bold**"}))
    assert "\\<img src=x\\> \\*\\*bold" in pages.render("summary.md", found)


def test_the_summary_folds_sections_of_more_than_twelve_rows():
    sections = [Section(HOSTILE, columns=["n"], rows=[[n] for n in range(rows)]) for rows in (13, 12)]
    long, short = (pages.render("summary.md", document(sections=[section])) for section in sections)
    assert "<details><summary>&lt;script&gt;" in long
    assert "**\\<script\\>" in short


@given(st.integers(20, 300))
def test_no_line_is_wider_than_the_terminal(width):
    assert max(map(len, terminal.lines(everything().records, width=width))) <= width


def test_the_terminal_names_the_model_of_a_record_only_if_there_are_several():
    assert not any(line.startswith("    demo, ") for line in terminal.lines(document().records, width=200))
    assert any(line.startswith("    other, ") for line in terminal.lines([perplexity_of(), task_of("other")], width=200))


def test_a_summary_shows_headline_metrics_or_else_all_metrics():
    assert headlines(perplexity_of()) == ["perplexity", "bits_per_byte", "tokens_per_second"]
    assert headlines(task_of(metrics={"own": Value(1.0), "nll": Value(2.0)})) == ["own"]
    assert headlines(task_of(metrics={"nll": Value(2.0), "itl_p99": Value(2.0)})) == ["nll", "itl_p99"]


def test_a_record_without_numbers_shows_the_reason():
    record = task_of(metrics={}, not_measured="other tests ran at the same time")
    (group,) = groups([record])
    assert (group.rows[0].value, group.rows[0].interval) == ("not measured", "other tests ran at the same time")
    for page in rendered(document(record)):
        assert "other tests ran at the same time" in page


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("one\n{{ runs", "unexpected end of template"),
        ("one\n{{ no_such_name }}", "'no_such_name' is undefined"),
        ("one\n{{ records[0].metrics.nll.worth }}", "has no attribute 'nll'"),
        ("one\n{{ 1 / 0 }}", "ZeroDivisionError"),
        ("one\n{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_failing_template_is_reported_with_its_line_and_costs_only_its_page(tmp_path, broken, said):
    templates, out = tmp_path / "own", tmp_path / "out"
    for folder, text in ((templates, broken), (out, "of an earlier run")):
        folder.mkdir()
        (folder / "summary.md").write_text(text)
    written, note = write.reports(out, [task_of()], run=RUN, root=tmp_path, templates=templates).lines
    assert written.endswith("metrics.json, report.html")
    for words in (f"{templates / 'summary.md'}, line 2: ", said, "lmeval render"):
        assert words in note
    assert not (out / "summary.md").exists()
    assert load(out).run.command == "pytest -m 'a b'"


def test_users_templates_replace_blocks_of_ours(tmp_path):
    (tmp_path / "report.html").write_text(
        "{% extends 'lmeval/report.html' %}{% block environment %}<p>{{ records[0].lm.spec }}</p>{% endblock %}"
    )
    html = pages.render("report.html", document(perplexity_of(subject=HOSTILE)), templates=tmp_path)
    assert "platform" not in markup(html)
    for word in ("<p>demo</p>", "978,048 parameters", "&lt;script&gt;"):
        assert word in html


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_finite_number_is_formatted_with_its_unit(value):
    assert number(value, "ms").endswith(" ms")


def test_numbers_are_formatted_for_people():
    assert [number(x) for x in (0, 1234567, 1234.5, 0.00012346, -2.5)] == ["0", "1,234,567", "1,234", "0.0001235", "-2.5"]
    assert [interval(value) for value in (Value(1), Value(1, low=0.5, high=1.5))] == ["", "0.5 to 1.5"]
    assert [interval(Value(1, n=200, ties=ties)) for ties in (0, 2, 3)] == ["", "", "3 of 200 tied"]  # more than 1 %
    assert [size_of(x) for x in (0, 1023, 1024, 5 * 2**40)] == ["0 B", "1023 B", "1.0 KiB", "5120.0 GiB"]


@given(st.text(max_size=40))
def test_control_characters_are_escaped(text):
    shown = visible(text)
    shown.encode()
    assert not [character for character in shown if character < " " and character not in "\n\t"]


# ---------------------------------------------------------------------------------------- baselines


def test_gate_verdicts_come_first_and_the_worst_of_them_before_the_others():
    judged = document(perplexity_of(gate=GATE))
    assert [change.verdict for change in changes(judged.records)] == ["worse", "unclear", "new", "same"]
    markdown, html = rendered(judged)
    first = markdown.index("| test | metric | base | new | difference | verdict |")
    assert first < markdown.index("<details><summary>All numbers") < markdown.index("| test | metric | value |")
    for words in (
        "+0.2 (+0.1 to +0.3) | **worse**",
        "a loss of 0.2 would have been found (with a probability of 80 %)",
        "if nothing was lost, 1,200 blocks would show it (0.01 is allowed)",
        "| 2.0 KiB | -2.0 KiB | new<br>a note |",
    ):
        assert words in markdown
    for page in (markdown, html):
        assert "1 worse, 1 unclear, 1 new, 1 same" in page
    assert html.index('id="changes"') < html.index('id="results"')


def test_examples_that_changed_are_shown_and_counted():
    flips = [Flip(id=f"id{n}", before=1.0, after=0.0, output="<b>no</b>") for n in range(20)]
    row = Comparison(verdict="worse", base=0.6, new=0.5, lost=57, won=0, flipped=flips, n=100, only_base=200, only_new=200)
    markdown, html = rendered(document(task_of(gate={"accuracy": row})))
    for page in (markdown.partition("<details>")[0], html):
        assert "57 lost, 0 won" in page
        assert "on 100 questions of both runs; 200 only in the baseline, 200 only here" in page
    for words in ("20 of 57 examples that changed", "&lt;b&gt;no&lt;/b&gt;", "1 &rarr; 0"):
        assert words in html


def test_the_summary_folds_the_basis_of_verdicts_and_names_differing_settings_once_a_test():
    row = Comparison(verdict="worse", base=0.6, new=0.5, margin=0.01, differences=["shots was 0, is 1"])
    rows = {"accuracy": row, "f1": row, "nll": Comparison(verdict="identical", base=1.25, new=1.25)}
    markdown, html = rendered(document(task_of(gate=rows), baseline=BaselineUse("b.json", ["torch was 1, is 2"])))
    shown, _, folded = markdown.partition("<details><summary>Basis of the verdicts")
    for word in ("margin", "shots was 0", "1.25"):
        assert word not in shown
        assert word in folded
    for page in (markdown, html):
        assert page.count("shots was 0, is 1") == 1
        assert "torch was 1, is 2" in page


def test_pages_without_a_gate_do_not_mention_a_baseline():
    markdown, html = rendered(document())
    assert "baseline" not in markdown + markup(html)


def test_failed_tests_come_first_with_their_messages():
    failure = Failure(task_of().test, "assert <b>3</b> < 2 ```", "t.py", 3)
    markdown, html = rendered(document(perplexity_of(), task_of(outcome="failed"), failures=[failure]))
    assert markdown.startswith("# lmeval: 1 of 2 tests failed")
    assert "````text\nassert <b>3</b> < 2 ```\n````" in markdown
    assert html.index("assert &lt;b&gt;3&lt;/b&gt; &lt; 2") < html.index('id="results"')


def test_the_headline_counts_failed_tests_and_warnings_of_gates_in_the_others():
    worse = task_of(gate={"accuracy": Comparison(verdict="worse", base=1.0)})
    for records, headline in (
        ([worse, perplexity_of()], "All 2 tests passed; 1 is worse than the baseline"),
        ([worse, perplexity_of(outcome="failed")], "1 of 2 tests failed; of the others, 1 is worse than the baseline"),
        ([replace(worse, outcome="failed"), perplexity_of()], "1 of 2 tests failed"),
    ):
        assert overview(document(*records)).headline == headline


# ---------------------------------------------------------------------------------------- hooks and services


EUROS = "records > 1 > metrics > euros: Expected `object`, got `float`"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: {}["no meter"], "KeyError: 'no meter'"),
        (lambda data: data.records[0].metrics.update(euros=0.5), EUROS),
        (lambda data: data.records[0].settings.update(noise=float("nan")), "the changed document cannot be written"),
        (lambda data: data.records[0].settings.update(noise=1e999), "Make it of the types in pytest_lmeval: Record, Section"),
        (lambda data: data.sections.append({"title": 3}), "sections > 2 > title: Expected `str`, got `int`; it is 3"),
        (lambda data: setattr(data, "records", None), "records: Expected `array`"),
    ],
)
def test_a_hook_that_fails_or_makes_the_document_invalid_costs_only_its_changes(tmp_path, spoil, said):
    def extend(data):
        data.sections.append(Section("Energy"))
        spoil(data)

    _, note = write.reports(tmp_path, [task_of()], run=RUN, root=tmp_path, extend=extend).lines
    assert "pytest_lmeval_report failed and its changes are left out (" in note
    assert said in note
    assert (load(tmp_path).records, load(tmp_path).sections) == ([task_of()], [])
    assert "Energy" not in (tmp_path / "report.html").read_text()


def test_github_gets_the_summary_and_an_annotation_for_each_failed_test(tmp_path, monkeypatch):
    def lines():
        return write.reports(tmp_path, [perplexity_of(gate=GATE)], run=RUN, root=tmp_path, failures=failures).lines

    failures = [Failure("t.py::test_a", "50 % lost\nof it", "a,b.py", 7)]
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert not [line for line in lines() if line.startswith("::")]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    error, warning = [line for line in lines() if line.startswith("::")]
    assert error == "::error file=a%2Cb.py,line=7,title=t.py%3A%3Atest_a::50 %25 lost%0Aof it"
    assert warning.startswith("::warning")
    assert "perplexity" in warning
    assert (tmp_path / "step.md").read_text().strip() == (tmp_path / "summary.md").read_text().strip()


def test_a_summary_too_long_for_github_is_truncated_with_a_note(tmp_path):
    environ = {"GITHUB_STEP_SUMMARY": str(tmp_path / "step.md")}
    assert github.append_summary("a line of it\n" * 50_000, environ)
    assert github.append_summary("another line\n" * 50_000, environ)
    written = (tmp_path / "step.md").read_bytes()
    assert 1_000_000 < len(written) < 2**20
    assert written.rstrip().endswith(b"GitHub shows no more than 1 MiB of it.")
    assert not github.append_summary("nothing", {})


# ---------------------------------------------------------------------------------------- plots


def test_curves_of_all_models_on_one_text_share_a_plot_with_caption_and_data():
    drawn = {figure["title"]: figure for figure in figures([perplexity_of("zoo:mamba"), perplexity_of("zoo:bk")])}
    (choice,) = drawn["Loss by position"]["choices"]
    assert [curve["name"] for curve in choice["curves"]] == ["zoo:mamba", "zoo:bk"]
    assert choice["caption"].startswith("zoo:mamba ")
    assert (choice["curves"][0]["y"], choice["log"]) == ([4.0, 1.25], "x")
    assert "Quality by bytes of the weights" not in drawn


def test_curves_in_different_units_have_their_own_axes():
    def scaling(unit):
        series = {"batch_scaling": Series([1.0, 2.0], [10.0, 15.0], "rows", unit)}
        return perplexity_of(kind="throughput", subject="batch 2, 8 tokens", series=series, metrics={})

    (figure,) = figures([scaling("tokens/s"), scaling("frames/s"), scaling("tokens/s"), scaling("frames/s")])
    assert figure["title"] == "Batch scaling"
    assert [(choice["y"], len(choice["curves"])) for choice in figure["choices"]] == [("tokens/s", 2), ("frames/s", 2)]
    assert len({choice["label"] for choice in figure["choices"]}) == 2


@pytest.mark.parametrize(
    ("x", "y", "x_unit", "y_unit", "caption"),
    [
        ([256, 2048], [1313280, 1313280], "tokens", "bytes", "demo is 1.3 MiB at both ends of 256 to 2,048 tokens."),
        ([256, 2048], [1024, 2097152], "tokens", "bytes", "demo rises from 1.0 KiB to 2.0 MiB, over 256 to 2,048 tokens."),
        (
            [1.189, 90.51], [7.781, 2], "tokens before", "nats/token",
            "demo falls from 7.781 nats/token to 2 nats/token, over about 1 to about 91 tokens before.",
        ),
        ([1, 99.9], [2.3, 7.5], "%", "ms", "demo rises from 2.3 ms to 7.5 ms, over 1 % to 99.9 %."),
        ([0, 1, 2], [7, 2, 3], "run", "ms", "demo takes 3 ms in the median of 3 runs, 2 to 7."),
    ],
)  # fmt: skip
def test_a_caption_gives_both_ends_with_units_and_rounds_middles_of_bins(x, y, x_unit, y_unit, caption):
    (figure,) = figures([perplexity_of(series={"own": Series(x, y, x_unit, y_unit)}, metrics={})])
    assert figure["choices"][0]["caption"] == caption


def test_quality_is_plotted_against_bytes_if_there_are_several_sizes():
    small, verdict = model("a@bf16", bytes=7), laws_of("b", lm=model("b", bytes=9))
    found = figures([perplexity_of("a"), perplexity_of("a@bf16", lm=small), laws_of("a"), verdict])
    (figure,) = [figure for figure in found if figure["kind"] == "dots"]
    (choice,) = figure["choices"]
    assert (choice["label"], choice["y"]) == ("stdlib[test]: bits per byte", "bits/byte")
    curves = [(curve["x"], curve["y"], curve["low"]) for curve in choice["curves"]]
    assert curves == [([3912192], [1.8], [1.7]), ([7], [1.8], [1.7])]


def test_curves_of_one_name_are_labelled_with_test_or_number():
    records = [perplexity_of("a", test=f"t.py::{name}") for name in ("one", "two", "two")]
    (choice,) = figures(records)[0]["choices"]
    assert [curve["name"] for curve in choice["curves"]] == ["a (one)", "a (two) (2)", "a (two) (3)"]


def test_history_is_plotted_in_the_order_of_time(tmp_path):
    early, late = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    for started, value in ((late, 0.6), (early, 0.5)):
        history.append(tmp_path, document(task_of(accuracy=value), run=replace(RUN, started=started)))
    (figure,) = figures([], history.read(tmp_path)[0])
    (choice,) = figure["choices"]
    assert choice["label"] == "brackets: accuracy"
    (curve,) = choice["curves"]
    assert (curve["x"], curve["y"], curve["low"]) == ([early, late], [0.5, 0.6], [0.4, 0.5])


# ---------------------------------------------------------------------------------------- models side by side


def test_rows_of_one_model_in_two_tests_are_labelled_with_the_tests():
    tests = (("a", "one[a]"), ("a", "two[a]"), ("b", "one[b]"))
    (grid,) = grids([perplexity_of(spec, test=f"t.py::{test}", certificate=None) for spec, test in tests])
    assert grid.title == "Perplexity"
    assert [row.note for row in grid.rows] == ["one", "two", ""]
    assert grid.units[grid.columns.index("bits per byte")] == "bits/byte"
    assert grid.better[grid.columns.index("perplexity")] == "lower"


def test_verdicts_have_their_own_table():
    limited = {"verdict": "exact-step-only", "limit": "it reads at most 37 tokens"}
    many = [laws_of(f"model {n}", broken=["splits"], certificate=limited) for n in range(20)]
    markdown, html = rendered(document(*many, skipped=[Skipped("test_a[b]", "needs | a kernel")]))
    assert "| model 7 | exact-step-only | splits |" in markdown
    assert "needs \\| a kernel" in markdown
    for page in (markdown, html):
        assert "20 models" in page
    assert "pytest_lmeval.replay(lm, &lt;3&gt;)" in html
    assert "it reads at most 37 tokens" in html
    assert sum("breaks splits" in line for line in terminal.lines(many, width=100)) == 20


def test_models_on_the_same_subject_are_side_by_side():
    records = [perplexity_of("zoo:mamba"), perplexity_of("zoo:bk", outcome="failed")]
    (shown,) = side_by_side(records)
    assert shown.models == ["zoo:mamba", "zoo:bk"]
    assert {len(rows) for rows in shown.metrics.values()} == {2}
    text = "\n".join(terminal.lines(records, width=100))
    assert text.count(records[0].subject) == 1
    assert "(failed: zoo:bk)" in text
    for page in rendered(document(*records)):
        assert page.count("zoo:mamba") > 1
        assert shown.metrics["perplexity"][0].interval in page


def test_a_metric_that_one_model_lacks_is_empty_only_for_that_model():
    (shown,) = side_by_side([perplexity_of("a"), perplexity_of("b", metrics={"perplexity": Value(3.5)})])
    assert [row.value for row in shown.metrics["bits_per_byte"]] == ["1.8 bits/byte", ""]


def test_one_model_on_two_texts_is_no_comparison():
    assert side_by_side([perplexity_of("a"), perplexity_of("a", subject="another")]) == []


def test_two_trainings_of_one_model_are_distinguished_and_nothing_is_hidden():
    other = replace(model("a"), fingerprint="0123456789")
    twice = [perplexity_of("a"), perplexity_of("a", lm=other), perplexity_of("a", test="again")]
    (shown,) = side_by_side(twice)
    assert shown.models == ["a (a)", "a (01234567)"]
    assert shown.indices == [0, 1]
    assert "again" in "\n".join(terminal.lines(twice, width=120))
