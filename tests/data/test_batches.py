from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import CHATML, conversations, learned, tiny_model, toy_tokenizer
from potstill.data import BatchLayout, encode_conversation, tokenize_conversations
from potstill.data.chat_templates import set_chat_template
from potstill.errors import ChatTemplateError, DataError
from potstill.losses import fused_linear_cross_entropy
from potstill.models.heads import hidden_states, model_inputs, output_head, supervised

TWO_ANSWERS = {
    "messages": [
        {"role": "user", "content": "on"},
        {"role": "assistant", "content": "the rain"},
        {"role": "user", "content": "the rain"},
        {"role": "assistant", "content": "in"},
    ]
}


def test_every_assistant_turn_and_its_end_token_is_learned_and_nothing_else(tokenizer: Any) -> None:
    assert learned(TWO_ANSWERS, tokenizer) == ["the rain<|im_end|>", "in<|im_end|>"]


def test_the_first_label_of_a_conversation_is_ignored_in_every_row() -> None:
    """Regression: ``labels = input_ids`` trained on a transition between packed conversations."""
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    long = {"input_ids": [1] * 9, "labels": [1] * 9}
    for packed in (True, False):
        batch = BatchLayout(0, packed)([row, row, row, long, row])
        learned = int((batch["labels"] != -100).sum())
        assert learned == 4 * 2 + 8
        assert int((batch["labels"][:, 1:] != -100).sum()) == learned


def test_an_end_token_added_by_the_tokenizer_is_learned_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = toy_tokenizer()
    plain = encode_conversation({"text": "the rain"}, tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    assert tokenizer("the rain")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_conversation({"text": "the rain"}, tokenizer) == plain


def test_the_end_of_a_cut_off_answer_is_not_learned(tokenizer: Any) -> None:
    assert learned({**TWO_ANSWERS, "cut_off": True}, tokenizer) == ["the rain<|im_end|>", "in"]


def test_an_end_token_without_a_role_in_the_tokenizer_is_learned() -> None:
    llama_3 = toy_tokenizer(
        added=("<|eot|>",), chat_template=CHATML.replace("<|im_end|>", "<|eot|>")
    )
    assert learned(TWO_ANSWERS, llama_3) == ["the rain<|eot|>", "in<|eot|>"]


def test_the_end_token_of_an_empty_answer_is_learned(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "on"}, {"role": "assistant", "content": ""}]
    assert learned({"messages": messages}, tokenizer) == ["<|im_end|>"]


def test_an_answer_that_repeats_the_question_is_located_correctly(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "the rain"},
        {"role": "assistant", "content": "the rain"},
    ]
    row = encode_conversation({"messages": messages}, tokenizer)
    first = next(i for i, label in enumerate(row["labels"]) if label != -100)
    assert "assistant" in tokenizer.decode(row["input_ids"][:first])


def test_a_template_that_trims_and_adds_a_blank_before_the_end_is_supported() -> None:
    template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} <|im_end|>{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "  the rain\n"}]
    assert learned({"messages": messages}, toy_tokenizer(chat_template=template)) == [
        " the rain <|im_end|>"
    ]


def test_text_between_generation_prompt_and_answer_is_learned() -> None:
    template = CHATML.replace(
        "message['content']",
        "('<t>' if message['role'] == 'assistant' else '') + message['content']",
    )
    assert learned(TWO_ANSWERS, toy_tokenizer(chat_template=template)) == [
        "<t>the rain<|im_end|>",
        "<t>in<|im_end|>",
    ]


def test_a_template_that_loses_the_answer_is_refused() -> None:
    lossy = toy_tokenizer(chat_template="{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match="loses the assistant's text in turn 2"):
        encode_conversation(TWO_ANSWERS, lossy)


def test_without_a_chat_template_the_plain_one_is_offered_and_works() -> None:
    base = toy_tokenizer(chat_template=None)
    with pytest.raises(ChatTemplateError, match="--chat-template plain"):
        encode_conversation(TWO_ANSWERS, base)
    set_chat_template(base, "plain")
    assert learned(TWO_ANSWERS, base) == ["the rain<|im_end|>", "in<|im_end|>"]


def test_all_plain_text_but_its_first_token_is_learned(tokenizer: Any) -> None:
    row = encode_conversation({"text": "on the rain"}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "on the rain<|im_end|>"
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_answer_bytes_count_utf8_and_stop_where_the_conversation_is_cut(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "é" * 10}]
    whole = encode_conversation({"messages": messages}, tokenizer)
    assert whole["answer_bytes"] == 20
    prompt = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    cut = encode_conversation({"messages": messages}, tokenizer, max_length=prompt + 4)
    assert (cut["answer_bytes"], cut["shortened"]) == (4, True)


def test_shortened_and_dropped_conversations_are_counted(tokenizer: Any) -> None:
    dataset, counts = tokenize_conversations(conversations(6), tokenizer, max_length=60)
    assert counts.conversations == len(dataset) <= 6
    assert counts.shortened > 0
    assert f"{counts.shortened} cut at the length limit" in str(counts)
    with pytest.raises(DataError, match="nothing to learn: 6 conversations read"):
        tokenize_conversations(conversations(6), tokenizer, max_length=5)


def test_streaming_gives_the_same_rows(tokenizer: Any) -> None:
    whole, _ = tokenize_conversations(conversations(5), tokenizer)
    stream, counts = tokenize_conversations(conversations(5), tokenizer, streaming=True)
    assert [row["input_ids"] for row in stream] == whole["input_ids"]
    assert counts.conversations == 5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2"])
@pytest.mark.parametrize(
    "layout",
    [
        {"packed": True},
        {"packed": True, "one_line": True},
        {"packed": False, "masked": False},
    ],
)
def test_packed_and_padded_batches_have_the_same_loss_and_gradient(
    tokenizer: Any, family: str, layout: dict[str, bool]
) -> None:
    model = tiny_model(family)
    dataset, _ = tokenize_conversations(conversations(7), tokenizer)
    rows = [dataset[i] for i in range(7)]
    results = []
    for options in (layout, {"packed": False}):
        batch = BatchLayout(265, **options)(rows)
        hidden, chosen = supervised(hidden_states(model, model_inputs(batch)), batch["labels"])
        loss = fused_linear_cross_entropy(hidden, output_head(model), chosen)
        model.zero_grad()
        loss.backward()
        results.append((loss.detach(), model.get_input_embeddings().weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)
