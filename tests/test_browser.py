"""The report in a real browser: clicking, typing and printing, light and dark, wide and narrow."""

import shutil

import pytest
from documents import document, generated, laws_of, model, perplexity_of, task_of, write_run
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
ANSWERS = 1_200
QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def answers(spec, wrong):
    """Generated answers, of which every `wrong`-th is wrong."""
    for number in range(ANSWERS):
        text = HOSTILE if number == 3 else f"answer {number} of {spec}"
        score = 0.5 if number == 1 else float(number % wrong != 0)
        became = {5: "cut off", 6: "empty", 8: "refused"}.get(number, "answered") if spec == "first" else "answered"
        thought = f"<b>{'hm ' * 300}I think of {number}" if spec == "first" and number == 5 else ""
        own = {"outcome": became, "thought": thought, "prompt": f"prompt {number % 10}"}
        text = "" if became == "empty" else text
        yield generated(number, text, target=f"target {number}", scores={"squad_f1": score}, **own)


def hidden_series():
    """Two sets of points at each of two layers, and a curve with its interval."""
    found = {
        f"{layer} {name}": Series(
            [x, x + 1.0, 40.0 * x], [1.0, 2.0, 50.0], "first", "second", "Two sets", part=layer, curve=name, points=True
        )
        for layer in ("layers.0", "layers.1")
        for name, x in (("texts", 1.0), ("others", 3.0))
    }
    by_layer = Series([0.0, 1.0], [1.0, 2.0], "layers", "sd", "Separation by layer", low=[0.5, 1.5], high=[1.5, 2.5])
    return {**found, "separation": by_layer}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    words = {"subject": "words", "certificate": laws_of().certificate}
    state = Series([256.0, 2048.0], [204_800.0, 1_313_280.0], "tokens", "bytes", title="State over the stream")
    first, second = (
        task_of(spec, f"examples/{spec}.jsonl", metrics={"squad_f1": Value(value, higher_is_better=True)}, **words)
        for spec, value in (("first", 0.9), ("second", 0.857))
    )
    found = document(
        laws_of(),
        perplexity_of(),
        perplexity_of("zoo:mamba", lm=model("zoo:mamba", bytes=7_000_000)),
        perplexity_of(kind="latency", metrics={}, series={"e2e_by_run": Series([0.0, 1.0, 2.0], [4.0, 3.0, 3.5], "run", "ms")}),
        perplexity_of(kind="hidden_states", subject="12 texts and 8 others", metrics={}, series=hidden_series()),
        task_of(HOSTILE, **words),
        first,
        replace(second, series={"state_bytes": state}),
        sections=[Section(HOSTILE, columns=[HOSTILE], rows=[[HOSTILE]])],
    )
    files = {"first": answers("first", 10), "second": answers("second", 7)}
    folder = write_run(tmp_path_factory.mktemp("report") / "run", found, **files)
    (folder / "report.html").write_text(pages.render("report.html", found, folders=[folder]))
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser:
        yield browser


@pytest.fixture
def open_report(browser, address):
    """A function that opens the report. Fails the test if the browser logs a problem or the page requests another file."""
    problems, requests, contexts = [], [], []

    def open_it(**options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []
    assert set(requests) == {address}


def column(page, grid, number):
    cells = page.locator(f"#grids section:has(h3:text-is('{grid}')) tbody tr:visible td:nth-child({number})")
    return [text.split("\n")[0] for text in cells.all_inner_texts()]


def test_tables_sort_by_any_column_best_first_and_empty_cells_last(open_report):
    page = open_report()
    head = page.locator("#grids section:has(h3:text-is('Task')) th", has_text="squad f1")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "Task", 3) == ["0.9", "0.857", ""]
    head.get_by_role("button").click()
    assert column(page, "Task", 3) == ["0.857", "0.9", ""]


def test_the_filter_shows_the_rows_with_all_its_words(open_report):
    page = open_report()
    page.get_by_label("Filter").fill("WORDS second")
    assert column(page, "Task", 1) == ["second"]
    assert page.locator("#grids h3:visible").all_inner_texts() == ["Task"]
    assert page.locator("#filtered").inner_text().startswith("1 of ")
    page.get_by_label("Filter").fill("")
    assert page.locator("#grids h3:visible").count() > 1


