"""Render a conversation with a model's chat template, and check that nothing of it is lost."""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

from potstill.data.marked_templates import MarkedText, render_marked
from potstill.errors import ChatTemplateError
from potstill.models.chat_template import PLAIN_CHAT_TEMPLATE as PLAIN_CHAT_TEMPLATE
from potstill.models.chat_template import set_chat_template as set_chat_template
from potstill.models.chat_template import template_date
from potstill.protocols import Tokenizer

Message = dict[str, Any]
_CHECKED = 8  # conversations whose rendering is compared with the tokenizer's own
_compared: WeakKeyDictionary[Tokenizer, int] = WeakKeyDictionary()


def render(
    tokenizer: Tokenizer,
    messages: list[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
    for_answer: bool = False,
) -> str:
    """Return the text of a conversation; ``for_answer`` appends the generation prompt.

    Raises: ChatTemplateError if there is no chat template, or it rejects the conversation or loses
    its prompt.
    """
    text = rendered_marked(tokenizer, messages, tools, for_answer=for_answer).text
    if for_answer:
        check_shown(messages[-1:], tools, text)
    return text


def rendered_marked(
    tokenizer: Tokenizer,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    for_answer: bool = False,
) -> MarkedText:
    template = template_of(tokenizer, tools)
    # Copies, because a message is recognized by its identity. gpt-oss reads `thinking`.
    copies = [_copy(message) for message in messages]
    variables = {**special_tokens(tokenizer), "tools": tools or None, "documents": None}
    variables |= {"add_generation_prompt": for_answer, "today": template_date(tokenizer)}
    try:
        marked = render_marked(template, copies, **variables)
    except Exception as error:  # a template is a program and may raise anything
        as_text = [_with_arguments_as_text(message) for message in copies]
        if as_text == copies:
            raise _refused(error) from error
        try:  # some templates write the arguments of a tool call as they are
            marked = render_marked(template, as_text, **variables)
        except Exception:
            raise _refused(error) from error
    if not any(message.get("tool_calls") for message in messages):
        _compare(tokenizer, template, copies, variables)
    return marked


def _compare(
    tokenizer: Tokenizer, template: str, messages: list[Message], variables: dict[str, Any]
) -> None:
    """Compare the first renderings with the tokenizer's own, both of today: they must be equal.

    Raises: ChatTemplateError.
    """
    compared = _compared.get(tokenizer, 0)
    if compared >= _CHECKED:
        return
    _compared[tokenizer] = compared + 1
    for _ in range(2):  # a template may write the time, which can pass between the two
        ours = render_marked(template, messages, **{**variables, "today": None}).text
        own = tokenizer.apply_chat_template(
            messages,
            tools=variables["tools"],
            tokenize=False,
            add_generation_prompt=variables["add_generation_prompt"],
        )
        if own == ours:
            return
    raise ChatTemplateError(
        f"the tokenizer of {tokenizer.name_or_path or 'this model'} writes conversations "
        "otherwise than its chat template says; give the template with --chat-template FILE"
    )


def template_of(tokenizer: Tokenizer, tools: list[dict[str, Any]] | None) -> str:
    template: Any = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ChatTemplateError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, and "
            "the data are conversations; pass --chat-template plain, or a Jinja file"
        )
    if isinstance(template, dict):
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            raise ChatTemplateError(
                f"the tokenizer has chat templates named {', '.join(template)}, and none is the "
                "default; give one with --chat-template FILE"
            )
        template = template[name]
    return str(template)


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    return dict(getattr(tokenizer, "special_tokens_map", {}))


def _copy(message: Message) -> Message:
    thought = message.get("reasoning_content")
    return {**message, "thinking": thought} if thought else dict(message)


def _with_arguments_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    as_text = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"])}}
        for call in calls
    ]
    return {**message, "tool_calls": as_text}


def _json(function: dict[str, Any]) -> str:
    return json.dumps(function["arguments"], ensure_ascii=False)


def _refused(error: Exception) -> ChatTemplateError:
    reason = " ".join(str(error).split())[:200]
    return ChatTemplateError(f"the chat template refuses a conversation: {reason}")


def check_shown(messages: list[Message], tools: list[dict[str, Any]] | None, text: str) -> None:
    """Raises: ChatTemplateError if a system prompt, a user's text or a tool is not in the text."""
    position = 0
    for message in messages:
        if message["role"] not in ("system", "user"):
            continue
        content = message["content"].strip()
        found = text.find(content, position)
        position = max(position, found)
        if found < 0 and not contains(text, content):
            who = "the user's text" if message["role"] == "user" else "the system prompt"
            hint = "" if message["role"] == "user" else " (--merge-system)"
            raise ChatTemplateError(
                f"the chat template loses {who} ({message['content'][:60]!r}); use another "
                f"template{hint}"
            )
    for tool in tools or ():
        name = str(tool.get("function", tool).get("name", ""))
        if name not in text:
            raise ChatTemplateError(
                f"the chat template does not write the tools of a conversation ({name}); use a "
                "template that does (--chat-template FILE), or data without tools"
            )


def contains(text: str, part: str) -> bool:
    """Return whether the text has the part, without regard to white space."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())
