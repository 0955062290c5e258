"""The value and the gradient of each loss in closed form, from one chunk of logits.

c tokens, V vocabulary. q is the teacher's distribution, p the student's, z the student's logits. Each function takes
logits ``[c, V]`` in float32 or wider and returns the loss ``[c]`` in nats and its gradient with respect to z,
``[c, V]``.

For every divergence D the chain rule through the softmax reads ∂D/∂z = u − p·Σu with u = p ⊙ ∂D/∂p, and in forward KL
it shrinks to p − q. What autograd would keep of the way there (six tensors of c × V) is never made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from potstill.losses.divergences import inside_unit_interval, mix_log_probabilities

LossAndGradient = tuple[Tensor, Tensor]


def cross_entropy(labels: Tensor, student_logits: Tensor) -> LossAndGradient:
    """−log p(label), and p − onehot(label). ``labels [c]``, ``student_logits [c, V]``."""
    log_normalizer = student_logits.logsumexp(-1, keepdim=True)
    loss = log_normalizer.squeeze(-1) - student_logits.gather(-1, labels[:, None]).squeeze(-1)
    gradient = torch.exp(student_logits - log_normalizer)
    return loss, gradient.scatter_add_(-1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """KL(q‖p), and p − q."""
    log_q, log_p = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    q = log_q.exp()
    loss = _expectation(q, log_q, log_p)
    return loss, log_p.exp_().sub_(q)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """KL(p‖q), and p ⊙ (log p − log q − KL(p‖q))."""
    log_q, log_p = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    p = log_p.exp()
    loss = _expectation(p, log_p, log_q)
    return loss, p * torch.where(p == 0, 0.0, log_p - log_q - loss[:, None])


def jensen_shannon(teacher_logits: Tensor, student_logits: Tensor, *, teacher_weight: float = 0.5) -> LossAndGradient:
    """w·KL(q‖m) + (1−w)·KL(p‖m) with m = w·q + (1−w)·p, and (1−w)·p ⊙ (log p − log m − KL(p‖m))."""
    w = inside_unit_interval("teacher_weight", teacher_weight)
    log_q, log_p = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    log_m = mix_log_probabilities(log_q, log_p, w)
    p = log_p.exp()
    student_part = _expectation(p, log_p, log_m)
    loss = w * _expectation(log_q.exp(), log_q, log_m) + (1 - w) * student_part
    return loss, (1 - w) * p * torch.where(p == 0, 0.0, log_p - log_m - student_part[:, None])


def skew_forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1) -> LossAndGradient:
    """KL(q‖m) with m = a·q + (1−a)·p, whose ∂/∂p is −(1−a)·q/m."""
    a = inside_unit_interval("skew", skew)
    log_q, log_p = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    log_m = mix_log_probabilities(log_q, log_p, a)
    p = log_p.exp()
    u = -(1 - a) * torch.where(p == 0, 0.0, torch.exp(log_p + log_q - log_m))
    return _expectation(log_q.exp(), log_q, log_m), _through_softmax(p, u)


def skew_reverse_kl(teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1) -> LossAndGradient:
    """KL(p‖m) with m = (1−a)·q + a·p, whose ∂/∂p is log p − log m + 1 − a·p/m."""
    a = inside_unit_interval("skew", skew)
    log_q, log_p = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    log_m = mix_log_probabilities(log_p, log_q, a)
    p = log_p.exp()
    log_ratio = torch.where(p == 0, 0.0, log_p - log_m)
    return (p * log_ratio).sum(-1), _through_softmax(p, p * (log_ratio - a * log_ratio.exp()))


def total_variation(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """½ Σ |q − p|, whose ∂/∂p is ½·sign(p − q), taken as 0 where they tie."""
    p = student_logits.softmax(-1)
    difference = p - teacher_logits.softmax(-1)
    return 0.5 * difference.abs().sum(-1), _through_softmax(p, 0.5 * p * difference.sign())


CLOSED_FORMS: dict[str, Callable[..., LossAndGradient]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def _expectation(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a·(log a − log b), with 0 where a = 0."""
    return (a * torch.where(a == 0, 0.0, log_a - log_b)).sum(-1)


def _through_softmax(p: Tensor, u: Tensor) -> Tensor:
    return u - p * u.sum(-1, keepdim=True)
