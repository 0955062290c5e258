"""Answers that say nearly what an earlier one says, found without comparing each with each.

MinHash (Broder 1997): the share of equal numbers in two signatures estimates the Jaccard similarity of their sets of three-word
runs. A signature of P = 128 numbers is read as 16 bands of r = 8: two texts of similarity s agree in some band with probability
1 − (1 − s⁸)¹⁶, which is 0.95 at s = 0.8 and 0.06 at s = 0.5. Only texts that agree in a band are compared.

>>> found = NearDuplicates(threshold=0.8)
>>> for text in ("the rain falls on the old town and its river", "snow", "The rain falls on the old town, and its river!"):
...     found.add(text)
>>> found.flags().tolist()
[False, False, True]
"""

from __future__ import annotations

import numpy as np
import rensa

from potstill.generation.words import ngrams, words

SIGNATURE, BANDS = 128, 16
SHINGLE_WORDS = 3
SEED = 1
_CHUNK = 512


class NearDuplicates:
    """Collects texts, 384 bytes for each, then says which to drop: those at least ``threshold`` similar to an earlier one."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._waiting: list[set[str]] = []
        self._bands: list[np.ndarray] = []  # [chunk, BANDS] uint64: a hash of each band
        self._signatures: list[np.ndarray] = []  # [chunk, SIGNATURE] uint16: enough of each number to compare it

    def add(self, text: str) -> None:
        """One more text, in order."""
        self._waiting.append(ngrams(words(text), SHINGLE_WORDS))
        if len(self._waiting) == _CHUNK:
            self._sign()

    def flags(self) -> np.ndarray:
        """``[texts]``, True for each to be dropped. A chain of similar texts is dropped up to its first."""
        self._sign()
        if not self._bands:
            return np.zeros(0, dtype=bool)
        bands, signatures = np.concatenate(self._bands), np.concatenate(self._signatures)
        duplicate = np.zeros(len(bands), dtype=bool)
        for band in bands.T:
            order = np.argsort(band, kind="stable")  # equal bands side by side, the earliest first
            same = band[order[1:]] == band[order[:-1]]
            begins = np.concatenate([[True], ~same])
            first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
            before = np.concatenate([order[:1], order[:-1]])
            for earlier in (first, before):
                candidates = ~begins & ~duplicate[order]
                this, that = order[candidates], earlier[candidates]
                duplicate[this] |= _similarity(signatures, this, that) >= self.threshold
        return duplicate

    def _sign(self) -> None:
        if not self._waiting:
            return
        rows = rensa.RMinHash.digests_from_token_sets(self._waiting, SIGNATURE, SEED)
        numbers = np.array(rows, dtype=np.uint64)
        self._bands.append(_hashes(numbers.reshape(len(numbers), BANDS, -1)))
        self._signatures.append(numbers.astype(np.uint16))
        self._waiting.clear()


def _hashes(bands: np.ndarray) -> np.ndarray:
    """``[texts, BANDS, r] → [texts, BANDS]``: a polynomial in 64 bits."""
    value = np.zeros(bands.shape[:2], dtype=np.uint64)
    for i in range(bands.shape[-1]):
        value = (value ^ bands[..., i]) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    return value


def _similarity(signatures: np.ndarray, this: np.ndarray, that: np.ndarray, chunk: int = 65536) -> np.ndarray:
    parts = [(signatures[this[i : i + chunk]] == signatures[that[i : i + chunk]]).mean(-1) for i in range(0, len(this), chunk)]
    return np.concatenate(parts) if parts else np.zeros(0)
