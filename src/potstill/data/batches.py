"""Turn conversations into batches of tokens: labels, masks and packing.

B batch, T time. Labels follow Hugging Face's convention: a label has the position of its token and
is −100 where nothing is learned. Supervised are the assistant's tokens in every turn and the token
that ends the turn; in plain text, every token but the first.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from potstill.data.conversations import Conversation
from potstill.data.encoding import IGNORED as IGNORED
from potstill.data.encoding import TOGETHER, encode_conversations
from potstill.data.encoding import Encoded as Encoded
from potstill.data.encoding import encode_conversation as encode_conversation
from potstill.defaults import MAX_LENGTH
from potstill.errors import DataError
from potstill.protocols import Batch, Tokenizer


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
        supervised = len(row["labels"]) - row["labels"].count(IGNORED)
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
    """Return a `datasets.Dataset` of ``rows`` with Arrow types ``columns``; None for no rows.

    The rows are in a temporary file that is mapped into memory and deleted with the data set.
    """
    import datasets
    import pyarrow

    schema, count = pyarrow.schema(columns), 0
    folder = Path(tempfile.mkdtemp(prefix="potstill-rows-"))
    try:
        with (
            pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, schema) as writer,
        ):
            while batch := list(itertools.islice(rows, TOGETHER)):
                count += len(batch)
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
        dataset = datasets.Dataset.from_file(str(folder / "rows.arrow")) if count else None
    except BaseException:
        shutil.rmtree(folder)
        raise
    if dataset is None:
        shutil.rmtree(folder)
    else:
        weakref.finalize(dataset, shutil.rmtree, folder, ignore_errors=True)
    return dataset


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
    quadratic in the row. With ``bounds`` the kernels are given where conversations begin
    (``cu_seq_lens``, ``longest``); otherwise each layer computes it from the positions.

    Not packed, or where packing saves hardly a row: one conversation a row, padded at its end, with
    ``lengths`` and, unless ``masked`` is off, an attention mask. Without a mask attention can use
    its fastest kernels: of causal attention, nothing before the padding depends on it
    (`potstill.models.isolation`).
    """

    pad_token_id: int
    packed: bool = True
    one_line: bool = False
    masked: bool = True
    bounds: bool = False

    def __call__(self, rows: list[Encoded], *, more: tuple[str, ...] = ()) -> Batch:
        """Return ``input_ids``, ``labels``, ``position_ids`` ``[B, T]``.

        If not packed, also ``lengths [B]``, the tokens of each row without its padding. Columns
        named in ``more`` have one number a token; their padding is −1.
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
        batch: dict[str, Any] = {}
        for name, value in padding.items():
            columns = [[i for row in packed_row for i in row[name]] for packed_row in packed_rows]
            batch[name] = _padded(columns, length, value)
        positions = _positions if is_packed else _positions_running_on
        batch["position_ids"] = torch.tensor([positions(one, length) for one in packed_rows])
        # No position predicts the first token, even if the row was made by another tool.
        batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORED)
        if self.one_line and self.bounds and is_packed:
            ends = itertools.accumulate(len(row["input_ids"]) for row in packed_rows[0])
            batch["cu_seq_lens"] = torch.tensor([0, *ends], dtype=torch.int32)
            batch["longest"] = max(sizes)
        if not is_packed:
            batch["lengths"] = torch.tensor(sizes)
            if self.masked:
                mask = [[1] * size for size in sizes]
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


def _positions_running_on(_: list[Encoded], length: int) -> list[int]:
    """Return 0, 1, 2, …: a second 0 would say that another conversation begins."""
    return [*range(length)]


def _padded(columns: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([column + [value] * (length - len(column)) for column in columns])
