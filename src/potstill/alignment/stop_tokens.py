"""Find the tokens with which a model ends its turn."""

from __future__ import annotations

from potstill.alignment.token_bytes import special_ids
from potstill.protocols import Tokenizer

_ANSWER = "\uf8ff"  # a private-use character, which no template writes


def stop_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the special token that the chat template writes after an answer, then the EOS token.

    A missing one is left out. ``eos_token_id`` of the generation config may name more tokens.
    """
    found = [_end_of_turn(tokenizer), tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in found if i is not None))


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template can raise any exception; the data layer reports it
        return None
    special = special_ids(tokenizer)
    after = tokenizer.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False)
    return next((i for i in after if i in special), None)
