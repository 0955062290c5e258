"""The loss of a whole vocabulary without ever holding its logits.

N supervised tokens, V vocabulary, H hidden size (Hs the student's, Ht the teacher's), c tokens in a chunk.

A student's logits are ``hidden [N, H] @ weight.T [H, V]``. For 8 000 tokens and 128 000 words that is 4 GB in float32,
and a distillation loss written plainly holds half a dozen such tensors. Here a chunk of c tokens is projected, scored
and turned into gradients at once, in the forward pass:

    logits [c, V]  →  loss [c] and ∂loss/∂logits [c, V]  →  ∂loss/∂hidden [c, H],  ∂loss/∂weight [V, H] += …

and its logits are gone before the next chunk is begun. Nothing is projected twice: with a = 2·N·V·Hs and b = 2·N·V·Ht
FLOPs the cost is 3a + b, the least there is (2a + b under a frozen head). Backward only multiplies by the incoming
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.losses.closed_forms import CLOSED_FORMS, LossAndGradient, cross_entropy
from potstill.losses.divergences import positive_temperature

# The chunk's logits of both models in float32 and what the elementwise pass makes of them stay under this.
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Head:
    """A model's last layer, from hidden states to logits: ``cap(scale · (hidden @ weight.T + bias))``.

    ``weight [V, H]``, ``bias [V]`` or None. ``softcap`` c bends logits to c·tanh(logits / c) (Gemma 2). ``rows`` cuts
    the vocabulary to its first rows: the ones that both models' tokenizers share.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None

    def __len__(self) -> int:
        return len(self.weight) if self.rows is None else min(self.rows, len(self.weight))

    def project(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """``hidden [c, H]`` → logits ``[c, V]`` in float32 or wider; the product itself runs in ``dtype``."""
        logits = _wide(hidden.to(dtype) @ self.weight[: len(self)].detach().to(dtype).T)
        if self.bias is not None:
            logits = logits + self.bias[: len(self)].detach()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """∂logits/∂(hidden @ weight.T + bias), elementwise, at these logits."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logits / self.softcap) ** 2)


Score = Callable[[Tensor, slice], LossAndGradient]
"""From the student's logits ``[c, V]`` at some rows of the batch to their loss ``[c]`` and its gradient ``[c, V]``."""


def fused_linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    hard_label_weight: float = 0.0,
    chunk_tokens: int | None = None,
    **shape: float,
) -> Tensor:
    """The divergence from teacher to student, summed over tokens: a scalar in nats, with gradients for the student.

    ``student_hidden [N, Hs]``, ``student_head [V, Hs]``, ``teacher_hidden [N, Ht]``, ``teacher_head [Vt, Ht]``; a head
    is a weight or a `Head`. Heads of unequal rows must be cut to the rows they share (``Head.rows``). Divide the result
    once, by the number of supervised tokens of the whole optimizer step. ``labels [N]`` mix cross-entropy in, in the
    same pass: (1 − w) · divergence + w · cross-entropy with w = ``hard_label_weight``. ``shape`` is the divergence's
    own parameter (``teacher_weight`` or ``skew``). No temperature² factor. N = 0 gives a zero that still carries (zero)
    gradients.

    Raises: ValueError for an unknown divergence, heads of unequal rows, hidden states or labels of unequal N, a
    temperature that is not positive, or a ``hard_label_weight`` outside [0, 1] or without labels.
    """
    student, teacher = _as_head(student_head), _as_head(teacher_head)
    if divergence not in CLOSED_FORMS:
        raise ValueError(f"divergence = {divergence!r}: must be one of {', '.join(CLOSED_FORMS)}")
    if len(student) != len(teacher):
        raise ValueError(
            f"student head has {len(student)} rows and teacher head {len(teacher)}: cut both to the rows their "
            "tokenizers share with Head(weight, rows=potstill.alignment.shared_rows(...))"
        )
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(f"student_hidden has {len(student_hidden)} tokens and teacher_hidden {len(teacher_hidden)}")
    _check_labels(labels, student_hidden, hard_label_weight)
    temperature = positive_temperature(temperature)
    closed_form = CLOSED_FORMS[divergence]
    product_dtype = _product_dtype(teacher_hidden)

    def score(student_logits: Tensor, rows: slice) -> LossAndGradient:
        teacher_logits = teacher.project(teacher_hidden[rows].detach(), product_dtype)
        loss, gradient = closed_form(teacher_logits / temperature, student_logits / temperature, **shape)
        if temperature != 1.0:
            gradient = gradient / temperature
        if labels is None or not hard_label_weight:
            return loss, gradient
        hard_loss, hard_gradient = cross_entropy(labels[rows], student_logits)
        return torch.lerp(loss, hard_loss, hard_label_weight), torch.lerp(gradient, hard_gradient, hard_label_weight)

    return fused_linear_loss(student_hidden, student, score, chunk_tokens=chunk_tokens)


