"""Recover the exact bytes of each token.

Vocabularies use different alphabets: ``Ġthe`` and ``▁the`` are both " the"; ``<0x0A>`` is a newline
with byte fallback and six characters elsewhere. Only bytes can be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from potstill.errors import OpaqueTokenizer
from potstill.protocols import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ADDED_AS_SPECIAL: WeakKeyDictionary[Tokenizer, tuple[int, frozenset[int]]] = WeakKeyDictionary()
_LOSSY_NORMALIZERS = {"BertNormalizer", "Lowercase", "StripAccents"}


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Return the bytes of every id; None for a special token and for an id without a token.

    The joined bytes of a text's ids are the text's UTF-8. Two exceptions: SentencePiece may add one
    space before a text (the dummy prefix); a tokenizer that normalizes (Qwen's NFC; "▁" read as a
    space) gives the bytes of the normalized text.

    Raises: OpaqueTokenizer if bytes cannot be recovered (WordPiece, lower-casing, unknown kinds).

    >>> from conftest import toy_tokenizer
    >>> tokens = token_bytes(toy_tokenizer())
    >>> tokens[256], tokens[264]
    (b' t', None)
    """
    spellings, to_bytes = _alphabet(tokenizer)
    special = special_ids(tokenizer)
    return [
        None if token is None or i in special else to_bytes(token)
        for i, token in enumerate(spellings)
    ]


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return all ids added as special, with a role (EOS, …) or without. They have no text."""
    size, added = _ADDED_AS_SPECIAL.get(tokenizer, (-1, frozenset()))
    if size != len(tokenizer):  # cached: it is slow for Gemma's thousands of added tokens
        decoder = getattr(tokenizer, "added_tokens_decoder", {})
        added = frozenset(i for i, token in decoder.items() if token.special)
        _ADDED_AS_SPECIAL[tokenizer] = len(tokenizer), added
    return added.union(tokenizer.all_special_ids)


def backend_settings(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the content of a fast tokenizer's ``tokenizer.json``; None for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())


def _alphabet(tokenizer: Any) -> tuple[list[Any], Callable[[Any], bytes]]:
    """Return the spelling of each id, and a function from a spelling to bytes."""
    settings = backend_settings(tokenizer)
    if settings is not None:
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
        return tokenizer.convert_ids_to_tokens(list(range(size))), _byte_reader(tokenizer, settings)
    if isinstance(getattr(tokenizer, "mergeable_ranks", None), dict):  # tiktoken: already bytes
        return _by_id(tokenizer.mergeable_ranks, len(tokenizer)), bytes
    if hasattr(tokenizer, "sp_model"):
        return _by_id(tokenizer.get_vocab(), len(tokenizer)), _sentencepiece_bytes
    raise _opaque(tokenizer, "its vocabulary has an unknown format")


def _by_id(vocabulary: dict[Any, int], size: int) -> list[Any]:
    spellings: list[Any] = [None] * max(size, 1 + max(vocabulary.values(), default=-1))
    for token, i in vocabulary.items():
        spellings[i] = token
    return spellings


def _byte_reader(tokenizer: Any, settings: dict[str, Any]) -> Callable[[str], bytes]:
    """Return a function from the spelling of a fast tokenizer's token to bytes."""
    model = settings["model"]
    kinds = _component_types(settings["pre_tokenizer"], settings["decoder"])
    lossy = _LOSSY_NORMALIZERS & _component_types(settings["normalizer"])
    if lossy:
        raise _opaque(tokenizer, f"its normalizer changes the text ({', '.join(sorted(lossy))})")
    if model["type"] not in ("BPE", "Unigram"):
        raise _opaque(tokenizer, f"{model['type']} does not keep the spaces between words")
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise _opaque(tokenizer, "it marks word ends and does not keep the spaces between words")
    if "ByteLevel" in kinds:
        literal = {token["content"] for token in settings["added_tokens"]}
        return lambda token: token.encode() if token in literal else _byte_level_bytes(token)
    if "Metaspace" in kinds or "▁" in json.dumps(settings["decoder"], ensure_ascii=False):
        return _sentencepiece_bytes if model.get("byte_fallback") else _unigram_bytes
    found = ", ".join(sorted(kinds)) or "none"
    raise _opaque(tokenizer, f"its decoder ({found}) is not supported")


def _component_types(*components: Any) -> set[str]:
    """Return the types of components, nested ones included."""
    found: set[str] = set()
    for component in filter(None, components):
        found.add(component["type"])
        for parts in ("normalizers", "pretokenizers", "decoders"):
            found |= _component_types(*component.get(parts, ()))
    return found


def _byte_level_alphabet() -> dict[int, int]:
    """Return GPT-2's alphabet: printable Latin-1 is itself, other bytes are U+0100 onward."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    shifted = {0x100 + number: byte for number, byte in enumerate(hidden)}
    return {byte: byte for byte in printable} | shifted


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_LEVEL[ord(character)] for character in token)
    except KeyError:
        return token.encode()  # the decoder does the same


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _unigram_bytes(token)


def _unigram_bytes(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _opaque(tokenizer: Tokenizer, reason: str) -> OpaqueTokenizer:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    return OpaqueTokenizer(
        f"{name}: the bytes of its tokens cannot be recovered, because {reason}; use --method text"
    )
