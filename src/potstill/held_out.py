"""Held-out conversations in the tokens of a teacher and of a student, and what can be measured of either on them."""

from __future__ import annotations

from typing import Any

from potstill.alignment import shared_rows
from potstill.data import IGNORED, tokenize_conversations
from potstill.errors import VocabularyMismatch
from potstill.evaluation import TokenScores, score_tokens, summarize
from potstill.teachers import LocalTeacher


class HeldOut:
    """``conversations`` for a pair, and how much of their vocabularies is one. Raises: as `tokenize_conversations`."""

    def __init__(self, teacher_tokenizer: Any, tokenizer: Any, conversations: list[Any], *, max_length: int) -> None:
        self.teacher_tokenizer, self.tokenizer = teacher_tokenizer, tokenizer
        try:
            self.rows: int | None = shared_rows(teacher_tokenizer, tokenizer)
        except VocabularyMismatch:
            self.rows = None  # their logits cannot be compared, their bits per byte can
        self.dataset, _ = tokenize_conversations(conversations, tokenizer, max_length=max_length)
        self.teacher_dataset, _ = tokenize_conversations(conversations, teacher_tokenizer, max_length=max_length)

    def score_student(self, student: Any, teacher: Any) -> TokenScores:
        """The student's scores, against the teacher where their vocabularies are one."""
        pad = self.tokenizer.pad_token_id
        if self.rows is None:
            return score_tokens(student, self.dataset, pad_token_id=pad)
        rows = min(self.rows, len(teacher.get_output_embeddings().weight), len(student.get_output_embeddings().weight))
        return score_tokens(student, self.dataset, pad_token_id=pad, teacher=LocalTeacher(teacher, rows=rows), rows=rows)

    def measure_teacher(self, teacher: Any) -> dict[str, Any]:
        """The teacher's own measures; from itself it is 0 nats away, and always of its own opinion."""
        measures = summarize(score_tokens(teacher, self.teacher_dataset, pad_token_id=self.teacher_tokenizer.pad_token_id))
        if self.rows is not None:
            measures |= {"kl_nats_per_token": 0.0, "top1_agreement": 1.0}
            measures["ci95"] |= {"kl_nats_per_token": [0.0, 0.0], "top1_agreement": [1.0, 1.0]}
        return measures

    def token_view(self, scores: dict[str, TokenScores], samples: list[Any]) -> dict[str, Any] | None:
        """The first held-out answer token by token: how far the student was from the teacher, before and after."""
        kl = {name: one.kl[one.conversation == 0].tolist() for name, one in scores.items() if one.kl is not None}
        if not kl or not samples:
            return None
        ids = [label for label in self.dataset[0]["labels"] if label != IGNORED]
        tokens = [self.tokenizer.decode([token]) for token in ids]
        rows = zip(tokens, kl["before"], kl["after"], strict=True)
        return {
            "prompt": samples[0]["prompt"],
            "tokens": [{"text": text, "before_kl_nats": before, "after_kl_nats": after} for text, before, after in rows],
        }
