from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny_model, toy_tokenizer
from potstill.generation import LocalEngine, Sampling, answer_prompts, requests

PROMPTS = [f"the rain {i}" + " in the rain" * (i % 4) for i in range(10)]
SAMPLING = {"max_new_tokens": 6, "batch_size": 4, "seed": 3}


def unit(prompts: list[str], sampling: Sampling) -> list[Any]:
    return list(
        requests([[{"role": "user", "content": prompt}] for prompt in prompts], sampling, {})
    )


def test_answers_follow_their_prompts_in_order(tokenizer: Any) -> None:
    rows = answer_prompts(tiny_model(), tokenizer, PROMPTS, **SAMPLING)
    assert [row["messages"][0]["content"] for row in rows] == PROMPTS
    assert all(row["messages"][1]["role"] == "assistant" for row in rows)


def test_no_prompts_give_no_answers(tokenizer: Any) -> None:
    assert answer_prompts(tiny_model(), tokenizer, []) == []


def test_sampling_depends_on_the_seed_and_keeps_the_global_random_state(tokenizer: Any) -> None:
    model = tiny_model()
    once = answer_prompts(model, tokenizer, PROMPTS, **SAMPLING)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = answer_prompts(model, tokenizer, PROMPTS, **SAMPLING)
    assert torch.equal(state, torch.random.get_rng_state())
    assert once == again
    other = answer_prompts(model, tokenizer, PROMPTS, **{**SAMPLING, "seed": 4})
    assert [row["messages"] for row in other] != [row["messages"] for row in once]


def test_only_an_answer_stopped_by_the_limit_is_marked_as_cut_off(
    tokenizer: Any,
) -> None:
    model = tiny_model()
    row = answer_prompts(model, tokenizer, PROMPTS[:1], max_new_tokens=2, temperature=0)[0]
    assert row["cut_off"]
    assert len(row["teacher_ids"]) == 2
    model.generation_config.eos_token_id = list(range(272))  # every token ends the answer
    row = answer_prompts(model, tokenizer, PROMPTS[:1], max_new_tokens=2, temperature=0)[0]
    assert (row["cut_off"], row["messages"][-1]["content"], len(row["teacher_ids"])) == (
        False,
        "",
        1,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "gemma3", "mistral"])
def test_a_batched_answer_is_that_of_generate_alone(tokenizer: Any, family: str) -> None:
    """Answers end at different lengths, so rows are refilled and moved; no token changes."""
    model = tiny_model(family).double()
    if family == "gemma2":
        # Eager attention gives NaN for padding in float64: its minimum is −inf in float32.
        model = model.float()
    if family.startswith("gemma"):
        model.config.sliding_window = 24
    for weight in model.parameters():
        weight.data.mul_(2)  # otherwise a random model repeats one token
    endless = answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0)
    model.generation_config.eos_token_id = [
        265,
        *(row["teacher_ids"][len(row["teacher_ids"]) // 2] for row in endless[:2]),
    ]
    rows = answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0, batch_size=3)
    lengths = set()
    for row in rows:
        text = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        alone = model.generate(**prompt, max_new_tokens=12, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
        assert row["teacher_ids"] == alone.tolist()
        lengths.add(len(alone))
    assert len(lengths) > 1


def test_sampled_answers_do_not_depend_on_the_rest_of_the_batch(tokenizer: Any) -> None:
    model = tiny_model().double()
    model.generation_config.eos_token_id = list(range(0, 272, 9))
    together = answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    assert together == [
        answer_prompts(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS
    ]


def test_a_model_that_keeps_a_state_is_answered_batch_by_batch(tokenizer: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = (
        MambaForCausalLM(
            MambaConfig(vocab_size=272, hidden_size=16, num_hidden_layers=2, eos_token_id=265)
        )
        .eval()
        .double()
    )
    model.generation_config.eos_token_id = list(range(0, 272, 9))
    rows = answer_prompts(
        model, tokenizer, PROMPTS[::4], max_new_tokens=5, temperature=0, batch_size=2
    )
    for prompt, row in zip(PROMPTS[::4], rows, strict=True):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )
        ids = asked["input_ids"]
        assert (
            row["teacher_ids"]
            == model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
        )


def test_a_model_with_convolution_layers_is_supported(tokenizer: Any) -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = Lfm2Config(
        vocab_size=272,
        eos_token_id=265,
        pad_token_id=265,
        layer_types=["conv", "full_attention"],
        **shape,
    )
    rows = answer_prompts(
        Lfm2ForCausalLM(config).eval(),
        tokenizer,
        PROMPTS[:3],
        max_new_tokens=4,
        temperature=0,
        batch_size=2,
    )
    assert all(row["teacher_ids"] for row in rows)


def test_an_answer_ends_where_the_context_does() -> None:
    model, tokenizer = tiny_model(), toy_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    model.config.max_position_embeddings = 40
    rows = answer_prompts(
        model, tokenizer, ["the", "the rain " * 30], max_new_tokens=64, temperature=0
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], add_generation_prompt=True
    )["input_ids"]
    assert [len(row["teacher_ids"]) for row in rows] == [40 - len(prompt), 0]
    assert all(row["cut_off"] for row in rows)


@torch.no_grad()
def test_how_likely_an_answer_was_is_its_cross_entropy_under_the_teacher(tokenizer: Any) -> None:
    model, sampling = tiny_model().double(), Sampling(max_new_tokens=5)
    asked = unit(PROMPTS[:3], sampling)
    for request, answer in zip(
        asked, LocalEngine(model, tokenizer, sampling, nats=True).answer_unit(asked), strict=True
    ):
        text = tokenizer.apply_chat_template(
            request.messages, tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert answer.teacher_ids is not None
        logits = (
            model(torch.tensor([prompt + answer.teacher_ids]))
            .logits[0, len(prompt) - 1 : -1]
            .float()
        )
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer.teacher_ids))
        assert answer.nats_per_token == pytest.approx(float(expected), rel=1e-5)


def test_two_answers_to_one_prompt_differ(tokenizer: Any) -> None:
    rows = answer_prompts(tiny_model(), tokenizer, ["the rain"], max_new_tokens=8, samples=3)
    assert len({tuple(row["teacher_ids"]) for row in rows}) == 3
