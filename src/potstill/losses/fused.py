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

# One float32 tensor of a chunk's logits, and there are a handful at a time. On a CPU a chunk must stay below 32 MiB: from there
# on glibc maps fresh pages for every tensor, and touching them first costs more than the arithmetic (log-softmax of 128 × 49 152:
# 2.3 ms; of 256 × 49 152: 17.5 ms). A GPU wants wide products, and its allocator keeps what it has.
CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}


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
        return self.bend(hidden.to(dtype) @ self.cut_weight(dtype).T)

    def cut_weight(self, dtype: torch.dtype) -> Tensor:
        """The rows in use, ``[V, H]``, in ``dtype``, without gradients."""
        return self.weight[: len(self)].detach().to(dtype)

    def bend(self, product: Tensor) -> Tensor:
        """``hidden @ weight.T`` → logits, in float32 or wider."""
        logits = _wide(product)
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
    teacher_weight = teacher.cut_weight(product_dtype)

    def score(student_logits: Tensor, rows: slice) -> LossAndGradient:
        teacher_logits = teacher.bend(teacher_hidden[rows].detach().to(product_dtype) @ teacher_weight.T)
        if temperature == 1.0:
            loss, gradient = closed_form(teacher_logits, student_logits, **shape)
        else:
            loss, gradient = closed_form(teacher_logits / temperature, student_logits / temperature, **shape)
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
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    chunk = max(1, budget // (4 * max(1, len(head)))) if chunk_tokens is None else chunk_tokens
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
        cut_weight = head.cut_weight(dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = head.bend(hidden[rows].to(dtype) @ cut_weight.T)
            loss, gradient = score(logits, rows)
            total += loss.sum()
            if head.scale != 1.0 or head.softcap is not None:
                gradient = gradient * head.slope(logits)
            if grad_hidden is not None:
                grad_hidden[rows] = gradient.to(dtype) @ cut_weight
            if grad_weight is not None:
                _add_outer_product(grad_weight[:vocabulary], gradient, hidden[rows], dtype)
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


def _add_outer_product(total: Tensor, gradient: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """``total [V, H] += gradient.T [V, c] @ hidden [c, H]``, summed in float32 over all chunks.

    On a CPU one float32 product that adds in place costs no more than a bfloat16 one and the addition after it.
    """
    if total.device.type == "cpu":
        torch.addmm(total, gradient.T.to(total.dtype), hidden.to(total.dtype), out=total)
    else:
        total += gradient.T.to(dtype) @ hidden.to(dtype)


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
