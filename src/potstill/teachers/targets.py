"""Define targets: what a teacher knows at the supervised positions of a batch, and the loss.

N supervised tokens, M tokens of the teacher, V vocabulary, H hidden size. A target computes its
own loss from the student's hidden states and head, so an objective needs only `Target`.

    StatesTarget   the teacher's hidden states and head: exact, for every divergence
    CellTarget     a StatesTarget, converted to the cells of another tokenizer
    SparseTarget   a few probabilities per token, from a capture (teachers/sparse.py): forward KL
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from potstill.losses import (
    CallableHead,
    Head,
    Places,
    Projection,
    forward_kl,
    fused_linear_cells,
    fused_linear_divergence,
)
from potstill.losses.cross_tokenizer import Cells
from potstill.losses.fused import DivergenceFunction


@dataclass(frozen=True)
class LossSettings:
    """Hold the settings of the loss. A target uses those that apply to it."""

    divergence: str | DivergenceFunction = "forward_kl"
    divergence_parameters: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    """Divides both models' logits."""
    hard_label_weight: float = 0.0
    """Share of cross-entropy on the text, in [0, 1]."""
    teacher_temperature: float = 1.0
    """Across tokenizers: the temperature at which the text was sampled."""
    within_weight: float = 1.0
    """Across tokenizers: weight of the cross-entropy inside a cell."""
    compiled: bool = False
    """Compile the elementwise part of the loss with torch.compile."""


@dataclass(frozen=True)
class BlockScores:
    """Hold the comparison of b student predictions with the teacher's."""

    kl: Tensor
    """KL(teacher ‖ student) in nats, ``[b]``."""
    agrees: Tensor
    """1 where both have the same most likely token, else 0, ``[b]``."""
    ids: Tensor
    """The teacher's k most likely tokens, ``[b, k]``."""
    probabilities: Tensor
    """Their probabilities, ``[b, k]``."""


class Target(Protocol):
    """Give the loss and the scores of a student at the supervised positions of one batch."""

    def summed_loss(
        self, student_hidden: Tensor, student_head: Head, labels: Tensor, loss: LossSettings
    ) -> Tensor:
        """Return the loss summed over ``student_hidden [N, H]``: a scalar in nats.

        The student's head may have fewer rows than the teacher's: then the first rows of both are
        the shared vocabulary.
        """
        ...

    def label_nll(self, labels: Tensor) -> Tensor:
        """Return −log q(label) in nats, ``[N]``."""
        ...

    def block_scores(
        self, labels: Tensor, *, rows: int | None = None, likeliest: int = 0
    ) -> Callable[[slice, Tensor], BlockScores]:
        """Return a function that measures student logits ``[b, V]`` of consecutive positions.

        ``rows`` cuts the vocabulary to its first rows; ``likeliest`` is the k of `BlockScores`.
        Call the function with the slices in order.
        """
        ...


@dataclass(frozen=True)
class StatesTarget:
    """Hold the teacher's hidden states ``[N, H]`` and its LM head: every divergence is exact."""

    hidden: Tensor
    head: Head | CallableHead

    def summed_loss(
        self, student_hidden: Tensor, student_head: Head, labels: Tensor, loss: LossSettings
    ) -> Tensor:
        """Return the divergence at every token, with ``hard_label_weight`` of cross-entropy."""
        return fused_linear_divergence(
            student_hidden,
            student_head,
            self.hidden,
            self.head.cut(len(student_head)),
            labels=labels,
            divergence=loss.divergence,
            temperature=loss.temperature,
            hard_label_weight=loss.hard_label_weight,
            compiled=loss.compiled,
            **loss.divergence_parameters,  # type: ignore[arg-type]
        )

    def label_nll(self, labels: Tensor) -> Tensor:
        """Return −log q(label) over the teacher's whole vocabulary."""
        nll = torch.zeros(len(labels), device=self.hidden.device)
        for rows, logits in Projection(self.hidden, self.head, observed=labels).blocks():
            nll[rows] = cross_entropy(logits, labels[rows], reduction="none")
        return nll

    def block_scores(
        self, labels: Tensor, *, rows: int | None = None, likeliest: int = 0
    ) -> Callable[[slice, Tensor], BlockScores]:
        """Compare whole distributions, over the first ``rows`` tokens."""
        head = self.head if rows is None else self.head.cut(rows)
        projection = Projection(self.hidden, head, observed=labels)

        def scores(positions: slice, student_logits: Tensor) -> BlockScores:
            logits = projection.logits(positions)
            compared = student_logits[:, : logits.shape[-1]]
            agrees = (logits.argmax(-1) == compared.argmax(-1)).float()
            return BlockScores(
                forward_kl(logits, compared), agrees, *most_likely(logits, likeliest)
            )

        return scores


@dataclass(frozen=True)
class CellTarget:
    """Hold a teacher's states and the cells of both tokenizers (losses/cross_tokenizer.py)."""

    states: StatesTarget
    cells: Cells
    places: Places
    teacher_labels: Tensor
    """The teacher's M supervised tokens, which anchor its half-precision logits."""

    def summed_loss(
        self, student_hidden: Tensor, student_head: Head, labels: Tensor, loss: LossSettings
    ) -> Tensor:
        """Return the divergence over cells and the cross-entropy inside them."""
        return fused_linear_cells(
            student_hidden,
            student_head,
            self.states.hidden,
            self.states.head,
            labels=labels,
            teacher_labels=self.teacher_labels,
            cells=self.cells,
            places=self.places,
            divergence=loss.divergence,
            teacher_temperature=loss.teacher_temperature,
            within_weight=loss.within_weight,
            **loss.divergence_parameters,  # type: ignore[arg-type]
        )


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` most likely tokens and their probabilities, ``[b, count]`` each."""
    values, ids = logits.topk(count)
    return ids.int(), (values - logits.logsumexp(-1, keepdim=True)).exp()


LogitsTarget = StatesTarget
"""The earlier name of `StatesTarget`."""

__all__ = [
    "BlockScores",
    "CellTarget",
    "LogitsTarget",
    "LossSettings",
    "StatesTarget",
    "Target",
    "most_likely",
]
