"""Chunked logits equal the logits of the whole matrix product; anchors reduce bfloat16 errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potstill.losses import (
    CallableHead,
    Head,
    Projection,
    fused_linear_cross_entropy,
    fused_linear_divergence,
)
from potstill.losses.projection import block_rows

N, V, H = 24, 300, 32


def sharp_pair(seed: int = 0, noise: float = 0.02) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a student close to its teacher, head and most likely tokens; logits reach 20."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(V, H, generator=generator)
    teacher = head[torch.randint(V, (N,), generator=generator)] * 0.6 + 0.3 * torch.randn(
        N, H, generator=generator
    )
    student = teacher + noise * torch.randn(N, H, generator=generator)
    teacher, student, head = (t.to(torch.bfloat16) for t in (teacher, student, head))
    return student, teacher, head, (teacher @ head.T).argmax(-1)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 24, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_equal_the_heads_for_every_chunk_size(
    chunk_tokens: int | None, dtype: torch.dtype
) -> None:
    hidden, weight = torch.randn(N, H, dtype=dtype), torch.randn(V + 9, H, dtype=dtype)
    bias = torch.randn(V + 9, dtype=dtype)
    head = Head(weight, bias, scale=0.5, softcap=3.0, rows=V)
    projection = Projection(hidden, head, chunk_tokens=chunk_tokens)
    got = torch.cat([logits.clone() for _, logits in projection.blocks()])
    expected = 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias)[:, :V] / 3.0)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0, "rows": V - 50}])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_a_callable_head_gives_the_loss_and_student_gradient_of_the_equivalent_head(
    settings: dict[str, float], chunk_tokens: int | None
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(H, V).requires_grad_(False)
    student_hidden, teacher_hidden, weight = torch.randn(N, H), torch.randn(N, H), torch.randn(V, H)
    by_module = CallableHead(linear, V, **settings)  # type: ignore[arg-type]
    by_weight = Head(linear.weight, linear.bias, **settings)  # type: ignore[arg-type]
    assert len(by_module) == len(by_weight) == settings.get("rows", V)
    student_head, results = Head(weight, rows=len(by_weight)), []
    for teacher_head in (by_module, by_weight):
        leaf = student_hidden.clone().requires_grad_()
        loss = fused_linear_divergence(
            leaf, student_head, teacher_hidden, teacher_head, chunk_tokens=chunk_tokens
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)
    assert results[0][0] > 1


def test_blocks_cover_all_positions_in_order() -> None:
    projection = Projection(torch.randn(N, H), Head(torch.randn(V, H)), chunk_tokens=7)
    blocks = [positions for positions, _ in projection.blocks()]
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(N))


def test_a_slice_may_cross_the_end_of_a_chunk() -> None:
    """Regression: of a block across the end of a chunk, only the first part was returned."""
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    projection = Projection(hidden, Head(weight), chunk_tokens=4)
    for start, stop in ((0, 3), (3, 6), (6, 7), (7, 17), (17, 24)):
        torch.testing.assert_close(
            projection.logits(slice(start, stop)), hidden[start:stop] @ weight.T
        )


def test_no_token_is_projected_twice_if_the_slices_do_not_divide_the_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the student asks for whole chunks, and the teacher's chunk may have another size."""
    projected: list[int] = []
    original = torch.mm

    def counted(a: Tensor, b: Tensor, **settings: Tensor) -> Tensor:
        projected.append(len(a))
        return original(a, b, **settings)

    monkeypatch.setattr(torch, "mm", counted)
    projection = Projection(torch.randn(N, H), Head(torch.randn(V, H)), chunk_tokens=8)
    for start in range(0, N, 6):
        projection.logits(slice(start, start + 6))
    assert sum(projected) == N


def test_the_buffer_is_smaller_for_logits_alone_than_for_gradients() -> None:
    hidden, head = torch.randn(3, 4), Head(torch.empty(50_000, 4))
    assert 4 * Projection(hidden, head).chunk <= Projection(hidden, head, gradients=True).chunk


