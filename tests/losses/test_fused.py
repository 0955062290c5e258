"""The fused loss equals the dense loss in value and gradient, for every chunk size and every head.

7 supervised tokens, vocabulary 11, hidden size 5 (student) and 6 (teacher). The reference is
autograd through one matrix product and the dense divergences (tested in test_divergences.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from potstill.losses import (
    DIVERGENCES,
    Head,
    forward_kl,
    fused_linear_cross_entropy,
    fused_linear_divergence,
    fused_linear_loss,
)

TOKENS, VOCABULARY, STUDENT_HIDDEN, TEACHER_HIDDEN = 7, 11, 5, 6
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
# One token, not a divisor of 7, all tokens, more than all, and the default.
every_chunk = pytest.mark.parametrize("chunk_tokens", [1, 3, TOKENS, 100, None])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, threads slow down such small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @property
    def models(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.teacher_hidden, self.teacher_weight


def random_case(dtype: torch.dtype = torch.float64, tokens: int = TOKENS, seed: int = 0) -> Case:
    """Return a case whose tensors all require gradients, the teacher's too."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.to(dtype).requires_grad_()

    weight, bias = leaf(VOCABULARY, STUDENT_HIDDEN), leaf(VOCABULARY)
    teacher_weight = leaf(VOCABULARY, TEACHER_HIDDEN)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return Case(
        leaf(tokens, STUDENT_HIDDEN),
        weight,
        bias,
        leaf(tokens, TEACHER_HIDDEN),
        teacher_weight,
        labels,
    )


def dense(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    name: str = "forward_kl",
    **options: float,
) -> Tensor:
    """Return the dense loss from all logits at once, in float32 or wider."""
    teacher_logits = teacher_hidden.detach() @ teacher_head.detach().T
    return DIVERGENCES[name](teacher_logits, hidden @ weight.T, **options).sum()


