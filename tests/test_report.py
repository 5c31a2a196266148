"""Pages: what a model wrote stays text, every width is kept, and a page that fails costs only itself."""

import hashlib
import re
from pathlib import Path

import pytest
from documents import GATE, HOSTILE, asked, document, everything, laws, model, reading
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


def test_every_record_and_every_law_is_on_the_page():
    for page in rendered(everything()):
        for word in ("exact-step-only", "bits per byte", "splits", "causality", "978,048 parameters", "windows of 64 tokens"):
            assert word in page


def markup(html):
    """The page without its scripts and styles: what is left must load nothing either."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)


def test_the_report_is_one_file_that_needs_nothing_else():
    html = pages.render("report.html", document())
    for word in ("http://", "https://", "<link", "<img", "<iframe", " src=", "@import", "url("):
        assert word not in markup(html)
    for word in ("<link", " src=", "@import", "url("):
        assert word not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert "default-src 'none'" in html


def test_what_is_not_ours_is_as_it_was_published():
    vendor = Path(pages.__file__).parent / "vendor"
    listed = re.findall(r"^\| (\S+\.js) \|.*\| ([0-9a-f]{64}) \|$", (vendor / "README.md").read_text(), flags=re.MULTILINE)
    assert {file.name for file in vendor.glob("*.js")} == {name for name, _ in listed}
    for name, digest in listed:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest


def test_a_page_without_plots_does_not_carry_the_library_that_draws_them():
    assert len(pages.render("report.html", document(reading(series={})))) < 100_000
    assert len(pages.render("report.html", document(reading()))) > 400_000


@pytest.mark.parametrize("field", ["test", "subject"])
def test_what_a_model_wrote_stays_text(field):
    markdown, html = rendered(document(reading(**{field: HOSTILE}, series={})))
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
    ("part", "name"),
    [("run", "started"), *(("environment", name) for name in ("python", "torch", "cpu", "commit"))],
)
def test_what_a_file_says_of_the_run_and_its_machine_stays_text(part, name):
    found = document()
    setattr(found, part, replace(getattr(found, part), **{name: "<img src=x> **bold**"}))
    assert "\\<img src=x\\> \\*\\*bold" in pages.render("summary.md", found)


def test_a_long_section_is_folded_in_the_summary():
    def section(rows):
        return pages.render("summary.md", document(sections=[Section(HOSTILE, columns=["n"], rows=[[n] for n in range(rows)])]))

    assert "<details><summary>&lt;script&gt;" in section(13)
    assert "**\\<script\\>" in section(12)


@given(st.integers(20, 300))
def test_no_line_of_the_summary_is_wider_than_the_terminal(width):
    assert max(map(len, terminal.lines(everything().records, width=width))) <= width


def test_the_summary_names_the_models_only_where_there_are_several():
    assert not any(line.startswith("    demo, ") for line in terminal.lines(document().records, width=200))
    several = [reading(), asked("other")]
    assert any(line.startswith("    other, ") for line in terminal.lines(several, width=200))


def test_a_summary_shows_what_is_declared_a_headline_and_all_of_what_has_none():
    assert headlines(reading()) == ["perplexity", "bits_per_byte", "tokens_per_second"]
    assert headlines(asked(metrics={"own": Value(1.0), "nll": Value(2.0)})) == ["own"]
    assert headlines(asked(metrics={"nll": Value(2.0), "itl_p99": Value(2.0)})) == ["nll", "itl_p99"]


def test_what_was_not_measured_says_why():
    record = asked(metrics={}, not_measured="other tests ran at the same time")
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
def test_a_template_that_fails_is_named_with_its_line_and_costs_only_its_page(tmp_path, broken, said):
    templates, out = tmp_path / "own", tmp_path / "out"
    templates.mkdir()
    out.mkdir()
    (templates / "summary.md").write_text(broken)
    (out / "summary.md").write_text("of an earlier run")
    written, note = write.reports(out, [asked()], run=RUN, root=tmp_path, templates=templates)
    assert written.endswith("metrics.json, report.html")
    assert f"{templates / 'summary.md'}, line 2: " in note
    assert said in note
    assert "lmeval render" in note
    assert not (out / "summary.md").exists()
    assert load(out).run.command == "pytest -m 'a b'"


def test_templates_of_ones_own_extend_ours_block_by_block(tmp_path):
    (tmp_path / "report.html").write_text(
        "{% extends 'lmeval/report.html' %}{% block environment %}<p>{{ records[0].lm.spec }}</p>{% endblock %}"
    )
    html = pages.render("report.html", document(reading(subject=HOSTILE)), templates=tmp_path)
    assert "<p>demo</p>" in html
    assert "platform" not in markup(html)
    assert "978,048 parameters" in html
    assert "&lt;script&gt;" in html


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_reads(value):
    assert number(value, "ms").endswith(" ms")


def test_numbers_read_as_people_write_them():
    assert [number(x) for x in (0, 1234567, 1234.5, 0.00012346, -2.5)] == ["0", "1,234,567", "1,234", "0.0001235", "-2.5"]
    assert [interval(value) for value in (Value(1), Value(1, low=0.5, high=1.5))] == ["", "0.5 to 1.5"]
    assert [size_of(x) for x in (0, 1023, 1024, 5 * 2**40)] == ["0 B", "1023 B", "1.0 KiB", "5120.0 GiB"]


# ---------------------------------------------------------------------------------------- baselines


def test_verdicts_of_a_gate_come_first_and_the_worst_of_them_before_the_others():
    judged = document(reading(gate=GATE))
    assert [change.verdict for change in changes(judged.records)] == ["worse", "unclear", "new", "same"]
    markdown, html = rendered(judged)
    first = markdown.index("| test | metric | base | new | difference | verdict |")
    assert first < markdown.index("<details><summary>All numbers") < markdown.index("| test | metric | value |")
    assert "+0.2 (+0.1 to +0.3) | **worse**" in markdown
    assert "a loss of 0.2 would have been found (with a probability of 80 %)" in markdown
    assert "if nothing was lost, 1,200 blocks would show it (0.01 is allowed)" in markdown
    assert "| 2.0 KiB | -2.0 KiB | new<br>a note |" in markdown
    for page in (markdown, html):
        assert "1 worse, 1 unclear, 1 new, 1 same" in page
    assert html.index('id="changes"') < html.index('id="results"')


def test_examples_that_changed_are_shown_and_counted():
    flips = [Flip(id=f"id{n}", before=1.0, after=0.0, output="<b>no</b>") for n in range(20)]
    row = Comparison(verdict="worse", base=0.6, new=0.5, lost=57, won=0, flipped=flips, n=100, only_base=200, only_new=200)
    markdown, html = rendered(document(asked(gate={"accuracy": row})))
    for page in (markdown.partition("<details>")[0], html):
        assert "57 lost, 0 won" in page
        assert "on 100 questions of both runs; 200 only in the baseline, 200 only here" in page
    assert "20 of 57 examples that changed" in html
    assert "&lt;b&gt;no&lt;/b&gt;" in html
    assert "1 &rarr; 0" in html


def test_what_verdicts_rest_on_is_folded_and_said_once_a_test():
    said = {"verdict": "worse", "base": 0.6, "new": 0.5, "margin": 0.01, "differences": ["shots was 0, is 1"]}
    rows = {name: Comparison(**said) for name in ("accuracy", "f1")}
    rows["nll"] = Comparison(verdict="identical", base=1.25, new=1.25)
    judged = document(asked(gate=rows), baseline=BaselineUse("b.json", ["torch was 1, is 2"]))
    markdown, html = rendered(judged)
    shown, _, folded = markdown.partition("<details><summary>What the verdicts rest on")
    for word in ("margin", "shots was 0", "1.25"):
        assert word not in shown
        assert word in folded
    for page in (markdown, html):
        assert page.count("shots was 0, is 1") == 1
        assert "torch was 1, is 2" in page


def test_without_a_gate_there_is_no_word_of_a_baseline():
    markdown, html = rendered(document())
    assert "baseline" not in markdown + markup(html)


def test_what_failed_stands_at_the_top_with_what_it_said():
    failure = Failure(asked().test, "assert <b>3</b> < 2 ```", "t.py", 3)
    markdown, html = rendered(document(reading(), asked(outcome="failed"), failures=[failure]))
    assert markdown.startswith("# lmeval: 1 of 2 tests failed")
    assert "````text\nassert <b>3</b> < 2 ```\n````" in markdown
    assert "assert &lt;b&gt;3&lt;/b&gt; &lt; 2" in html
    assert html.index("assert &lt;b&gt;") < html.index('id="results"')


def test_the_headline_counts_the_tests_that_failed_and_of_the_others_those_that_a_gate_warned_of():
    worse = asked(gate={"accuracy": Comparison(verdict="worse", base=1.0)})
    assert overview(document(worse, reading())).headline == "All 2 tests passed; 1 is worse than the baseline"
    failed = document(worse, reading(outcome="failed"))
    assert overview(failed).headline == "1 of 2 tests failed; of the others, 1 is worse than the baseline"
    assert overview(document(replace(worse, outcome="failed"), reading())).headline == "1 of 2 tests failed"


# ---------------------------------------------------------------------------------------- hooks and services


def test_a_hook_adds_metrics_and_sections(tmp_path):
    def extend(data):
        data.records[0].metrics["euros"] = Value(0.5, "EUR")
        data.sections.append(Section("Energy <b>", columns=["machine", "Wh"], rows=[["ci-3", 12.5]]))

    write.reports(tmp_path, [asked()], run=RUN, root=tmp_path, extend=extend)
    found = load(tmp_path)
    assert (found.records[0].metrics["euros"], found.records[0].metrics["euros"].unit) == (0.5, "EUR")
    assert found.sections[0].rows == [["ci-3", 12.5]]
    assert "Energy &lt;b&gt;" in (tmp_path / "report.html").read_text()
    assert "| ci-3 | 12.5 |" in (tmp_path / "summary.md").read_text()


def raised(data):
    raise KeyError("no meter")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (raised, "KeyError: 'no meter'"),
        (
            lambda data: data.records[0].metrics.update(euros=0.5),
            "records > 1 > metrics > euros: Expected `object`, got `float`",
        ),
        (lambda data: data.records[0].settings.update(noise=float("nan")), "what it made cannot be written"),
        (
            lambda data: data.records[0].settings.update(noise=float("inf")),
            "Make it of the types in pytest_lmeval: Record, Section",
        ),
        (lambda data: data.sections.append({"title": 3}), "sections > 2 > title: Expected `str`, got `int`; it is 3"),
        (lambda data: setattr(data, "records", None), "records: Expected `array`"),
    ],
)
def test_a_hook_that_fails_or_leaves_what_cannot_be_read_back_costs_only_its_changes(tmp_path, spoil, said):
    def extend(data):
        data.sections.append(Section("Energy"))
        spoil(data)

    _, note = write.reports(tmp_path, [asked()], run=RUN, root=tmp_path, extend=extend)
    assert "pytest_lmeval_report failed, and its changes were left out (" in note
    assert said in note
    assert load(tmp_path).records == [asked()]
    assert load(tmp_path).sections == []
    assert "Energy" not in (tmp_path / "report.html").read_text()


def test_github_gets_the_summary_and_a_mark_at_each_failed_test(tmp_path, monkeypatch):
    failures = [Failure("t.py::test_a", "50 % lost\nof it", "a,b.py", 7)]
    records = [reading(gate=GATE)]
    quiet = write.reports(tmp_path, records, run=RUN, root=tmp_path, failures=failures)
    assert not [line for line in quiet if line.startswith("::")]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    lines = write.reports(tmp_path, records, run=RUN, root=tmp_path, failures=failures)
    assert "::error file=a%2Cb.py,line=7,title=t.py%3A%3Atest_a::50 %25 lost%0Aof it" in lines
    (warning,) = [line for line in lines if line.startswith("::warning")]
    assert "perplexity" in warning
    assert (tmp_path / "step.md").read_text().strip() == (tmp_path / "summary.md").read_text().strip()


def test_a_summary_that_github_would_refuse_is_cut_and_says_so(tmp_path):
    environ = {"GITHUB_STEP_SUMMARY": str(tmp_path / "step.md")}
    assert github.append_summary("a line of it\n" * 50_000, environ)
    assert github.append_summary("another line\n" * 50_000, environ)
    written = (tmp_path / "step.md").read_bytes()
    assert 1_000_000 < len(written) < 2**20
    assert written.rstrip().endswith(b"GitHub shows no more than 1 MiB of it.")
    assert not github.append_summary("nothing", {})


# ---------------------------------------------------------------------------------------- plots


def test_curves_of_all_models_on_one_text_are_one_plot_with_words_and_data():
    drawn = {figure["title"]: figure for figure in figures([reading("zoo:mamba"), reading("zoo:bk")])}
    (choice,) = drawn["Loss by position"]["choices"]
    assert [curve["name"] for curve in choice["curves"]] == ["zoo:mamba", "zoo:bk"]
    assert choice["caption"].startswith("zoo:mamba ")
    assert choice["curves"][0]["y"] == [4.0, 1.25]
    assert choice["log"] == "x"
    assert "Quality by bytes of the weights" not in drawn


def test_what_is_in_another_unit_is_drawn_on_axes_of_its_own():
    def scaling(unit):
        series = {"batch_scaling": Series([1.0, 2.0], [10.0, 15.0], "rows", unit)}
        return reading(kind="throughput", subject="batch 2, 8 tokens", series=series, metrics={})

    (figure,) = figures([scaling("tokens/s"), scaling("frames/s"), scaling("tokens/s"), scaling("frames/s")])
    assert figure["title"] == "Batch scaling"
    assert [(choice["y"], len(choice["curves"])) for choice in figure["choices"]] == [("tokens/s", 2), ("frames/s", 2)]
    assert len({choice["label"] for choice in figure["choices"]}) == 2


def caption_of(x, y, x_unit, y_unit):
    (figure,) = figures([reading(series={"own": Series(x, y, x_unit, y_unit)}, metrics={})])
    return figure["choices"][0]["caption"]


def test_a_caption_gives_both_ends_in_one_unit_and_no_middle_of_a_bin_as_a_position():
    lengths = [256.0, 2048.0]
    assert caption_of(lengths, [1313280.0, 1313280.0], "tokens", "bytes") == (
        "demo is 1.3 MiB at both ends of 256 to 2,048 tokens."
    )
    assert caption_of(lengths, [1024.0, 2097152.0], "tokens", "bytes") == (
        "demo rises from 1.0 KiB to 2.0 MiB, over 256 to 2,048 tokens."
    )
    assert caption_of([1.189, 90.51], [7.781, 2.0], "tokens before", "nats/token") == (
        "demo falls from 7.781 nats/token to 2 nats/token, over about 1 to about 91 tokens before."
    )
    assert caption_of([1.0, 99.9], [2.3, 7.5], "%", "ms") == "demo rises from 2.3 ms to 7.5 ms, over 1 % to 99.9 %."
    assert caption_of([0.0, 1.0, 2.0], [7.0, 2.0, 3.0], "run", "ms") == "demo takes 3 ms in the median of 3 runs, 2 to 7."


def test_quality_is_drawn_against_bytes_where_there_are_several_sizes():
    sizes = [reading("a"), reading("a@bf16", lm=model("a@bf16", bytes=7)), laws("a"), laws("b", lm=model("b", bytes=9))]
    (figure,) = [figure for figure in figures(sizes) if figure["kind"] == "dots"]
    (choice,) = figure["choices"]
    assert (choice["label"], choice["y"]) == ("stdlib[test]: bits per byte", "bits/byte")
    assert [(curve["x"], curve["y"], curve["low"]) for curve in choice["curves"]] == [
        ([3912192], [1.8], [1.7]),
        ([7], [1.8], [1.7]),
    ]


def test_two_curves_of_one_name_are_told_apart():
    records = [reading("a", test="t.py::one"), reading("a", test="t.py::two"), reading("a", test="t.py::two")]
    (choice,) = figures(records)[0]["choices"]
    assert [curve["name"] for curve in choice["curves"]] == ["a (one)", "a (two) (2)", "a (two) (3)"]


def test_history_is_drawn_in_the_order_of_time(tmp_path):
    for started, value in (("2026-01-02T00:00:00+00:00", 0.6), ("2026-01-01T00:00:00+00:00", 0.5)):
        history.append(tmp_path, document(asked(accuracy=value), run=replace(RUN, started=started)))
    (figure,) = figures([], history.read(tmp_path)[0])
    (choice,) = figure["choices"]
    assert choice["label"] == "brackets: accuracy"
    (curve,) = choice["curves"]
    assert (curve["y"], curve["low"]) == ([0.5, 0.6], [0.4, 0.5])
    assert curve["x"] == ["2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"]


# ---------------------------------------------------------------------------------------- models side by side


def test_a_model_that_is_measured_by_two_tests_is_told_apart_by_their_names():
    tests = (("a", "one[a]"), ("a", "two[a]"), ("b", "one[b]"))
    (grid,) = grids([reading(spec, test=f"t.py::{test}", certificate=None) for spec, test in tests])
    assert grid.title == "Perplexity"
    assert [row.note for row in grid.rows] == ["one", "two", ""]
    assert grid.units[grid.columns.index("bits per byte")] == "bits/byte"
    assert grid.better[grid.columns.index("perplexity")] == "lower"


@given(st.text())
def test_no_text_can_move_the_cursor_or_break_a_file(text):
    shown = visible(text)
    shown.encode()
    assert not [character for character in shown if character < " " and character not in "\n\t"]
    assert "\x1b" not in shown


def test_verdicts_have_a_table_of_their_own():
    limited = {"verdict": "exact-step-only", "limit": "it reads at most 37 tokens"}
    many = [laws(f"model {n}", broken=["splits"], certificate=limited) for n in range(20)]
    markdown, html = rendered(document(*many, skipped=[Skipped("test_a[b]", "needs | a kernel")]))
    assert "| model 7 | exact-step-only | splits |" in markdown
    assert "needs \\| a kernel" in markdown
    for page in (markdown, html):
        assert "20 models" in page
    assert "pytest_lmeval.replay(lm, &lt;3&gt;)" in html
    assert "it reads at most 37 tokens" in html
    assert sum("breaks splits" in line for line in terminal.lines(many, width=100)) == 20


def test_models_that_read_the_same_stand_side_by_side():
    records = [reading("zoo:mamba"), reading("zoo:bk", outcome="failed")]
    (shown,) = side_by_side(records)
    assert shown.models == ["zoo:mamba", "zoo:bk"]
    assert {len(rows) for rows in shown.metrics.values()} == {2}
    text = "\n".join(terminal.lines(records, width=100))
    assert text.count(records[0].subject) == 1
    assert "(failed: zoo:bk)" in text
    for page in rendered(document(*records)):
        assert page.count("zoo:mamba") > 1
        assert shown.metrics["perplexity"][0].interval in page


def test_a_metric_that_one_model_lacks_is_empty_for_it_alone():
    lacking = reading("b", metrics={"perplexity": Value(3.5)})
    (shown,) = side_by_side([reading("a"), lacking])
    a, b = shown.metrics["bits_per_byte"]
    assert (a.value, b.value) == ("1.8 bits/byte", "")


def test_one_model_on_two_texts_is_no_comparison():
    assert side_by_side([reading("a"), reading("a", subject="another")]) == []


def test_two_trainings_of_one_model_are_told_apart_and_nothing_is_hidden():
    twice = [reading("a"), reading("a", lm=replace(model("a"), fingerprint="0123456789")), reading("a", test="again")]
    (shown,) = side_by_side(twice)
    assert shown.models == ["a (a)", "a (01234567)"]
    assert shown.records == [0, 1]
    assert "again" in "\n".join(terminal.lines(twice, width=120))
