"""Define the request, the answer and the interface of every generation engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Unit = Sequence["Request"]
"""Requests that are answered together, and again together if a kill interrupts them."""


@dataclass(frozen=True)
class Request:
    """A request for one answer."""

    key: str
    """A hash of everything that decides the answer (keys.py)."""
    messages: list[dict[str, Any]]
    """The conversation; its last turn is the user's."""
    tools: list[dict[str, Any]] | None = None
    """The tools that the chat template is given, as JSON schemas."""

    @property
    def seed(self) -> int:
        """Return a seed that depends on the key alone, not on the batch or on an interrupt."""
        return int(self.key[:12], 16)


@dataclass(frozen=True)
class Answer:
    """A teacher's answer to one request."""

    key: str
    text: str
    cut_off: bool
    """True if the token limit stopped the answer."""
    teacher_ids: list[int] | None = None
    """The sampled token ids, the end token included; None if the engine does not return them."""
    nats_per_token: float | None = None
    """Mean of −log p over the tokens, at temperature 1; None if not requested."""

    def as_row(self) -> dict[str, Any]:
        """Return the answer as a JSON object."""
        return asdict(self)


class Engine(Protocol):
    """Generate answers of one teacher."""

    @property
    def unit_size(self) -> int:
        """Return the number of requests per unit: a kill loses at most this many answers."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return ``teacher``, and hashes ``revision``, ``tokenizer``, ``chat_template`` or None."""

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """Yield the answers of whole units, in any order. Read `units` only as needed."""
