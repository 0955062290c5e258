"""What a method of distillation is: how conversations become rows, rows a batch, and a batch a loss.

B batch, T time, N supervised tokens of the student, M of the teacher. Three methods, one principle (losses/partitions.py): text
knows nothing of the teacher but what it wrote, logits all, and cross (cross_objective.py) what two tokenizers let it know.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AutoTokenizer

from potstill.alignment import shared_rows
from potstill.data import BatchLayout, PairLayout, TokenCounts, tokenize_conversations
from potstill.errors import ConfigError
from potstill.heads import carries_state, hidden_states, model_inputs, output_head, supervised
from potstill.losses import fused_linear_cross_entropy, fused_linear_divergence
from potstill.teachers import LocalTeacher, Teacher
from potstill.training.cross_objective import CrossObjective, choose_cells

METHODS = ("text", "logits", "cross")


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

    def self_divergence(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """Σ of the teacher's divergence from itself, put in the student's place: 0. None where there is no such thing."""
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
        hidden, labels = supervised(hidden_states(student, model_inputs(batch)), batch["labels"])
        return fused_linear_cross_entropy(hidden, output_head(student), labels)

    def self_divergence(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """None: the text is all that is known."""
        return None


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
        hidden, labels = supervised(hidden_states(student, model_inputs(batch)), batch["labels"])
        target = self.teacher.targets({**model_inputs(batch), "labels": batch["labels"]})
        head = output_head(student, rows=self.rows)
        return fused_linear_divergence(hidden, head, target.hidden, target.head, labels=labels, **self.settings)

    def self_divergence(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """The teacher through the student's way to its hidden states against the teacher through its own."""
        if not isinstance(self.teacher, LocalTeacher) or len({p.device for p in self.teacher.model.parameters()}) > 1:
            return None  # a teacher on several cards cannot stand in the student's place
        model = self.teacher.model
        batch = {name: tensor.to(model.device) for name, tensor in self.layout(rows).items()}
        alone = dataclasses.replace(self, settings={**self.settings, "hard_label_weight": 0.0})
        return alone.summed_loss(model, batch)


def make_objective(args: Any, student: Any, tokenizer: Any, teacher: Any, teacher_tokenizer: Any) -> Objective:
    """The objective that a `DistillationConfig` asks for.

    ``teacher`` is a causal language model or any `Teacher`; its tokenizer is found by its name where it is not given. Raises:
    ConfigError if a teacher is missing; VocabularyMismatch if `logits` is asked for and the tokens are not the same.
    """
    is_model = teacher is not None and not hasattr(teacher, "targets")
    together = [student, teacher] if is_model and args.method == "logits" else [student]  # who reads the same batches
    layout = _layout(together, tokenizer, args.packed)
    if args.method == "text":
        return TextObjective(tokenizer, layout)
    if teacher is None:
        raise ConfigError(f"method {args.method} needs a teacher; give one, or use method text on text it has written")
    if teacher_tokenizer is None and is_model:
        teacher_tokenizer = AutoTokenizer.from_pretrained(teacher.config.name_or_path)
    shape = {"divergence": args.divergence, **args.divergence_shape}
    if args.method == "cross":
        cells = choose_cells(args.alignment, teacher_tokenizer, tokenizer)
        teacher_layout = _layout([teacher if is_model else student], teacher_tokenizer, args.packed)
        teacher = LocalTeacher(teacher) if is_model else teacher
        shape |= {"teacher_temperature": args.teacher_temperature, "within_weight": args.within_weight}
        layouts = PairLayout(layout, teacher_layout)
        return CrossObjective(tokenizer, teacher_tokenizer, layouts, teacher, cells, args.alignment, shape)
    rows = getattr(teacher, "rows", None)
    if is_model:
        heads = [len(model.get_output_embeddings().weight) for model in (teacher, student)]
        rows = min(shared_rows(teacher_tokenizer, tokenizer), *heads)
        teacher = LocalTeacher(teacher, rows=rows)
    shape |= {"temperature": args.temperature, "hard_label_weight": args.hard_label_weight, "compiled": args.compile_loss}
    return LogitsObjective(tokenizer, layout, teacher, rows, shape)


def _layout(models: list[Any], tokenizer: Any, packed: bool) -> BatchLayout:
    """A layout that all of ``models`` read rightly."""
    packed = packed and not any(map(carries_state, models))
    # Variable-length attention sees the seams of a single line alone.
    variable_length = any("flash" in str(getattr(model.config, "_attn_implementation", "")) for model in models)
    return BatchLayout(tokenizer.pad_token_id or 0, packed, one_line=packed and variable_length)
