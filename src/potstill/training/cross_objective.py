"""The method `cross`: a teacher and a student that have different tokens.

B batch, T time, N supervised tokens of the student, M of the teacher. An alignment decides which of
the teacher's predictions are compared with which of the student's, and how. Each is one record of
`ALIGNMENTS`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from potstill.alignment import PieceCells, VocabularyCells, cached_cells, token_bytes
from potstill.baselines import (
    BytePrefixCells,
    LastTokenTarget,
    PushForwardCells,
    SortedTarget,
    SpanLikelihoodTarget,
    StrictCells,
)
from potstill.data import PairLayout, TokenCounts, tokenize_pairs
from potstill.data.pairs import PLACES
from potstill.losses import Places
from potstill.models import cache_folder
from potstill.models.heads import (
    model_inputs,
    on_device,
    output_head,
    supervised,
    teacher_inputs,
    trainable_head,
)
from potstill.models.loss_at_head import loss_at_head
from potstill.protocols import Batch, Tokenizer
from potstill.teachers import CellTarget, LossSettings, Teacher, single_device_model


@dataclass
class SupervisedColumns:
    """The columns of a batch at one model's supervised tokens."""

    batch: Batch

    def __getitem__(self, name: str) -> Tensor:
        """Return one column, ``[N]`` or ``[M]``."""
        columns = cast(dict[str, Tensor], self.batch)
        return columns[name][:, 1:][columns["labels"][:, 1:] != -100]


def _cell_target(target: Any, cells: Any, ours: Any, theirs: Any) -> CellTarget:
    return CellTarget(target, cells, _places(ours, theirs["number"]), theirs["labels"])


def _span_target(target: Any, cells: Any, ours: Any, theirs: Any) -> SpanLikelihoodTarget:
    return SpanLikelihoodTarget(target, theirs["labels"], ours["chunk"], theirs["chunk"])


def _sorted_target(target: Any, cells: Any, ours: Any, theirs: Any) -> SortedTarget:
    places = _places(ours, theirs["number"])
    roots_only = places.teacher_row.masked_fill(places.depth > 0, -1)
    return SortedTarget(target, theirs["labels"], roots_only)


def _last_token_target(target: Any, cells: Any, ours: Any, theirs: Any) -> LastTokenTarget:
    return LastTokenTarget(target, ours["conversation"], theirs["conversation"])


def _prefix_cells(base: VocabularyCells, teacher: Tokenizer, student: Tokenizer) -> VocabularyCells:
    return BytePrefixCells(base, token_bytes(teacher), token_bytes(student))


@dataclass(frozen=True)
class Alignment:
    """One way to compare predictions across tokenizers."""

    help: str
    cells: Callable[[VocabularyCells, Tokenizer, Tokenizer], VocabularyCells]
    """From the common cells of both vocabularies to this alignment's."""
    target: Callable[[Any, Any, SupervisedColumns, SupervisedColumns], Any] = _cell_target
    """From the teacher's target to the one that the student is compared with."""

    @property
    def over_cells(self) -> bool:
        """True if a divergence between distributions over cells is taken."""
        return self.target is _cell_target


def _common(base: VocabularyCells, *_: Tokenizer) -> VocabularyCells:
    return base


ALIGNMENTS = {
    "pieces": Alignment(
        "distributions over student tokens; each teacher token counts for its next piece",
        lambda base, *_: PieceCells(base),
    ),
    "cells": Alignment("distributions over cells that cut both vocabularies; coarser", _common),
    "push_forward": Alignment(
        "as pieces, but a token that ends keeps its mass, and the text is not used",
        lambda base, *_: PushForwardCells(base),
    ),
    "bpm": Alignment("longest student token that begins a teacher token", _prefix_cells),
    "alm": Alignment("likelihood of each aligned span of text", _common, _span_target),
    "uld": Alignment("sorted probabilities", _common, _sorted_target),
    "strict_topk": Alignment(
        "tokens that both vocabularies have, where one covers one",
        lambda base, *_: StrictCells(base),
    ),
    "last_token_padded": Alignment(
        "equal ids at the last position; kept to show what it gets wrong",
        _common,
        _last_token_target,
    ),
}
OVER_CELLS = tuple(name for name, one in ALIGNMENTS.items() if one.over_cells)


