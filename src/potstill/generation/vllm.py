"""The teacher in this process by vLLM, for a GPU: ``pip install 'potstill[vllm]'``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from potstill.errors import ConfigError
from potstill.generation.engine import Answer, Unit
from potstill.generation.keys import identify_tokenizer
from potstill.generation.sampling import Sampling


class VllmEngine:
    """Answers with vLLM, which batches by itself. Raises: ConfigError if it is not installed."""

    unit_size = 1024

    def __init__(self, teacher: str, location: str, tokenizer: Any, sampling: Sampling, *, nats: bool = False) -> None:
        try:
            import vllm
        except ImportError:
            raise ConfigError("--engine vllm needs the package vllm and a GPU: pip install 'potstill[vllm]'") from None
        self.vllm, self.sampling, self.nats = vllm, sampling, nats
        self.llm = vllm.LLM(model=location, seed=sampling.seed)
        self.template = tokenizer.chat_template
        self.identity = {"teacher": teacher, "revision": location, **identify_tokenizer(tokenizer)}

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """One unit after the other, each answer seeded by its key."""
        for unit in units:
            parameters = [
                self.vllm.SamplingParams(
                    max_tokens=self.sampling.max_new_tokens,
                    temperature=self.sampling.temperature,
                    top_p=self.sampling.top_p,
                    seed=request.seed,
                    logprobs=0 if self.nats else None,
                )
                for request in unit
            ]
            messages = [request.messages for request in unit]
            outputs = self.llm.chat(messages, parameters, use_tqdm=False, chat_template=self.template)
            yield [self._answer(request.key, output.outputs[0]) for request, output in zip(unit, outputs, strict=True)]

    def _answer(self, key: str, said: Any) -> Answer:
        ids = list(said.token_ids)
        nats = -said.cumulative_logprob / max(1, len(ids)) if self.nats else None
        return Answer(key, said.text.strip(), said.finish_reason == "length", ids, nats)
