"""Find answers that are nearly the same as an earlier one, without comparing all pairs.

MinHash (Broder 1997): the fraction of equal numbers in two signatures estimates the Jaccard
similarity of the texts' sets of three-word runs. A signature of P = 128 numbers is split into 16
bands of r = 8. Two texts of similarity s agree in at least one band with probability
1 − (1 − s⁸)¹⁶: 0.95 at s = 0.8 and 0.06 at s = 0.5. Only texts that agree in a band are compared.

>>> found = NearDuplicates(threshold=0.8)
>>> for text in ("the rain falls on the old town and its river", "snow",
...              "The rain falls on the old town, and its river!"):
...     found.add(text)
>>> found.flags().tolist()
[False, False, True]
"""

from __future__ import annotations

import numpy as np
import rensa

from potstill.data.words import ngrams, words

SIGNATURE, BANDS = 128, 16
SHINGLE_WORDS = 3
SEED = 1
_BATCH_TEXTS = 512


class NearDuplicates:
    """Flag texts at least `threshold` similar to an earlier one, with 384 bytes per text."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._shingles: list[set[str]] = []
        self._bands: list[np.ndarray] = []  # [batch, BANDS] uint64: a hash of each band
        self._signatures: list[np.ndarray] = []  # [batch, SIGNATURE] uint16: the low bits suffice

    def add(self, text: str) -> None:
        """Add the next text."""
        self._shingles.append(ngrams(words(text), SHINGLE_WORDS))
        if len(self._shingles) == _BATCH_TEXTS:
            self._sign()

    def flags(self) -> np.ndarray:
        """Return ``[texts]``, True for each text to drop. Keep the first of similar texts."""
        self._sign()
        if not self._bands:
            return np.zeros(0, dtype=bool)
        bands, signatures = np.concatenate(self._bands), np.concatenate(self._signatures)
        duplicate = np.zeros(len(bands), dtype=bool)
        for band in bands.T:
            order = np.argsort(band, kind="stable")  # groups of equal bands, each in text order
            same = band[order[1:]] == band[order[:-1]]
            starts = np.concatenate([[True], ~same])
            first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
            previous = np.concatenate([order[:1], order[:-1]])
            for earlier in (first, previous):
                candidates = ~starts & ~duplicate[order]
                texts, others = order[candidates], earlier[candidates]
                duplicate[texts] |= _similarity(signatures, texts, others) >= self.threshold
        return duplicate

    def matches(self, earlier: NearDuplicates) -> np.ndarray:
        """Return ``[texts]``, True for each text that is similar to one of ``earlier``."""
        self._sign()
        earlier._sign()
        found = np.zeros(sum(map(len, self._bands)), dtype=bool)
        if not self._bands or not earlier._bands:
            return found
        bands, signatures = np.concatenate(self._bands), np.concatenate(self._signatures)
        others = np.concatenate(earlier._signatures)
        for band, known in zip(bands.T, np.concatenate(earlier._bands).T, strict=True):
            order = np.argsort(known, kind="stable")
            for side, shift in (("left", 0), ("right", -1)):  # first and last text of equal band
                place = np.searchsorted(known, band, side, sorter=order) + shift  # type: ignore[call-overload]
                candidate = order[place.clip(0, len(order) - 1)]
                texts = np.flatnonzero(known[candidate] == band)
                same = signatures[texts] == others[candidate[texts]]
                found[texts] |= same.mean(-1) >= self.threshold
        return found

    def _sign(self) -> None:
        if not self._shingles:
            return
        rows = rensa.RMinHash.digests_from_token_sets(self._shingles, SIGNATURE, SEED)
        numbers = np.array(rows, dtype=np.uint64)
        self._bands.append(_hash_bands(numbers.reshape(len(numbers), BANDS, -1)))
        self._signatures.append(numbers.astype(np.uint16))
        self._shingles.clear()


def _hash_bands(bands: np.ndarray) -> np.ndarray:
    """Return ``[texts, BANDS]`` 64-bit hashes of ``[texts, BANDS, r]``."""
    value = np.zeros(bands.shape[:2], dtype=np.uint64)
    for i in range(bands.shape[-1]):
        value = (value ^ bands[..., i]) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    return value


def _similarity(signatures: np.ndarray, texts: np.ndarray, others: np.ndarray) -> np.ndarray:
    similarity = np.empty(len(texts))
    for start in range(0, len(texts), 65536):  # bounds the memory of the gathered signatures
        part = slice(start, start + 65536)
        similarity[part] = (signatures[texts[part]] == signatures[others[part]]).mean(-1)
    return similarity
