"""The six divergences equal sums over three tokens in plain Python and satisfy their identities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.losses import (
    DIVERGENCES,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from potstill.losses.divergences import mix_log_probabilities

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
Distribution = tuple[float, ...]

# Over three tokens: similar, different, one nearly certain, both without the third token.
PAIRS: list[tuple[Distribution, Distribution]] = [
    ((0.2, 0.3, 0.5), (0.25, 0.25, 0.5)),
    ((0.7, 0.2, 0.1), (0.1, 0.2, 0.7)),
    ((0.001, 0.998, 0.001), (0.3, 0.3, 0.4)),
    ((0.5, 0.5, 0.0), (0.1, 0.9, 0.0)),
]


def logits_of(probabilities: Distribution) -> Tensor:
    """Return logits of these probabilities, shifted: the functions must normalize them."""
    return torch.tensor(
        [[math.log(x) + 1.7 if x else -math.inf for x in probabilities]], dtype=torch.float64
    )


def random_logits(
    tokens: int = 5, vocabulary: int = 7, seed: int = 0, size: float = 2.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, vocabulary)
    teacher = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    student = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    return teacher, student


def student_gradient(
    name: str, teacher_logits: Tensor, student_logits: Tensor, **options: float
) -> Tensor:
    student_logits = student_logits.clone().requires_grad_()
    DIVERGENCES[name](teacher_logits, student_logits, **options).sum().backward()
    assert student_logits.grad is not None
    return student_logits.grad


def kl_by_hand(q: Distribution, p: Distribution) -> float:
    return sum(x * math.log(x / y) for x, y in zip(q, p, strict=True) if x > 0)


def mixture_by_hand(q: Distribution, p: Distribution, weight: float) -> Distribution:
    return tuple(weight * x + (1 - weight) * y for x, y in zip(q, p, strict=True))


def entropy_by_hand(q: Distribution) -> float:
    return sum(x * math.log(1 / x) for x in q if x > 0)


def jensen_shannon_by_hand(q: Distribution, p: Distribution, weight: float) -> float:
    """Return the entropy that mixing adds: another formula for the same number."""
    mixed = entropy_by_hand(mixture_by_hand(q, p, weight))
    return mixed - weight * entropy_by_hand(q) - (1 - weight) * entropy_by_hand(p)


def total_variation_by_hand(q: Distribution, p: Distribution) -> float:
    """Return the largest difference in probability over all eight events."""
    events = itertools.product((0, 1), repeat=len(q))
    return max(sum(e * (x - y) for e, x, y in zip(event, q, p, strict=True)) for event in events)


BY_HAND: dict[str, Callable[[Distribution, Distribution], float]] = {
    "forward_kl": kl_by_hand,
    "reverse_kl": lambda q, p: kl_by_hand(p, q),
    "jensen_shannon": lambda q, p: jensen_shannon_by_hand(q, p, 0.5),
    "skew_forward_kl": lambda q, p: kl_by_hand(q, mixture_by_hand(q, p, 0.1)),
    "skew_reverse_kl": lambda q, p: kl_by_hand(p, mixture_by_hand(p, q, 0.1)),
    "total_variation": total_variation_by_hand,
}


@every_divergence
@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_value_equals_a_sum_over_three_tokens_by_hand(
    name: str, q: Distribution, p: Distribution
) -> None:
    value = DIVERGENCES[name](logits_of(q), logits_of(p)).item()
    assert value == pytest.approx(BY_HAND[name](q, p), abs=1e-14)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_weight_and_skew_have_the_documented_meaning(
    q: Distribution, p: Distribution, weight: float
) -> None:
    teacher, student = logits_of(q), logits_of(p)
    assert jensen_shannon(teacher, student, teacher_weight=weight).item() == pytest.approx(
        jensen_shannon_by_hand(q, p, weight), abs=1e-14
    )
    assert skew_forward_kl(teacher, student, skew=weight).item() == pytest.approx(
        kl_by_hand(q, mixture_by_hand(q, p, weight)), abs=1e-14
    )
    assert skew_reverse_kl(teacher, student, skew=weight).item() == pytest.approx(
        kl_by_hand(p, mixture_by_hand(p, q, weight)), abs=1e-14
    )


@every_divergence
def test_a_student_equal_to_its_teacher_has_zero_loss_and_zero_gradient(name: str) -> None:
    teacher, _ = random_logits()
    torch.testing.assert_close(
        DIVERGENCES[name](teacher, teacher), torch.zeros(5, dtype=torch.float64)
    )
    torch.testing.assert_close(student_gradient(name, teacher, teacher), torch.zeros_like(teacher))


@every_divergence
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_no_divergence_is_negative(name: str, size: float) -> None:
    assert (DIVERGENCES[name](*random_logits(tokens=50, size=size)) >= -1e-15).all()


@every_divergence
def test_the_loss_of_a_token_does_not_depend_on_other_tokens(name: str) -> None:
    teacher, student = random_logits()
    together = DIVERGENCES[name](teacher, student)
    alone = [DIVERGENCES[name](teacher[i : i + 1], student[i : i + 1]) for i in range(len(teacher))]
    assert together.shape == (5,)
    torch.testing.assert_close(together, torch.cat(alone))


@every_divergence
def test_the_arguments_are_named_teacher_logits_and_student_logits(name: str) -> None:
    q, p = PAIRS[2]
    value = DIVERGENCES[name](teacher_logits=logits_of(q), student_logits=logits_of(p)).item()
    assert value == pytest.approx(BY_HAND[name](q, p), abs=1e-14)


def test_jensen_shannon_is_symmetric_at_one_half_and_at_most_log_two() -> None:
    teacher, student = random_logits(tokens=50, size=20.0)
    value = jensen_shannon(teacher, student)
    torch.testing.assert_close(value, jensen_shannon(student, teacher))
    assert (value <= math.log(2) + 1e-12).all()


def test_jensen_shannon_of_disjoint_distributions_is_log_two() -> None:
    value = jensen_shannon(logits_of((1.0, 0.0, 0.0)), logits_of((0.0, 0.5, 0.5)))
    assert value.item() == pytest.approx(math.log(2))


def test_total_variation_satisfies_pinskers_inequality() -> None:
    teacher, student = random_logits(tokens=200, size=1.0)
    variation = total_variation(teacher, student)
    assert (variation <= (forward_kl(teacher, student) / 2).sqrt()).all()
    assert (variation <= (reverse_kl(teacher, student) / 2).sqrt()).all()
    assert (variation <= 1).all()


def test_jensen_shannon_tends_to_forward_kl_and_to_reverse_kl() -> None:
    teacher, student = random_logits(size=1.0)
    tiny = 1e-7
    near_zero = jensen_shannon(teacher, student, teacher_weight=tiny) / tiny
    near_one = jensen_shannon(teacher, student, teacher_weight=1 - tiny) / tiny
    # The next term of the expansion is of order w · χ²; χ² stays below 100 here.
    torch.testing.assert_close(near_zero, forward_kl(teacher, student), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(near_one, reverse_kl(teacher, student), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skew", [0.01, 0.1, 0.5, 0.9])
def test_skew_divergences_never_exceed_minus_log_skew(skew: float) -> None:
    teacher, student = random_logits(tokens=50, size=100.0)
    disjoint = logits_of((1.0, 0.0, 0.0)), logits_of((0.0, 0.5, 0.5))
    for divergence in (skew_forward_kl, skew_reverse_kl):
        assert (divergence(teacher, student, skew=skew) <= -math.log(skew) + 1e-12).all()
        assert divergence(*disjoint, skew=skew).item() == pytest.approx(-math.log(skew))


@every_divergence
def test_autograd_agrees_with_finite_differences(name: str) -> None:
    teacher, student = random_logits(tokens=2, vocabulary=4)
    assert torch.autograd.gradcheck(DIVERGENCES[name], (teacher, student.requires_grad_()))


@every_divergence
def test_temperature_divides_both_logits_and_does_not_multiply_the_loss(name: str) -> None:
    teacher, student = random_logits()
    torch.testing.assert_close(
        DIVERGENCES[name](teacher, student, temperature=4.0),
        DIVERGENCES[name](teacher / 4, student / 4),
    )


def test_the_loss_has_no_factor_of_temperature_squared() -> None:
    """At temperature 2 the odds 9 : 1 become 3 : 1, and the loss is the KL of these."""
    teacher, student = torch.tensor([[math.log(9.0), 0.0]]), torch.zeros(1, 2)
    expected = kl_by_hand((0.75, 0.25), (0.5, 0.5))
    assert forward_kl(teacher, student, temperature=2.0).item() == pytest.approx(expected, abs=1e-6)


@every_divergence
@pytest.mark.parametrize("temperature", [1e-2, 1e2])
def test_extreme_temperatures_stay_finite_and_accurate_in_float32(
    name: str, temperature: float
) -> None:
    teacher, student = (logits.float() for logits in random_logits())
    value = DIVERGENCES[name](teacher, student, temperature=temperature)
    exact = DIVERGENCES[name](teacher.double(), student.double(), temperature=temperature)
    # At 1e2 the loss is a difference of nearly equal logarithms of about 2: an error of 1e-7.
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    assert student_gradient(name, teacher, student, temperature=temperature).isfinite().all()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    teacher, student = (logits.to(dtype) for logits in random_logits())
    value = DIVERGENCES[name](teacher, student)
    assert value.dtype == torch.float32
    assert torch.equal(value, DIVERGENCES[name](teacher.float(), student.float()))


@every_divergence
def test_logits_of_two_dtypes_are_computed_in_the_wider_one(name: str) -> None:
    teacher, student = random_logits()
    assert DIVERGENCES[name](teacher.bfloat16(), student).dtype == torch.float64
    assert DIVERGENCES[name](teacher.bfloat16(), student.float()).dtype == torch.float32


@every_divergence
def test_tokens_at_minus_infinity_in_both_equal_absent_tokens(name: str) -> None:
    teacher, student = random_logits()
    absent = torch.full((5, 2), -math.inf, dtype=torch.float64)
    padded = torch.cat([teacher, absent], dim=1), torch.cat([student, absent], dim=1)
    gradient = student_gradient(name, *padded)
    torch.testing.assert_close(DIVERGENCES[name](*padded), DIVERGENCES[name](teacher, student))
    torch.testing.assert_close(gradient[:, :7], student_gradient(name, teacher, student))
    assert (gradient[:, 7:] == 0).all()


@pytest.mark.parametrize("name", sorted(DIVERGENCES.keys() - {"forward_kl"}))
def test_a_token_impossible_for_the_student_alone_gives_finite_loss_and_gradient(
    name: str,
) -> None:
    teacher, student = logits_of((0.2, 0.3, 0.5)), logits_of((0.5, 0.5, 0.0))
    assert DIVERGENCES[name](teacher, student).isfinite().all()
    assert student_gradient(name, teacher, student).isfinite().all()


def test_forward_kl_is_infinite_where_only_the_teacher_has_mass() -> None:
    assert forward_kl(logits_of((0.2, 0.3, 0.5)), logits_of((0.5, 0.5, 0.0))).item() == math.inf
    assert reverse_kl(logits_of((0.5, 0.5, 0.0)), logits_of((0.2, 0.3, 0.5))).item() == math.inf


@every_divergence
def test_an_underflowed_probability_and_an_impossible_token_give_a_finite_loss(name: str) -> None:
    """Regression: exp(−1000) is 0, its logarithm is finite, and 0 · (−1000 + inf) is NaN."""
    underflowed = torch.tensor([[0.0, 1.0, -1000.0]])
    impossible = torch.tensor([[1.0, 0.0, -math.inf]])
    plain = DIVERGENCES[name](underflowed[:, :2], impossible[:, :2])
    torch.testing.assert_close(DIVERGENCES[name](underflowed, impossible), plain)
    assert not DIVERGENCES[name](impossible, underflowed).isnan().any()
    assert student_gradient(name, underflowed, impossible).isfinite().all()


@every_divergence
def test_an_empty_batch_gives_an_empty_loss_and_an_empty_gradient(name: str) -> None:
    student = torch.zeros(0, 7, requires_grad=True)
    value = DIVERGENCES[name](torch.zeros(0, 7), student)
    assert value.shape == (0,)
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (0, 7)


@every_divergence
def test_logits_of_two_shapes_raise(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(5, 7\).*\(5, 8\)"):
        DIVERGENCES[name](torch.zeros(5, 7), torch.zeros(5, 8))
    with pytest.raises(ValueError, match="shape"):
        DIVERGENCES[name](torch.zeros(1, 7), torch.zeros(5, 7))


@every_divergence
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_raises(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        DIVERGENCES[name](*random_logits(), temperature=temperature)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan])
@pytest.mark.parametrize(
    ("divergence", "parameter"),
    [(jensen_shannon, "teacher_weight"), (skew_forward_kl, "skew"), (skew_reverse_kl, "skew")],
)
def test_a_mixture_parameter_outside_the_open_unit_interval_raises(
    divergence: Callable[..., Tensor], parameter: str, value: float
) -> None:
    with pytest.raises(ValueError, match=parameter):
        divergence(*random_logits(), **{parameter: value})


@every_divergence
def test_merging_tokens_into_cells_never_increases_the_divergence(name: str) -> None:
    teacher, student = random_logits(tokens=50)
    cells = [[0, 3], [1], [2, 4, 5, 6]]

    def merged(logits: Tensor) -> Tensor:
        return torch.stack([logits[:, cell].logsumexp(-1) for cell in cells], dim=-1)

    coarse = DIVERGENCES[name](merged(teacher), merged(student))
    assert (coarse <= DIVERGENCES[name](teacher, student) + 1e-12).all()


@every_divergence
def test_renumbering_the_vocabulary_changes_nothing(name: str) -> None:
    teacher, student = random_logits()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(
        DIVERGENCES[name](teacher[:, order], student[:, order]), DIVERGENCES[name](teacher, student)
    )


@every_divergence
@settings(deadline=None, max_examples=25)
@given(
    teacher_constant=st.floats(-1e3, 1e3),
    student_constant=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**31 - 1),
)
def test_adding_a_constant_to_the_logits_changes_nothing(
    name: str, teacher_constant: float, student_constant: float, seed: int
) -> None:
    teacher, student = random_logits(tokens=2, vocabulary=4, seed=seed)
    # Adding 1e3 to a logit loses three of float64's sixteen digits.
    torch.testing.assert_close(
        DIVERGENCES[name](teacher + teacher_constant, student + student_constant),
        DIVERGENCES[name](teacher, student),
        rtol=1e-10,
        atol=1e-11,
    )


@every_divergence
def test_student_gradients_sum_to_zero_over_the_vocabulary(name: str) -> None:
    gradient = student_gradient(name, *random_logits())
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5, dtype=torch.float64))


def test_the_mixture_of_two_zero_probabilities_is_zero_with_zero_gradient() -> None:
    log_a = torch.tensor([0.0, -math.inf, -math.inf], dtype=torch.float64, requires_grad=True)
    log_b = torch.tensor([-math.inf, 0.0, -math.inf], dtype=torch.float64)
    mixed = mix_log_probabilities(log_a, log_b, 0.25)
    torch.testing.assert_close(mixed.exp(), torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(mixed.exp().sum(), log_a)
    torch.testing.assert_close(gradient, torch.tensor([0.25, 0.0, 0.0], dtype=torch.float64))
