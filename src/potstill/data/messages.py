"""Check the messages of a conversation, and bring their many spellings into one.

A message becomes ``{"role", "content"}`` with text as content, and where the data have them
``reasoning_content`` (text), ``tool_calls`` (OpenAI's form, arguments as objects) and ``weight: 0``
(a turn that is not learned). Keys without a value are removed, other keys are kept.
"""

from __future__ import annotations

import json
from typing import Any

from potstill.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system", "function": "tool"}
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_LEARNED = ("train", "training")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")

Message = dict[str, Any]


def checked_messages(messages: Any, place: str) -> list[Message]:
    """Return the messages in one form. Raises: DataError that names ``place`` and the message."""
    if not isinstance(messages, list) or not messages:
        need = 'a list of {"role", "content"} that is not empty'
        raise DataError(f"{place}: messages must be {need}")
    return [_checked(message, f"{place}: message {n}") for n, message in enumerate(messages, 1)]


def from_sharegpt(turns: Any, place: str) -> list[Message]:
    """Return messages from turns of ``{"from", "value"}``. Raises: DataError."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f'{place}: conversations must be a list of {{"from", "value"}}')
    messages = []
    for number, turn in enumerate(turns, 1):
        if turn.get("from") is None:
            messages.append(turn)
            continue
        said = {name: value for name, value in turn.items() if name not in ("from", "value")}
        said |= {"role": _SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if turn["from"] == "function_call":
            calls = _json(turn.get("value"), f"{place}: turn {number}: a function call")
            said |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        messages.append(said)
    return messages


def checked_tools(tools: Any, place: str) -> list[dict[str, Any]]:
    """Return the tools that a row offers, as a list of JSON schemas. Raises: DataError."""
    if isinstance(tools, str):
        tools = _json(tools, f"{place}: tools") if tools.strip() else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: tools must be a list of JSON schemas, or that list as JSON text")
    return [without_none(tool) for tool in tools]


def without_none(value: Any) -> Any:
    """Return JSON data without keys whose value is null: Arrow adds them to every row."""
    if isinstance(value, dict):
        return {name: without_none(one) for name, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def _checked(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{place} needs a role ({', '.join(ROLES)}) and its content as text")
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(f"{place} needs a role ({', '.join(ROLES)}), and has {role!r}")
    for name in _MEDIA:
        if message.get(name):
            raise DataError(f"{place} has {name}; only text can be learned")
    checked = {**message, "role": role}
    if role == "assistant":
        _check_assistant(checked, place)
    elif any(message.get(name) is True for name in _LEARNED):
        raise DataError(f"{place}: only turns of the assistant can be learned, not the {role}'s")
    optional = bool(checked.get("tool_calls") or checked.get("reasoning_content"))
    checked["content"] = _text(message.get("content"), place, optional)
    order = ("role", "content")
    return {name: checked[name] for name in (*order, *(n for n in checked if n not in order))}


def _check_assistant(message: Message, place: str) -> None:
    """Normalize tool calls, thoughts and weights, in place."""
    if "function_call" in message:
        message.setdefault("tool_calls", [message.pop("function_call")])
    if message.get("tool_calls"):
        message["tool_calls"] = _checked_calls(message["tool_calls"], place)
    else:
        message.pop("tool_calls", None)
    thoughts = [message.pop(name) for name in _THOUGHTS if name in message]
    if thoughts and not isinstance(thoughts[0], str):
        raise DataError(f"{place}: its reasoning must be text")
    if thoughts and thoughts[0]:
        message["reasoning_content"] = thoughts[0]
    learned = [message.pop(name) for name in (*_LEARNED, "weight") if name in message]
    if any(weight not in (0, 1) for weight in learned):
        raise DataError(
            f"{place}: its weight is {learned[0]!r}; 0 (not learned) and 1 are possible"
        )
    if "train_detail" in message or "training_detail" in message:
        raise DataError(f"{place}: train_detail is not supported; split the turn, with weight 0")
    if not all(learned):
        message["weight"] = 0


def _text(content: Any, place: str, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        parts = [
            part if isinstance(part, dict) else {"type": "text", "text": part} for part in content
        ]
        for part in parts:
            if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type", type(part.get("text")).__name__)
                raise DataError(f"{place} has a part of type {kind!r}; only text can be learned")
        return "".join(part["text"] for part in parts)
    found = "no content" if content is None else f"content of type {type(content).__name__}"
    raise DataError(f"{place} has {found}; it needs a role ({', '.join(ROLES)}) and text")


def _checked_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls as ``{"type": "function", "function": {"name", "arguments"}}``."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{place}: tool_calls must be a list of calls")
    checked = []
    for call in map(without_none, calls):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: a tool call needs the name of its function, as text")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{place}: the arguments of {function['name']}")
        kept = {name: value for name, value in call.items() if name in ("id", "index")}
        named = {"name": function["name"], "arguments": arguments}
        checked.append({**kept, "type": "function", "function": named})
    return checked


def _json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: must be JSON ({' '.join(str(error).split())})") from error
