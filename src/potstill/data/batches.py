"""From conversations to batches of tokens: what is learned, what is masked, how rows are laid out.

B batch, T time. Labels follow Hugging Face's convention: they stand in their own places, −100 where nothing is to be learned.
Learned are the assistant's tokens in every turn and the token that ends the turn; in plain text, everything after its first token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.alignment import special_ids
from potstill.data.chat_templates import Span, answer_spans
from potstill.data.conversations import Conversation
from potstill.errors import DataError

IGNORED = -100


@dataclass
class TokenCounts:
    """What became of the conversations: none is shortened or left out without being counted here."""

    conversations: int = 0
    """Conversations kept."""
    tokens: int = 0
    """Tokens kept, prompts included."""
    supervised_tokens: int = 0
    """Tokens that have something to learn."""
    shortened: int = 0
    """Conversations cut at ``max_length`` tokens."""
    dropped: int = 0
    """Conversations whose answer begins beyond ``max_length`` tokens, or is empty."""

    def add(self, row: dict[str, Any]) -> bool:
        """Count one encoded conversation; False if it is to be dropped."""
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
        line = f"{self.conversations} conversations, {self.tokens} tokens, {self.supervised_tokens} of them to learn"
        if self.shortened:
            line += f"; {self.shortened} cut at the length limit"
        if self.dropped:
            line += f"; {self.dropped} left out (no answer within the length limit)"
        return line


def encode_conversation(conversation: Conversation, tokenizer: Any, *, max_length: int | None = None) -> dict[str, Any]:
    """One conversation as ``input_ids``, ``labels`` and ``answer_bytes``, cut at ``max_length`` tokens.

    ``answer_bytes`` counts the UTF-8 bytes that the labels cover, template and end token apart. Raises: ChatTemplateError.
    """
    if "text" in conversation:
        text, spans = conversation["text"], [(0, len(conversation["text"]))]
    else:
        text, spans = answer_spans(tokenizer, conversation["messages"])
    encoded = tokenizer(text, add_special_tokens="text" in conversation, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if "text" in conversation and tokenizer.eos_token_id is not None:
        if ids and ids[-1] == tokenizer.eos_token_id:  # the tokenizer's own, which stands nowhere in the text: (0, 0)
            ids, offsets = ids[:-1], offsets[:-1]
        ids, offsets = [*ids, tokenizer.eos_token_id], [*offsets, (len(text), len(text) + 1)]
    ids, offsets = ids[:max_length], offsets[:max_length]
    labels, special = [IGNORED] * len(ids), special_ids(tokenizer)
    for number, span in enumerate(spans):
        ended = not (conversation.get("cut_off") and number == len(spans) - 1)
        for i in _tokens_of(span, offsets, text, ids, special, with_end=ended):
            labels[i] = ids[i]
    labels[:1] = [IGNORED]  # nothing precedes the first token, so nothing predicts it
    reached = offsets[-1][1] if offsets else 0
    return {
        "input_ids": ids,
        "labels": labels,
        "answer_bytes": sum(len(text[start : min(end, reached)].encode()) for start, end in spans),
        "shortened": len(encoded["input_ids"]) > len(ids),
    }


def tokenize_conversations(
    conversations: Iterable[Conversation], tokenizer: Any, *, max_length: int = 2048, streaming: bool = False
) -> tuple[Any, TokenCounts]:
    """A `datasets.Dataset` of `encode_conversation`'s rows, and what became of the conversations.

    One that is cut before its answer begins has nothing to learn and is dropped. ``streaming`` gives an `IterableDataset`
    instead, whose counts grow as it is read. Raises: DataError if nothing is left to learn.
    """
    import datasets
    import pyarrow

    counts = TokenCounts()

    def rows() -> Iterator[dict[str, Any]]:
        for conversation in conversations:
            row = encode_conversation(conversation, tokenizer, max_length=max_length)
            if counts.add(row):
                yield row

    if streaming:
        return datasets.IterableDataset.from_generator(rows), counts
    integers = pyarrow.list_(pyarrow.int32())
    columns = {"input_ids": integers, "labels": integers, "answer_bytes": pyarrow.int64(), "shortened": pyarrow.bool_()}
    schema, batches, remaining = pyarrow.schema(columns), [], rows()
    while batch := list(itertools.islice(remaining, 1000)):
        batches.append(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
    if not batches:
        raise DataError(
            f"nothing to learn: {counts.dropped} conversations read, none with an answer within {max_length} tokens; "
            "raise --max-length or check the data"
        )
    return datasets.Dataset(pyarrow.Table.from_batches(batches)), counts


@dataclass(frozen=True)
class BatchLayout:
    """Lays the conversations of a batch out in lines. The losses are the same whichever way.

    ``packed`` fills lines as long as the longest conversation with as many as fit (first fit, longest first). Every conversation
    counts its positions from 0 and, there being no attention mask, transformers lets no token look across a seam. ``one_line``
    puts all in a single line without any padding, which is what variable-length attention kernels want and dense masks do not:
    their cost is the square of the line. Not packed, or where packing would save hardly a line, each conversation has a line and an
    attention mask hides the padding.
    """

    pad_token_id: int
    packed: bool = True
    one_line: bool = False

    def __call__(self, rows: list[dict[str, Any]], *, more: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and ``position_ids``, each ``[lines, T]``; ``attention_mask`` too if not packed.

        Columns named in ``more``, one number a token, are laid out like labels, −1 in the padding.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        length = sum(len(row["input_ids"]) for row in rows) if self.one_line else longest
        lines = _fill_lines(rows, length) if self.packed else [[row] for row in rows]
        # A mask that keeps neighbours apart costs more than a line in eight that it may save (measured: 4 % of a step).
        packed = self.packed and (self.one_line or len(lines) < 0.85 * len(rows))
        if not packed:
            lines = [[row] for row in rows]
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, **dict.fromkeys(more, -1)}
        batch = {
            name: _padded([[i for row in line for i in row[name]] for line in lines], length, value)
            for name, value in padding.items()
        }
        batch["position_ids"] = torch.tensor([_positions(line, length) for line in lines])
        batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORED)  # nothing precedes it, whoever made the row
        if not packed:
            batch["attention_mask"] = torch.tensor([[int(i < len(line[0]["input_ids"])) for i in range(length)] for line in lines])
        return batch


def _fill_lines(rows: list[dict[str, Any]], length: int) -> list[list[dict[str, Any]]]:
    lines: list[list[dict[str, Any]]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size = len(row["input_ids"])
        fitting = next((i for i, left in enumerate(room) if left >= size), None)
        if fitting is None:
            fitting = len(lines)
            lines.append([])
            room.append(length)
        lines[fitting].append(row)
        room[fitting] -= size
    return lines


def _positions(line: list[dict[str, Any]], length: int) -> list[int]:
    """0, 1, 2, … in each conversation, and in the padding after the last as if it were one more."""
    sizes = [len(row["input_ids"]) for row in line]
    return [position for size in (*sizes, length - sum(sizes)) for position in range(size)]


def _tokens_of(
    span: Span, offsets: list[Span], text: str, ids: list[int], special: frozenset[int], *, with_end: bool
) -> Iterator[int]:
    """The tokens that lie in ``span`` or reach into it, and those up to the special token that ends the turn after it."""
    start, end = span
    yield from (i for i, (first, last) in enumerate(offsets) if last > start and first < end)
    tail: list[int] = []
    for i in range(next((i for i, (first, _) in enumerate(offsets) if first >= end), len(ids)), len(ids)):
        tail.append(i)
        if ids[i] in special:
            yield from tail if with_end else ()
            return
        if text[slice(*offsets[i])].strip():  # Llama 2 writes " </s>": only blanks may stand before the end
            return


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
