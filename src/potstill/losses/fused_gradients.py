"""Differentiate a fused loss: compute its gradients in the forward pass, scale them in backward.

N tokens, V vocabulary, H hidden size, c tokens in a chunk, b in a block (see fused.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from potstill.losses.closed_forms import LossAndGradient
from potstill.losses.projection import Projection, block_rows, wide_dtype

Score = Callable[[Tensor, slice], LossAndGradient]
"""Map logits ``[b, V]`` and their positions to the loss ``[b]`` and its gradient ``[b, V]``."""


class FusedLinear(torch.autograd.Function):
    """Sum the loss over tokens and keep its gradients for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        score: Score,
        weights: Tensor | None,
        differentiate: bool,
    ) -> Tensor:
        needs = [needed and differentiate for needed in ctx.needs_input_grad[:3]]
        gradients = _Gradients(projection, hidden, bias, needs)
        total = hidden.new_zeros((), dtype=wide_dtype(hidden.dtype))
        for positions, logits in projection.blocks():
            derivative = projection.head.logit_derivative(logits)
            loss, gradient = score(logits, positions)
            if weights is not None:
                loss, gradient = loss * weights[positions], gradient * weights[positions, None]
            total += loss.sum()
            if any(needs):
                gradient = gradient if derivative is None else gradient * derivative
                product = projection.product(positions)
                if product.data_ptr() != gradient.data_ptr():  # a kernel may have written it there
                    product.copy_(gradient)
                if positions.stop == projection.stop:
                    gradients.add_chunk()
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        inputs = (hidden, weight, bias)
        ctx.shapes = [None if one is None else (one.shape, one.dtype) for one in inputs]
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable accepts create_graph=True if grad_total is a constant. A
        # gradient penalty would then have no effect, without an error.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused loss cannot be differentiated twice (create_graph=True): its gradients "
                "are computed in the forward pass; use the dense functions of potstill.losses"
            )
        kept = _graph_is_kept()
        scaled = [
            None if gradient is None else _scaled(gradient, grad_total, *shape, kept=kept)
            for gradient, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True)
        ]
        return *scaled, None, None, None, None


class _Gradients:
    """Sum over chunks ∂/∂hidden ``[N, H]``, ∂/∂weight ``[V, H]`` and ∂/∂bias ``[V]``.

    Each is in float32 or wider, except the weight's if there is one chunk: it is rounded only once.
    """

    def __init__(
        self, projection: Projection, hidden: Tensor, bias: Tensor | None, needs: list[bool]
    ) -> None:
        self.projection, self.needs_weight = projection, needs[1]
        wide, vocabulary_rows = wide_dtype(hidden.dtype), len(projection.head)
        self.hidden = torch.zeros_like(hidden, dtype=wide) if needs[0] else None
        needs_bias = bias is not None and needs[2]
        self.bias = hidden.new_zeros(vocabulary_rows, dtype=wide) if needs_bias else None
        one_chunk = 0 < len(hidden) <= projection.chunk
        self.weight = None
        if needs[1] and not one_chunk:
            self.weight = torch.zeros_like(projection.weight, dtype=wide_dtype(projection.dtype))

    def add_chunk(self) -> None:
        """Add the gradients of one chunk, whose ∂loss/∂logits ``[c, V]`` is in the buffer."""
        projection = self.projection
        positions = slice(projection.start, projection.stop)
        gradient, inputs = projection.product(positions), projection.hidden[positions]
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        gradient = gradient.to(projection.dtype)
        if self.hidden is not None:
            self.hidden[positions] = gradient @ projection.weight
        if self.needs_weight:
            self._add_to_weight(gradient.T, inputs)

    def _add_to_weight(self, gradient: Tensor, inputs: Tensor) -> None:
        """Compute ``weight += gradient [V, c] @ inputs [c, H]``."""
        if self.weight is None:
            self.weight = gradient @ inputs
        elif self.weight.dtype == inputs.dtype:
            torch.addmm(self.weight, gradient, inputs, out=self.weight)
        else:  # the product is in half precision, the sum over chunks in float32
            for block, gradient_rows in _row_blocks(self.weight, gradient):
                block += gradient_rows @ inputs


def _graph_is_kept() -> bool:
    """Return True if backward may run again (``retain_graph=True``)."""
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if is_kept is None else bool(is_kept())


def _scaled(
    gradient: Tensor, factor: Tensor, shape: torch.Size, dtype: torch.dtype, *, kept: bool
) -> Tensor:
    """Return ``gradient · factor`` in ``shape``; the rows that the head was cut by are 0.

    Overwrite the gradient if shape and dtype match and backward cannot run again. Round to
    ``dtype`` last: in float16 a loss scale of 65 536 is infinite.
    """
    fits = gradient.shape == shape and gradient.dtype == dtype
    scaled = gradient if fits and not kept else gradient.new_empty(shape, dtype=dtype)
    scaled[len(gradient) :] = 0
    for block, source in _row_blocks(scaled[: len(gradient)], gradient):
        block.copy_(source.to(wide_dtype(source.dtype)) * factor)
    return scaled


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of the same rows of every tensor, so small that they stay in the cache."""
    width = max(1, tensors[0].numel() // max(1, len(tensors[0])))
    size = block_rows(tensors[0].device.type, width)
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)