def test_hostile_text_is_shown_as_text(open_report):
    page = open_report()
    page.get_by_label("Search").fill("taken")
    question = page.locator("#questions details")
    assert question.count() == 1
    question.locator("summary").first.click()
    assert visible(HOSTILE) in question.locator("td.text").all_inner_texts()
    assert HOSTILE in page.locator("h2").all_inner_texts()
    assert "taken" not in page.title()
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("off", [False, True])
def test_only_the_content_security_policy_stops_a_script_that_was_not_escaped(browser, address, off):
    """Insert markup as if escaping had failed, then wait for an image error after that of the inserted image."""
    with browser.new_context(bypass_csp=off) as context:
        page = context.new_page()
        page.goto(address)
        image = """<img src='data:,' onerror='document.title = "taken by image"'>"""
        page.evaluate("(html) => document.body.insertAdjacentHTML('beforeend', html)", image)
        page.evaluate("new Promise((done) => { const image = new Image(); image.onerror = done; image.src = 'data:,'; })")
        assert (page.title() == "taken by image") == off
        script = "<script>document.title = 'taken by script'</script>"
        page.evaluate("(html) => document.body.append(document.createRange().createContextualFragment(html))", script)
        assert (page.title() == "taken by script") == off


def test_questions_are_shown_in_pages_and_flips_are_counted_over_all(open_report):
    page = open_report()
    assert page.locator("#questions details").count() == 50
    assert page.evaluate("document.querySelectorAll('*').length") < 2_000
    page.get_by_label("Show").select_option(label="flips: one is right, the other wrong")
    flips = sum((number % 10 == 0) != (number % 7 == 0) for number in range(ANSWERS) if number != 1)
    status = f"{flips:,} of {ANSWERS:,} questions; {flips:,} flips between first and second"
    assert page.locator("#browser [role=status]").inner_text() == status
    first = page.locator("#questions summary").first.inner_text()
    page.get_by_role("button", name="Next").click()
    assert page.locator("#questions summary").first.inner_text() != first
    assert page.get_by_text("page 2 of").count() == 1


def test_a_question_opens_to_its_target_outputs_scores_and_prompt(open_report):
    page = open_report()
    question = page.locator("#questions details.question").nth(1)
    assert question.locator(".marks > span").first.get_attribute("title") == "first: partly right, 0.5"
    question.locator("summary").click()
    question.locator("tr").nth(3).wait_for()  # they are made when it opens
    cells = [" ".join(text.split()) for text in question.locator("tr").all_inner_texts()]
    assert cells == [
        "output outcome squad f1", "target target 1", "first answer 1 of first partly right 0.5",
        "second answer 1 of second partly right 0.5",
    ]  # fmt: skip
    prompt = question.locator("details", has=page.get_by_text("Prompt", exact=True)).locator("pre")
    assert not prompt.is_visible()
    question.locator("summary", has_text="Prompt").click()
    assert prompt.inner_text() == "prompt 1"
    page.get_by_label("Show").select_option(label="first is partly right")
    assert page.locator("#browser [role=status]").inner_text().startswith(f"1 of {ANSWERS:,} questions;")


def test_what_became_of_an_answer_stands_beside_it_and_filters_and_its_thought_is_folded(open_report):
    page = open_report()
    show = page.get_by_label("Show")
    options = show.locator("option").all_inner_texts()
    assert [option for option in options if option.split(" is ")[-1] in ("cut off", "empty", "refused")] == [
        "first is cut off", "first is empty", "first is refused",
    ]  # fmt: skip
    for number, word, line in (
        (5, "cut off", "target 5 \u2190 answer 5 of first (cut off) \u00b7 answer 5 of second"),
        (6, "empty", "target 6 \u2190 \u2205 (empty) \u00b7 answer 6 of second"),
        (8, "refused", "target 8 \u2190 answer 8 of first (refused) \u00b7 answer 8 of second"),
    ):
        show.select_option(label=f"first is {word}")
        assert page.locator("#browser [role=status]").inner_text().startswith(f"1 of {ANSWERS:,} questions;")
        question = page.locator("#questions details.question")
        assert question.locator(".texts").inner_text() == line
        assert question.locator(".marks > span").first.get_attribute("title") == f"first: right, {word}"
        question.locator("summary").first.click()
        question.locator("tr").nth(3).wait_for()
        assert f"right, {word}" in question.locator("tr").nth(2).inner_text()
        assert word not in question.locator("tr").nth(3).inner_text()
        assert question.get_by_text("Thought of first").count() == (number == 5)
    show.select_option(label="first is cut off")
    question.locator("summary").first.click()
    thought = question.locator("details", has=page.get_by_text("Thought of first", exact=True))
    assert not thought.locator("pre").is_visible()
    thought.locator("summary").click()
    assert thought.locator("pre").inner_text() == f"<b>{'hm ' * 300}I think of 5"
    show.select_option(label="all")
    page.get_by_label("Search").fill("think of 5")
    assert page.locator("#questions details.question").count() == 1
    page.locator("#browser select").first.select_option(label="second")
    assert "second is cut off" not in show.locator("option").all_inner_texts()


