"""The loss of a whole vocabulary without ever holding its logits.

N supervised tokens, V vocabulary, H hidden size (Hs the student's, Ht the teacher's), c tokens in a chunk, b in a block.

A student's logits are ``hidden [N, H] @ weight.T [H, V]``. For 8 000 tokens and 128 000 words that is 4 GB in float32,
and a distillation loss written plainly holds half a dozen such tensors. Here a chunk of c tokens is projected, scored
block by block, and turned into gradients at once, in the forward pass:

    logits [c, V]  →  loss [c] and ∂loss/∂logits [c, V]  →  ∂loss/∂hidden [c, H],  ∂loss/∂weight [V, H] += …

The gradient is written where the logits stood, and the next chunk takes the same room. Nothing is projected twice: with
a = 2·N·V·Hs and b = 2·N·V·Ht FLOPs the cost is 3a + b, the least there is (2a + b under a frozen head). Backward only
multiplies by the incoming gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.losses.closed_forms import (
    ClosedForm,
    LossAndGradient,
    by_autograd,
    cross_entropy,
    positive_temperature,
)
from potstill.losses.divergences import DIVERGENCES, Divergence
from potstill.losses.projection import CallableHead, Head, Projection, block_rows, wide_dtype

Score = Callable[[Tensor, slice], LossAndGradient]
"""From the student's logits ``[b, V]`` at some rows of the batch to their loss ``[b]`` and its gradient ``[b, V]``."""

DivergenceFunction = Callable[..., Tensor]
"""A user's own: ``teacher_logits [b, V]`` and ``student_logits [b, V]`` to ``[b]``, in differentiable torch."""


def fused_linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head | CallableHead,
    *,
    divergence: str | DivergenceFunction = "forward_kl",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    hard_label_weight: float = 0.0,
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    compiled: bool = False,
    **divergence_parameters: float,
) -> Tensor:
    """The divergence from teacher to student, summed over tokens: a scalar in nats, with gradients for the student.

    ``student_hidden [N, Hs]``, ``student_head [V, Hs]``, ``teacher_hidden [N, Ht]``, ``teacher_head [Vt, Ht]``; a head
    is a weight or a `Head`. Heads of unequal rows must be cut to the rows they share (``Head.rows``). Divide the result
    once, by the number of supervised tokens of the whole optimizer step.

    ``divergence`` is a name, or a function of your own, differentiated by autograd. ``divergence_parameters`` are the named one's own
    parameters (``teacher_weight`` or ``skew``). No temperature² factor. ``labels [N]``, the tokens that the text has,
    make half-precision products twenty times more exact (see projection.py: give them where you have them), and mix
    cross-entropy in: (1 − w) · divergence + w · cross-entropy with w = ``hard_label_weight``. ``weights [N]`` multiply
    tokens. ``compiled`` fuses what lies between the products by torch.compile: minutes at the first call, and worth them on
    a GPU alone (on a CPU the blocks do as well). N = 0 gives a zero that still carries (zero) gradients.

    Raises: ValueError for an unknown divergence, heads of unequal rows, hidden states or labels of unequal N, a
    temperature that is not positive, or a ``hard_label_weight`` outside [0, 1] or without labels.
    """
    student, teacher = as_head(student_head), as_any_head(teacher_head)
    _check_pair(student_hidden, student, teacher_hidden, teacher)
    _check_labels(labels, student_hidden, hard_label_weight)
    compare = closed_form(divergence, divergence_parameters, temperature=temperature, compiled=compiled)
    source = Projection(teacher_hidden, teacher, observed=labels, chunk_tokens=chunk_tokens)

    def score(student_logits: Tensor, rows: slice) -> LossAndGradient:
        if labels is None or not hard_label_weight:
            return compare(source.logits(rows), student_logits)
        shared = labels[rows] < len(student)  # a token that only one of the two has is no word of the distributions compared
        hard_loss, hard_gradient = cross_entropy(labels[rows].where(shared, 0), student_logits.clone())
        loss, gradient = compare(source.logits(rows), student_logits)
        share = hard_label_weight * shared.to(loss.dtype)
        return torch.lerp(loss, hard_loss, share), torch.lerp(gradient, hard_gradient, share[:, None])

    return fused_linear_loss(student_hidden, student, score, observed=labels, weights=weights, chunk_tokens=chunk_tokens)


