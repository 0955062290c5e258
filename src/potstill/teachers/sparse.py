"""A sparse target, and how it is stored: about 10 tokens of each distribution, in about 33 bytes.

N tokens, E entries, V vocabulary. Stored for each token: one byte each for the number of large and
of drawn entries, the entropy and −log q of the text's token; a byte for the mass of each large
entry; about 15 bits for the id of each entry. Every rounding is up or down at random so that
the expected value is exact: the target stays unbiased (losses/sparse.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.errors import ConfigError
from potstill.losses import CallableHead, Head, Projection
from potstill.losses.sparse import SparseDistributions, fused_linear_sparse, threshold_sample
from potstill.teachers.targets import BlockScores, LossSettings

LARGEST_NLL = 30.0
PER_TOKEN = ("large", "drawn", "entropy", "nll")
"""The columns with one byte a token; ``masses`` and ``ids`` have bytes a conversation."""


@dataclass(frozen=True)
class SparseTarget:
    """A few tokens of the teacher's distribution at each position; unbiased for forward KL."""

    drawn: SparseDistributions
    entropy: Tensor
    """H(q) in nats ``[N]``."""
    nll: Tensor
    """−log q of the text's token in nats ``[N]``."""

    @staticmethod
    def refuse(loss: LossSettings) -> None:
        """Raises: ConfigError for a loss that is not linear in the teacher's probabilities."""
        if loss.divergence != "forward_kl" or loss.temperature != 1.0:
            found = f"divergence {loss.divergence} at temperature {loss.temperature:g}"
            raise ConfigError(
                f"{found}: a sparse capture is unbiased for forward_kl at temperature 1 alone, "
                "whose gradient is linear in the teacher's probabilities; use these, or capture "
                "with --keep states"
            )

    def summed_loss(
        self, student_hidden: Tensor, student_head: Head, labels: Tensor, loss: LossSettings
    ) -> Tensor:
        """Return an unbiased estimate of forward KL. Raises: ConfigError as `refuse`."""
        self.refuse(loss)
        return fused_linear_sparse(
            student_hidden,
            student_head,
            self.drawn,
            self.entropy,
            labels=labels,
            hard_label_weight=loss.hard_label_weight,
        )

    def label_nll(self, labels: Tensor) -> Tensor:
        """Return −log q(label), which is stored."""
        return self.nll

    def block_scores(
        self, labels: Tensor, *, rows: int | None = None, likeliest: int = 0
    ) -> Callable[[slice, Tensor], BlockScores]:
        """Estimate KL without bias; a single token's estimate has noise and may be below 0.

        Agreement compares with the largest entry, which is the teacher's most likely token wherever
        that has at least the threshold.
        """
        starts = self.drawn.starts().tolist()

        def scores(positions: slice, student_logits: Tensor) -> BlockScores:
            entries = slice(starts[positions.start], starts[positions.stop])
            counts = self.drawn.counts[positions]
            width = max(int(counts.max()), likeliest, 1)
            held = torch.arange(width, device=counts.device) < counts[:, None]
            ids = counts.new_zeros(held.shape).masked_scatter_(held, self.drawn.ids[entries])
            masses = student_logits.new_zeros(held.shape)
            masses = masses.masked_scatter_(held, self.drawn.masses[entries].to(masses.dtype))
            inside = ids < student_logits.shape[-1]
            log_p = student_logits.log_softmax(-1).gather(-1, ids.where(inside, 0))
            kl = -(masses * inside * log_p).sum(-1) - self.entropy[positions].to(masses.dtype)
            agrees = (student_logits.argmax(-1) == ids[:, 0]).to(masses.dtype)
            return BlockScores(kl, agrees, ids[:, :likeliest].int(), masses[:, :likeliest])

        return scores


