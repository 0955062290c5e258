"""From hidden states to logits: a model's head, asked a few tokens at a time.

c tokens in a chunk, b tokens in a block, V vocabulary, H hidden size.

Matrix products want many tokens at once, the arithmetic on logits wants few: a block of b tokens stays in the processor's
cache, and there a softmax costs a fifth of what it costs in memory. So a chunk is projected in one product, and handed out in
blocks of float32.

**Anchors.** bfloat16 keeps eight bits of whatever it stores, and a logit of 20 so rounded is off by up to 0.06: a student near
its teacher then gets a gradient that is wrong by 40 %. But softmax sees differences alone. Half-precision products are
therefore stored as logit − anchor, where a token's anchor is its greatest logit among the words that the chunk's text has: small
wherever the probability is large. The subtraction happens inside the product, before anything is rounded, and the error falls
twentyfold.
On CUDA, products of half-precision tensors come out in float32 and need none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.losses.closed_forms import finite

# One chunk's product, or half the weight if that is more. Logits alone need so many tokens as keep a product at full speed; where
# gradients follow, the weight's is read and written once a chunk, and wants as many as may be. Both are small beside dense logits.
LOGITS_BYTES = {"cpu": 48 * 2**20, "cuda": 256 * 2**20}
GRADIENT_BYTES = {"cpu": 192 * 2**20, "cuda": 256 * 2**20}
# One block's float32 logits, and there are a handful of such tensors at a time in a core's cache. A GPU takes a chunk at once.
BLOCK_BYTES = {"cpu": 3 * 2**19}


@dataclass(frozen=True)
class Head:
    """A model's last layer, from hidden states to logits: ``cap(scale · (hidden @ weight.T + bias))``.

    ``weight [V, H]``, ``bias [V]`` or None. ``softcap`` c bends logits to c·tanh(logits / c) (Gemma 2). ``rows`` cuts
    the vocabulary to its first rows: the ones that both models' tokenizers share.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None

    def __len__(self) -> int:
        return len(self.weight) if self.rows is None else min(self.rows, len(self.weight))

    def bend(self, product: Tensor) -> Tensor:
        """``hidden @ weight.T`` → logits, in float32 or wider."""
        logits = product
        if self.bias is not None:
            logits = finite(logits + self.bias[: len(self)].detach())  # a bias of −inf cuts a token off
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """∂logits/∂(hidden @ weight.T + bias), elementwise, at these logits; None where it is 1 everywhere."""
        if self.softcap is not None:
            return self.scale * (1 - (logits / self.softcap) ** 2)
        return None if self.scale == 1.0 else logits.new_full((1, 1), self.scale)


class Projection:
    """One head over ``hidden [N, H]``, without gradients: logits on demand, in order, with one chunk's room.

    ``observed [N]`` are the tokens that the text has; with them half-precision products are anchored. ``gradients``: will
    ∂loss/∂logits be collected in the room?
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        *,
        observed: Tensor | None = None,
        gradients: bool = False,
        chunk_tokens: int | None = None,
    ) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {chunk_tokens}: must be at least 1, or None to fit the chunk to memory")
        self.head, self.dtype = head, _product_dtype(hidden)
        self.hidden = hidden.detach().to(self.dtype)
        self.weight = head.weight[: len(head)].detach().to(self.dtype)
        self.wide_products = hidden.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)
        self.stored = torch.float32 if self.wide_products else self.dtype
        self.observed = observed if self.stored in (torch.bfloat16, torch.float16) else None
        self.chunk = chunk_tokens or _chunk_size(self.weight, self.stored, GRADIENT_BYTES if gradients else LOGITS_BYTES)
        self.room = self.hidden.new_empty(min(self.chunk, len(hidden)), len(head), dtype=self.stored)
        self.start = self.stop = 0

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All N tokens in order: where a block stands among them, and its float32 logits ``[b, V]``."""
        size = min(self.chunk, block_rows(self.hidden.device.type, len(self.head)))
        for start in range(0, len(self.hidden), self.chunk):
            stop = min(start + self.chunk, len(self.hidden))
            for first in range(start, stop, size):
                rows = slice(first, min(first + size, stop))
                yield rows, self.logits(rows)

    def logits(self, rows: slice) -> Tensor:
        """The logits of some tokens, ``[b, V]`` in float32 or wider. Ask in order: a chunk is gone when the next is begun."""
        if rows.stop > self.stop:
            asked = rows.stop - rows.start
            self._project(rows.start, rows.start + max(1, self.chunk // asked) * asked)
        product = self.product(rows)
        if self.observed is None:
            return self.head.bend(product.to(wide_dtype(self.dtype)))
        return self.head.bend(torch.add(product, self.anchors[rows.start - self.start : rows.stop - self.start].float()))

    def product(self, rows: slice) -> Tensor:
        """The room ``[b, V]`` in which the product of these tokens stands, to be written over when it has been used."""
        return self.room[rows.start - self.start : rows.stop - self.start]

    def _project(self, start: int, stop: int) -> None:
        self.start, self.stop = start, min(stop, len(self.hidden))
        rows = slice(self.start, self.stop)
        if self.stop - self.start > len(self.room):  # somebody asks for more at once than a chunk holds
            self.room = self.room.new_empty(self.stop - self.start, len(self.head))
        room, hidden, weight = self.product(rows), self.hidden[rows], self.weight.T
        if self.observed is not None:
            self.anchors = self._greatest_logit(hidden, self.observed[rows])
            torch.addmm(room.copy_(-self.anchors), hidden, weight, out=room)
        elif self.wide_products:
            room.copy_(torch.mm(hidden, weight, out_dtype=torch.float32))
        else:
            torch.mm(hidden, weight, out=room)

    def _greatest_logit(self, hidden: Tensor, observed: Tensor) -> Tensor:
        """Each token's greatest logit among the words that the chunk's text has: ``[c, H]`` → ``[c, 1]``."""
        words = torch.unique(observed.clamp(max=len(self.head) - 1))
        return (hidden @ self.weight[words].T).amax(-1, keepdim=True)


def _chunk_size(weight: Tensor, dtype: torch.dtype, budget: dict[str, int]) -> int:
    """Tokens whose logits fit the device's budget."""
    room = max(budget.get(weight.device.type, budget["cuda"]), dtype.itemsize * weight.numel() // 2)
    return max(1, room // (dtype.itemsize * max(1, len(weight))))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where that is what came in."""
    return torch.promote_types(dtype, torch.float32)


def block_rows(device: str, width: int) -> int:
    """How many rows of ``width`` float32 numbers are worked on at once; on a GPU all there are."""
    if device not in BLOCK_BYTES:
        return 2**31
    # As many for each thread, and at least one: a reduction over one row is not shared between them.
    threads = torch.get_num_threads()
    return max(1, BLOCK_BYTES[device] // (4 * max(1, width)) // threads) * threads


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, otherwise the hidden states' own.

    On a CPU float16 is taken for float32: processors without float16 products emulate them, four times as slow.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.float32 if device == "cpu" and dtype == torch.float16 else dtype
