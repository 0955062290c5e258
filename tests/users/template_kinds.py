"""Fifteen kinds of chat templates, and what each must write and learn, said in Python.

The templates are written for these tests in the manner of well-known models. A reference writer
returns pieces of text, each with True if the assistant wrote it (what is learned).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]
Pieces = list[tuple[str, bool]]


class Kind(NamedTuple):
    template: str
    written: Callable[[Messages, Any], Pieces]
    specials: tuple[str, ...] = ()
    tool_calls: bool = False
    thoughts: str = "kept"
    """kept (as part of the content), or stripped from all turns, or from earlier turns."""
    system: bool = True


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", ())]


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _answer(content: str) -> str:
    return content.split("</think>")[-1].lstrip("\n")


def _turn(role: str, text: str) -> Pieces:
    """ChatML's turn, which most kinds write."""
    opening = (f"<|im_start|>{role}\n", False)
    return [opening, (text + "<|im_end|>", role == "assistant"), ("\n", False)]


# --- calls after the text (Qwen2.5, Hermes) ---------------------------------------------------

CALLS_AFTER = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}<|im_start|>assistant
{% if message.content %}{{ message.content + '\n' }}{% endif %}
{%- for call in message.tool_calls %}
{%- if call.function %}{% set call = call.function %}{% endif %}<tool_call>
{{ {'name': call.name, 'arguments': call.arguments} | tojson }}
</tool_call>{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}
{%- if loop.previtem and loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}

