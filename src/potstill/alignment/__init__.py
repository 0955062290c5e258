"""Align two vocabularies, and two tokenizations of one text."""

from potstill.alignment.cells import VocabularyCells as VocabularyCells
from potstill.alignment.cells import cached_cells as cached_cells
from potstill.alignment.pieces import PieceCells as PieceCells
from potstill.alignment.positions import Positions as Positions
from potstill.alignment.positions import align as align
from potstill.alignment.spans import groups as groups
from potstill.alignment.stop_tokens import stop_tokens as stop_tokens
from potstill.alignment.student_text import StudentTextCells as StudentTextCells
from potstill.alignment.token_bytes import special_ids as special_ids
from potstill.alignment.token_bytes import token_bytes as token_bytes
from potstill.alignment.vocabulary import VocabularyComparison as VocabularyComparison
from potstill.alignment.vocabulary import compare_vocabularies as compare_vocabularies
from potstill.alignment.vocabulary import shared_rows as shared_rows

__all__ = [
    "PieceCells",
    "Positions",
    "StudentTextCells",
    "VocabularyCells",
    "VocabularyComparison",
    "align",
    "cached_cells",
    "compare_vocabularies",
    "groups",
    "shared_rows",
    "special_ids",
    "stop_tokens",
    "token_bytes",
]


def __getattr__(name: str) -> object:
    if name in ("BytePrefixCells", "PushForwardCells", "StrictCells"):
        import importlib
        import warnings

        moved = f"potstill.alignment.{name} is now potstill.baselines.{name}"
        warnings.warn(moved, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module("potstill.baselines"), name)
    raise AttributeError(f"module 'potstill.alignment' has no attribute {name!r}")
