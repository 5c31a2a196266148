"""Pages: what a model wrote stays text, every width is kept, and a page that fails costs only itself."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lmeval.gates.compare import Side, compare
from pytest_lmeval.gates.entry import entry_of
from pytest_lmeval.gates.explain import table
from pytest_lmeval.gates.margins import Margins
from pytest_lmeval.gates.scores import Scores
from pytest_lmeval.records import history
from pytest_lmeval.report import github, pages, terminal, write
from pytest_lmeval.report.changes import changes
from pytest_lmeval.report.figures import figures
from pytest_lmeval.report.grids import grids
from pytest_lmeval.report.overview import overview
from pytest_lmeval.report.remarks import remarks
from pytest_lmeval.report.tables import comparisons, groups
from pytest_lmeval.report.words import interval, number, size_of, visible

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


def markup(html):
    """The page without its scripts and styles: what is left must load nothing either."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)


def test_the_report_is_one_file_that_needs_nothing_else():
    html = pages.render("report.html", GOLDEN)
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
    records = [{**record, "series": {}} for record in GOLDEN["records"]]
    assert len(pages.render("report.html", {**GOLDEN, "records": records})) < 100_000
    assert len(pages.render("report.html", GOLDEN)) > 400_000


@pytest.mark.parametrize("place", ["test", "subject"])
def test_what_a_model_wrote_stays_text(place):
    html = pages.render("report.html", document(**{place: HOSTILE}))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "{{ 7 * 7 }}" in html
    assert "\x07" not in html
    markdown = pages.render("summary.md", document(**{place: HOSTILE}))
    (line,) = [line for line in markdown.splitlines() if "alert" in line]
    assert line.startswith("|")
    for markup in ("<script>", "`code`", "**bold**", "[link]("):
        assert markup not in line
    assert line.replace("\\|", "").count("|") == 7


@pytest.mark.parametrize(
    ("part", "name"),
    [("run", "started"), *(("environment", name) for name in ("python", "torch", "cpu", "commit"))],
)
def test_what_a_file_says_of_the_run_and_its_machine_stays_text(part, name):
    hostile = {**GOLDEN, part: {**GOLDEN[part], name: "<img src=x> **bold**"}}
    assert "\\<img src=x\\> \\*\\*bold" in pages.render("summary.md", hostile)


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


RUN = {"started": 0.0, "command": ["-m", "a b"], "exit_status": 0}


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
    written, note = write.reports(out, GOLDEN["records"], run=RUN, root=tmp_path, templates=templates)
    assert written.endswith("metrics.json, report.html")
    assert f"{templates / 'summary.md'}, line 2: " in note
    assert said in note
    assert "python -m pytest_lmeval render" in note
    assert not (out / "summary.md").exists()
    assert json.loads((out / "metrics.json").read_text())["run"]["command"] == "pytest -m 'a b'"


def test_templates_of_ones_own_extend_ours_block_by_block(tmp_path):
    (tmp_path / "report.html").write_text(
        "{% extends 'lmeval/report.html' %}{% block environment %}<p>{{ records[0].lm.spec }}</p>{% endblock %}"
    )
    html = pages.render("report.html", document(), templates=tmp_path)
    assert "<p>demo</p>" in html
    assert "platform" not in markup(html)
    assert "978,048 parameters" in html
    assert "&lt;script&gt;" in pages.render("report.html", document(subject=HOSTILE), templates=tmp_path)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_reads(value):
    assert number(value, "ms").endswith(" ms")


def test_numbers_read_as_people_write_them():
    assert [number(x) for x in (0, 1234567, 1234.5, 0.00012346, -2.5)] == ["0", "1,234,567", "1,234", "0.0001235", "-2.5"]
    assert interval({"low": None, "high": None}) == ""
    assert [size_of(x) for x in (0, 1023, 1024, 5 * 2**40)] == ["0 B", "1023 B", "1.0 KiB", "5120.0 GiB"]


GATE = {
    "nll": {"verdict": "same", "base": 1.3, "difference": 0.001, "low": -0.01, "high": 0.01, "margin": 0.02, "p": 0.4},
    "perplexity": {"verdict": "worse", "base": 3.5, "difference": 0.2, "low": 0.1, "high": 0.3, "margin": 0.02, "p": 0.001},
    "bits_per_byte": {
        "verdict": "unclear",
        "base": 1.9,
        "difference": 0.1,
        "detectable": 0.2,
        "needed": 1200,
    },
    "state_bytes": {"verdict": "new", "base": None, "new": 2048, "difference": -2048, "note": "a note"},
}


