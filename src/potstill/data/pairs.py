"""Encode conversations for a teacher and a student that have different tokenizers.

Each model reads the conversation in its own chat template and tokens. A row has the student's
columns (those of `batches.py`), the teacher's, and for each student token the position of its
target (`alignment/positions.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from potstill.alignment import VocabularyCells, token_bytes
from potstill.alignment.positions import NO_TARGET, Positions, align
from potstill.data.batches import (
    IGNORED,
    BatchLayout,
    Encoded,
    TokenCounts,
    arrow_dataset,
    encode_conversation,
)
from potstill.data.conversations import Conversation
from potstill.defaults import MAX_LENGTH
from potstill.errors import DataError
from potstill.protocols import Batch, Tokenizer

PLACES = ("teacher_index", "start", "stop", "depth", "cell")
"""The columns that locate the target of a student token, one number a token."""


@dataclass
class PairCounts(TokenCounts):
    """Count conversations, and the supervised student tokens by the kind of their target."""

    roots: int = 0
    """Tokens with a target, at a boundary of both tokenizations."""
    interiors: int = 0
    """Tokens with a target, inside a teacher token; a student token starts where that one does."""
    disagreeing_roots: int = 0
    """Roots outside the cell of the teacher's token: the two tokenize the text differently."""
    disagreeing_interiors: int = 0
    """Interiors outside the cell of the next piece."""
    not_alignable: int = 0
    """Conversations left out because the two renderings of the answers differ in their bytes."""
    first_not_alignable: str = ""
    """The beginning of the answer in the first of them."""

    def add(self, row: Encoded) -> bool:
        """Count one encoded conversation and its targets; return False if it must be dropped."""
        kept = super().add(row)
        if kept:
            self.interiors += sum(map(bool, row["depth"]))
            targets = zip(row["teacher_index"], row["depth"], strict=True)
            self.roots += sum(index != NO_TARGET and not depth for index, depth in targets)
            self.disagreeing_roots += row["disagreeing_roots"]
            self.disagreeing_interiors += row["disagreeing_interiors"]
        return kept

    @property
    def elsewhere(self) -> int:
        """Return the supervised tokens without a target, which get plain cross-entropy."""
        return self.supervised_tokens - self.roots - self.interiors

    @property
    def with_target(self) -> float:
        """Return the share of the supervised student tokens that have a target."""
        return (self.roots + self.interiors) / max(1, self.supervised_tokens)

    def __str__(self) -> str:
        line = f"{super().__str__()}; the teacher has a target for {self.with_target:.1%} of these"
        if self.not_alignable:
            reason = f"the tokenizers read different bytes, first in {self.first_not_alignable!r}"
            line += f"; {self.not_alignable} left out ({reason})"
        return line


class PairEncoder:
    """Encode conversations for one pair of tokenizers whose cells are known."""

    def __init__(
        self, teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer, cells: VocabularyCells
    ) -> None:
        self.teacher_tokenizer, self.student_tokenizer = teacher_tokenizer, student_tokenizer
        self.teacher_tokens = token_bytes(teacher_tokenizer)
        self.student_tokens = token_bytes(student_tokenizer)
        self.cells = cells

    def __call__(
        self, conversation: Conversation, *, max_length: int | None = None
    ) -> Encoded | None:
        """Return one row, cut at ``max_length`` tokens on both sides; None if the bytes differ.

        Adds to the student's `encode_conversation` ``teacher_input_ids`` and ``teacher_labels``,
        the columns `PLACES` (as long as ``input_ids``), and numbers for the counts. The ids that
        the teacher sampled for its last answer (``teacher_ids``), if the row has them, are used
        instead of tokenizing that answer again. Raises: ChatTemplateError.
        """
        student = encode_conversation(conversation, self.student_tokenizer)
        teacher = encode_conversation(conversation, self.teacher_tokenizer)
        if conversation.get("teacher_ids"):
            teacher = with_sampled_ids(teacher, conversation["teacher_ids"], self.teacher_tokens)
        found = self._align(teacher, student)
        if found is None:
            return None
        if max_length is not None and len(student["input_ids"]) > max_length:
            student = encode_conversation(
                conversation, self.student_tokenizer, max_length=max_length
            )
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

    def _align(self, teacher: Encoded, student: Encoded) -> Positions | None:
        return align(
            teacher["input_ids"],
            [label != IGNORED for label in teacher["labels"]],
            student["input_ids"],
            [label != IGNORED for label in student["labels"]],
            cells=self.cells,
            teacher_tokens=self.teacher_tokens,
            student_tokens=self.student_tokens,
        )


def with_sampled_ids(row: Encoded, sampled: list[int], tokens: Sequence[bytes | None]) -> Encoded:
    """Return the row with the sampled ids for its last answer, if they have the same bytes.

    ``tokens`` are the bytes of the tokenizer's tokens, None for special ones.
    """
    ids, labels = row["input_ids"], row["labels"]
    stop = next((i + 1 for i in reversed(range(len(labels))) if labels[i] != IGNORED), 0)
    start = next((i + 1 for i in reversed(range(stop)) if labels[i] == IGNORED), 0)
    written, end = _without_end(ids[start:stop], tokens)
    text, sampled_end = _without_end(sampled, tokens)
    if _text(text, tokens) is None or _text(text, tokens) != _text(written, tokens):
        return row
    answer = [*text, *(sampled_end or end)] if end else text
    return {
        **row,
        "input_ids": [*ids[:start], *answer, *ids[stop:]],
        "labels": [*labels[:start], *answer, *labels[stop:]],
    }


