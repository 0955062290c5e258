"""Split the bytes of one tokenizer's tokens into tokens of another: seg(v) in the formulas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from potstill.alignment.token_bytes import backend_settings
from potstill.protocols import Tokenizer


class Segmenter:
    """Split byte strings into tokens of ``tokenizer``, whose token bytes are ``tokens``.

    A byte string that is a token is not split. Text is tokenized without dummy prefix and special
    tokens. Bytes that are not text, such as half a character, are split by the longest match.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes | None]) -> None:
        self._tokens = tokens
        self._encoder = _bare_encoder(tokenizer)
        self.ids = self._ids_of_bytes()
        """The id of each token's bytes; of several ids, the one that tokenizing text gives."""
        self._longest = max(map(len, self.ids), default=0)

    def __call__(self, strings: Iterable[bytes | None]) -> list[tuple[int, ...]]:
        """Return the ids of each string; empty for None and for strings that cannot be spelled."""
        strings = list(strings)
        split = {string for string in strings if string and string not in self.ids}
        found = self._tokenized(split)
        found |= {string: self._longest_matches(string) for string in split if string not in found}
        found |= {string: (i,) for string, i in self.ids.items()}
        return [found.get(string, ()) if string else () for string in strings]

    def _tokenized(self, strings: Iterable[bytes]) -> dict[bytes, tuple[int, ...]]:
        """Tokenize the strings that are text; leave out those whose bytes tokenizing changes."""
        texts = [text for string in strings if (text := _as_text(string)) is not None]
        found = {}
        for text, ids in zip(texts, self._encoder(texts), strict=True):
            string = text.encode()
            pieces = [self._tokens[i] for i in ids]
            if None not in pieces and b"".join(filter(None, pieces)) == string:
                found[string] = tuple(ids)
        return found

    def _longest_matches(self, string: bytes) -> tuple[int, ...]:
        ids, start = [], 0
        while start < len(string):
            stop = min(len(string), start + self._longest)
            while stop > start and string[start:stop] not in self.ids:
                stop -= 1
            if stop == start:
                return ()
            ids.append(self.ids[string[start:stop]])
            start = stop
        return tuple(ids)

    def _ids_of_bytes(self) -> dict[bytes, int]:
        ids: dict[bytes, int] = {}
        duplicates = set()
        for i, string in enumerate(self._tokens):
            if string:
                if string in ids:
                    duplicates.add(string)
                ids.setdefault(string, i)
        tokenized = self._tokenized(duplicates)
        return ids | {string: found[0] for string, found in tokenized.items() if len(found) == 1}


def _as_text(string: bytes) -> str | None:
    try:
        return string.decode()
    except UnicodeDecodeError:
        return None


def _bare_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Return a function that tokenizes texts without dummy prefix and special tokens."""
    settings = backend_settings(tokenizer)
    if settings is None:
        return lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    _drop_dummy_prefix(settings, "normalizer")
    _drop_dummy_prefix(settings, "pre_tokenizer")
    settings |= {"padding": None, "truncation": None}
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(settings))
    backend.encode_special_tokens = True  # a token spelled like a special one is text

    def encode(texts: list[str]) -> list[list[int]]:
        return [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _drop_dummy_prefix(settings: Any, key: str | int) -> None:
    """Remove the dummy prefix from a component, in any of its three forms."""
    component = settings[key]
    if component is None:
        return
    for parts in ("normalizers", "pretokenizers"):
        for number in reversed(range(len(component.get(parts, ())))):
            _drop_dummy_prefix(component[parts], number)
            if component[parts][number] is None:
                del component[parts][number]
    if component["type"] == "Prepend":
        settings[key] = None
    if component["type"] == "Metaspace":
        component["prepend_scheme"] = "never"
    if component["type"] == "ByteLevel" and "add_prefix_space" in component:
        component["add_prefix_space"] = False
