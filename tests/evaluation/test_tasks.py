"""Tasks of lm-evaluation-harness, on tiny models and without a network."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CHATML, conversations, tiny_model, toy_tokenizer
from potstill import cli
from potstill.distillation import run as pipeline
from potstill.errors import ConfigError, DataError
from potstill.evaluation import Tasks, tasks

ABSENT = importlib.util.find_spec("lm_eval") is None
with_harness = [
    pytest.mark.slow,
    pytest.mark.skipif(ABSENT, reason="needs lm-eval"),
    pytest.mark.filterwarnings("default"),  # the harness's own
]
CHOICES = ["the rain", "in", "on the ra", "a tin", "rain on"]


def harness(test: Any) -> Any:
    for mark in with_harness:
        test = mark(test)
    return test


@pytest.fixture
def choices(tmp_path: Path) -> str:
    rows = [
        {"question": f"{number} the?", "choices": CHOICES, "answer": number % 5}
        for number in range(25)
    ]
    return write(tmp_path / "choices.jsonl", rows)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def likelihood(model: Any, tokenizer: Any, context: str, text: str) -> float:
    start = len(
        tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]
    )  # the harness counts blanks to what follows
    ids = torch.tensor([tokenizer(context + text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    return float(scores.gather(-1, ids[0, 1:, None])[start - 1 :].sum())


@harness
@pytest.mark.parametrize("template", [CHATML, None])
def test_accuracy_is_the_share_of_questions_whose_answer_is_most_likely(
    tmp_path: Path, template: str | None
) -> None:
    model, tokenizer = tiny_model(), toy_tokenizer(chat_template=template)
    asked = (
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        if template
        else "Question: {}\nAnswer:"
    )
    rows, per_byte = [], 0
    for number in range(25):
        question = f"{number} the?"
        texts = [one if template else f" {one}" for one in CHOICES]
        scores = [likelihood(model, tokenizer, asked.format(question), text) for text in texts]
        likeliest = scores.index(max(scores))
        answer = likeliest if number < 10 else (likeliest + 1) % len(CHOICES)
        lengths = [score / len(one) for score, one in zip(scores, CHOICES, strict=True)]
        per_byte += lengths.index(max(lengths)) == answer
        rows.append({"question": question, "choices": CHOICES, "answer": answer})
    file = write(tmp_path / "choices.jsonl", rows)
    measured = Tasks(file).measure(model, tokenizer)[file]
    assert (measured["questions"], measured["acc"], measured["acc_norm"]) == pytest.approx(
        (25, 0.4, per_byte / 25)
    )
    assert measured["stderr"]["acc"] == pytest.approx((0.4 * 0.6 / 24) ** 0.5)


@harness
def test_a_generated_answer_counts_if_it_is_correct(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), toy_tokenizer()
    weight = model.get_output_embeddings().weight
    wanted = tokenizer("rain", add_special_tokens=False)["input_ids"]
    assert len(wanted) == 1
    with torch.no_grad():  # generates only rain
        model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros_like(weight))
        model.get_output_embeddings().bias = torch.nn.Parameter(
            torch.zeros(len(weight)).index_fill(0, torch.tensor(wanted), 9.0)
        )
    rows = [
        {"question": "what falls?", "answer": answer}
        for answer in ("rainrain", "rain" * 64, "sun", "rain" * 64)
    ]
    file = write(tmp_path / "words.jsonl", rows)
    measured = Tasks(file).measure(model, tokenizer)[file]
    assert (measured["questions"], measured["exact_match"], measured["contains"]) == (4, 0.5, 0.5)


@harness
def test_a_run_with_tasks_keeps_them_of_teacher_before_and_after(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    choices: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pipeline, "SAMPLE_TOKENS", 4)
    teacher, student = str(model_folder()), str(model_folder(layers=2, seed=1))
    data, run = write(tmp_path / "data.jsonl", conversations(20)), tmp_path / "run"
    common = ["--data", data, "--device", "cpu", "--precision", "fp32", "--tasks", choices]
    assert (
        cli.main(
            ["distill", teacher, student, *common, "--max-steps", "2", "--output-dir", str(run)]
        )
        == 0
    )
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["tasks"].keys() == {"teacher", "before", "after"}
    assert all(evaluation["tasks"][who][choices]["questions"] == 25 for who in evaluation["tasks"])
    assert (run / "report.html").is_file()
    capsys.readouterr()
    assert cli.main(["evaluate", str(run / "student"), "--teacher", teacher, *common]) == 0
    after = evaluation["tasks"]["after"][choices]["acc"]
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{choices} acc ")
    )
    assert f"{after:.4f}" in line


@harness
def test_an_unknown_task_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError,
        match=r"arc_eazy: not a \.jsonl file, nor a task of lm-eval's \(did you mean arc_easy\?\)",
    ):
        Tasks("arc_eazy")


@harness
def test_a_task_whose_data_cannot_be_loaded_is_an_error() -> None:
    with pytest.raises(DataError, match="--tasks arc_easy: its data cannot be loaded"):
        Tasks("arc_easy")


def test_without_the_harness_tasks_are_refused_and_nothing_is_written(
    tmp_path: Path,
    choices: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    arguments = [
        "teacher",
        "student",
        "--data",
        "data.jsonl",
        "--output-dir",
        str(tmp_path / "run"),
        "--tasks",
        choices,
    ]
    assert cli.main(["distill", *arguments]) == 2
    assert (
        capsys.readouterr().err
        == "potstill: --tasks needs the package lm-eval: pip install 'potstill[lm-eval]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_no_tasks_measure_nothing() -> None:
    assert Tasks(None).measure(None, None) == {}