def encode_sparse(
    states: Tensor,
    head: Head | CallableHead,
    labels: Tensor,
    *,
    threshold: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return the bytes of one conversation: ``states [N, H]``, ``labels [N]``.

    The random numbers depend on ``seed`` alone, so that a capture can be repeated.
    """
    random = np.random.default_rng(seed)
    uniform = torch.tensor(random.random(len(states)))
    parts, entropies, nll = [], [], []
    for positions, logits in Projection(states, head, observed=labels).blocks():
        log_q = logits.double().log_softmax(-1)
        q = log_q.exp()
        entropies.append(-(q * log_q).sum(-1).cpu())
        nll.append(-log_q.gather(-1, labels[positions, None]).squeeze(-1).cpu())
        parts.append(threshold_sample(q, threshold, uniform[positions]))
    large = torch.cat([part.large for part in parts]).cpu().numpy()
    counts = torch.cat([part.counts for part in parts]).cpu().numpy()
    masses = torch.cat([part.masses for part in parts]).cpu().numpy()
    ids = torch.cat([part.ids for part in parts]).cpu().numpy()
    is_large = np.concatenate([np.arange(n) for n in counts]) < np.repeat(large, counts)
    limit = math.log(len(head))
    return {
        "large": large.astype(np.uint8),
        "drawn": (counts - large).astype(np.uint8),
        "entropy": _round_linear(torch.cat(entropies).numpy(), limit, random),
        "nll": _round_linear(torch.cat(nll).numpy(), LARGEST_NLL, random),
        "masses": _round_mass(masses[is_large], threshold, random),
        "ids": pack_ids(ids),
    }


def decode_sparse(
    columns: dict[str, np.ndarray], *, threshold: float, vocabulary_rows: int
) -> SparseTarget:
    """Return the target that `encode_sparse` stored."""
    large, drawn = (columns[name].astype(np.int64) for name in ("large", "drawn"))
    counts = large + drawn
    ids = unpack_ids(columns["ids"], int(counts.sum()))
    owner = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    is_large = np.arange(len(owner)) - first[owner] < large[owner]
    masses = np.zeros(len(owner))
    masses[is_large] = mass_grid(threshold)[columns["masses"]]
    rest = 1 - np.bincount(owner, masses, minlength=len(counts))
    masses[~is_large] = (rest / np.maximum(drawn, 1))[owner[~is_large]]
    return SparseTarget(
        SparseDistributions(
            torch.from_numpy(ids),
            torch.from_numpy(masses).float(),
            torch.from_numpy(counts),
            torch.from_numpy(large),
        ),
        torch.from_numpy(columns["entropy"] * (math.log(vocabulary_rows) / 255)).float(),
        torch.from_numpy(columns["nll"] * (LARGEST_NLL / 255)).float(),
    )


def join(targets: list[SparseTarget], device: torch.device) -> SparseTarget:
    """Return the targets of several conversations as one."""

    def cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=dtype), *parts]).to(device)

    every = [target.drawn for target in targets]
    drawn = SparseDistributions(
        cat([one.ids for one in every], torch.int64),
        cat([one.masses for one in every], torch.float32),
        cat([one.counts for one in every], torch.int64),
        cat([one.large for one in every], torch.int64),
    )
    return SparseTarget(
        drawn,
        cat([target.entropy for target in targets], torch.float32),
        cat([target.nll for target in targets], torch.float32),
    )


def mass_grid(threshold: float) -> np.ndarray:
    """Return the 256 masses that a byte can mean, from 1 down to half the threshold."""
    grid: np.ndarray = np.exp(-np.arange(256) * (math.log(2 / threshold) / 255))
    return grid


def pack_ids(ids: np.ndarray) -> np.ndarray:
    """Return the ids as bytes: 5 bits for the length of each, then its bits but the leading 1.

    Tokenizers number frequent tokens first, so this takes about 15 bits an id.
    """
    lengths = _bit_lengths(ids)
    own = np.maximum(lengths - 1, 0)
    owner, shifts = _places(own)
    payload = (ids[owner] >> shifts & 1).astype(np.uint8)
    digits = (lengths[:, None] >> np.arange(4, -1, -1) & 1).astype(np.uint8)
    return np.concatenate([np.packbits(digits), np.packbits(payload)])


def unpack_ids(packed: np.ndarray, count: int) -> np.ndarray:
    """Return the ``count`` ids that `pack_ids` packed."""
    digits = np.unpackbits(packed, count=5 * count).reshape(count, 5)
    lengths = digits.astype(np.int64) @ (1 << np.arange(4, -1, -1))
    own = np.maximum(lengths - 1, 0)
    owner, shifts = _places(own)
    payload = np.unpackbits(packed[-(-5 * count // 8) :], count=len(owner)).astype(np.int64)
    low = np.bincount(owner, payload << shifts, minlength=count).astype(np.int64)
    return np.asarray(np.where(lengths > 0, (1 << own) + low, 0))


def _places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each bit of numbers of these lengths its number and its shift."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return owner, lengths[owner] - 1 - within


def _bit_lengths(ids: np.ndarray) -> np.ndarray:
    _, exponents = np.frexp(ids.astype(np.float64))  # ids = fraction · 2 ** exponent, in [½, 1)
    lengths: np.ndarray = exponents.astype(np.int64)
    return lengths


def _round_mass(masses: np.ndarray, threshold: float, random: np.random.Generator) -> np.ndarray:
    grid = mass_grid(threshold)
    below = np.clip(np.searchsorted(-grid, -masses, side="left"), 1, 255)
    high, low = grid[below - 1], grid[below]
    up = random.random(len(masses)) < (masses - low) / (high - low)
    codes: np.ndarray = (below - up).astype(np.uint8)
    return codes


def _round_linear(values: np.ndarray, limit: float, random: np.random.Generator) -> np.ndarray:
    steps = np.clip(values / limit * 255, 0, 255)
    rounded: np.ndarray = np.floor(steps + random.random(len(values)))
    return np.asarray(rounded.clip(0, 255), dtype=np.uint8)
