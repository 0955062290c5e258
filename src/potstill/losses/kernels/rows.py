"""One program computes one row: the loss of a token, and its gradient over the student's logits.

V vocabulary, s the student's logits, t the teacher's, both divided by the temperature. p and q are
their softmaxes. Every divergence D is a sum over the vocabulary, D = Σ f. With u = p ⊙ ∂D/∂p its
gradient is ∂D/∂s = u − p·Σu (closed_forms.py).

    pass 1   Σeˢ and Σeᵗ, online: a running maximum and a sum relative to it, in every lane
    pass 2   Σf and Σu
    pass 3   the gradient

Forward KL needs no Σu: its gradient is p − q, and Σf is taken in pass 3. For reverse KL, Σu is
D itself, and E_p[s − t] is taken in pass 1. So both need two passes.

Source of the online normalizer: Milakov and Gimelshein 2018, arXiv 1805.02867.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MODES = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "jensen_shannon": 2,
    "skew_forward_kl": 3,
    "skew_reverse_kl": 4,
    "total_variation": 5,
}
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JENSEN_SHANNON = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
LOWEST = tl.constexpr(-1.0e30)
"""As in closed_forms.py: the logit of a token without probability."""
TINY = tl.constexpr(1.1754944e-38)
INFINITE = tl.constexpr(1.0e10)
"""A larger loss is infinite: a token without probability met a probability."""
BLOCK, WARPS = 4096, 16


@triton.jit
def _logits(row, at, inside):
    return tl.maximum(tl.load(row + at, mask=inside, other=LOWEST), LOWEST)


@triton.jit
def _grown(top, total, x, inside):
    """Add e^x to ``total``, which is relative to the running maximum ``top``."""
    new = tl.maximum(top, x)
    return new, total * tl.exp(top - new) + tl.where(inside, tl.exp(x - new), 0.0)


@triton.jit
def _log_sum(top, total):
    """Return the largest x, and log Σeˣ relative to it: their sum would round a large x."""
    highest = tl.max(top, 0)
    return highest, tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def _mixture(x, y, weight):
    return tl.maximum(x + weight * (y - x), TINY)


@triton.jit
def _terms(log_p, log_q, p, q, weight, MODE: tl.constexpr):
    """Return f and u."""
    if MODE == JENSEN_SHANNON:
        log_m = tl.log(_mixture(p, q, weight))
        own = (1 - weight) * p * (log_p - log_m)
        f = weight * q * (log_q - log_m) + own
        u = own
    elif MODE == SKEW_FORWARD_KL:
        m = _mixture(p, q, weight)
        f = q * (log_q - tl.log(m))
        u = -(1 - weight) * p * (q / m)
    elif MODE == SKEW_REVERSE_KL:
        m = _mixture(q, p, weight)
        log_ratio = log_p - tl.log(m)
        f = p * log_ratio
        u = p * (log_ratio - weight * (p / m))
    else:  # total variation
        f = 0.5 * tl.abs(p - q)
        u = 0.5 * p * tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0))
    return f, u


@triton.jit
def _soft_gradient(gap, log_p, log_q, p, q, weight, expected, total, MODE: tl.constexpr):
    """Return u − p·Σu. ``gap`` is s − t."""
    if MODE == FORWARD_KL:
        gradient = p - q
    elif MODE == REVERSE_KL:
        gradient = p * (gap - expected)
    else:
        _, u = _terms(log_p, log_q, p, q, weight, MODE)
        gradient = u - p * total
    return gradient


@triton.jit
def _normalizers(
    s_row, t_row, V, inverse_temperature, MODE: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the `_log_sum` of s, of t, with ``OWN`` of s at temperature 1, and E_p[s − t]."""
    lane = tl.arange(0, BLOCK)
    s_top = tl.full([BLOCK], LOWEST, tl.float32)
    t_top = tl.full([BLOCK], LOWEST, tl.float32)
    own_top = tl.full([BLOCK], LOWEST, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    own_sum = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)  # Σ eˢ (s − t), relative to s_top
    for first in range(0, V, BLOCK):
        at = first + lane
        inside = at < V
        raw = _logits(s_row, at, inside)
        s = raw * inverse_temperature
        t = _logits(t_row, at, inside) * inverse_temperature
        if MODE == REVERSE_KL:
            new = tl.maximum(s_top, s)
            e = tl.where(inside, tl.exp(s - new), 0.0)
            gap = gap * tl.exp(s_top - new) + e * (s - t)
        s_top, s_sum = _grown(s_top, s_sum, s, inside)
        t_top, t_sum = _grown(t_top, t_sum, t, inside)
        if OWN:
            own_top, own_sum = _grown(own_top, own_sum, raw, inside)
    s_max, s_log = _log_sum(s_top, s_sum)
    t_max, t_log = _log_sum(t_top, t_sum)
    own_max, own_log = s_max, s_log
    if OWN:
        own_max, own_log = _log_sum(own_top, own_sum)
    expected = tl.sum(gap * tl.exp(s_top - s_max - s_log), 0)
    return s_max, s_log, t_max, t_log, own_max, own_log, expected


