"""Render a conversation with a model's own chat template, and find in the text what the assistant said.

Templates trim, prepend system prompts and drop earlier thoughts, so an answer's place cannot be known from the messages. It is
found by experiment: the conversation is rendered once more with the answer replaced by a character no text holds, and what the
two renderings do not share is the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from potstill.errors import ChatTemplateError
from potstill.models.chat_template import PLAIN_CHAT_TEMPLATE as PLAIN_CHAT_TEMPLATE
from potstill.models.chat_template import ensure_chat_template as ensure_chat_template
from potstill.models.chat_template import set_chat_template as set_chat_template

_NEVER_IN_TEXT = "\uf8ff"  # the last character of Unicode's private use area

Span = tuple[int, int]


def render(tokenizer: Any, messages: list[dict[str, Any]], *, for_answer: bool = False) -> str:
    """The text of a conversation; ``for_answer`` ends it where the assistant's next turn would begin.

    Raises: ChatTemplateError if the tokenizer has no chat template or its template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, and the data are conversations; "
            "pass --chat-template plain, or a Jinja file"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer)
    except Exception as error:  # a template is a program, and raises what it likes
        raise ChatTemplateError(f"the chat template refuses a conversation: {' '.join(str(error).split())[:200]}") from error
    return text


def answer_spans(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
    """The rendered text, and where in it each assistant turn stands: from where generation would begin to the answer's end.

    Raises: ChatTemplateError if the template loses an assistant's text.
    """
    text = render(tokenizer, messages)
    return text, [_span(tokenizer, messages, turn, text) for turn, m in enumerate(messages) if m["role"] == "assistant"]


def _span(tokenizer: Any, messages: list[dict[str, Any]], turn: int, text: str) -> Span:
    marked = render(tokenizer, [*messages[:turn], {**messages[turn], "content": _NEVER_IN_TEXT}, *messages[turn + 1 :]])
    start = _common_length(text, marked)
    end = len(text) - _common_length(reversed(text[start:]), reversed(marked[start:]))
    content = messages[turn]["content"].strip()
    if content and content not in text[start:end]:
        raise ChatTemplateError(
            f"the chat template loses what the assistant said in turn {turn + 1} ({content[:40]!r}); use another"
        )
    prompt = render(tokenizer, messages[:turn], for_answer=True)
    # A template may open the answer itself (Qwen3's empty thought): what follows the generation prompt is to be learned too.
    if len(prompt) <= start and text.startswith(prompt):
        start = len(prompt)
    return start, end


def _common_length(one: Iterable[str], other: Iterable[str]) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
