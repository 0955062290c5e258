"""Compute a loss over the whole vocabulary without storing all logits.

N supervised tokens, V vocabulary, H hidden size (Hs the student's, Ht the teacher's), c tokens in a
chunk, b in a block.

The student's logits are ``hidden [N, H] @ weight.T [H, V]``. For 8 000 tokens and a vocabulary of
128 000 they take 4 GB in float32, and a plain distillation loss stores about six such tensors. Here
the forward pass computes loss and gradients of one chunk of c tokens at a time:

    logits [c, V] → loss [c], ∂loss/∂logits [c, V] → ∂loss/∂hidden [c, H], ∂loss/∂weight [V, H] += …

The gradient overwrites the logits, and the next chunk uses the same buffer. No product is computed
twice: with a = 2·N·V·Hs and b = 2·N·V·Ht FLOPs the cost is 3a + b, the minimum (2a + b if the head
is frozen). Backward only multiplies by the incoming gradient (fused_gradients.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

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
from potstill.losses.fused_gradients import FusedLinear, Score
from potstill.losses.kernels import kernels_for
from potstill.losses.projection import CallableHead, Head, Projection

DivergenceFunction = Callable[..., Tensor]
"""A user's function in torch: ``teacher_logits [b, V]``, ``student_logits [b, V]`` → ``[b]``."""


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
    """Return the divergence from teacher to student, summed over tokens: a scalar in nats.

    Hidden states are ``[N, Hs]`` and ``[N, Ht]``, heads ``[V, Hs]`` and ``[V, Ht]``. ``divergence``
    is a name or a function, ``divergence_parameters`` its own. There is no factor temperature².
    ``labels [N]``, the tokens of the text, make half-precision products more exact (projection.py)
    and add cross-entropy: (1 − w)·divergence + w·cross-entropy with w = ``hard_label_weight``.
    ``weights [N]`` multiply the tokens' losses. ``compiled`` uses torch.compile: it helps on a GPU
    only, and the first call takes minutes. N = 0 returns zero with zero gradients.

    Raises: ValueError for an unknown divergence, heads of unequal rows, unequal N, a temperature
    that is not positive, or a ``hard_label_weight`` outside [0, 1] or without labels.
    """
    student, teacher = as_head(student_head), as_any_head(teacher_head)
    _check_pair(student_hidden, student, teacher_hidden, teacher)
    _check_labels(labels, student_hidden, hard_label_weight)
    compare = closed_form(
        divergence,
        divergence_parameters,
        temperature=temperature,
        hard_label_weight=hard_label_weight,
        compiled=compiled,
    )
    projection = Projection(teacher_hidden, teacher, observed=labels, chunk_tokens=chunk_tokens)

    def score(logits: Tensor, positions: slice) -> LossAndGradient:
        teacher_logits = projection.logits(positions)
        if labels is None or not hard_label_weight:
            return compare(teacher_logits, logits)
        # A label beyond the shared vocabulary has no probability here: use the divergence alone.
        shared = labels[positions] < len(student)
        return compare(teacher_logits, logits, labels[positions].where(shared, -1))

    return fused_linear_loss(
        student_hidden, student, score, observed=labels, weights=weights, chunk_tokens=chunk_tokens
    )