@triton.jit
def _sums(
    s_row,
    t_row,
    V,
    inverse_temperature,
    s_max,
    s_log,
    t_max,
    t_log,
    weight,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return Σf and Σu."""
    lane = tl.arange(0, BLOCK)
    f_sum = tl.zeros([BLOCK], tl.float32)
    u_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        at = first + lane
        inside = at < V
        log_p = _logits(s_row, at, inside) * inverse_temperature - s_max - s_log
        log_q = _logits(t_row, at, inside) * inverse_temperature - t_max - t_log
        p = tl.where(inside, tl.exp(log_p), 0.0)
        q = tl.where(inside, tl.exp(log_q), 0.0)
        f, u = _terms(log_p, log_q, p, q, weight, MODE)
        f_sum += f
        u_sum += u
    return tl.sum(f_sum, 0), tl.sum(u_sum, 0)


@triton.jit
def divergence_kernel(
    student, teacher, losses, labels,
    student_stride, teacher_stride, V, inverse_temperature, weight, hard,
    MODE: tl.constexpr, HARD: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the loss of a row, and its gradient over the student's logits.

    ``HARD``: mix in ``hard`` of the cross-entropy on the label, at temperature 1; a negative label
    has none. ``TEMPERED``: the temperature is not 1.
    """
    number = tl.program_id(0).to(tl.int64)
    s_row, t_row = student + number * student_stride, teacher + number * teacher_stride
    s_max, s_log, t_max, t_log, own_max, own_log, expected = _normalizers(
        s_row, t_row, V, inverse_temperature, MODE, HARD and TEMPERED, BLOCK
    )
    loss = expected - (s_max - t_max) - (s_log - t_log)  # reverse KL
    total = 0.0
    if MODE > REVERSE_KL:
        loss, total = _sums(
            s_row, t_row, V, inverse_temperature, s_max, s_log, t_max, t_log, weight, MODE, BLOCK
        )
    label, share, hard_loss = -1, 0.0, 0.0
    if HARD:
        label = tl.load(labels + number)
        share = tl.where(label >= 0, hard, 0.0)
        hard_loss = own_max - _logits(s_row, tl.maximum(label, 0), True) + own_log
        tl.debug_barrier()  # the loop overwrites this logit
    lane = tl.arange(0, BLOCK)
    f_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        at = first + lane
        inside = at < V
        raw = _logits(s_row, at, inside)
        s, t = raw * inverse_temperature, _logits(t_row, at, inside) * inverse_temperature
        log_p, log_q = s - s_max - s_log, t - t_max - t_log
        p, q = tl.where(inside, tl.exp(log_p), 0.0), tl.where(inside, tl.exp(log_q), 0.0)
        f_sum += q * (log_q - log_p)  # forward KL
        gradient = _soft_gradient(s - t, log_p, log_q, p, q, weight, expected, total, MODE)
        gradient = gradient * inverse_temperature
        if HARD:
            own = tl.exp(raw - own_max - own_log) if TEMPERED else p
            gradient += share * (own - tl.where(at == label, 1.0, 0.0) - gradient)
        tl.store(s_row + at, gradient, mask=inside)
    if MODE == FORWARD_KL:
        loss = tl.sum(f_sum, 0)
    loss = tl.where(loss > INFINITE, float("inf"), loss)
    if HARD:
        loss = tl.where(share == 1.0, hard_loss, loss + share * (hard_loss - loss))
    tl.store(losses + number, loss)


@triton.jit
def cross_entropy_kernel(student, losses, labels, student_stride, V, BLOCK: tl.constexpr):
    """Write −log p(label) of a row, and p − onehot(label) over its logits."""
    number = tl.program_id(0).to(tl.int64)
    row = student + number * student_stride
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        at = first + lane
        inside = at < V
        top, total = _grown(top, total, _logits(row, at, inside), inside)
    highest, log_sum = _log_sum(top, total)
    label = tl.load(labels + number)
    tl.store(losses + number, highest - _logits(row, label, True) + log_sum)
    tl.debug_barrier()  # this program overwrites the logit below
    for first in range(0, V, BLOCK):
        at = first + lane
        inside = at < V
        p = tl.exp(_logits(row, at, inside) - highest - log_sum)
        tl.store(row + at, p - tl.where(at == label, 1.0, 0.0), mask=inside)


def divergence(
    name: str,
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    parameter: float = 0.0,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    hard_label_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the loss ``[b]`` and its gradient ``[b, V]``, which overwrites ``student_logits``.

    Both logits are float32 with contiguous rows. ``parameter`` is the divergence's own. ``labels
    [b]`` mix in ``hard_label_weight`` of cross-entropy; a negative one has no cross-entropy.
    """
    rows, vocabulary = student_logits.shape
    losses = student_logits.new_empty(rows)
    given = losses if labels is None or not hard_label_weight else labels
    _launch(
        divergence_kernel,
        rows,
        (student_logits, teacher_logits, losses, given),
        (student_logits.stride(0), teacher_logits.stride(0), vocabulary),
        (1.0 / temperature, float(parameter), float(hard_label_weight)),
        MODE=MODES[name],
        HARD=given is not losses,
        TEMPERED=temperature != 1.0,
    )
    return losses, student_logits


def cross_entropy(labels: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return −log p(label) ``[b]`` and its gradient, which overwrites ``student_logits``."""
    rows, vocabulary = student_logits.shape
    losses = student_logits.new_empty(rows)
    tensors = (student_logits, losses, labels)
    _launch(cross_entropy_kernel, rows, tensors, (student_logits.stride(0), vocabulary), ())
    return losses, student_logits


def _launch(
    kernel: Any, rows: int, tensors: tuple[Tensor, ...], sizes: tuple[int, ...],
    numbers: tuple[float, ...], **options: Any,
) -> None:  # fmt: skip
    if rows:
        with _device_of(tensors[0]):
            block = min(BLOCK, triton.next_power_of_2(sizes[-1]))
            warps = max(1, block * WARPS // BLOCK)
            kernel[(rows,)](*tensors, *sizes, *numbers, BLOCK=block, num_warps=warps, **options)


def _device_of(tensor: Tensor) -> Any:
    """Make the tensor's card the current one: Triton launches on that."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.no_grad()
