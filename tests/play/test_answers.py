"""Streamed answers and predictions, compared with direct calls of the model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from conftest import sentencepiece_tokenizer, tiny_model, toy_tokenizer
from potstill.alignment import token_bytes
from potstill.data.chat_templates import PLAIN_CHAT_TEMPLATE
from potstill.generation import Sampling, answer_prompts
from potstill.play import Player, next_tokens, stream_answers

PROMPT = "the rain?"


def player(tokenizer: Any = None, **shape: Any) -> Player:
    tokenizer = tokenizer or toy_tokenizer()
    return Player("one", "toy", tiny_model(**shape), tokenizer, token_bytes(tokenizer))


def other_tokenizer() -> Any:
    return sentencepiece_tokenizer(chat_template=PLAIN_CHAT_TEMPLATE)


@pytest.fixture
def players() -> list[Player]:
    return [player(seed=seed) for seed in range(3)]


def distribution(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].softmax(-1)


def asked(tokenizer: Any, begun: str = "") -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text + begun, add_special_tokens=False)["input_ids"])


def test_all_answers_grow_by_one_token_at_a_time(players: list[Player]) -> None:
    seen = list(stream_answers(players, PROMPT, Sampling(max_new_tokens=6, seed=1)))
    assert [[len(answer) for answer in answers] for answers in seen][:3] == [
        [1] * 3,
        [2] * 3,
        [3] * 3,
    ]
    assert all(
        before == after[: len(before)]
        for one, other in pairwise(seen)
        for before, after in zip(one, other, strict=True)
    )


def test_an_answer_that_has_ended_waits_for_the_others(players: list[Player]) -> None:
    first = list(stream_answers(players, PROMPT, Sampling(max_new_tokens=1, temperature=0)))[-1]
    players[1].model.generation_config.eos_token_id = first[1][0]
    answers = list(stream_answers(players, PROMPT, Sampling(max_new_tokens=5, temperature=0)))[-1]
    assert [len(answer) for answer in answers] == [5, 1, 5]


def test_a_streamed_answer_equals_the_answer_of_answer_prompts(players: list[Player]) -> None:
    greedy = Sampling(max_new_tokens=8, temperature=0)
    for one, tokens in zip(players, list(stream_answers(players, PROMPT, greedy))[-1], strict=True):
        (row,) = answer_prompts(one.model, one.tokenizer, [PROMPT], max_new_tokens=8, temperature=0)
        assert (
            one.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            == row["messages"][-1]["content"]
        )


def test_next_tokens_are_the_most_likely_after_prompt_and_answer_so_far(
    players: list[Player],
) -> None:
    one, other, _ = players
    answer = one.tokenizer("in the rain", add_special_tokens=False)["input_ids"]
    expected = distribution(other.model, [*asked(other.tokenizer), *answer[:2]])
    found = next_tokens(other, PROMPT, answered_by=one, answer=answer, place=2, count=5)
    top = expected.topk(5)
    assert [candidate.text for candidate in found[:5]] == [
        other.spell(token) for token in top.indices.tolist()
    ]
    assert [candidate.probability for candidate in found[:5]] == pytest.approx(
        top.values.tolist(), rel=1e-4
    )


def test_the_token_that_was_written_is_always_among_them(players: list[Player]) -> None:
    one = players[0]
    least = int(distribution(one.model, asked(one.tokenizer)).argmin())
    found = next_tokens(one, PROMPT, answered_by=one, answer=[least], place=0, count=3)
    assert [candidate.written for candidate in found] == [False, False, False, True]
    assert found[-1].text == one.spell(least)


def test_a_player_with_other_tokens_continues_the_same_text_in_its_own() -> None:
    one, other = player(), player(other_tokenizer(), rows=400)
    answer = one.tokenizer("wet rain on the", add_special_tokens=False)["input_ids"]
    place = len(one.tokenizer("wet rain", add_special_tokens=False)["input_ids"])
    expected = distribution(other.model, asked(other.tokenizer, "wet rain"))
    found = next_tokens(other, PROMPT, answered_by=one, answer=answer, place=place, count=4)
    assert [candidate.text for candidate in found] == [
        other.spell(token) for token in expected.topk(4).indices.tolist()
    ]
    assert not any(candidate.written for candidate in found)


def test_across_tokenizers_the_text_ends_with_its_last_complete_character() -> None:
    one, other = player(), player(other_tokenizer(), rows=400)
    answer = one.tokenizer("on é", add_special_tokens=False)["input_ids"]
    within = next_tokens(other, PROMPT, answered_by=one, answer=answer, place=len(answer) - 1)
    expected = distribution(other.model, asked(other.tokenizer, "on "))
    assert within[0].probability == pytest.approx(float(expected.max()), rel=1e-4)