def test_verdicts_of_a_gate_come_first_and_the_worst_of_them_before_the_others():
    judged = document(gate=GATE)
    assert [change.verdict for change in changes(judged["records"])] == ["worse", "unclear", "new", "same"]
    markdown, html = (pages.render(name, judged) for name in ("summary.md", "report.html"))
    first = markdown.index("| test | metric | base | new | difference | verdict |")
    assert first < markdown.index("<details><summary>All numbers") < markdown.index("| test | metric | value |")
    assert "+0.2 (+0.1 to +0.3) | **worse**" in markdown
    assert "a loss of 0.2 would have been found (with a probability of 80 %)" in markdown
    assert "| 2.0 KiB | -2.0 KiB | new<br>a note |" in markdown
    for page in (markdown, html):
        assert "1 worse, 1 unclear, 1 new, 1 same" in page
    assert html.index('id="changes"') < html.index('id="results"')


def gated(lost, *, first=0, asked=300):
    """A record of a task whose gate is that of the package: so many of its answers were right and are wrong.

    first  the first question of the new run; the baseline's is 0
    """
    (reading,) = [record for record in GOLDEN["records"] if record["kind"] == "perplexity"][:1]
    sides = []
    for begin, wrong in ((0, 0), (first, lost)):
        ids = [f"{number:016x}" for number in range(begin, begin + asked)]
        answers = [0.0] * wrong + [1.0] * (asked - wrong)
        metric = {"value": 1 - wrong / asked, "unit": "", "low": 0.0, "high": 1.0, "n": asked, "higher_is_better": True}
        record = {**reading, "kind": "task", "subject": "boolq", "metrics": {"accuracy": metric}, "settings": {}, "series": {}}
        said = dict.fromkeys(ids[:wrong], ("<b>no</b>", None))
        sides.append(Side(entry_of(record), Scores(ids, [None] * asked, {"accuracy": answers}, said)))
    (gate,) = compare([(sides[0], sides[1])], Margins(), family=1)
    return {**record, "gate": gate}


def test_as_many_examples_are_told_to_have_changed_as_the_gate_found():
    judged = {**GOLDEN, "records": [gated(57)]}
    markdown, html = (pages.render(name, judged) for name in ("summary.md", "report.html"))
    for page in (markdown, html):
        assert "57 lost, 0 won" in page
    assert "20 of 57 examples that changed" in html
    assert "&lt;b&gt;no&lt;/b&gt;" in html
    assert "1 &rarr; 0" in html


def test_the_pages_say_the_same_as_the_terminal_of_examples_that_one_run_lacks():
    record = gated(0, first=200)
    markdown, html = (pages.render(name, {**GOLDEN, "records": [record]}) for name in ("summary.md", "report.html"))
    said = "on 100 questions of both runs; 200 only in the baseline, 200 only here"
    assert said in "\n".join(table([record], width=200))
    assert said in markdown.partition("<details>")[0]
    assert said in html


@given(st.integers(40, 160))
def test_a_narrow_terminal_breaks_what_is_said_of_a_verdict_and_cuts_nothing_off(width):
    row = {**gated(57)["gate"]["accuracy"], "verdict": "unclear", "detectable": 0.03633, "needed": 1977, "unlike": ["a " * 60]}
    lines = table([{**gated(57), "gate": {"accuracy": row}}], width=width)
    text = " ".join(" ".join(lines[1:]).split())
    assert max(map(len, lines)) <= width
    assert "..." not in text
    assert " ".join(" ".join(remarks(row, "question")).split()) in text
    assert "1 -> 0.81 -0.19" in text


def test_what_verdicts_rest_on_is_folded_and_said_once_a_test():
    record = gated(57)
    rows = {name: {**record["gate"]["accuracy"], "unlike": ["shots was 0, is 1"]} for name in ("accuracy", "f1")}
    rows["nll"] = {"verdict": "identical", "base": 1.25, "new": 1.25}
    judged = {**GOLDEN, "records": [{**record, "gate": rows}], "baseline": {"file": "b.json", "unlike": ["torch was 1, is 2"]}}
    markdown, html = (pages.render(name, judged) for name in ("summary.md", "report.html"))
    shown, _, folded = markdown.partition("<details><summary>What the verdicts rest on")
    for word in ("margin", "shots was 0", "1.25"):
        assert word not in shown
        assert word in folded
    for page in (markdown, html):
        assert page.count("shots was 0, is 1") == 1
        assert "torch was 1, is 2" in page


