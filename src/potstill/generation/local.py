"""Answer with a model in this process: one batch, refilled as answers end.

A plain loop of `model.generate` computes finished rows until the longest answer of a batch ends.
Here finished rows leave the batch and waiting prompts take their places. Rounding depends on the
other rows of a batch, and in bfloat16 it decides tokens. Each unit therefore starts with an empty
batch, so that it gives the same tokens when it is repeated after a kill.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.data.chat_templates import render
from potstill.data.conversations import Conversation
from potstill.generation.engine import Answer, Request, Unit
from potstill.generation.keys import answered, identify, requests
from potstill.models.heads import carries_state
from potstill.models.vocabulary import padding_id, refuse_unknown_ids
from potstill.progress import Progress
from potstill.protocols import CausalLM, Tokenizer
from potstill.sampling.batch import AnswerBatch, Row
from potstill.sampling.sampler import Sampling, sample_tokens, uniforms

Prompt = str | list[dict[str, Any]] | Conversation
"""A user's text, or messages that end with a user's turn, or these with ``tools``."""


def answer_prompts(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 32,
    **sampling: Any,
) -> list[Conversation]:
    """Return the prompts with answers, as conversations, in order; ``sampling`` as in `Sampling`.

    An answer stopped by the token limit has ``"cut_off": true``. The global random state is not
    used. Raises: ConfigError, ChatTemplateError; ModelError for logits that are not finite.
    """
    chosen = Sampling(**sampling)
    engine = LocalEngine(model, tokenizer, chosen, batch_size=batch_size)
    messages = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    unit = list(requests(messages, chosen, {}))
    return [answered(*each, chosen) for each in zip(unit, engine.answer_unit(unit), strict=True)]


class LocalEngine:
    """Answer with a transformers model, ``batch_size`` prompts at a time.

    ``source`` identifies the model; ``nats`` also returns each answer's mean −log p.
    Raises, from `answer`: ChatTemplateError; ModelError for logits that are not finite.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        source: str | None = None,
        batch_size: int = 32,
        unit_size: int = 256,
        nats: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.nats = model, tokenizer, sampling, nats
        self.batch_size, self.unit_size, self.source = batch_size, unit_size, source
        self.ends = end_tokens(model, tokenizer)
        self.waits_for_all = carries_state(model)
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Return the teacher's name and hashes, see `keys.identify`."""
        return identify(self.source or self.model.name_or_path, self.model, self.tokenizer)

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """Answer one unit after another."""
        return map(self.answer_unit, units)

    @torch.inference_mode()
    def answer_unit(self, unit: Unit) -> list[Answer]:
        """Return the answers of a unit, in its order."""
        if not unit:
            return []
        texts = [
            render(self.tokenizer, one.messages, tools=one.tools, for_answer=True) for one in unit
        ]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [
            _Row(request, prompt, self._max_tokens(prompt))
            for request, prompt in zip(unit, prompts, strict=True)
        ]
        # Prompts of similar length need little padding. `pop` takes the longest first.
        allowed = (row for row in rows if row.max_tokens > 0)
        waiting = sorted(allowed, key=lambda row: len(row.prompt))
        highest = max((i for prompt in prompts for i in prompt), default=-1)
        refuse_unknown_ids(self.model, highest, role="teacher")
        batch = AnswerBatch(self.model, padding_id(self.tokenizer, self.model), self._choose)
        with Progress("answering", len(rows), unit="answers") as progress:
            while waiting or batch.rows:
                active = [row for row in batch.rows if not self._is_done(row)]
                ended = len(batch.rows) - len(active)
                if ended >= self._refill_threshold(len(batch.rows), waiting):
                    batch.keep(active)
                    free = min(len(waiting), self.batch_size - len(active))
                    batch.add([waiting.pop() for _ in range(free)])
                    progress.update(ended)
                else:
                    batch.step()
        return [self._answer(row) for row in rows]

    def _max_tokens(self, prompt: list[int]) -> int:
        """Return the answer's token limit: the setting, or what is left of the model's context."""
        limit = self.sampling.max_new_tokens
        return limit if self.context is None else max(0, min(limit, self.context - len(prompt)))

    def _refill_threshold(self, rows: int, waiting: Sequence[Row]) -> int:
        """Return how many rows must end before the batch changes, which costs about a step.

        A model with a recurrent state (Mamba) cannot be refilled and waits for all.
        """
        if self.waits_for_all:
            return rows
        return min(rows, max(1, self.batch_size // 8)) if waiting else -(-rows // 4)

    def _choose(self, logits: Tensor, rows: Sequence[Any]) -> None:
        uniform = torch.stack(
            [row.uniforms[min(len(row.tokens), len(row.uniforms) - 1)] for row in rows]
        )
        temperature, top_p = self.sampling.temperature, self.sampling.top_p
        tokens = sample_tokens(logits, uniform, temperature=temperature, top_p=top_p)
        nats = [0.0] * len(rows)
        if self.nats:
            nats = torch.nn.functional.cross_entropy(logits, tokens, reduction="none").tolist()
        for row, token, token_nats in zip(rows, tokens.tolist(), nats, strict=True):
            if not self._is_done(row):  # a finished row stays until enough others are
                row.tokens.append(token)
                row.nats += token_nats

    def _is_done(self, row: Any) -> bool:
        return len(row.tokens) == row.max_tokens or self._has_ended(row)

    def _has_ended(self, row: Row) -> bool:
        return bool(row.tokens) and row.tokens[-1] in self.ends

    def _answer(self, row: _Row) -> Answer:
        ended = self._has_ended(row)
        ids = row.tokens[:-1] if ended else row.tokens
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        nats = row.nats / max(1, len(row.tokens)) if self.nats else None
        return Answer(row.request.key, text, not ended, row.tokens, nats)


class _Row(Row):
    def __init__(self, request: Request, prompt: list[int], max_tokens: int) -> None:
        super().__init__(prompt)
        self.request, self.max_tokens = request, max_tokens
        self.uniforms, self.nats = uniforms(request.seed, max_tokens), 0.0


def end_tokens(model: CausalLM, tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end an answer, by the generation config and by the tokenizer."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