def fused_linear_cross_entropy(
    student_hidden: Tensor, student_head: Tensor | Head, labels: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """−log p(label), summed over tokens: the loss of text distillation. ``[N, H]``, ``[V, H]``, ``[N]`` → nats."""
    _check_labels(labels, student_hidden)
    return fused_linear_loss(
        student_hidden,
        _as_head(student_head),
        lambda logits, rows: cross_entropy(labels[rows], logits),
        chunk_tokens=chunk_tokens,
    )


def fused_linear_loss(hidden: Tensor, head: Head, score: Score, *, chunk_tokens: int | None = None) -> Tensor:
    """Σ over tokens of whatever ``score`` says of their logits: the one mechanism under every loss. Scalar in nats."""
    chunk = max(1, CHUNK_BYTES // (16 * max(1, len(head)))) if chunk_tokens is None else chunk_tokens
    if chunk < 1:
        raise ValueError(f"chunk_tokens = {chunk}: must be at least 1, or None to fit the chunk to memory")
    # Inside forward gradients are always off, and ctx.needs_input_grad is blind to torch.no_grad: ask here, or a
    # validation pass pays for gradients that nobody reads.
    differentiate = torch.is_grad_enabled()
    total: Tensor = _FusedLinear.apply(hidden, head.weight, head.bias, head, score, chunk, differentiate)  # type: ignore[no-untyped-call]
    return total


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        score: Score,
        chunk: int,
        differentiate: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (needed and differentiate for needed in ctx.needs_input_grad[:3])
        dtype, vocabulary = _product_dtype(hidden), len(head)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_wide_dtype(weight.dtype)) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_wide_dtype(weight.dtype)) if bias is not None and needs_bias else None
        total = hidden.new_zeros((), dtype=_wide_dtype(hidden.dtype))
        cut_weight = weight[:vocabulary].to(dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = head.project(hidden[rows], dtype)
            loss, gradient = score(logits, rows)
            total += loss.sum()
            gradient = (gradient * head.slope(logits)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = gradient @ cut_weight
            if grad_weight is not None:
                grad_weight[:vocabulary] += gradient.T @ hidden[rows].to(dtype)
            if grad_bias is not None:
                grad_bias[:vocabulary] += gradient.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable lets create_graph=True pass when grad_total is a constant, and a gradient penalty
        # would then silently count for nothing.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused loss cannot be differentiated twice (create_graph=True): its gradients are made in the "
                "forward pass; use the dense functions of potstill.losses"
            )
        # Scaled in float32, then rounded: float16 would turn a loss scale of 65 536 into infinity.
        scaled = [
            None if gradient is None else (_wide(gradient) * grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def _as_head(head: Tensor | Head) -> Head:
    return head if isinstance(head, Head) else Head(head)


def _check_labels(labels: Tensor | None, hidden: Tensor, hard_label_weight: float = 0.0) -> None:
    if not 0 <= hard_label_weight <= 1:
        raise ValueError(f"hard_label_weight = {hard_label_weight}: must lie in [0, 1]; 0 leaves cross-entropy out")
    if labels is None and hard_label_weight:
        raise ValueError(f"hard_label_weight = {hard_label_weight} needs labels [N], and labels is None")
    if labels is not None and labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be one id for each of the {len(hidden)} hidden states")


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, otherwise the hidden states' own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))