def test_without_a_gate_there_is_no_word_of_a_baseline():
    for page in (pages.render("summary.md", GOLDEN), markup(pages.render("report.html", GOLDEN))):
        assert "baseline" not in page


def test_what_failed_stands_at_the_top_with_what_it_said():
    failure = {"test": GOLDEN["records"][1]["test"], "message": "assert <b>3</b> < 2 ```", "file": "t.py", "line": 3}
    failed = {**document(outcome="failed"), "failures": [failure]}
    markdown, html = (pages.render(name, failed) for name in ("summary.md", "report.html"))
    assert re.search(r"1 of \d+ tests failed", markdown.splitlines()[0])
    assert "````text\nassert <b>3</b> < 2 ```\n````" in markdown
    assert "assert &lt;b&gt;3&lt;/b&gt; &lt; 2" in html
    assert html.index("assert &lt;b&gt;") < html.index('id="results"')


def test_the_headline_counts_the_tests_that_failed_and_of_the_others_those_that_a_gate_warned_of():
    said = {**document(gate={"prefill": {"verdict": "worse", "base": 1.0}}), "failures": []}
    passed = overview(said).headline
    assert re.fullmatch(r"All \d+ tests passed; 1 is worse than the baseline", passed)
    said["records"][0]["outcome"] = "failed"
    assert re.fullmatch(r"1 of \d+ tests failed; of the others, 1 is worse than the baseline", overview(said).headline)
    said["records"][1]["outcome"] = "failed"
    assert "worse" not in overview(said).headline


def test_what_is_in_another_unit_is_drawn_on_axes_of_its_own():
    def scaling(unit):
        series = {"batch_scaling": {"x": [1.0, 2.0], "y": [10.0, 15.0], "x_unit": "rows", "y_unit": unit}}
        return {**GOLDEN["records"][1], "kind": "throughput", "subject": "batch 2, 8 tokens", "series": series}

    (figure,) = figures([scaling("tokens/s"), scaling("frames/s"), scaling("tokens/s"), scaling("frames/s")])
    assert [(choice["y"], len(choice["curves"])) for choice in figure["choices"]] == [("tokens/s", 2), ("frames/s", 2)]
    assert len({choice["label"] for choice in figure["choices"]}) == 2


def test_a_hook_adds_metrics_and_sections_and_one_that_fails_costs_nothing(tmp_path):
    def extend(data):
        data["records"][0]["metrics"]["euros"] = {"value": 0.5, "unit": "EUR"}
        data["sections"].append({"title": "Energy <b>", "columns": ["machine", "Wh"], "rows": [["ci-3", 12.5]]})

    def spoil(data):
        extend(data)
        data["records"][1]["metrics"]["euros"] = float("nan")

    write.reports(tmp_path, GOLDEN["records"], run=RUN, root=tmp_path, extend=extend)
    assert "euros" in (tmp_path / "metrics.json").read_text()
    assert "Energy &lt;b&gt;" in (tmp_path / "report.html").read_text()
    assert "| ci-3 | 12.5 |" in (tmp_path / "summary.md").read_text()
    _, note = write.reports(tmp_path, GOLDEN["records"], run=RUN, root=tmp_path, extend=spoil)
    assert "pytest_lmeval_report failed, and its changes were left out (ValueError" in note
    assert "euros" not in (tmp_path / "metrics.json").read_text()
    assert "Energy" not in (tmp_path / "report.html").read_text()


def test_github_gets_the_summary_and_a_mark_at_each_failed_test(tmp_path, monkeypatch):
    failures = [{"test": "t.py::test_a", "message": "50 % lost\nof it", "file": "a,b.py", "line": 7}]
    records = document(gate=GATE)["records"]
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


def test_curves_of_all_models_on_one_text_are_one_plot_with_words_and_data():
    records = [beside("zoo:mamba"), beside("zoo:bk")]
    drawn = {figure["title"]: figure for figure in figures(records)}
    (choice,) = drawn["Loss by position"]["choices"]
    assert [curve["name"] for curve in choice["curves"]] == ["zoo:mamba", "zoo:bk"]
    assert choice["caption"].startswith("zoo:mamba ")
    assert choice["curves"][0]["y"] == records[0]["series"]["loss_by_position"]["y"]
    assert "Quality by bytes of the weights" not in drawn