def fused_linear_cross_entropy(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """−log p(label), summed over tokens: the loss of text distillation. ``[N, H]``, ``[V, H]``, ``[N]`` → nats."""
    _check_labels(labels, student_hidden)

    def score(logits: Tensor, rows: slice) -> LossAndGradient:
        return cross_entropy(labels[rows], logits)

    head = as_head(student_head)
    return fused_linear_loss(student_hidden, head, score, observed=labels, weights=weights, chunk_tokens=chunk_tokens)


def closed_form(
    divergence: str | DivergenceFunction,
    parameters: Mapping[str, float],
    *,
    temperature: float = 1.0,
    compiled: bool = False,
) -> Callable[[Tensor, Tensor], LossAndGradient]:
    """Return ``(teacher_logits, student_logits)`` → loss and gradient at a temperature.

    The returned function may overwrite both logits. ``parameters`` may name those of other
    divergences, too: they are not used. Raises: ValueError for an unknown divergence or a parameter
    or temperature out of range.
    """
    value_and_gradient, own = resolve_divergence(divergence, parameters)
    if compiled:
        value_and_gradient = _compiled(value_and_gradient)
    temperature = positive_temperature(temperature)

    def compare(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
        if temperature == 1.0:
            return value_and_gradient(teacher_logits, student_logits, **own)
        loss, gradient = value_and_gradient(
            teacher_logits / temperature, student_logits / temperature, **own
        )
        return loss, gradient.div_(temperature)

    return compare


def resolve_divergence(
    divergence: str | DivergenceFunction, parameters: Mapping[str, float]
) -> tuple[ClosedForm, dict[str, float]]:
    """Return a divergence's value and gradient, and its own checked parameters.

    Raises: ValueError for an unknown name or a parameter out of range.
    """
    if isinstance(divergence, str):
        if divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence = {divergence!r}: must be one of {', '.join(DIVERGENCES)}, "
                "or a function of your own"
            )
        divergence = DIVERGENCES[divergence]
    if isinstance(divergence, Divergence):
        return divergence.value_and_gradient(), divergence.parameters_from(parameters)
    return by_autograd(divergence), dict(parameters)


@functools.cache
def _compiled(function: ClosedForm) -> ClosedForm:
    """One function for all of a process, for blocks of any size."""
    return torch.compile(function, dynamic=True)


def fused_linear_loss(
    hidden: Tensor,
    head: Head,
    score: Score,
    *,
    observed: Tensor | None = None,
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Σ over tokens of whatever ``score`` says of their logits: the one mechanism under every loss. Scalar in nats.

    ``score`` may write over the logits it is given. ``observed [N]`` anchors half-precision products.
    """
    if weights is not None and weights.shape != hidden.shape[:1]:
        raise ValueError(f"weights {tuple(weights.shape)} must be one number for each of the {len(hidden)} hidden states")
    # Inside forward gradients are always off, and ctx.needs_input_grad is blind to torch.no_grad: ask here, or a
    # validation pass pays for gradients that nobody reads.
    differentiate = torch.is_grad_enabled()
    projection = Projection(hidden, as_head(head), observed=observed, gradients=differentiate, chunk_tokens=chunk_tokens)
    head = projection.head
    # What autocast asks of the products, the projection has noted. Left on, it would round the scores' dot products as well.
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _FusedLinear.apply(hidden, head.weight, head.bias, projection, score, weights, differentiate)  # type: ignore[no-untyped-call]
    return total


class _FusedLinear(torch.autograd.Function):
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
        for rows, logits in projection.blocks():
            derivative = projection.head.logit_derivative(logits)
            loss, gradient = score(logits, rows)
            if weights is not None:
                loss, gradient = loss * weights[rows], gradient * weights[rows, None]
            total += loss.sum()
            if any(needs):
                projection.product(rows).copy_(gradient if derivative is None else gradient * derivative)
                if rows.stop == projection.stop:
                    gradients.add_chunk()
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.shapes = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in (hidden, weight, bias)]
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
        kept = _graph_is_kept()
        scaled = [
            None if gradient is None else _scaled(gradient, grad_total, *shape, kept=kept)
            for gradient, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True)
        ]
        return *scaled, None, None, None, None


class _Gradients:
    """What the chunks add up to: ∂/∂hidden ``[N, H]``, ∂/∂weight ``[V, H]`` and ∂/∂bias ``[V]`` at the rows in use.

    Each in float32 or wider, but the weight's where all tokens are one chunk: then half precision loses nothing more.
    """

    def __init__(self, projection: Projection, hidden: Tensor, bias: Tensor | None, needs: list[bool]) -> None:
        self.projection, self.needs_weight = projection, needs[1]
        wide, rows = wide_dtype(hidden.dtype), len(projection.head)
        self.hidden = torch.zeros_like(hidden, dtype=wide) if needs[0] else None
        self.bias = hidden.new_zeros(rows, dtype=wide) if bias is not None and needs[2] else None
        one_chunk = 0 < len(hidden) <= projection.chunk
        self.weight = None
        if needs[1] and not one_chunk:
            self.weight = torch.zeros_like(projection.weight, dtype=wide_dtype(projection.dtype))

    def add_chunk(self) -> None:
        """∂loss/∂logits ``[c, V]`` stands in the projection's room; what follows from it is added up."""
        projection = self.projection
        rows = slice(projection.start, projection.stop)
        gradient, inputs = projection.product(rows), projection.hidden[rows]
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        gradient = gradient.to(projection.dtype)
        if self.hidden is not None:
            self.hidden[rows] = gradient @ projection.weight
        if self.needs_weight:
            self._add_to_weight(gradient.T, inputs)

    def _add_to_weight(self, gradient: Tensor, inputs: Tensor) -> None:
        """``weight += gradient [V, c] @ inputs [c, H]``."""
        if self.weight is None:
            self.weight = gradient @ inputs
        elif self.weight.dtype == inputs.dtype:
            torch.addmm(self.weight, gradient, inputs, out=self.weight)
        else:  # summed over a chunk in half precision's own accumulators, over chunks in float32
            for part, words in _pieces(self.weight, gradient):
                part += words @ inputs


def _graph_is_kept() -> bool:
    """Whether this backward may be asked for again (``retain_graph=True``)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _scaled(gradient: Tensor, factor: Tensor, shape: torch.Size, dtype: torch.dtype, *, kept: bool) -> Tensor:
    """``gradient · factor`` in a tensor of ``shape``, whose rows beyond the gradient's (the cut vocabulary's) get 0.

    Where nobody will ask again and it fits, in the gradient's own. Rounded to ``dtype`` last: float16 would turn a loss scale of
    65 536 into infinity.
    """
    fits = gradient.shape == shape and gradient.dtype == dtype
    scaled = gradient if fits and not kept else gradient.new_empty(shape, dtype=dtype)
    scaled[len(gradient) :] = 0
    for part, source in _pieces(scaled[: len(gradient)], gradient):
        part.copy_(source.to(wide_dtype(source.dtype)) * factor)
    return scaled


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each tensor, then the next: what arithmetic makes on the way then stays in the cache."""
    width = max(1, tensors[0].numel() // max(1, len(tensors[0])))
    rows = block_rows(tensors[0].device.type, width)
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def as_any_head(head: Tensor | Head | CallableHead) -> Head | CallableHead:
    """Return `as_head`, or a `CallableHead` as it is: for the teacher."""
    return head if isinstance(head, CallableHead) else as_head(head)


def as_head(head: Tensor | Head) -> Head:
    """A weight alone as a `Head`; one that FSDP2 keeps in shards, gathered.

    Its gradient goes back the way it came, averaged over processes, as FSDP averages every other.
    """
    head = head if isinstance(head, Head) else Head(head)
    return dataclasses.replace(head, weight=_gathered(head.weight), bias=None if head.bias is None else _gathered(head.bias))


def _gathered(tensor: Any) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor  # type: ignore[no-any-return]
    from torch.distributed.tensor import Partial

    whole: Tensor = tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
    return whole


def _check_pair(student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head | CallableHead) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"student head has {len(student)} rows and teacher head {len(teacher)}: cut both to the rows their "
            "tokenizers share with Head(weight, rows=potstill.alignment.shared_rows(...))"
        )
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(f"student_hidden has {len(student_hidden)} tokens and teacher_hidden {len(teacher_hidden)}")


def _check_labels(labels: Tensor | None, hidden: Tensor, hard_label_weight: float = 0.0) -> None:
    if not 0 <= hard_label_weight <= 1:
        raise ValueError(f"hard_label_weight = {hard_label_weight}: must lie in [0, 1]; 0 leaves cross-entropy out")
    if labels is None and hard_label_weight:
        raise ValueError(f"hard_label_weight = {hard_label_weight} needs labels [N], and labels is None")
    if labels is not None and labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be one id for each of the {len(hidden)} hidden states")
