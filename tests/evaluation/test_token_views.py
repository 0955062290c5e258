"""Token views in evaluation.json, compared with the models one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignment.toys import sentencepiece
from conftest import conversations, tiny_model, toy_tokenizer
from potstill.distillation.run import LIKELIEST
from potstill.evaluation import HeldOut
from potstill.evaluation import token_views as module
from potstill.evaluation.token_views import speller, token_views


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """The views of two students, and their inputs."""
    tokenizer, teacher = toy_tokenizer(), tiny_model()
    pair = HeldOut(tokenizer, tokenizer, conversations(6), max_length=100)
    students = {"before": tiny_model(layers=2, seed=1), "after": tiny_model(layers=2, seed=2)}
    scores = {
        name: pair.score_student(model, teacher, likeliest=LIKELIEST)
        for name, model in students.items()
    }
    return {
        "pair": pair,
        "models": {"teacher": teacher, **students},
        "scores": scores,
        "views": token_views(pair, **scores),
    }


def test_a_view_has_the_answers_tokens_in_order_with_their_scores(seen: dict[str, Any]) -> None:
    for number, view in enumerate(
        [seen["views"]["token_view"], *seen["views"]["more_token_views"]]
    ):
        labels = [label for label in seen["pair"].dataset[number]["labels"] if label != -100]
        spell = speller(seen["pair"].tokenizer)
        assert [token["text"] for token in view["tokens"]] == [spell(label) for label in labels]
        for name, scores in seen["scores"].items():
            here = scores.conversation == number
            assert [token[f"{name}_kl_nats"] for token in view["tokens"]] == scores.kl[
                here
            ].tolist()
            assert [token[f"{name}_nll_nats"] for token in view["tokens"]] == scores.nll[
                here
            ].tolist()
    assert len(seen["views"]["more_token_views"]) == module.VIEWED_ANSWERS - 1


@pytest.mark.parametrize("who", ["teacher", "before", "after"])
def test_next_contains_the_models_most_likely_tokens(seen: dict[str, Any], who: str) -> None:
    row = seen["pair"].dataset[0]
    with torch.no_grad():
        logits = seen["models"][who](torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
    logits = logits[:, : seen["pair"].rows]  # ids that have a token
    spell = speller(seen["pair"].tokenizer)
    places = [t - 1 for t, label in enumerate(row["labels"]) if label != -100]
    for token, place in zip(seen["views"]["token_view"]["tokens"], places, strict=True):
        top = logits[place].softmax(-1).topk(5)
        assert [text for text, _ in token["next"][who]] == [spell(i) for i in top.indices.tolist()]
        assert [p for _, p in token["next"][who]] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_the_worst_token_of_each_conversation_is_listed_with_the_worst_first(
    seen: dict[str, Any],
) -> None:
    scores = seen["scores"]["after"]
    furthest = sorted(
        (scores.kl[scores.conversation == number].max().item() for number in range(6)), reverse=True
    )
    assert [row["after_kl_nats"] for row in seen["views"]["worst_tokens"]] == furthest


def test_across_tokenizers_a_view_has_nll_but_no_kl_and_no_teacher() -> None:
    tokenizer = sentencepiece(prepend="first")
    tokenizer.pad_token = tokenizer.eos_token
    pair = HeldOut(toy_tokenizer(), tokenizer, conversations(3), max_length=100)
    student = tiny_model(layers=2, rows=len(tokenizer))
    scores = pair.score_student(student, tiny_model(), likeliest=LIKELIEST)
    views = token_views(pair, scores, scores)
    token = views["token_view"]["tokens"][0]
    assert token["after_kl_nats"] is None
    assert token["after_nll_nats"] > 0
    assert token["next"].keys() == {"before", "after"}
    assert views["worst_tokens"] == []


def test_a_view_of_plain_text_starts_at_its_second_token() -> None:
    tokenizer = toy_tokenizer()
    pair = HeldOut(tokenizer, tokenizer, [{"text": "the rain"}], max_length=100)
    scores = pair.score_student(tiny_model(layers=2), tiny_model(), likeliest=LIKELIEST)
    view = token_views(pair, scores, scores)["token_view"]
    assert view["prompt"] == ""
    assert len(view["tokens"]) == len(scores.nll)


def test_incomplete_characters_are_shown_as_bytes_and_special_tokens_by_name() -> None:
    tokenizer = toy_tokenizer()
    spell = speller(tokenizer)
    assert "".join(spell(i) for i in tokenizer("é").input_ids) == "\\xc3\\xa9"
    assert spell(265) == "<|im_end|>"
    assert spell(256) == " t"
