"""Define the targets of the literature's losses across tokenizers.

N tokens of the student, M of the teacher. Each target holds the teacher's states; see the file of
its loss for the definition and its defects.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from potstill.baselines.chunk_likelihoods import fused_linear_chunks
from potstill.baselines.last_token import fused_linear_last_token
from potstill.baselines.sorted_probabilities import fused_linear_sorted
from potstill.losses import Head
from potstill.teachers.targets import LossSettings, StatesTarget


@dataclass(frozen=True)
class SpanLikelihoodTarget:
    """``alm``: the likelihood of each aligned span of text."""

    states: StatesTarget
    teacher_labels: Tensor
    span: Tensor
    """Number of the span of each student token, ``[N]``; −1 for none."""
    teacher_span: Tensor
    """The same for the teacher's tokens, ``[M]``."""

    def summed_loss(
        self, student_hidden: Tensor, student_head: Head, labels: Tensor, loss: LossSettings
    ) -> Tensor:
        """Return the divergence of span likelihoods, summed over spans."""
        return fused_linear_chunks(
            student_hidden,
            student_head,
            self.states.hidden,
            self.states.head,
            labels=labels,
            teacher_labels=self.teacher_labels,
            chunk=self.span,
            teacher_chunk=self.teacher_span,
        )


@dataclass(frozen=True)
class SortedTarget:
    """``uld``: sorted probabilities at aligned positions."""

    states: StatesTarget
    teacher_labels: Tensor
    teacher_row: Tensor
    """Row of the teacher's states for each student token, ``[N]``; −1 for none."""

    def summed_loss(
        self, student_hidden: Tensor, student_head: Head, labels: Tensor, loss: LossSettings
    ) -> Tensor:
        """Return cross-entropy and the distance of sorted probabilities, summed over tokens."""
        return fused_linear_sorted(
            student_hidden,
            student_head,
            self.states.hidden,
            self.states.head,
            labels=labels,
            teacher_labels=self.teacher_labels,
            teacher_row=self.teacher_row,
            teacher_temperature=loss.teacher_temperature,
        )


@dataclass(frozen=True)
class LastTokenTarget:
    """``last_token_padded``: the last position of each conversation, logits padded with zeros."""

    states: StatesTarget
    conversation: Tensor
    """Conversation of each student token, ``[N]``."""
    teacher_conversation: Tensor
    """Conversation of each teacher token, ``[M]``."""

    def summed_loss(
        self, student_hidden: Tensor, student_head: Head, labels: Tensor, loss: LossSettings
    ) -> Tensor:
        """Return KL between padded logits, summed over conversations."""
        return fused_linear_last_token(
            student_hidden,
            student_head,
            self.states.hidden,
            self.states.head,
            conversation=self.conversation,
            teacher_conversation=self.teacher_conversation,
        )
