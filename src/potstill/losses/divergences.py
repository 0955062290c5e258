"""Measure how far a student's next-token distribution is from its teacher's, in six ways.

N supervised tokens, V vocabulary. q is the teacher's distribution and p the student's: softmaxes of
logits divided by one temperature. Every function takes ``teacher_logits [N, V]`` and
``student_logits [N, V]`` and returns ``[N]`` nats, one number per token, in float32 or wider.

No function multiplies by temperature² (Hinton et al. 2015, arXiv 1503.02531, section 2): the factor
keeps the size of gradients, and the learning rate can do the same.

A logit of −inf is probability 0 and contributes 0 · log 0 = 0. ``forward_kl`` is infinite if the
student gives 0 to a token to which the teacher does not. N = 0 returns an empty tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.losses.closed_forms import positive_temperature
from potstill.losses.records import DIVERGENCES as DIVERGENCES
from potstill.losses.records import Divergence as Divergence
from potstill.losses.records import Parameter as Parameter
from potstill.losses.records import all_parameters as all_parameters
from potstill.losses.records import inside_unit_interval


def forward_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return KL(q‖p) = Σ q log(q/p) ``[N]``: large if the student misses tokens of the teacher.

    Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, without the factor temperature².

    >>> teacher, student = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    >>> forward_kl(teacher, student)  # ¼·log(½) + ¾·log(1½)
    tensor([0.1308])
    """
    log_q, log_p = _log_probabilities(teacher_logits, student_logits, temperature)
    return _kl(log_q, log_p)


def reverse_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return KL(p‖q) = Σ p log(p/q) ``[N]``: large if the student has tokens the teacher avoids.

    Source: Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equation 1, summed over the vocabulary.
    """
    log_q, log_p = _log_probabilities(teacher_logits, student_logits, temperature)
    return _kl(log_p, log_q)


def jensen_shannon(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    temperature: float = 1.0,
    teacher_weight: float = 0.5,
) -> Tensor:
    """Return w·KL(q‖m) + (1−w)·KL(p‖m) ``[N]`` with m = w·q + (1−w)·p and w = ``teacher_weight``.

    At w = ½ it is symmetric and at most log 2. Divided by w it tends to ``forward_kl`` as w → 0;
    divided by 1 − w it tends to ``reverse_kl`` as w → 1.

    Raises: ValueError if ``teacher_weight`` is not in (0, 1); at 0 and 1 the divergence is 0.
    Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1.
    """
    w = inside_unit_interval("teacher_weight", teacher_weight)
    log_q, log_p = _log_probabilities(teacher_logits, student_logits, temperature)
    log_m = mix_log_probabilities(log_q, log_p, w)
    return w * _kl(log_q, log_m) + (1 - w) * _kl(log_p, log_m)


def skew_forward_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """Return KL(q ‖ a·q + (1−a)·p) ``[N]`` with a = ``skew``, at most −log a.

    Raises: ValueError if ``skew`` is not in (0, 1).
    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1.
    """
    a = inside_unit_interval("skew", skew)
    log_q, log_p = _log_probabilities(teacher_logits, student_logits, temperature)
    return _kl(log_q, mix_log_probabilities(log_q, log_p, a))


def skew_reverse_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """Return KL(p ‖ (1−a)·q + a·p) ``[N]`` with a = ``skew``, at most −log a.

    Raises: ValueError if ``skew`` is not in (0, 1).
    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1.
    """
    a = inside_unit_interval("skew", skew)
    log_q, log_p = _log_probabilities(teacher_logits, student_logits, temperature)
    return _kl(log_p, mix_log_probabilities(log_p, log_q, a))


def total_variation(
    teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return ½ Σ |q − p| ``[N]``: the largest difference over all events, in [0, 1], not in nats.

    Source: Wen et al. 2023 (f-distillation), arXiv 2307.15190, section 3.
    """
    log_q, log_p = _log_probabilities(teacher_logits, student_logits, temperature)
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)


def mix_log_probabilities(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Return log(weight·a + (1−weight)·b), elementwise, from logarithms.

    If both are −inf, the result is −inf with gradient 0 (logaddexp alone gives NaN).
    """
    both_zero = (log_a == -math.inf) & (log_b == -math.inf)
    log_a, log_b = log_a.masked_fill(both_zero, 0.0), log_b.masked_fill(both_zero, 0.0)
    mixed = torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))
    return mixed.masked_fill(both_zero, -math.inf)


def _log_probabilities(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits {tuple(teacher_logits.shape)} and student_logits "
            f"{tuple(student_logits.shape)} differ in shape: cut both to the shared vocabulary "
            "(potstill.alignment.shared_rows)"
        )
    temperature = positive_temperature(temperature)
    wide = torch.promote_types(teacher_logits.dtype, student_logits.dtype)
    wide = torch.promote_types(wide, torch.float32)
    log_q = (teacher_logits.to(wide) / temperature).log_softmax(-1)
    return log_q, (student_logits.to(wide) / temperature).log_softmax(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return Σ a·(log a − log b) over the last axis; a = 0 adds 0, and its gradient is 0."""
    a = log_a.exp()
    # Test a, not log a: if a underflows to 0, log a is finite and 0 · (log a + inf) is NaN.
    return (a * torch.where(a == 0, 0.0, log_a - log_b)).sum(-1)