def test_the_keyboard_reaches_and_operates_everything(open_report):
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


def test_every_plot_has_a_description_and_its_data_and_byte_ticks_have_one_unit(open_report):
    page = open_report()
    figures = page.locator("figure")
    assert figures.count() >= 3
    for figure in figures.all():
        figure.scroll_into_view_if_needed()
        drawing = figure.locator("svg.plot")
        drawing.wait_for()
        drawing.hover()  # shows a tip
        assert drawing.get_attribute("role") == "img"
        assert drawing.get_attribute("aria-label").startswith(figure.locator("h3").inner_text())
        assert drawing.get_attribute("aria-description") == figure.locator("figcaption").inner_text()
        figure.locator("summary").click()
        figure.locator("tbody tr").first.wait_for()
    state = figures.filter(has_text="State over the stream")
    ticks = state.locator("svg.plot g[aria-label='y-axis tick label'] text").all_text_contents()
    assert len(ticks) > 2
    assert {tick.replace("\u00a0", " ").split()[-1] for tick in ticks} == {"MiB"}


def test_two_sets_are_points_of_two_colours_at_a_layer_that_the_reader_chooses(open_report):
    page = open_report()
    figure = page.locator("figure:has(h3:text-is('Two sets'))")
    figure.scroll_into_view_if_needed()
    figure.locator("svg.plot circle").first.wait_for()
    colours = figure.locator("svg.plot g[fill]:has(circle)").evaluate_all("all => all.map(one => one.getAttribute('fill'))")
    assert figure.locator("svg.plot circle").count() == 6
    assert len(set(colours)) == 2
    assert figure.locator("select option").all_inner_texts() == [f"12 texts and 8 others: layers.{n}" for n in (0, 1)]
    assert "texts has 3 points around 2, 2 (medians)" in figure.locator("figcaption").inner_text()
    spread = page.locator("figure:has(h3:text-is('Separation by layer'))")
    spread.scroll_into_view_if_needed()
    spread.locator("svg.plot g[aria-label=area] path").first.wait_for()  # its interval


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.thorough)])
def test_the_page_has_the_reader_s_colour_scheme_and_a_switch(open_report, scheme):
    page = open_report(color_scheme=scheme)
    lightness = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert (page.evaluate(lightness) > 128) == (scheme == "light")
    page.get_by_role("button", name="Switch between light and dark").click()
    assert (page.evaluate(lightness) > 128) != (scheme == "light")


def test_nothing_is_wider_than_a_phone(open_report):
    page = open_report(viewport={"width": 390, "height": 844})
    page.locator("figure").first.scroll_into_view_if_needed()
    page.locator("figure svg.plot").first.wait_for()
    page.get_by_label("Show").select_option(label="first is cut off")
    for summary in ("#questions details.question > summary", "#questions details details summary"):
        page.locator(summary).first.press("Enter")  # a click can miss: figures above grow as they come into view
    page.get_by_text("I think of 5").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_links_open_their_target_and_printing_opens_everything(open_report):
    page = open_report()
    page.locator("#grids a").first.click()
    assert page.locator("details.record[open]").count() == 1
    page.emulate_media(media="print")
    assert page.locator("#grids th").first.inner_text() == "model"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.record:not([open])").count() == 0
    assert page.locator("svg.plot").count() == page.locator("figure").count()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.record[open]").count() == 1
