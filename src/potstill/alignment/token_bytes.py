"""The exact bytes that each token stands for.

A vocabulary is written in one of a few alphabets, and the same spelling means different bytes in each: ``Ġthe`` and ``▁the`` are
both " the", and ``<0x0A>`` is a newline where bytes are the fallback, six characters elsewhere. Only bytes can be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from potstill.errors import OpaqueTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ADDED_AS_SPECIAL: WeakKeyDictionary[Any, tuple[int, frozenset[int]]] = WeakKeyDictionary()
_LOSSY_NORMALIZERS = {"BertNormalizer", "Lowercase", "StripAccents"}


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of every id; None for a special token, and for an id that no token has.

    For any text that the tokenizer leaves as it is, the bytes of its ids joined are the text's UTF-8. A SentencePiece tokenizer
    may add one blank before a text (the dummy prefix), which is then in its first token's bytes; a tokenizer that normalises
    (Qwen's NFC; "▁" read as a blank) gives the bytes of the text that it made of it.

    Raises: OpaqueTokenizer if bytes cannot be recovered (WordPiece, lower-casing, an unknown kind).

    >>> from conftest import toy_tokenizer
    >>> tokens = token_bytes(toy_tokenizer())
    >>> tokens[256], tokens[264]
    (b' t', None)
    """
    spellings, to_bytes = _alphabet(tokenizer)
    special = special_ids(tokenizer)
    return [None if token is None or i in special else to_bytes(token) for i, token in enumerate(spellings)]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that mark structure and stand for no text: all that were added as special, not only those with a role (EOS, …)."""
    size, added = _ADDED_AS_SPECIAL.get(tokenizer, (-1, frozenset()))
    if size != len(tokenizer):  # Gemma has thousands of added tokens, and a data loader asks for every conversation
        decoder = getattr(tokenizer, "added_tokens_decoder", {})
        added = frozenset(i for i, token in decoder.items() if token.special)
        _ADDED_AS_SPECIAL[tokenizer] = len(tokenizer), added
    return added.union(tokenizer.all_special_ids)


def backend_settings(tokenizer: Any) -> dict[str, Any] | None:
    """What `tokenizers` knows of a fast tokenizer (its ``tokenizer.json``), or None for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())


def _alphabet(tokenizer: Any) -> tuple[list[Any], Callable[[Any], bytes]]:
    """How the token of each id is spelled, and how to read that."""
    settings = backend_settings(tokenizer)
    if settings is not None:
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
        return tokenizer.convert_ids_to_tokens(list(range(size))), _reader(tokenizer, settings)
    if isinstance(getattr(tokenizer, "mergeable_ranks", None), dict):  # tiktoken's are bytes already
        return _by_id(tokenizer.mergeable_ranks, len(tokenizer)), bytes
    if hasattr(tokenizer, "sp_model"):
        return _by_id(tokenizer.get_vocab(), len(tokenizer)), _sentencepiece_bytes
    raise _opaque(tokenizer, "it keeps its vocabulary in no known form")


def _by_id(vocabulary: dict[Any, int], size: int) -> list[Any]:
    spellings: list[Any] = [None] * max(size, 1 + max(vocabulary.values(), default=-1))
    for token, i in vocabulary.items():
        spellings[i] = token
    return spellings


def _reader(tokenizer: Any, settings: dict[str, Any]) -> Callable[[str], bytes]:
    """How a fast tokenizer's tokens are read, by what its settings say of its kind."""
    model, kinds = settings["model"], _component_types(settings["pre_tokenizer"], settings["decoder"])
    lossy = _LOSSY_NORMALIZERS & _component_types(settings["normalizer"])
    if lossy:
        raise _opaque(tokenizer, f"it changes the text it is given ({', '.join(sorted(lossy))})")
    if model["type"] not in ("BPE", "Unigram"):
        raise _opaque(tokenizer, f"{model['type']} does not keep the blanks between words")
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise _opaque(tokenizer, "it marks the ends of words and does not keep the blanks between them")
    if "ByteLevel" in kinds:
        literal = {token["content"] for token in settings["added_tokens"]}
        return lambda token: token.encode() if token in literal else _byte_level_bytes(token)
    if "Metaspace" in kinds or "▁" in json.dumps(settings["decoder"], ensure_ascii=False):
        return _sentencepiece_bytes if model.get("byte_fallback") else _unigram_bytes
    raise _opaque(tokenizer, f"its decoder ({', '.join(sorted(kinds)) or 'none'}) is of no known kind")


def _component_types(*components: Any) -> set[str]:
    """The types of components, however deeply they stand in sequences."""
    found: set[str] = set()
    for component in filter(None, components):
        found.add(component["type"])
        for parts in ("normalizers", "pretokenizers", "decoders"):
            found |= _component_types(*component.get(parts, ()))
    return found


def _byte_level_alphabet() -> dict[int, int]:
    """GPT-2's: printable Latin-1 characters stand for their own bytes, the others for U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + number: byte for number, byte in enumerate(hidden)}


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_LEVEL[ord(character)] for character in token)
    except KeyError:
        return token.encode()  # as the decoder does with a token that is not in the alphabet


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _unigram_bytes(token)


def _unigram_bytes(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _opaque(tokenizer: Any, reason: str) -> OpaqueTokenizer:
    return OpaqueTokenizer(
        f"the bytes of the tokens of {tokenizer.name_or_path or type(tokenizer).__name__} cannot be recovered: {reason}; "
        "distil its text instead (--method text)"
    )