<tool_response>
{{ message.content }}
</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}
{%- else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _calls_after(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = []
    if tools:
        listed = "".join(_dumps(tool) + "\n" for tool in tools)
        pieces.append((f"<|im_start|>system\n{listed}<|im_end|>\n", False))
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        roles = [one["role"] for one in messages]
        if role == "assistant" and _calls(message):
            body = content + "\n" if content else ""
            body += "\n".join(
                "<tool_call>\n"
                + _dumps({"name": call["name"], "arguments": call["arguments"]})
                + "\n</tool_call>"
                for call in _calls(message)
            )
            pieces += _turn(role, body)
        elif role == "tool":
            opened = "<|im_start|>user" if roles[number - 1] != "tool" else ""
            closed = "<|im_end|>\n" if roles[number + 1 : number + 2] != ["tool"] else ""
            text = f"{opened}\n<tool_response>\n{content}\n</tool_response>{closed}"
            pieces.append((text, False))
        else:
            pieces += _turn(role, content)
    return pieces


# --- calls instead of the text (Llama 3.1) ----------------------------------------------------

CALLS_INSTEAD = """{{ bos_token }}{% if not date_string is defined %}
{%- set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif -%}
<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}
{{ system }}
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<|eot_id|>
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function -%}
<|start_header_id|>assistant<|end_header_id|>

{{ {'name': call.name, 'parameters': call.arguments} | tojson }}<|eot_id|>
{%- elif message.role == 'tool' -%}
<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


def _calls_instead(messages: Messages, tools: Any) -> Pieces:
    import datetime

    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    today = datetime.datetime.now().strftime("%d %b %Y")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    listed = "".join(_dumps(tool) for tool in tools or ())
    first = f"<|im_start|>{header.format('system')}Today Date: {today}\n{system}{listed}<|eot_id|>"
    pieces: Pieces = [(first, False)]
    for message in messages[1 if messages[0]["role"] == "system" else 0 :]:
        role, content = message["role"], message["content"]
        if _calls(message):
            [call] = _calls(message)
            content = _dumps({"name": call["name"], "parameters": call["arguments"]})
        elif role == "tool":
            role, content = "ipython", _dumps(content)
        else:
            content = content.strip()
        learned = role == "assistant"
        pieces += [(header.format(role), False), (content + "<|eot_id|>", learned)]
    return pieces


# --- thoughts (Qwen3) -------------------------------------------------------------------------

EMPTY_THOUGHT = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content %}{% set thought = '' %}
{%- if message.reasoning_content %}{% set thought = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or thought) %}<think>
{{ thought.strip('\n') }}
</think>

{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _empty_thought(messages: Messages, tools: Any) -> Pieces:
    last = max((n for n, one in enumerate(messages) if one["role"] == "user"), default=-1)
    pieces: Pieces = []
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "assistant":
            thought = message.get("reasoning_content", "")
            if not thought and "</think>" in content:
                thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1]
                thought = thought.lstrip("\n")
                content = _answer(content)
            if number > last and (number == len(messages) - 1 or thought):
                content = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n" + content.lstrip("\n")
        pieces += _turn(role, content)
    return pieces


# --- the generation prompt opens a thought, the text strips it (R1 distills) -------------------

OPENED_THOUGHT = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}<|user|>{{ message.content }}
{%- elif message.role == 'assistant' %}<|assistant|>
{%- if '</think>' in message.content %}{{ message.content.split('</think>')[-1] }}
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{%- else %}{{ message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|><think>
{% endif %}"""


def _opened_thought(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = [("<|im_start|>", False)]
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = content.split("</think>")[-1]
            pieces += [("<|assistant|>", False), (content + "<|im_end|>", True)]
        else:
            pieces.append((("<|user|>" if role == "user" else "") + content, False))
    return pieces


# --- no end token of its own: the next role's token ends a turn (GLM-4) ------------------------

NEXT_ROLE_ENDS = """[gMASK]{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def _next_role_ends(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = [("[gMASK]", False)]
    before = False
    for message in messages:
        learned = message["role"] == "assistant"
        pieces += [(f"<|{message['role']}|>", before), ("\n", False), (message["content"], learned)]
        before = learned
    return pieces


# --- instructions in brackets, blanks before the end (Llama 2, Mistral) ------------------------

BRACKETS = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}[INST] {{ message.content | trim }} [/INST]
{%- elif message.role == 'system' %}<<SYS>>{{ message.content }}<</SYS>>
{%- else %} {{ message.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"""


def _brackets(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = [("<|im_start|>", False)]
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            pieces.append((f"[INST] {content.strip()} [/INST]", False))
        elif message["role"] == "system":
            pieces.append((f"<<SYS>>{content}<</SYS>>", False))
        else:
            pieces.append((f" {content.strip()} <|im_end|>", True))
    return pieces


# --- tool calls as a list after a marker, no header (Mistral's function calling) ---------------

CALL_LIST = """{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}[INST]{{ message.content }}[/INST]
{%- elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- elif message.role == 'system' %}[SYSTEM]{{ message.content }}[/SYSTEM]
{%- elif message.tool_calls %}{{ message.content }}[TOOL_CALLS][
{%- for call in message.tool_calls %}{{ {'name': call.function.name,
 'arguments': call.function.arguments} | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]
{{- eos_token }}
{%- else %}{{ message.content }}{{ eos_token }}{% endif %}
{%- endfor %}"""


def _call_list(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = [("<|im_start|>", False)]
    if tools:
        pieces.append((f"[AVAILABLE_TOOLS]{_dumps(tools)}[/AVAILABLE_TOOLS]", False))
    marks = {"user": "INST", "tool": "TOOL_RESULTS", "system": "SYSTEM"}
    for message in messages:
        content = message["content"]
        if message["role"] in marks:
            mark = marks[message["role"]]
            pieces.append((f"[{mark}]{content}[/{mark}]", False))
            continue
        if _calls(message):
            calls = (
                _dumps({"name": call["name"], "arguments": call["arguments"]})
                for call in _calls(message)
            )
            content += "[TOOL_CALLS][" + ", ".join(calls) + "]"
        pieces.append((content + "<|im_end|>", True))
    return pieces


# --- {% generation %} marks (SmolLM3 and templates made for TRL) -------------------------------

GENERATION = """{% for message in messages %}
{%- if message.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}
{%- else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _chatml(messages: Messages, tools: Any) -> Pieces:
    return [piece for one in messages for piece in _turn(one["role"], one["content"])]


# --- the assistant's header belongs to the user's part (Phi-3) ---------------------------------

HEADER_IN_USER = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '<|user|>\n' + message.content + '<|end|>\n<|assistant|>\n' }}
{%- elif message.role == 'system' %}{{ '<|system|>\n' + message.content + '<|end|>\n' }}
{%- else %}{{ message.content + '<|end|>\n' }}{% endif %}{% endfor %}"""


def _header_in_user(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = [("<|im_start|>", False)]
    for message in messages:
        role, content = message["role"], message["content"]
        after = "<|assistant|>\n" if role == "user" else ""
        if role == "assistant":
            pieces += [(content + "<|end|>", True), ("\n", False)]
        else:
            pieces.append((f"<|{role}|>\n{content}<|end|>\n{after}", False))
    return pieces


# --- a macro writes each message (gpt-oss, Command R) ------------------------------------------

MACRO = """{%- macro write(message) -%}
<|turn|>{{ message.role | upper }}<|say|>{{ message.content }}<|end|>{%- endmacro -%}
{%- set conversation = messages -%}
{%- for message in conversation -%}{{ write(message) }}{%- endfor -%}
{%- if add_generation_prompt -%}<|turn|>ASSISTANT<|say|>{%- endif -%}"""


def _macro(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        header = f"<|turn|>{message['role'].upper()}<|say|>"
        pieces += [
            (header, False),
            (message["content"] + "<|end|>", message["role"] == "assistant"),
        ]
    return pieces


# --- other names for roles, no system role (Gemma) ---------------------------------------------

NO_SYSTEM = """{{ bos_token }}{% if messages[0].role == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
<|turn|>{{ role }}
{{ message.content | trim }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|turn|>model
{% endif %}"""


def _no_system(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = [("<|im_start|>", False)]
    for message in messages:
        learned = message["role"] == "assistant"
        role = "model" if learned else message["role"]
        pieces += [
            (f"<|turn|>{role}\n", False),
            (message["content"].strip() + "<|end|>", learned),
            ("\n", False),
        ]
    return pieces


# --- the plain template, and one that does not write in a loop over the messages ---------------

PLAIN = """{% for message in messages %}{{ message.role | capitalize }}:
{{ message.content | trim }}{{ eos_token if message.role == 'assistant' else '' }}

{% endfor %}{% if add_generation_prompt %}Assistant:
{% endif %}"""


def _plain(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        content = message["content"].strip()
        pieces.append((f"{message['role'].capitalize()}:\n", False))
        if message["role"] == "assistant":
            pieces += [(content + "<|im_end|>", True), ("\n\n", False)]
        else:
            pieces.append((content + "\n\n", False))
    return pieces


BY_INDEX = """{% for i in range(messages | length) %}<|im_start|>{{ messages[i].role }}
{{ messages[i].content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# --- the user's text is kept until the answer is written --------------------------------------

PENDING = """{% set ns = namespace(asked='') %}{% for message in messages %}
{%- if message.role == 'assistant' %}[Q]{{ ns.asked }}[A]{{ message.content }}<|im_end|>
{%- set ns.asked = '' %}
{%- else %}{% set ns.asked = ns.asked ~ message.content %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt or ns.asked %}[Q]{{ ns.asked }}[A]{% endif %}"""


def _pending(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = []
    asked = ""
    for message in messages:
        if message["role"] == "assistant":
            pieces += [(f"[Q]{asked}[A]", False), (message["content"] + "<|im_end|>", True)]
            asked = ""
        else:
            asked += message["content"]
    return [*pieces, (f"[Q]{asked}[A]", False)] if asked else pieces


# --- the generation prompt is written after every conversation (the first Llama 3) --------------

ALWAYS = """{% for message in messages %}<|turn|>{{ message.role }}<|say|>
{{ message.content | trim }}<|end|>{% endfor %}<|turn|>assistant<|say|>
{{- '\n' }}"""


def _always(messages: Messages, tools: Any) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        learned = message["role"] == "assistant"
        text = message["content"].strip() + "<|end|>"
        pieces += [(f"<|turn|>{message['role']}<|say|>\n", False), (text, learned)]
    return [*pieces, ("<|turn|>assistant<|say|>\n", False)]


KINDS = {
    "a prompt after every conversation": Kind(ALWAYS, _always, ("<|turn|>", "<|say|>", "<|end|>")),
    "calls after the text": Kind(CALLS_AFTER, _calls_after, tool_calls=True),
    "calls instead of the text": Kind(
        CALLS_INSTEAD,
        _calls_instead,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        tool_calls=True,
    ),
    "an empty thought": Kind(EMPTY_THOUGHT, _empty_thought, thoughts="earlier"),
    "a thought that the prompt opens": Kind(
        OPENED_THOUGHT, _opened_thought, ("<|user|>", "<|assistant|>"), thoughts="stripped"
    ),
    "the next role ends a turn": Kind(
        NEXT_ROLE_ENDS, _next_role_ends, ("<|user|>", "<|assistant|>", "<|system|>", "[gMASK]")
    ),
    "brackets": Kind(BRACKETS, _brackets),
    "a list of calls without a header": Kind(
        CALL_LIST, _call_list, ("[INST]", "[/INST]", "[TOOL_CALLS]"), tool_calls=True
    ),
    "generation blocks": Kind(GENERATION, _chatml),
    "the header in the user's part": Kind(
        HEADER_IN_USER, _header_in_user, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    ),
    "a macro": Kind(MACRO, _macro, ("<|turn|>", "<|say|>", "<|end|>")),
    "no system role": Kind(NO_SYSTEM, _no_system, ("<|turn|>", "<|end|>"), system=False),
    "plain": Kind(PLAIN, _plain),
    "by index": Kind(BY_INDEX, _chatml),
    "the question is written with the answer": Kind(PENDING, _pending),
}
