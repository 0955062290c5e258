"""What is learned is the assistant's turns and their end tokens, in every kind of template."""

from __future__ import annotations

import datetime
import random
from typing import Any

import pytest
from template_kinds import CALLS_AFTER, EMPTY_THOUGHT, KINDS, NO_SYSTEM, OPENED_THOUGHT, Kind

from conftest import CHATML, toy_tokenizer
from potstill.data import encode_conversation
from potstill.data.answers import render_answers
from potstill.data.chat_templates import render
from potstill.data.messages import checked_messages
from potstill.errors import ChatTemplateError
from potstill.models.chat_template import set_template_date

TEXTS = [
    "the rain",
    "in",
    "  on a\nboat ",
    "",
    "\uf8ff \ue000 x",
    "it's [INST] and <|user> \N{SNOWMAN} é",
    "assistant\nthe rain",
    "{{ bos_token }}",
    "[A]",
    "Yes.",
]
CALL = {"function": {"name": "weather", "arguments": {"city": "Paris", "é": [1, None]}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
DIALOGUE = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "Yes."},
]


def tokenizer_of(kind: Kind) -> Any:
    return toy_tokenizer(chat_template=kind.template, added=kind.specials)


def learned(conversation: dict[str, Any], tokenizer: Any) -> list[str]:
    """The supervised text, one string per run of labels."""
    row = encode_conversation(conversation, tokenizer)
    runs: list[list[int]] = [[]]
    for label in row["labels"]:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def random_conversation(kind: Kind, dice: random.Random) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if kind.system and dice.random() < 0.3:
        messages.append({"role": "system", "content": dice.choice(TEXTS)})
    if dice.random() < 0.1 and kind.template.find("[Q]") < 0:
        messages.append({"role": "assistant", "content": "Hello."})
    tools = [TOOL] if kind.tool_calls and dice.random() < 0.5 else None
    for _ in range(dice.randint(1, 4)):
        messages.append({"role": "user", "content": dice.choice(TEXTS) or "?"})
        if kind.tool_calls and dice.random() < 0.5:
            messages.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
            messages.append({"role": "tool", "content": dice.choice(TEXTS)})
        answer = dice.choice(TEXTS)
        if dice.random() < 0.3:
            answer = f"<think>\nthe thought\n</think>\n\n{answer}"
        messages.append({"role": "assistant", "content": answer})
        if dice.random() < 0.2:
            messages[-1]["weight"] = 0
    if dice.random() < 0.2:
        messages.append({"role": "user", "content": "in?"})
    return {"messages": messages, **({"tools": tools} if tools else {})}


def expected(kind: Kind, conversation: dict[str, Any]) -> tuple[str, list[bool]]:
    """The whole text, and for each character whether it is learned."""
    messages = conversation["messages"]
    pieces = kind.written(messages, conversation.get("tools"))
    text = "".join(piece for piece, _ in pieces)
    flags = [flag for piece, flag in pieces for _ in piece]
    return text, flags


