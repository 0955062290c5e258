"""From conversations to rows for a teacher and a student who have different tokenizers.

Each model reads the conversation in its own chat template and tokens. Beside the student's columns (those of `batches.py`) a row
has the teacher's, and for each of the student's tokens where its target is to be had (`alignment/positions.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from potstill.alignment import VocabularyCells, token_bytes
from potstill.alignment.positions import NO_TARGET, Positions, align
from potstill.data.batches import IGNORED, BatchLayout, TokenCounts, encode_conversation
from potstill.data.conversations import Conversation
from potstill.errors import DataError

PLACES = ("teacher_index", "start", "stop", "depth", "cell")
"""The columns that say where a student's token finds its target, one number a token."""


@dataclass
class PairCounts(TokenCounts):
    """What became of the conversations, and of the student's tokens to learn."""

    roots: int = 0
    """Tokens with a target, at a boundary of both tokenizations."""
    interiors: int = 0
    """Tokens with a target, inside a teacher token that the student has followed from its start."""
    disagreeing_roots: int = 0
    """Of the roots, tokens that are not in the cell of the teacher's token: the two spell the text differently there."""
    disagreeing_interiors: int = 0
    """Of the interiors, tokens that are not in the cell of the next piece."""
    not_alignable: int = 0
    """Conversations left out because the two renderings of the answers differ in their bytes."""
    first_not_alignable: str = ""
    """How the answer begins in the first of them."""

    def add(self, row: dict[str, Any]) -> bool:
        """Count one encoded conversation and its targets; False if it is to be dropped."""
        kept = super().add(row)
        if kept:
            self.interiors += sum(map(bool, row["depth"]))
            self.roots += sum(k != NO_TARGET and not d for k, d in zip(row["teacher_index"], row["depth"], strict=True))
            self.disagreeing_roots += row["disagreeing_roots"]
            self.disagreeing_interiors += row["disagreeing_interiors"]
        return kept

    @property
    def elsewhere(self) -> int:
        """Tokens to learn that have no target: plain cross-entropy."""
        return self.supervised_tokens - self.roots - self.interiors

    @property
    def with_target(self) -> float:
        """The share of the student's tokens to learn that have a target."""
        return (self.roots + self.interiors) / max(1, self.supervised_tokens)

    def __str__(self) -> str:
        line = f"{super().__str__()}; the teacher has a target for {self.with_target:.1%} of these"
        if self.not_alignable:
            line += f"; {self.not_alignable} left out (the tokenizers read different bytes, first in {self.first_not_alignable!r})"
        return line


