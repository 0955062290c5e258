"""The teacher in this process by vLLM, for a GPU: ``pip install 'potstill[vllm]'``.

vLLM is given ids and gives ids back: prompts are rendered, and answers decoded, as the local engine does it. Of vLLM's defaults for
a model only the tokens that end an answer are used; what is sampled, and how, is `Sampling` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from potstill.data.chat_templates import render
from potstill.errors import ConfigError, ModelError
from potstill.generation.engine import Answer, Request, Unit
from potstill.generation.keys import identify_tokenizer
from potstill.sampling.sampler import Sampling


class VllmEngine:
    """Answers with the model at ``location``, which vLLM batches by itself. ``nats``: say how likely each answer was, too.

    Raises: ConfigError if vLLM is not installed; ModelError if it cannot open the model, and from `answer` where it fails later (a
    prompt that is too long, no memory left); ChatTemplateError.
    """

    unit_size = 1024

    def __init__(
        self,
        teacher: str,
        location: str,
        tokenizer: Any,
        sampling: Sampling,
        *,
        dtype: str = "bfloat16",
        trust_remote_code: bool = False,
        nats: bool = False,
    ) -> None:
        try:
            import vllm
        except ImportError:
            raise ConfigError("--engine vllm needs the package vllm and a GPU: pip install 'potstill[vllm]'") from None
        self.vllm, self.tokenizer, self.sampling, self.nats = vllm, tokenizer, sampling, nats
        self.identity = {"teacher": teacher, "revision": location, **identify_tokenizer(tokenizer)}
        try:
            self.llm = vllm.LLM(location, dtype=dtype, seed=sampling.seed, trust_remote_code=trust_remote_code)
        except Exception as error:  # vLLM raises what its many parts raise
            raise ModelError(f"{teacher}: vLLM cannot open it ({_reason(error)}); mend that, or use --engine local") from error

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """One unit after the other, each answer seeded by its key."""
        for unit in units:
            texts = [render(self.tokenizer, request.messages, for_answer=True) for request in unit]
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            prompts = [{"prompt_token_ids": prompt} for prompt in ids]
            try:
                outputs = self.llm.generate(prompts, [self._parameters(request) for request in unit], use_tqdm=False)
            except Exception as error:
                longest = max(map(len, ids))
                raise ModelError(
                    f"vLLM gave up on {len(ids)} prompts of up to {longest} tokens ({_reason(error)}); mend that, and the same "
                    "command goes on"
                ) from error
            yield [self._answer(request.key, output.outputs[0]) for request, output in zip(unit, outputs, strict=True)]

    def _parameters(self, request: Request) -> Any:
        return self.vllm.SamplingParams(
            max_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=request.seed,
            logprobs=0 if self.nats else None,  # of the sampled token alone; vLLM takes them before temperature and top_p
            detokenize=False,
        )

    def _answer(self, key: str, said: Any) -> Answer:
        ids, ended = list(said.token_ids), said.finish_reason == "stop"  # then the last id is the one that ended it
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
        return Answer(key, text, not ended, ids, -said.cumulative_logprob / max(1, len(ids)) if self.nats else None)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
