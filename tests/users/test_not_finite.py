"""Models that overflow: one line names the model and its precision, and no result is NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import conversations, tiny_model, toy_tokenizer, write_rows
from potstill import cli
from potstill.comparison import compare_runs, open_run
from potstill.errors import DataError, ModelError, NonFiniteLoss, RunFolderError
from potstill.evaluation import HeldOut, evaluate
from potstill.evaluation.paired import Ratios, interval, paired_difference
from potstill.evaluation.tasks import _metrics
from potstill.generation import answer_prompts
from potstill.run_folder import RunFolder, write_json
from potstill.students import save_student
from potstill.training import DistillationConfig, DistillationTrainer, MetricsFile

FAST = "--device cpu --max-steps 2 --learning-rate 0.01"
NAMED = ["NaN or infinite in float16", "--precision bf16"]


def potstill(command: str) -> int:
    return cli.main(shlex.split(command))


def overflowing(layers: int = 2) -> Any:
    """A model whose hidden states are finite in bfloat16 and float32, and not in float16."""
    model = tiny_model(layers=layers)
    model.model.layers[0].mlp.up_proj.weight.data *= 1e4
    model.model.layers[0].mlp.down_proj.weight.data *= 5e5
    return model


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """Make data, prompts, and the model ``huge``, which overflows in float16."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    write_rows(pair_folder / "prompts.jsonl", [{"prompt": "the rain"}, {"prompt": "in"}])
    overflowing().save_pretrained(pair_folder / "huge")
    toy_tokenizer().save_pretrained(pair_folder / "huge")
    return pair_folder


@pytest.mark.parametrize(
    "command",
    [
        "evaluate huge --teacher teacher --data data.jsonl",
        "evaluate student --teacher huge --data data.jsonl",
        "evaluate student --teacher huge --data data.jsonl --json",
        "generate huge --prompts prompts.jsonl --output-dir out",
        "generate huge --prompts prompts.jsonl --output-dir out --temperature 0",
        "generate huge --prompts prompts.jsonl --output-dir out --choose likeliest",
    ],
)
def test_a_command_with_a_model_that_overflows_in_float16_is_one_line_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = sorted(place.rglob("*"))
    assert potstill(f"{command} --device cpu --precision fp16") == 2
    printed = capsys.readouterr()
    [line] = [one for one in printed.err.splitlines() if one.startswith("potstill:")]
    assert "huge" in line
    assert all(words in line for words in NAMED)
    assert "nan" not in printed.out.lower()
    assert sorted(place.rglob("*")) == before
    keep = " --keep repetition_loop,cut_off" if command.startswith("generate") else ""
    assert potstill(f"{command} --device cpu --precision bf16{keep}") == 0