def caption_of(name, x, y, x_unit, y_unit):
    series = {name: {"x": x, "y": y, "x_unit": x_unit, "y_unit": y_unit}}
    (figure,) = figures([beside("demo", series=series)])
    return figure["title"], figure["choices"][0]["caption"]


def test_a_caption_gives_both_ends_in_one_unit_and_no_middle_of_a_bin_as_a_position():
    state = ("state_bytes", [256, 2048])
    assert caption_of(*state, [1313280, 1313280], "tokens", "bytes")[1] == (
        "demo is 1.3 MiB at both ends of 256 to 2,048 tokens."
    )
    assert caption_of(*state, [1024, 2097152], "tokens", "bytes")[1] == (
        "demo rises from 1.0 KiB to 2.0 MiB, over 256 to 2,048 tokens."
    )
    loss = caption_of("loss_by_position", [1.189, 90.51], [7.781, 2.0], "tokens before", "nats/token")[1]
    assert loss == "demo falls from 7.781 nats/token to 2 nats/token, over about 1 to about 91 tokens before."


def test_distributions_of_latency_are_called_what_they_are():
    title, caption = caption_of("itl_quantiles", [1, 99.9], [2.3, 7.5], "%", "ms")
    assert title == "Time between tokens (ITL), by quantile"
    assert caption == "demo rises from 2.3 ms to 7.5 ms, over 1 % to 99.9 %."


def test_quality_is_drawn_against_bytes_where_there_are_several_sizes():
    records = [beside("a"), beside("a@bf16", lm={**beside("a")["lm"], "spec": "a@bf16", "bytes": 7})]
    (figure,) = [figure for figure in figures(records) if figure["kind"] == "dots"]
    assert [curve["x"] for curve in figure["choices"][0]["curves"]] == [[records[0]["lm"]["bytes"]], [7]]


def test_two_curves_of_one_name_are_told_apart():
    records = [beside("a", test="t.py::one"), beside("a", test="t.py::two"), beside("a", test="t.py::two")]
    (choice,) = figures(records)[0]["choices"]
    assert [curve["name"] for curve in choice["curves"]] == ["a (one)", "a (two) (2)", "a (two) (3)"]


def test_history_is_drawn_as_far_as_it_can_be_read(tmp_path):
    line = {"run": "1", "started": "2026-01-01T00:00:00+00:00", "commit": "c", "test": "t", "lm": "demo", "kind": "task"}
    line |= {"subject": "brackets", "metric": "accuracy", "value": 0.5, "low": 0.4, "high": None}
    later = {**line, "started": 1767312000, "value": 0.6, "lm": {"spec": "demo"}}
    lines = [
        json.dumps(later),
        "{torn",
        json.dumps({**line, "value": None}),
        json.dumps({**line, "started": "soon"}),
        "",
        json.dumps(line),
    ]
    (tmp_path / "history.jsonl").write_text("\n".join(lines))
    found, (note,) = history.read(tmp_path)
    assert note.startswith("3 lines of history.jsonl cannot be read")
    (figure,) = figures([], found)
    (curve,) = figure["choices"][0]["curves"]
    assert (curve["y"], curve["low"]) == ([0.5, 0.6], [0.4, 0.4])
    assert curve["x"] == ["2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"]
    assert history.read(tmp_path / "nowhere") == ([], [])


def test_a_model_that_is_measured_by_two_tests_is_told_apart_by_their_names():
    (grid,) = grids([beside("a", test="t.py::one[a]"), beside("a", test="t.py::two[a]"), beside("b", test="t.py::one[b]")])
    assert [row.note.rpartition(", ")[2] for row in grid.rows] == ["one", "two", grid.rows[2].note.rpartition(", ")[2]]
    assert grid.units[grid.columns.index("bits per byte")] == "bits/byte"
    assert grid.better[grid.columns.index("perplexity")] == "lower"


@given(st.text())
def test_no_text_can_move_the_cursor_or_break_a_file(text):
    shown = visible(text)
    shown.encode()
    assert not [character for character in shown if character < " " and character not in "\n\t"]
    assert "\x1b" not in shown


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
