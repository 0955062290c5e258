"""Locate the assistant's turns in a rendered conversation.

`marked_templates.py` says what the template wrote for each message; an answer is that text without
the generation prompt before it and the end token after it. A template that marks answers itself
(``{% generation %}``) is believed.
"""

from __future__ import annotations

import functools
import secrets
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from potstill.alignment import special_ids
from potstill.data.chat_templates import (
    Message,
    check_shown,
    contains,
    rendered_marked,
    special_tokens,
    template_of,
)
from potstill.data.marked_templates import MarkedText, Span, render_marked
from potstill.errors import ChatTemplateError
from potstill.protocols import Tokenizer

_special: WeakKeyDictionary[Tokenizer, tuple[frozenset[int], list[str]]] = WeakKeyDictionary()


class Answer(NamedTuple):
    """A part of the rendered text that the assistant wrote."""

    turn: int
    """The number of the message, from 0."""
    start: int
    """The character where generation would start."""
    end: int
    """The character after the last, before the end token."""
    has_end: bool = True
    """Whether the special token that follows, if one does, ends the answer."""


@dataclass
class Rendered:
    """A rendered conversation."""

    text: str
    answers: list[Answer] = field(default_factory=list)
    """In order. Turns with ``weight: 0`` are left out."""
    dropped_thoughts: int = 0
    """Turns whose thought (``<think>``, or reasoning_content) the template does not write."""


def render_answers(
    tokenizer: Tokenizer, messages: list[Message], *, tools: list[dict[str, Any]] | None = None
) -> Rendered:
    """Return the text of a conversation, and where the assistant's turns are in it.

    Raises: ChatTemplateError if the template rejects the conversation, loses a part of it, or does
    not show where a turn begins.
    """
    marked = rendered_marked(tokenizer, messages, tools)
    rendered = Rendered(marked.text)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answers = _generation_spans(tokenizer, marked, turn, messages)
        if answers is None:
            answers = [Answer(turn, *_span(tokenizer, messages, turn, marked, tools))]
        rendered.dropped_thoughts += _check_turn(message, marked.text, answers)
        if message.get("weight", 1):
            rendered.answers += answers
    check_shown(messages, tools, marked.text)
    return rendered


def _generation_spans(
    tokenizer: Tokenizer, marked: MarkedText, turn: int, messages: list[Message]
) -> list[Answer] | None:
    """Return the parts of a turn that the template marks; None if it marks nothing."""
    if not marked.generation:
        return None
    first, last = marked.written.get(turn, (0, 0))
    if last:
        spans = [span for span in marked.generation if first <= span[0] and span[1] <= last]
    else:
        turns = [
            number for number, message in enumerate(messages) if message["role"] == "assistant"
        ]
        if len(turns) != len(marked.generation):
            raise ChatTemplateError(
                f"the chat template marks {len(marked.generation)} parts as generated, and the "
                f"conversation has {len(turns)} assistant turns; use another template"
            )
        spans = [marked.generation[turns.index(turn)]]
    answers = []
    for start, stop in spans:
        end = _before_end(tokenizer, marked.text, start, stop, None)
        after = marked.text[end : max(last, stop)].lstrip()
        has_end = any(after.startswith(token) for token in _special_texts(tokenizer))
        answers.append(Answer(turn, start, end if has_end else stop, has_end))
    return answers


def _span(
    tokenizer: Tokenizer,
    messages: list[Message],
    turn: int,
    marked: MarkedText,
    tools: list[dict[str, Any]] | None,
) -> Span:
    """Return the answer's place: after the generation prompt, before the end token."""
    start, end = marked.written.get(turn, (0, 0))
    opening = _opening(template_of(tokenizer, tools), tuple(special_tokens(tokenizer).items()))
    if not end or opening is None:
        start, end = _by_prefixes(tokenizer, messages, turn, marked.text, tools)
    elif marked.text.startswith(opening.prompt, start, end):
        start += len(opening.prompt)
    elif marked.text.startswith(opening.header, start, end):
        start += len(opening.header)
    elif opening.prompt[:1] == marked.text[start : start + 1]:
        start, _ = _by_prefixes(tokenizer, messages, turn, marked.text, tools)
    return start, _before_end(tokenizer, marked.text, start, end, opening)


