"""Count the student's positions in the data at which the teacher gives a target.

The number of shared tokens does not answer this: two vocabularies can share most tokens and split a
text differently, or share few and split it alike. So the text is tokenized as in a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from potstill.alignment import PieceCells, VocabularyCells, token_bytes
from potstill.data import IGNORED, tokenize_conversations, tokenize_pairs
from potstill.data.conversations import Conversation
from potstill.protocols import Tokenizer

MOST_MEASURED = 500
"""Conversations, spread evenly over the data; shares are then accurate to about 0.1 %."""


@dataclass(frozen=True)
class MeasuredText:
    """Counts over the measured conversations, in the tokens of both models."""

    conversations: int
    """Measured and usable."""
    of: int
    """Conversations in the data."""
    shortened: int
    """Conversations cut at the length limit."""
    dropped: int
    """Conversations without an answer within the length limit."""
    tokens: int
    """The student's, prompts included."""
    teacher_tokens: int
    """Tokens that the teacher reads; the student's if the tokenizers are the same."""
    supervised_tokens: int
    """The student's supervised tokens."""
    teacher_supervised_tokens: int
    longest: int
    """Student tokens of the longest conversation."""
    answer_bytes: int
    roots: int
    """Supervised tokens with a target at a boundary of both tokenizations."""
    one_to_one: int
    """Supervised tokens that cover the same bytes as one teacher token."""
    interiors: int = 0
    """Supervised tokens with a target inside a teacher token."""
    disagreeing_roots: int = 0
    """Roots where the student's token is not the first piece of the teacher's."""
    split_differently: int = 0
    """Conversations with different ids, although the tokenizers have the same tokens."""
    not_alignable: int = 0
    """Conversations whose answers have different bytes under the two chat templates."""
    shared_tokens: int | None = None
    """Supervised tokens that are also teacher tokens; None if the tokenizers are the same."""
    untaught: list[tuple[str, int]] = field(default_factory=list)
    """The most frequent tokens without a target, with counts."""
    untaught_blank: float = 0.0
    """Share of spaces and line breaks among the tokens without a target."""

    @property
    def with_target(self) -> float:
        """Return the share of supervised tokens with a target."""
        return (self.roots + self.interiors) / max(1, self.supervised_tokens)

    @property
    def disagreeing(self) -> float:
        """Return the share of roots that disagree."""
        return self.disagreeing_roots / max(1, self.roots)


def measure_text(
    conversations: Sequence[Conversation],
    teacher_tokenizer: Tokenizer,
    student_tokenizer: Tokenizer,
    *,
    same: bool,
    max_length: int,
) -> MeasuredText:
    """Tokenize at most `MOST_MEASURED` conversations as a run would, and count targets.

    Raises: ChatTemplateError for a template that loses an answer; DataError if no supervised or
    alignable tokens remain.
    """
    chosen = conversations[:: max(1, -(-len(conversations) // MOST_MEASURED))]
    tokenizers = (teacher_tokenizer, student_tokenizer)
    if same:
        dataset, counts = tokenize_conversations(chosen, student_tokenizer, max_length=max_length)
        supervised = counts.supervised_tokens
        targets: dict[str, Any] = {"roots": supervised, "one_to_one": supervised}
        targets |= {"teacher_tokens": counts.tokens, "teacher_supervised_tokens": supervised}
        targets["split_differently"] = sum(not _split_alike(row, *tokenizers) for row in chosen)
    else:
        cells = PieceCells(VocabularyCells(*tokenizers))
        dataset, counts = tokenize_pairs(chosen, *tokenizers, cells, max_length=max_length)
        targets = _count_targets(dataset, *map(token_bytes, tokenizers))
        names = ("roots", "interiors", "disagreeing_roots", "not_alignable")
        targets |= {name: getattr(counts, name) for name in names}
    return MeasuredText(
        conversations=counts.conversations,
        of=len(conversations),
        shortened=counts.shortened,
        dropped=counts.dropped,
        tokens=counts.tokens,
        supervised_tokens=counts.supervised_tokens,
        longest=max(map(len, dataset["input_ids"])),
        answer_bytes=sum(dataset["answer_bytes"]),
        **targets,
    )


def _count_targets(
    dataset: Any, teacher_tokens: list[bytes | None], student_tokens: list[bytes | None]
) -> dict[str, Any]:
    known = set(filter(None, teacher_tokens))
    shared = one_to_one = 0
    untaught: Counter[bytes] = Counter()
    columns = ("input_ids", "labels", "teacher_index", "depth")
    for row in dataset:
        for u, label, k, depth in zip(*(row[name] for name in columns), strict=True):
            if label == IGNORED:
                continue
            string = student_tokens[u]
            shared += string is None or string in known
            if k < 0:
                untaught[string or b""] += 1
            elif depth == 0:
                one_to_one += string == teacher_tokens[row["teacher_input_ids"][k]]
    blank = sum(count for string, count in untaught.items() if string.isspace())
    labels = [label for row_labels in dataset["teacher_labels"] for label in row_labels]
    most = [(string.decode(errors="replace"), count) for string, count in untaught.most_common(5)]
    return {
        "teacher_tokens": sum(map(len, dataset["teacher_input_ids"])),
        "teacher_supervised_tokens": sum(label != IGNORED for label in labels),
        "shared_tokens": shared,
        "one_to_one": one_to_one,
        "untaught": most,
        "untaught_blank": blank / max(1, untaught.total()),
    }


def _split_alike(conversation: Conversation, *tokenizers: Tokenizer) -> bool:
    turns = conversation.get("messages", ())
    texts = [conversation["text"]] if "text" in conversation else [t["content"] for t in turns]
    ids = [[one.encode(text, add_special_tokens=False) for text in texts] for one in tokenizers]
    return bool(ids[0] == ids[1])
