"""What a method of distillation is: how conversations become rows, rows a batch, and a batch a loss.

B batch, T time, N supervised tokens of the student, M of the teacher. Three methods, one principle (losses/partitions.py): text
knows nothing of the teacher but what it wrote, logits all, and cross what two tokenizers let it know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from potstill.alignment import VocabularyCells, cached_cells, shared_rows
from potstill.data import BatchLayout, PairLayout, TokenCounts, tokenize_conversations, tokenize_pairs
from potstill.data.pairs import PLACES
from potstill.errors import ConfigError
from potstill.heads import hidden_states, output_head, supervised
from potstill.losses import Places, fused_linear_cells, fused_linear_cross_entropy, fused_linear_divergence
from potstill.models import cache_folder
from potstill.teachers import LocalTeacher, Teacher

METHODS = ("text", "logits", "cross")
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class Objective(Protocol):
    """One method, for one student."""

    layout: Any
    """From a list of rows to a batch: the Trainer's data collator."""

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """Rows of token ids, and what became of the conversations."""
        ...

    def summed_loss(self, student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Σ over the supervised tokens of ``batch``, in nats: the loss before any division."""
        ...


@dataclass
class TextObjective:
    """Cross-entropy on what the teacher wrote."""

    tokenizer: Any
    layout: BatchLayout

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """The student's tokens alone."""
        return tokenize_conversations(conversations, self.tokenizer, max_length=max_length)

    def summed_loss(self, student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """−log p of every token to learn."""
        hidden, labels = supervised(hidden_states(student, _inputs(batch)), batch["labels"])
        return fused_linear_cross_entropy(hidden, output_head(student), labels)


@dataclass
class LogitsObjective:
    """A divergence between two distributions over the same tokens, cut to the ``rows`` that both heads have."""

    tokenizer: Any
    layout: BatchLayout
    teacher: Teacher
    rows: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """The student's tokens, which are the teacher's."""
        return tokenize_conversations(conversations, self.tokenizer, max_length=max_length)

    def summed_loss(self, student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The divergence at every token to learn."""
        hidden, labels = supervised(hidden_states(student, _inputs(batch)), batch["labels"])
        target = self.teacher.targets({**_inputs(batch), "labels": batch["labels"]})
        head = output_head(student, rows=self.rows)
        return fused_linear_divergence(hidden, head, target.hidden, target.head, labels=labels, **self.settings)


@dataclass
class CrossObjective:
    """A divergence between two distributions over the cells of different vocabularies."""

    tokenizer: Any
    teacher_tokenizer: Any
    layout: PairLayout
    teacher: Teacher
    cells: VocabularyCells
    settings: dict[str, Any] = field(default_factory=dict)

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """Both models' tokens, each in its own chat template, and where the student's find their targets."""
        return tokenize_pairs(conversations, self.teacher_tokenizer, self.tokenizer, self.cells, max_length=max_length)

    def summed_loss(self, student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The divergence where the teacher has a target, and cross-entropy for what is not known."""
        hidden, labels = supervised(hidden_states(student, _inputs(batch)), batch["labels"])
        asked = {name: batch[f"teacher_{name}"] for name in (*MODEL_INPUTS, "labels") if f"teacher_{name}" in batch}
        target = self.teacher.targets(asked)
        taught = asked["labels"][:, 1:] != -100
        return fused_linear_cells(
            hidden,
            output_head(student),
            target.hidden,
            target.head,
            cells=self.cells,
            places=_places(batch, batch["teacher_number"][:, 1:][taught]),
            labels=labels,
            teacher_labels=asked["labels"][:, 1:][taught],
            **self.settings,
        )


def make_objective(args: Any, student: Any, tokenizer: Any, teacher: Any, teacher_tokenizer: Any) -> Objective:
    """The objective that a `DistillationConfig` asks for.

    ``teacher`` is a causal language model or any `Teacher`; its tokenizer is found by its name where it is not given. Raises:
    ConfigError if a teacher is missing; VocabularyMismatch if `logits` is asked for and the tokens are not the same.
    """
    layout = _layout(student, tokenizer, args.packed)
    if args.method == "text":
        return TextObjective(tokenizer, layout)
    if teacher is None:
        raise ConfigError(f"method {args.method} needs a teacher; give one, or use method text on text it has written")
    is_model = not hasattr(teacher, "targets")
    if teacher_tokenizer is None and is_model:
        teacher_tokenizer = AutoTokenizer.from_pretrained(teacher.config.name_or_path)
    shape = {"divergence": args.divergence, **args.divergence_shape}
    if args.method == "cross":
        cells = cached_cells(teacher_tokenizer, tokenizer, cache_folder() / "cells")
        teacher_layout = _layout(teacher if is_model else student, teacher_tokenizer, args.packed)
        teacher = LocalTeacher(teacher) if is_model else teacher
        shape |= {"teacher_temperature": args.teacher_temperature, "within_weight": args.within_weight}
        return CrossObjective(tokenizer, teacher_tokenizer, PairLayout(layout, teacher_layout), teacher, cells, shape)
    rows = getattr(teacher, "rows", None)
    if is_model:
        heads = [len(model.get_output_embeddings().weight) for model in (teacher, student)]
        rows = min(shared_rows(teacher_tokenizer, tokenizer), *heads)
        teacher = LocalTeacher(teacher, rows=rows)
    shape |= {"temperature": args.temperature, "hard_label_weight": args.hard_label_weight, "compiled": args.compile_loss}
    return LogitsObjective(tokenizer, layout, teacher, rows, shape)


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def _places(batch: dict[str, Tensor], numbers: Tensor) -> Places:
    """Where each of the student's N tokens finds its target among the teacher's M, whose ``numbers`` these are."""
    chosen = batch["labels"][:, 1:] != -100
    wanted, *place = (batch[name][:, 1:][chosen] for name in PLACES)
    highest = int(batch["teacher_number"].max()) + 1
    row_of = torch.full((highest + 1,), -1, device=numbers.device)  # the last stands for −1, "no target"
    row_of[numbers] = torch.arange(len(numbers), device=numbers.device)
    return Places(row_of[wanted], *place)


def _layout(model: Any, tokenizer: Any, packed: bool) -> BatchLayout:
    variable_length = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    return BatchLayout(tokenizer.pad_token_id or 0, packed, one_line=packed and variable_length)
