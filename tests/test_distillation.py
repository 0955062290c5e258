"""Whole runs on tiny models: from a folder to a report, through interrupts, and what is refused before anything is written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.toys import sentencepiece
from conftest import conversations, sentencepiece_tokenizer, tiny_model, toy_tokenizer, write_rows
from potstill import cli
from potstill.commands import COMMANDS
from potstill.distillation import run as pipeline
from potstill.distillation import training as training_stage
from potstill.training.trainer import DistillationTrainer


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """A teacher, a student, and data."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    return pair_folder


def distill(
    *more: str, data: str = "data.jsonl", output: str = "run", student: str = "student"
) -> int:
    flags = [
        "--data",
        data,
        "--output-dir",
        output,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--learning-rate",
        "0.01",
    ]
    return cli.main(["distill", "teacher", student, *flags, *more])


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "student" / "model.safetensors")


@pytest.mark.parametrize("method", ["logits", "text"])
def test_a_run_leaves_student_metrics_evaluation_and_report(
    place: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--method", method, "--max-steps", "8") == 0
    printed = capsys.readouterr().out
    assert "kl_nats_per_token" in printed
    assert "the student" in printed.splitlines()[-3]  # the verdict, before the report's path
    evaluation = json.loads((place / "run" / "evaluation.json").read_text())
    measure = {"logits": "kl_nats_per_token", "text": "nll_nats_per_token"}[method]
    assert evaluation["after"][measure] < evaluation["before"][measure]
    assert evaluation["before"]["ci95"]["bits_per_byte"][0] < evaluation["before"]["bits_per_byte"]
    assert evaluation["samples"][0].keys() == {"prompt", "teacher", "before", "after"}
    assert len((place / "run" / "metrics.jsonl").read_text().splitlines()) == 8
    assert "<html" in (place / "run" / "report.html").read_text()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained("run/student").config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained("run/student").chat_template
    assert "| teacher | teacher |" in (place / "run" / "student" / "README.md").read_text()


def test_a_budget_in_seconds_becomes_a_number_of_steps_that_is_kept(place: Path) -> None:
    assert distill("--seconds", "2") == 0
    config = pipeline.RunFolder("run").read_config()
    assert config["max_steps"] == len((place / "run" / "metrics.jsonl").read_text().splitlines())
    assert distill("--seconds", "2") == 0


@pytest.mark.parametrize("stops_at", [1, 5, 7])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    place: Path, interrupt_at: Any, stops_at: int
) -> None:
    assert distill("--max-steps", "8", output="whole") == 0
    with interrupt_at(stops_at):
        assert distill("--max-steps", "8") == 130
    assert not (place / "run" / "student").exists()
    (place / "run" / "checkpoints" / "checkpoint-99").mkdir(
        parents=True
    )  # one that a kill left half-written
    assert distill("--max-steps", "8") == 0
    assert all(
        torch.equal(tensor, weights("run")[name]) for name, tensor in weights("whole").items()
    )
    assert [
        json.loads(line)["step"]
        for line in (place / "run" / "metrics.jsonl").read_text().splitlines()
    ] == list(range(1, 9))


def test_an_interrupt_in_the_evaluation_loses_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_evaluate_run", interrupt)
        assert distill("--max-steps", "2") == 130
    trained = (place / "run" / "student" / "model.safetensors").stat().st_mtime_ns
    assert distill("--max-steps", "2") == 0
    assert (place / "run" / "student" / "model.safetensors").stat().st_mtime_ns == trained


def test_the_config_of_a_run_repeats_it(place: Path) -> None:
    assert distill("--max-steps", "3") == 0
    assert cli.main(["distill", "--config", "run/config.yaml", "--output-dir", "again"]) == 0
    assert all(
        torch.equal(tensor, weights("again")[name]) for name, tensor in weights("run").items()
    )


