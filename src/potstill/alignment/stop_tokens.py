"""The tokens a model ends its turn with."""

from __future__ import annotations

from typing import Any

from potstill.alignment.token_bytes import special_ids

_ANSWER = "\uf8ff"  # a private character, which no template writes


def stop_tokens(tokenizer: Any) -> list[int]:
    """The special token its chat template writes after an answer, then its end-of-sequence token; each where there is one.

    A generation config may name more (``eos_token_id``), which a tokenizer does not know.
    """
    found = [_end_of_turn(tokenizer), tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in found if i is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program, and raises what it likes; the data layer reports it
        return None
    special = special_ids(tokenizer)
    after = tokenizer.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False)
    return next((i for i in after if i in special), None)
