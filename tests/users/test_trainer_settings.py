"""Each setting of transformers' TrainingArguments works, or is refused with what to use instead."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from conftest import conversations, write_rows
from potstill import cli
from potstill.distillation.trainer_settings import (
    REFUSED,
    SET_BY_FLAGS,
    checked_trainer_settings,
    loggers,
)
from potstill.errors import ConfigError
from potstill.training import DistillationConfig

FIELDS = {item.name for item in dataclasses.fields(transformers.TrainingArguments)}


def distill(*flags: str, trainer: dict[str, Any] | None = None) -> int:
    write_rows(Path("data.jsonl"), conversations(12))
    given = ["--data", "data.jsonl", "--output-dir", "run", "--max-steps", "4", "--device", "cpu"]
    settings = ["--trainer", json.dumps(trainer)] if trainer else []
    return cli.main(
        ["distill", "teacher", "student", *given, "--precision", "fp32", *settings, *flags]
    )


def test_every_refused_setting_exists() -> None:
    own = {item.name for item in dataclasses.fields(DistillationConfig)} - FIELDS
    assert set(SET_BY_FLAGS) - own <= FIELDS
    assert set(REFUSED) <= FIELDS


@pytest.mark.parametrize("name", sorted({*SET_BY_FLAGS, *REFUSED}))
def test_a_setting_that_a_run_overrides_or_ignores_is_refused(name: str) -> None:
    instead = SET_BY_FLAGS.get(name) or REFUSED[name]
    with pytest.raises(ConfigError, match=rf"^trainer\.{name}: .*{instead}"):
        checked_trainer_settings({name: 1})


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        ({"max_steps": 3}, "trainer.max_steps: give --max-steps instead"),
        ({"num_train_epochs": 3}, "trainer.num_train_epochs: give --max-steps or --seconds"),
        ({"weight_decy": 0.1}, "did you mean weight_decay?"),
        ({"optim": "adamw_9000"}, "transformers says"),
        ({"optim": "lomo"}, "lomo"),
        ({"lr_scheduler_type": "cosin"}, "transformers says"),
        ({"train_sampling_strategy": "group_by_length"}, "no column of lengths"),
    ],
)
def test_refusals_come_before_anything_is_written(
    pair_folder: Path, trainer: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(trainer=trainer) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
    assert not Path("run").exists()


def state(folder: str = "run") -> dict[str, Any]:
    (checkpoint,) = sorted(Path(folder, "checkpoints").glob("checkpoint-4"))
    found: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text())
    return found


def test_settings_that_pass_do_what_transformers_says(pair_folder: Path) -> None:
    trainer = {
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 2,
        "weight_decay": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.5,
        "per_device_eval_batch_size": 3,
    }
    assert distill("--eval-steps", "2", trainer=trainer) == 0
    logs = [row for row in state()["log_history"] if "learning_rate" in row]
    assert [row["step"] for row in logs] == [2, 4]
    assert {row["learning_rate"] for row in logs} == {1e-4}


def test_a_nested_setting_is_not_changed_and_the_run_can_be_continued(pair_folder: Path) -> None:
    trainer = {"accelerator_config": {"split_batches": False}, "lr_scheduler_kwargs": {}}
    assert distill(trainer=trainer) == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"] == trainer
    assert distill(trainer=trainer) == 0


def test_an_absent_logger_is_refused_before_anything_is_written(
    pair_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--log-to", "no_such_logger") == 2
    assert "--log-to no_such_logger: not installed" in capsys.readouterr().err
    assert not Path("run").exists()
    assert loggers(None) == loggers("") == []


def test_a_negative_learning_rate_is_refused(
    pair_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--learning-rate", "-1") == 2
    assert "learning_rate -1.0: must be above 0" in capsys.readouterr().err
