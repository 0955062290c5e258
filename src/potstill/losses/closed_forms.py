"""The value and the gradient of each loss in closed form, from one block of logits.

b tokens, V vocabulary. q is the teacher's distribution, p the student's, t and s their logits. Each function takes
logits ``[b, V]`` in float32 or wider, **which it may write over**, and returns the loss ``[b]`` in nats and its gradient
with respect to s, ``[b, V]``. Logits are finite: a token that cannot be has `LOWEST`, not −inf (`finite`).

For every divergence D the chain rule through the softmax reads ∂D/∂s = u − p·Σu with u = p ⊙ ∂D/∂p, and in forward KL
it shrinks to p − q. What autograd would keep of the way there (six tensors of b × V) is never made. Logarithms of
probabilities are not made either where their expectation will do: log q = t − log Σeᵗ, so
KL(q‖p) = Σ q (t − s) − log Σeᵗ + log Σeˢ, one softmax a model and one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LossAndGradient = tuple[Tensor, Tensor]
ClosedForm = Callable[..., LossAndGradient]

LOWEST = -1e30
"""Stands for a logit of −inf: its softmax is 0 just the same, and 0 · −1e30 is 0 where 0 · −inf is NaN."""


def finite(logits: Tensor) -> Tensor:
    """The same logits, `LOWEST` where they are −inf, written over."""
    return logits.clamp_(min=LOWEST)


def cross_entropy(labels: Tensor, student_logits: Tensor) -> LossAndGradient:
    """−log p(label), and p − onehot(label). ``labels [b]``, ``student_logits [b, V]``."""
    p, log_normalizer = _softmax(student_logits)
    loss = log_normalizer - student_logits.gather(-1, labels[:, None]).squeeze(-1)
    return loss, p.scatter_add_(-1, labels[:, None], p.new_full((len(labels), 1), -1.0))


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """KL(q‖p), and p − q."""
    q, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    expected = _dot(q, teacher_logits.sub_(student_logits))
    return _infinite(expected - teacher_normalizer + student_normalizer), p.sub_(q)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """KL(p‖q), and p ⊙ (log p − log q − KL(p‖q)), in which the normalizers cancel."""
    _, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    difference = student_logits.sub_(teacher_logits)
    expected = _dot(p, difference)
    return _infinite(expected - student_normalizer + teacher_normalizer), difference.sub_(expected[:, None]).mul_(p)


def jensen_shannon(teacher_logits: Tensor, student_logits: Tensor, *, teacher_weight: float = 0.5) -> LossAndGradient:
    """w·KL(q‖m) + (1−w)·KL(p‖m) with m = w·q + (1−w)·p, and (1−w)·p ⊙ (log p − log m − KL(p‖m))."""
    w = inside_unit_interval("teacher_weight", teacher_weight)
    q, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    log_m = _mixture(p, q, w).log_()
    teacher_part = _dot(q, teacher_logits.sub_(log_m)) - teacher_normalizer
    log_ratio = student_logits.sub_(log_m)  # but for the normalizer, which the gradient does not see
    expected = _dot(p, log_ratio)
    loss = w * teacher_part + (1 - w) * (expected - student_normalizer)
    return loss, log_ratio.sub_(expected[:, None]).mul_(p).mul_(1 - w)


def skew_forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1) -> LossAndGradient:
    """KL(q‖m) with m = a·q + (1−a)·p, whose p·∂/∂p is −(1−a)·p·q/m."""
    a = inside_unit_interval("skew", skew)
    log_q, _, q, p = _log_probabilities(teacher_logits, student_logits)
    m = _mixture(p, q, a)
    loss = _dot(q, log_q.sub_(m.log()))
    u = q.div_(m).mul_(p).mul_(-(1 - a))  # q/m ≤ 1/a
    return loss, _through_softmax(p, u)


def skew_reverse_kl(teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1) -> LossAndGradient:
    """KL(p‖m) with m = (1−a)·q + a·p, whose p·∂/∂p is p·(log p − log m + 1 − a·p/m)."""
    a = inside_unit_interval("skew", skew)
    _, log_p, q, p = _log_probabilities(teacher_logits, student_logits)
    m = _mixture(q, p, a)
    log_ratio = log_p.sub_(m.log())
    loss = _dot(p, log_ratio)
    share = torch.div(p, m)
    return loss, _through_softmax(p, log_ratio.sub_(share, alpha=a).mul_(p))


def total_variation(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """½ Σ |q − p|, whose ∂/∂p is ½·sign(p − q), taken as 0 where they tie."""
    p = student_logits.softmax(-1)
    difference = p - teacher_logits.softmax(-1)
    return 0.5 * difference.abs().sum(-1), _through_softmax(p, 0.5 * p * difference.sign())


def inside_unit_interval(name: str, value: float) -> float:
    """``value`` if it lies in the open interval (0, 1). Raises: ValueError that names it, otherwise."""
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value}: must lie between 0 and 1, ends excluded; 0.5 and 0.1 are usual")
    return value


def positive_temperature(value: float) -> float:
    """``value`` if it is positive. Raises: ValueError otherwise."""
    if not value > 0:
        raise ValueError(f"temperature = {value}: must be positive; 1.0 compares the distributions as they are")
    return value


def by_autograd(divergence: Callable[..., Tensor]) -> ClosedForm:
    """A divergence of one's own, ``(teacher_logits, student_logits)`` → ``[b]`` in torch, as if it had a closed form."""

    def value_and_gradient(teacher_logits: Tensor, student_logits: Tensor, **shape: float) -> LossAndGradient:
        with torch.enable_grad():
            student_logits = student_logits.detach().requires_grad_()
            loss = divergence(teacher_logits.detach(), student_logits, **shape)
            (gradient,) = torch.autograd.grad(loss.sum(), student_logits)
        return loss.detach(), gradient

    return value_and_gradient


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[b, V]``, and log Σe^logits ``[b]`` for next to nothing: at the largest, log p = logit − log Σe^logits."""
    probabilities = logits.softmax(-1)
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()


def _log_probabilities(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log q, log p, q, p; a logarithm is finite even where its probability is 0."""
    q, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    return teacher_logits.sub_(teacher_normalizer[:, None]), student_logits.sub_(student_normalizer[:, None]), q, p


def _mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """(1 − weight)·a + weight·b, and the least there is where that is 0: its logarithm is finite, and will be multiplied by 0."""
    mixture = torch.lerp(a, b, weight)
    return mixture.clamp_min_(torch.finfo(mixture.dtype).tiny)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _infinite(loss: Tensor) -> Tensor:
    """What met a logit of −inf where there was mass is infinite."""
    return loss.masked_fill(loss > -LOWEST * 1e-20, math.inf)


def _through_softmax(p: Tensor, u: Tensor) -> Tensor:
    return u - p * u.sum(-1, keepdim=True)
