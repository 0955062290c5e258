"""A template that writes the date: a run that is continued on another day does not change."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from conftest import CHATML, conversations, toy_tokenizer, write_rows
from potstill import cli
from potstill.distillation import DistillSettings
from potstill.models import chat_template
from potstill.run_folder import RunFolder

DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
ON_CPU = ["--device", "cpu", "--precision", "fp32"]


def today_is(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    class Date(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return datetime.date.fromisoformat(day)

    monkeypatch.setattr(chat_template, "datetime", type("datetime", (), {"date": Date}))


@pytest.fixture
def place(pair_folder: Path) -> Path:
    for name in ("teacher", "student"):
        toy_tokenizer(chat_template=DATED).save_pretrained(pair_folder / name)
    write_rows(pair_folder / "data.jsonl", conversations(20))
    return pair_folder


def distill(output: str, *flags: str, teacher: str = "teacher") -> int:
    arguments = ["distill", teacher, "student", "--data", "data.jsonl", "--output-dir", output]
    return cli.main([*arguments, "--max-steps", "4", *ON_CPU, *flags])


def weights(output: str) -> dict[str, Any]:
    return load_file(Path(output) / "student" / "model.safetensors")


def config(output: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((Path(output) / "config.yaml").read_text())
    return settings


def test_a_run_that_is_continued_a_day_later_ends_with_the_same_weights(
    place: Path, interrupt_at: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    today_is(monkeypatch, "2026-01-31")
    assert distill("whole") == 0
    with interrupt_at(2):
        assert distill("run") == 130
    today_is(monkeypatch, "2026-02-01")
    assert distill("run") == 0
    assert config("run")["template_date"] == "2026-01-31"
    assert distill("later") == 0
    whole, continued, later = map(weights, ("whole", "run", "later"))
    assert all((whole[name] == continued[name]).all() for name in whole)
    assert any((whole[name] != later[name]).any() for name in whole)  # so the date matters here


def test_the_config_of_a_run_gives_the_same_weights_on_another_day(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today_is(monkeypatch, "2026-01-31")
    assert distill("run") == 0
    today_is(monkeypatch, "2026-02-01")
    assert cli.main(["distill", "--config", "run/config.yaml", "--output-dir", "again"]) == 0
    assert all((weights("run")[name] == weights("again")[name]).all() for name in weights("run"))


def test_a_capture_keeps_its_date_and_gives_it_to_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today_is(monkeypatch, "2026-01-31")
    flags = ["--data", "data.jsonl", "--output-dir", "captured"]
    assert cli.main(["capture", "teacher", *flags, *ON_CPU]) == 0
    today_is(monkeypatch, "2026-02-01")
    assert cli.main(["capture", "teacher", *flags, *ON_CPU]) == 0
    assert distill("run", teacher="captured") == 0
    assert config("run")["template_date"] == "2026-01-31"


def test_generated_answers_are_continued_with_their_date(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(place / "prompts.jsonl", [{"prompt": f"the rain {i}?"} for i in range(4)])
    arguments = ["generate", "teacher", "--prompts", "prompts.jsonl", "--max-new-tokens", "4"]
    arguments += ["--output-dir", "made", "--keep", "cut_off,empty,repetition_loop", *ON_CPU]
    today_is(monkeypatch, "2026-01-31")
    assert cli.main(arguments) == 0
    today_is(monkeypatch, "2026-02-01")
    assert cli.main(arguments) == 0
    manifest = json.loads((place / "made" / "manifest.json").read_text())
    assert manifest["made_with"]["template_date"] == "2026-01-31"


def test_a_date_that_is_none_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill("run", "--template-date", "31.1.2026") == 2
    assert "template_date '31.1.2026': needs a date as YYYY-MM-DD" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_rows_that_are_encoded_otherwise_stop_a_continued_run(
    place: Path, interrupt_at: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with interrupt_at(2):
        assert distill("run") == 130
    toy_tokenizer(chat_template=DATED.replace("'%d %b %Y'", "'%Y'")).save_pretrained(
        place / "student"
    )
    assert distill("run") == 2
    assert "(tokens) has changed since it began" in capsys.readouterr().err


def test_a_folder_that_was_begun_without_a_date_gets_one(place: Path) -> None:
    """As `potstill demo` begins its own."""
    settings = {**vars(DistillSettings("teacher", "student", "data.jsonl", "run")), "max_steps": 4}
    settings |= {"device": "cpu", "precision": "fp32"}
    RunFolder("run").begin(settings)
    assert distill("run") == 0
    assert config("run")["template_date"] == datetime.date.today().isoformat()
