"""Ask an OpenAI-compatible server for the most likely tokens at each position of conversations.

vLLM's field ``prompt_logprobs`` of ``/v1/completions`` has, for each token of the prompt, the
log-probabilities of the k most likely tokens and of the token itself, by token id:

    [null, {"271": {"logprob": -0.1, "decoded_token": " the", …}, …}, …]

Other servers give log-probabilities only by the text of tokens (OpenAI's ``logprobs``). Different
tokens can have the same text, so these cannot be used. Everything that can be wrong without an
error is checked here: positions, token ids, and whether the numbers are probabilities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from potstill.data import IGNORED
from potstill.errors import ServerError
from potstill.teachers.top_k import TopKTarget

Row = dict[str, list[int]]
MOST_TOTAL = 1 + 1e-3
"""The sum of k rounded probabilities is at most this."""
MOST_DIFFERENT = 0.1
"""Share of tokens whose text may differ; partial characters are written in several ways."""


def request_body(rows: list[Row], *, model: str, top_k: int) -> bytes:
    """Return the request for conversations ``rows``.

    vLLM generates at least one token. Its defaults for sampling come from the model, and old
    versions divide these logits by the temperature too: so the temperature is given.
    """
    return json.dumps(
        {
            "model": model,
            "prompt": [row["input_ids"] for row in rows],
            "prompt_logprobs": top_k,
            "return_token_ids": True,
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
        }
    ).encode()


def positions_of(row: Row) -> list[int]:
    """Return the positions of a conversation's supervised tokens."""
    return [i for i, label in enumerate(row["labels"]) if i and label != IGNORED]


class Reply:
    """The server's reply to `request_body` for ``rows``. Raises: ServerError if it does not fit."""

    def __init__(self, content: bytes, rows: list[Row], *, model: str) -> None:
        self.rows = rows
        try:
            reply = json.loads(content)
            self.model = reply["model"]
            choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
            found = [
                choice.get("prompt_logprobs", reply.get("prompt_logprobs")) for choice in choices
            ]
            echoed = [choice.get("prompt_token_ids") for choice in choices]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            start = content[:80].decode(errors="replace")
            raise ServerError(f"its reply is not a completion ({start!r})") from error
        if self.model != model:
            raise ServerError(
                f"now serves {self.model}, not {model}; serve the former one, and run the same "
                "command again"
            )
        if any(one is None for one in found) or not found:
            raise ServerError(
                "its reply has no prompt_logprobs: the server does not give probabilities of the "
                "prompt's tokens; use vLLM or potstill serve"
            )
        self.found: list[list[Any]] = found
        for row, one, ids in zip(rows, found, echoed, strict=False):
            if ids is not None and ids != row["input_ids"]:
                raise ServerError("read other token ids than it was given; is a proxy between?")
            if len(one) != len(row["input_ids"]):
                raise ServerError(
                    f"gave {len(one)} positions for {len(row['input_ids'])} tokens; the server "
                    "must neither add nor cut tokens of the prompt"
                )
        if len(found) != len(rows):
            raise ServerError(f"answered {len(found)} of {len(rows)} conversations of a request")

    def target(self, *, top_k: int, vocabulary: int) -> TopKTarget:
        """Return the target at the supervised tokens. Raises: ServerError for impossible numbers.

        Every position must have ``top_k`` entries, or all of the ``vocabulary``.
        """
        expected = min(top_k, vocabulary)
        ids, values, nll = [], [], []
        for token, entries in self._supervised():
            best = sorted(((entry, i) for i, entry in entries.items()), reverse=True)[:top_k]
            if len(best) < expected:
                raise ServerError(
                    f"gave {len(best)} tokens at a position, and {expected} were asked for; give a "
                    "smaller top_k"
                )
            best += [(-math.inf, -1)] * (top_k - len(best))
            values.append([value for value, _ in best])
            ids.append([i for _, i in best])
            nll.append(-entries[token])
        shape = (len(nll), top_k)
        target = TopKTarget(
            torch.tensor(ids, dtype=torch.int64).reshape(shape),
            torch.tensor(values, dtype=torch.float32).reshape(shape),
            torch.tensor(nll, dtype=torch.float32),
        )
        _check_probabilities(target)
        return target

    def texts(self) -> dict[int, str]:
        """Return the text of each token that the reply has, where the server gives it."""
        return {
            int(i): entry["decoded_token"]
            for one in self.found
            for position in one
            for i, entry in (position or {}).items()
            if entry.get("decoded_token") is not None
        }

    def _supervised(self) -> Iterator[tuple[int, dict[int, float]]]:
        """Yield each supervised token and the log-probabilities at its position."""
        for row, one in zip(self.rows, self.found, strict=True):
            for i in positions_of(row):
                token = row["input_ids"][i]
                try:
                    entries = {int(j): float(entry["logprob"]) for j, entry in one[i].items()}
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ServerError(f"prompt_logprobs of position {i}: {error!r}") from error
                if token not in entries:
                    raise ServerError(
                        f"gave no probability of token {token} at position {i}, where it is: the "
                        "positions are shifted, or the server reads other tokens"
                    )
                yield token, entries


def _check_probabilities(target: TopKTarget) -> None:
    largest = target.log_probabilities.amax() if len(target.nll) else torch.tensor(0.0)
    total = target.log_probabilities.exp().sum(-1)
    if not (bool(largest <= 1e-3) and bool((total <= MOST_TOTAL).all())):
        raise ServerError(
            f"gave log-probabilities up to {float(largest):.3g} whose probabilities sum to "
            f"{float(total.max()):.4g}; they must be at most 0 and sum to at most 1: start vLLM "
            "with --logprobs-mode raw_logprobs"
        )


def check_texts(texts: dict[int, str], tokenizer: Any) -> None:
    """Raises: ServerError if the server's tokens are not those of ``tokenizer``."""
    different = []
    for i, text in texts.items():
        own = tokenizer.decode([i]) if i < len(tokenizer) else text
        if own.strip() != text.strip() and "\ufffd" not in own + text:
            different.append((i, text, own))
    if len(different) > MOST_DIFFERENT * len(texts):
        i, text, own = different[0]
        raise ServerError(
            f"its token {i} is {text!r}, and that of the tokenizer is {own!r} ({len(different)} of "
            f"{len(texts)} tokens differ); give the server's own as ?tokenizer=NAME"
        )
