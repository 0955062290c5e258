"""The page of a run, opened in headless Chromium: it fits, it reads, and it asks nothing of anybody."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ABSENT = not (CHROMIUM and shutil.which("chromedriver") and importlib.util.find_spec("selenium"))
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(ABSENT and os.environ.get("CI") != "true", reason="needs chromium, chromedriver and selenium"),
]
SWITCHES = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
SWITCHES += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
EVIL = "</span></div><script>document.title = 'owned'</script>"
LONG = "unbroken" * 60

LEAST_CONTRAST = """
const luminance = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) {
    const b = getComputedStyle(e).backgroundColor; if (!b.endsWith(', 0)')) return b; } return 'rgb(255, 255, 255)'; };
return Math.min(...[...document.querySelectorAll('body *')]
    .filter(e => !e.closest('svg') && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(e => [luminance(getComputedStyle(e).color), luminance(behind(e))])
    .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)));
"""


def model(kl: float, bits: float, agreement: float) -> dict[str, Any]:
    values = {"kl_nats_per_token": kl, "nll_nats_per_token": 1 + kl, "bits_per_byte": bits, "top1_agreement": agreement}
    intervals = {key: [value * 0.96, value * 1.04] for key, value in values.items()}
    return {**values, "tokens": 8123, "bytes": 33012, "ci95": intervals}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose texts are as wide, as long and as hostile as they come."""
    folder = tmp_path_factory.mktemp("run")
    config = {"teacher": "demo", "student": f"runs/{LONG}", "method": "logits", "seed": 0, "nested": {"a": [1, 2]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    rows = [json.dumps({"step": n, "loss": 2 + 4 / n, "eval_loss": 2.2 + 4 / n, "seconds": 2.5 * n}) for n in range(1, 71)]
    (folder / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    texts = {"prompt": "Why?\nPlease.", "teacher": EVIL, "before": LONG, "after": ""}
    tokens = [{"text": text, "before_kl_nats": kl, "after_kl_nats": kl / 4}
              for kl in (0.0, 0.05, 0.2, 0.7, 2.0, 9.0) for text in (" word", LONG, "\n\n", EVIL)]  # fmt: skip
    evaluation = {
        "teacher": model(0, 0.71, 1), "before": model(2.3, 1.9, 0.31), "after": model(0.8, 1.1, 0.64),
        "token_view": {"prompt": EVIL, "tokens": tokens}, "samples": [texts] * 8, "gap_closed": 0.65,
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return write_report(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or "chromium"
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def open_page(browser: Any, report: Path, width: int, scheme: str = "light") -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(report.as_uri())


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_the_page_fits_its_window_even_with_everything_unfolded(browser: Any, report: Path, width: int) -> None:
    open_page(browser, report, width)
    browser.execute_script("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_every_part_of_the_page_has_its_heading(browser: Any, report: Path) -> None:
    open_page(browser, report, 1280)
    headings = browser.execute_script("return [...document.querySelectorAll('h1, h2')].map(h => h.textContent)")
    assert headings == [
        "Distilling demo",
        "What was measured",
        "The loss during training",
        "What the models answer",
        "One answer, token by token",
        "Where this comes from",
    ]


def test_markup_that_a_model_wrote_is_read_as_text(browser: Any, report: Path) -> None:
    open_page(browser, report, 390)
    assert EVIL in browser.find_element("css selector", ".answers .teacher dd").text
    assert browser.title == "Distilling demo · potstill report"
    assert browser.execute_script("return document.scripts.length") == 0


def test_the_page_asks_nothing_of_the_network_and_complains_of_nothing(browser: Any, report: Path) -> None:
    browser.get_log("browser")
    open_page(browser, report, 1280)
    assert browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(browser: Any, report: Path, scheme: str) -> None:
    open_page(browser, report, 1280, scheme)
    assert browser.execute_script(LEAST_CONTRAST) >= 4.5  # WCAG 2 AA
