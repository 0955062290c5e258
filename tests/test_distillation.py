"""Whole runs of tiny models: their files, interrupts, two tokenizers and two processes.

Bad input is tested in test_distillation_errors.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.toys import sentencepiece
from conftest import conversations, sentencepiece_tokenizer, tiny_model, write_rows
from potstill import cli
from potstill.commands import COMMANDS
from potstill.distillation import run as pipeline
from potstill.run_folder import RunFolder

FAST = shlex.split("--device cpu --precision fp32 --learning-rate 0.01")


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """Make a teacher, a student and data."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    return pair_folder


def distill(
    *more: str, data: str = "data.jsonl", output: str = "run", student: str = "student"
) -> int:
    return cli.main(
        ["distill", "teacher", student, "--data", data, "--output-dir", output, *FAST, *more]
    )


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "student" / "model.safetensors")


def same_weights(one: str, other: str) -> bool:
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def evaluation_of_run() -> dict[str, Any]:
    return json.loads(Path("run/evaluation.json").read_text())


def metrics(run: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def interrupted_evaluation() -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_evaluate_run", interrupt)
        yield


@pytest.mark.parametrize("method", ["logits", "text"])
def test_a_run_leaves_student_metrics_evaluation_and_report(
    place: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--method", method, "--max-steps", "8") == 0
    printed = capsys.readouterr().out
    assert "kl_nats_per_token" in printed
    assert "the student" in printed.splitlines()[-3]  # the verdict, before the report's path
    evaluation = evaluation_of_run()
    measure = {"logits": "kl_nats_per_token", "text": "nll_nats_per_token"}[method]
    assert evaluation["after"][measure] < evaluation["before"][measure]
    assert evaluation["before"]["ci95"]["bits_per_byte"][0] < evaluation["before"]["bits_per_byte"]
    assert evaluation["samples"][0].keys() == {"prompt", "teacher", "before", "after"}
    assert len(metrics()) == 8
    assert "<html" in (place / "run" / "report.html").read_text()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained("run/student").config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained("run/student").chat_template
    assert "| teacher | teacher |" in (place / "run" / "student" / "README.md").read_text()


def test_a_budget_in_seconds_becomes_a_number_of_steps_that_is_kept(place: Path) -> None:
    assert distill("--seconds", "2") == 0
    config = pipeline.RunFolder("run").read_config()
    assert config["max_steps"] == len(metrics())
    assert distill("--seconds", "2") == 0


@pytest.mark.parametrize("stops_at", [1, 5, 7])
def test_an_interrupted_run_continues_and_ends_with_the_same_weights(
    place: Path, interrupt_at: Any, stops_at: int
) -> None:
    assert distill("--max-steps", "8", output="whole") == 0
    with interrupt_at(stops_at):
        assert distill("--max-steps", "8") == 130
    assert not (place / "run" / "student").exists()
    incomplete = place / "run" / "checkpoints" / "checkpoint-99"  # as after a kill while writing
    incomplete.mkdir(parents=True)
    assert distill("--max-steps", "8") == 0
    assert same_weights("whole", "run")
    assert [row["step"] for row in metrics()] == list(range(1, 9))


def test_an_interrupt_during_evaluation_does_not_train_again(place: Path) -> None:
    with interrupted_evaluation():
        assert distill("--max-steps", "2") == 130
    trained = (place / "run" / "student" / "model.safetensors").stat().st_mtime_ns
    assert distill("--max-steps", "2") == 0
    assert (place / "run" / "student" / "model.safetensors").stat().st_mtime_ns == trained


def test_the_config_of_a_run_gives_the_same_weights_again(place: Path) -> None:
    assert distill("--max-steps", "3") == 0
    assert cli.main(["distill", "--config", "run/config.yaml", "--output-dir", "again"]) == 0
    assert same_weights("run", "again")


def test_different_tokenizers_are_refused_by_logits_and_accepted_by_text(
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
    message = "different tokenizers: id 0 is '!' in the teacher's and '?' in the student's"
    assert message in capsys.readouterr().err
    assert not (place / "run").exists()
    assert distill("--max-steps", "2", "--method", "text", student=str(other)) == 0
    evaluation = evaluation_of_run()
    assert evaluation["after"]["kl_nats_per_token"] is None
    assert evaluation["after"]["bits_per_byte"] > 0


@pytest.fixture
def other(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a student with a SentencePiece tokenizer in the folder ``other``."""
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


def test_disable_tqdm_hides_the_progress_bar(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--max-steps", "2", "--trainer", '{"disable_tqdm": true}') == 0
    assert "2/2" not in capsys.readouterr().err


@pytest.mark.parametrize("alignment", ["pieces", "uld"])
def test_a_student_with_another_tokenizer_learns_by_cross(
    place: Path, other: Path, alignment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ["--method", "cross", "--alignment", alignment]
    assert distill(*method, "--max-steps", "8", student="other") == 0
    assert "the teacher has a target for" in capsys.readouterr().out
    evaluation = evaluation_of_run()
    assert evaluation["after"]["bits_per_byte"] < evaluation["before"]["bits_per_byte"]
    assert evaluation["after"]["kl_nats_per_token"] is None
    card = (place / "run" / "student" / "README.md").read_text()
    assert f"| method | cross, {alignment} |" in card
    assert pipeline.RunFolder("run").read_config()["alignment"] == alignment


def test_a_budget_in_seconds_and_an_interrupt_work_across_tokenizers(
    place: Path, other: Path
) -> None:
    with interrupted_evaluation():
        assert distill("--method", "cross", "--seconds", "1", student="other") == 130
    assert distill("--method", "cross", "--seconds", "1", student="other") == 0


def test_data_in_which_nothing_can_be_aligned_is_one_error(
    place: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"on {i}", "completion": "a <|im_end|> b"} for i in range(4)]
    write_rows(place / "odd.jsonl", rows)
    assert distill("--method", "cross", "--max-steps", "2", data="odd.jsonl", student="other") == 2
    assert "the tokenizers read different bytes in 3" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_cross_with_equal_tokenizers_works_and_recommends_logits(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(place / "cache"))
    assert distill("--method", "cross", "--max-steps", "4") == 0
    assert "--method logits is cheaper" in capsys.readouterr().out
    evaluation = evaluation_of_run()
    assert evaluation["after"]["kl_nats_per_token"] < evaluation["before"]["kl_nats_per_token"]


def test_evaluate_prints_a_table_or_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split("evaluate student --teacher teacher --data data.jsonl --precision fp32")
    assert cli.main(arguments) == 0
    assert "kl_nats_per_token" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["teacher"]["top1_agreement"] == 1.0


def test_student_keeps_the_chosen_layers_and_refuses_a_folder_that_is_not_empty(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["student", "teacher", "--output-dir", "cut", "--keep-layers", "0,3"]) == 0
    assert json.loads((place / "cut" / "config.json").read_text())["num_hidden_layers"] == 2
    assert cli.main(["student", "teacher", "--output-dir", "cut"]) == 2
    assert "cut: not empty" in capsys.readouterr().err


def test_student_changes_the_tokenizer_or_writes_nothing(
    place: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sentencepiece_tokenizer().save_pretrained("words")  # a folder without a model
    assert cli.main(["student", "teacher", "--output-dir", "changed", "--tokenizer", "words"]) == 0
    assert "gets the plain one" in capsys.readouterr().out
    config = json.loads((place / "changed" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4  # all layers are kept
    assert (config["vocab_size"], config["eos_token_id"]) == (len(sentencepiece_tokenizer()), 2)
    card = (place / "changed" / "README.md").read_text()
    assert "| tokenizer | words |" in card
    assert "the mean of several" in card
    both = "student teacher --output-dir both --tokenizer words --keep-layers 2"
    assert cli.main(shlex.split(both)) == 0
    assert json.loads((place / "both" / "config.json").read_text())["num_hidden_layers"] == 2
    qwen = str(model_folder(family="qwen2"))
    assert cli.main(["student", qwen, "--output-dir", "misread", "--tokenizer", "words"]) == 2
    assert "misreads the new tokenizer" in capsys.readouterr().err
    assert not (place / "misread").exists()
    assert distill("--method", "text", "--max-steps", "2", student="changed") == 0


def test_help_lists_flags_with_dashes_and_explains_them(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit_status:
            cli.main([command, "--help"])
        assert exit_status.value.code == 0
    printed = capsys.readouterr().out
    assert "--learning-rate" in printed
    assert "Peak learning rate" in printed
    assert "--output_dir" not in printed


FSDP = Path(__file__).parent / "fsdp_on_cpu.py"
SHARDED = """
trainer:
  fsdp: full_shard
  fsdp_config: {version: 2, transformer_layer_cls_to_wrap: [LlamaDecoderLayer]}
"""

ZERO = """
trainer:
  deepspeed:
    zero_optimization: {{stage: {stage}}}
    zero_allow_untested_optimizer: true
    train_batch_size: auto
    train_micro_batch_size_per_gpu: auto
    gradient_accumulation_steps: auto
    gradient_clipping: auto
"""


def in_two_processes(
    *arguments: str, program: str = "-m potstill"
) -> subprocess.CompletedProcess[str]:
    """Run `potstill` in two processes on this machine with torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = f"-m torch.distributed.run --nproc-per-node=2 --master-port={port} {program}"
    return subprocess.run(
        [sys.executable, *shlex.split(torchrun), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_two_processes_train_the_same_student_as_one_with_twice_the_batch(
    place: Path, model_folder: Callable[..., Path], tied: bool
) -> None:
    """DDP over gloo divides the loss by the tokens of both processes; only one process writes."""
    student = str(model_folder(layers=2, tied=tied))
    # Six full steps of 4: two processes would fill up an incomplete last step.
    write_rows(place / "train.jsonl", conversations(24))
    data = shlex.split("--data train.jsonl --eval-data data.jsonl --max-steps 6")
    command = ["distill", "teacher", student, *data, *FAST]
    in_two = [*command, "--batch-size", "2", "--output-dir", "two"]
    done = in_two_processes(*in_two)
    assert done.returncode == 0, done.stderr
    assert cli.main([*command, "--batch-size", "4", "--output-dir", "one"]) == 0
    for name, tensor in weights("one").items():
        torch.testing.assert_close(weights("two")[name], tensor, rtol=1e-3, atol=1e-5)
    two, one = metrics("two"), metrics("one")
    assert [row["step"] for row in two] == list(range(1, 7))
    # The counts include the padding of packed rows, so they are not exactly equal.
    assert two[-1]["tokens"] == pytest.approx(one[-1]["tokens"], rel=0.05)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)
    assert done.stdout.count("report:") == 1
    again = in_two_processes(*in_two)
    assert again.returncode == 0, again.stderr
    refused = in_two_processes(
        "generate", "teacher", "--prompts", "data.jsonl", "--output-dir", "answers"
    )
    assert "generate runs in one process" in refused.stderr


ON_POLICY = shlex.split("--on-policy 0.5 --rollout-tokens 8 --batch-size 2 --rollout-reuse 2")


@pytest.mark.parametrize("method", ["logits", "cross"])
def test_an_on_policy_run_ends_where_an_uninterrupted_one_ends_and_is_shown(
    place: Path, interrupt_at: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(place / "cache"))
    more = (*ON_POLICY, "--method", method, "--max-steps", "12", "--rollout-size", "4")
    assert distill(*more, output="whole") == 0
    with interrupt_at(7):
        assert distill(*more) == 130
    assert distill(*more) == 0
    assert same_weights("run", "whole")
    for name in ("rollout_entropy", "on_policy_loss", "off_policy_loss"):
        logged = [[row[name] for row in metrics(run) if name in row] for run in ("run", "whole")]
        assert logged[0] == logged[1] != []
    page = Path("run/report.html").read_text()
    for quantity in ("on the student’s own answers", "those that end", "repetition"):
        assert quantity in page or quantity.replace("’", "&#39;") in page
    after = evaluation_of_run()["after"]
    assert after["own_kl_nats_per_token"] > 0
    assert 0 <= after["own_ended"] <= 1
    assert after["ci95"]["own_kl_nats_per_token"]


def test_a_budget_in_seconds_counts_rounds_of_rollouts(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(*ON_POLICY, "--on-policy-from", "0.5", "--seconds", "1.5") == 0
    assert "1.5 seconds are about" in capsys.readouterr().out
    assert any("rollout_tokens" in row for row in metrics())


def test_on_policy_with_a_capture_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = ["capture", "teacher", "--data", "data.jsonl", "--output-dir", "captured"]
    assert cli.main([*capture, "--device", "cpu", "--precision", "fp32"]) == 0
    command = ["distill", "captured", "student", "--data", "data.jsonl", "--output-dir", "run"]
    assert cli.main([*command, *FAST, *ON_POLICY]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "cannot" not in line or "capture" in line
    assert "give the teacher itself" in line
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_student_that_fsdp_shards_is_the_same(
    place: Path, model_folder: Callable[..., Path], tied: bool
) -> None:
    """With a nested setting, continued, and with steps timed before."""
    (place / "fsdp.yaml").write_text(SHARDED)
    student = str(model_folder(layers=2, tied=tied))
    write_rows(place / "train.jsonl", conversations(24))
    data = shlex.split("--data train.jsonl --eval-data data.jsonl")
    command = ["distill", "teacher", student, *data, *FAST]
    sharded = [*command, "--batch-size", "2", "--config", "fsdp.yaml", "--output-dir", "two"]
    for more in (("--max-steps", "4"), ("--max-steps", "4")):  # again: it is finished
        done = in_two_processes(*sharded, *more, program=str(FSDP))
        assert done.returncode == 0, done.stderr
    one = [*command, "--batch-size", "4", "--max-steps", "4", "--output-dir", "one"]
    assert cli.main(one) == 0
    assert weights("two").keys() == weights("one").keys()
    for name, tensor in weights("one").items():
        torch.testing.assert_close(weights("two")[name], tensor, rtol=1e-3, atol=1e-6)
    budget = [*sharded[:-1], "timed", "--seconds", "1"]
    done = in_two_processes(*budget, program=str(FSDP))
    assert done.returncode == 0, done.stderr
    assert metrics("timed")[-1]["loss"] < metrics("timed")[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_student_that_deepspeed_shards_is_the_same(
    place: Path, model_folder: Callable[..., Path], tied: bool, stage: int
) -> None:
    """Regression: under ZeRO 3 the head had no weight outside of the model's forward."""
    pytest.importorskip("deepspeed")
    (place / "zero.yaml").write_text(ZERO.format(stage=stage))
    student = str(model_folder(layers=2, tied=tied))
    write_rows(place / "train.jsonl", conversations(24))
    data = shlex.split("--data train.jsonl --eval-data data.jsonl --max-steps 4")
    command = ["distill", "teacher", student, *data, *FAST]
    sharded = [*command, "--batch-size", "2", "--config", "zero.yaml", "--output-dir", "two"]
    done = in_two_processes(*sharded)
    assert done.returncode == 0, done.stderr
    assert cli.main([*command, "--batch-size", "4", "--output-dir", "one"]) == 0
    assert weights("two").keys() == weights("one").keys()
    for name, tensor in weights("one").items():
        torch.testing.assert_close(weights("two")[name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_run_does_not_continue_with_another_number_of_processes(
    place: Path, capsys: pytest.CaptureFixture[str], interrupt_at: Any
) -> None:
    more = shlex.split("--max-steps 8 --batch-size 2")
    with interrupt_at(5):
        assert distill(*more) == 130
    command = ["distill", "teacher", "student", "--data", "data.jsonl", "--output-dir", "run"]
    refused = in_two_processes(*command, *FAST, *more)
    assert refused.returncode != 0
    assert "began with 1 processes" in refused.stderr
    assert distill(*more) == 0


def test_a_checkpoint_needs_the_files_of_all_processes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (2, 4):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        names = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"]
        for name in names[: 3 if step == 2 else 2]:
            (folder / name).touch()
    assert run.last_checkpoint(processes=2) == run.checkpoints / "checkpoint-2"
    assert not (run.checkpoints / "checkpoint-4").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["-m potstill", str(FSDP)], ids=["DDP", "FSDP 2"])
def test_two_processes_write_and_learn_the_same_as_one(place: Path, program: str) -> None:
    """Each answers half of the prompts, with the random numbers that one process would use."""
    (place / "none.yaml").write_text(SHARDED if program == str(FSDP) else "{}")
    write_rows(place / "train.jsonl", conversations(24))
    data = shlex.split("--data train.jsonl --eval-data data.jsonl --max-steps 4")
    own = shlex.split("--on-policy 1 --rollout-reuse 1 --rollout-tokens 8")
    command = ["distill", "teacher", "student", *data, *FAST, *own]
    in_two = [*command, "--batch-size", "2", "--rollout-size", "2", "--output-dir", "two"]
    done = in_two_processes(*in_two, "--config", "none.yaml", program=program)
    assert done.returncode == 0, done.stderr
    one = [*command, "--batch-size", "4", "--rollout-size", "4", "--output-dir", "one"]
    assert cli.main(one) == 0
    for name, tensor in weights("one").items():
        torch.testing.assert_close(weights("two")[name], tensor, rtol=1e-3, atol=1e-5)
    entropies = [
        [row["rollout_entropy"] for row in metrics(run) if "rollout_entropy" in row]
        for run in ("one", "two")
    ]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-4)
    assert len(list(Path("two/rollouts").glob("*rank-1*"))) >= 1


def test_a_run_does_not_continue_with_other_data_or_other_tasks(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with interrupted_evaluation():
        assert distill("--max-steps", "2") == 130
    before = (place / "data.jsonl").read_text()
    write_rows(place / "data.jsonl", conversations(19))
    assert distill("--max-steps", "2") == 2
    assert "has changed since it began" in capsys.readouterr().err
    (place / "data.jsonl").write_text(before)
    assert distill("--max-steps", "2", "--device", "auto") == 0  # the device may change
    assert distill("--max-steps", "2", "--tasks", "questions.jsonl") == 2
    assert "measured with other tasks" in capsys.readouterr().err


def test_save_steps_sets_the_steps_between_checkpoints(place: Path) -> None:
    assert distill("--max-steps", "4", "--trainer", '{"save_steps": 3}') == 0
    kept = (place / "run" / "checkpoints").glob("checkpoint-*")
    assert sorted(path.name for path in kept) == ["checkpoint-3", "checkpoint-4"]


def test_the_held_out_loss_is_logged_during_training(place: Path) -> None:
    assert distill("--max-steps", "8", "--eval-steps", "0.25") == 0
    logged = {row["step"]: row["eval_loss"] for row in metrics() if "eval_loss" in row}
    assert list(logged) == [2, 4, 6, 8]
    evaluation = evaluation_of_run()
    assert logged[8] == pytest.approx(evaluation["after"]["kl_nats_per_token"], rel=1e-3)
    assert "Dashed: the loss on held-out text" in (place / "run" / "report.html").read_text()


def test_a_run_continues_after_half_a_line_of_metrics(place: Path, interrupt_at: Any) -> None:
    with interrupt_at(3):
        assert distill("--max-steps", "4") == 130
    with (place / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert distill("--max-steps", "4") == 0
    assert [row["step"] for row in metrics()] == [1, 2, 3, 4]