def choose_cells(
    alignment: str, teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer
) -> VocabularyCells:
    """Return the cells of an alignment, from a cache on disk where they were computed before."""
    base = cached_cells(teacher_tokenizer, student_tokenizer, cache_folder() / "cells")
    return ALIGNMENTS[alignment].cells(base, teacher_tokenizer, student_tokenizer)


@dataclass
class CrossObjective:
    """A divergence between two models that write the same bytes in different tokens."""

    tokenizer: Tokenizer
    teacher_tokenizer: Tokenizer
    layout: PairLayout
    teacher: Teacher
    cells: VocabularyCells
    alignment: str = "pieces"
    loss: LossSettings = field(default_factory=LossSettings)

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """Encode for both models, each with its own chat template, with the places of targets."""
        return tokenize_pairs(
            conversations, self.teacher_tokenizer, self.tokenizer, self.cells, max_length=max_length
        )

    def summed_loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the alignment, summed over what it compares."""
        theirs = _of_teacher(batch)
        states = self.teacher.targets(self.teacher_batch(batch))
        target = ALIGNMENTS[self.alignment].target(
            states, self.cells, SupervisedColumns(batch), SupervisedColumns(theirs)
        )

        def loss(states: Tensor) -> Tensor:
            hidden, labels = supervised(states, batch["labels"])
            nats: Tensor = target.summed_loss(hidden, trainable_head(student), labels, self.loss)
            return nats

        return loss_at_head(student, model_inputs(batch), loss)

    def teacher_batch(self, batch: Batch) -> Batch:
        """Return model inputs and labels of the teacher's tokenization."""
        return teacher_inputs(_of_teacher(batch))

    def self_divergence(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """Compare the teacher with itself over its own tokens, each token its own cell."""
        model: Any = single_device_model(self.teacher)
        if model is None or self.alignment not in OVER_CELLS or self.cells.most is not None:
            return None
        identity = copy.copy(self.cells)
        identity.count = len(output_head(model))
        identity.teacher_cells = identity.student_cells = torch.arange(identity.count)
        layout = PairLayout(self.layout.teacher, self.layout.teacher)
        batch = layout([_as_student(row) for row in rows])
        loss = dataclasses.replace(self.loss, within_weight=0.0, teacher_temperature=1.0)
        alone = dataclasses.replace(self, cells=identity, loss=loss)
        return alone.summed_loss(model, on_device(batch, model.device))


def _of_teacher(batch: Batch) -> Batch:
    """Return the teacher's half of what `PairLayout` lays out."""
    prefix = "teacher_"
    theirs = {
        name.removeprefix(prefix): column
        for name, column in batch.items()
        if name.startswith(prefix)
    }
    theirs.pop("index")  # a column of the student's: which teacher token it needs
    return cast(Batch, theirs)


def _places(ours: SupervisedColumns, numbers: Tensor) -> Places:
    """Return where each of the student's N tokens finds its target among the teacher's M.

    ``numbers [M]`` are the teacher tokens' numbers in the batch.
    """
    wanted = ours["teacher_index"]
    highest = int(torch.cat([wanted, numbers, numbers.new_zeros(1)]).max()) + 1
    # The last entry is read for −1, "no target".
    row_of = torch.full((highest + 1,), -1, device=numbers.device)
    row_of[numbers] = torch.arange(len(numbers), device=numbers.device)
    return Places(row_of[wanted], *(ours[name] for name in PLACES[1:]))


def _as_student(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a student that is the teacher: every supervised token is a root."""
    ids, labels = row["teacher_input_ids"], row["teacher_labels"]
    index = [i if label != -100 else -1 for i, label in enumerate(labels)]
    places = dict.fromkeys(PLACES, [0] * len(ids))
    places |= {"teacher_index": index, "chunk": row["teacher_chunk"], "cell": ids}
    return {**row, "input_ids": ids, "labels": labels, **places}
