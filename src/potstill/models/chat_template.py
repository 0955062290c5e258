"""Give a tokenizer a chat template: the plain one, or one from a Jinja file."""

from __future__ import annotations

from pathlib import Path

from potstill.errors import ChatTemplateError
from potstill.protocols import Tokenizer

# For base models, which have no template. A prompt must not end in a blank, because the answer's
# first token contains it (" the" is one token): each role is on a line of its own.
PLAIN_CHAT_TEMPLATE = (
    "{% if bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n"
    "{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def set_chat_template(tokenizer: Tokenizer, chat_template: str | None) -> None:
    """Set the plain template (``plain``) or one from a Jinja file; None keeps the tokenizer's.

    Raises: ChatTemplateError if the file does not exist.
    """
    if chat_template is None:
        return
    if chat_template == "plain":
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        return
    try:
        tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ChatTemplateError(
            f"{chat_template}: no such chat template; give plain, or the path of a Jinja file"
        ) from error


def ensure_chat_template(tokenizer: Tokenizer, chat_template: str | None) -> None:
    """Call `set_chat_template` for a tokenizer that has no template of its own."""
    if not tokenizer.chat_template:
        set_chat_template(tokenizer, chat_template)
