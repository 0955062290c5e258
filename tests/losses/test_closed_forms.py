"""Each closed form equals the dense divergence and its autograd gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.losses import DIVERGENCES
from potstill.losses.closed_forms import cross_entropy, finite

CLOSED_FORMS = {name: one.value_and_gradient() for name, one in DIVERGENCES.items()}

VARIANTS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in CLOSED_FORMS),
    *(("jensen_shannon", {"teacher_weight": w}) for w in (0.01, 0.9)),
    *((name, {"skew": a}) for name in ("skew_forward_kl", "skew_reverse_kl") for a in (0.01, 0.9)),
]
every_variant = pytest.mark.parametrize(("name", "divergence_parameters"), VARIANTS)


def random_logits(size: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    teacher, student = size * torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    return teacher.to(dtype), student.to(dtype)


def value_and_gradient(
    name: str, teacher: Tensor, student: Tensor, **divergence_parameters: float
) -> tuple[Tensor, Tensor]:
    """Return the closed form of copies: it may overwrite its arguments."""
    return CLOSED_FORMS[name](
        finite(teacher.clone()), finite(student.clone()), **divergence_parameters
    )


def by_autograd(
    name: str, teacher: Tensor, student: Tensor, **divergence_parameters: float
) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss = DIVERGENCES[name](teacher, student, **divergence_parameters)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def by_finite_differences(
    name: str, teacher: Tensor, student: Tensor, **divergence_parameters: float
) -> Tensor:
    """Return central differences of the closed form's value, one logit at a time."""
    step = 1e-6
    gradient = torch.zeros_like(student)
    for token in range(student.shape[-1]):
        change = torch.zeros_like(student)
        change[:, token] = step
        above, _ = value_and_gradient(name, teacher, student + change, **divergence_parameters)
        below, _ = value_and_gradient(name, teacher, student - change, **divergence_parameters)
        gradient[:, token] = (above - below) / (2 * step)
    return gradient


def test_every_divergence_has_a_closed_form() -> None:
    assert list(CLOSED_FORMS) == list(DIVERGENCES)


@every_variant
@pytest.mark.parametrize("size", [0.1, 2.0, 20.0])
def test_value_and_gradient_equal_autograd(
    name: str, divergence_parameters: dict[str, float], size: float
) -> None:
    teacher, student = random_logits(size)
    loss, gradient = value_and_gradient(name, teacher, student, **divergence_parameters)
    expected_loss, expected_gradient = by_autograd(name, teacher, student, **divergence_parameters)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    # Autograd subtracts terms of up to 100 nats, each with a relative error of 1e-16.
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


@every_variant
def test_gradient_equals_finite_differences(
    name: str, divergence_parameters: dict[str, float]
) -> None:
    teacher, student = random_logits(2.0)
    _, gradient = value_and_gradient(name, teacher, student, **divergence_parameters)
    # A step of 1e-6 leaves errors of 1e-12 (curvature) and 1e-16 · |loss| / 1e-6 (rounding).
    torch.testing.assert_close(
        gradient,
        by_finite_differences(name, teacher, student, **divergence_parameters),
        rtol=1e-6,
        atol=1e-8,
    )


@every_variant
def test_a_student_equal_to_its_teacher_has_zero_loss_and_zero_gradient(
    name: str, divergence_parameters: dict[str, float]
) -> None:
    teacher, _ = random_logits(2.0)
    loss, gradient = CLOSED_FORMS[name](teacher, teacher.clone(), **divergence_parameters)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@every_variant
def test_tokens_at_minus_infinity_in_both_equal_absent_tokens(
    name: str, divergence_parameters: dict[str, float]
) -> None:
    teacher, student = random_logits(2.0)
    absent = torch.full((6, 2), -math.inf, dtype=torch.float64)
    loss, gradient = value_and_gradient(
        name,
        torch.cat([teacher, absent], 1),
        torch.cat([student, absent], 1),
        **divergence_parameters,
    )
    cut_loss, cut_gradient = value_and_gradient(name, teacher, student, **divergence_parameters)
    torch.testing.assert_close(loss, cut_loss)
    torch.testing.assert_close(gradient[:, :9], cut_gradient)
    assert (gradient[:, 9:] == 0).all()


