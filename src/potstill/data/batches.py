"""Turn conversations into batches of tokens: labels, masks and packing.

B batch, T time. Labels follow Hugging Face's convention: a label has the position of its token and
is −100 where nothing is learned. Supervised are the assistant's tokens in every turn and the token
that ends the turn; in plain text, every token but the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from potstill.alignment import special_ids
from potstill.data.chat_templates import Span, answer_spans
from potstill.data.conversations import Conversation
from potstill.defaults import MAX_LENGTH
from potstill.errors import DataError
from potstill.protocols import Batch, Tokenizer

IGNORED = -100
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
        return True

    def __str__(self) -> str:
        line = f"{self.conversations} conversations, {self.tokens} tokens, "
        line += f"{self.supervised_tokens} of them supervised"
        if self.shortened:
            line += f"; {self.shortened} cut at the length limit"
        if self.dropped:
            line += f"; {self.dropped} left out (no answer within the length limit)"
        return line


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, *, max_length: int | None = None
) -> Encoded:
    """Return ``input_ids``, ``labels`` and ``answer_bytes``, cut at ``max_length`` tokens.

    ``answer_bytes`` counts the UTF-8 bytes of the supervised text, without template and end token.
    Raises: ChatTemplateError.
    """
    is_text = "text" in conversation
    if is_text:
        text, spans = conversation["text"], [(0, len(conversation["text"]))]
    else:
        text, spans = answer_spans(tokenizer, conversation["messages"])
    encoded = tokenizer(text, add_special_tokens=is_text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    end_id = tokenizer.eos_token_id
    if is_text and end_id is not None:
        if ids and ids[-1] == end_id:  # added by the tokenizer, with the offsets (0, 0)
            ids, offsets = ids[:-1], offsets[:-1]
        ids, offsets = [*ids, end_id], [*offsets, (len(text), len(text) + 1)]
    ids, offsets = ids[:max_length], offsets[:max_length]
    labels, special = [IGNORED] * len(ids), special_ids(tokenizer)
    for number, span in enumerate(spans):
        ended = not (conversation.get("cut_off") and number == len(spans) - 1)
        for i in _tokens_of(span, offsets, text, ids, special, with_end=ended):
            labels[i] = ids[i]
    labels[:1] = [IGNORED]  # no position predicts the first token
    text_end = offsets[-1][1] if offsets else 0
    return {
        "input_ids": ids,
        "labels": labels,
        "answer_bytes": sum(len(text[start : min(end, text_end)].encode()) for start, end in spans),
        "shortened": len(encoded["input_ids"]) > len(ids),
    }


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
        for conversation in conversations:
            row = encode_conversation(conversation, tokenizer, max_length=max_length)
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


def _tokens_of(
    span: Span,
    offsets: list[Span],
    text: str,
    ids: list[int],
    special: frozenset[int],
    *,
    with_end: bool,
) -> Iterator[int]:
    """Yield the tokens that overlap ``span``, then those up to the special token that ends it."""
    start, end = span
    yield from (i for i, (first, last) in enumerate(offsets) if last > start and first < end)
    tail: list[int] = []
    after = next((i for i, (first, _) in enumerate(offsets) if first >= end), len(ids))
    for i in range(after, len(ids)):
        tail.append(i)
        if ids[i] in special:
            yield from tail if with_end else ()
            return
        if text[slice(*offsets[i])].strip():  # Llama 2 has " </s>": only blanks may precede the end
            return


def _padded(columns: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([column + [value] * (length - len(column)) for column in columns])
