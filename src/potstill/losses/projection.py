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

import dataclasses
from collections.abc import Callable, Iterator
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


class _OutputLayer:
    """What both kinds of head do to the product ``hidden @ weight.T``."""

    bias: Tensor | None
    scale: float
    softcap: float | None
    rows: int | None

    def __len__(self) -> int:
        raise NotImplementedError

    def to_logits(self, product: Tensor) -> Tensor:
        """Return the logits of ``hidden @ weight.T``, in float32 or wider."""
        logits = product
        if self.bias is not None:
            # A bias of −inf removes a token.
            logits = finite(logits + self.bias[: len(self)].detach())
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def logit_derivative(self, logits: Tensor) -> Tensor | None:
        """Return ∂logits/∂(hidden @ weight.T + bias), elementwise; None where it is 1 everywhere."""
        if self.softcap is not None:
            return self.scale * (1 - (logits / self.softcap) ** 2)
        return None if self.scale == 1.0 else logits.new_full((1, 1), self.scale)


@dataclass(frozen=True)
class Head(_OutputLayer):
    """A model's LM head: ``cap(scale · (hidden @ weight.T + bias))``.

    ``weight [V, H]``, ``bias [V]`` or None. ``softcap`` c turns logits into c·tanh(logits / c)
    (Gemma 2). ``rows`` cuts the vocabulary to its first rows: those that both tokenizers share.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None

    def __len__(self) -> int:
        return len(self.weight) if self.rows is None else min(self.rows, len(self.weight))

    def cut(self, rows: int) -> Head:
        """Return the same head with at most its first ``rows`` rows."""
        return dataclasses.replace(self, rows=min(rows, len(self)))

    def to(self, device: torch.device) -> Head:
        """Return the head on ``device``."""
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)


@dataclass(frozen=True)
class CallableHead(_OutputLayer):
    """A head whose product only its own module can compute, such as one with quantized weights.

    ``project`` maps ``hidden [c, H]`` to ``[c, V]``, its own bias included. For teachers alone: no
    gradient flows through it.
    """

    project: Callable[[Tensor], Tensor]
    vocabulary_rows: int
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None
    bias: None = None

    def __len__(self) -> int:
        return self.vocabulary_rows if self.rows is None else min(self.rows, self.vocabulary_rows)

    def cut(self, rows: int) -> CallableHead:
        """Return the same head with at most its first ``rows`` rows."""
        return dataclasses.replace(self, rows=min(rows, len(self)))

    def to(self, device: torch.device) -> CallableHead:
        """Return a head for hidden states on ``device``; the module stays where it is."""
        return self


class Projection:
    """One head over ``hidden [N, H]``, without gradients: logits on demand, in order, with one chunk's room.

    ``observed [N]`` are the tokens that the text has; with them half-precision products are anchored. ``gradients``: will
    ∂loss/∂logits be collected in the room?
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head | CallableHead,
        *,
        observed: Tensor | None = None,
        gradients: bool = False,
        chunk_tokens: int | None = None,
    ) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {chunk_tokens}: must be at least 1, or None to fit the chunk to memory")
        self.head, self.dtype = head, _product_dtype(hidden)
        self.hidden = hidden.detach().to(self.dtype)
        own = isinstance(head, Head)
        self.weight = head.weight[: len(head)].detach().to(self.dtype) if own else self.hidden[:0]
        if not own:
            self.dtype = wide_dtype(self.dtype)
        self.wide_products = hidden.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)
        self.stored = torch.float32 if self.wide_products else self.dtype
        self.observed = observed if self.stored in (torch.bfloat16, torch.float16) else None
        self.chunk = chunk_tokens or _chunk_size(len(head), self.hidden, self.stored, GRADIENT_BYTES if gradients else LOGITS_BYTES)
        self.buffer = self.hidden.new_empty(min(self.chunk, len(hidden)), len(head), dtype=self.stored)
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
            return self.head.to_logits(product.to(wide_dtype(self.dtype)))
        return self.head.to_logits(torch.add(product, self.anchors[rows.start - self.start : rows.stop - self.start].float()))

    def product(self, rows: slice) -> Tensor:
        """The room ``[b, V]`` in which the product of these tokens stands, to be written over when it has been used."""
        return self.buffer[rows.start - self.start : rows.stop - self.start]

    def _project(self, start: int, stop: int) -> None:
        self.start, self.stop = start, min(stop, len(self.hidden))
        rows = slice(self.start, self.stop)
        if self.stop - self.start > len(self.buffer):  # somebody asks for more at once than a chunk holds
            self.buffer = self.buffer.new_empty(self.stop - self.start, len(self.head))
        buffer, hidden, weight = self.product(rows), self.hidden[rows], self.weight.T
        if isinstance(self.head, CallableHead):
            buffer.copy_(self.head.project(hidden)[..., : len(self.head)])
        elif self.observed is not None:
            self.anchors = self._greatest_logit(hidden, self.observed[rows])
            torch.addmm(buffer.copy_(-self.anchors), hidden, weight, out=buffer)
        elif self.wide_products:
            buffer.copy_(torch.mm(hidden, weight, out_dtype=torch.float32))
        else:
            torch.mm(hidden, weight, out=buffer)

    def _greatest_logit(self, hidden: Tensor, observed: Tensor) -> Tensor:
        """Each token's greatest logit among the words that the chunk's text has: ``[c, H]`` → ``[c, 1]``."""
        words = torch.unique(observed.clamp(max=len(self.head) - 1))
        return (hidden @ self.weight[words].T).amax(-1, keepdim=True)


def _chunk_size(rows: int, hidden: Tensor, dtype: torch.dtype, budget: dict[str, int]) -> int:
    """Return how many tokens' logits fit the device's budget, or half the weight if that is more."""
    half_the_weight = dtype.itemsize * rows * hidden.shape[-1] // 2
    size = max(budget.get(hidden.device.type, budget["cuda"]), half_the_weight)
    return max(1, size // (dtype.itemsize * max(1, rows)))


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
