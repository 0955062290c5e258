"""The Triton kernels against the dense divergences in float64: on a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potstill.losses import divergences
from potstill.losses.kernels import kernels_for
from potstill.losses.records import DIVERGENCES

pytest.importorskip("triton")
NAMES = list(DIVERGENCES)
DEVICE, CHOICE = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", "interpret")
PARAMETERS = {"jensen_shannon": 0.3, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_KERNELS", CHOICE)


def logits(rows: int, vocabulary: int, *, spread: float = 4.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator) * spread).to(DEVICE)


def dense(
    name: str,
    teacher: Tensor,
    student: Tensor,
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    hard: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient by autograd in float64."""
    own = student.double().requires_grad_()
    given = dict.fromkeys(
        [one.name for one in DIVERGENCES[name].parameters], PARAMETERS.get(name, 0.0)
    )
    loss = getattr(divergences, name)(teacher.double(), own, temperature=temperature, **given)
    if labels is not None:
        share = hard * (labels >= 0).double()
        nll = -own.log_softmax(-1).gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1)
        loss = (1 - share) * loss + share * nll
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    return loss.detach(), gradient


def check(name: str, teacher: Tensor, student: Tensor, **given: object) -> None:
    rows = kernels_for(teacher, student)
    assert rows is not None
    expected, expected_gradient = dense(name, teacher, student, **given)  # type: ignore[arg-type]
    hard = given.pop("hard", 0.0)
    loss, gradient = rows.divergence(
        name,
        teacher.clone(),
        student,
        parameter=PARAMETERS.get(name, 0.0),
        hard_label_weight=hard,
        **given,
    )
    assert gradient.data_ptr() == student.data_ptr()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocabulary", [1, 7, 272, 4096, 5003])
def test_loss_and_gradient_are_those_of_the_dense_divergence(name: str, vocabulary: int) -> None:
    check(name, logits(3, vocabulary), logits(3, vocabulary, seed=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("hard", [0.25, 1.0])
def test_temperature_and_labels(name: str, temperature: float, hard: float) -> None:
    """The cross-entropy is at temperature 1; a negative label has none."""
    labels = torch.tensor([3, -1, 299], device=DEVICE)
    given = {"temperature": temperature, "labels": labels, "hard": hard}
    check(name, logits(3, 300), logits(3, 300, seed=1), **given)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name: str) -> None:
    """A large common term, equal models, one sure token, a wide spread, ties."""
    teacher, student = logits(5, 600), logits(5, 600, seed=1)
    teacher[0] += 80
    student[0] -= 80
    student[1] = teacher[1]
    teacher[2, 5] += 60
    teacher[3], student[3] = teacher[3] * 10, student[3] * 10
    teacher[4] = student[4] = 0.5
    check(name, teacher, student)


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_be_parts_of_wider_ones(name: str) -> None:
    """A padded buffer: what stands behind the vocabulary is neither read nor written."""
    teacher, wide = logits(4, 300)[:, :290], logits(4, 320, seed=1)
    behind = wide[:, 290:].clone()
    check(name, teacher, wide[:, :290])
    assert torch.equal(wide[:, 290:], behind)


def test_a_token_without_probability() -> None:
    """Forward KL is infinite if the teacher has mass there, else nothing is NaN."""
    rows = kernels_for(torch.zeros(1, 1, device=DEVICE))
    assert rows is not None
    teacher, student = logits(2, 50), logits(2, 50, seed=1)
    teacher[0, 3] = student[0, 3] = student[1, 4] = -torch.inf
    for name in NAMES:
        loss, gradient = rows.divergence(
            name, teacher.clone(), student.clone(), parameter=PARAMETERS.get(name, 0.0)
        )
        assert gradient.isfinite().all()
        assert loss.isfinite().tolist() == [True, name != "forward_kl"]


@pytest.mark.parametrize("vocabulary", [2, 300, 5003])
def test_cross_entropy(vocabulary: int) -> None:
    rows = kernels_for(torch.zeros(1, 1, device=DEVICE))
    assert rows is not None
    student, labels = logits(3, vocabulary), torch.tensor([0, 1, vocabulary - 1], device=DEVICE)
    own = student.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(own, labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), own)
    loss, gradient = rows.cross_entropy(labels, student)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


def test_no_rows() -> None:
    rows = kernels_for(torch.zeros(1, 1, device=DEVICE))
    assert rows is not None
    loss, gradient = rows.divergence("forward_kl", logits(0, 9), logits(0, 9))
    assert (loss.shape, gradient.shape) == ((0,), (0, 9))


def test_which_logits_get_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.zeros(2, 8, device=DEVICE)
    assert kernels_for(one) is not None
    assert kernels_for(one.double()) is None
    assert kernels_for(one, one.T.contiguous().T) is None
    for choice in ("off", "auto"):
        monkeypatch.setenv("POTSTILL_KERNELS", choice)
        assert kernels_for(one.cpu()) is None
    monkeypatch.setenv("POTSTILL_KERNELS", "on")
    with pytest.raises(ValueError, match="must be one of auto, off, interpret"):
        kernels_for(one)
