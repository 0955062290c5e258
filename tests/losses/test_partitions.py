"""The partition loss: its two limits are text and logit distillation; autograd is the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.losses import (
    DIVERGENCES,
    Places,
    fused_linear_cells,
    fused_linear_cross_entropy,
    fused_linear_divergence,
    fused_linear_topk,
)
from potstill.losses.cross_tokenizer import CellPartition
from potstill.losses.partitions import TopKPartition, partition_loss

CLOSED_FORMS = {name: one.value_and_gradient() for name, one in DIVERGENCES.items()}

V, B = 11, 6
every_divergence = pytest.mark.parametrize("name", sorted(DIVERGENCES))


def random_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = 2 * torch.randn(2, B, V, generator=generator, dtype=torch.float64)
    return teacher, student, torch.randint(V, (B,), generator=generator)


def by_definition(
    name: str, masses: Tensor, logits: Tensor, cells: Tensor, observed: Tensor, weight: float
) -> Tensor:
    """Return the loss from its definition, one position and one cell at a time."""
    p = logits.softmax(-1)
    columns = range(masses.shape[1])
    pooled = torch.stack(
        [torch.stack([p[i, cells[i] == c].sum() for c in columns]) for i in range(len(p))]
    )
    own = torch.stack([pooled[i, cells[i, observed[i]]] for i in range(len(p))])
    within = own.log() - p.gather(1, observed[:, None]).squeeze(1).log()
    return DIVERGENCES[name](masses.log(), pooled.log()) + weight * within


@every_divergence
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_value_and_gradient_are_those_of_the_definition(name: str, weight: float) -> None:
    teacher, student, observed = random_case()
    cells = torch.randint(4, (V,)).scatter(0, torch.arange(4), torch.arange(4))
    partition = CellPartition(cells, 4)
    masses = partition.pool(teacher.softmax(-1))
    loss, gradient = partition_loss(
        CLOSED_FORMS[name],
        masses,
        student.clone(),
        partition,
        observed,
        observed_cells=cells[observed],
        within_weight=weight,
    )
    leaf = student.clone().requires_grad_()
    expected = by_definition(name, masses[:, :4], leaf, cells.expand(B, V), observed, weight)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-8, atol=1e-10
    )


@every_divergence
def test_one_cell_for_each_token_gives_logit_distillation(name: str) -> None:
    teacher, student, observed = random_case()
    loss, gradient = partition_loss(
        CLOSED_FORMS[name],
        teacher.softmax(-1),
        student.clone(),
        _Singletons(),
        observed,
        observed_cells=observed,
    )
    expected_loss, expected_gradient = CLOSED_FORMS[name](teacher.clone(), student.clone())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_one_cell_for_all_tokens_gives_text_distillation() -> None:
    _, student, observed = random_case()
    partition = CellPartition(torch.zeros(V, dtype=torch.long), 1)
    masses = partition.pool(student.softmax(-1))
    loss, gradient = partition_loss(
        CLOSED_FORMS["forward_kl"],
        masses,
        student.clone(),
        partition,
        observed,
        observed_cells=observed * 0,
    )
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(student, observed, reduction="none")
    )
    torch.testing.assert_close(
        gradient, student.softmax(-1) - torch.nn.functional.one_hot(observed, V)
    )


def test_positions_without_a_target_get_text_distillation_for_any_masses() -> None:
    teacher, student, observed = random_case()
    partition = CellPartition(torch.arange(V) // 2, 6)
    known = torch.arange(B) % 2 == 0
    masses = partition.pool(teacher.softmax(-1)).masked_fill(~known[:, None], float("nan"))
    loss, gradient = partition_loss(
        CLOSED_FORMS["forward_kl"],
        masses,
        student.clone(),
        partition,
        observed,
        observed_cells=observed // 2,
        has_target=known,
        within_weight=0.5,
    )
    text = torch.nn.functional.cross_entropy(student, observed, reduction="none")
    torch.testing.assert_close(loss[~known], text[~known])
    torch.testing.assert_close(
        gradient[~known], (student.softmax(-1) - torch.nn.functional.one_hot(observed, V))[~known]
    )


@every_divergence
def test_top_k_of_all_tokens_equals_the_whole_distribution(name: str) -> None:
    student_hidden, student_head, teacher_hidden, teacher_head, labels = heads()
    log_q = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    ids = torch.stack([torch.randperm(V) for _ in range(B)])
    student, kept = (student_hidden, student_head), log_q.gather(1, ids)
    teacher = teacher_hidden, teacher_head
    results = [
        with_gradients(fused_linear_topk, *student, ids, kept, labels, divergence=name),
        with_gradients(fused_linear_divergence, *student, *teacher, divergence=name),
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_top_k_is_unbiased_and_renormalizing_is_not() -> None:
    """The mean over the teacher's next token is the gradient of the whole distribution."""
    teacher, student, _ = random_case()
    whole = student.softmax(-1) - teacher.softmax(-1)
    q = teacher.softmax(-1)
    kept = q.topk(3, -1)
    partition = TopKPartition(kept.indices, V)
    masses = torch.cat([kept.values, 1 - kept.values.sum(-1, keepdim=True)], -1)
    mean = torch.zeros_like(whole)
    for token in range(V):
        observed = torch.full((B,), token)
        _, gradient = partition_loss(
            CLOSED_FORMS["forward_kl"],
            masses,
            student.clone(),
            partition,
            observed,
            observed_cells=partition.cells[:, token],
        )
        mean += q[:, token : token + 1] * gradient
    torch.testing.assert_close(mean, whole, rtol=1e-9, atol=1e-12)
    renormalized = torch.zeros_like(q).scatter(
        1, kept.indices, kept.values / kept.values.sum(-1, keepdim=True)
    )
    assert (student.softmax(-1) - renormalized - whole).abs().max() > 0.01


