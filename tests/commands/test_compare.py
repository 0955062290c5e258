"""Whole comparisons of tiny models: trained, interrupted, continued, and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment.toys import sentencepiece
from conftest import conversations, tiny_model, write_rows
from potstill import cli
from potstill.distillation import run as pipeline


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """Make a teacher, a student, training data and held-out data."""
    write_rows(
        pair_folder / "data.jsonl", [{**row, "reference": "a on the"} for row in conversations(16)]
    )
    write_rows(pair_folder / "held_out.jsonl", conversations(12))
    return pair_folder


FLAGS = ["--device", "cpu", "--precision", "fp32", "--learning-rate", "0.01"]
DATA = ["--data", "data.jsonl", "--eval-data", "held_out.jsonl"]


def compare(*more: str, output: str = "out") -> int:
    small = ["--answers", "3", "--answer-tokens", "4", "--max-steps", "4"]
    return cli.main(
        ["compare", "teacher", "student", *DATA, "--output-dir", output, *FLAGS, *small, *more]
    )


def comparison(output: str = "out") -> dict[str, Any]:
    read: dict[str, Any] = json.loads((Path(output) / "comparison.json").read_text())
    return read


def test_methods_are_trained_measured_and_compared(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu")
    assert compare("--seeds", "0,1", "--text-measures", "chrf") == 0
    found = comparison()
    assert set(found["methods"]) == {"reference", "text", "logits", "untouched"}
    assert found["measure"] == "kl_nats_per_token"
    assert (found["conversations"], found["answers"], found["seeds"]) == (12, 3, [0, 1])
    assert len(found["pairs"]) == 6
    assert (
        found["methods"]["logits"]["kl_nats_per_token"]
        < found["methods"]["untouched"]["kl_nats_per_token"]
    )
    assert {"stops", "loops", "length_words", "chrf"} <= found["methods"]["text"].keys()
    assert found["teacher"]["length_words"] == (3 + 6 + 9) / 3
    for seed in (0, 1):  # the comparison has the values of each run's own evaluation
        config = pipeline.RunFolder(f"out/text-seed{seed}").read_config()
        assert (config["method"], config["seed"], config["max_steps"]) == ("text", seed, 4)
    runs = [
        json.loads((place / f"out/text-seed{seed}/evaluation.json").read_text()) for seed in (0, 1)
    ]
    mean = sum(run["after"]["bits_per_byte"] for run in runs) / 2
    assert found["methods"]["text"]["bits_per_byte"] == pytest.approx(mean)
    references = (place / "out" / "data" / "reference.jsonl").read_text().splitlines()
    assert {json.loads(line)["messages"][-1]["content"] for line in references} == {"a on the"}
    printed = capsys.readouterr().out
    assert re.search(r"^logits +\d\.\d{3}", printed, re.MULTILINE)
    assert any(pair["verdict"] in printed for pair in found["pairs"])
    page = (place / "out" / "comparison.html").read_text()
    assert 'href="text-seed1/report.html"' in page
    assert "potstill compare --config out/config.yaml --output-dir out-again" in page
    for heading in (
        "The loss during training",
        "What the models answer",
        "Answers, token by token",
        "Where the students are worst",
    ):
        assert f">{heading}</h2>" in page


def test_task_scores_are_in_the_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--methods", "text,logits", "--answers", "0") == 0
    assert comparison()["tasks"] == {}
    for number, folder in enumerate(("out/text-seed0", "out/logits-seed0")):
        file = place / folder / "evaluation.json"
        evaluation = json.loads(file.read_text())
        quiz = {
            "questions": 40,
            "acc": 0.5 + number / 4,
            "stderr": {"acc": 0.05},
            "lower_is_better": [],
        }
        file.write_text(
            json.dumps(
                evaluation
                | {"tasks": {name: {"quiz": quiz} for name in ("teacher", "before", "after")}}
            )
        )
    capsys.readouterr()
    assert (
        cli.main(["compare", "--runs", "out/text-seed0,out/logits-seed0", "--output-dir", "again"])
        == 0
    )
    assert re.search(r"quiz acc\n", capsys.readouterr().out)
    assert comparison("again")["methods"]["out/logits"]["quiz acc"] == 0.75
    assert "quiz acc" in (place / "again" / "comparison.html").read_text()


def test_an_interrupted_comparison_continues_and_keeps_finished_runs(
    place: Path, interrupt_at: Any
) -> None:
    with interrupt_at(2, method="logits"):
        assert compare("--methods", "text,logits") == 130
    assert not (place / "out" / "comparison.json").exists()
    kept = (place / "out" / "text-seed0" / "student" / "model.safetensors").stat().st_mtime_ns
    write_rows(place / "data.jsonl", conversations(3))  # the comparison has its own copy
    assert compare("--methods", "text,logits") == 0
    assert (
        place / "out" / "text-seed0" / "student" / "model.safetensors"
    ).stat().st_mtime_ns == kept
    assert set(comparison()["methods"]) == {"text", "logits", "untouched"}
    assert len((place / "out" / "logits-seed0" / "metrics.jsonl").read_text().splitlines()) == 4


def test_across_tokenizers_the_verdict_is_in_bits_per_byte(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(place / "cache"))
    tokenizer = sentencepiece(prepend="first")
    tokenizer.pad_token = tokenizer.eos_token
    other = tiny_model(layers=2, rows=len(tokenizer), seed=1)
    other.generation_config.eos_token_id = other.generation_config.pad_token_id = (
        tokenizer.eos_token_id
    )
    (place / "student").unlink()
    other.save_pretrained(place / "student")
    tokenizer.save_pretrained(place / "student")
    write_rows(place / "data.jsonl", conversations(16))  # without references
    assert compare() == 0
    assert set(comparison()["methods"]) == {"text", "cross", "untouched"}
    assert comparison()["measure"] == "bits_per_byte"
    assert "kl_nats_per_token" not in comparison()["pairs"][0]["differences"]
    assert "bits per byte" in comparison()["pairs"][0]["verdict"]


def test_a_method_can_be_added_later_and_another_budget_cannot(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("--methods", "text") == 0
    assert compare("--methods", "text,logits") == 0
    assert "text, seed 0: done before" in capsys.readouterr().out
    assert compare("--methods", "text,logits", "--max-steps", "5") == 2
    assert "holds a run with max_steps 4, not 5" in capsys.readouterr().err


def test_recipes_are_compared_unchanged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {
        "teacher": "teacher",
        "student": "student",
        "data": "data.jsonl",
        "eval_data": "held_out.jsonl",
        "output_dir": "unused",
    }
    common |= {"device": "cpu", "precision": "fp32", "max_steps": "2"}
    for name, more in {
        "forward": "divergence: forward_kl",
        "reverse": "divergence: reverse_kl",
        "long": "max_steps: 9",
    }.items():
        Path(f"{name}.yaml").write_text(
            "".join(f"{key}: {value}\n" for key, value in common.items() if key not in more) + more
        )
    arguments = ["compare", "--output-dir", "out", "--answers", "0", "--recipes"]
    assert cli.main([*arguments, "forward.yaml,reverse.yaml"]) == 0
    assert set(comparison()["methods"]) == {"forward", "reverse", "untouched"}
    assert comparison()["answers"] == 0
    assert cli.main([*arguments, "forward.yaml,long.yaml"]) == 2
    assert (
        "forward and long cannot be compared: max_steps is 2 in forward and 9 in long"
        in capsys.readouterr().err
    )


def distill(output: str, *more: str) -> str:
    pair = ["distill", "teacher", "student", *DATA, "--output-dir", output]
    assert cli.main([*pair, *FLAGS, "--max-steps", "2", *more]) == 0
    return output


def test_finished_runs_are_compared_without_opening_a_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill("one"), distill("two", "--method", "text")
    (place / "teacher").unlink(), (place / "student").unlink()
    assert cli.main(["compare", "--runs", "one,two", "--output-dir", "out"]) == 0
    assert set(comparison()["methods"]) == {"one", "two", "untouched"}


def test_runs_that_cannot_be_compared_are_refused_and_the_difference_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(runs: str) -> str:
        assert cli.main(["compare", "--runs", runs, "--output-dir", "out"]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert not (place / "out").exists()
        return line

    write_rows(place / "other.jsonl", conversations(13))
    distill("one")
    distill("longer", "--max-steps", "3")
    distill("seeded", "--seed", "1")
    distill("else", "--eval-data", "other.jsonl")
    assert (
        "budget max_steps × batch_size × gradient_accumulation_steps is 16 in the first and 24"
        in refused("one,longer")
    )
    assert "held-out data (fingerprint)" in refused("one,else")
    assert "the seeds are 0 in the first and 1 in the second" in refused("one,seeded")
    assert "only one method" in refused("one")
    assert "one: seed 0, 0 is there more than once" in refused("one,one,seeded")
    evaluation = json.loads((place / "else" / "evaluation.json").read_text())
    for damage, message in {
        "{": "damaged (not JSON)",
        "[]": "damaged (no JSON object)",
        json.dumps({**evaluation, "conversations": None}): "damaged (sums per conversation)",
        json.dumps(
            {name: value for name, value in evaluation.items() if name != "conversations"}
        ): "no sums per conversation",
    }.items():
        (place / "else" / "evaluation.json").write_text(damage)
        assert message in refused("one,else")
    (place / "else" / "evaluation.json").unlink()
    assert "else: no evaluation.json there" in refused("one,else")
    assert "no readable config.yaml" in refused("one,nowhere")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--methods", "text,osmosis"],
            "method 'osmosis' is not known; use some of text, logits, cross, on-policy, reference",
        ),
        (["--seeds", "0,x"], "--seeds 0,x: give whole numbers"),
        (["--seeds", "1,1"], "each once"),
        (
            ["--data", "held_out.jsonl", "--methods", "reference"],
            "12 of 12 training conversations have no reference",
        ),
        (["--text-measures", "bleurt"], "'bleurt' is not known"),
        (["--trainer", '{"optimiser": "sgd"}'], "trainer.optimiser"),
        (["--data", "none.jsonl"], "none.jsonl: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    there = sorted(place.rglob("*"))
    assert compare(*more) == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("potstill:")
    ]
    assert message in line
    assert sorted(place.rglob("*")) == there


def test_without_anything_to_compare_the_error_names_what_is_needed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "--output-dir", "out"]) == 2
    assert (
        "compare needs TEACHER, STUDENT, DATA, or --recipes, or --runs" in capsys.readouterr().err
    )


def test_texts_of_models_and_prompts_are_escaped_in_the_page() -> None:
    from potstill.comparison.page import as_html

    evil = "<script>alert(1)</script>"
    worst = {"prompt": evil, "before": 1.0, "after": 2.0}
    pair: dict[str, Any] = {"one": evil, "other": "b", "verdict": evil, "certain": True}
    pair["differences"] = {"bits_per_byte": {"difference": -0.1, "ci95": [-0.2, -0.05]}}
    page = as_html(
        {
            "measure": "bits_per_byte",
            "conversations": 12,
            "answers": 0,
            "seeds": [0],
            "notes": [evil],
            "teacher": {"bits_per_byte": 0.5},
            "methods": {evil: {"bits_per_byte": 1.0}},
            "pairs": [pair],
            "regressions": {evil: {"share": 0.5, "worst": [worst]}},
        },
        {},
    )
    assert page.count("<script") == 1
    assert page.count("&lt;script&gt;") >= 5
