"""From an encoded conversation to its prompt, and from the student's answer to a row to train on.

The last supervised run of a row is the answer that the student writes again. Its text is the
student's, so the loss has no part that assumes the teacher's: no hard labels, no cross-entropy.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from potstill.alignment import StudentTextCells, cached_cells, special_ids, token_bytes
from potstill.alignment.positions import NO_TARGET, align
from potstill.data import IGNORED
from potstill.data.batches import Encoded
from potstill.data.pairs import PLACES
from potstill.data.prompt_rows import answer_end, prompt_length, with_answer
from potstill.errors import ConfigError
from potstill.models import cache_folder
from potstill.training.cross_objective import CrossObjective
from potstill.training.objectives import LogitsObjective, Objective


class AnswerRows(Protocol):
    """Make the rows of one method from sampled answers."""

    def row(self, source: Encoded, sampled: list[int], *, ended: bool) -> Encoded | None:
        """Return the row for ``sampled`` ids after the prompt of ``source``; None if not usable.

        ``ended`` says that the last id ends the answer.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SameTokens:
    """Method logits: the teacher reads the sampled ids, the first ``rows`` of the vocabulary."""

    rows: int | None

    def row(self, source: Encoded, sampled: list[int], *, ended: bool) -> Encoded | None:
        """Return prompt and answer; cut before an id that the teacher does not have."""
        prompt = source["input_ids"][: prompt_length(source["labels"])]
        if self.rows is not None:
            unknown = (i for i, token in enumerate(sampled) if token >= self.rows)
            sampled = sampled[: next(unknown, len(sampled))]
        if not sampled:
            return None
        return with_answer(prompt, sampled)


class OtherTokens:
    """Method cross: the teacher reads the same bytes in its own tokens.

    The student's ids are kept as it sampled them. Tokens without a target are not learned.
    """

    def __init__(self, objective: CrossObjective, dataset: Iterable[Encoded]) -> None:
        self.cells, self.tokenizer = objective.cells, objective.teacher_tokenizer
        self.student_tokens = token_bytes(objective.tokenizer)
        self.teacher_tokens = token_bytes(self.tokenizer)
        special = special_ids(self.tokenizer)
        ends = Counter(answer_end(row, special, prefix="teacher_") for row in dataset)
        ends.pop(None, None)
        self.end = next((token for token, _ in ends.most_common(1)), None)
        self.anchor = self._tokenized("\n")

    def row(self, source: Encoded, sampled: list[int], *, ended: bool) -> Encoded | None:
        """Return the row with the teacher's tokens, and the places of the targets."""
        end = sampled[-1:] if ended else []
        text, kept = self._text(sampled[: len(sampled) - len(end)])
        if kept < len(sampled) - len(end):
            end = []  # a special token or a broken character: cut before it
        answer = [*sampled[:kept], *end]
        theirs = self._teacher_ids(source, text)
        if not answer or theirs is None:
            return None
        if end and self.end is not None:
            theirs = [*theirs, self.end]
        prompt = source["input_ids"][: prompt_length(source["labels"])]
        teacher_labels = source["teacher_labels"]
        teacher_prompt = source["teacher_input_ids"][: prompt_length(teacher_labels)]
        ids, teacher_ids = [*prompt, *answer], [*teacher_prompt, *theirs]
        found = align(
            teacher_ids,
            [i >= len(teacher_prompt) for i in range(len(teacher_ids))],
            ids,
            [i >= len(prompt) for i in range(len(ids))],
            cells=self.cells,
            teacher_tokens=self.teacher_tokens,
            student_tokens=self.student_tokens,
        )
        if found is None or all(index == NO_TARGET for index in found.teacher_index):
            return None
        pairs = zip(ids, found.teacher_index, strict=True)
        return {
            "input_ids": ids,
            "labels": [IGNORED if index == NO_TARGET else token for token, index in pairs],
            **{name: getattr(found, name) for name in (*PLACES, "chunk", "teacher_chunk")},
            "teacher_input_ids": teacher_ids,
            "teacher_labels": [*[IGNORED] * len(teacher_prompt), *theirs],
        }

    def _text(self, sampled: list[int]) -> tuple[str, int]:
        """Return the longest beginning that is text, and how many ids it has."""
        pieces: list[bytes] = []
        for token in sampled:
            piece = self.student_tokens[token] if token < len(self.student_tokens) else None
            if piece is None:
                break
            pieces.append(piece)
        text = b"".join(pieces)
        count = len(pieces)
        while count:
            try:
                return text.decode(), count
            except UnicodeDecodeError as error:
                while len(text) > error.start:  # back to the last whole token before the fault
                    count -= 1
                    text = text[: len(text) - len(pieces[count])]
        return "", 0

    def _teacher_ids(self, source: Encoded, text: str) -> list[int] | None:
        """Return the teacher's ids of the text within a conversation; None if bytes are lost."""
        ours = self._first_bytes(source["labels"], self.student_tokens)
        theirs = self._first_bytes(source["teacher_labels"], self.teacher_tokens)
        if ours[:1] == b" " and theirs[:1] != b" " and text.startswith(" "):
            text = text[1:]  # the student's tokenizer begins every text with a space
        anchored = self._tokenized(f"\n{text}")
        for ids in (anchored[len(self.anchor) :], self._tokenized(text)):
            pieces = [self.teacher_tokens[token] for token in ids]
            if None not in pieces and b"".join(filter(None, pieces)) == text.encode():
                return ids
        return None

    def _tokenized(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer([text], add_special_tokens=False)["input_ids"][0]
        return ids

    @staticmethod
    def _first_bytes(labels: list[int], tokens: Sequence[bytes | None]) -> bytes:
        start = prompt_length(labels)
        return (tokens[labels[start]] or b"") if start < len(labels) else b""


def on_students_text(objective: Objective, dataset: Iterable[Encoded]) -> tuple[Any, AnswerRows]:
    """Return the objective for text that the student wrote, and what makes its rows.

    ``dataset`` has rows of the off-policy objective, from which the teacher's end token is taken.
    """
    if isinstance(objective, CrossObjective):
        tokenizers = objective.teacher_tokenizer, objective.tokenizer
        base = cached_cells(*tokenizers, cache_folder() / "cells")
        objective = dataclasses.replace(objective, cells=StudentTextCells(base))
        return objective, OtherTokens(objective, dataset)
    if not isinstance(objective, LogitsObjective):
        found = f"on_policy with the objective {type(objective).__name__}"
        raise ConfigError(f"{found}: not possible; use those of method logits or cross")
    return objective, SameTokens(objective.rows)