def test_a_block_is_a_multiple_of_the_threads_and_not_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert block_rows("cpu", 10**9) == torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert block_rows("cpu", 49_152) == 6
    assert block_rows("cuda", 50_000) > 10**6


def test_anchors_make_bfloat16_logits_of_probable_tokens_more_exact() -> None:
    """Rounding after subtracting the anchor gives an error relative to log p(observed) − log p."""
    _, hidden, head, observed = sharp_pair()
    exact = hidden.double() @ head.double().T
    anchored = torch.cat(
        [z.clone() for _, z in Projection(hidden, Head(head), observed=observed).blocks()]
    )
    plain = torch.cat([z.clone() for _, z in Projection(hidden, Head(head)).blocks()])
    q = exact.softmax(-1)
    off = [(q * (z.double() - exact).abs()).sum(-1).mean() for z in (anchored, plain)]
    assert off[0] < off[1] / 10


def test_anchors_make_the_bfloat16_gradient_at_least_three_times_more_exact() -> None:
    student, teacher, head, observed = sharp_pair()
    p, q = ((hidden.double() @ head.double().T).softmax(-1) for hidden in (student, teacher))
    errors = []
    for labels in (observed, None):
        leaf = student.clone().requires_grad_()
        fused_linear_divergence(leaf, head, teacher, head, labels=labels).backward()
        assert leaf.grad is not None
        wanted = (p - q) @ head.double()
        errors.append((leaf.grad.double() - wanted).norm() / wanted.norm())
    assert errors[0] < errors[1] / 3


def test_labels_beyond_the_shared_rows_still_anchor() -> None:
    student, teacher, head, observed = sharp_pair()
    short = Head(head, rows=V - 10)
    one = fused_linear_divergence(
        student, short, teacher, short, labels=torch.full_like(observed, V - 1)
    )
    wide = Head(head.float(), rows=V - 10)
    other = fused_linear_divergence(student.float(), wide, teacher.float(), wide)
    torch.testing.assert_close(one, other, rtol=0.2, atol=0.1)


def test_weights_multiply_the_losses_of_tokens() -> None:
    hidden, head, labels = torch.randn(N, H), torch.randn(V, H), torch.randint(V, (N,))
    weights, results = torch.rand(N), []
    for parts in ([slice(0, N)], [slice(i, i + 1) for i in range(N)]):
        leaf = hidden.clone().requires_grad_()
        total = sum(
            fused_linear_cross_entropy(leaf[part], head, labels[part], weights=weights[part])
            for part in parts
        )
        total.backward()  # type: ignore[union-attr]
        results.append((total, leaf.grad))
    losses = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="none")
    torch.testing.assert_close(results[0][0], (weights * losses).sum())
    torch.testing.assert_close(results[0], results[1])
    with pytest.raises(ValueError, match="one number for each"):
        fused_linear_cross_entropy(hidden, head, labels, weights=weights[:3])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_user_defined_divergence_is_differentiated_by_autograd(temperature: float) -> None:
    def squared_hellinger(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        difference = teacher_logits.softmax(-1).sqrt() - student_logits.softmax(-1).sqrt()
        return difference.square().sum(-1) / 2

    hidden, teacher = torch.randn(2, N, H, dtype=torch.float64)
    head = torch.randn(V, H).double()
    leaf, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    fused = fused_linear_divergence(
        leaf, head, teacher, head, divergence=squared_hellinger, temperature=temperature
    )
    dense = squared_hellinger(teacher @ head.T / temperature, plain @ head.T / temperature).sum()
    fused.backward()
    dense.backward()
    torch.testing.assert_close(fused, dense)
    torch.testing.assert_close(leaf.grad, plain.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_divergence_equals_the_eager_one() -> None:
    hidden, teacher, head = torch.randn(N, H), torch.randn(N, H), torch.randn(V, H)
    results = []
    for compiled in (False, True):
        leaf = hidden.clone().requires_grad_()
        total = fused_linear_divergence(
            leaf, head, teacher, head, chunk_tokens=7, compiled=compiled
        )
        total.backward()
        results.append((total.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