def assert_same(
    actual: Tensor,
    expected: Tensor,
    wanted: tuple[Tensor, ...],
    tolerance: float = 1e-12,
    absolute: float = 1e-14,
) -> None:
    """Compare two losses, and their gradients up to ``tolerance`` · norm + ``absolute``."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(actual, wanted)
    for gradient, exact, leaf in zip(
        gradients, torch.autograd.grad(expected, wanted), wanted, strict=True
    ):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
        error = (gradient.double() - exact.double()).norm()
        assert error <= tolerance * exact.double().norm() + absolute, error


# The loss itself.


@every_divergence
@every_chunk
def test_fused_equals_dense_in_float64(name: str, chunk_tokens: int | None) -> None:
    case = random_case()
    fused = fused_linear_divergence(*case.models, divergence=name, chunk_tokens=chunk_tokens)
    assert_same(fused, dense(*case.models, name), (case.hidden, case.weight))


@every_divergence
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5),  # epsilon 1e-7, sums of tens of terms
        # epsilon 8e-3: dense and fused both round the products and the logits' gradient
        (torch.bfloat16, 1e-2),
        (torch.float16, 2e-3),  # epsilon 1e-3
    ],
)
def test_fused_equals_dense_in_narrower_dtypes(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    case = random_case(dtype)
    fused = fused_linear_divergence(*case.models, divergence=name, chunk_tokens=3)
    assert fused.dtype == torch.float32
    assert_same(fused, dense(*case.models, name), (case.hidden, case.weight), tolerance)


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_both_logits(name: str, temperature: float) -> None:
    case = random_case()
    fused = fused_linear_divergence(
        *case.models, divergence=name, temperature=temperature, chunk_tokens=3
    )
    assert_same(
        fused, dense(*case.models, name, temperature=temperature), (case.hidden, case.weight)
    )


@every_divergence
@pytest.mark.parametrize("temperature", [1e-2, 1e2])
def test_extreme_temperatures_stay_finite_and_accurate_in_float32(
    name: str, temperature: float
) -> None:
    case = random_case(torch.float32)
    fused = fused_linear_divergence(
        *case.models, divergence=name, temperature=temperature, chunk_tokens=3
    )
    wide = [tensor.double() for tensor in case.models]
    expected = dense(*wide, name, temperature=temperature)
    # At 1e-2 the gradient is a difference of logarithms of about 500, which float32 rounds by 3e-5,
    # divided by the temperature. At 1e2, q − p is a difference of nearly equal numbers.
    assert_same(
        fused, expected, (case.hidden, case.weight), tolerance=1e-3, absolute=3e-5 / temperature
    )


@pytest.mark.parametrize(
    ("name", "divergence_parameters"),
    [
        ("jensen_shannon", {"teacher_weight": 0.2}),
        ("skew_forward_kl", {"skew": 0.4}),
        ("skew_reverse_kl", {"skew": 0.4}),
    ],
)
def test_the_divergences_own_parameter_is_used(
    name: str, divergence_parameters: dict[str, float]
) -> None:
    case = random_case()
    fused = fused_linear_divergence(
        *case.models, divergence=name, chunk_tokens=3, **divergence_parameters
    )
    assert_same(
        fused, dense(*case.models, name, **divergence_parameters), (case.hidden, case.weight)
    )


@every_divergence
def test_gradients_agree_with_finite_differences(name: str) -> None:
    case = random_case(tokens=3)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, scale=0.7, softcap=3.0, rows=9)
        teacher = Head(case.teacher_weight, rows=9)
        return fused_linear_divergence(
            hidden,
            head,
            case.teacher_hidden,
            teacher,
            divergence=name,
            temperature=1.5,
            labels=case.labels % 9,
            hard_label_weight=0.3,
            chunk_tokens=2,
        )

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias))


@every_chunk
def test_cross_entropy_equals_that_of_torch(chunk_tokens: int | None) -> None:
    case = random_case()
    fused = fused_linear_cross_entropy(
        case.hidden, case.weight, case.labels, chunk_tokens=chunk_tokens
    )
    expected = F.cross_entropy(case.hidden @ case.weight.T, case.labels, reduction="sum")
    assert_same(fused, expected, (case.hidden, case.weight))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_hard_label_weight_is_the_share_of_cross_entropy(weight: float) -> None:
    case = random_case()
    fused = fused_linear_divergence(
        *case.models, temperature=2.0, labels=case.labels, hard_label_weight=weight, chunk_tokens=3
    )
    hard = F.cross_entropy(case.hidden @ case.weight.T, case.labels, reduction="sum")
    expected = (1 - weight) * dense(*case.models, temperature=2.0) + weight * hard
    assert_same(fused, expected, (case.hidden, case.weight))


def test_fused_linear_loss_accepts_any_score() -> None:
    """The score is the sum of squared logits, multiplied by the position in the batch."""
    case = random_case()
    factor = torch.arange(TOKENS, dtype=torch.float64)

    def score(logits: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
        chosen = factor[positions]
        return chosen * logits.square().sum(-1), 2 * chosen[:, None] * logits

    fused = fused_linear_loss(case.hidden, Head(case.weight), score, chunk_tokens=3)
    expected = (factor[:, None] * (case.hidden @ case.weight.T).square()).sum()
    assert_same(fused, expected, (case.hidden, case.weight))


# Batches.


@every_divergence
def test_the_sum_over_micro_batches_equals_one_batch(name: str) -> None:
    case = random_case()
    whole = fused_linear_divergence(*case.models, divergence=name, chunk_tokens=2)
    parts = [
        fused_linear_divergence(
            case.hidden[part],
            case.weight,
            case.teacher_hidden[part],
            case.teacher_weight,
            divergence=name,
            chunk_tokens=2,
        )
        for part in (slice(0, 3), slice(3, 3), slice(3, 7))
    ]
    assert_same(torch.stack(parts).sum(), whole, (case.hidden, case.weight))


def test_a_batch_of_one_token_equals_the_dense_loss() -> None:
    case = random_case(tokens=1)
    assert_same(
        fused_linear_divergence(*case.models), dense(*case.models), (case.hidden, case.weight)
    )


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_zero_loss_and_zero_gradients(name: str, dtype: torch.dtype) -> None:
    case = random_case(dtype, tokens=0)
    head = Head(case.weight, case.bias)
    loss = fused_linear_divergence(
        case.hidden, head, case.teacher_hidden, case.teacher_weight, divergence=name
    )
    assert (loss.item(), loss.shape, loss.dtype) == (0, (), torch.float32)
    loss.backward()
    for leaf in (case.hidden, case.weight, case.bias):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_cross_entropy_of_an_empty_batch_is_zero_with_zero_gradients() -> None:
    case = random_case(tokens=0)
    loss = fused_linear_cross_entropy(case.hidden, case.weight, case.labels)
    assert loss.item() == 0
    loss.backward()
    assert case.weight.grad is not None
    assert not case.weight.grad.any()


# Heads.


def test_the_head_bias_is_added_and_gets_its_gradient() -> None:
    case = random_case()
    teacher_bias = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64, requires_grad=True)
    fused = fused_linear_divergence(
        case.hidden,
        Head(case.weight, case.bias),
        case.teacher_hidden,
        Head(case.teacher_weight, teacher_bias),
        chunk_tokens=3,
    )
    teacher_logits = F.linear(case.teacher_hidden, case.teacher_weight, teacher_bias).detach()
    expected = forward_kl(teacher_logits, F.linear(case.hidden, case.weight, case.bias)).sum()
    assert_same(fused, expected, (case.hidden, case.weight, case.bias))


@pytest.mark.parametrize(("scale", "softcap"), [(0.25, None), (1.0, 2.0), (3.0, 2.0)])
def test_scale_is_applied_before_softcap_and_both_are_differentiated(
    scale: float, softcap: float | None
) -> None:
    case = random_case()

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = F.linear(hidden, weight, bias) * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    fused = fused_linear_divergence(
        case.hidden,
        Head(case.weight, case.bias, scale, softcap),
        case.teacher_hidden,
        Head(case.teacher_weight, None, scale, softcap),
        chunk_tokens=3,
    )
    teacher_logits = plain(case.teacher_hidden, case.teacher_weight).detach()
    expected = forward_kl(teacher_logits, plain(case.hidden, case.weight, case.bias)).sum()
    assert_same(fused, expected, (case.hidden, case.weight, case.bias))


@every_divergence
def test_vocabulary_rows_beyond_the_cut_are_absent_and_get_zero_gradient(name: str) -> None:
    case = random_case()
    fused = fused_linear_divergence(
        case.hidden,
        Head(case.weight, case.bias, rows=8),
        case.teacher_hidden,
        Head(case.teacher_weight, rows=8),
        divergence=name,
        chunk_tokens=3,
    )
    teacher_logits = case.teacher_hidden.detach() @ case.teacher_weight.detach()[:8].T
    expected = DIVERGENCES[name](
        teacher_logits, F.linear(case.hidden, case.weight[:8], case.bias[:8])
    ).sum()
    assert_same(fused, expected, (case.hidden, case.weight, case.bias))


def test_heads_of_two_sizes_are_compared_on_their_shared_rows() -> None:
    case = random_case()
    padded = torch.cat([case.teacher_weight, torch.zeros(4, TEACHER_HIDDEN, dtype=torch.float64)])
    fused = fused_linear_divergence(
        case.hidden, case.weight, case.teacher_hidden, Head(padded, rows=VOCABULARY), chunk_tokens=3
    )
    assert_same(fused, dense(*case.models), (case.hidden, case.weight))


@every_divergence
def test_a_bias_of_minus_infinity_in_both_heads_equals_a_cut(name: str) -> None:
    case = random_case()
    mask = torch.zeros(VOCABULARY, dtype=torch.float64)
    mask[8:] = -math.inf
    teacher = Head(case.teacher_weight, mask)
    masked = fused_linear_divergence(
        case.hidden, Head(case.weight, mask), case.teacher_hidden, teacher, divergence=name
    )
    cut = fused_linear_divergence(
        case.hidden,
        Head(case.weight, rows=8),
        case.teacher_hidden,
        Head(case.teacher_weight, rows=8),
        divergence=name,
    )
    assert_same(masked, cut, (case.hidden, case.weight))


def test_gradients_of_a_tied_weight_add_up() -> None:
    """The weight is also the embedding: its gradient is the sum of both uses."""
    case = random_case()
    ids = torch.tensor([1, 4, 4, 0, 10, 2, 7])
    hidden = torch.tanh(F.embedding(ids, case.weight))
    fused = fused_linear_divergence(
        hidden, case.weight, case.teacher_hidden, case.teacher_weight, chunk_tokens=3
    )
    plain = dense(
        torch.tanh(F.embedding(ids, case.weight)),
        case.weight,
        case.teacher_hidden,
        case.teacher_weight,
    )
    assert_same(fused, plain, (case.weight,))


def test_the_teacher_gets_no_gradient() -> None:
    case = random_case()
    fused_linear_divergence(*case.models).backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_weight.grad is None
    assert case.hidden.grad is not None
    assert case.weight.grad is not None


def test_a_frozen_head_gets_no_gradient_but_the_hidden_states_do() -> None:
    case = random_case()
    case.weight.requires_grad_(False)
    fused_linear_divergence(*case.models).backward()
    assert case.weight.grad is None
    (expected,) = torch.autograd.grad(dense(*case.models), case.hidden)
    torch.testing.assert_close(case.hidden.grad, expected)


def test_the_head_gets_its_gradient_if_the_hidden_states_need_none() -> None:
    case = random_case()
    case.hidden.requires_grad_(False)
    fused_linear_divergence(*case.models).backward()
    assert case.hidden.grad is None
    (expected,) = torch.autograd.grad(dense(*case.models), case.weight)
    torch.testing.assert_close(case.weight.grad, expected)


def test_without_trainable_tensors_the_loss_has_no_graph() -> None:
    case = random_case()
    case.hidden.requires_grad_(False), case.weight.requires_grad_(False)
    loss = fused_linear_divergence(*case.models)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, dense(*case.models))


# FLOPs.

STUDENT_PRODUCT = 2 * TOKENS * VOCABULARY * STUDENT_HIDDEN
TEACHER_PRODUCT = 2 * TOKENS * VOCABULARY * TEACHER_HIDDEN


def flops(call: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = call()
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


def test_the_cost_is_three_student_products_and_one_teacher_product() -> None:
    case = random_case()
    work = flops(lambda: fused_linear_divergence(*case.models, chunk_tokens=3))
    assert work == 3 * STUDENT_PRODUCT + TEACHER_PRODUCT


def test_a_frozen_head_costs_no_weight_gradient() -> None:
    case = random_case()
    case.weight.requires_grad_(False)
    work = flops(lambda: fused_linear_divergence(*case.models, chunk_tokens=3))
    assert work == 2 * STUDENT_PRODUCT + TEACHER_PRODUCT


def test_under_no_grad_only_logits_are_computed() -> None:
    """Regression: under no_grad the gradients were computed and then discarded."""
    case = random_case()
    with torch.no_grad():
        work = flops(lambda: fused_linear_divergence(*case.models, chunk_tokens=3))
        torch.testing.assert_close(fused_linear_divergence(*case.models), dense(*case.models))
    assert work == STUDENT_PRODUCT + TEACHER_PRODUCT


def test_no_tensor_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case()
    shapes: list[tuple[int, ...]] = []
    to_logits = Head.to_logits

    def recorded(head: Head, product: Tensor) -> Tensor:
        shapes.append(tuple(product.shape))
        return to_logits(head, product)

    monkeypatch.setattr(Head, "to_logits", recorded)
    fused_linear_divergence(*case.models, chunk_tokens=3)
    assert shapes == [(3, VOCABULARY)] * 4 + [(1, VOCABULARY)] * 2


# Backward.


@pytest.mark.parametrize("factor", [3.0, -1.0, 0.0])
def test_the_incoming_gradient_scales_every_gradient(factor: float) -> None:
    case = random_case()
    head = Head(case.weight, case.bias)
    leaves = case.hidden, case.weight, case.bias
    models = case.hidden, head, case.teacher_hidden, case.teacher_weight
    plain = torch.autograd.grad(fused_linear_divergence(*models), leaves)
    scaled = torch.autograd.grad(fused_linear_divergence(*models) * factor, leaves)
    for gradient, scaled_gradient in zip(plain, scaled, strict=True):
        torch.testing.assert_close(scaled_gradient, gradient * factor)


def test_a_loss_scale_beyond_float16_gives_finite_gradients() -> None:
    """Regression: GradScaler's initial scale 65 536 is infinite in float16, and 0 · inf is NaN."""
    case = random_case(torch.float16)
    # So flat distributions have gradients that stay below float16's 65 504 when scaled.
    nearly_flat = case.weight * 1e-2, case.teacher_hidden, case.teacher_weight * 1e-2
    loss = fused_linear_divergence(case.hidden, *nearly_flat)
    for gradient in torch.autograd.grad(loss * 2.0**16, (case.hidden, case.weight)):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_backward_runs_twice_on_a_retained_graph() -> None:
    case = random_case()
    loss = fused_linear_divergence(*case.models)
    (first,) = torch.autograd.grad(loss, case.hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, case.hidden)
    assert torch.equal(first, second)


