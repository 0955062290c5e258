"""Open the teacher and score it on the user's answers: its templates, and its quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from potstill.data import tokenize_conversations
from potstill.data.conversations import Conversation
from potstill.evaluation.scores import score_tokens, summarize
from potstill.models import ModelOpener, dtype_of
from potstill.models.vocabulary import padding_id
from potstill.protocols import CausalLM, Tokenizer
from potstill.teachers import LocalTeacher
from potstill.teachers.quantization_cost import ExactStates, measured_cost

SCORED_CONVERSATIONS = 32


def score_teacher(
    teacher: str,
    opener: ModelOpener,
    tokenizers: Sequence[Tokenizer],
    conversations: Sequence[Conversation],
    *,
    max_length: int,
    precision: str,
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Return the teacher's bits per byte under both templates, and its quantization's cost.

    The cost is None if ``opener`` does not quantize; else both models are opened in ``precision``.
    """
    if opener.quantize is None:
        model, cost = opener.model(teacher), None
    else:
        opener = replace(opener, dtype=dtype_of(precision))
        rows, _ = tokenize_conversations(conversations, tokenizers[0], max_length=max_length)
        states = ExactStates.collect(teacher, opener, rows)
        model = opener.model(teacher)
        cost = measured_cost(states, LocalTeacher(model))
    return _bits_per_byte(model, tokenizers, conversations, max_length), cost


def _bits_per_byte(
    teacher: CausalLM,
    tokenizers: Sequence[Tokenizer],
    conversations: Sequence[Conversation],
    max_length: int,
) -> dict[str, float]:
    """Score the answers with the teacher, under its own chat template and the student's."""
    tokenizer, student_tokenizer = tokenizers
    templates = {"own": tokenizer.chat_template, "student's": student_tokenizer.chat_template}
    # Marked as cut off, answers are scored without the end token, which belongs to the template.
    chosen = [{**row, "cut_off": True} for row in conversations[:SCORED_CONVERSATIONS]]
    bits = {}
    for name, template in templates.items():
        tokenizer.chat_template = template
        dataset, _ = tokenize_conversations(chosen, tokenizer, max_length=max_length)
        scores = score_tokens(teacher, dataset, pad_token_id=padding_id(tokenizer, teacher))
        bits[name] = summarize(scores)["bits_per_byte"]
    return bits
