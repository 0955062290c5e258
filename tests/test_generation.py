from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model
from potstill.generation import answer_into, answer_prompts, count_rows, generate_batches

PROMPTS = [f"the rain {i}" for i in range(10)]
SAMPLING = {"max_new_tokens": 6, "batch_size": 4, "seed": 3}


def test_answers_stand_behind_their_prompts_in_order(tokenizer: Any) -> None:
    rows = answer_prompts(tiny_model(), tokenizer, PROMPTS, **SAMPLING)
    assert [row["messages"][0]["content"] for row in rows] == PROMPTS
    assert all(row["messages"][1]["role"] == "assistant" for row in rows)


def test_sampling_is_the_seeds_and_leaves_the_callers_random_state_alone(tokenizer: Any) -> None:
    model = tiny_model()
    once = answer_prompts(tiny_model(), tokenizer, PROMPTS, **SAMPLING)
    torch.manual_seed(99)
    again = answer_prompts(tiny_model(), tokenizer, PROMPTS, **SAMPLING)
    other = answer_prompts(tiny_model(), tokenizer, PROMPTS, **{**SAMPLING, "seed": 4})
    assert once == again != other
    state = torch.random.get_rng_state()
    answer_prompts(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_answer_that_the_limit_stopped_says_so_and_one_that_ended_does_not(tokenizer: Any) -> None:
    model = tiny_model()
    assert answer_prompts(model, tokenizer, PROMPTS[:1], max_new_tokens=2, temperature=0)[0]["cut_off"]
    model.generation_config.eos_token_id = list(range(272))  # whatever it says ends it
    row = answer_prompts(model, tokenizer, PROMPTS[:1], max_new_tokens=2, temperature=0)[0]
    assert (row["cut_off"], row["messages"][-1]["content"]) == (False, "")


def test_without_sampling_a_batch_answers_as_each_prompt_alone(tokenizer: Any) -> None:
    model, asked = tiny_model().double(), ["on", "the rain in the rain on the rain"]
    alone = [answer_prompts(model, tokenizer, [prompt], max_new_tokens=5, temperature=0)[0] for prompt in asked]
    assert answer_prompts(model, tokenizer, asked, max_new_tokens=5, temperature=0) == alone


@pytest.mark.parametrize("torn", [b"", b'{"messages": [{"role": "us', '{"a": "é'.encode()[:-1]])
def test_an_interrupted_file_goes_on_to_the_same_rows(tokenizer: Any, tmp_path: Path, torn: bytes) -> None:
    model = tiny_model()
    answer_into(tmp_path / "whole.jsonl", model, tokenizer, PROMPTS, **SAMPLING)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.split(b"\n")
    for kept in range(10):
        (tmp_path / "torn.jsonl").write_bytes(b"".join(line + b"\n" for line in lines[:kept]) + torn)
        answer_into(tmp_path / "torn.jsonl", model, tokenizer, PROMPTS, **SAMPLING)
        assert (tmp_path / "torn.jsonl").read_bytes() == whole
    assert count_rows(tmp_path / "whole.jsonl") == 10


def test_an_answer_with_unusual_line_separators_is_one_row(tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "assistant", "content": "a\u2028b\x0bc\x85d"}]}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(row + "\n", encoding="utf-8")
    assert count_rows(tmp_path / "a.jsonl") == 1


def test_a_later_batch_can_be_made_without_the_earlier_ones(tokenizer: Any) -> None:
    model = tiny_model()
    batches = list(generate_batches(model, tokenizer, PROMPTS, **SAMPLING))
    assert list(generate_batches(model, tokenizer, PROMPTS, first_batch=2, **SAMPLING)) == batches[2:]