def test_gradients_are_scaled_in_place_unless_the_graph_is_retained() -> None:
    """A copy of the weight gradient would be the largest tensor of a step."""
    case = random_case()
    loss = fused_linear_divergence(*case.models) / 3
    fused = loss.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    stored = fused.saved_tensors[1].data_ptr()
    (kept,) = torch.autograd.grad(loss, case.weight, retain_graph=True)
    (given,) = torch.autograd.grad(loss, case.weight)
    assert given.data_ptr() == stored != kept.data_ptr()
    assert torch.equal(kept, given)


def test_differentiating_twice_raises() -> None:
    """Regression: a constant incoming gradient gave a derivative without a graph and no error."""
    case = random_case()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(fused_linear_divergence(*case.models), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(
            fused_linear_divergence(*case.models).square(), case.hidden, create_graph=True
        )


def test_a_label_beyond_the_shared_rows_gets_the_divergence_alone() -> None:
    """Regression: a token that only the student has was looked up out of range."""
    case = random_case()
    student, teacher = (Head(w, rows=VOCABULARY - 2) for w in (case.weight, case.teacher_weight))
    labels = case.labels.clamp(max=VOCABULARY - 3)
    beyond = labels.clone()
    beyond[0] = VOCABULARY - 1
    models = case.hidden, student, case.teacher_hidden, teacher
    together = fused_linear_divergence(*models, labels=beyond, hard_label_weight=0.4)
    first = (case.hidden[:1], student, case.teacher_hidden[:1], teacher)
    rest = (case.hidden[1:], student, case.teacher_hidden[1:], teacher)
    apart = fused_linear_divergence(*first) + fused_linear_divergence(
        *rest, labels=labels[1:], hard_label_weight=0.4
    )
    assert_same(together, apart, (case.hidden, case.weight))


# Precision.


@every_divergence
def test_bfloat16_autocast_with_float32_weights_stays_close_to_float32(name: str) -> None:
    case = random_case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fused_linear_divergence(*case.models, divergence=name, chunk_tokens=3)
    assert fused.dtype == torch.float32
    # Hidden states, weights, logits and the logits' gradient are each rounded by up to 0.4 %. So a
    # logit of 6 moves by 0.02, and total variation's gradient changes sign where q is close to p.
    assert_same(fused, dense(*case.models, name), (case.hidden, case.weight), 5e-2)


@every_divergence
def test_autocast_rounds_the_matrix_products_only(name: str) -> None:
    """Regression: it also rounded dot products of logits, a 2 % error in reverse KL's gradient."""
    case = random_case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fused_linear_divergence(*case.models, divergence=name)
    leaf = case.hidden.detach().bfloat16().requires_grad_()
    plain = fused_linear_divergence(
        leaf, *(tensor.bfloat16() for tensor in case.models[1:]), divergence=name
    )
    torch.testing.assert_close(cast, plain)
    (cast_gradient,), (gradient,) = (
        torch.autograd.grad(cast, case.hidden),
        torch.autograd.grad(plain, leaf),
    )
    torch.testing.assert_close(cast_gradient.bfloat16(), gradient)


def test_autocast_accepts_bfloat16_hidden_states_and_a_float32_head() -> None:
    """A transformer under autocast returns bfloat16 hidden states; its head weight is float32."""
    case = random_case(torch.float32)
    hidden = case.hidden.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_divergence(
            hidden, case.weight, case.teacher_hidden.bfloat16(), case.teacher_weight
        )
    assert_same(loss, dense(*case.models), (case.hidden, case.weight), 5e-2)


def test_weight_gradients_of_many_bfloat16_chunks_are_summed_in_float32() -> None:
    """A bfloat16 sum stops growing at 256 times the size of its terms."""
    one = random_case(torch.bfloat16, tokens=1)
    many = 600
    loss = fused_linear_divergence(
        one.hidden.expand(many, -1),
        one.weight,
        one.teacher_hidden.expand(many, -1),
        one.teacher_weight,
        chunk_tokens=1,
    )
    (gradient,) = torch.autograd.grad(loss, one.weight)
    (single,) = torch.autograd.grad(fused_linear_divergence(*one.models), one.weight)
    torch.testing.assert_close(gradient.float(), many * single.float(), rtol=1e-2, atol=0.0)


def test_float16_hidden_states_give_finite_loss_and_gradients() -> None:
    case = random_case(torch.float16)
    loss = fused_linear_divergence(
        case.hidden * 20, case.weight * 20, case.teacher_hidden * 20, case.teacher_weight * 20
    )
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, (case.hidden, case.weight)):
        assert gradient.isfinite().all()


