"""The teacher in this process: one batch that is filled again as answers end.

A plain loop of `model.generate` waits in each batch for its longest answer, while rows that have ended go on being computed. Here
they leave, and prompts that wait take their places.

Rounding depends on who else is in a batch, and in bfloat16 rounding decides tokens. A unit is therefore answered by itself, from an
empty batch on: made again after a kill, it is the same to the last token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from potstill.data.chat_templates import render
from potstill.data.conversations import Conversation
from potstill.sampling.batch import Batch, Row
from potstill.generation.engine import Answer, Request, Unit
from potstill.generation.keys import answered, identify, requests
from potstill.sampling.sampler import Sampling, sample_tokens, uniforms
from potstill.models.heads import carries_state

Prompt = str | list[dict[str, Any]]
"""What a user says, or a conversation that ends with it."""


def answer_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, batch_size: int = 32, **sampling: Any
) -> list[Conversation]:
    """Answer all of ``prompts``: conversations ready to learn from, in order. ``sampling`` as in `Sampling`.

    One that the token limit stopped says ``"cut_off": true``. The caller's random state is left as it was.
    Raises: ConfigError, ChatTemplateError.
    """
    chosen = Sampling(**sampling)
    engine = LocalEngine(model, tokenizer, chosen, batch_size=batch_size)
    asked = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    unit = list(requests(asked, chosen, {}))
    return [answered(*each, chosen) for each in zip(unit, engine.answer_unit(unit), strict=True)]


class LocalEngine:
    """Answers with a model of transformers, opened from ``source``, ``batch_size`` prompts at a time.

    ``nats``: say how likely each answer was, too.

    Raises, from `answer`: ChatTemplateError.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        source: str | None = None,
        batch_size: int = 32,
        unit_size: int = 256,
        nats: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.nats = model, tokenizer, sampling, nats
        self.batch_size, self.unit_size = batch_size, unit_size
        self.source = source
        self.ends = end_tokens(model, tokenizer)
        self.waits_for_all = carries_state(model)
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Which teacher this is."""
        return identify(self.source or self.model.name_or_path, self.model, self.tokenizer)

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """One unit after the other."""
        return map(self.answer_unit, units)

    @torch.inference_mode()
    def answer_unit(self, unit: Unit) -> list[Answer]:
        """All answers of a unit, in its order."""
        if not unit:
            return []
        texts = [render(self.tokenizer, request.messages, for_answer=True) for request in unit]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [_Row(request, prompt, self._room_after(prompt)) for request, prompt in zip(unit, prompts, strict=True)]
        # Neighbours of one length need little padding. The longest are taken first: `pop` takes the last.
        waiting = sorted((row for row in rows if row.most > 0), key=lambda row: len(row.prompt))
        batch = Batch(self.model, self.tokenizer.pad_token_id, self._choose)
        with tqdm(total=len(rows), unit="answer", desc="  of these", leave=False) as progress:
            while waiting or batch.rows:
                going = [row for row in batch.rows if not self._is_done(row)]
                ended = len(batch.rows) - len(going)
                if ended >= self._enough(len(batch.rows), waiting):
                    batch.keep(going)
                    batch.add([waiting.pop() for _ in range(min(len(waiting), self.batch_size - len(going)))])
                    progress.update(ended)
                else:
                    batch.step()
        return [self._answer(row) for row in rows]

    def _room_after(self, prompt: list[int]) -> int:
        """The tokens that an answer may have: as many as were asked for, or as the model's context leaves."""
        most = self.sampling.max_new_tokens
        return most if self.context is None else max(0, min(most, self.context - len(prompt)))

    def _enough(self, rows: int, waiting: Sequence[Row]) -> int:
        """How many rows must have ended for the batch to change: reading new prompts, or moving the cache, costs about a step.

        A model whose state is not made of columns (Mamba) cannot be refilled, and waits for all.
        """
        if self.waits_for_all:
            return rows
        return min(rows, max(1, self.batch_size // 8)) if waiting else -(-rows // 4)

    def _choose(self, logits: Tensor, rows: Sequence[Any]) -> None:
        uniform = torch.stack([row.uniforms[min(len(row.tokens), len(row.uniforms) - 1)] for row in rows])
        tokens = sample_tokens(logits, uniform, temperature=self.sampling.temperature, top_p=self.sampling.top_p)
        nats = torch.nn.functional.cross_entropy(logits, tokens, reduction="none").tolist() if self.nats else [0.0] * len(rows)
        for row, token, more in zip(rows, tokens.tolist(), nats, strict=True):
            if not self._is_done(row):  # one that has ended stays until enough others have
                row.tokens.append(token)
                row.nats += more

    def _is_done(self, row: Any) -> bool:
        return len(row.tokens) == row.most or self._has_ended(row)

    def _has_ended(self, row: Row) -> bool:
        return bool(row.tokens) and row.tokens[-1] in self.ends

    def _answer(self, row: _Row) -> Answer:
        ended = self._has_ended(row)
        text = self.tokenizer.decode(row.tokens[:-1] if ended else row.tokens, skip_special_tokens=True).strip()
        return Answer(row.request.key, text, not ended, row.tokens, row.nats / max(1, len(row.tokens)) if self.nats else None)


class _Row(Row):
    def __init__(self, request: Request, prompt: list[int], most: int) -> None:
        super().__init__(prompt)
        self.request, self.most, self.uniforms, self.nats = request, most, uniforms(request.seed, most), 0.0


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer, by the model's generation config and by its tokenizer."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
