"""Encode conversations: render them, tokenize, and label what is learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from potstill.alignment import special_ids
from potstill.data.answers import Answer, render_answers
from potstill.data.conversations import Conversation
from potstill.data.marked_templates import Span
from potstill.errors import ChatTemplateError, ModelError
from potstill.protocols import Tokenizer

IGNORED = -100
TOGETHER = 128  # conversations tokenized in one call, on all cores
Encoded = dict[str, Any]
"""Lists such as ``input_ids`` and ``labels``, and counts."""


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, *, max_length: int | None = None
) -> Encoded:
    """Return ``input_ids``, ``labels`` and counts of one conversation.

    See `encode_conversations`. Raises: ChatTemplateError, ModelError.
    """
    return _read(conversation, tokenizer).row(tokenizer, special_ids(tokenizer), max_length)


def learned_parts(
    conversation: Conversation, tokenizer: Tokenizer, *, max_length: int | None = None
) -> list[tuple[str, bool]]:
    """Return the text of a conversation in parts, each with True if it is learned.

    What is beyond ``max_length`` tokens is left out. Raises: as `encode_conversation`.
    """
    reading = _read(conversation, tokenizer)
    labels = reading.row(tokenizer, special_ids(tokenizer), max_length)["labels"]
    return reading.parts([label != IGNORED for label in labels])


def encode_conversations(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, *, max_length: int | None = None
) -> Iterator[Encoded]:
    """Yield ``input_ids`` and ``labels`` of each conversation, cut at ``max_length`` tokens.

    ``answer_bytes`` counts the UTF-8 bytes of the supervised text, without template and end token;
    ``dropped_thoughts`` the turns whose thought the template does not write. Raises:
    ChatTemplateError; ModelError for a tokenizer that does not say where its tokens are.
    """
    _require_offsets(tokenizer)
    special = special_ids(tokenizer)
    before: tuple[list[_Reading], Future[None]] | None = None
    with ThreadPoolExecutor(1) as thread:  # tokenizes while this one renders and labels
        one_by_one = iter(conversations)
        while batch := list(itertools.islice(one_by_one, TOGETHER)):
            readings = [_rendered(conversation, tokenizer) for conversation in batch]
            tokenized = thread.submit(_tokenize, readings, tokenizer)
            if before:
                before[1].result()
                yield from (one.row(tokenizer, special, max_length) for one in before[0])
            before = readings, tokenized
        if before:
            before[1].result()
            yield from (one.row(tokenizer, special, max_length) for one in before[0])


def _read(conversation: Conversation, tokenizer: Tokenizer) -> _Reading:
    _require_offsets(tokenizer)
    reading = _rendered(conversation, tokenizer)
    _tokenize([reading], tokenizer)
    return reading


def _require_offsets(tokenizer: Tokenizer) -> None:
    """Raises: ModelError."""
    if not getattr(tokenizer, "is_fast", True):
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer is a slow one and does not say where its "
            "tokens are in the text; needed is a fast one (tokenizer.json): save it again with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…), or use another model"
        )


def _tokenize(readings: list[_Reading], tokenizer: Tokenizer) -> None:
    """Give each its ids, all in one call."""
    for is_text in (False, True):
        some = [one for one in readings if one.is_text == is_text]
        if some:
            texts = [one.text for one in some]
            encoded = tokenizer(texts, add_special_tokens=is_text, return_attention_mask=False)
            found = zip(some, encoded["input_ids"], encoded.encodings, strict=True)
            for one, ids, encoding in found:
                one.ids, one.encoding = ids, encoding


@dataclass
class _Reading:
    """A conversation as text, then as tokens."""

    text: str
    answers: list[Answer]
    is_text: bool
    dropped_thoughts: int = 0
    ids: list[int] = field(default_factory=list)
    encoding: Any = None
    """The tokenizer's `Encoding`, which knows the characters of each token."""

    def row(self, tokenizer: Tokenizer, special: frozenset[int], max_length: int | None) -> Encoded:
        ids, end_id = self.ids, tokenizer.eos_token_id
        if self.is_text and end_id is not None:
            # A tokenizer may add the end itself.
            self.ids = ids[:-1] if ids and ids[-1] == end_id else ids
            ids = [*self.ids, end_id]
        whole = len(ids)
        ids = ids[:max_length]
        labels = [IGNORED] * len(ids)
        for answer in self.answers:
            first, stop = self._tokens_of(answer.start, answer.end)
            if answer.has_end:
                stop = self._after_end(stop, ids, special)
            labels[first:stop] = ids[first:stop]
        labels[:1] = [IGNORED]  # no position predicts the first token
        text_end = len(self.text)
        if whole > len(ids):
            text_end = self._characters(len(ids) - 1)[1] if ids else 0
        texts = [self.text[one.start : min(one.end, text_end)] for one in self.answers]
        return {
            "input_ids": ids,
            "labels": labels,
            "answer_bytes": sum(len(text.encode()) for text in texts),
            "shortened": whole > len(ids),
            "dropped_thoughts": self.dropped_thoughts,
        }

    def parts(self, learned: list[bool]) -> list[tuple[str, bool]]:
        """Return the text in parts, by whether the tokens are learned."""
        parts, start = [], 0
        for flag, group in itertools.groupby(enumerate(learned), key=lambda one: one[1]):
            # An end token that the tokenizer did not write is behind the text.
            ends = [
                self._characters(i)[1] if i < len(self.ids) else len(self.text) for i, _ in group
            ]
            if max(ends) > start:
                parts.append((self.text[start : max(ends)], flag))
                start = max(ends)
        return parts

    def _tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """Return the first token that overlaps a span of the text, and the first after it."""
        stop = self._token_at(end, len(self.text))
        if stop is None:
            stop = len(self.ids)
        elif self._characters(stop)[0] < end:
            stop += 1
        first = self._token_at(start, end)
        return (stop if first is None else first), stop

    def _token_at(self, start: int, end: int) -> int | None:
        """Return the first token with a character of a span; some characters have no token."""
        tokens = map(self.encoding.char_to_token, range(start, end))
        return next((token for token in tokens if token is not None), None)

    def _characters(self, token: int) -> Span:
        """Return the characters of a token; tokens that the tokenizer adds have none."""
        return self.encoding.token_to_chars(token) or (0, 0)

    def _after_end(self, stop: int, ids: list[int], special: frozenset[int]) -> int:
        """Return the index after the special token that ends an answer; ``stop`` if none does."""
        for i in range(stop, len(ids)):
            if ids[i] in special:
                return i + 1
            # Llama 2 has " </s>": only blanks may precede the end.
            if self.text[slice(*self._characters(i))].strip():
                break
        return stop


def _rendered(conversation: Conversation, tokenizer: Tokenizer) -> _Reading:
    cut_off = bool(conversation.get("cut_off"))
    if "text" in conversation:
        text = conversation["text"]
        return _Reading(text, [Answer(0, 0, len(text), not cut_off)], is_text=True)
    messages = conversation["messages"]
    try:
        rendered = render_answers(tokenizer, messages, tools=conversation.get("tools"))
    except ChatTemplateError as error:
        place = getattr(conversation, "place", "")
        raise ChatTemplateError(f"{place}: {error}" if place else str(error)) from error
    answers = rendered.answers
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    if cut_off and answers and answers[-1].turn == last:  # a length limit stopped it
        answers[-1] = answers[-1]._replace(has_end=False)
    return _Reading(rendered.text, answers, False, rendered.dropped_thoughts)