def test_a_bfloat16_teacher_and_a_float32_student_are_compared_in_float32() -> None:
    case = random_case(torch.float32)
    teacher_hidden, teacher_weight = case.teacher_hidden.bfloat16(), case.teacher_weight.bfloat16()
    fused = fused_linear_divergence(
        case.hidden, case.weight, teacher_hidden, teacher_weight, chunk_tokens=3
    )
    expected = dense(case.hidden, case.weight, teacher_hidden, teacher_weight)
    assert_same(fused, expected, (case.hidden, case.weight), 1e-5)


# Errors.


def test_an_unknown_divergence_raises_with_the_known_names() -> None:
    with pytest.raises(ValueError, match="forward_kl, reverse_kl"):
        fused_linear_divergence(*random_case().models, divergence="kl")


def test_heads_of_unequal_rows_raise() -> None:
    case = random_case()
    with pytest.raises(ValueError, match="8 rows and teacher head 11"):
        fused_linear_divergence(
            case.hidden, Head(case.weight, rows=8), case.teacher_hidden, case.teacher_weight
        )


def test_hidden_states_of_unequal_tokens_raise() -> None:
    case = random_case()
    with pytest.raises(ValueError, match="7 tokens and teacher_hidden 6"):
        fused_linear_divergence(
            case.hidden, case.weight, case.teacher_hidden[1:], case.teacher_weight
        )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_a_temperature_that_is_not_positive_raises(temperature: float, tokens: int) -> None:
    with pytest.raises(ValueError, match="temperature"):
        fused_linear_divergence(*random_case(tokens=tokens).models, temperature=temperature)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mixture_parameter_of_0_or_1_raises(value: float) -> None:
    case = random_case()
    with pytest.raises(ValueError, match="teacher_weight"):
        fused_linear_divergence(*case.models, divergence="jensen_shannon", teacher_weight=value)
    with pytest.raises(ValueError, match="skew"):
        fused_linear_divergence(*case.models, divergence="skew_reverse_kl", skew=value)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_hard_label_weight_outside_the_unit_interval_raises(weight: float) -> None:
    case = random_case()
    with pytest.raises(ValueError, match="hard_label_weight"):
        fused_linear_divergence(*case.models, labels=case.labels, hard_label_weight=weight)


def test_a_hard_label_weight_without_labels_raises() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        fused_linear_divergence(*random_case().models, hard_label_weight=0.5)


@pytest.mark.parametrize(
    "labels", [torch.tensor([3]), torch.zeros(TOKENS + 1, dtype=torch.long), torch.tensor(3)]
)
def test_labels_of_another_length_than_the_hidden_states_raise(labels: Tensor) -> None:
    """Regression: one label was broadcast, extra labels were dropped, both without an error."""
    case = random_case()
    with pytest.raises(ValueError, match="one id for each of the 7"):
        fused_linear_divergence(*case.models, labels=labels, hard_label_weight=0.5)
    with pytest.raises(ValueError, match="one id for each of the 7"):
        fused_linear_cross_entropy(case.hidden, case.weight, labels)


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_a_chunk_size_below_one_raises(chunk_tokens: int) -> None:
    """Regression: a negative chunk size gave an empty loop and a loss of 0."""
    with pytest.raises(ValueError, match="chunk_tokens"):
        fused_linear_divergence(*random_case().models, chunk_tokens=chunk_tokens)
