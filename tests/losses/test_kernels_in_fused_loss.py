"""The fused losses give the same with Triton's kernels as with torch's operations.

On a GPU the kernels run there, else in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.losses import Head, fused_linear_cross_entropy, fused_linear_divergence
from potstill.losses.kernels import kernels_for
from potstill.losses.records import DIVERGENCES

pytest.importorskip("triton")
DEVICE, CHOICE = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", "interpret")


def loss_and_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    own = [one.clone().requires_grad_() for one in inputs]
    value = loss(*own)
    return [value.detach(), *torch.autograd.grad(2 * value, own)]


def both_ways(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Tensor], *inputs: Tensor
) -> None:
    found = []
    for choice in ("off", CHOICE):
        monkeypatch.setenv("POTSTILL_KERNELS", choice)
        found.append(loss_and_gradients(loss, *inputs))
    for eager, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, eager, rtol=1e-4, atol=1e-5)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0},
        {"hard_label_weight": 0.5},
        {
            "hard_label_weight": 0.5,
            "temperature": 2.0,
            "weights": torch.tensor([0.5, 2.0] * 3, device=DEVICE),
        },
    ],
    ids=["plain", "tempered", "labels", "all"],
)
def test_divergences(monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]) -> None:
    hidden, weight, teacher_hidden, teacher_weight = tensors((6, 8), (60, 8), (6, 12), (60, 12))
    if "hard_label_weight" in settings:
        settings = {
            **settings,
            "labels": torch.tensor([1, 2, 59, 0, 70, 5], device=DEVICE),
        }  # 70 is not shared

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, divergence=name, chunk_tokens=4,
            **settings,
        )  # fmt: skip

    both_ways(monkeypatch, loss, hidden, weight)


def test_bias_scale_and_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight = tensors(
        (6, 8), (60, 8), (60,), (6, 12), (60, 12)
    )

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias=bias, scale=0.5, softcap=3.0)
        return fused_linear_divergence(hidden, head, teacher_hidden, teacher_weight)

    both_ways(monkeypatch, loss, hidden, weight, bias)


def test_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = tensors((6, 8), (60, 8))
    labels = torch.tensor([1, 2, 59, 0, 7, 5], device=DEVICE)
    both_ways(monkeypatch, lambda *own: fused_linear_cross_entropy(*own, labels), hidden, weight)


def test_a_function_of_ones_own_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, teacher_hidden, teacher_weight = tensors((6, 8), (60, 8), (6, 12), (60, 12))

    def squares(teacher: Tensor, student: Tensor) -> Tensor:
        return (teacher - student).square().sum(-1)

    def loss(*own: Tensor) -> Tensor:
        return fused_linear_divergence(*own, teacher_hidden, teacher_weight, divergence=squares)

    both_ways(monkeypatch, loss, hidden, weight)
    assert kernels_for(hidden) is not None
