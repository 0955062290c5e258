"""A loss computed within the head's forward has the value and gradients of one computed outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import random_model, tiny_model
from potstill.losses import fused_linear_cross_entropy
from potstill.models.heads import hidden_states, supervised, trainable_head
from potstill.models.loss_at_head import loss_at_head

ALIKE = {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": ALIKE,
    "gpt2": {},
    "gemma2": {**ALIKE, "head_dim": 8, "final_logit_softcapping": 3.0},
    "granite": {**ALIKE, "logits_scaling": 8.0},
    "cohere": {**ALIKE, "logit_scale": 0.0625},
}
IDS = torch.arange(24).view(2, 12)


def cross_entropy(model: Any, hidden: Tensor) -> Tensor:
    states, labels = supervised(hidden, IDS)
    return fused_linear_cross_entropy(states, trainable_head(model), labels)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients_are_those_of_the_loss_outside(family: str) -> None:
    model = random_model(family, **FAMILIES[family])
    outside = cross_entropy(model, hidden_states(model, {"input_ids": IDS}))
    expected = gradients(model, 3 * outside)
    inside = loss_at_head(model, {"input_ids": IDS}, lambda hidden: cross_entropy(model, hidden))
    found = gradients(model, 3 * inside)
    assert torch.equal(inside, outside)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_losses_of_two_batches_can_wait_for_their_backward() -> None:
    model = tiny_model()

    def loss(factor: float) -> Tensor:
        inputs: Any = {"input_ids": IDS}
        return factor * loss_at_head(model, inputs, lambda states: cross_entropy(model, states))

    once = gradients(model, loss(1.0))
    both = gradients(model, loss(1.0) + loss(2.0))
    for name, gradient in once.items():
        torch.testing.assert_close(both[name], 3 * gradient, rtol=1e-4, atol=1e-5)


def test_the_head_is_itself_again_also_after_an_error() -> None:
    model = tiny_model()
    logits = model(IDS).logits

    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        loss_at_head(model, {"input_ids": IDS}, broken)
    with torch.no_grad():
        nats = loss_at_head(model, {"input_ids": IDS}, lambda hidden: hidden.sum())
    assert not nats.requires_grad
    assert torch.equal(model(IDS).logits, logits)


def test_a_teachers_forward_within_the_loss_of_the_same_model_is_not_replaced() -> None:
    """A student with adapters can be its own teacher."""
    model = tiny_model()
    inputs: Any = {"input_ids": IDS}

    def against_itself(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            own = hidden_states(model, inputs)
        return (hidden - own).square().sum()

    assert loss_at_head(model, inputs, against_itself).item() == 0.0