@pytest.mark.parametrize("name", KINDS)
def test_what_is_learned_is_the_assistants_turns_and_their_ends_and_nothing_else(name: str) -> None:
    kind, dice = KINDS[name], random.Random(name)
    tokenizer = tokenizer_of(kind)
    for _ in range(60):
        conversation = random_conversation(kind, dice)
        everything = {
            **conversation,
            "messages": [
                {key: value for key, value in message.items() if key != "weight"}
                for message in conversation["messages"]
            ],
        }
        text, flags = expected(kind, everything)
        row = encode_conversation(everything, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert row["input_ids"] == encoded["input_ids"]
        want = [any(flags[start:end]) for start, end in encoded["offset_mapping"]]
        assert [label != -100 for label in row["labels"]] == [False, *want[1:]]
        # A turn with weight 0 is masked, and the other turns are as they were.
        masked = encode_conversation(conversation, tokenizer)
        answers = [m for m in conversation["messages"] if m["role"] == "assistant"]
        assert masked["input_ids"] == row["input_ids"]
        runs, kept_runs = (_runs(one["labels"]) for one in (row, masked))
        if len(runs) == len(answers):
            weights = [message.get("weight", 1) for message in answers]
            assert kept_runs == [run for run, weight in zip(runs, weights, strict=True) if weight]


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    edges = [0, *(i for i in range(1, len(labels)) if (labels[i] < 0) != (labels[i - 1] < 0))]
    pairs = zip(edges, [*edges[1:], len(labels)], strict=True)
    return [(start, stop) for start, stop in pairs if labels[start] >= 0]


@pytest.mark.parametrize("name", KINDS)
def test_the_text_is_what_the_tokenizer_itself_writes(name: str) -> None:
    kind, dice = KINDS[name], random.Random(name)
    tokenizer = tokenizer_of(kind)
    for _ in range(20):
        conversation = random_conversation(kind, dice)
        messages, tools = conversation["messages"], conversation.get("tools")
        own = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert render_answers(tokenizer, messages, tools=tools).text == own
        if messages[-1]["role"] == "user":
            prompt = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True
            )
            assert render(tokenizer, messages, tools=tools, for_answer=True) == prompt


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "calls after the text",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "é": [1, null]}}\n'
            "</tool_call><|im_end|>",
        ),
        (
            "calls instead of the text",
            '{"name": "weather", "parameters": {"city": "Paris", "é": [1, null]}}<|eot_id|>',
        ),
        (
            "a list of calls without a header",
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris", "é": [1, null]}}]'
            "<|im_end|>",
        ),
    ],
)
def test_a_tool_call_is_learned_and_what_the_tool_returns_is_not(name: str, call: str) -> None:
    tokenizer = tokenizer_of(KINDS[name])
    end = call[call.rindex("<|") :]
    assert learned({"messages": DIALOGUE}, tokenizer) == [call, "Yes." + end]
    assert learned({"messages": DIALOGUE[:3]}, tokenizer) == [call]


def test_text_beside_a_call_and_several_calls_are_learned() -> None:
    messages = [
        DIALOGUE[0],
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
        *DIALOGUE[2:],
    ]
    [first, second] = learned({"messages": messages}, toy_tokenizer(chat_template=CALLS_AFTER))
    assert first.startswith("I look.\n<tool_call>")
    assert first.count("</tool_call>") == 2
    assert second == "Yes.<|im_end|>"


def test_a_template_that_loses_a_call_or_the_tools_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match=r"loses the tool call in turn 2 \(weather\)"):
        encode_conversation({"messages": DIALOGUE}, toy_tokenizer())
    answered = {"messages": DIALOGUE[3:], "tools": [TOOL]}
    with pytest.raises(ChatTemplateError, match=r"does not write the tools .*\(weather\)"):
        encode_conversation(answered, toy_tokenizer())
    assert learned(answered, toy_tokenizer(chat_template=CALLS_AFTER)) == ["Yes.<|im_end|>"]


def test_arguments_as_json_text_are_learned_as_if_they_were_objects() -> None:
    as_text = {"function": {"name": "weather", "arguments": '{"city": "Paris", "é": [1, null]}'}}
    messages = checked_messages([{**DIALOGUE[1], "tool_calls": [as_text]}], "here")
    tokenizer = toy_tokenizer(chat_template=CALLS_AFTER)
    both = [
        learned({"messages": [DIALOGUE[0], one]}, tokenizer) for one in (messages[0], DIALOGUE[1])
    ]
    assert both[0] == both[1]


def test_a_template_that_concatenates_the_arguments_gets_them_as_text() -> None:
    template = CALLS_AFTER.replace(
        "{{ {'name': call.name, 'arguments': call.arguments} | tojson }}",
        "{{ call.name + ' ' + call.arguments }}",
    )
    [call, _] = learned({"messages": DIALOGUE}, toy_tokenizer(chat_template=template))
    assert 'weather {"city": "Paris", "é": [1, null]}' in call