def test_different_tokenizers_are_refused_for_logits_and_measured_for_text(
    place: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = model_folder(layers=2)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"!":0', '"?":0')
        .replace('"?":30', '"!":30')
        .replace('"!": 0,', '"?": 0,')
        .replace('"?": 30,', '"!": 30,')
    )
    assert distill("--max-steps", "2", student=str(other)) == 2
    assert (
        "different tokenizers: id 0 is '!' in the teacher's and '?' in the student's"
        in capsys.readouterr().err
    )
    assert not (place / "run").exists()
    assert distill("--max-steps", "2", "--method", "text", student=str(other)) == 0
    evaluation = json.loads((place / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["kl_nats_per_token"] is None
    assert evaluation["after"]["bits_per_byte"] > 0


@pytest.fixture
def other(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student whose tokens are SentencePiece's, in ``other``."""
    monkeypatch.setenv("POTSTILL_CACHE", str(place / "cache"))
    tokenizer = sentencepiece(prepend="first")
    tokenizer.pad_token = tokenizer.eos_token
    student = tiny_model(layers=2, rows=len(tokenizer), seed=1)
    student.generation_config.eos_token_id = student.generation_config.pad_token_id = (
        tokenizer.eos_token_id
    )
    student.save_pretrained(place / "other")
    tokenizer.save_pretrained(place / "other")
    return place / "other"


def test_no_bar_is_drawn_for_who_wants_none(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--max-steps", "2", "--trainer", '{"disable_tqdm": true}') == 0
    assert "2/2" not in capsys.readouterr().err


@pytest.mark.parametrize("alignment", ["pieces", "uld"])
def test_a_student_with_other_tokens_learns_by_cross(
    place: Path, other: Path, alignment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        distill("--method", "cross", "--alignment", alignment, "--max-steps", "8", student="other")
        == 0
    )
    assert "the teacher has a target for" in capsys.readouterr().out
    evaluation = json.loads((place / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["bits_per_byte"] < evaluation["before"]["bits_per_byte"]
    assert evaluation["after"]["kl_nats_per_token"] is None
    assert (
        f"| method | cross, {alignment} |" in (place / "run" / "student" / "README.md").read_text()
    )
    assert pipeline.RunFolder("run").read_config()["alignment"] == alignment


def test_a_budget_in_seconds_and_an_interrupt_work_across_tokenizers(
    place: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_evaluate_run", interrupted)
        assert distill("--method", "cross", "--seconds", "1", student="other") == 130
    assert distill("--method", "cross", "--seconds", "1", student="other") == 0


def test_data_that_nothing_can_be_aligned_in_is_one_error(
    place: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "a <|im_end|> b"}]
    write_rows(place / "odd.jsonl", [{"messages": turns}] * 4)
    assert distill("--method", "cross", "--max-steps", "2", data="odd.jsonl", student="other") == 2
    assert "the tokenizers read different bytes in 3" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_cross_between_identical_tokenizers_works_and_says_that_logits_is_cheaper(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(place / "cache"))
    assert distill("--method", "cross", "--max-steps", "4") == 0
    assert "--method logits is cheaper" in capsys.readouterr().out
    evaluation = json.loads((place / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["kl_nats_per_token"] < evaluation["before"]["kl_nats_per_token"]


def test_evaluate_prints_a_table_or_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "evaluate",
        "student",
        "--teacher",
        "teacher",
        "--data",
        "data.jsonl",
        "--precision",
        "fp32",
    ]
    assert cli.main(arguments) == 0
    assert "kl_nats_per_token" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["teacher"]["top1_agreement"] == 1.0


def test_student_cuts_layers_and_refuses_a_folder_that_is_not_empty(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["student", "teacher", "--output-dir", "cut", "--keep-layers", "0,3"]) == 0
    assert json.loads((place / "cut" / "config.json").read_text())["num_hidden_layers"] == 2
    assert cli.main(["student", "teacher", "--output-dir", "cut"]) == 2
    assert "cut: not empty" in capsys.readouterr().err


def test_a_student_with_another_tokenizer_is_made_whole_or_not_at_all(
    place: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sentencepiece_tokenizer().save_pretrained("words")  # a folder with no model in it
    assert cli.main(["student", "teacher", "--output-dir", "changed", "--tokenizer", "words"]) == 0
    assert "gets the plain one" in capsys.readouterr().out
    config = json.loads((place / "changed" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4  # all: only what was asked for is changed
    assert (config["vocab_size"], config["eos_token_id"]) == (len(sentencepiece_tokenizer()), 2)
    card = (place / "changed" / "README.md").read_text()
    assert "| tokenizer | words |" in card
    assert "the mean of several" in card
    assert (
        cli.main(
            [
                "student",
                "teacher",
                "--output-dir",
                "both",
                "--tokenizer",
                "words",
                "--keep-layers",
                "2",
            ]
        )
        == 0
    )
    assert json.loads((place / "both" / "config.json").read_text())["num_hidden_layers"] == 2
    qwen = str(model_folder(family="qwen2"))
    assert cli.main(["student", qwen, "--output-dir", "misread", "--tokenizer", "words"]) == 2
    assert "misreads the new tokenizer" in capsys.readouterr().err
    assert not (place / "misread").exists()
    assert distill("--method", "text", "--max-steps", "2", student="changed") == 0


def bad(place: Path, name: str) -> list[str]:
    """Arguments that cannot work, by what is wrong with them."""
    write_rows(place / "prompts.jsonl", [{"prompt": "x"}])
    write_rows(place / "long.jsonl", [{"prompt": "the rain " * 50, "completion": "on"}] * 3)
    write_rows(place / "one.jsonl", conversations(1))
    (place / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (place / "bad.yaml").write_text("lerning_rate: 1\n")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("mine")
    bare = toy_tokenizer(chat_template=None)
    (place / "bare").mkdir()
    for file in (place / "student").iterdir():
        (place / "bare" / file.name).write_bytes(file.read_bytes())
    for file in (place / "bare").glob("*.jinja"):
        file.unlink()
    bare.save_pretrained(place / "bare")
    common = ["teacher", "student", "--output-dir", "run", "--max-steps", "2"]
    return {
        "missing data": ["distill", *common, "--data", "none.jsonl"],
        "broken row": ["distill", *common, "--data", "broken.jsonl"],
        "prompts only": ["distill", *common, "--data", "prompts.jsonl"],
        "nothing fits": ["distill", *common, "--data", "long.jsonl", "--max-length", "20"],
        "one conversation": ["distill", *common, "--data", "one.jsonl"],
        "no template": ["distill", "teacher", "bare", *common[2:], "--data", "data.jsonl"],
        "no such layer": ["student", "teacher", "--output-dir", "run", "--keep-layers", "0,9"],
        "layers not numbers": [
            "student",
            "teacher",
            "--output-dir",
            "run",
            "--keep-layers",
            "some",
        ],
        "unknown key": ["distill", "--config", "bad.yaml"],
        "unknown flag": ["distill", *common, "--data", "data.jsonl", "--lerning-rate", "1"],
        "unknown command": ["destill"],
        "missing flag": ["distill", "teacher", "student"],
        "wrong type": ["distill", *common, "--data", "data.jsonl", "--learning-rate", "fast"],
        "unknown trainer setting": [
            "distill",
            *common,
            "--data",
            "data.jsonl",
            "--trainer",
            '{"optimiser": "sgd"}',
        ],
        "bad trainer setting": [
            "distill",
            *common,
            "--data",
            "data.jsonl",
            "--trainer",
            '{"save_strategy": "never"}',
        ],
        "unknown method": ["distill", *common, "--data", "data.jsonl", "--method", "osmosis"],
        "unknown alignment": [
            "distill",
            *common,
            "--data",
            "data.jsonl",
            "--method",
            "cross",
            "--alignment",
            "stars",
        ],
        "unknown precision": ["distill", *common, "--data", "data.jsonl", "--precision", "fp12"],
        "absent model": ["distill", "nobody/nothing", *common[1:], "--data", "data.jsonl"],
        "folder not empty": [
            "distill",
            *common[:2],
            "--output-dir",
            "full",
            "--data",
            "data.jsonl",
        ],
        "not a run": ["report", "full"],
    }[name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing data", "none.jsonl: cannot be read"),
        ("broken row", "broken.jsonl:2: not JSON"),
        ("prompts only", "let the teacher answer first"),
        ("nothing fits", "nothing to learn"),
        ("one conversation", "no conversation is left to hold out"),
        ("no template", "--chat-template plain"),
        ("no such layer", "numbered 0 to 3"),
        ("layers not numbers", "give a number (8), a list (0,1,5,9), half or all"),
        ("unknown key", "did you mean learning_rate?"),
        ("unknown flag", "did you mean --learning-rate?"),
        ("unknown command", "did you mean distill?"),
        ("missing flag", "needs --data, --output-dir"),
        ("wrong type", "learning"),
        ("unknown trainer setting", "trainer.optimiser"),
        ("bad trainer setting", "check save_strategy"),
        ("unknown method", "osmosis"),
        (
            "unknown alignment",
            "alignment 'stars' is not known; use one of pieces, cells, push_forward",
        ),
        ("unknown precision", "fp12"),
        ("absent model", "not in the hub's cache"),
        ("folder not empty", "full: not empty"),
        ("not a run", "full"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    arguments = bad(place, name)
    there = sorted(place.rglob("*"))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("potstill:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in error
    assert sorted(place.rglob("*")) == there


def test_another_setting_in_a_begun_run_is_refused_by_name(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--max-steps", "2") == 0
    assert distill("--max-steps", "2", "--temperature", "2") == 2
    assert "holds a run with temperature 1.0, not 2.0" in capsys.readouterr().err


def test_a_full_disk_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "run/student/model.safetensors")

    monkeypatch.setattr(training_stage, "save_student", full)
    assert distill("--max-steps", "2") == 2
    assert "run/student/model.safetensors: No space left on device" in capsys.readouterr().err
    assert not (place / "run" / "student").exists()
    assert not list((place / "run").glob("*unfinished*"))


def test_help_explains_every_flag_in_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit_status:
            cli.main([command, "--help"])
        assert exit_status.value.code == 0
    printed = capsys.readouterr().out
    assert "--learning-rate" in printed
    assert "Peak learning rate" in printed
    assert "--output_dir" not in printed


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`potstill` in two processes on this machine, by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={port}",
        "-m",
        "potstill",
    ]
    return subprocess.run(
        [*torchrun, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_two_processes_train_the_student_of_one_with_twice_the_batch(
    place: Path, model_folder: Callable[..., Path], tied: bool
) -> None:
    """DDP, over gloo: the loss is divided by the tokens of both, and one of them writes."""
    student = str(model_folder(layers=2, tied=tied))
    write_rows(
        place / "train.jsonl", conversations(24)
    )  # six whole steps: of the last, two processes would make a whole one
    flags = [
        "--data",
        "train.jsonl",
        "--eval-data",
        "data.jsonl",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--learning-rate",
        "0.01",
        "--max-steps",
        "6",
    ]
    done = launched(
        "distill", "teacher", student, *flags, "--batch-size", "2", "--output-dir", "two"
    )
    assert done.returncode == 0, done.stderr
    assert (
        cli.main(
            ["distill", "teacher", student, *flags, "--batch-size", "4", "--output-dir", "one"]
        )
        == 0
    )
    for name, tensor in weights("one").items():
        torch.testing.assert_close(weights("two")[name], tensor, rtol=1e-3, atol=1e-5)
    rows = [
        [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, 7))
    assert rows[0][-1]["tokens"] == pytest.approx(
        rows[1][-1]["tokens"], rel=0.05
    )  # a packed line is counted with its padding
    assert [row["loss"] for row in rows[0]] == pytest.approx(
        [row["loss"] for row in rows[1]], rel=1e-3
    )
    assert done.stdout.count("report:") == 1
    again = launched(
        "distill", "teacher", student, *flags, "--batch-size", "2", "--output-dir", "two"
    )
    assert again.returncode == 0, again.stderr
    refused = launched("generate", "teacher", "--prompts", "data.jsonl", "--output-dir", "answers")
    assert "generate runs in one process" in refused.stderr


def test_data_that_changed_since_a_run_began_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_evaluate_run", interrupt)
        assert distill("--max-steps", "2") == 130
    before = (place / "data.jsonl").read_text()
    write_rows(place / "data.jsonl", conversations(19))
    assert distill("--max-steps", "2") == 2
    assert "have changed since it began" in capsys.readouterr().err
    (place / "data.jsonl").write_text(before)
    assert (
        distill("--max-steps", "2", "--device", "auto") == 0
    )  # where it is computed is no other run
    assert distill("--max-steps", "2", "--tasks", "questions.jsonl") == 2
    assert "measured with other tasks" in capsys.readouterr().err


def test_the_recipe_says_how_often_a_checkpoint_is_kept(place: Path) -> None:
    assert distill("--max-steps", "4", "--trainer", '{"save_steps": 3}') == 0
    assert sorted(path.name for path in (place / "run" / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]


@pytest.mark.parametrize(
    "flag",
    [
        "--batch-size",
        "--max-steps",
        "--seconds",
        "--gradient-accumulation-steps",
        "--max-length",
        "--eval-steps",
    ],
)
def test_nought_is_no_number_of_anything(
    place: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(flag, "0") == 2
    assert "must be above 0" in capsys.readouterr().err
    assert distill("--trainer", '{"eval_strategy": "steps"}') == 2
    assert "give eval_steps instead" in capsys.readouterr().err


def test_the_held_out_loss_is_watched_while_training(place: Path) -> None:
    assert distill("--max-steps", "8", "--eval-steps", "0.25") == 0
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    watched = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(watched) == [2, 4, 6, 8]
    evaluation = json.loads((place / "run" / "evaluation.json").read_text())
    assert watched[8] == pytest.approx(evaluation["after"]["kl_nats_per_token"], rel=1e-3)
    assert "Dashed: the loss on held-out text" in (place / "run" / "report.html").read_text()


def test_half_a_line_of_metrics_does_not_stop_a_resumed_run(place: Path, interrupt_at: Any) -> None:
    with interrupt_at(3):
        assert distill("--max-steps", "4") == 130
    with (place / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert distill("--max-steps", "4") == 0
    assert [
        json.loads(line)["step"]
        for line in (place / "run" / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 4]


def test_a_full_memory_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(DistillationTrainer, "training_step", full)
    assert distill("--max-steps", "2") == 2
    assert "lower --batch-size" in capsys.readouterr().err.splitlines()[-1]