def _without_end(ids: list[int], tokens: Sequence[bytes | None]) -> tuple[list[int], list[int]]:
    """Return the ids, and the special token at their end, if there is one."""
    ended = bool(ids) and _text(ids[-1:], tokens) is None
    return (ids[:-1], ids[-1:]) if ended else (ids, [])


def _text(ids: list[int], tokens: Sequence[bytes | None]) -> bytes | None:
    """Return the bytes of the ids; None if one of them has none."""
    pieces = [tokens[i] if i < len(tokens) else None for i in ids]
    return None if None in pieces else b"".join(filter(None, pieces))


def tokenize_pairs(
    conversations: Iterable[Conversation],
    teacher_tokenizer: Tokenizer,
    student_tokenizer: Tokenizer,
    cells: VocabularyCells,
    *,
    max_length: int = MAX_LENGTH,
) -> tuple[Any, PairCounts]:
    """Return a `datasets.Dataset` of `PairEncoder`'s rows, and the counts.

    Left out and counted: conversations whose answers differ in bytes between the tokenizers, or
    with no answer within ``max_length`` tokens. Raises: ChatTemplateError; DataError if no row is
    left.
    """
    import pyarrow

    encode = PairEncoder(teacher_tokenizer, student_tokenizer, cells)
    counts = PairCounts()

    def encoded() -> Iterator[Encoded]:
        for conversation in conversations:
            row = encode(conversation, max_length=max_length)
            if row is None:
                counts.not_alignable += 1
                counts.first_not_alignable = (
                    counts.first_not_alignable or _answer(conversation)[:60]
                )
            elif counts.add(row):
                yield row

    lists = ["input_ids", "labels", "teacher_input_ids", "teacher_labels"]
    lists += [*PLACES, "chunk", "teacher_chunk"]
    columns = dict.fromkeys(lists, pyarrow.list_(pyarrow.int32()))
    columns |= {"answer_bytes": pyarrow.int64(), "shortened": pyarrow.bool_()}
    dataset = arrow_dataset(encoded(), columns)
    if dataset is None:
        raise DataError(
            f"nothing to learn: {counts.dropped} conversations have no answer within {max_length} "
            f"tokens, and the tokenizers read different bytes in {counts.not_alignable}; "
            "raise --max-length or check the chat templates"
        )
    return dataset, counts


@dataclass
class PairLayout:
    """Lay out a batch twice: the student's tokens and the teacher's, packed independently.

    Teacher tokens are numbered through the batch (``teacher_number``), and a student token holds
    the number of its target (``teacher_index``, −1 for none), so packing cannot separate them.
    Spans (columns ``chunk``) and conversations are numbered the same way.
    """

    student: BatchLayout
    teacher: BatchLayout

    def __call__(self, rows: list[Encoded]) -> Batch:
        """Return the student's batch with all columns of `Positions`, and ``teacher_…`` columns."""
        students, teachers = [], []
        first_token = first_span = 0
        for number, row in enumerate(rows):
            length, teacher_length = len(row["input_ids"]), len(row["teacher_input_ids"])
            shifted = {
                "teacher_index": _shifted(row["teacher_index"], first_token),
                "chunk": _shifted(row["chunk"], first_span),
                "conversation": [number] * length,
            }
            students.append({**row, **shifted})
            teachers.append(
                {
                    "input_ids": row["teacher_input_ids"],
                    "labels": row["teacher_labels"],
                    "number": list(range(first_token, first_token + teacher_length)),
                    "chunk": _shifted(row["teacher_chunk"], first_span),
                    "conversation": [number] * teacher_length,
                }
            )
            first_token, first_span = first_token + teacher_length, first_span + length
        teacher = self.teacher(teachers, more=("number", "chunk", "conversation"))
        student = self.student(students, more=(*PLACES, "chunk", "conversation"))
        both = {**student, **{f"teacher_{name}": column for name, column in teacher.items()}}
        return cast(Batch, both)


def _shifted(numbers: list[int], first: int) -> list[int]:
    return [NO_TARGET if number == NO_TARGET else first + number for number in numbers]


def _answer(conversation: Conversation) -> str:
    if "text" in conversation:
        return str(conversation["text"])
    turns = reversed(conversation["messages"])
    return next(str(turn["content"]) for turn in turns if turn["role"] == "assistant")


def _cut(found: Positions, student_length: int, teacher_length: int) -> dict[str, list[int]]:
    """Return the columns without what is beyond either cut."""
    columns = [getattr(found, name)[:student_length] for name in PLACES]
    no_target = (NO_TARGET, 0, 0, 0, 0)
    places = [
        place if place[0] < teacher_length else no_target for place in zip(*columns, strict=True)
    ]
    kept = dict(zip(PLACES, map(list, zip(*places, strict=True)), strict=True))
    # A span that a cut divides cannot be compared.
    dropped = {NO_TARGET, *found.chunk[student_length:], *found.teacher_chunk[teacher_length:]}
    for name, length in (("chunk", student_length), ("teacher_chunk", teacher_length)):
        spans = getattr(found, name)[:length]
        kept[name] = [NO_TARGET if span in dropped else span for span in spans]
    return kept
