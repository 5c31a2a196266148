"""The report in a real browser, as a reader uses it: what is clicked, typed and printed, in light and dark, wide and narrow."""

import shutil

import pytest
from documents import asked, document, generated, laws, model, reading, write_run
from msgspec.structs import replace

from pytest_lmeval.records._document import Section
from pytest_lmeval.records._measured import Series
from pytest_lmeval.records._value import Value
from pytest_lmeval.report import _pages as pages
from pytest_lmeval.report._words import visible

playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH to open the report with")

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> {{ 7 * 7 }}"
ANSWERS = 10_000
QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def answers(spec, flipped):
    """Questions with an answer in words, of which one model has every tenth wrong and the other every seventh."""
    for number in range(ANSWERS):
        text = HOSTILE if number == 3 else f"answer {number} of {spec}"
        score = 0.5 if number == 1 else float(number % flipped != 0)
        yield generated(number, text, target=f"target {number}", prompt=f"prompt {number % 10}", scores={"squad_f1": score})


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    words = {"subject": "words", "certificate": laws().certificate}
    records = [
        laws(),
        reading(),
        reading("zoo:mamba", lm=model("zoo:mamba", bytes=7_000_000)),
        reading(kind="latency", metrics={}, series={"e2e_by_run": Series([0.0, 1.0, 2.0], [4.0, 3.0, 3.5], "run", "ms")}),
        asked(HOSTILE, **words),
        *(
            asked(spec, f"examples/{spec}.jsonl", metrics={"squad_f1": Value(value, higher_is_better=True)}, **words)
            for spec, value in (("first", 0.9), ("second", 0.857))
        ),
    ]
    held = Series([256.0, 2048.0], [204_800.0, 1_313_280.0], "tokens", "bytes", title="State over the stream")
    records[-1] = replace(records[-1], series={"state_bytes": held})
    found = document(*records, sections=[Section(HOSTILE, columns=[HOSTILE], rows=[[HOSTILE]])])
    folder = write_run(
        tmp_path_factory.mktemp("report") / "run", found, first=answers("first", 10), second=answers("second", 7)
    )
    (folder / "report.html").write_text(pages.render("report.html", found, folders=[folder]))
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser:
        yield browser


@pytest.fixture
def open_report(browser, address):
    """A function that opens the report; whatever the browser complains of, and whatever the page asks for, fails the test."""
    complaints, asked = [], []

    def open_it(**options):
        page = context.new_page() if not options else browser.new_context(**options).new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield open_it
    for other in browser.contexts:
        other.close()
    assert complaints == []
    assert set(asked) == {address}


def column(page, grid, place):
    return page.locator(f"#grids section:has(h3:text-is('{grid}')) tbody tr:visible td:nth-child({place})").all_inner_texts()


def test_tables_sort_by_any_column_the_best_first_and_what_has_no_value_last(open_report):
    page = open_report()
    head = page.locator("#grids section:has(h3:text-is('Task')) th", has_text="squad f1")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [text.split("\n")[0] for text in column(page, "Task", 3)] == ["0.9", "0.857", ""]
    head.get_by_role("button").click()
    assert [text.split("\n")[0] for text in column(page, "Task", 3)] == ["0.857", "0.9", ""]


def test_the_filter_leaves_the_rows_with_all_its_words(open_report):
    page = open_report()
    page.get_by_label("Filter").fill("WORDS second")
    assert [text.split("\n")[0] for text in column(page, "Task", 1)] == ["second"]
    assert page.locator("#grids h3:visible").all_inner_texts() == ["Task"]
    assert page.locator("#filtered").inner_text().startswith("1 of ")
    page.get_by_label("Filter").fill("")
    assert page.locator("#grids h3:visible").count() > 1


def test_what_a_model_wrote_stays_text(open_report):
    page = open_report()
    page.get_by_label("Search").fill("taken")
    question = page.locator("#questions details")
    assert question.count() == 1
    question.locator("summary").first.click()
    assert visible(HOSTILE) in question.locator("td.text").all_inner_texts()
    assert HOSTILE in page.locator("h2").all_inner_texts()
    assert "taken" not in page.title()
    assert page.locator("img").count() == 0


