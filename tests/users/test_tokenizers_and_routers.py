"""Tokenizers with more tokens than the model has rows, or fewer special tokens; router losses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import conversations, tiny_model, toy_tokenizer, write_rows
from potstill import cli
from potstill.evaluation import evaluate
from potstill.models import load_model
from potstill.models.vocabulary import highest_id, padding_id
from potstill.models.weights import _note_router_loss

FAST = "--device cpu --precision fp32"
STEPS = "--max-steps 2 --learning-rate 0.01"
TOOL = "<|tool|>"


def potstill(command: str) -> int:
    return cli.main(shlex.split(command))


def write(folder: Path, tokenizer: Any, **shape: Any) -> Path:
    tiny_model(**shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """Make data, and models of 266 rows whose tokenizer has 267 tokens."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    tool = [{"role": "user", "content": f"in {TOOL}"}, {"role": "assistant", "content": "the rain"}]
    write_rows(pair_folder / "tool.jsonl", [*conversations(20), {"messages": tool}])
    write_rows(pair_folder / "prompts.jsonl", [{"prompt": "the rain"}])
    write_rows(pair_folder / "tool_prompts.jsonl", [{"prompt": f"the {TOOL}"}])
    for name, layers in (("big", 3), ("small", 2)):
        write(pair_folder / name, toy_tokenizer(added=(TOOL,)), layers=layers, rows=266)
    write(pair_folder / "resized", toy_tokenizer(added=(TOOL,)), layers=2, rows=272)
    return pair_folder


COMMANDS = {
    "text": "distill big small --data {} --output-dir run --method text",
    "logits": "distill big small --data {} --output-dir run --method logits",
    "cross": "distill big small --data {} --output-dir run --method cross",
    "student": "distill resized small --data {} --output-dir run --method text",
    "teacher": "distill big resized --data {} --output-dir run --method logits",
    "teacher of cross": "distill big resized --data {} --output-dir run --method cross",
    "evaluate": "evaluate small --teacher big --data {}",
    "evaluate, teacher": "evaluate resized --teacher big --data {}",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_token_without_a_row_is_refused_only_if_the_data_has_it(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    command += f" {FAST} {STEPS}" if command.startswith("distill") else f" {FAST}"
    if "--eval-data" not in command and command.startswith("distill"):
        command += " --eval-data data.jsonl"
    before = sorted(place.rglob("*"))
    assert potstill(command.format("tool.jsonl")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("potstill: the data has the token id 266")
    assert "has only 266 rows in its vocabulary" in line
    assert sorted(place.rglob("*")) == before
    assert potstill(command.format("data.jsonl")) == 0


def test_a_held_out_token_without_a_row_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "distill big small --data data.jsonl --eval-data tool.jsonl --output-dir run"
    assert potstill(f"{command} --eval-steps 1 {FAST} {STEPS}") == 2
    assert "has the token id 266" in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "run").exists()


def test_a_prompt_with_a_token_without_a_row_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"generate big --output-dir out {FAST} --keep repetition_loop,cut_off --prompts"
    assert potstill(f"{command} tool_prompts.jsonl") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the data has the token id 266, and the teacher big has only 266 rows" in line
    assert not (place / "out").exists()
    assert potstill(f"{command} prompts.jsonl") == 0


def special(**tokens: str | None) -> Any:
    tokenizer = toy_tokenizer(added=("<|pad|>",))
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


@pytest.mark.parametrize(
    "tokens",
    [
        {"pad_token": None},
        {"pad_token": None, "eos_token": None},
        {"pad_token": None, "eos_token": None, "bos_token": None},
        {"pad_token": "<|pad|>"},  # the id 266, which the model does not have
    ],
)
def test_missing_special_tokens_change_neither_loss_nor_answers(
    place: Path, tokens: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, layers in (("teacher2", 3), ("student2", 2)):
        write(place / name, special(**tokens), layers=layers, rows=266)
    rows = conversations(12)
    opened = [load_model(place / name) for name in ("student2", "teacher2")]
    (student, tokenizer), (teacher, _) = opened
    assert padding_id(tokenizer, student) < 266
    toy = toy_tokenizer()
    found = evaluate(student, teacher, rows, tokenizer=tokenizer, teacher_tokenizer=tokenizer)
    expected = evaluate(student, teacher, rows, tokenizer=toy, teacher_tokenizer=toy)
    assert found["kl_nats_per_token"] == pytest.approx(expected["kl_nats_per_token"], rel=1e-5)
    assert found["nll_nats_per_token"] == pytest.approx(expected["nll_nats_per_token"], rel=1e-5)
    for method in ("text", "logits", "cross"):
        command = f"distill teacher2 student2 --data data.jsonl --output-dir {method}"
        assert potstill(f"{command} --method {method} {FAST} {STEPS}") == 0
        rows_of_method = (place / method / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(row)["loss"] > 0 for row in rows_of_method)
    keep = "--keep repetition_loop,cut_off,empty"
    assert potstill(f"generate teacher2 --prompts prompts.jsonl --output-dir o {FAST} {keep}") == 0


def test_the_highest_id_is_found_in_every_kind_of_data_set() -> None:
    import datasets

    rows = [{"input_ids": [1, 5, 2]}, {"input_ids": [3]}]
    assert highest_id(rows, "input_ids") == 5
    assert highest_id(datasets.Dataset.from_list(rows), "input_ids") == 5
    assert highest_id(datasets.Dataset.from_list(rows), "labels") == -1
    assert highest_id(datasets.Dataset.from_list(rows).to_iterable_dataset(), "input_ids") == -1
    assert highest_id(None, "input_ids") == -1


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe"])
@pytest.mark.parametrize("method", ["text", "logits"])
def test_a_mixture_trains_and_its_router_loss_is_said_to_be_left_out(
    place: Path, capsys: pytest.CaptureFixture[str], family: str, method: str
) -> None:
    sizes: dict[str, Any] = {"num_local_experts": 4} if family == "Mixtral" else {
        "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(
        vocab_size=272, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2,
        output_router_logits=True, eos_token_id=265, pad_token_id=265, bos_token_id=264, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place / "mixture")
    toy_tokenizer().save_pretrained(place / "mixture")
    _note_router_loss.cache_clear()
    for models, is_said in (("teacher mixture", True), ("mixture student", False)):  # said once
        output = f"{models.replace(' ', '-')}-{method}"
        command = f"distill {models} --data data.jsonl --output-dir {output} --method {method}"
        assert potstill(f"{command} {FAST} {STEPS}") == 0
        said = "mixture: output_router_logits is switched off; the loss that balances the experts"
        assert (said in capsys.readouterr().err) == is_said


def test_a_slow_tokenizer_is_refused_in_one_line() -> None:
    from transformers import ByT5Tokenizer

    from potstill.data import encode_conversation
    from potstill.errors import ModelError

    slow = ByT5Tokenizer(extra_ids=0)
    slow.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ModelError, match=r"a slow one .* needed is a fast one") as caught:
        encode_conversation({"messages": turns}, slow)
    assert "\n" not in str(caught.value)
