"""Measure what quantization costs a teacher: KL(full precision ‖ quantized) on the user's text.

N supervised tokens, C conversations. The model in full precision is opened first and its hidden
states are kept, so that the two models are never in memory together:

    exact = ExactStates.collect(source, opener, rows)
    exact.compare(LocalTeacher(opener.model(source)))
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.data import IGNORED, BatchLayout
from potstill.losses import CallableHead, Head, Projection, forward_kl
from potstill.models import ModelOpener
from potstill.models.heads import on_device, output_head
from potstill.models.quantized import quantization_of
from potstill.models.size import fits_in_memory
from potstill.protocols import Batch
from potstill.teachers.base import Teacher
from potstill.teachers.captured import CapturedTeacher
from potstill.teachers.local import LocalTeacher
from potstill.teachers.served import ServedTeacher

MEASURED_TOKENS = 4096
FEWEST_CONVERSATIONS = 10
"""With fewer there is no interval."""
TOO_LARGE = "the teacher in full precision does not fit in memory"
ELSEWHERE = "measure it with potstill doctor --with-weights where the teacher is"
SAVED = "the teacher was saved without its weights in full precision"


@dataclass(frozen=True)
class QuantizationCost:
    """Sums over the supervised tokens of each conversation, ``[C]`` each."""

    nats: list[float]
    """KL from the model in full precision."""
    agreeing: list[int]
    """Tokens at which both have the same most likely next token."""
    tokens: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Return means per token, counts, and a 95 % interval over conversations.

        The interval is that of a ratio of two sums over conversations: ± 1.96 standard errors.
        """
        total, count = sum(self.tokens), len(self.tokens)
        mean = sum(self.nats) / total
        found = {
            "kl_nats_per_token": mean,
            "top1_agreement": sum(self.agreeing) / total,
            "tokens": total,
            "conversations": count,
        }
        if count < FEWEST_CONVERSATIONS:
            return found
        pairs = zip(self.nats, self.tokens, strict=True)
        residuals = math.fsum((nats - mean * tokens) ** 2 for nats, tokens in pairs)
        half = 1.96 * math.sqrt(residuals * count / (count - 1)) / total
        return {**found, "ci95": [max(0.0, mean - half), mean + half]}


@dataclass
class ExactStates:
    """Hold the hidden states of a teacher in full precision for a few conversations."""

    batches: list[Batch]
    hidden: list[Tensor]
    """``[N, H]`` for each conversation, on the CPU."""
    head: Head | CallableHead

    @classmethod
    @torch.no_grad()
    def collect(
        cls, source: str, opener: ModelOpener, rows: Iterable[dict[str, Any]]
    ) -> ExactStates | None:
        """Open ``source`` without quantization and read encoded conversations with it.

        About `MEASURED_TOKENS` supervised tokens are read. Returns None if the model is too large
        for the device's memory, so that nothing was measured.
        """
        exact = dataclasses.replace(opener, quantize=None)
        if not fits_in_memory(source, exact):
            return None
        teacher = LocalTeacher(exact.model(source))
        layout = BatchLayout(0, packed=False)
        batches = [
            on_device(layout([{name: row[name] for name in ("input_ids", "labels")}]), "cpu")
            for row in _first_tokens(rows)
        ]
        device = teacher.model.device
        hidden = [teacher.targets(on_device(one, device)).hidden.cpu() for one in batches]
        head = output_head(teacher.model)
        del teacher
        _free_memory()
        return cls(batches, hidden, head)

    @torch.no_grad()
    def compare(self, quantized: LocalTeacher) -> QuantizationCost:
        """Return what the quantized teacher's distributions are away from the exact ones."""
        nats, agreeing = [], []
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            batch = on_device(batch, quantized.model.device)
            target = quantized.targets(batch)
            labels = batch["labels"][:, 1:]
            labels = labels[labels != IGNORED]
            exact = Projection(hidden.to(labels.device), self.head, observed=labels)
            other = Projection(target.hidden, target.head, observed=labels)
            kl, same = 0.0, 0
            for positions, logits in exact.blocks():
                own = other.logits(positions)
                kl += float(forward_kl(logits, own).double().sum())
                same += int((logits.argmax(-1) == own.argmax(-1)).sum())
            nats.append(kl)
            agreeing.append(same)
        return QuantizationCost(nats, agreeing, [len(one) for one in self.hidden])


def measured_cost(exact: ExactStates | None, quantized: LocalTeacher) -> dict[str, Any]:
    """Return the cost as a dictionary, or under ``not_measured`` why there is none."""
    if exact is None:
        return {"not_measured": TOO_LARGE}
    return exact.compare(quantized).as_dict()


def known_quantization(teacher: Teacher) -> dict[str, Any] | None:
    """Return how a teacher's weights are quantized, and what is known of the cost; None if not."""
    found, cost = None, {"not_measured": SAVED}
    if isinstance(teacher, CapturedTeacher):
        found = teacher.manifest.get("quantization")
        cost = teacher.manifest.get("quantization_cost", cost)
    elif isinstance(teacher, ServedTeacher):
        found, cost = teacher.facts.get("quantization"), {"not_measured": ELSEWHERE}
    elif teacher.model is not None:
        found = quantization_of(teacher.model)
    return None if found is None else {"quantization": found, **cost}


def cost_text(cost: dict[str, Any]) -> str:
    """Return one line for a terminal."""
    if "not_measured" in cost:
        return f"its cost was not measured: {cost['not_measured']}"
    between = ""
    if "ci95" in cost:
        low, high = cost["ci95"]
        between = f" ({low:.2g} to {high:.2g})"
    return (
        f"{cost['kl_nats_per_token']:.2g} nats{between} per token from full precision, the same "
        f"most likely token at {cost['top1_agreement']:.1%} of {cost['tokens']} tokens"
    )


def _first_tokens(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows with supervised tokens until there are `MEASURED_TOKENS` of them."""
    total = 0
    for row in rows:
        if total >= MEASURED_TOKENS:
            return
        count = sum(label != IGNORED for label in itertools.islice(row["labels"], 1, None))
        total += count
        if count:
            yield row


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
