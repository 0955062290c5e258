"""Compute the value and the gradient of each loss in closed form, from one block of logits.

b tokens, V vocabulary. q is the teacher's distribution, p the student's, t and s their logits. Each
function takes finite logits ``[b, V]`` in float32 or wider, **which it may overwrite**, and returns
the loss ``[b]`` in nats and its gradient with respect to s, ``[b, V]``. `finite` makes −inf finite.

For every divergence D, ∂D/∂s = u − p·Σu with u = p ⊙ ∂D/∂p; for forward KL this is p − q. The six
tensors of b × V that autograd would keep are not needed. Where only the mean of log-probabilities
is needed, they are not stored: log q = t − log Σeᵗ, so KL(q‖p) = Σ q (t − s) − log Σeᵗ + log Σeˢ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from potstill.losses.records import inside_unit_interval

LossAndGradient = tuple[Tensor, Tensor]
ClosedForm = Callable[..., LossAndGradient]

LOWEST = -1e30
"""Value that replaces a logit of −inf: its softmax is 0, too, but 0 · −1e30 is 0, not NaN."""


def finite(logits: Tensor) -> Tensor:
    """Replace −inf by `LOWEST`, in place."""
    return logits.clamp_(min=LOWEST)


def cross_entropy(labels: Tensor, student_logits: Tensor) -> LossAndGradient:
    """Return −log p(label) and p − onehot(label), for ``labels [b]``."""
    p, log_normalizer = _softmax(student_logits)
    loss = log_normalizer - student_logits.gather(-1, labels[:, None]).squeeze(-1)
    return loss, p.scatter_add_(-1, labels[:, None], p.new_full((len(labels), 1), -1.0))


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """Return KL(q‖p) and p − q."""
    q, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    expected = _dot(q, teacher_logits.sub_(student_logits))
    return _restore_infinity(expected - teacher_normalizer + student_normalizer), p.sub_(q)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """Return KL(p‖q) and p ⊙ (log p − log q − KL(p‖q)); the normalizers cancel."""
    _, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    difference = student_logits.sub_(teacher_logits)
    expected = _dot(p, difference)
    loss = _restore_infinity(expected - student_normalizer + teacher_normalizer)
    return loss, difference.sub_(expected[:, None]).mul_(p)


def jensen_shannon(
    teacher_logits: Tensor, student_logits: Tensor, *, teacher_weight: float = 0.5
) -> LossAndGradient:
    """Return w·KL(q‖m) + (1−w)·KL(p‖m) and (1−w)·p ⊙ (log(p/m) − KL(p‖m)), m = w·q + (1−w)·p."""
    w = inside_unit_interval("teacher_weight", teacher_weight)
    q, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    log_m = _mixture(p, q, w).log_()
    teacher_part = _dot(q, teacher_logits.sub_(log_m)) - teacher_normalizer
    log_ratio = student_logits.sub_(log_m)  # without the normalizer, which the gradient ignores
    expected = _dot(p, log_ratio)
    loss = w * teacher_part + (1 - w) * (expected - student_normalizer)
    return loss, log_ratio.sub_(expected[:, None]).mul_(p).mul_(1 - w)


def skew_forward_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1
) -> LossAndGradient:
    """Return KL(q‖m) with m = a·q + (1−a)·p, and its gradient from u = −(1−a)·p·q/m."""
    a = inside_unit_interval("skew", skew)
    log_q, _, q, p = _log_probabilities(teacher_logits, student_logits)
    m = _mixture(p, q, a)
    loss = _dot(q, log_q.sub_(m.log()))
    u = q.div_(m).mul_(p).mul_(-(1 - a))  # q/m ≤ 1/a
    return loss, _through_softmax(p, u)


def skew_reverse_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1
) -> LossAndGradient:
    """Return KL(p‖m) with m = (1−a)·q + a·p, and its gradient from u = p·(log(p/m) − a·p/m)."""
    a = inside_unit_interval("skew", skew)
    _, log_p, q, p = _log_probabilities(teacher_logits, student_logits)
    m = _mixture(q, p, a)
    log_ratio = log_p.sub_(m.log())
    loss = _dot(p, log_ratio)
    ratio = torch.div(p, m)
    return loss, _through_softmax(p, log_ratio.sub_(ratio, alpha=a).mul_(p))


def total_variation(teacher_logits: Tensor, student_logits: Tensor) -> LossAndGradient:
    """Return ½ Σ |q − p| and its gradient from ∂/∂p = ½·sign(p − q), 0 where p = q."""
    p = student_logits.softmax(-1)
    difference = p - teacher_logits.softmax(-1)
    return 0.5 * difference.abs().sum(-1), _through_softmax(p, 0.5 * p * difference.sign())


def positive_temperature(value: float) -> float:
    """Return ``value``. Raises: ValueError if it is not positive."""
    if not value > 0:
        raise ValueError(f"temperature = {value}: must be positive; 1.0 leaves logits unchanged")
    return value


def by_autograd(divergence: Callable[..., Tensor]) -> ClosedForm:
    """Return a function for the value and gradient of any ``divergence``, computed by autograd."""

    def value_and_gradient(
        teacher_logits: Tensor, student_logits: Tensor, **divergence_parameters: float
    ) -> LossAndGradient:
        with torch.enable_grad():
            student_logits = student_logits.detach().requires_grad_()
            loss = divergence(teacher_logits.detach(), student_logits, **divergence_parameters)
            (gradient,) = torch.autograd.grad(loss.sum(), student_logits)
        return loss.detach(), gradient

    return value_and_gradient


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities ``[b, V]`` and log Σe^logits ``[b]``, as max logit − log max p."""
    probabilities = logits.softmax(-1)
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()


def _log_probabilities(
    teacher_logits: Tensor, student_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log q, log p, q, p; the logarithms are finite even where the probability is 0."""
    q, teacher_normalizer = _softmax(teacher_logits)
    p, student_normalizer = _softmax(student_logits)
    log_q = teacher_logits.sub_(teacher_normalizer[:, None])
    return log_q, student_logits.sub_(student_normalizer[:, None]), q, p


def _mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return (1 − weight)·a + weight·b, at least the smallest normal number: its log is finite."""
    mixture = torch.lerp(a, b, weight)
    return mixture.clamp_min_(torch.finfo(mixture.dtype).tiny)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _restore_infinity(loss: Tensor) -> Tensor:
    """Make a loss infinite again if a logit of −inf (`LOWEST`) met a positive probability."""
    return loss.masked_fill(loss > -LOWEST * 1e-20, math.inf)


def _through_softmax(p: Tensor, u: Tensor) -> Tensor:
    """Return the gradient with respect to the logits, from u = p ⊙ ∂D/∂p."""
    return u - p * u.sum(-1, keepdim=True)