def test_a_run_with_a_teacher_that_overflows_ends_before_the_first_step(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"distill huge student --data data.jsonl --output-dir run {FAST} --precision fp16"
    assert potstill(command) == 2
    [line] = [one for one in capsys.readouterr().err.splitlines() if "potstill: " in one]
    assert "the logits of the teacher" in line
    assert all(words in line for words in ["huge", *NAMED])
    assert not (place / "run").exists()


def test_a_comparison_with_a_teacher_that_overflows_has_no_verdict(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"compare huge student --data data.jsonl --output-dir all {FAST} --precision fp16"
    assert potstill(f"{command} --methods text,logits --answers 2 --answer-tokens 4") == 2
    [line] = [one for one in capsys.readouterr().err.splitlines() if "potstill: " in one]
    assert all(words in line for words in NAMED)
    assert not (place / "all" / "comparison.json").exists()
    assert not (place / "all" / "logits-seed0").exists()


def nan_at_step(step: int) -> Any:
    class AtStep(DistillationTrainer):
        def summed_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            loss = super().summed_loss(model, inputs)
            return loss * (math.nan if self.state.global_step + 1 == step else 1.0)

    return AtStep


def trainer(kind: type[DistillationTrainer], folder: Path, **settings: Any) -> Any:
    config = DistillationConfig(
        str(folder), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        save_strategy="no", **settings,
    )  # fmt: skip
    return kind(
        tiny_model(layers=2, seed=1),
        tiny_model(),
        config,
        train_dataset=conversations(24),
        processing_class=toy_tokenizer(),
        teacher_tokenizer=toy_tokenizer(),
    )


def test_a_loss_that_becomes_nan_stops_the_run_and_is_not_hidden(tmp_path: Path) -> None:
    one = trainer(nan_at_step(3), tmp_path)
    one.add_callback(MetricsFile(tmp_path / "metrics.jsonl", one))
    with pytest.raises(NonFiniteLoss, match="the loss became nan at step 3"):
        one.train()
    assert all(weight.isfinite().all() for weight in one.model.state_dict().values())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_a_gradient_norm_that_is_not_finite_is_left_out_of_the_metrics(tmp_path: Path) -> None:
    one = trainer(DistillationTrainer, tmp_path)
    file = MetricsFile(tmp_path / "metrics.jsonl", one)
    file.on_log(one.args, one.state, one.control, {"loss": 1.0, "grad_norm": math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()).keys() >= {"loss", "tokens"}
    assert "grad_norm" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_student_with_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    student = tiny_model()
    student.model.norm.weight.data[3] = math.inf
    with pytest.raises(ModelError, match=r"weight model.norm.weight is NaN or infinite"):
        save_student(student, toy_tokenizer(), tmp_path, provenance={})
    assert not list(tmp_path.iterdir())


def test_open_models_are_checked_too() -> None:
    data, tokenizer = conversations(4), toy_tokenizer()
    readers = {"tokenizer": tokenizer, "teacher_tokenizer": tokenizer}
    evaluate(overflowing(), tiny_model(), data, **readers)
    with pytest.raises(ModelError, match="NaN or infinite in float16"):
        evaluate(overflowing().half(), tiny_model(), data, **readers)
    with pytest.raises(ModelError, match="logits are NaN or infinite in float16"):
        answer_prompts(overflowing().half(), tokenizer, ["the rain"], max_new_tokens=2)


def test_a_token_that_the_student_excludes_makes_an_infinite_divergence_which_is_refused() -> None:
    class Biased(torch.nn.Linear):
        pass

    student = tiny_model(layers=2)
    student.lm_head = Biased(32, 272)
    student.lm_head.weight.data = tiny_model(layers=2).lm_head.weight.data
    student.lm_head.bias.data[:] = 0
    student.lm_head.bias.data[70] = -math.inf
    tokenizer = toy_tokenizer()
    readers = {"tokenizer": tokenizer, "teacher_tokenizer": tokenizer}
    with pytest.raises(ModelError, match="divergence from the teacher is NaN or infinite"):
        evaluate(student, tiny_model(), conversations(4), **readers)


def test_answers_without_text_are_refused_because_there_are_no_bytes() -> None:
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": ""}]
    with pytest.raises(DataError):
        HeldOut(toy_tokenizer(), toy_tokenizer(), [{"messages": turns}] * 4, max_length=64)


def test_a_draw_of_conversations_without_bytes_does_not_make_the_interval_nan() -> None:
    top, bottom = np.array([[3.0, 5.0, 2.0]]), np.array([[1.0, 0.0, 0.0]])
    assert interval(Ratios(top, bottom)) == pytest.approx((3.0, 18.0), abs=6)
    difference = paired_difference(Ratios(top, bottom), Ratios(top / 2, bottom))
    numbers = [difference.value, difference.low, difference.high]
    assert np.isfinite(numbers).all()


def test_a_result_that_is_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"found.json: not written, because a result is NaN"):
        write_json(tmp_path / "found.json", {"a": [1.0, math.nan]})
    assert not list(tmp_path.iterdir())


class TestFinishedRuns:
    """evaluation.json of a run that an earlier version wrote."""

    @pytest.fixture
    def run(self, place: Path) -> Path:
        command = f"distill teacher student --data data.jsonl --output-dir run {FAST}"
        assert potstill(f"{command} --precision fp32") == 0
        return place / "run"

    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e999])
    def test_nan_in_an_old_evaluation_is_refused(
        self, run: Path, value: float, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = run / "evaluation.json"
        evaluation = json.loads(file.read_text())
        evaluation["after"]["kl_nats_per_token"] = value
        evaluation["conversations"]["after"]["kl_nats"][0] = value
        file.write_text(json.dumps(evaluation))
        for command in ("report run", "compare --runs run,run --output-dir all"):
            assert potstill(command) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert line.startswith("potstill: run/evaluation.json: damaged (a result is ")
            assert "delete it and run the same command again" in line

    def test_an_overflowing_number_has_no_verdict(self, run: Path) -> None:
        file = run / "evaluation.json"
        evaluation = json.loads(file.read_text())
        evaluation["conversations"]["after"]["kl_nats"][0] = "HERE"
        file.write_text(json.dumps(evaluation).replace('"HERE"', "1e999"))
        with pytest.raises(RunFolderError, match=r"damaged \(sums per conversation\)"):
            open_run(run)

    def test_results_are_finite(self, run: Path) -> None:
        opened = open_run(run)
        other = dataclasses.replace(opened, evaluation=RunFolder(run).read_evaluation())
        compared = compare_runs({"a": [opened], "b": [other]}, text_measures=[])
        json.dumps(compared, allow_nan=False)


def test_metrics_of_tasks_that_are_not_finite_are_none() -> None:
    found = _metrics(
        {"perplexity,none": math.inf, "perplexity_stderr,none": math.nan, "acc,none": 0.5,
         "acc_stderr,none": "N/A", "sample_len": 3},
        {},
    )  # fmt: skip
    assert found["perplexity"] is None
    assert found["acc"] == 0.5
    assert found["stderr"] == {"perplexity": None, "acc": None}


def test_a_report_shows_a_task_metric_that_is_not_finite(
    place: Path, model_folder: Callable[..., Path]
) -> None:
    from potstill.report.verdict import measure_rows

    def of(value: float | None) -> dict[str, Any]:
        return {"words": {"questions": 3, "perplexity": value, "stderr": {"perplexity": None}}}

    rows = measure_rows({"tasks": {"before": of(None), "after": of(7.0), "teacher": of(3.0)}})
    assert [cell[0] for cell in rows[-1]["cells"]] == ["", "7.000", "3.000"]
    assert rows[-1]["cells"][0][2] == "not finite"
