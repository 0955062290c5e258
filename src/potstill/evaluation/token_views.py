"""Show a few held-out answers token by token, and the tokens where the student is worst.

Stored for the report: nats, and each model's most likely next tokens as text with probabilities.
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
VIEWED_TOKENS = 120  # of each answer
WORST = 12
CONTEXT = 80  # characters


def token_views(pair: HeldOut, before: TokenScores, after: TokenScores) -> dict[str, Any]:
    """Return what evaluation.json stores of single tokens.

    ``token_view`` is the first held-out answer (None if there is none), ``more_token_views`` a few
    more. Each token has its KL from the teacher (None across tokenizers), −log p, and each
    model's most likely tokens under ``next`` (no teacher across tokenizers). ``worst_tokens`` have
    the highest KL after training, at most one a conversation; none across tokenizers.
    """
    tokens = _SupervisedTokens(pair, before, after)
    numbers = [i for i in range(len(pair.conversations)) if (after.conversation == i).any()]
    views = [
        {
            "prompt": _question(pair, number),
            "tokens": [tokens.view(i) for i in tokens.of(number)[:VIEWED_TOKENS]],
        }
        for number in numbers[:VIEWED_ANSWERS]
    ]
    first = views[0] if views else None
    worst = _worst(pair, tokens)
    return {"token_view": first, "more_token_views": views[1:], "worst_tokens": worst}


class _SupervisedTokens:
    """The supervised tokens of all held-out conversations, numbered in order."""

    def __init__(self, pair: HeldOut, before: TokenScores, after: TokenScores) -> None:
        self.scores = {"before": before, "after": after}
        labels = pair.dataset["labels"]
        self.ids = [label for one in labels for label in one[1:] if label != IGNORED]
        self.spell = speller(pair.tokenizer)

    def of(self, conversation: int) -> list[int]:
        """Return the numbers of one conversation's tokens."""
        chosen = self.scores["after"].conversation == conversation
        numbers: list[int] = chosen.nonzero()[:, 0].tolist()
        return numbers

    def view(self, i: int) -> dict[str, Any]:
        """Return one token as evaluation.json stores it."""
        nats: dict[str, float | None] = {}
        for name, scores in self.scores.items():
            nats[f"{name}_kl_nats"] = None if scores.kl is None else scores.kl[i].item()
            nats[f"{name}_nll_nats"] = scores.nll[i].item()
        likely = {"teacher": self.scores["after"].teacher_likeliest}
        likely |= {name: scores.likeliest for name, scores in self.scores.items()}
        next_tokens = {
            name: self._spelled(one, i) for name, one in likely.items() if one is not None
        }
        return {"text": self.spell(self.ids[i]), **nats, "next": next_tokens}

    def _spelled(self, likeliest: Likeliest, i: int) -> list[list[Any]]:
        pairs = zip(likeliest.ids[i].tolist(), likeliest.probabilities[i].tolist(), strict=True)
        return [[self.spell(token), round(probability, 4)] for token, probability in pairs]


def speller(tokenizer: Any) -> Callable[[int], str]:
    """Return `spelled` for one tokenizer; without known bytes, its decoding of one token."""
    try:
        tokens = token_bytes(tokenizer)
    except OpaqueTokenizer:
        return lambda token: str(tokenizer.decode([token]))
    return lambda token: spelled(token, tokens, tokenizer)


def spelled(token: int, tokens: list[bytes | None], tokenizer: Any) -> str:
    """Return the text of an id, with blanks; ``tokens`` as from `token_bytes`.

    Special tokens are shown by name, incomplete characters as ``\\xe2``, other ids as empty text.
    """
    known = tokens[token] if token < len(tokens) else None
    if known is not None:
        return known.decode("utf-8", "backslashreplace")
    return str(tokenizer.convert_ids_to_tokens(token) or "") if token < len(tokenizer) else ""


def _worst(pair: HeldOut, tokens: _SupervisedTokens) -> list[dict[str, Any]]:
    kl = tokens.scores["after"].kl
    if kl is None:
        return []
    worst = []
    for conversation in range(len(pair.conversations)):
        numbers = tokens.of(conversation)
        if numbers:
            position = int(torch.stack([kl[i] for i in numbers]).argmax())
            context = pair.tokenizer.decode([tokens.ids[i] for i in numbers[:position]])
            place = {"prompt": _question(pair, conversation), "context": _last_words(context)}
            worst.append({**place, **tokens.view(numbers[position])})
    return sorted(worst, key=lambda view: -view["after_kl_nats"])[:WORST]


def _last_words(text: str) -> str:
    """Return the end of a text, cut at a word."""
    return text if len(text) <= CONTEXT else "… " + text[-CONTEXT:].partition(" ")[2]


def _question(pair: HeldOut, conversation: int) -> str:
    """Return the question; an empty text for plain text."""
    found = pair.conversations[conversation]
    return last_question(found) if "messages" in found else ""
