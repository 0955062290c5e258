"""Compute the logits of hidden states a few tokens at a time.

c tokens in a chunk, b tokens in a block, V vocabulary, H hidden size.

A matrix product is fast with many tokens, softmax with few: a block of b tokens stays in the
processor's cache, where a softmax takes a fifth of the time. So one product computes a chunk, and
the chunk is split into blocks of float32 logits.

**Anchors.** bfloat16 keeps eight bits, so a logit of 20 is rounded by up to 0.06. If the student
is close to its teacher, the gradient is then wrong by 40 %. Softmax depends on differences only, so
half-precision products are stored as logit − anchor. The anchor of a token is its largest logit
among the labels of the chunk, so stored values are small where the probability is large. The
product subtracts the anchor before it rounds, and the error becomes twenty times smaller.
On CUDA, products of half-precision tensors are stored in float32 and need no anchors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.losses.closed_forms import finite

# The size of a chunk's logits; it is half the weight's size if that is more. Gradients need larger
# chunks, because each chunk reads and writes the weight's gradient once.
LOGITS_BYTES = {"cpu": 48 * 2**20, "cuda": 256 * 2**20}
GRADIENT_BYTES = {"cpu": 192 * 2**20, "cuda": 256 * 2**20}
# The size of a block's float32 logits; a few such tensors fit the cache. On a GPU: a whole chunk.
BLOCK_BYTES = {"cpu": 3 * 2**19}


class _OutputLayer:
    """Turn the product ``hidden @ weight.T`` into logits: bias, scale, softcap."""

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
        """Return ∂logits/∂(hidden @ weight.T + bias), elementwise; None if it is 1 everywhere."""
        if self.softcap is not None:
            return self.scale * (1 - (logits / self.softcap) ** 2)
        return None if self.scale == 1.0 else logits.new_full((1, 1), self.scale)


@dataclass(frozen=True)
class Head(_OutputLayer):
    """Hold a model's LM head: ``cap(scale · (hidden @ weight.T + bias))``.

    ``weight [V, H]``, ``bias [V]`` or None. ``softcap`` c turns logits into c·tanh(logits / c)
    (Gemma 2). ``rows`` keeps only the first rows of the vocabulary, which both tokenizers share.
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
    """Hold an LM head that only its own module can compute, for example with quantized weights.

    ``project`` maps ``hidden [c, H]`` to ``[c, V]``, including its own bias. Use it for teachers
    only: no gradient flows through it.
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
    """Compute the logits of ``hidden [N, H]`` in order, without gradients, one chunk at a time.

    ``observed [N]`` are the labels, from which half-precision products take their anchors.
    ``gradients`` is True if the caller writes ∂loss/∂logits into the buffer.
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
            raise ValueError(
                f"chunk_tokens = {chunk_tokens}: must be at least 1; None chooses it by memory"
            )
        self.head, self.dtype = head, _product_dtype(hidden)
        self.hidden = hidden.detach().to(self.dtype)
        if isinstance(head, Head):
            self.weight = head.weight[: len(head)].detach().to(self.dtype)
        else:
            self.weight, self.dtype = self.hidden[:0], wide_dtype(self.dtype)
        half = (torch.bfloat16, torch.float16)
        self.wide_products = hidden.device.type == "cuda" and self.dtype in half
        self.buffer_dtype = torch.float32 if self.wide_products else self.dtype
        self.observed = observed if self.buffer_dtype in half else None
        budget = GRADIENT_BYTES if gradients else LOGITS_BYTES
        self.chunk = chunk_tokens or _chunk_size(len(head), self.hidden, self.buffer_dtype, budget)
        size = 0 if self.wide_products else min(self.chunk, len(hidden))
        self.buffer = self.hidden.new_empty(size, len(head), dtype=self.buffer_dtype)
        self.start = self.stop = 0

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the positions of each block and its float32 logits ``[b, V]``, for all N tokens."""
        size = min(self.chunk, block_rows(self.hidden.device.type, len(self.head)))
        for start in range(0, len(self.hidden), self.chunk):
            stop = min(start + self.chunk, len(self.hidden))
            for first in range(start, stop, size):
                positions = slice(first, min(first + size, stop))
                yield positions, self.logits(positions)

    def logits(self, positions: slice) -> Tensor:
        """Return the logits of some tokens, ``[b, V]`` in float32 or wider.

        Call in increasing order: the next chunk overwrites the current one.
        """
        if positions.stop > self.stop:
            count = positions.stop - positions.start
            self._project(positions.start, positions.start + max(1, self.chunk // count) * count)
        product = self.product(positions)
        if self.observed is None:
            return self.head.to_logits(product.to(wide_dtype(self.dtype)))
        anchors = self.anchors[positions.start - self.start : positions.stop - self.start]
        return self.head.to_logits(torch.add(product, anchors.float()))

    def product(self, positions: slice) -> Tensor:
        """Return these tokens' part ``[b, V]`` of the buffer, which the caller may overwrite."""
        return self.buffer[positions.start - self.start : positions.stop - self.start]

    def _project(self, start: int, stop: int) -> None:
        self.start, self.stop = start, min(stop, len(self.hidden))
        positions = slice(self.start, self.stop)
        if self.wide_products:
            self.buffer = self.buffer[:0]  # freed before the next is made
            self.buffer = torch.mm(self.hidden[positions], self.weight.T, out_dtype=torch.float32)
            return
        if self.stop - self.start > len(self.buffer):  # the caller asked for more than a chunk
            self.buffer = self.buffer.new_empty(self.stop - self.start, len(self.head))
        buffer, hidden, weight = self.product(positions), self.hidden[positions], self.weight.T
        if isinstance(self.head, CallableHead):
            buffer.copy_(self.head.project(hidden)[..., : len(self.head)])
        elif self.observed is not None:
            self.anchors = self._largest_logit(hidden, self.observed[positions])
            torch.addmm(buffer.copy_(-self.anchors), hidden, weight, out=buffer)
        else:
            torch.mm(hidden, weight, out=buffer)

    def _largest_logit(self, hidden: Tensor, observed: Tensor) -> Tensor:
        """Return each token's largest logit among the chunk's labels: ``[c, H]`` → ``[c, 1]``."""
        ids = torch.unique(observed.clamp(max=len(self.head) - 1))
        return (hidden @ self.weight[ids].T).amax(-1, keepdim=True)


def _chunk_size(
    vocabulary_rows: int, hidden: Tensor, dtype: torch.dtype, budget: dict[str, int]
) -> int:
    """Return how many tokens' logits fit the budget, or half the weight if that is more."""
    half_the_weight = dtype.itemsize * vocabulary_rows * hidden.shape[-1] // 2
    size_bytes = max(budget.get(hidden.device.type, budget["cuda"]), half_the_weight)
    return max(1, size_bytes // (dtype.itemsize * max(1, vocabulary_rows)))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for every narrower dtype."""
    return torch.promote_types(dtype, torch.float32)


def block_rows(device: str, width: int) -> int:
    """Return how many rows of ``width`` float32 numbers make a block; on a GPU, all."""
    if device not in BLOCK_BYTES:
        return 2**31
    # A multiple of the threads: a row is reduced by one thread.
    threads = torch.get_num_threads()
    return max(1, BLOCK_BYTES[device] // (4 * max(1, width)) // threads) * threads


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: autocast's if it is on, else that of the hidden states.

    On a CPU, float16 becomes float32: most processors emulate float16 products, four times slower.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    return torch.float32 if device == "cpu" and dtype == torch.float16 else dtype