class PairEncoder:
    """Encodes conversations for one pair of tokenizers whose cells are known."""

    def __init__(self, teacher_tokenizer: Any, student_tokenizer: Any, cells: VocabularyCells) -> None:
        self.teacher_tokenizer, self.student_tokenizer, self.cells = teacher_tokenizer, student_tokenizer, cells
        self.teacher_tokens, self.student_tokens = token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)

    def __call__(self, conversation: Conversation, *, max_length: int | None = None) -> dict[str, Any] | None:
        """One row, cut at ``max_length`` tokens on either side; None if the renderings do not have the same bytes.

        To what `encode_conversation` gives for the student it adds ``teacher_input_ids`` and ``teacher_labels``; as long as
        ``input_ids``, the columns `PLACES` of `Positions`; and what the counts want.
        The ids that the teacher sampled for its last answer, if the row keeps them (``teacher_ids``), stand in for that
        answer tokenized again. Raises: ChatTemplateError.
        """
        student = encode_conversation(conversation, self.student_tokenizer)
        teacher = encode_conversation(conversation, self.teacher_tokenizer)
        if conversation.get("teacher_ids"):
            teacher = self._as_sampled(teacher, conversation["teacher_ids"])
        found = self._align(teacher, student)
        if found is None:
            return None
        if max_length is not None and len(student["input_ids"]) > max_length:
            student = encode_conversation(conversation, self.student_tokenizer, max_length=max_length)
        if max_length is not None and len(teacher["input_ids"]) > max_length:
            teacher = {name: teacher[name][:max_length] for name in ("input_ids", "labels")}
        return {
            **student,
            **_cut(found, len(student["input_ids"]), len(teacher["input_ids"])),
            "teacher_input_ids": teacher["input_ids"],
            "teacher_labels": teacher["labels"],
            "disagreeing_roots": found.disagreeing_roots,
            "disagreeing_interiors": found.disagreeing_interiors,
        }

    def _align(self, teacher: dict[str, Any], student: dict[str, Any]) -> Positions | None:
        return align(
            teacher["input_ids"],
            [label != IGNORED for label in teacher["labels"]],
            student["input_ids"],
            [label != IGNORED for label in student["labels"]],
            cells=self.cells,
            teacher_tokens=self.teacher_tokens,
            student_tokens=self.student_tokens,
        )

    def _as_sampled(self, row: dict[str, Any], sampled: list[int]) -> dict[str, Any]:
        """The row with the sampled ids in place of its last answer's, if their bytes are that answer's; otherwise as it is."""
        ids, labels = row["input_ids"], row["labels"]
        stop = next((i + 1 for i in reversed(range(len(labels))) if labels[i] != IGNORED), 0)
        start = next((i + 1 for i in reversed(range(stop)) if labels[i] == IGNORED), 0)
        (written, end), (text, sampled_end) = self._without_end(ids[start:stop]), self._without_end(sampled)
        if self._text(text) is None or self._text(text) != self._text(written):
            return row
        answer = [*text, *(sampled_end or end)] if end else text
        return {
            **row,
            "input_ids": [*ids[:start], *answer, *ids[stop:]],
            "labels": [*labels[:start], *answer, *labels[stop:]],
        }

    def _without_end(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The ids, and the special token at their end, if there is one."""
        ended = bool(ids) and self._text(ids[-1:]) is None
        return (ids[:-1], ids[-1:]) if ended else (ids, [])

    def _text(self, ids: list[int]) -> bytes | None:
        """The bytes of the ids; None if one of them has none."""
        pieces = [self.teacher_tokens[i] if i < len(self.teacher_tokens) else None for i in ids]
        return None if None in pieces else b"".join(filter(None, pieces))


def tokenize_pairs(
    conversations: Iterable[Conversation],
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    cells: VocabularyCells,
    *,
    max_length: int = 2048,
) -> tuple[Any, PairCounts]:
    """A `datasets.Dataset` of `PairEncoder`'s rows, and what became of the conversations and of their tokens.

    Left out and counted: conversations whose answers the two tokenizers do not read as the same bytes, or with no answer within
    ``max_length`` tokens. Raises: ChatTemplateError, or DataError if nothing is left to learn.
    """
    import datasets
    import pyarrow

    encode = PairEncoder(teacher_tokenizer, student_tokenizer, cells)
    counts = PairCounts()

    def rows() -> Iterator[dict[str, Any]]:
        for conversation in conversations:
            row = encode(conversation, max_length=max_length)
            if row is None:
                counts.not_alignable += 1
                counts.first_not_alignable = counts.first_not_alignable or _answer(conversation)[:60]
            elif counts.add(row):
                yield row

    tokens = ["input_ids", "labels", "teacher_input_ids", "teacher_labels", *PLACES, "chunk", "teacher_chunk"]
    columns = dict.fromkeys(tokens, pyarrow.list_(pyarrow.int32()))
    schema = pyarrow.schema({**columns, "answer_bytes": pyarrow.int64(), "shortened": pyarrow.bool_()})
    batches, remaining = [], rows()
    while batch := list(itertools.islice(remaining, 1000)):
        batches.append(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
    if not batches:
        raise DataError(
            f"nothing to learn: {counts.dropped} conversations have no answer within {max_length} tokens, and the tokenizers read "
            f"different bytes in {counts.not_alignable}; raise --max-length or check the chat templates"
        )
    return datasets.Dataset(pyarrow.Table.from_batches(batches)), counts


@dataclass
class PairLayout:
    """Lays out a batch twice, the student's tokens and the teacher's, each in lines of its own.

    So that a target is found again whichever way both are packed, the teacher's tokens are numbered through the batch
    (``teacher_number``) and the student's say which number they want (``teacher_index``, −1 for none). So are chunks, and so are
    conversations.
    """

    student: BatchLayout
    teacher: BatchLayout

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The student's batch, with a number a token for all of `Positions`' columns; the teacher's as ``teacher_…``."""
        wanting, asked = [], []
        first_token = first_chunk = 0
        for number, row in enumerate(rows):
            length = len(row["teacher_input_ids"])
            index, chunk, teacher_chunk = (
                [NO_TARGET if i == NO_TARGET else first + i for i in row[name]]
                for name, first in (("teacher_index", first_token), ("chunk", first_chunk), ("teacher_chunk", first_chunk))
            )
            conversation = [number] * len(row["input_ids"])
            wanting.append({**row, "teacher_index": index, "chunk": chunk, "conversation": conversation})
            asked.append(
                {
                    "input_ids": row["teacher_input_ids"],
                    "labels": row["teacher_labels"],
                    "number": list(range(first_token, first_token + length)),
                    "chunk": teacher_chunk,
                    "conversation": [number] * length,
                }
            )
            first_token, first_chunk = first_token + length, first_chunk + len(row["input_ids"])
        teacher = self.teacher(asked, more=("number", "chunk", "conversation"))
        student = self.student(wanting, more=(*PLACES, "chunk", "conversation"))
        return {**student, **{f"teacher_{name}": tensor for name, tensor in teacher.items()}}


def _answer(conversation: Conversation) -> str:
    if "text" in conversation:
        return str(conversation["text"])
    return next(str(turn["content"]) for turn in reversed(conversation["messages"]) if turn["role"] == "assistant")


def _cut(found: Positions, student_length: int, teacher_length: int) -> dict[str, list[int]]:
    """The columns, without what lies beyond either cut."""
    columns = [getattr(found, name) for name in PLACES]
    nowhere = (NO_TARGET, 0, 0, 0, 0)
    places = [place if place[0] < teacher_length else nowhere for place in zip(*columns, strict=True)][:student_length]
    kept = dict(zip(PLACES, map(list, zip(*places, strict=True)), strict=True))
    # The chunk that a cut goes through is none.
    cut_away = {NO_TARGET, *found.chunk[student_length:], *found.teacher_chunk[teacher_length:]}
    for name, length in (("chunk", student_length), ("teacher_chunk", teacher_length)):
        kept[name] = [NO_TARGET if number in cut_away else number for number in getattr(found, name)[:length]]
    return kept
