"""Turn conversations into batches of tokens: labels, masks and packing.

B batch, T time. Labels follow Hugging Face's convention: a label has the position of its token and
is −100 where nothing is learned. Supervised are the assistant's tokens in every turn and the token
that ends the turn; in plain text, every token but the first.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from potstill.alignment import special_ids
from potstill.data.answers import Answer, render_answers
from potstill.data.conversations import Conversation
from potstill.data.marked_templates import Span
from potstill.defaults import MAX_LENGTH
from potstill.errors import ChatTemplateError, DataError, ModelError
from potstill.protocols import Batch, Tokenizer

IGNORED = -100
TOGETHER = 256  # conversations tokenized in one call, on all cores
Encoded = dict[str, Any]
"""Lists such as ``input_ids`` and ``labels``, and counts."""


@dataclass
class TokenCounts:
    """Count the conversations that are kept, cut and dropped."""

    conversations: int = 0
    """Conversations kept."""
    tokens: int = 0
    """Tokens kept, prompts included."""
    supervised_tokens: int = 0
    """Tokens that contribute to the loss."""
    shortened: int = 0
    """Conversations cut at ``max_length`` tokens."""
    dropped: int = 0
    """Conversations whose answer begins after ``max_length`` tokens, or is empty."""
    dropped_thoughts: int = 0
    """Turns whose thought the chat template does not write."""

    def add(self, row: Encoded) -> bool:
        """Count one encoded conversation; return False if it must be dropped."""
        supervised = sum(label != IGNORED for label in row["labels"])
        if not supervised:
            self.dropped += 1
            return False
        self.conversations += 1
        self.tokens += len(row["input_ids"])
        self.supervised_tokens += supervised
        self.shortened += row["shortened"]
        self.dropped_thoughts += row["dropped_thoughts"]
        return True

    def __str__(self) -> str:
        line = f"{self.conversations} conversations, {self.tokens} tokens, "
        line += f"{self.supervised_tokens} of them supervised"
        if self.shortened:
            line += f"; {self.shortened} cut at the length limit"
        if self.dropped:
            line += f"; {self.dropped} left out (no answer within the length limit)"
        if self.dropped_thoughts:
            line += f"; the chat template drops the thought of {self.dropped_thoughts} turns"
            line += " (--chat-template FILE gives one that keeps them)"
        return line


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, *, max_length: int | None = None
) -> Encoded:
    """Return ``input_ids``, ``labels`` and counts of one conversation.

    See `encode_conversations`. Raises: ChatTemplateError, ModelError.
    """
    return next(encode_conversations([conversation], tokenizer, max_length=max_length))


def encode_conversations(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, *, max_length: int | None = None
) -> Iterator[Encoded]:
    """Yield ``input_ids`` and ``labels`` of each conversation, cut at ``max_length`` tokens.

    ``answer_bytes`` counts the UTF-8 bytes of the supervised text, without template and end token;
    ``dropped_thoughts`` the turns whose thought the template does not write. Raises:
    ChatTemplateError; ModelError for a tokenizer that does not say where its tokens are.
    """
    if not getattr(tokenizer, "is_fast", True):
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer is a slow one and does not say where its "
            "tokens are in the text; needed is a fast one (tokenizer.json): save it again with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…), or use another model"
        )
    for batch in _batches(conversations):
        rendered = [_rendered(conversation, tokenizer) for conversation in batch]
        for is_text in (False, True):
            if texts := [one.text for one in rendered if one.is_text == is_text]:
                encoded = tokenizer(texts, add_special_tokens=is_text, return_offsets_mapping=True)
                found = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                for one in rendered:
                    if one.is_text == is_text:
                        one.ids, one.offsets = next(found)
        yield from (one.row(tokenizer, max_length) for one in rendered)


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    one_by_one = iter(conversations)
    while batch := list(itertools.islice(one_by_one, TOGETHER)):
        yield batch


@dataclass
class _Reading:
    """A conversation as text, then as tokens."""

    text: str
    answers: list[Answer]
    is_text: bool
    dropped_thoughts: int = 0
    ids: list[int] = field(default_factory=list)
    offsets: list[Span] = field(default_factory=list)

    def row(self, tokenizer: Tokenizer, max_length: int | None) -> Encoded:
        ids, offsets, end_id = self.ids, self.offsets, tokenizer.eos_token_id
        if self.is_text and end_id is not None:
            if ids and ids[-1] == end_id:  # added by the tokenizer, with the offsets (0, 0)
                ids, offsets = ids[:-1], offsets[:-1]
            end = len(self.text)
            ids, offsets = [*ids, end_id], [*offsets, (end, end + 1)]
        whole = len(ids)
        ids, offsets = ids[:max_length], offsets[:max_length]
        labels, special = [IGNORED] * len(ids), special_ids(tokenizer)
        starts = [start for start, _ in offsets]
        for answer in self.answers:
            first, stop = _tokens_of((answer.start, answer.end), offsets, starts)
            if answer.has_end:
                stop = _after_end(stop, offsets, self.text, ids, special)
            labels[first:stop] = ids[first:stop]
        labels[:1] = [IGNORED]  # no position predicts the first token
        text_end = offsets[-1][1] if offsets else 0
        texts = [self.text[one.start : min(one.end, text_end)] for one in self.answers]
        return {
            "input_ids": ids,
            "labels": labels,
            "answer_bytes": sum(len(text.encode()) for text in texts),
            "shortened": whole > len(ids),
            "dropped_thoughts": self.dropped_thoughts,
        }


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


def tokenize_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    *,
    max_length: int = MAX_LENGTH,
    streaming: bool = False,
) -> tuple[Any, TokenCounts]:
    """Return a `datasets.Dataset` of encoded conversations, and the counts.

    A conversation that is cut before its answer begins is dropped. ``streaming`` returns an
    `IterableDataset`, whose counts grow while it is read. Raises: DataError if no row is left.
    """
    import datasets
    import pyarrow

    counts = TokenCounts()

    def encoded() -> Iterator[Encoded]:
        for row in encode_conversations(conversations, tokenizer, max_length=max_length):
            if counts.add(row):
                yield row

    if streaming:
        return datasets.IterableDataset.from_generator(encoded), counts
    columns = dict.fromkeys(("input_ids", "labels"), pyarrow.list_(pyarrow.int32()))
    columns |= {"answer_bytes": pyarrow.int64(), "shortened": pyarrow.bool_()}
    dataset = arrow_dataset(encoded(), columns)
    if dataset is None:
        raise DataError(
            f"nothing to learn: {counts.dropped} conversations read, none with an answer within "
            f"{max_length} tokens; raise --max-length or check the data"
        )
    return dataset, counts


def arrow_dataset(rows: Iterator[Encoded], columns: dict[str, Any]) -> Any:
    """Return a `datasets.Dataset` of ``rows`` with Arrow types ``columns``; None for no rows."""
    import datasets
    import pyarrow

    schema, batches = pyarrow.schema(columns), []
    while batch := list(itertools.islice(rows, 1000)):
        batches.append(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
    return datasets.Dataset(pyarrow.Table.from_batches(batches)) if batches else None


def rows_fingerprint(dataset: Any) -> str:
    """Return 16 hexadecimal digits that identify encoded rows: every list, in order."""
    found = hashlib.sha256()
    table = dataset.data.table
    for name in sorted(table.column_names):
        for chunk in table.column(name).chunks:
            lists = hasattr(chunk, "flatten") and hasattr(chunk, "value_lengths")
            for part in (chunk.value_lengths(), chunk.flatten()) if lists else (chunk,):
                found.update(part.to_numpy(zero_copy_only=False).tobytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class BatchLayout:
    """Lay out the conversations of a batch in packed rows. The loss does not depend on the layout.

    ``packed``: a row is as long as the longest conversation and holds as many as fit (first fit,
    longest first). Each conversation counts its positions from 0; without an attention mask
    transformers then lets no token attend to another conversation. ``one_line``: one row without
    padding, good for variable-length attention kernels and bad for dense masks, whose cost is
    quadratic in the row. Not packed, or where packing saves hardly a row: one conversation a row,
    and an attention mask.
    """

    pad_token_id: int
    packed: bool = True
    one_line: bool = False

    def __call__(self, rows: list[Encoded], *, more: tuple[str, ...] = ()) -> Batch:
        """Return ``input_ids``, ``labels``, ``position_ids`` ``[B, T]``; a mask if not packed.

        Columns named in ``more`` have one number a token; their padding is −1.
        """
        sizes = [len(row["input_ids"]) for row in rows]
        length = sum(sizes) if self.one_line else max(sizes)
        unpacked = [[row] for row in rows]
        packed_rows = _pack(rows, length) if self.packed else unpacked
        # A mask between conversations costs 4 % of a step (measured): pack only if that pays.
        is_packed = self.packed and (self.one_line or len(packed_rows) < 0.85 * len(rows))
        if not is_packed:
            packed_rows = unpacked
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, **dict.fromkeys(more, -1)}
        batch = {}
        for name, value in padding.items():
            columns = [[i for row in packed_row for i in row[name]] for packed_row in packed_rows]
            batch[name] = _padded(columns, length, value)
        batch["position_ids"] = torch.tensor([_positions(one, length) for one in packed_rows])
        # No position predicts the first token, even if the row was made by another tool.
        batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORED)
        if not is_packed:
            mask = [[1] * len(one["input_ids"]) for [one] in packed_rows]
            batch["attention_mask"] = _padded(mask, length, 0)
        return cast(Batch, batch)


def _pack(rows: list[Encoded], length: int) -> list[list[Encoded]]:
    packed_rows: list[list[Encoded]] = []
    free_tokens: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size = len(row["input_ids"])
        fitting = next((i for i, free in enumerate(free_tokens) if free >= size), None)
        if fitting is None:
            fitting = len(packed_rows)
            packed_rows.append([])
            free_tokens.append(length)
        packed_rows[fitting].append(row)
        free_tokens[fitting] -= size
    return packed_rows


def _positions(packed_row: list[Encoded], length: int) -> list[int]:
    """Return 0, 1, 2, … for each conversation, and for the padding at the end."""
    sizes = [len(row["input_ids"]) for row in packed_row]
    return [position for size in (*sizes, length - sum(sizes)) for position in range(size)]


def _tokens_of(span: Span, offsets: list[Span], starts: list[int]) -> tuple[int, int]:
    """Return the first token that overlaps ``span``, and the first after it.

    ``starts`` are the starts of ``offsets``, which grow.
    """
    start, end = span
    stop = bisect.bisect_left(starts, end)
    first = bisect.bisect_left(starts, start, hi=stop)
    while first > 0 and offsets[first - 1][1] > start:  # one that begins in the prompt
        first -= 1
    while first < stop and offsets[first][1] <= start:  # a token without text (BOS)
        first += 1
    return first, max(first, stop)


def _after_end(
    stop: int, offsets: list[Span], text: str, ids: list[int], special: frozenset[int]
) -> int:
    """Return the index after the special token that ends an answer; ``stop`` if none does."""
    for i in range(stop, len(ids)):
        if ids[i] in special:
            return i + 1
        if text[slice(*offsets[i])].strip():  # Llama 2 has " </s>": only blanks may precede the end
            break
    return stop


def _padded(columns: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([column + [value] * (length - len(column)) for column in columns])
