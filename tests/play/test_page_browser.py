"""The playground in headless Chromium: three answers, predictions at a click, no other requests."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

from conftest import IN_CHROMIUM
from play.test_players import make_run
from potstill import cli

pytestmark = [
    *IN_CHROMIUM,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio"),
]
ALL_HAVE_ENDED = """return [...document.querySelectorAll('.answer')].every(answer =>
    answer.children.length === 64 || answer.lastElementChild?.textContent === '<|im_end|>')"""
NAMES = ["teacher", "student before", "student after"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# Runs the command and logs the hosts that it connects to.
WATCHED = """
import socket, sys
from potstill import cli
plain = socket.socket.connect
def connect(self, address):
    host = address[0] if isinstance(address, tuple) else "a file"
    print("connects to", host, file=sys.stderr, flush=True)
    return plain(self, address)
socket.socket.connect = connect
sys.exit(cli.main(sys.argv[1:]))
"""


class Playground:
    """`potstill play` in its own process, because Gradio leaves threads and an event loop."""

    def __init__(self, run: Path, log: Path) -> None:
        self.log, port = log, free_port()
        self.address = f"http://127.0.0.1:{port}"
        arguments = [
            sys.executable,
            "-c",
            WATCHED,
            "play",
            str(run),
            "--port",
            str(port),
            "--device",
            "cpu",
        ]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"playground: {self.address}/ (Ctrl+C ends it)\n", self.log.read_text()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def playground(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]
) -> Iterator[Playground]:
    folder = tmp_path_factory.mktemp("folder")
    with Playground(make_run(folder / "<b>toys", model_folder), folder / "log") as serving:
        yield serving


def wait(browser: Any, condition: Callable[[], Any]) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 120).until(lambda _: condition())


def find(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def ask(browser: Any, address: str, width: int = 1280) -> None:
    """Open the page, ask a question, and wait until three answers have ended."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(address)
    wait(browser, lambda: len(find(browser, ".answer")) == 3)
    find(browser, "textarea")[0].send_keys("the rain?\n")
    wait(browser, lambda: browser.execute_script(ALL_HAVE_ENDED))


def test_three_answers_are_side_by_side_and_a_chosen_token_shows_the_predictions(
    browser: Any, playground: Playground
) -> None:
    ask(browser, playground.address)
    answers = find(browser, ".answer")
    assert [answer.get_attribute("aria-label") for answer in answers] == NAMES
    assert len({answer.rect["y"] for answer in answers}) == 1
    token = answers[1].find_elements("css selector", "span")[0]
    browser.execute_script("arguments[0].click()", token)
    wait(browser, lambda: len(find(browser, ".bars li")) >= 18)
    assert len(find(browser, ".bars .written")) == 3
    assert [one.get_attribute("data-place") for one in find(browser, "[aria-pressed=true]")] == [
        "0"
    ]
    assert "the student before wrote" in find(browser, "body")[0].text


def test_a_token_is_reached_by_the_keyboard(browser: Any, playground: Playground) -> None:
    ask(browser, playground.address)
    token = find(browser, ".answer span")[2]
    browser.execute_script("arguments[0].focus()", token)
    token.send_keys("\n")
    wait(
        browser,
        lambda: (
            [one.get_attribute("data-place") for one in find(browser, "[aria-pressed=true]")]
            == ["2"]
        ),
    )


def test_the_page_fits_a_phone(browser: Any, playground: Playground) -> None:
    ask(browser, playground.address, width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert min(answer.rect["width"] for answer in find(browser, ".answer")) > 250


def test_neither_the_page_nor_the_server_connects_to_other_hosts(
    browser: Any, playground: Playground
) -> None:
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    ask(browser, playground.address)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > 10
    assert {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))} == {
        "127.0.0.1"
    }
    assert browser.get_log("browser") == []  # the content security policy refused nothing
    assert set(re.findall("connects to (.*)", playground.log.read_text())) == {"127.0.0.1"}


def test_a_taken_port_is_reported_before_models_are_opened(
    playground: Playground, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(urlsplit(playground.address).port)
    assert cli.main(["play", "no-such-run", "--port", port]) == 2
    assert (
        capsys.readouterr().err
        == f"potstill: port {port} of 127.0.0.1 is taken; give another --port, or another --host\n"
    )
