"""Held-out conversations in the tokens of a teacher and of a student, and their scores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch

from potstill.alignment import shared_rows
from potstill.data import IGNORED, encode_conversation, tokenize_conversations, without_answer
from potstill.errors import DataError, VocabularyMismatch
from potstill.evaluation.own_answers import measure_own_answers
from potstill.evaluation.scores import TokenScores, conversation_sums, score_teacher, score_tokens
from potstill.models.heads import output_head
from potstill.models.vocabulary import padding_id
from potstill.protocols import CausalLM, Tokenizer
from potstill.teachers import Teacher, as_teacher


class HeldOut:
    """Hold ``conversations`` in the tokens of both models.

    ``rows`` is the number of vocabulary rows that the models share; None if they share none.
    Raises: as `tokenize_conversations`; DataError if the answers have no text.
    """

    def __init__(
        self,
        teacher_tokenizer: Tokenizer,
        tokenizer: Tokenizer,
        conversations: list[Any],
        *,
        max_length: int,
    ) -> None:
        self.teacher_tokenizer, self.tokenizer = teacher_tokenizer, tokenizer
        try:
            self.rows: int | None = shared_rows(teacher_tokenizer, tokenizer)
        except VocabularyMismatch:
            self.rows = None  # only bits per byte can be compared

        def has_answer(conversation: Any, tokenizer: Tokenizer) -> bool:
            row = encode_conversation(conversation, tokenizer, max_length=max_length)
            return any(label != IGNORED for label in row["labels"])

        pair = (teacher_tokenizer, tokenizer)
        kept = [one for one in conversations if all(has_answer(one, each) for each in pair)]
        self.conversations = conversations = kept or conversations
        self.dataset, _ = tokenize_conversations(conversations, tokenizer, max_length=max_length)
        if not any(self.dataset["answer_bytes"]):
            raise DataError(
                "the held-out answers have no text, so nothing can be measured; give others"
            )
        self.teacher_dataset, _ = tokenize_conversations(
            conversations, teacher_tokenizer, max_length=max_length
        )

    def score_student(
        self,
        student: CausalLM,
        teacher: CausalLM | Teacher,
        *,
        likeliest: int = 0,
        own_answers: bool = False,
    ) -> TokenScores:
        """Score the student, against the teacher where both have the same vocabulary.

        ``likeliest`` as in `score_tokens`; ``own_answers`` also measures what the student writes.
        """
        pad = padding_id(self.tokenizer, student)
        if self.rows is None:
            return score_tokens(student, self.dataset, pad_token_id=pad, likeliest=likeliest)
        source = as_teacher(teacher)
        rows = min(self.rows, source.vocabulary_rows, len(output_head(student)))
        scores = score_tokens(
            student,
            self.dataset,
            pad_token_id=pad,
            teacher=source,
            rows=rows,
            likeliest=likeliest,
        )
        if not own_answers:
            return scores
        own = measure_own_answers(student, self.tokenizer, self.dataset, source, rows=rows)
        return dataclasses.replace(scores, own=own)

    def score_teacher(self, teacher: CausalLM | Teacher) -> TokenScores:
        """Score the teacher; its KL from itself is 0 and its agreement 1, by definition."""
        source = as_teacher(teacher)
        model, tokenizer = source.model, self.teacher_tokenizer
        pad = padding_id(tokenizer, model) if model is not None else tokenizer.pad_token_id or 0
        scores = score_teacher(source, self.teacher_dataset, pad_token_id=pad)
        if self.rows is None:
            return scores
        zeros, ones = torch.zeros_like(scores.nll), torch.ones_like(scores.nll)
        return dataclasses.replace(scores, kl=zeros, agrees=ones)

    def per_conversation(self, scores: dict[str, TokenScores]) -> dict[str, Any]:
        """Return each model's sums per conversation, the prompts and a fingerprint."""
        sums = {name: conversation_sums(one) for name, one in scores.items()}
        prompts = [last_question(conversation) for conversation in self.conversations]
        return {"fingerprint": fingerprint(self.conversations), "prompts": prompts, **sums}


def prompts_of(conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversations without their last answers, tools included; no plain text."""
    return [
        {**one, "messages": without_answer(one["messages"])}
        for one in conversations
        if "messages" in one
    ]


def last_question(conversation: dict[str, Any]) -> str:
    """Return the last question; of plain text the beginning."""
    prompt = without_answer(conversation.get("messages", []))
    return str(prompt[-1]["content"]) if prompt else str(conversation.get("text", ""))[:200]


def fingerprint(conversations: list[dict[str, Any]], *, of_prompts: bool = False) -> str:
    """Return 16 hexadecimal digits that identify a list of conversations, or its prompts."""
    texts = [one.get("messages") or one.get("text") for one in conversations]
    if of_prompts:
        texts = [without_answer(text) if isinstance(text, list) else text for text in texts]
    texts = [
        [text, one["tools"]] if one.get("tools") else text
        for text, one in zip(texts, conversations, strict=True)
    ]
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]