def fused_linear_cross_entropy(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return −log p(label) summed over tokens: ``[N, H]``, ``[V, H]``, ``[N]`` → scalar in nats."""
    _check_labels(labels, student_hidden)

    def score(logits: Tensor, positions: slice) -> LossAndGradient:
        rows = kernels_for(logits)
        computing = cross_entropy if rows is None else rows.cross_entropy
        return computing(labels[positions], logits)

    head = as_head(student_head)
    return fused_linear_loss(
        student_hidden, head, score, observed=labels, weights=weights, chunk_tokens=chunk_tokens
    )


def closed_form(
    divergence: str | DivergenceFunction,
    parameters: Mapping[str, float],
    *,
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    compiled: bool = False,
) -> Callable[..., LossAndGradient]:
    """Return a function: teacher and student logits → loss and gradient, at ``temperature``.

    It may overwrite both logits. ``labels [b]`` as third argument mix in ``hard_label_weight`` of
    cross-entropy at temperature 1; a negative one has none. Unknown ``parameters`` are ignored.
    Raises: ValueError for an unknown divergence or a parameter or temperature out of range.
    """
    value_and_gradient, own_parameters = resolve_divergence(divergence, parameters)
    if compiled:
        value_and_gradient = _compiled(value_and_gradient)
    temperature = positive_temperature(temperature)
    has_kernel = isinstance(divergence, str) and not compiled

    def softened(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
        if temperature == 1.0:
            return value_and_gradient(teacher_logits, student_logits, **own_parameters)
        loss, gradient = value_and_gradient(
            teacher_logits / temperature, student_logits / temperature, **own_parameters
        )
        return loss, gradient.div_(temperature)

    def compare(
        teacher_logits: Tensor, student_logits: Tensor, labels: Tensor | None = None
    ) -> LossAndGradient:
        rows = kernels_for(teacher_logits, student_logits) if has_kernel else None
        if rows is not None:
            found: LossAndGradient = rows.divergence(
                divergence,
                teacher_logits,
                student_logits,
                parameter=next(iter(own_parameters.values()), 0.0),
                temperature=temperature,
                labels=labels,
                hard_label_weight=hard_label_weight,
            )
            return found
        if labels is None:
            return softened(teacher_logits, student_logits)
        hard = cross_entropy(labels.clamp_min(0), student_logits.clone())
        soft = softened(teacher_logits, student_logits)
        return with_hard_labels(soft, hard, hard_label_weight * (labels >= 0).to(soft[0].dtype))

    return compare


def with_hard_labels(
    soft: LossAndGradient, hard: LossAndGradient, weight: Tensor
) -> LossAndGradient:
    """Return (1 − weight)·soft + weight·hard, of both parts; ``weight [b]``."""
    gradient = torch.lerp(soft[1], hard[1], weight[:, None])
    return torch.lerp(soft[0], hard[0], weight), gradient


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
    """Return ``function`` compiled for blocks of any size, once per process."""
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
    """Return the sum over tokens of the loss that ``score`` computes from logits: a scalar in nats.

    ``score`` may overwrite its logits. ``observed [N]`` are labels that anchor half-precision
    products. ``weights [N]`` multiply the tokens' losses. Raises: ValueError if shapes do not fit.
    """
    if weights is not None and weights.shape != hidden.shape[:1]:
        raise ValueError(
            f"weights {tuple(weights.shape)} must be one number for each of the "
            f"{len(hidden)} hidden states"
        )
    # Read the grad mode here. Inside forward it is always off, and ctx.needs_input_grad ignores
    # torch.no_grad, so evaluation would compute gradients that are not used.
    differentiate = torch.is_grad_enabled()
    student = as_head(head)
    projection = Projection(
        hidden, student, observed=observed, gradients=differentiate, chunk_tokens=chunk_tokens
    )
    # The projection applies autocast to its products. The score's dot products stay unrounded.
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = FusedLinear.apply(  # type: ignore[no-untyped-call]
            hidden, student.weight, student.bias, projection, score, weights, differentiate
        )
    return total


def as_any_head(head: Tensor | Head | CallableHead) -> Head | CallableHead:
    """Return a teacher's head as `as_head` does, a `CallableHead` unchanged."""
    return head if isinstance(head, CallableHead) else as_head(head)


def as_head(head: Tensor | Head) -> Head:
    """Return a weight as a `Head`, and gather a head that FSDP2 shards.

    Backward averages its gradient over processes, as FSDP does for every other parameter.
    """
    head = head if isinstance(head, Head) else Head(head)
    bias = None if head.bias is None else _gathered(head.bias)
    return dataclasses.replace(head, weight=_gathered(head.weight), bias=bias)


def _gathered(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _check_pair(
    student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head | CallableHead
) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"student head has {len(student)} rows and teacher head {len(teacher)}: cut both to "
            "the shared rows with Head(weight, rows=potstill.alignment.shared_rows(...))"
        )
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"student_hidden has {len(student_hidden)} tokens and teacher_hidden "
            f"{len(teacher_hidden)}: give the hidden states of the same tokens"
        )


def _check_labels(labels: Tensor | None, hidden: Tensor, hard_label_weight: float = 0.0) -> None:
    if not 0 <= hard_label_weight <= 1:
        raise ValueError(f"hard_label_weight = {hard_label_weight}: must be in [0, 1]")
    if labels is None and hard_label_weight:
        raise ValueError(f"hard_label_weight = {hard_label_weight} needs labels [N]; got None")
    if labels is not None and labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be one id for each of the "
            f"{len(hidden)} hidden states"
        )
