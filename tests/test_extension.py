"""Adding a teacher kind or a divergence: one record, used by the whole command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import conversations, toy_tokenizer, write_rows
from potstill import cli, teachers
from potstill.data import PLAIN_CHAT_TEMPLATE
from potstill.losses import Head, divergences
from potstill.models.heads import supervised
from potstill.run_folder import RunFolder
from potstill.teachers import StatesTarget, TeacherKind


class BigramTeacher:
    """A teacher without a model of transformers: the next token depends on the last one."""

    model = None
    vocabulary_rows = 272

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokenizer = toy_tokenizer()
        self.embedding = torch.randn(272, 16, generator=generator)
        self.head = Head(torch.randn(272, 16, generator=generator))

    def targets(self, batch: dict[str, Tensor]) -> StatesTarget:
        hidden, _ = supervised(self.embedding[batch["input_ids"]], batch["labels"])
        return StatesTarget(hidden, self.head)

    def require(self, rows: object, loss: object = None) -> None:
        pass


@pytest.fixture
def bigram(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = TeacherKind(
        "bigram",
        matches=lambda source: source.startswith("bigram:"),
        open=lambda source, opener: BigramTeacher(),
        open_tokenizer=lambda source, opener: toy_tokenizer(),
    )
    monkeypatch.setattr(teachers, "KINDS", [kind, *teachers.KINDS])


def distill(teacher: str, *flags: str) -> int:
    write_rows(Path("data.jsonl"), conversations(16))
    command = ["distill", teacher, "student", "--data", "data.jsonl", "--output-dir", "run"]
    return cli.main(
        [*command, "--precision", "fp32", "--device", "cpu", "--max-steps", "8", *flags]
    )


@pytest.mark.parametrize("method", ["logits", "cross"])
@pytest.mark.usefixtures("bigram")
def test_a_new_kind_of_teacher_trains_evaluates_and_reports(
    pair_folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(pair_folder))
    assert distill("bigram:3", "--method", method, "--learning-rate", "0.01") == 0
    evaluation = json.loads((pair_folder / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["kl_nats_per_token"] < evaluation["before"]["kl_nats_per_token"]
    assert evaluation["teacher"]["nll_nats_per_token"] > 0
    assert (pair_folder / "run" / "report.html").is_file()


def squared(
    teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0, power: float = 0.5
) -> Tensor:
    q, p = ((logits / temperature).softmax(-1) for logits in (teacher_logits, student_logits))
    return ((q**power - p**power) ** 2).sum(-1)


@pytest.fixture
def hellinger(monkeypatch: pytest.MonkeyPatch) -> None:
    """One record, with a parameter of its own and no closed form."""
    record = divergences.Divergence(
        "hellinger", squared, parameters=(divergences.Parameter("power", 0.5, "The exponent."),)
    )
    monkeypatch.setitem(divergences.DIVERGENCES, "hellinger", record)


@pytest.mark.usefixtures("hellinger")
def test_a_new_divergence_is_a_name_and_a_flag_of_the_command_line(
    pair_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def recorded(*logits: Tensor, **settings: float) -> Tensor:
        seen.append(settings["power"])
        return squared(*logits, **settings)

    record = divergences.Divergence(
        "hellinger", recorded, parameters=divergences.DIVERGENCES["hellinger"].parameters
    )
    monkeypatch.setitem(divergences.DIVERGENCES, "hellinger", record)
    with pytest.raises(SystemExit):
        cli.main(["distill", "--help"])
    help_text = capsys.readouterr().out
    assert "hellinger" in help_text
    assert "--power" in help_text
    assert distill("teacher", "--divergence", "hellinger", "--power", "0.4") == 0
    assert set(seen) == {0.4}
    config = RunFolder("run").read_config()
    assert config["divergence_parameters"] == {"power": 0.4}


@pytest.mark.usefixtures("hellinger")
def test_a_parameter_out_of_range_is_one_line(
    pair_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("teacher", "--divergence", "hellinger", "--power", "1.5") == 2
    assert "power" in capsys.readouterr().err
    assert not (pair_folder / "run").exists()


def test_skew_and_teacher_weight_are_flags_and_keys_of_yaml(pair_folder: Path) -> None:
    Path("recipe.yaml").write_text("divergence: skew_forward_kl\nskew: 0.3\n")
    assert distill("teacher", "--config", "recipe.yaml") == 0
    assert RunFolder("run").read_config()["divergence_parameters"] == {"skew": 0.3}


def test_a_function_of_the_users_is_a_divergence_of_the_command_line(pair_folder: Path) -> None:
    Path("mine.py").write_text(
        "def mine(teacher_logits, student_logits):\n"
        "    difference = teacher_logits.softmax(-1) - student_logits.softmax(-1)\n"
        "    return difference.square().sum(-1)\n"
    )
    assert distill("teacher", "--divergence", "mine.py:mine") == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_callable_divergence_can_be_saved_in_a_checkpoint(pair_folder: Path) -> None:
    from potstill import DistillationConfig

    config = DistillationConfig("out", divergence=lambda q, p: (q - p).square().sum(-1))
    torch.save(config, "config.pt")
    assert json.loads(config.to_json_string())["divergence"] == "<lambda>"


def test_the_plain_template_is_given_once() -> None:
    from potstill.models import chat_template

    assert PLAIN_CHAT_TEMPLATE is chat_template.PLAIN_CHAT_TEMPLATE


def test_the_python_api_trains_evaluates_and_compares(pair_folder: Path) -> None:
    import potstill

    settings: dict[str, Any] = {"max_steps": 12, "learning_rate": 0.01, "precision": "fp32"}
    run = potstill.distill(
        "teacher", "student", conversations(40), output_dir="run", device="cpu", **settings
    )
    assert run.report.is_file()
    assert len(run.tokenizer)
    assert run.student.num_parameters()
    before, after = run.evaluation_before, run.evaluation
    assert after["kl_nats_per_token"] < before["kl_nats_per_token"]
    held_out = conversations(12)
    one = potstill.evaluate(run.student, "teacher", held_out, tokenizer=run.tokenizer)
    other = potstill.evaluate("student", "teacher", held_out)
    difference = one.compare(other)["kl_nats_per_token"]
    assert difference.value == pytest.approx(one["kl_nats_per_token"] - other["kl_nats_per_token"])
    assert difference.low <= difference.value <= difference.high
    assert "kl_nats_per_token" in str(one)
    with pytest.raises(potstill.errors.DataError, match="different conversations"):
        one.compare(after)


def test_an_unknown_setting_of_the_python_api_names_the_nearest() -> None:
    import potstill
    from potstill.errors import ConfigError

    with pytest.raises(ConfigError, match="max_steps"):
        potstill.distill("teacher", "student", [], max_step=1)
