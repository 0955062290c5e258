"""Sample the answers to many prompts with one batch, refilled as answers end.

A plain loop of `model.generate` computes finished rows until the longest answer of a batch ends.
Here finished rows leave the batch and waiting prompts take their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.models.heads import carries_state
from potstill.models.vocabulary import padding_id
from potstill.progress import Progress
from potstill.protocols import CausalLM, Tokenizer
from potstill.sampling.batch import AnswerBatch, Row
from potstill.sampling.sampler import Sampling, sample_tokens, uniforms


class SampledRow(Row):
    """A prompt and its sampled answer."""

    def __init__(self, prompt: list[int], seed: int, max_tokens: int) -> None:
        super().__init__(prompt)
        self.max_tokens, self.uniforms = max_tokens, uniforms(seed, max_tokens)
        self.nats = 0.0
        """Sum of −log p over the answer's tokens, if it was asked for."""


class RefilledSampler:
    """Sample answers of at most ``batch_size`` prompts at a time.

    ``sampling`` gives temperature, top-p and the limit of tokens; ``nats`` also sums −log p.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        batch_size: int = 32,
        nats: bool = False,
    ) -> None:
        self.model, self.sampling, self.batch_size, self.nats = model, sampling, batch_size, nats
        self.pad = padding_id(tokenizer, model)
        self.ends = end_tokens(model, tokenizer)
        self.waits_for_all = carries_state(model)
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], *, longest: int | None = None
    ) -> list[SampledRow]:
        """Return a row for each prompt, in order; ``longest`` limits prompt and answer together.

        A prompt that leaves no room gets no tokens. An answer's random numbers depend on its seed
        alone. Raises: ModelError for logits that are not finite.
        """
        rows = [
            SampledRow(prompt, seed, self._max_tokens(prompt, longest))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        # Prompts of similar length need little padding. `pop` takes the longest first.
        allowed = (row for row in rows if row.max_tokens > 0)
        waiting = sorted(allowed, key=lambda row: len(row.prompt))
        batch = AnswerBatch(self.model, self.pad, self._choose)
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
        return rows

    def has_ended(self, row: Row) -> bool:
        """Return whether the last token of the answer ends it."""
        return bool(row.tokens) and row.tokens[-1] in self.ends

    def _max_tokens(self, prompt: list[int], longest: int | None) -> int:
        """Return the answer's token limit: the setting, or what is left of the model's context."""
        room = [limit - len(prompt) for limit in (self.context, longest) if limit is not None]
        return max(0, min([self.sampling.max_new_tokens, *room]))

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
        return len(row.tokens) == row.max_tokens or self.has_ended(row)


def end_tokens(model: CausalLM, tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end an answer, by the generation config and by the tokenizer."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
