"""Compare losses from the literature with dense definitions, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.baselines import fused_linear_chunks, fused_linear_last_token, fused_linear_sorted
from potstill.baselines.chunk_likelihoods import binary_divergence
from potstill.losses import DIVERGENCES
from potstill.losses.closed_forms import finite
from potstill.losses.cross_tokenizer import CellPartition, ResidualPartition
from potstill.losses.partitions import on_support, partition_loss

CLOSED_FORMS = {name: one.value_and_gradient() for name, one in DIVERGENCES.items()}

N, M, V_S, V_T = 7, 6, 9, 12
SPAN = torch.tensor([0, 0, 1, -1, 2, 3, 3])
TEACHER_SPAN = torch.tensor([0, 1, 1, -1, 2, 3])
Models = tuple[Tensor, Tensor, Tensor, Tensor]


def models(seed: int = 0) -> Models:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, 5), (V_S, 5), (M, 4), (V_T, 4))
    a, b, c, d = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return a, b, c, d


LABELS, TEACHER_LABELS = torch.arange(N) % V_S, (torch.arange(M) * 5) % V_T
ROWS = torch.tensor([0, 2, -1, 5, 1, -1, 3])


def log_p(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ head.T).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def dense_sorted(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> Tensor:
    total = -log_p(student_hidden, student_head, LABELS).sum()
    p = (student_hidden @ student_head.T).softmax(-1)
    q = (teacher_hidden @ teacher_head.T).softmax(-1)
    for i, row in enumerate(ROWS.tolist()):
        if row >= 0:
            p_sorted, q_sorted = sorted(p[i], reverse=True), sorted(q[row].tolist(), reverse=True)
            padded = [*p_sorted, *[torch.zeros(())] * (V_T - V_S)]
            differences = [abs(a - b) for a, b in zip(padded, q_sorted, strict=True)]
            total = total + 1.5 * torch.stack(differences).sum()
    return total


def dense_spans(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> Tensor:
    log_b = log_p(student_hidden, student_head, LABELS)
    log_a = log_p(teacher_hidden, teacher_head, TEACHER_LABELS)
    total = student_hidden.sum() * 0
    for span in range(4):
        a = (log_a[span == TEACHER_SPAN].sum() / 3).exp()
        b = (log_b[span == SPAN].sum() / 3).exp()
        total = total + a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()
    return total


def dense_last(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> Tensor:
    total = student_hidden.sum() * 0
    for i, j in ((2, 4), (6, 5)):
        zeros = torch.zeros(V_T - V_S, dtype=torch.float64)
        padded = torch.cat([student_hidden[i] @ student_head.T, zeros])
        teacher_logits = teacher_hidden[j] @ teacher_head.T
        total = total + DIVERGENCES["forward_kl"](teacher_logits[None], padded[None])[0]
    return total


CONVERSATIONS = {
    "conversation": torch.tensor([0, 0, 0, 1, 1, 1, 1]),
    "teacher_conversation": torch.tensor([1, 1, 0, 0, 0, 1]),
}
TEXTS = {"labels": LABELS, "teacher_labels": TEACHER_LABELS}
SPANS = {"chunk": SPAN, "teacher_chunk": TEACHER_SPAN}
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], Callable[..., Tensor]]] = {
    "sorted": (fused_linear_sorted, {"teacher_row": ROWS, **TEXTS}, dense_sorted),
    "spans": (fused_linear_chunks, {**SPANS, **TEXTS, "chunk_temperature": 3.0}, dense_spans),
    "last token": (fused_linear_last_token, CONVERSATIONS, dense_last),
}


def with_gradients(
    loss: Callable[..., Tensor], tensors: Models, **settings: Any
) -> tuple[Tensor, ...]:
    hidden, head = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    total = loss(hidden, head, *tensors[2:], **settings)
    return total.detach(), *torch.autograd.grad(total, (hidden, head))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 3])
def test_value_and_gradient_match_the_definition(name: str, chunk_tokens: int | None) -> None:
    fused, settings, dense = LOSSES[name]
    found = with_gradients(fused, models(), **settings, chunk_tokens=chunk_tokens)
    for one, other in zip(found, with_gradients(dense, models()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def renumbered(tensors: Models) -> tuple[Models, Tensor, Tensor]:
    """Return the models with other ids, and the new ids of both vocabularies."""
    students, teachers = torch.randperm(V_S), torch.randperm(V_T)
    student_head, teacher_head = tensors[1].clone(), tensors[3].clone()
    student_head[students], teacher_head[teachers] = tensors[1], tensors[3]
    return (tensors[0], student_head, tensors[2], teacher_head), students, teachers


@pytest.mark.parametrize("name", ["sorted", "spans"])
def test_renumbering_either_vocabulary_changes_nothing(name: str) -> None:
    fused, settings, _ = LOSSES[name]
    tensors, students, teachers = renumbered(models())
    moved = {**settings, "labels": students[LABELS], "teacher_labels": teachers[TEACHER_LABELS]}
    torch.testing.assert_close(fused(*tensors, **moved), fused(*models(), **settings))


def test_renumbering_changes_the_padded_last_token_loss() -> None:
    torch.manual_seed(0)
    tensors, _, _ = renumbered(models())
    before = fused_linear_last_token(*models(), **CONVERSATIONS)
    after = fused_linear_last_token(*tensors, **CONVERSATIONS)
    assert abs(before - after) > 0.1


def test_sorted_probabilities_lose_the_tokens() -> None:
    """A student as certain as the teacher of another token has distance 0 and no gradient."""
    from potstill.baselines.sorted_probabilities import sorted_distance

    q = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    distance, gradient = sorted_distance(q, q.roll(1, -1))
    assert distance.item() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_binary_divergence_is_zero_for_equal_likelihoods_and_finite_for_probability_1(
    temperature: float,
) -> None:
    likely = torch.tensor([-1e-9, -0.3, -40.0], dtype=torch.float64)
    loss, derivative = binary_divergence(likely, likely, temperature)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    torch.testing.assert_close(derivative, torch.zeros_like(loss), rtol=0, atol=1e-12)
    loss, derivative = binary_divergence(likely, torch.zeros(3, dtype=torch.float64), temperature)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(derivative).all()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_divergence_on_the_support_is_finite_and_agrees_with_autograd(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    masses = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    masses[:, 2] = masses[0, 4] = 0
    masses = masses / masses.sum(-1, keepdim=True)
    logits = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    loss, gradient = on_support(CLOSED_FORMS[name])(finite(masses.log()), logits.log_softmax(-1))
    leaf = logits.clone().requires_grad_()
    supported = masses > 0
    share = (leaf.softmax(-1) * supported).sum(-1)
    inside = torch.stack(
        [
            DIVERGENCES[name](masses[i, supported[i]].log()[None], leaf[i, supported[i]][None])[0]
            - share[i].log()
            for i in range(4)
        ]
    )
    torch.testing.assert_close(loss, inside.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(inside.sum(), leaf)[0], rtol=1e-8, atol=1e-10
    )


def test_forward_kl_on_the_support_equals_forward_kl() -> None:
    masses = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    log_p = torch.randn(1, 3, dtype=torch.float64).log_softmax(-1)
    plain = CLOSED_FORMS["forward_kl"](finite(masses.log()), log_p.clone())
    on_cells = on_support(CLOSED_FORMS["forward_kl"])(finite(masses.log()), log_p.clone())
    for one, other in zip(on_cells, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_empty_cells_of_a_position_are_merged_into_its_residual_cell() -> None:
    """Tokens 0 to 5 are in cells 0, 0, 1, 2, 3, none. Only row 0 has empty cells: 1 and 3."""
    base = CellPartition(torch.tensor([0, 0, 1, 2, 3, -1]), 4)
    empty = torch.tensor([[False, True, False, True, True], [False] * 5])
    partition = ResidualPartition(base, empty)
    p = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.2, 0.1]] * 2, dtype=torch.float64)
    torch.testing.assert_close(
        partition.pool(p)[0], torch.tensor([0.3, 0, 0.1, 0, 0.6], dtype=torch.float64)
    )
    torch.testing.assert_close(partition.pool(p)[1], base.pool(p)[1])
    assert partition.spread(torch.arange(5.0).expand(2, -1)).tolist() == [
        [0, 0, 4, 2, 4, 4],
        [0, 0, 1, 2, 3, 4],
    ]
    assert partition.cell_of(torch.tensor([1, 1])).tolist() == [4, 1]
    logits = p.log()
    masses = torch.tensor(
        [[0.5, 0.0, 0.2, 0.0, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64
    )
    token = torch.tensor([3, 3])
    seen = partition.cell_of(base.cells[token])
    loss, gradient = partition_loss(
        CLOSED_FORMS["forward_kl"], masses, logits.clone(), partition, token, observed_cells=seen
    )
    leaf = logits.clone().requires_grad_()
    first = leaf[0].softmax(-1)
    own = torch.stack([first[:2].sum(), first[3], first[2] + first[4] + first[5]])
    t = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    expected = (t * (t / own).log()).sum()
    torch.testing.assert_close(loss[0], expected.detach())
    torch.testing.assert_close(gradient[0], torch.autograd.grad(expected, leaf)[0][0])
