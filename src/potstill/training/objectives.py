"""What a method of distillation does: conversations → rows → batches → a loss.

B batch, T time, N supervised tokens of the student, M of the teacher. The three methods differ in
what is known of the teacher (losses/partitions.py): text knows what it wrote, logits its whole
distribution, and cross (cross_objective.py) what two tokenizers allow to compare.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from transformers import AutoTokenizer

from potstill.alignment import shared_rows
from potstill.data import BatchLayout, PairLayout, TokenCounts, tokenize_conversations
from potstill.errors import ConfigError
from potstill.losses import fused_linear_cross_entropy
from potstill.models.heads import (
    has_variable_length,
    model_inputs,
    on_device,
    supervised,
    takes_bounds,
    teacher_inputs,
    trainable_head,
)
from potstill.models.isolation import isolation
from potstill.models.loss_at_head import loss_at_head
from potstill.models.vocabulary import padding_id
from potstill.processes import broadcast_from_main, print_main
from potstill.protocols import Batch, CausalLM, Tokenizer
from potstill.teachers import LossSettings, Teacher, as_teacher, single_device_model
from potstill.training.cross_objective import CrossObjective, choose_cells

if TYPE_CHECKING:
    from potstill.training.config import DistillationConfig


class Objective(Protocol):
    """One method, for one student."""

    layout: Any
    """From a list of rows to a batch: the Trainer's data collator."""

    @property
    def teacher(self) -> Teacher | None:
        """The teacher; None for a method that needs only its text."""
        ...

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """Return rows of token ids, and how many conversations were kept, cut and dropped."""
        ...

    def summed_loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return the sum over the supervised tokens of ``batch``, in nats, not yet divided."""
        ...

    def self_divergence(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """Return the loss with the teacher as its own student: 0, or None if undefined."""
        ...

    def teacher_batch(self, batch: Batch) -> Batch | None:
        """Return the part of ``batch`` that the teacher reads; None without a teacher."""
        ...


@dataclass
class TextObjective:
    """Cross-entropy on the text that the teacher wrote."""

    tokenizer: Tokenizer
    layout: BatchLayout
    teacher: None = None

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """Encode with the student's tokenizer."""
        return tokenize_conversations(conversations, self.tokenizer, max_length=max_length)

    def summed_loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return Σ −log p(label)."""

        def loss(states: Tensor) -> Tensor:
            hidden, labels = supervised(states, batch["labels"])
            return fused_linear_cross_entropy(hidden, trainable_head(student), labels)

        return loss_at_head(student, model_inputs(batch), loss)

    def self_divergence(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """Return None: there is no divergence."""
        return None

    def teacher_batch(self, batch: Batch) -> Batch | None:
        """Return None: there is no teacher."""
        return None


@dataclass
class LogitsObjective:
    """A divergence between distributions over the same tokens, the first ``rows`` of both heads."""

    tokenizer: Tokenizer
    layout: BatchLayout
    teacher: Teacher
    rows: int | None = None
    loss: LossSettings = field(default_factory=LossSettings)

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """Encode with the student's tokenizer, whose tokens are the teacher's."""
        return tokenize_conversations(conversations, self.tokenizer, max_length=max_length)

    def summed_loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return the divergence, summed over supervised tokens."""
        target = self.teacher.targets(self.teacher_batch(batch))

        def loss(states: Tensor) -> Tensor:
            hidden, labels = supervised(states, batch["labels"])
            head = trainable_head(student, rows=self.rows)
            return target.summed_loss(hidden, head, labels, self.loss)

        return loss_at_head(student, model_inputs(batch), loss)

    def self_divergence(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """Compare the teacher's hidden states by the student's path with its own targets."""
        model: Any = single_device_model(self.teacher)
        if model is None:
            return None
        batch = on_device(self.layout(rows), model.device)
        loss = dataclasses.replace(self.loss, hard_label_weight=0.0)
        return dataclasses.replace(self, loss=loss).summed_loss(model, batch)

    def teacher_batch(self, batch: Batch) -> Batch:
        """Return model inputs and labels, which are the student's."""
        return teacher_inputs(batch)


def make_objective(
    args: DistillationConfig,
    student: CausalLM,
    tokenizer: Tokenizer,
    teacher: CausalLM | Teacher | None,
    teacher_tokenizer: Tokenizer | None,
) -> Objective:
    """Return the objective that ``args`` asks for.

    Without ``teacher_tokenizer`` the teacher's own is used, else the one found by its name. Raises:
    ConfigError if a teacher is missing; VocabularyMismatch if `logits` is asked for and the tokens
    differ.
    """
    if getattr(student.config.get_text_config(), "output_router_logits", False):
        print_main(
            "note: the student's config has output_router_logits; the router loss that balances "
            "its experts is not part of the loss, which is the distance to the teacher alone"
        )
    if args.method == "text":
        return TextObjective(tokenizer, _layout([student], tokenizer, args.packed))
    if teacher is None:
        raise ConfigError(
            f"method {args.method} needs a teacher; give one, or use method text on its text"
        )
    source = as_teacher(teacher)
    model = source.model
    teacher_tokenizer = teacher_tokenizer or source.tokenizer
    if teacher_tokenizer is None and model is not None:
        teacher_tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    if args.method == "cross":
        if teacher_tokenizer is None:
            raise ConfigError("method cross needs the teacher's tokenizer; give teacher_tokenizer")
        layout = _layout([student], tokenizer, args.packed)
        teacher_layout = _layout([model or student], teacher_tokenizer, args.packed)
        return CrossObjective(
            tokenizer,
            teacher_tokenizer,
            PairLayout(layout, teacher_layout),
            source,
            choose_cells(args.alignment, teacher_tokenizer, tokenizer),
            args.alignment,
            args.loss_settings,
        )
    rows = [source.vocabulary_rows, len(student.get_output_embeddings().weight)]
    if teacher_tokenizer is not None:
        rows.append(shared_rows(teacher_tokenizer, tokenizer))
    readers = [student] if model is None else [student, model]
    layout = _layout(readers, tokenizer, args.packed)
    return LogitsObjective(tokenizer, layout, source, min(rows), args.loss_settings)


def _layout(models: list[CausalLM], tokenizer: Tokenizer, packed: bool) -> BatchLayout:
    """Return a layout that all ``models`` read correctly."""
    # Variable-length attention separates conversations only within a single row.
    one_line = any(map(has_variable_length, models))
    # The weights of other processes may not have been loaded yet (FSDP).
    bounds = one_line and all(map(takes_bounds, models))
    seen = broadcast_from_main(
        [isolation(model, one_row=one_line, bounds=bounds) for model in models]
    )
    for model, found in zip(models, seen, strict=True):
        if packed and not found.packed:
            print_main(
                f"note: in {type(model).__name__}, conversations packed into one row would see "
                "each other; each gets a row of its own"
            )
    packed = packed and all(found.packed for found in seen)
    pad = min(padding_id(tokenizer, model) for model in models)
    masked = not all(found.padded for found in seen)
    one_line = packed and one_line
    return BatchLayout(pad, packed, one_line=one_line, masked=masked, bounds=bounds)