def test_a_script_that_gets_into_the_page_all_the_same_is_not_run(browser, address):
    """The broken twin: markup in the page, as if escaping had failed. The policy of the page is what is left."""
    page = browser.new_page()
    page.goto(address)
    page.evaluate(
        """document.body.insertAdjacentHTML('beforeend', "<img src='data:,' onerror='document.title = \\"taken\\"'>")"""
    )
    page.evaluate(
        """document.body.append(document.createRange().createContextualFragment("<script>document.title = 'taken'</script>"))"""
    )
    page.wait_for_timeout(100)
    assert "taken" not in page.title()
    page.close()


def test_questions_are_shown_a_page_at_a_time_and_flips_are_counted_over_all(open_report):
    page = open_report()
    assert page.locator("#questions details").count() == 50
    assert page.evaluate("document.querySelectorAll('*').length") < 5_000
    page.get_by_label("Show").select_option(label="flips: one is right, the other wrong")
    lost = sum((number % 10 == 0) != (number % 7 == 0) for number in range(ANSWERS) if number != 1)
    assert page.locator("#browser [role=status]").inner_text() == (
        f"{lost:,} of {ANSWERS:,} questions; {lost:,} flips between first and second"
    )
    first = page.locator("#questions summary").first.inner_text()
    page.get_by_role("button", name="Next").click()
    assert page.locator("#questions summary").first.inner_text() != first
    assert page.get_by_text("page 2 of").count() == 1


def test_a_question_opens_to_its_target_outputs_scores_and_prompt(open_report):
    page = open_report()
    question = page.locator("#questions details.question").nth(1)
    assert question.locator(".marks > span").first.get_attribute("title") == "first: partly right, 0.5"
    question.locator("summary").click()
    cells = [" ".join(text.split()) for text in question.locator("tr").all_inner_texts()]
    assert cells == ["output squad f1", "target target 1", "first answer 1 of first 0.5", "second answer 1 of second 0.5"]
    assert not question.locator("pre").is_visible()
    question.locator("summary", has_text="Prompt").click()
    assert question.locator("pre").inner_text() == "prompt 1"
    page.get_by_label("Show").select_option(label="first is partly right")
    assert page.locator("#browser [role=status]").inner_text().startswith("1 of 10,000 questions;")


def test_everything_can_be_reached_and_worked_with_the_keyboard(open_report):
    page = open_report()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.get_by_label("Filter").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort]").count() == 1
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1
    controls = "[...document.querySelectorAll('button, input, select, a')]"
    assert page.evaluate(f"{controls}.filter((one) => !(one.textContent.trim() || one.labels?.length)).length") == 0


def test_every_plot_says_in_words_what_it_shows_and_has_its_data_beside_it(open_report):
    page = open_report()
    figures = page.locator("figure")
    assert figures.count() >= 3
    for place in range(figures.count()):
        figure = figures.nth(place)
        figure.scroll_into_view_if_needed()
        drawing = figure.locator("svg.plot")
        drawing.wait_for()
        drawing.hover()  # a tip comes up
        assert drawing.get_attribute("role") == "img"
        assert drawing.get_attribute("aria-label").startswith(figure.locator("h3").inner_text())
        assert drawing.get_attribute("aria-description") == figure.locator("figcaption").inner_text()
        figure.locator("summary").click()
        figure.locator("tbody tr").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_reader_s_light_and_can_be_switched(open_report, scheme):
    page = open_report(color_scheme=scheme)
    lightness = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert (page.evaluate(lightness) > 128) == (scheme == "light")
    page.get_by_role("button", name="Switch between light and dark").click()
    assert (page.evaluate(lightness) > 128) != (scheme == "light")


def test_nothing_is_wider_than_a_phone(open_report):
    page = open_report(viewport={"width": 390, "height": 844})
    page.locator("figure").first.scroll_into_view_if_needed()
    page.locator("figure svg.plot").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_link_opens_what_it_points_to_and_the_printer_gets_everything(open_report):
    page = open_report()
    page.locator("#grids a").first.click()
    assert page.locator("details.record[open]").count() == 1
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.record:not([open])").count() == 0
    assert page.locator("svg.plot").count() == page.locator("figure").count()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.record[open]").count() == 1


def test_bytes_are_marked_in_one_unit(open_report):
    figure = open_report().locator("figure").filter(has_text="State over the stream")
    figure.scroll_into_view_if_needed()
    ticks = figure.locator("svg.plot g[aria-label='y-axis tick label'] text")
    ticks.first.wait_for(state="attached")
    marks = ticks.all_text_contents()
    assert len(marks) > 2
    assert {mark.replace("\u00a0", " ").split()[-1] for mark in marks} == {"MiB"}
