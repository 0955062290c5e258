"""Render a conversation with a model's chat template, and locate the assistant's text in it.

Templates trim, add system prompts and drop earlier thoughts, so the messages do not show where an
answer is. It is located by rendering twice, the second time with the answer replaced by a character
that no text contains: where the two renderings differ is the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from potstill.errors import ChatTemplateError
from potstill.models.chat_template import PLAIN_CHAT_TEMPLATE as PLAIN_CHAT_TEMPLATE
from potstill.models.chat_template import ensure_chat_template as ensure_chat_template
from potstill.models.chat_template import set_chat_template as set_chat_template
from potstill.protocols import Tokenizer

_PLACEHOLDER = "\uf8ff"  # the last character of Unicode's private use area

Span = tuple[int, int]
Message = dict[str, Any]


def render(tokenizer: Tokenizer, messages: list[Message], *, for_answer: bool = False) -> str:
    """Return the text of a conversation; ``for_answer`` appends the generation prompt.

    Raises: ChatTemplateError if there is no chat template, or it rejects the conversation or loses
    its prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, and "
            "the data are conversations; pass --chat-template plain, or a Jinja file"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=for_answer
        )
    except Exception as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ChatTemplateError(f"the chat template refuses a conversation: {reason}") from error
    prompt = messages[-1]["content"] if for_answer else ""
    if isinstance(prompt, str) and "".join(prompt.split()) not in "".join(text.split()):
        lost = f"the chat template loses the user's text ({prompt[:60]!r})"
        raise ChatTemplateError(f"{lost}; use another template")
    return text


def answer_spans(tokenizer: Tokenizer, messages: list[Message]) -> tuple[str, list[Span]]:
    """Return the rendered text, and the span of each assistant turn in it.

    A span starts where generation would start. Raises: ChatTemplateError if the template drops an
    assistant's text.
    """
    text = render(tokenizer, messages)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    return text, [_span(tokenizer, messages, turn, text) for turn in turns]


def _span(tokenizer: Tokenizer, messages: list[Message], turn: int, text: str) -> Span:
    replaced = {**messages[turn], "content": _PLACEHOLDER}
    marked = render(tokenizer, [*messages[:turn], replaced, *messages[turn + 1 :]])
    start = _common_length(text, marked)
    end = len(text) - _common_length(reversed(text[start:]), reversed(marked[start:]))
    content = messages[turn]["content"].strip()
    if content and content not in text[start:end]:
        raise ChatTemplateError(
            f"the chat template loses the assistant's text in turn {turn + 1} "
            f"({content[:40]!r}); use another template"
        )
    prompt = render(tokenizer, messages[:turn], for_answer=True)
    # A template may begin the answer (Qwen3's empty thought): that beginning is supervised, too.
    if len(prompt) <= start and text.startswith(prompt):
        start = len(prompt)
    return start, end


def _common_length(one: Iterable[str], other: Iterable[str]) -> int:
    """Return the number of characters that both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
