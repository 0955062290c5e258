"""Search the student of a wanted size that is nearest to its teacher before any training.

Candidates of different depth, width, groups and hidden size are cut, refitted (refit.py) on a part
of the calibration text, and scored by their KL from the teacher on held-out calibration text. The
best one is refitted on all of it. What is best as cut is not best when refitted, so nothing is
decided before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from potstill.data import tokenize_conversations
from potstill.data.conversations import Conversation
from potstill.errors import DataError
from potstill.losses import fused_linear_divergence
from potstill.models.heads import hidden_states, model_inputs, supervised, trainable_head
from potstill.models.vocabulary import padding_id
from potstill.processes import print_main
from potstill.progress import Progress
from potstill.protocols import CausalLM, Tokenizer
from potstill.students.families import Sizes
from potstill.students.importance import Cut, Importance, choose_parts, measure_importance
from potstill.students.layers import keep_layers
from potstill.students.layerwise import Calibration
from potstill.students.refit import refit
from potstill.students.sizes import Fixed, Shapes
from potstill.students.states import TeacherStates
from potstill.students.width import narrow, refuse_quantized

HELD_OUT_EVERY = 4
"""Every fourth conversation scores the candidates; the others refit them."""
MOST_HELD_OUT = 32
SEARCH_TOKENS = 4000
"""Tokens on which candidates are refitted; the best one is refitted on all."""
MAX_LENGTH = 512


@dataclass(frozen=True)
class Candidate:
    """One student that was tried: its sizes, and KL from the teacher in nats per token."""

    sizes: Sizes
    parameters: int
    layers: list[int]
    kl_as_cut: float
    kl_refitted: float


@dataclass
class Found:
    """The best student, and all that were tried."""

    student: Any
    cut: Cut
    kl_as_cut: float
    kl_refitted: float
    candidates: list[Candidate] = field(default_factory=list)
    calibration_tokens: int = 0
    held_out_tokens: int = 0


def search_student(
    teacher: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    wanted: int | None,
    fixed: Fixed = Fixed(),  # noqa: B008 - immutable
) -> Found:
    """Return the best student of ``wanted`` parameters, within 2 %, with the ``fixed`` sizes.

    Without ``wanted``, exactly the fixed sizes, the teacher's where none is given. The student has
    the teacher's dtype and is on the CPU. Raises: ConfigError for sizes that cannot be reached;
    DataError for too little calibration text; ModelError for a quantized teacher or a family
    without a table.
    """
    refuse_quantized(teacher)
    shapes = Shapes(teacher.config)
    firsts = [shapes.base(fixed)] if wanted is None else shapes.depths(wanted, fixed)
    for sizes in firsts:
        shapes.parameters(sizes)
    search = _Search(teacher, tokenizer, conversations, fixed)
    with search.autocast():
        return search.run(shapes, firsts, wanted)


class _Search:
    """The calibration text, and the steps of a search."""

    def __init__(
        self,
        teacher: CausalLM,
        tokenizer: Tokenizer,
        conversations: Sequence[Conversation],
        fixed: Fixed,
    ) -> None:
        self.teacher, self.fixed = teacher, fixed
        encoded = list(tokenize_conversations(conversations, tokenizer, max_length=MAX_LENGTH)[0])
        held_out = encoded[::HELD_OUT_EVERY][:MOST_HELD_OUT]
        rest = [row for i, row in enumerate(encoded) if i % HELD_OUT_EVERY]
        rest += encoded[::HELD_OUT_EVERY][MOST_HELD_OUT:]
        pad = padding_id(tokenizer, teacher)
        self.whole = Calibration.of(rest, pad, teacher.device)
        self.part = self.whole.part(SEARCH_TOKENS)
        self.held_out = HeldOut(teacher, Calibration.of(held_out, pad, teacher.device, least=1))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in bfloat16 unless the teacher is in float32.

        Without autocast's cache of rounded weights: a refit changes the weights.
        """
        enabled = self.teacher.dtype != torch.float32
        device = self.teacher.device.type
        return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def run(self, shapes: Shapes, firsts: list[Sizes], wanted: int | None) -> Found:
        """Try all candidates, then refit the best one on all calibration text."""
        candidates: list[Candidate] = []
        with TeacherStates(self.teacher, self.whole) as states:
            importance = measure_importance(self.teacher, self.whole, states)
            best = firsts[0]
            if wanted is not None:
                candidates = self._try_all(shapes, firsts, wanted, importance, states)
                best = min(candidates, key=lambda one: one.kl_refitted).sizes
            found = self._finish(best, importance, states)
        found.candidates = candidates
        return found

    def _try_all(
        self,
        shapes: Shapes,
        firsts: list[Sizes],
        wanted: int | None,
        importance: Importance,
        states: TeacherStates,
    ) -> list[Candidate]:
        more = 2  # variants of the best depth
        total = round(sum(one.layers for one in firsts) * (1 + more / len(firsts)))
        candidates = []
        with Progress("trying students", total, unit="layers") as progress:
            for sizes in firsts:
                candidates.append(self._try(shapes, sizes, importance, states, progress))
            best = min(candidates, key=lambda one: one.kl_refitted).sizes
            assert wanted is not None
            for sizes in shapes.variants(wanted, best, self.fixed):
                candidates.append(self._try(shapes, sizes, importance, states, progress))
        return candidates

    def _try(
        self,
        shapes: Shapes,
        sizes: Sizes,
        importance: Importance,
        states: TeacherStates,
        progress: Progress,
    ) -> Candidate:
        cut = choose_parts(self.teacher, importance, sizes, self._layers())
        student = cut_student(self.teacher, cut)
        before = self.held_out.kl(student)
        refit(student, self.teacher, cut, self.part, states, advance=progress.update)
        after = self.held_out.kl(student)
        return Candidate(sizes, shapes.parameters(sizes), cut.layers, before, after)

    def _finish(self, sizes: Sizes, importance: Importance, states: TeacherStates) -> Found:
        cut = choose_parts(self.teacher, importance, sizes, self._layers())
        student = cut_student(self.teacher, cut)
        before = self.held_out.kl(student)
        with Progress("refitting the best", sizes.layers, unit="layers") as progress:
            refit(student, self.teacher, cut, self.whole, states, advance=progress.update)
        after = self.held_out.kl(student)
        if after > before:
            print_main(
                f"note: the refit does not help on held-out text ({after:.3f} nats per token, as "
                f"cut {before:.3f}), so the student is as cut; more calibration text may help"
            )
            student, after = cut_student(self.teacher, cut), before
        student = student.to(self.teacher.dtype).cpu()
        tokens = self.held_out.tokens
        return Found(student, cut, before, after, [], self.whole.tokens, tokens)

    def _layers(self) -> list[int] | None:
        layers = self.fixed.layers
        return layers if isinstance(layers, list) else None


