"""The method `cross`: a teacher and a student who have different tokens.

B batch, T time, N supervised tokens of the student, M of the teacher. What differs from one ``alignment`` to the next is which of
the teacher's predictions are compared with which of the student's, and how:

    pieces             distributions over the student's tokens, each teacher token standing for its next piece, and the text where
                       it is spelled otherwise (alignment/pieces.py, losses/cross_tokenizer.py): the default
    cells              distributions over cells that both vocabularies are cut into, and the text inside a cell (alignment/cells.py)
    push_forward, bpm  as pieces, but what ends keeps its mass and the text is not looked at (alignment/literature.py)
    strict_topk        over the tokens that both have, where one covers one
    alm                the likelihood of each chunk of text (losses/chunk_likelihoods.py)
    uld                sorted probabilities, whatever their tokens (losses/sorted_probabilities.py)
    last_token_padded  ids as they are, at one position; kept to show what it gets wrong (losses/last_token.py)
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from potstill.alignment import (
    BytePrefixCells,
    PieceCells,
    PushForwardCells,
    StrictCells,
    VocabularyCells,
    cached_cells,
    token_bytes,
)
from potstill.data import PairLayout, TokenCounts, tokenize_pairs
from potstill.data.pairs import PLACES
from potstill.heads import hidden_states, model_inputs, output_head, supervised
from potstill.losses import (
    Head,
    Places,
    fused_linear_cells,
    fused_linear_chunks,
    fused_linear_last_token,
    fused_linear_sorted,
)
from potstill.models import cache_folder
from potstill.teachers import LocalTeacher, Teacher

ALIGNMENTS = ("pieces", "cells", "push_forward", "bpm", "alm", "uld", "strict_topk", "last_token_padded")
OVER_CELLS = ("pieces", "cells", "push_forward", "bpm", "strict_topk")


def choose_cells(alignment: str, teacher_tokenizer: Any, student_tokenizer: Any) -> VocabularyCells:
    """The cells of an alignment; those without cells of their own find their positions by the default's."""
    base = cached_cells(teacher_tokenizer, student_tokenizer, cache_folder() / "cells")
    if alignment == "pieces":
        return PieceCells(base)
    if alignment == "push_forward":
        return PushForwardCells(base)
    if alignment == "bpm":
        return BytePrefixCells(base, token_bytes(teacher_tokenizer), token_bytes(student_tokenizer))
    return StrictCells(base) if alignment == "strict_topk" else base


@dataclass
class CrossObjective:
    """A divergence between two models that write the same bytes in different tokens."""

    tokenizer: Any
    teacher_tokenizer: Any
    layout: PairLayout
    teacher: Teacher
    cells: VocabularyCells
    alignment: str = "pieces"
    settings: dict[str, Any] = field(default_factory=dict)
    """``divergence`` and its shape, ``teacher_temperature`` and ``within_weight``: what the alignment has a use for."""

    def encode(self, conversations: Any, *, max_length: int) -> tuple[Any, TokenCounts]:
        """Both models' tokens, each in its own chat template, and where the student's find their targets."""
        return tokenize_pairs(conversations, self.teacher_tokenizer, self.tokenizer, self.cells, max_length=max_length)

    def summed_loss(self, student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss of the alignment, summed over whatever it compares."""
        hidden, _ = supervised(hidden_states(student, model_inputs(batch)), batch["labels"])
        asked = _of_teacher(batch)
        target = self.teacher.targets({**model_inputs(asked), "labels": asked["labels"]})
        return self._compare(_Supervised(hidden, output_head(student), batch), _Supervised(target.hidden, target.head, asked))

    def _compare(self, ours: _Supervised, theirs: _Supervised) -> Tensor:
        models = (ours.hidden, ours.head, theirs.hidden, theirs.head)
        labels: dict[str, Any] = {"labels": ours["labels"], "teacher_labels": theirs["labels"]}
        if self.alignment == "last_token_padded":
            return fused_linear_last_token(*models, conversation=ours["conversation"], teacher_conversation=theirs["conversation"])
        if self.alignment == "alm":
            return fused_linear_chunks(*models, **labels, chunk=ours["chunk"], teacher_chunk=theirs["chunk"])
        places = _places(ours, theirs["number"])
        if self.alignment == "uld":
            row = places.teacher_row.masked_fill(places.depth > 0, -1)
            temperature = self.settings.get("teacher_temperature", 1.0)
            return fused_linear_sorted(*models, **labels, teacher_row=row, teacher_temperature=temperature)
        return fused_linear_cells(*models, **labels | self.settings, cells=self.cells, places=places)

    def self_divergence(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """The teacher as a student of its own tokens, each its own cell, at every token it reads; None without a divergence."""
        if not isinstance(self.teacher, LocalTeacher) or self.alignment not in OVER_CELLS or self.cells.most is not None:
            return None
        model = self.teacher.model
        twin = copy.copy(self.cells)
        twin.count = len(output_head(model))
        twin.teacher_cells = twin.student_cells = torch.arange(twin.count)
        twins = PairLayout(self.layout.teacher, self.layout.teacher)([_as_student(row) for row in rows])
        settings = {**self.settings, "within_weight": 0.0, "teacher_temperature": 1.0}
        alone = dataclasses.replace(self, cells=twin, settings=settings)
        return alone.summed_loss(model, {name: tensor.to(model.device) for name, tensor in twins.items()})


@dataclass
class _Supervised:
    """One model's N (or M) supervised tokens: hidden states, and whatever the batch says of them."""

    hidden: Tensor
    head: Head
    batch: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """A column of the batch at these tokens."""
        return self.batch[name][:, 1:][self.batch["labels"][:, 1:] != -100]


def _of_teacher(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's half of what `PairLayout` lays out."""
    prefix = "teacher_"
    asked = {name.removeprefix(prefix): tensor for name, tensor in batch.items() if name.startswith(prefix)}
    asked.pop("index")  # the student's column: which of the teacher's tokens it wants
    return asked


def _places(ours: _Supervised, numbers: Tensor) -> Places:
    """Where each of the student's N tokens finds its target among the teacher's M, whose ``numbers`` these are."""
    wanted = ours["teacher_index"]
    highest = int(torch.cat([wanted, numbers, numbers.new_zeros(1)]).max()) + 1
    row_of = torch.full((highest + 1,), -1, device=numbers.device)  # the last stands for −1, "no target"
    row_of[numbers] = torch.arange(len(numbers), device=numbers.device)
    return Places(row_of[wanted], *(ours[name] for name in PLACES[1:]))


def _as_student(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a student who is the teacher: every token to learn is a root of itself."""
    ids, labels = row["teacher_input_ids"], row["teacher_labels"]
    nothing = [0] * len(ids)
    index = [i if label != -100 else -1 for i, label in enumerate(labels)]
    places = {**dict.fromkeys(PLACES, nothing), "teacher_index": index, "chunk": row["teacher_chunk"], "cell": ids}
    return {**row, "input_ids": ids, "labels": labels, **places}