def test_coarser_cells_never_give_a_larger_divergence() -> None:
    teacher, student, observed = random_case()
    whole, _ = CLOSED_FORMS["forward_kl"](teacher.clone(), student.clone())
    for count in (1, 3, 6):
        partition = CellPartition(torch.arange(V) % count, count)
        masses = partition.pool(teacher.softmax(-1))
        seen = observed % count
        loss, _ = partition_loss(
            CLOSED_FORMS["forward_kl"],
            masses,
            student.clone(),
            partition,
            observed,
            observed_cells=seen,
            within_weight=0.0,
        )
        assert (loss <= whole + 1e-12).all()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
def test_cells_of_one_tokenizer_give_forward_kl(chunk_tokens: int | None) -> None:
    student_hidden, student_head, teacher_hidden, teacher_head, labels = heads()
    cells = _ToyCells(torch.arange(V), torch.arange(V), V)
    places = Places(torch.arange(B), *(torch.zeros(B, dtype=torch.long) for _ in range(3)), labels)
    models = student_hidden, student_head, teacher_hidden, teacher_head
    settings = {"cells": cells, "places": places, "labels": labels, "chunk_tokens": chunk_tokens}
    results = [
        with_gradients(fused_linear_cells, *models, **settings),
        with_gradients(fused_linear_divergence, *models),
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_positions_without_a_target_get_cross_entropy_and_interiors_use_their_range() -> None:
    student_hidden, student_head, teacher_hidden, teacher_head, labels = heads()
    cells = _ToyCells(torch.arange(V), torch.arange(V), V)
    nowhere = Places(torch.full((B,), -1), *(torch.zeros(B, dtype=torch.long) for _ in range(4)))
    models = student_hidden, student_head, teacher_hidden, teacher_head
    got = with_gradients(fused_linear_cells, *models, cells=cells, places=nowhere, labels=labels)
    text = with_gradients(fused_linear_cross_entropy, student_hidden, student_head, labels)
    for one, other in zip(got, text, strict=True):
        torch.testing.assert_close(one, other)
    # One interior: teacher tokens 2, 3 and 4 continue, each in the cell of its own number.
    inside = Places(*(torch.tensor([number]) for number in (0, 2, 5, 1, 3)))
    loss = fused_linear_cells(
        student_hidden[:1],
        student_head,
        teacher_hidden[:1],
        teacher_head,
        cells=cells,
        places=inside,
        labels=torch.tensor([3]),
    )
    q = (teacher_hidden[:1] @ teacher_head.T).softmax(-1)[:, 2:5]
    log_p = (student_hidden[:1] @ student_head.T).log_softmax(-1)[:, 2:5]
    q = q / q.sum()
    torch.testing.assert_close(loss, (q * (q.log() - log_p)).sum())


def test_log_probabilities_that_sum_to_more_than_one_raise() -> None:
    hidden, head, _, _, labels = heads()
    with pytest.raises(ValueError, match="sum to more than 1"):
        fused_linear_topk(hidden, head, torch.arange(2).expand(B, 2), torch.zeros(B, 2), labels)


class _Singletons:
    count = V

    def pool(self, values: Tensor) -> Tensor:
        return values.clone()

    def spread(self, values: Tensor) -> Tensor:
        return values


class _ToyCells:
    """Toy cells: at every depth, the next piece of a teacher token has the token's own number."""

    keeps_endings = False
    most = None

    def __init__(self, teacher_cells: Tensor, student_cells: Tensor, count: int) -> None:
        self.teacher_cells, self.student_cells, self.count = teacher_cells, student_cells, count
        self.order = torch.arange(len(teacher_cells))

    def next_cells(self, places: Tensor, depth: int | Tensor) -> Tensor:
        return self.teacher_cells[self.order[places]]


def heads() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((B, 5), (V, 5), (B, 7), (V, 7))
    ]
    return *draw, torch.randint(V, (B,), generator=generator)  # type: ignore[return-value]


def with_gradients(
    loss: Callable[..., Tensor], hidden: Tensor, head: Tensor, *args: Any, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    total = loss(hidden, head, *args, **settings)
    total.backward()
    return total.detach(), hidden.grad, head.grad  # type: ignore[return-value]
