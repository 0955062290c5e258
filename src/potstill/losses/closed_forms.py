"""The value and the gradient of each loss in closed form, from one block of logits.

b tokens, V vocabulary. q is the teacher's distribution, p the student's, t and s their logits. Each function takes
logits ``[b, V]`` in float32 or wider, **which it may write over**, and returns the loss ``[b]`` in nats and its gradient
with respect to s, ``[b, V]``.

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

from potstill.losses.divergences import inside_unit_interval

LossAndGradient = tuple[Tensor, Tensor]
ClosedForm = Callable[..., LossAndGradient]

LOWEST = -1e30
"""Stands for a logit of −inf: its softmax is 0 just the same, and 0 · −1e30 is 0 where 0 · −inf is NaN."""


def cross_entropy(labels: Tensor, student_logits: Tensor) -> LossAndGradient:
    """−log p(label), and p − onehot(label). ``labels [b]``, ``student_logits [b, V]``."""
    p, log_normalizer = _softmax(student_logits)
    loss = log_normalizer - student_logits.gather(-1, labels[:, None]).squeeze(-1)
    return loss, p.scatter_add_(-1, labels[:, None], p.new_full((len(labels), 1), -1.0))


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """KL(q‖p), and p − q."""
    difference, q, p, log_normalizers = _compared(teacher_logits, student_logits)
    loss = _dot(q, difference) - log_normalizers
    return _infinite(loss), p.sub_(q)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """KL(p‖q), and p ⊙ (log p − log q − KL(p‖q)), in which the normalizers cancel."""
    difference, _, p, log_normalizers = _compared(teacher_logits, student_logits)
    expected = _dot(p, difference)
    return _infinite(log_normalizers - expected), difference.neg_().add_(expected[:, None]).mul_(p)


def jensen_shannon(teacher_logits: Tensor, student_logits: Tensor, *, teacher_weight: float = 0.5) -> LossAndGradient:
    """w·KL(q‖m) + (1−w)·KL(p‖m) with m = w·q + (1−w)·p, and (1−w)·p ⊙ (log p − log m − KL(p‖m))."""
    w = inside_unit_interval("teacher_weight", teacher_weight)
    log_q, log_p, q, p = _log_probabilities(teacher_logits, student_logits)
    log_m = _log(torch.lerp(p, q, w))
    log_ratio = log_p.sub_(log_m)
    student_part = _dot(p, log_ratio)
    loss = w * _dot(q, log_q.sub_(log_m)) + (1 - w) * student_part
    return loss, log_ratio.sub_(student_part[:, None]).mul_(p).mul_(1 - w)


def skew_forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1) -> LossAndGradient:
    """KL(q‖m) with m = a·q + (1−a)·p, whose p·∂/∂p is −(1−a)·p·q/m."""
    a = inside_unit_interval("skew", skew)
    log_q, _, q, p = _log_probabilities(teacher_logits, student_logits)
    m = torch.lerp(p, q, a)
    loss = _dot(q, log_q.sub_(_log(m)))
    # q/m ≤ 1/a wherever m > 0; where m is 0, so is p.
    u = q.div_(m.clamp_min_(torch.finfo(m.dtype).tiny)).mul_(p).mul_(-(1 - a))
    return loss, _through_softmax(p, u)


def skew_reverse_kl(teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1) -> LossAndGradient:
    """KL(p‖m) with m = (1−a)·q + a·p, whose p·∂/∂p is p·(log p − log m + 1 − a·p/m)."""
    a = inside_unit_interval("skew", skew)
    _, log_p, q, p = _log_probabilities(teacher_logits, student_logits)
    m = q.lerp_(p, a)
    log_ratio = log_p.sub_(_log(m))
    loss = _dot(p, log_ratio)
    share = torch.div(p, m.clamp_min_(torch.finfo(m.dtype).tiny))
    return loss, _through_softmax(p, log_ratio.sub_(share, alpha=a).mul_(p))


def total_variation(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """½ Σ |q − p|, whose ∂/∂p is ½·sign(p − q), taken as 0 where they tie."""
    p = student_logits.softmax(-1)
    difference = p - teacher_logits.softmax(-1)
    return 0.5 * difference.abs().sum(-1), _through_softmax(p, 0.5 * p * difference.sign())


CLOSED_FORMS: dict[str, ClosedForm] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


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


def _compared(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t − s, q, p, and log Σeᵗ − log Σeˢ."""
    teacher_logits.clamp_(min=LOWEST)
    student_logits.clamp_(min=LOWEST)
    q, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    return teacher_logits.sub_(student_logits), q, p, teacher_normalizer - student_normalizer


def _log_probabilities(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log q, log p, q, p; a logarithm is finite even where its probability is 0."""
    teacher_logits.clamp_(min=LOWEST)
    student_logits.clamp_(min=LOWEST)
    q, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    return teacher_logits.sub_(teacher_normalizer[:, None]), student_logits.sub_(student_normalizer[:, None]), q, p


def _log(probabilities: Tensor) -> Tensor:
    """Their logarithms, with something finite where one is 0 (it is then multiplied by 0)."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _infinite(loss: Tensor) -> Tensor:
    """What met a logit of −inf where there was mass is infinite."""
    return loss.masked_fill(loss > -LOWEST * 1e-20, math.inf)


def _through_softmax(p: Tensor, u: Tensor) -> Tensor:
    return u - p * u.sum(-1, keepdim=True)
