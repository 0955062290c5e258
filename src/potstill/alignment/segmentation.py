"""The tokens of one tokenizer for the bytes of another's.

Written seg(v) in the papers and here: how a student spells what its teacher says in a single token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from potstill.alignment.token_bytes import backend_settings


class Segmenter:
    """Splits byte strings into the tokens of ``tokenizer``, whose token bytes are ``tokens``.

    A byte string that is itself a token is not split. Text is tokenized as in the middle of a line: no dummy prefix, no special
    tokens. What no text can hold, such as the first half of a character, is split by the longest token that fits.
    """

    def __init__(self, tokenizer: Any, tokens: list[bytes | None]) -> None:
        self._tokens = tokens
        self._encoder = _bare_encoder(tokenizer)
        self.ids = self._ids_of_bytes()
        """The id of each byte string that is a token; of several, the one that text is tokenized to."""
        self._longest = max(map(len, self.ids), default=0)

    def __call__(self, strings: Iterable[bytes | None]) -> list[tuple[int, ...]]:
        """The ids for each string; none for None and for what these tokens cannot spell."""
        strings = list(strings)
        split = {string for string in strings if string and string not in self.ids}
        found = self._tokenized(split)
        found |= {string: self._longest_matches(string) for string in split if string not in found}
        found |= {string: (i,) for string, i in self.ids.items()}
        return [found.get(string, ()) if string else () for string in strings]

    def _tokenized(self, strings: Iterable[bytes]) -> dict[bytes, tuple[int, ...]]:
        """Those strings that are text, and that tokenizing leaves as they are."""
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
        twice = set()
        for i, string in enumerate(self._tokens):
            if string:
                if string in ids:
                    twice.add(string)
                ids.setdefault(string, i)
        ids |= {string: found[0] for string, found in self._tokenized(twice).items() if len(found) == 1}
        return ids


def _as_text(string: bytes) -> str | None:
    try:
        return string.decode()
    except UnicodeDecodeError:
        return None


def _bare_encoder(tokenizer: Any) -> Any:
    """Tokenizes a list of texts with neither dummy prefix nor special tokens."""
    settings = backend_settings(tokenizer)
    if settings is None:
        return lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    _drop_dummy_prefix(settings, "normalizer")
    _drop_dummy_prefix(settings, "pre_tokenizer")
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps({**settings, "padding": None, "truncation": None}))
    backend.encode_special_tokens = True  # a token spelled like a special one is text
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _drop_dummy_prefix(settings: Any, key: Any) -> None:
    """Take the dummy prefix out of a component, in whichever of its three forms it stands there."""
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
