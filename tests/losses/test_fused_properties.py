"""The fused loss equals the dense loss for random shapes, chunks, masks and settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.losses import (
    DIVERGENCES,
    Head,
    forward_kl,
    fused_linear_cross_entropy,
    fused_linear_divergence,
)

cases = st.fixed_dictionaries(
    {
        "name": st.sampled_from(sorted(DIVERGENCES)),
        "tokens": st.integers(0, 9),
        "vocabulary": st.integers(1, 12),
        # extra rows of the student's head and of the teacher's
        "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
        "hidden": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "chunk_tokens": st.none() | st.integers(1, 10),
        "temperature": st.floats(0.3, 5),
        "hard_label_weight": st.sampled_from([0.0, 0.3, 1.0]),
        "masked": st.booleans(),
        "tied": st.booleans(),
        "seed": st.integers(0, 2**31 - 1),
    }
)


@settings(max_examples=150, deadline=None)
@given(case=cases)
def test_fused_equals_dense_for_random_cases(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])

    def drawn(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.round() if case["tied"] else numbers  # whole numbers give equal logits

    tokens, rows, (student_width, teacher_width) = (
        case[k] for k in ("tokens", "vocabulary", "hidden")
    )
    hidden, weight = drawn(tokens, student_width), drawn(rows + case["padding"][0], student_width)
    teacher_hidden = drawn(tokens, teacher_width)
    teacher_weight = drawn(rows + case["padding"][1], teacher_width)
    labels = torch.randint(rows, (tokens,), generator=generator)
    weights = torch.ones(tokens).double()
    if case["masked"]:
        weights = torch.randint(2, (tokens,), generator=generator).double()
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    fused = fused_linear_divergence(
        hidden,
        Head(weight, rows=rows),
        teacher_hidden,
        Head(teacher_weight, rows=rows),
        divergence=case["name"],
        temperature=case["temperature"],
        labels=labels,
        hard_label_weight=case["hard_label_weight"],
        weights=weights,
        chunk_tokens=case["chunk_tokens"],
    )
    logits, teacher_logits = hidden @ weight[:rows].T, teacher_hidden @ teacher_weight[:rows].T
    soft = DIVERGENCES[case["name"]](teacher_logits, logits, temperature=case["temperature"])
    hard = F.cross_entropy(logits, labels, reduction="none")
    dense = (torch.lerp(soft, hard, case["hard_label_weight"]) * weights).sum()

    torch.testing.assert_close(fused, dense, rtol=1e-10, atol=1e-12)
    p, q = ((z / case["temperature"]).softmax(-1) for z in (logits, teacher_logits))
    if case["name"] == "total_variation" and bool(((p - q).abs() < 1e-12).any()):
        return  # its gradient jumps where p = q, and rounding decides the sign
    for ours, exact in zip(
        torch.autograd.grad(fused, leaves), torch.autograd.grad(dense, leaves), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


class _Student(torch.nn.Module):
    """A small model whose forward pass returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, 11, bias=False)

    def forward(self, inputs: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(inputs))
        return fused_linear_divergence(hidden, self.head.weight, teacher_hidden, teacher_weight)


@pytest.mark.filterwarnings("ignore")  # the warnings of torch.compile differ between versions
def test_a_compiled_model_that_contains_the_loss_gets_the_same_gradients() -> None:
    torch.manual_seed(0)
    student, inputs_and_teacher = (
        _Student(),
        (torch.randn(7, 5), torch.randn(7, 4), torch.randn(11, 4)),
    )
    gradients = []
    for model in (student, torch.compile(student, backend="aot_eager")):
        student.zero_grad()
        model(*inputs_and_teacher).backward()
        gradients.append([p.grad.clone() for p in student.parameters()])  # type: ignore[union-attr]
    for compiled, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain)
    inputs, teacher_hidden, teacher_weight = inputs_and_teacher
    dense = forward_kl(
        teacher_hidden @ teacher_weight.T, student.head(torch.tanh(student.inner(inputs)))
    ).sum()
    torch.testing.assert_close(student(*inputs_and_teacher), dense)


def test_a_token_of_weight_zero_equals_a_missing_token() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 5), torch.randn(11, 5, requires_grad=True)
    labels = torch.randint(11, (6,))
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    (masked,) = torch.autograd.grad(
        fused_linear_cross_entropy(hidden, weight, labels, weights=kept, chunk_tokens=4), weight
    )
    (absent,) = torch.autograd.grad(
        fused_linear_cross_entropy(hidden[kept > 0], weight, labels[kept > 0]), weight
    )
    torch.testing.assert_close(masked, absent)
