"""What stands between prompts and answers: a request, an answer, and what every engine can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Unit = Sequence["Request"]
"""Requests that are answered together, and made again together if a kill leaves them unfinished."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    key: str
    """A hash of all that decides the answer (store.py)."""
    messages: list[dict[str, Any]]
    """The conversation, ending with a user's turn."""

    @property
    def seed(self) -> int:
        """The answer's own, so that neither its company nor an interrupt changes it."""
        return int(self.key[:12], 16)


@dataclass(frozen=True)
class Answer:
    """What the teacher said."""

    key: str
    text: str
    cut_off: bool
    """Stopped by the limit of tokens, so that its end is not the teacher's."""
    teacher_ids: list[int] | None = None
    """The ids that were sampled, the one that ended the answer included, where the engine gives them."""
    nats_per_token: float | None = None
    """− log of its probability under the teacher at temperature 1, over its tokens, where that was asked for."""

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Engine(Protocol):
    """Something that can let a teacher answer."""

    @property
    def unit_size(self) -> int:
        """How many requests it wants together: what a kill can cost. 1 where each answer is independent of the others."""

    @property
    def identity(self) -> dict[str, Any]:
        """Which teacher this is: ``teacher``, ``revision``, ``tokenizer`` and ``chat_template`` (hashes; None where unknown)."""

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """The answers to each unit, whole, in whatever order they are ready. ``units`` is read as far as there is work for it."""
