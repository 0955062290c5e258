"""Held-out data are held out: no prompt is on both sides, and what leaks is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import conversations, write_rows
from potstill import cli
from potstill.distillation import DistillSettings, split_data
from potstill.errors import ConfigError, DataError


def answers(prompts: int, each: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What about number {i}?", "completion": f"answer {j} to {i}"}
        for i in range(prompts)
        for j in range(each)
    ]


def settings(data: Path, **more: Any) -> DistillSettings:
    return DistillSettings("teacher", "student", str(data), "run", **more)


def prompts(rows: list[dict[str, Any]]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_all_answers_to_a_prompt_are_on_one_side(tmp_path: Path, each: int, seed: int) -> None:
    write_rows(tmp_path / "data.jsonl", answers(50, each))
    training, held_out = split_data(settings(tmp_path / "data.jsonl", seed=seed))
    assert not prompts(training) & prompts(held_out)
    assert len(training) + len(held_out) == 50 * each
    assert 5 * each <= len(held_out) < 5 * each + each
    assert (training, held_out) == split_data(settings(tmp_path / "data.jsonl", seed=seed))


@pytest.mark.parametrize("rows", [answers(1, 8), answers(1, 1)])
def test_one_prompt_cannot_be_split(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=r"left to hold out .* with 1 different prompts\)"):
        split_data(settings(tmp_path / "data.jsonl"))


@pytest.mark.parametrize("share", [0, 1, -0.1, 7, float("nan")])
def test_a_share_outside_0_and_1_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="eval_fraction .*: must be between 0 and 1"):
        settings(tmp_path, eval_fraction=share).check()


def test_prompts_of_the_evaluation_that_are_trained_on_are_counted(
    pair_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("data.jsonl"), conversations(12))
    question = "Which of the seven rivers of the old country is the longest one"
    twins = [{"prompt": question + end, "completion": "the rain"} for end in ("?", " ?")]
    other = [{"prompt": "Why is snow white in winter and in the north?", "completion": "in the"}]
    write_rows(Path("train.jsonl"), [*conversations(12), twins[0]])
    write_rows(Path("eval.jsonl"), [conversations(12)[3], twins[1], *other])
    given = ["--data", "train.jsonl", "--eval-data", "eval.jsonl", "--output-dir", "run"]
    more = ["--max-steps", "1", "--precision", "fp32", "--device", "cpu"]
    assert cli.main(["distill", "teacher", "student", *given, *more]) == 0
    assert "of 3 held-out prompts, 1 are also in the training data, and 2 are there in nearly" in (
        capsys.readouterr().out
    )


def test_a_split_that_a_file_does_not_have_is_not_read_as_its_training_data(
    pair_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(pair_folder / "data.jsonl", conversations(20))
    arguments = ["distill", "teacher", "student", "--data", "data.jsonl", "--output-dir", "run"]
    assert cli.main([*arguments, "--eval-split", "test", "--max-steps", "2"]) == 2
    assert "data.jsonl: a file has no split 'test'" in capsys.readouterr().err
