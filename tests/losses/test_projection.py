"""Logits on demand: the same whatever the chunk, and in half precision far nearer the truth when anchored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potstill.losses import Head, Projection, fused_linear_cross_entropy, fused_linear_divergence
from potstill.losses.projection import block_rows

N, V, H = 24, 300, 32


def sharp_pair(seed: int = 0, noise: float = 0.02) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states whose logits reach 20, a student that is nearly its teacher, and the tokens that the teacher prefers."""
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
def test_logits_are_the_heads_whatever_the_chunk(
    chunk_tokens: int | None, dtype: torch.dtype
) -> None:
    hidden, weight, bias = (
        torch.randn(N, H, dtype=dtype),
        torch.randn(V + 9, H, dtype=dtype),
        torch.randn(V + 9, dtype=dtype),
    )
    head = Head(weight, bias, scale=0.5, softcap=3.0, rows=V)
    got = torch.cat(
        [
            logits.clone()
            for _, logits in Projection(hidden, head, chunk_tokens=chunk_tokens).blocks()
        ]
    )
    expected = 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias)[:, :V] / 3.0)
    torch.testing.assert_close(got, expected)


def test_blocks_follow_one_another_without_gap() -> None:
    rows = [
        rows
        for rows, _ in Projection(
            torch.randn(N, H), Head(torch.randn(V, H)), chunk_tokens=7
        ).blocks()
    ]
    assert [i for block in rows for i in range(block.start, block.stop)] == list(range(N))


def test_whoever_asks_need_not_know_where_a_chunk_ends() -> None:
    """Regression: of a block that lay across the end of the teacher's chunk, only the rows before it came."""
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    projection = Projection(hidden, Head(weight), chunk_tokens=4)
    for start, stop in ((0, 3), (3, 6), (6, 7), (7, 17), (17, 24)):
        torch.testing.assert_close(
            projection.logits(slice(start, stop)), hidden[start:stop] @ weight.T
        )


def test_nothing_is_projected_twice_where_blocks_and_chunks_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the student's block is a whole chunk, and of a wider teacher a chunk has other tokens."""
    projected: list[int] = []
    original = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **more: projected.append(len(a)) or original(a, b, **more)
    )
    projection = Projection(torch.randn(N, H), Head(torch.randn(V, H)), chunk_tokens=8)
    for start in range(0, N, 6):
        projection.logits(slice(start, start + 6))
    assert sum(projected) == N


def test_logits_alone_take_less_room_than_gradients() -> None:
    hidden, head = torch.randn(3, 4), Head(torch.empty(50_000, 4))
    assert 4 * Projection(hidden, head).chunk <= Projection(hidden, head, gradients=True).chunk


def test_a_block_has_as_many_rows_for_each_thread_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert block_rows("cpu", 10**9) == torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert block_rows("cpu", 49_152) == 6
    assert block_rows("cuda", 50_000) > 10**6


def test_anchored_bfloat16_logits_are_exact_where_the_probability_is() -> None:
    """Rounded after the anchor is taken off: an error relative to log p(observed) − log p, not to the logit."""
    _, hidden, head, observed = sharp_pair()
    exact = hidden.double() @ head.double().T
    anchored = torch.cat(
        [z.clone() for _, z in Projection(hidden, Head(head), observed=observed).blocks()]
    )
    plain = torch.cat([z.clone() for _, z in Projection(hidden, Head(head)).blocks()])
    q = exact.softmax(-1)
    off = [(q * (z.double() - exact).abs()).sum(-1).mean() for z in (anchored, plain)]
    assert off[0] < off[1] / 10


def test_anchors_make_the_bfloat16_gradient_several_times_more_exact() -> None:
    student, teacher, head, observed = sharp_pair()
    exact = (student.double() @ head.double().T).softmax(-1) - (
        teacher.double() @ head.double().T
    ).softmax(-1)
    errors = []
    for labels in (observed, None):
        leaf = student.clone().requires_grad_()
        fused_linear_divergence(leaf, head, teacher, head, labels=labels).backward()
        assert leaf.grad is not None
        wanted = exact @ head.double()
        errors.append((leaf.grad.double() - wanted).norm() / wanted.norm())
    assert errors[0] < errors[1] / 3


def test_labels_beyond_the_shared_rows_still_anchor() -> None:
    student, teacher, head, observed = sharp_pair()
    short = Head(head, rows=V - 10)
    one = fused_linear_divergence(
        student, short, teacher, short, labels=torch.full_like(observed, V - 1)
    )
    other = fused_linear_divergence(
        student.float(),
        Head(head.float(), rows=V - 10),
        teacher.float(),
        Head(head.float(), rows=V - 10),
    )
    torch.testing.assert_close(one, other, rtol=0.2, atol=0.1)


def test_weights_multiply_tokens() -> None:
    hidden, head, labels, weights = (
        torch.randn(N, H),
        torch.randn(V, H),
        torch.randint(V, (N,)),
        torch.rand(N),
    )
    results = []
    for parts in (
        [(slice(0, N), weights)],
        [(slice(i, i + 1), weights[i : i + 1]) for i in range(N)],
    ):
        leaf = hidden.clone().requires_grad_()
        total = sum(
            fused_linear_cross_entropy(leaf[rows], head, labels[rows], weights=w)
            for rows, w in parts
        )
        total.backward()  # type: ignore[union-attr]
        results.append((total, leaf.grad))
    expected = (
        weights * torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="none")
    ).sum()
    torch.testing.assert_close(results[0][0], expected)
    torch.testing.assert_close(results[0], results[1])
    with pytest.raises(ValueError, match="one number for each"):
        fused_linear_cross_entropy(hidden, head, labels, weights=weights[:3])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_divergence_of_ones_own_is_differentiated_by_autograd(temperature: float) -> None:
    def squared_hellinger(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return (teacher_logits.softmax(-1).sqrt() - student_logits.softmax(-1).sqrt()).square().sum(
            -1
        ) / 2

    hidden, teacher, head = (
        torch.randn(3, N, H, dtype=torch.float64)[0],
        torch.randn(N, H).double(),
        torch.randn(V, H).double(),
    )
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
def test_a_compiled_elementwise_pass_equals_the_eager_one() -> None:
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
