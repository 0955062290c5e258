"""At how many of the student's positions in the user's own text a teacher has something to say.

Two vocabularies may share four fifths of their tokens and a text still be cut differently at every second place, or share few and
be cut alike. So the text is tokenized as a run would do it, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from potstill.alignment import PieceCells, VocabularyCells, token_bytes
from potstill.data import IGNORED, tokenize_conversations, tokenize_pairs
from potstill.data.conversations import Conversation

PROBE = "The year 2026, they said:\n\tif x != 'été': print(42)  # 雨 and 🌧️\r\n\n  Rain isn't dry."
"""A little of everything that tokenizers split differently."""
MOST_MEASURED = 500
"""Conversations, spread evenly over the data: shares are then known to a tenth of a percent."""


@dataclass(frozen=True)
class MeasuredText:
    """The user's conversations in the tokens of both. Sums over those that were measured."""

    conversations: int
    """Measured, and usable."""
    of: int
    """In the data."""
    shortened: int
    """Cut at the length limit."""
    dropped: int
    """With no answer within the length limit."""
    tokens: int
    """The student's, prompts included."""
    teacher_tokens: int
    """Those that the teacher reads; as many where the tokenizers are the same."""
    supervised_tokens: int
    """The student's positions to learn."""
    teacher_supervised_tokens: int
    longest: int
    """The student's tokens of the longest conversation."""
    answer_bytes: int
    roots: int
    """Of the supervised: with a target, where both tokenizations have a boundary (all, where the tokenizers are the same)."""
    one_to_one: int
    """Of the supervised: a single token over exactly the bytes of a single teacher token."""
    interiors: int = 0
    """Of the supervised: with a target, inside a teacher token."""
    disagreeing_roots: int = 0
    """Of the roots: with another token than the piece that the teacher's begins with."""
    split_differently: int = 0
    """Conversations that tokenizers of the same tokens nevertheless split into different ids."""
    not_alignable: int = 0
    """Conversations whose answers are other bytes under the two chat templates."""
    shared_tokens: int | None = None
    """Of the supervised: tokens whose bytes are one teacher token; None where the tokenizers are the same."""
    untaught: list[tuple[str, int]] = field(default_factory=list)
    """The tokens most often without a target, and how often."""
    untaught_blank: float = 0.0
    """Of the tokens without a target, the share that are blanks and line breaks alone."""

    @property
    def with_target(self) -> float:
        """The share of the student's positions at which the teacher's distribution says something."""
        return (self.roots + self.interiors) / max(1, self.supervised_tokens)

    @property
    def disagreeing(self) -> float:
        """The share of roots at which the text spells otherwise."""
        return self.disagreeing_roots / max(1, self.roots)


def measure_text(
    conversations: Sequence[Conversation],
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    *,
    same: bool,
    max_length: int,
) -> MeasuredText:
    """Tokenize some of the conversations as a run would, and count what can be taught.

    Raises: ChatTemplateError for a template that loses an answer; DataError if nothing is left to learn or to align.
    """
    chosen = conversations[:: max(1, -(-len(conversations) // MOST_MEASURED))]
    if same:
        dataset, counts = tokenize_conversations(chosen, student_tokenizer, max_length=max_length)
        everything = counts.supervised_tokens
        taught: dict[str, Any] = {"roots": everything, "one_to_one": everything}
        taught |= {"teacher_tokens": counts.tokens, "teacher_supervised_tokens": everything}
        taught["split_differently"] = sum(
            not _split_alike(row, teacher_tokenizer, student_tokenizer) for row in chosen
        )
    else:
        cells = PieceCells(VocabularyCells(teacher_tokenizer, student_tokenizer))
        dataset, counts = tokenize_pairs(
            chosen, teacher_tokenizer, student_tokenizer, cells, max_length=max_length
        )
        taught = _taught_across(
            dataset, token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)
        )
        taught |= {
            name: getattr(counts, name)
            for name in ("roots", "interiors", "disagreeing_roots", "not_alignable")
        }
    return MeasuredText(
        conversations=counts.conversations,
        of=len(conversations),
        shortened=counts.shortened,
        dropped=counts.dropped,
        tokens=counts.tokens,
        supervised_tokens=counts.supervised_tokens,
        longest=max(map(len, dataset["input_ids"])),
        answer_bytes=sum(dataset["answer_bytes"]),
        **taught,
    )


def splits_alike(teacher_tokenizer: Any, student_tokenizer: Any) -> bool:
    """Whether two tokenizers of the same tokens also split a text alike (merges and rules between words may differ)."""
    ids = [
        tokenizer.encode(PROBE, add_special_tokens=False)
        for tokenizer in (teacher_tokenizer, student_tokenizer)
    ]
    return bool(ids[0] == ids[1])


def _taught_across(
    dataset: Any, teacher_tokens: list[bytes | None], student_tokens: list[bytes | None]
) -> dict[str, Any]:
    known = set(filter(None, teacher_tokens))
    shared = one_to_one = 0
    untaught: Counter[bytes] = Counter()
    for row in dataset:
        for u, label, k, depth in zip(
            row["input_ids"], row["labels"], row["teacher_index"], row["depth"], strict=True
        ):
            if label == IGNORED:
                continue
            string = student_tokens[u]
            shared += string is None or string in known
            if k < 0:
                untaught[string or b""] += 1
            elif depth == 0:
                one_to_one += string == teacher_tokens[row["teacher_input_ids"][k]]
    blank = sum(count for string, count in untaught.items() if string.isspace())
    return {
        "teacher_tokens": sum(map(len, dataset["teacher_input_ids"])),
        "teacher_supervised_tokens": sum(
            label != IGNORED for labels in dataset["teacher_labels"] for label in labels
        ),
        "shared_tokens": shared,
        "one_to_one": one_to_one,
        "untaught": [
            (string.decode(errors="replace"), count) for string, count in untaught.most_common(5)
        ],
        "untaught_blank": blank / max(1, untaught.total()),
    }


def _split_alike(conversation: Conversation, *tokenizers: Any) -> bool:
    texts = (
        [conversation["text"]]
        if "text" in conversation
        else [turn["content"] for turn in conversation["messages"]]
    )
    ids = [
        [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        for tokenizer in tokenizers
    ]
    return bool(ids[0] == ids[1])
