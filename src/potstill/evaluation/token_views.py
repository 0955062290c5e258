"""Some held-out answers token by token, and the places where the student is worst, with what each model would have said there.

Enough for the report to show without a model: nats, and the likeliest next tokens as text with their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from potstill.alignment import token_bytes
from potstill.data import IGNORED
from potstill.errors import OpaqueTokenizer
from potstill.evaluation.held_out import HeldOut, last_question
from potstill.evaluation.scores import Likeliest, TokenScores

VIEWED_ANSWERS = 3
VIEWED_TOKENS = 120  # of each
WORST = 12
CONTEXT = 80  # characters


def token_views(pair: HeldOut, before: TokenScores, after: TokenScores) -> dict[str, Any]:
    """What evaluation.json keeps of single tokens.

    ``token_view`` is the first held-out answer (None if there is none), ``more_token_views`` a few more: of each token the nats
    from the teacher (None across tokenizers), its surprise, −log p, and under ``next`` what each model held likeliest there (the
    teacher is missing across tokenizers). ``worst_tokens`` are those furthest from the teacher after training, at most one a
    conversation; none across tokenizers.
    """
    rows = _Rows(pair, before, after)
    answers = [number for number in range(len(pair.conversations)) if (after.conversation == number).any()][:VIEWED_ANSWERS]
    views = [
        {"prompt": _question(pair, number), "tokens": [rows.row(i) for i in rows.of(number)[:VIEWED_TOKENS]]} for number in answers
    ]
    return {"token_view": views[0] if views else None, "more_token_views": views[1:], "worst_tokens": _worst(pair, rows)}


class _Rows:
    """A supervised token of any held-out conversation, by its number among all of them, as evaluation.json has it."""

    def __init__(self, pair: HeldOut, before: TokenScores, after: TokenScores) -> None:
        self.scores = {"before": before, "after": after}
        self.ids = [label for labels in pair.dataset["labels"] for label in labels[1:] if label != IGNORED]
        self.spell = speller(pair.tokenizer)

    def of(self, conversation: int) -> list[int]:
        """The numbers of one conversation's tokens."""
        numbers: list[int] = (self.scores["after"].conversation == conversation).nonzero()[:, 0].tolist()
        return numbers

    def row(self, i: int) -> dict[str, Any]:
        """One token."""
        nats: dict[str, float | None] = {}
        for name, scores in self.scores.items():
            nats[f"{name}_kl_nats"] = None if scores.kl is None else scores.kl[i].item()
            nats[f"{name}_nll_nats"] = scores.nll[i].item()
        said = {"teacher": self.scores["after"].teacher_likeliest, **{name: one.likeliest for name, one in self.scores.items()}}
        return {
            "text": self.spell(self.ids[i]),
            **nats,
            "next": {name: self._said(one, i) for name, one in said.items() if one is not None},
        }

    def _said(self, likeliest: Likeliest, i: int) -> list[list[Any]]:
        pairs = zip(likeliest.ids[i].tolist(), likeliest.probabilities[i].tolist(), strict=True)
        return [[self.spell(token), round(probability, 4)] for token, probability in pairs]


def speller(tokenizer: Any) -> Callable[[int], str]:
    """`spelled` for one tokenizer; where bytes cannot be recovered, as it decodes a token by itself."""
    try:
        tokens = token_bytes(tokenizer)
    except OpaqueTokenizer:
        return lambda token: str(tokenizer.decode([token]))
    return lambda token: spelled(token, tokens, tokenizer)


def spelled(token: int, tokens: list[bytes | None], tokenizer: Any) -> str:
    """The text of an id: blanks kept, special tokens by name, bytes that are no whole character as ``\\xe2``; else nothing.

    ``tokens`` is what `token_bytes` gives.
    """
    known = tokens[token] if token < len(tokens) else None
    if known is not None:
        return known.decode("utf-8", "backslashreplace")
    return str(tokenizer.convert_ids_to_tokens(token) or "") if token < len(tokenizer) else ""


def _worst(pair: HeldOut, rows: _Rows) -> list[dict[str, Any]]:
    kl = rows.scores["after"].kl
    if kl is None:
        return []
    worst = []
    for conversation in range(len(pair.conversations)):
        numbers = rows.of(conversation)
        if numbers:
            place = int(torch.stack([kl[i] for i in numbers]).argmax())
            context = _last_words(pair.tokenizer.decode([rows.ids[i] for i in numbers[:place]]))
            worst.append({"prompt": _question(pair, conversation), "context": context, **rows.row(numbers[place])})
    return sorted(worst, key=lambda row: -row["after_kl_nats"])[:WORST]


def _last_words(text: str) -> str:
    """The end of a text, from a word's beginning on."""
    return text if len(text) <= CONTEXT else "… " + text[-CONTEXT:].partition(" ")[2]


def _question(pair: HeldOut, conversation: int) -> str:
    """The question; of plain text, which has none, nothing."""
    asked = pair.conversations[conversation]
    return last_question(asked) if "messages" in asked else ""