def cut_student(teacher: CausalLM, cut: Cut) -> Any:
    """Return what is kept of the teacher as a model in float32, on the teacher's device."""
    return narrow(keep_layers(teacher, cut.layers), cut.kept).float().to(teacher.device)


class HeldOut:
    """Held-out text with the teacher's hidden states at its supervised positions."""

    @torch.no_grad()
    def __init__(self, teacher: CausalLM, calibration: Calibration) -> None:
        self.batches = calibration.batches
        self.head = trainable_head(teacher)
        self.targets: list[tuple[Tensor, Tensor]] = [
            supervised(hidden_states(teacher, model_inputs(batch)), batch["labels"])
            for batch in self.batches
        ]
        self.tokens = sum(len(labels) for _, labels in self.targets)
        if not self.tokens:
            raise DataError("the held-out calibration text has no answers; give more with --data")

    @torch.no_grad()
    def kl(self, student: CausalLM) -> float:
        """Return KL(teacher ‖ student) in nats per token."""
        nats, head = 0.0, trainable_head(student)
        for batch, (target, labels) in zip(self.batches, self.targets, strict=True):
            hidden, _ = supervised(hidden_states(student, model_inputs(batch)), batch["labels"])
            nats += float(fused_linear_divergence(hidden, head, target, self.head, labels=labels))
        return nats / self.tokens
