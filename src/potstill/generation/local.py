"""Answer with a model in this process: one batch, refilled as answers end.

Rounding depends on the other rows of a batch, and in bfloat16 it decides tokens. Each unit
therefore starts with an empty batch, so that it gives the same tokens when it is repeated after a
kill.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from potstill.data.chat_templates import render
from potstill.data.conversations import Conversation
from potstill.generation.engine import Answer, Request, Unit
from potstill.generation.keys import answered, identify, requests
from potstill.models.vocabulary import refuse_unknown_ids
from potstill.protocols import CausalLM, Tokenizer
from potstill.sampling import RefilledSampler, SampledRow, Sampling

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
        self.unit_size, self.source = unit_size, source
        self.sampler = RefilledSampler(model, tokenizer, sampling, batch_size=batch_size, nats=nats)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Return the teacher's name and hashes, see `keys.identify`."""
        return identify(self.source or self.model.name_or_path, self.model, self.tokenizer)

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """Answer one unit after another."""
        return map(self.answer_unit, units)

    def answer_unit(self, unit: Unit) -> list[Answer]:
        """Return the answers of a unit, in its order."""
        if not unit:
            return []
        texts = [
            render(self.tokenizer, one.messages, tools=one.tools, for_answer=True) for one in unit
        ]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        highest = max((i for prompt in prompts for i in prompt), default=-1)
        refuse_unknown_ids(self.model, highest, role="teacher")
        rows = self.sampler.sample(prompts, [one.seed for one in unit])
        return [self._answer(*each) for each in zip(unit, rows, strict=True)]

    def _answer(self, request: Request, row: SampledRow) -> Answer:
        ended = self.sampler.has_ended(row)
        ids = row.tokens[:-1] if ended else row.tokens
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        nats = row.nats / max(1, len(row.tokens)) if self.nats else None
        return Answer(request.key, text, not ended, row.tokens, nats)