@every_variant
def test_a_token_impossible_for_the_student_alone_agrees_with_autograd(
    name: str, divergence_parameters: dict[str, float]
) -> None:
    teacher, student = random_logits(2.0)
    student[:, 4] = -math.inf
    loss, gradient = value_and_gradient(name, teacher, student, **divergence_parameters)
    expected_loss, expected_gradient = by_autograd(name, teacher, student, **divergence_parameters)
    torch.testing.assert_close(loss, expected_loss)
    assert (loss == math.inf).all() == (name == "forward_kl")
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", sorted(CLOSED_FORMS.keys() - {"reverse_kl"}))
def test_a_token_impossible_for_the_teacher_alone_agrees_with_autograd(name: str) -> None:
    teacher, student = random_logits(2.0)
    teacher[:, 4] = -math.inf
    loss, gradient = value_and_gradient(name, teacher, student)
    expected_loss, expected_gradient = by_autograd(name, teacher, student)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_an_underflowed_probability_and_an_impossible_token_give_a_finite_loss(name: str) -> None:
    """Regression: 0 · (−1000 + inf) made the loss NaN."""
    underflowed = torch.tensor([[0.0, 1.0, -1000.0]])
    impossible = torch.tensor([[1.0, 0.0, -math.inf]])
    loss, gradient = value_and_gradient(name, underflowed, impossible)
    torch.testing.assert_close(loss, CLOSED_FORMS[name](underflowed[:, :2], impossible[:, :2])[0])
    assert gradient.isfinite().all()


@every_variant
def test_extreme_logits_agree_in_float32_and_float64(
    name: str, divergence_parameters: dict[str, float]
) -> None:
    """Differences of hundreds between logits underflow float32's exp."""
    teacher, student = random_logits(200.0)
    loss, gradient = CLOSED_FORMS[name](teacher.float(), student.float(), **divergence_parameters)
    exact_loss, exact_gradient = CLOSED_FORMS[name](
        teacher.float().double(), student.float().double(), **divergence_parameters
    )
    # Logarithms of about 1 000 nats have an absolute error of 1e-4 in float32.
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4)


@every_variant
def test_the_helper_of_these_tests_does_not_change_its_arguments(
    name: str, divergence_parameters: dict[str, float]
) -> None:
    teacher, student = random_logits(2.0)
    before = teacher.clone(), student.clone()
    value_and_gradient(name, teacher, student, **divergence_parameters)
    assert torch.equal(torch.stack([teacher, student]), torch.stack(before))


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_an_empty_block_gives_empty_results(name: str) -> None:
    loss, gradient = CLOSED_FORMS[name](torch.zeros(0, 9), torch.zeros(0, 9))
    assert (loss.shape, gradient.shape) == ((0,), (0, 9))


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("jensen_shannon", "teacher_weight"),
        ("skew_forward_kl", "skew"),
        ("skew_reverse_kl", "skew"),
    ],
)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mixture_parameter_of_0_or_1_raises(name: str, parameter: str, value: float) -> None:
    with pytest.raises(ValueError, match=parameter):
        CLOSED_FORMS[name](*random_logits(1.0), **{parameter: value})


def test_the_gradient_of_forward_kl_is_student_minus_teacher_by_hand() -> None:
    teacher = torch.tensor([[math.log(2.0), math.log(3.0), math.log(5.0)]])
    _, gradient = CLOSED_FORMS["forward_kl"](teacher, torch.zeros(1, 3))
    torch.testing.assert_close(gradient, torch.tensor([[1 / 3 - 0.2, 1 / 3 - 0.3, 1 / 3 - 0.5]]))


def test_cross_entropy_equals_that_of_torch_in_value_and_gradient() -> None:
    _, logits = random_logits(2.0)
    logits.requires_grad_()
    labels = torch.tensor([0, 8, 3, 3, 1, 7])
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    loss, gradient = cross_entropy(labels, logits.detach())
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, expected_gradient)


def test_cross_entropy_is_forward_kl_from_a_certain_teacher() -> None:
    _, student = random_logits(2.0)
    labels = torch.tensor([0, 8, 3, 3, 1, 7])
    certain = torch.full_like(student, -math.inf).scatter(-1, labels[:, None], 0.0)
    loss, gradient = cross_entropy(labels, student)
    kl, kl_gradient = value_and_gradient("forward_kl", certain, student)
    torch.testing.assert_close(loss, kl)
    torch.testing.assert_close(gradient, kl_gradient)
