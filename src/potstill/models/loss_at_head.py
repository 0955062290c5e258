"""Compute a loss inside the forward of a model's LM head.

Wrappers that shard a model (FSDP, DeepSpeed's ZeRO 3) hold the head's weight together only while
the model's forward runs, and reduce its gradient by hooks on the forward's output. So the head's
forward is replaced for one call by a function that computes the loss, and the output carries it:

    hidden states → replaced head: loss → stand-in for logits → rest of the forward → the same loss

The rest of the forward may scale or cap what the head returns (Granite, Gemma). The stand-in is
therefore 0, and its gradient is not passed on: the loss's own gradient is, as it came.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from potstill.models.heads import head_module
from potstill.protocols import Batch, CausalLM

Loss = Callable[[Tensor], Tensor]
"""From hidden states ``[B, T, H]`` to a scalar."""


def loss_at_head(model: nn.Module | CausalLM, inputs: Batch, loss: Loss) -> Tensor:
    """Return ``loss(hidden states)``, computed where the LM head of ``model`` would be.

    Hidden states ``[B, T, H]`` are the head's input. Within ``loss`` the head's weights are whole.
    """
    with _replaced_head(model) as head:
        head.loss = loss
        try:
            output = model(**inputs, use_cache=False)
            carried, value = head.carried, head.value
        finally:
            head.forget()
    assert carried is not None
    assert value is not None
    if not value.requires_grad:
        return value
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    left: Tensor = _Leave.apply(logits, value.detach(), carried)  # type: ignore[no-untyped-call]
    return left


class _LossHead:
    """Stand in for a head's forward. One per head, kept: torch.compile would recompile for more."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop everything about the last call."""
        self.loss: Loss | None = None
        self.value: Tensor | None = None
        self.carried: _Carried | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the loss; return a stand-in for logits ``[1, 1, 1]``."""
        assert self.loss is not None
        self.value, self.carried = self.loss(hidden), _Carried()
        entered: Tensor = _Enter.apply(self.value, self.carried)  # type: ignore[no-untyped-call]
        return entered


class _Carried:
    """The gradient of a loss, on its way around what a model does with its logits."""

    gradient: Tensor | None = None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, carried: _Carried) -> Tensor:
        ctx.carried = carried
        return loss.new_zeros(1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, None]:
        return ctx.carried.gradient, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, carried: _Carried) -> Tensor:
        ctx.carried, ctx.like = carried, logits.new_zeros(logits.shape)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [ctx.carried.gradient] = gradients
        return ctx.like, None, None


_stand_ins: weakref.WeakKeyDictionary[nn.Module, _LossHead] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _replaced_head(model: nn.Module | CausalLM) -> Iterator[_LossHead]:
    head = head_module(model)
    stand_in = _stand_ins.setdefault(head, _LossHead())
    previous = head.__dict__.get("forward")  # accelerate may have set a forward of its own
    head.forward = stand_in.forward
    try:
        yield stand_in
    finally:
        del head.forward
        if previous is not None:
            head.forward = previous
