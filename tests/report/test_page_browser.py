"""Both pages in headless Chromium: layout, contrast, scripts and requests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import IN_CHROMIUM
from potstill.report import write_report
from report.hostile import EVIL, QUESTIONS, comparison_page, run_folder

AXE = Path(__file__).parents[2] / ".cache" / "axe" / "axe.min.js"
pytestmark = IN_CHROMIUM
LEAST_CONTRAST = """
const luminance = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) {
    const b = getComputedStyle(e).backgroundColor;
    if (!b.endsWith(', 0)')) return b; } return 'rgb(255, 255, 255)'; };
return Math.min(...[...document.querySelectorAll('body *')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(e => [getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color'], behind(e)].map(luminance))
    .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)));
"""
UNFOLD = "document.querySelectorAll('details').forEach(fold => fold.open = true)"

Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    report = write_report(run_folder(tmp_path_factory.mktemp("run")))
    return {"report": report, "comparison": comparison_page(tmp_path_factory.mktemp("comparison"))}


@pytest.fixture(params=["report", "comparison"])
def opened(request: pytest.FixtureRequest, browser: Any, pages: dict[str, Path]) -> Opened:
    """Return a function that opens the page and returns the browser."""

    def opening(width: int = 1280, scheme: str = "light", scripts: bool = True) -> Any:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        browser.get(pages[request.param].as_uri())
        return browser

    return opening


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def shown_answers(browser: Any) -> list[str]:
    found = browser.find_elements("css selector", ".answer .prompt")
    return [element.text for element in found if element.is_displayed()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_even_with_everything_unfolded(
    opened: Opened, width: int, scheme: str
) -> None:
    browser = opened(width, scheme)
    browser.execute_script(UNFOLD)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_every_part_of_the_page_has_its_heading(opened: Opened) -> None:
    headings = opened().execute_script(
        "return [...document.querySelectorAll('h2')].map(h => h.textContent)"
    )
    assert [heading for heading in headings if heading != "All pairs"] == [
        "What was measured",
        "The loss during training",
        "What the models answer",
        "Answers, token by token",
        "Where the student is worst"
        if "All pairs" not in headings
        else "Where the students are worst",
        "How this was made",
    ]


def test_markup_that_a_model_wrote_is_shown_as_text(opened: Opened) -> None:
    browser = opened(390)
    assert EVIL in find(browser, ".answers .teacher dd").text
    assert "owned" not in browser.title
    assert browser.execute_script("return [...document.scripts].filter(s => !s.type).length") == 1


def test_the_page_sends_no_requests_and_logs_no_errors(opened: Opened, browser: Any) -> None:
    browser.get_log("browser")
    opened()
    browser.execute_script(UNFOLD)
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
        )
        == []
    )
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(opened: Opened, scheme: str) -> None:
    assert opened(1280, scheme).execute_script(LEAST_CONTRAST) >= 4.5  # WCAG 2 AA


@pytest.mark.parametrize("width", [1280, 390])
def test_the_filter_shows_only_the_answers_that_have_the_words(opened: Opened, width: int) -> None:
    browser = opened(width)
    before = shown_answers(browser)
    box = find(browser, ".filter input")
    box.send_keys("What is RAIN")
    assert shown_answers(browser) == [
        question for question in QUESTIONS if "what is rain" in question
    ]
    assert find(browser, ".filter output").text == "3 of 15"
    box.clear()
    box.send_keys("words of no answer")
    assert shown_answers(browser) == []
    box.send_keys("\b" * 20)
    assert shown_answers(browser) == before


@pytest.mark.parametrize("width", [1280, 390])
def test_pointing_at_a_token_shows_the_most_likely_tokens_of_each_model(
    opened: Opened, width: int
) -> None:
    from selenium.webdriver import ActionChains

    browser = opened(width)
    token = browser.find_elements("css selector", ".tokens span")[4]
    browser.execute_script("arguments[0].scrollIntoView()", token)
    ActionChains(browser).move_to_element(token).perform()
    panel = find(browser, ".next")
    assert "Token 5 of 24: ·word" in panel.text
    tables = panel.find_elements("css selector", "table")
    assert tables[0].find_element("css selector", "caption").text.startswith("Teacher")
    assert len(tables) == 1 + browser.execute_script(
        "return document.querySelector('.pair').children.length"
    )
    for table in tables:
        rows = table.find_elements("css selector", "tr")
        assert len(rows) == 5
        assert all("%" in row.text for row in rows)
    assert tables[0].text.splitlines()[-5:][0].startswith("·teacher's")
    assert browser.execute_script(
        "return arguments[0].getBoundingClientRect().bottom <= innerHeight", panel
    )


def test_tokens_are_reached_by_the_tab_key_and_the_arrow_keys(opened: Opened) -> None:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.keys import Keys

    browser = opened()
    pointer = ActionBuilder(browser)  # an earlier test may have left it over a token
    pointer.pointer_action.move_to_location(0, 0)
    pointer.perform()
    tokens = browser.find_elements("css selector", ".tokens:first-of-type span")
    assert (
        browser.execute_script(
            "return document.querySelector('.tokens').querySelectorAll('[tabindex=\"0\"]').length"
        )
        == 1
    )
    browser.execute_script("arguments[0].focus()", tokens[0])
    assert "Token 1 of 24" in find(browser, ".next").text
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "Token 2 of 24" in find(browser, ".next").text
    browser.switch_to.active_element.send_keys(Keys.END)
    assert "Token 24 of 24" in find(browser, ".next").text
    assert (
        browser.execute_script("return document.activeElement.getAttribute('aria-selected')")
        == "true"
    )


def test_without_scripts_only_the_filter_and_the_most_likely_tokens_are_missing(
    opened: Opened,
) -> None:
    browser = opened(scripts=False)
    for selector in (".filter", ".next", ".scripted"):
        assert not find(browser, selector).is_displayed()
    for selector in (".verdict", "table", "svg", ".answer", ".tokens", ".provenance", "pre"):
        assert find(browser, selector).is_displayed()
    assert find(browser, ".tokens span").get_attribute("title").endswith(" nats")
    find(browser, ".more-answers summary").click()
    assert shown_answers(browser) == QUESTIONS


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there: make axe")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(opened: Opened, width: int, scheme: str) -> None:
    browser = opened(width, scheme)
    browser.execute_script(UNFOLD)
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run().then(arguments[0])")
    assert found["passes"]
    serious = [
        (one["id"], one["nodes"][0]["html"])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
