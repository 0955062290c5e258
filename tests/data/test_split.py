from __future__ import annotations

import random
from typing import Any

import pytest

from potstill.data.split import near_duplicates, prompt_key


def conversation(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": turns, **more}


def test_the_key_depends_on_everything_before_the_last_answer_and_on_nothing_else() -> None:
    base = prompt_key(conversation("a", "b", "c", "d"))
    assert base == prompt_key(conversation("a", "b", "c", "other", cut_off=True))
    different = [
        conversation("a", "b"),
        conversation("a", "x", "c", "d"),
        conversation("A", "b", "c", "d"),
        conversation("a", "b", "c", "d", tools=[{"name": "f"}]),
        {"text": "a"},
    ]
    assert len({base, *map(prompt_key, different)}) == 6


def test_the_weight_of_a_turn_does_not_change_the_key() -> None:
    one, other = conversation("a", "b", "c", "d"), conversation("a", "b", "c", "d")
    other["messages"][1]["weight"] = 0
    assert prompt_key(one) == prompt_key(other)


def text(seed: int, words: int = 40) -> list[str]:
    chooser = random.Random(seed)
    return [f"w{chooser.randrange(5000)}" for _ in range(words)]


def test_held_out_prompts_near_a_training_prompt_are_counted() -> None:
    train = [conversation(" ".join(text(i)), "answer") for i in range(700)]
    near = [conversation(" ".join([*text(i), "Please!"]).upper(), "x") for i in range(600, 640)]
    far = [conversation(" ".join(text(i)), "answer") for i in range(1000, 1100)]
    assert near_duplicates(train, [*near, *far]) == 40
    assert near_duplicates(train, far) == 0
    assert near_duplicates([], far) == 0
    assert near_duplicates(train, []) == 0


@pytest.mark.parametrize("question", ["What is 3 + 4?", "Hi"])
def test_a_shared_system_prompt_is_no_duplicate(question: str) -> None:
    system = {"role": "system", "content": " ".join(text(0, 200))}
    train = [{"messages": [system, *conversation("Name a river.", "b")["messages"]]}]
    held_out = [{"messages": [system, *conversation(question, "b")["messages"]]}]
    assert near_duplicates(train, held_out) == 0
    assert near_duplicates(held_out, held_out) == 1
