from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.errors import ConfigError
from potstill.generation import filters


def row(text: str, prompt: str = "why", **more: Any) -> dict[str, Any]:
    user = {"role": "user", "content": prompt}
    return {"messages": [user, {"role": "assistant", "content": text}], **more}


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_answer_of_white_space_is_empty(text: str) -> None:
    assert filters.empty(row(text))
    assert not filters.empty(row("a"))


@pytest.mark.parametrize(
    "text",
    [
        "the rain falls on " * 8,
        "It begins well, as many do, and says something. " + "and then, and then. " * 12,
        "雨が降る" * 10,
        "no " * 30,
        "One sentence that is rather long and says very little of note. " * 4 + "Then it ends.",
    ],
)
def test_a_loop_is_found_anywhere_in_the_answer(text: str) -> None:
    assert filters.repetition_loop(row(text))


@pytest.mark.parametrize(
    "text",
    [
        "no no no",
        "the rain falls on the town and the snow falls on the hill and the sun falls on the sea "
        "word by word it goes on",
        "One sentence that is rather long and says very little of note. " * 3,
        "".join(f"{i}. Item number {i} is a thing. " for i in range(30)),
        "",
    ],
)
def test_fewer_than_four_repeats_or_changed_repeats_are_no_loop(text: str) -> None:
    assert not filters.repetition_loop(row(text))


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot answer.",
        "As an AI language model, I have no opinion.",
        "I cannot provide that information.",
        "Je suis désolé, mais non.",
        "Es tut mir leid, aber nein.",
        "抱歉，我无法回答。",
    ],
)
def test_a_refusal_is_recognized_by_its_start(text: str) -> None:
    assert filters.refusal(row(text))


@pytest.mark.parametrize(
    "text",
    [
        "Rain is water.",
        "I can help you with this.",
        "A" * 200 + " I'm sorry, but I can't help with that.",
    ],
)
def test_an_ordinary_answer_is_no_refusal(text: str) -> None:
    assert not filters.refusal(row(text))


def test_the_script_filter_looks_only_at_letters() -> None:
    latin, cjk = filters.wrong_script("latin"), filters.wrong_script("cjk")
    texts = ("Été 2026!", "дождь", "12 + 3", "雨 rain and more rain here")
    assert [latin(row(text)) for text in texts] == [False, True, False, False]
    assert [cjk(row(text)) for text in ("下雨了", "rain")] == [False, True]
    with pytest.raises(ConfigError, match="klingon"):
        filters.wrong_script("klingon")


def test_the_language_filter_recognizes_french() -> None:
    french = filters.wrong_language("fr")
    assert not french(row("Il pleut parce que l'eau monte et se condense dans les nuages."))
    assert french(row("It rains because water rises and condenses in the clouds."))
    with pytest.raises(ConfigError, match="xx"):
        filters.wrong_language("xx")


def test_length_is_counted_in_characters() -> None:
    bounds = filters.length(3, 5)
    reasons = [
        [name for name, drops in bounds.items() if drops(row(text))]
        for text in ("ab", "abc", "abcdef")
    ]
    assert reasons == [["too_short"], [], ["too_long"]]


def test_eight_shared_words_are_contamination_and_seven_are_not() -> None:
    held_out = "Explain to a child how a rainbow appears in the sky"
    check = filters.contaminated([held_out, "Why rain?"])
    assert check(row("x", prompt="please explain, to a child, how a rainbow appears!"))
    assert not check(row("x", prompt="explain to a child how a rainbow forms"))
    assert check(row("You ask: explain to a child how a rainbow appears."))
    assert check(row("x", prompt="why rain"))
    assert not check(row("x", prompt="why rain falls"))


def test_a_users_function_is_loaded_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def keep(row): return len(row['messages']) == 2\nnumber = 3\n"
    )
    assert filters.users_function(f"{tmp_path}/mine.py:keep")(row("a"))
    (tmp_path / "broken.py").write_text("raise ValueError('no')")
    for place, message in [
        ("mine.py:number", "no function"),
        ("gone.py:keep", "no such"),
        ("broken.py:keep", "ValueError"),
    ]:
        with pytest.raises(ConfigError, match=message):
            filters.users_function(f"{tmp_path}/{place}")
