"""Which parts of two vocabularies, and of two tokenizations of one text, correspond."""

from potstill.alignment.vocabulary import shared_rows as shared_rows

__all__ = ["shared_rows"]