class _Opening(NamedTuple):
    """What a template writes around an answer, seen in a conversation of two turns."""

    prompt: str
    """The generation prompt."""
    header: str
    """What is before the content; with a template that begins the answer, more than ``prompt``."""
    closing: str
    """What is after the content."""


@functools.lru_cache(maxsize=64)
def _opening(template: str, special_tokens: tuple[tuple[str, Any], ...]) -> _Opening | None:
    """Return what is around an answer; None if the user's text is in the answer's part."""
    asked, said = secrets.token_hex(8), secrets.token_hex(8)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    variables: dict[str, Any] = {**dict(special_tokens), "tools": None, "documents": None}
    try:
        whole = render_marked(template, messages, add_generation_prompt=False, **variables)
        prompt = render_marked(template, messages[:1], add_generation_prompt=True, **variables)
    except Exception:  # it refuses so short a conversation
        return None
    start, end = whole.written.get(1, (0, 0))
    header, found, closing = whole.text[start:end].partition(said)
    if not found or asked in header or 0 not in prompt.written:
        return None
    # Some templates write the generation prompt after every conversation, so what is after the
    # question is compared, and not the text with and without the prompt.
    return _Opening(prompt.text[prompt.written[0][1] :], header, closing)


def _before_end(
    tokenizer: Tokenizer, text: str, start: int, end: int, opening: _Opening | None
) -> int:
    """Return where the answer ends, without the end token and the blanks around it."""
    written = text[start:end].rstrip()
    for token in _special_texts(tokenizer):
        if written.endswith(token):
            return start + len(written.removesuffix(token).rstrip())
    if opening and text.endswith(opening.closing, start, end):
        return end - len(opening.closing)
    return start + len(written)


def _special_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens, the longest first."""
    ids = special_ids(tokenizer)
    known, texts = _special.get(tokenizer, (frozenset[int](), list[str]()))
    if known != ids:
        found = tokenizer.convert_ids_to_tokens(sorted(ids))
        texts = sorted((text for text in found if text), key=len, reverse=True)
        _special[tokenizer] = ids, texts
    return texts


def _by_prefixes(
    tokenizer: Tokenizer,
    messages: list[Message],
    turn: int,
    text: str,
    tools: list[dict[str, Any]] | None,
) -> Span:
    """Return a turn's place from what the template writes for the messages before it.

    Only for templates that do not write message by message: the cost is one rendering a turn.
    """
    prompt = rendered_marked(tokenizer, messages[:turn], tools, for_answer=True).text
    if not text.startswith(prompt):
        prompt = rendered_marked(tokenizer, messages[:turn], tools).text
    so_far = rendered_marked(tokenizer, messages[: turn + 1], tools).text
    end = _common_length(so_far, text)
    if not text.startswith(prompt) or end <= len(prompt):
        raise ChatTemplateError(
            f"the chat template does not show where turn {turn + 1} begins and ends: it writes "
            "the turns before it differently when more follow; use another template"
        )
    return len(prompt), end


def _common_length(one: str, other: str) -> int:
    """Return the number of characters that both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _check_turn(message: Message, text: str, answers: list[Answer]) -> bool:
    """Return whether the template drops the turn's thought.

    Raises: ChatTemplateError if it drops something else that the assistant wrote.
    """
    if not answers:  # a template that marks only some turns for training
        return False
    turn = answers[0].turn
    written = "".join(text[one.start : one.end] for one in answers)
    thought, _, answer = message["content"].rpartition("</think>")
    thought = thought.removeprefix("<think>") + message.get("reasoning_content", "")
    if not contains(written, answer):
        raise ChatTemplateError(
            f"the chat template loses the assistant's text in turn {turn + 1} "
            f"({answer.strip()[:40]!r}); use another template"
        )
    for call in message.get("tool_calls", ()):
        if not contains(written, call["function"]["name"]):
            raise ChatTemplateError(
                f"the chat template loses the tool call in turn {turn + 1} "
                f"({call['function']['name']}); use a template that writes tool calls"
            )
    return not contains(written, thought)
