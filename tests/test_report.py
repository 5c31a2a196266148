"""Pages: what a model wrote stays text, every width is kept, and a page that fails costs only itself."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lmeval.report import pages, terminal, write
from pytest_lmeval.report.tables import comparisons, groups, interval, number, size_of

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics-1.json").read_text())
HOSTILE = "<script>alert('x')</script> | `code` **bold** [link](javascript:x) {{ 7 * 7 }}\n# heading\x07"


def document(**changes):
    copy = json.loads(json.dumps(GOLDEN))
    copy["records"][1].update(changes)
    return copy


def test_every_record_and_every_law_is_on_the_page():
    html, markdown = (pages.render(name, GOLDEN) for name in ("report.html", "summary.md"))
    for page in (html, markdown):
        for word in ("exact-any-chunk", "bits per byte", "splits", "causality", "prefill", "978,048 parameters"):
            assert word in page


def test_the_report_is_one_file_that_needs_nothing_else():
    html = pages.render("report.html", GOLDEN)
    for word in ("http://", "https://", "<script", "<link", "<img", "@import", "url("):
        assert word not in html


@pytest.mark.parametrize("place", ["test", "subject"])
def test_what_a_model_wrote_stays_text(place):
    html = pages.render("report.html", document(**{place: HOSTILE}))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "{{ 7 * 7 }}" in html
    markdown = pages.render("summary.md", document(**{place: HOSTILE}))
    (line,) = [line for line in markdown.splitlines() if "alert" in line]
    assert line.startswith("|")
    for markup in ("<script>", "`code`", "**bold**", "[link]("):
        assert markup not in line
    assert line.replace("\\|", "").count("|") == 7


@given(st.integers(20, 300))
def test_no_line_of_the_summary_is_wider_than_the_terminal(width):
    assert max(map(len, terminal.lines(GOLDEN["records"], width=width))) <= width


def test_the_summary_names_the_models_only_where_there_are_several():
    one = terminal.lines(GOLDEN["records"], width=200)
    assert not any(line.startswith("    demo, ") for line in one)
    two = document(lm={**GOLDEN["records"][0]["lm"], "spec": "other", "fingerprint": "0"})
    assert any(line.startswith("    other, ") for line in terminal.lines(two["records"], width=200))


def test_what_was_not_measured_says_why():
    record = {**GOLDEN["records"][2], "metrics": {}, "settings": {"not_measured": "blocked"}}
    (group,) = groups([record])
    assert (group.rows[0].value, group.rows[0].interval) == ("not measured", "blocked")


def test_a_page_that_fails_costs_only_itself(tmp_path, monkeypatch):
    def fail(document):
        raise ValueError("line 7 of the template")

    monkeypatch.setitem(pages.PAGES, "summary.md", fail)
    run = {"started": 0.0, "command": ["-m", "a b"], "exit_status": 0}
    (line,) = write.reports(tmp_path, GOLDEN["records"], run=run, root=tmp_path)
    assert "summary.md was not rendered (ValueError: line 7 of the template)" in line
    assert json.loads((tmp_path / "metrics.json").read_text())["run"]["command"] == "pytest -m 'a b'"
    assert (tmp_path / "report.html").exists()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_reads(value):
    assert number(value, "ms").endswith(" ms")


def test_numbers_read_as_people_write_them():
    assert [number(x) for x in (0, 1234567, 1234.5, 0.00012346, -2.5)] == ["0", "1,234,567", "1,234", "0.0001235", "-2.5"]
    assert interval({"low": None, "high": None}) == ""
    assert [size_of(x) for x in (0, 1023, 1024, 5 * 2**40)] == ["0 B", "1023 B", "1.0 KiB", "5120.0 GiB"]


def test_verdicts_have_a_table_of_their_own():
    record = json.loads(json.dumps(GOLDEN["records"][0]))
    law = record["certificate"]["laws"]["splits"]
    law.update(kept=False, counterexample="off", counterexamples=[{"replay": "pytest_lmeval.replay(lm, <3>)"}])
    record["certificate"].update(verdict="exact-step-only", limit="it reads at most 37 tokens", longest=160)
    many = [{**record, "lm": {**record["lm"], "spec": f"model {n}", "fingerprint": str(n)}} for n in range(20)]
    changed = {**GOLDEN, "records": many, "skipped": [{"test": "test_a[b]", "reason": "needs | a kernel"}]}
    markdown, html = (pages.render(name, changed) for name in ("summary.md", "report.html"))
    assert "| model 7 | exact-step-only | splits |" in markdown
    assert "needs \\| a kernel" in markdown
    for page in (markdown, html):
        assert "20 models" in page
    assert "pytest_lmeval.replay(lm, &lt;3&gt;)" in html
    assert "it reads at most 37 tokens" in html
    lines = terminal.lines(many, width=100)
    assert sum("breaks splits" in line for line in lines) == 20


def beside(spec, **changes):
    """The golden reading, by another model."""
    (reading,) = [record for record in GOLDEN["records"] if record["kind"] == "perplexity"][:1]
    return {**reading, "lm": {**reading["lm"], "spec": spec, "fingerprint": spec}, **changes}


def test_models_that_read_the_same_stand_side_by_side():
    records = [beside("zoo:mamba"), beside("zoo:bk", outcome="failed")]
    (comparison,) = comparisons(records)
    assert comparison.models == ["zoo:mamba", "zoo:bk"]
    assert {len(rows) for rows in comparison.metrics.values()} == {2}
    text = "\n".join(terminal.lines(records, width=100))
    assert text.count(records[0]["subject"]) == 1
    assert "(failed: zoo:bk)" in text
    for name in ("summary.md", "report.html"):
        page = pages.render(name, {**GOLDEN, "records": records})
        assert page.count("zoo:mamba") > 1, name
        assert comparison.metrics["perplexity"][0].interval in page, name


def test_a_metric_that_one_model_lacks_is_empty_for_it_alone():
    lacking = beside("b", metrics={"perplexity": beside("b")["metrics"]["perplexity"]})
    (comparison,) = comparisons([beside("a"), lacking])
    a, b = comparison.metrics["bits per byte"]
    assert a.value
    assert not b.value


def test_one_model_on_two_texts_is_no_comparison():
    assert comparisons([beside("a"), beside("a", subject="another")]) == []


def test_two_trainings_of_one_model_are_told_apart_and_nothing_is_hidden():
    twice = [beside("a"), beside("a", lm={**beside("a")["lm"], "fingerprint": "0123456789"}), beside("a", test="again")]
    (comparison,) = comparisons(twice)
    assert comparison.models == ["a (a)", "a (01234567)"]
    assert comparison.records == [0, 1]
    assert "again" in "\n".join(terminal.lines(twice, width=120))
