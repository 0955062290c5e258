"""Give a tokenizer a chat template: the plain one, or one from a Jinja file; and its date."""

from __future__ import annotations

import datetime
from pathlib import Path
from weakref import WeakKeyDictionary

from potstill.errors import ChatTemplateError, ConfigError
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
PLAIN = "plain"
_dates: WeakKeyDictionary[Tokenizer, datetime.date] = WeakKeyDictionary()


def set_chat_template(tokenizer: Tokenizer, chat_template: str | None) -> None:
    """Set the plain template (``plain``) or one from a Jinja file; None keeps the tokenizer's.

    ``plain`` is for base models: a tokenizer that has a template of its own keeps it. A file
    replaces it. Raises: ChatTemplateError if the file does not exist.
    """
    if chat_template is None:
        return
    if chat_template == PLAIN:
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
        return
    try:
        tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(
            f"{chat_template}: no such chat template; give plain, or the path of a Jinja file"
        ) from error


def kept_date(*choices: str | None) -> str:
    """Return the first date that is given, else today's: what is continued keeps its date."""
    return next(filter(None, choices), None) or datetime.date.today().isoformat()


def as_date(text: str | None) -> datetime.date | None:
    """Return a date from ``YYYY-MM-DD``; None for None. Raises: ConfigError."""
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"template_date {text!r}: needs a date as YYYY-MM-DD") from error


def set_template_date(tokenizer: Tokenizer, date: datetime.date | None) -> None:
    """Set the date that the template writes (`strftime_now`); None is the current date."""
    if date is None:
        _dates.pop(tokenizer, None)
    else:
        _dates[tokenizer] = date


def template_date(tokenizer: Tokenizer) -> datetime.date | None:
    """Return the date that was set for a tokenizer's template."""
    return _dates.get(tokenizer)
