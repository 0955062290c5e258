"""Sparse targets: unbiased by enumeration, of less noise than their rivals, and an exact loss."""

from __future__ import annotations

import itertools

import pytest
import torch

from potstill.losses import Head, forward_kl, fused_linear_divergence
from potstill.losses.sparse import SparseDistributions, fused_linear_sparse, threshold_sample


def distributions(count: int, size: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(count, size, generator=random, dtype=torch.float64)
    return logits.softmax(-1)


def dense(drawn: SparseDistributions, size: int) -> torch.Tensor:
    owner = torch.repeat_interleave(drawn.counts)
    full = torch.zeros(len(drawn.counts), size, dtype=torch.float64)
    return full.index_put_((owner, drawn.ids), drawn.masses.double(), accumulate=True)


@pytest.mark.parametrize("threshold", [0.02, 0.07, 0.3, 0.9])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])
def test_the_mean_over_all_draws_is_the_distribution(threshold: float, sharpness: float) -> None:
    """The target is constant between the numbers at which another token is drawn."""
    for q in distributions(6, 9, sharpness=sharpness):
        edges = {0.0, 1.0}
        kept = threshold_sample(q[None], threshold, torch.zeros(1))
        count, draws = int(kept.large), int(kept.counts - kept.large)
        ends = q.sort(descending=True).values[count:].cumsum(0)
        edges |= {float(end / ends[-1] * draws) % 1 for end in ends}
        mean = torch.zeros_like(q)
        for low, high in itertools.pairwise(sorted(edges)):
            middle = torch.tensor([(low + high) / 2], dtype=torch.float64)
            mean += (high - low) * dense(threshold_sample(q[None], threshold, middle), 9)[0]
        torch.testing.assert_close(mean, q, rtol=1e-9, atol=1e-12)


def test_masses_sum_to_one_and_large_tokens_keep_their_own() -> None:
    q = distributions(200, 300)
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(1))
    full = dense(drawn := threshold_sample(q, 0.03, uniform), 300)
    torch.testing.assert_close(full.sum(-1), torch.ones(200, dtype=torch.float64))
    large = q >= 0.03
    torch.testing.assert_close(full[large], q[large])
    assert bool((drawn.counts <= 1 / 0.03 + 2).all())
    assert bool((full[~large] < 0.03 * 1.5).all())


@pytest.mark.parametrize("one_hot", [True, False])
def test_degenerate_distributions(one_hot: bool) -> None:
    q = torch.eye(5, dtype=torch.float64) if one_hot else torch.full((5, 40), 1 / 40)
    drawn = threshold_sample(q, 0.05, torch.full((5,), 0.999999999))
    assert bool((drawn.counts == (1 if one_hot else 20)).all())
    torch.testing.assert_close(dense(drawn, q.shape[1]).sum(-1), torch.ones(5).double())


def test_the_noise_is_below_that_of_draws_with_replacement() -> None:
    q = distributions(400, 500, sharpness=3.0)
    random = torch.Generator().manual_seed(2)
    ours, theirs, sizes, their_sizes = [], [], [], []
    for _ in range(20):
        drawn = threshold_sample(q, 0.03, torch.rand(400, generator=random))
        ours.append(((dense(drawn, 500) - q) ** 2).sum(-1).mean())
        sizes.append(drawn.counts.double().mean())
        ids = torch.multinomial(q, 50, replacement=True, generator=random)
        counted = torch.zeros_like(q).scatter_add_(-1, ids, torch.full(ids.shape, 0.02).double())
        theirs.append(((counted - q) ** 2).sum(-1).mean())
        their_sizes.append((counted > 0).double().sum(-1).mean())
    assert torch.stack(sizes).mean() < torch.stack(their_sizes).mean()
    assert torch.stack(ours).mean() < 0.6 * torch.stack(theirs).mean()


def problem(rows: int = 50) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(4)
    hidden = torch.randn(7, 16, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, 16, generator=random, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, rows, (7,), generator=random)
    return hidden, weight, labels


@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [None, 2])
def test_with_every_token_kept_it_is_forward_kl(hard: float, chunk: int | None) -> None:
    hidden, weight, labels = problem()
    states, q = torch.randn(7, 50).double(), None
    q = states.softmax(-1)
    drawn = threshold_sample(q, 1e-9, torch.zeros(7))
    entropy = -(q * q.log()).sum(-1)
    found, expected = (
        fused_linear_sparse(
            hidden,
            weight,
            drawn,
            entropy,
            labels=labels,
            hard_label_weight=hard,
            chunk_tokens=chunk,
        ),
        fused_linear_divergence(
            hidden,
            weight,
            states,
            torch.eye(50).double(),
            labels=labels,
            hard_label_weight=hard,
        ),
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-9)


def test_the_gradient_equals_autograd_of_the_dense_loss() -> None:
    hidden, weight, labels = problem()
    q = distributions(7, 50)
    drawn = threshold_sample(q, 0.1, torch.rand(7, generator=torch.Generator().manual_seed(5)))
    entropy = -(q * q.log()).sum(-1)
    log_p = (hidden @ weight.T).log_softmax(-1)
    expected = (-(dense(drawn, 50) * log_p).sum(-1) - entropy).sum()
    found = fused_linear_sparse(hidden, Head(weight), drawn, entropy, labels=labels)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_smaller_vocabulary_gets_the_mass_of_the_missing_tokens() -> None:
    hidden, weight, labels = problem()
    q = distributions(7, 60)
    drawn = threshold_sample(q, 1e-9, torch.zeros(7))
    cut = q[:, :50] / q[:, :50].sum(-1, keepdim=True)
    entropy = -(cut * cut.log()).sum(-1)
    found = fused_linear_sparse(hidden, weight, drawn, entropy, labels=labels)
    torch.testing.assert_close(found, forward_kl(cut.log(), hidden @ weight.T).sum())


def test_bad_arguments_are_refused() -> None:
    q = distributions(7, 50)
    with pytest.raises(ValueError, match="threshold 1.5"):
        threshold_sample(q, 1.5, torch.zeros(7))
    hidden, weight, labels = problem()
    drawn = threshold_sample(q[:5], 0.1, torch.zeros(5))
    with pytest.raises(ValueError, match="7 hidden states, 5 targets"):
        fused_linear_sparse(hidden, weight, drawn, torch.zeros(5), labels=labels)