def test_a_thought_is_learned_as_the_template_writes_it_and_dropped_ones_are_counted() -> None:
    def thinking(content: str) -> dict[str, Any]:
        return {"role": "assistant", "content": f"<think>\nhm\n</think>\n\n{content}"}

    user = {"role": "user", "content": "on"}
    one = {"messages": [user, thinking("in")]}
    two = {"messages": [user, thinking("in"), user, thinking("a")]}
    qwen, r1 = (
        toy_tokenizer(chat_template=EMPTY_THOUGHT),
        toy_tokenizer(chat_template=OPENED_THOUGHT),
    )
    assert learned(one, qwen) == ["<think>\nhm\n</think>\n\nin<|im_end|>"]
    assert learned(two, qwen) == ["in<|im_end|>", "<think>\nhm\n</think>\n\na<|im_end|>"]
    assert [encode_conversation(row, qwen)["dropped_thoughts"] for row in (one, two)] == [0, 1]
    assert learned({"messages": [user, {"role": "assistant", "content": "in"}]}, qwen) == [
        "<think>\n\n</think>\n\nin<|im_end|>"
    ]
    assert learned(two, r1) == ["\n\nin<|im_end|>", "\n\na<|im_end|>"]
    assert encode_conversation(two, r1)["dropped_thoughts"] == 2
    kept = {"role": "assistant", "content": "in", "reasoning_content": "hm"}
    assert learned({"messages": [user, kept]}, qwen) == ["<think>\nhm\n</think>\n\nin<|im_end|>"]
    assert encode_conversation({"messages": [user, kept]}, toy_tokenizer())["dropped_thoughts"] == 1


def test_generation_blocks_decide_what_is_learned() -> None:
    template = KINDS["generation blocks"].template.replace(
        "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}",
        "({% generation %}{{ message.content }}{% endgeneration %})<|im_end|>",
    )
    messages = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "in"}]
    assert learned({"messages": messages}, toy_tokenizer(chat_template=template)) == ["in"]


def test_the_assistant_may_speak_first_and_content_may_be_absent_beside_a_call() -> None:
    first = [{"role": "assistant", "content": "on"}, *DIALOGUE[3:]]
    assert learned({"messages": first}, toy_tokenizer()) == ["on<|im_end|>", "Yes.<|im_end|>"]
    absent = checked_messages([{"role": "assistant", "tool_calls": [CALL]}], "here")
    assert absent[0]["content"] == ""


def test_a_template_that_refuses_or_drops_the_system_prompt_is_refused_by_row() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *DIALOGUE[3:]]
    with pytest.raises(ChatTemplateError, match="System role not supported"):
        encode_conversation({"messages": messages}, toy_tokenizer(chat_template=NO_SYSTEM))
    dropping = CHATML.replace(
        "message in messages", "message in messages if message.role != 'system'"
    )
    with pytest.raises(ChatTemplateError, match="loses the system prompt"):
        encode_conversation({"messages": messages}, toy_tokenizer(chat_template=dropping))


def test_the_cost_of_a_conversation_is_linear_in_its_turns() -> None:
    """Counted, not timed: the number of messages that the template reads."""
    reads = []

    class Counted(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            reads.append(name)
            return super().__getitem__(name)

    def cost(turns: int) -> int:
        messages = [message for _ in range(turns) for message in DIALOGUE[3:]]
        reads.clear()
        render_answers(tokenizer, [Counted(message) for message in messages])
        return len(reads)

    tokenizer = toy_tokenizer()
    cost(1)
    assert cost(160) < 1.2 * 16 * cost(10)


@pytest.mark.parametrize("date", [None, datetime.date(2026, 1, 31)])
def test_a_tokenizer_that_writes_something_else_than_its_template_is_refused(date: Any) -> None:
    tokenizer = toy_tokenizer()
    set_template_date(tokenizer, date)
    original = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **more: "[system]" + original(*args, **more)
    with pytest.raises(ChatTemplateError, match="otherwise than its chat template says"):
        encode_conversation({"messages": DIALOGUE[3:]}, tokenizer)
