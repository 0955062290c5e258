"""Generate answers with vLLM in this process, on a GPU.

vLLM receives and returns token ids; prompts are rendered and answers decoded as in the local
engine. Of the model's generation defaults only the end tokens apply; `Sampling` sets the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from potstill.data.chat_templates import render
from potstill.errors import ConfigError, ModelError
from potstill.generation.engine import Answer, Request, Unit
from potstill.generation.keys import identify_tokenizer
from potstill.protocols import Tokenizer
from potstill.sampling.sampler import Sampling


class _CompletionOutput(Protocol):
    token_ids: Sequence[int]
    finish_reason: str
    cumulative_logprob: float


class VllmEngine:
    """Answer with the model at `location`; with `nats`, also measure the likelihood of answers.

    Raises: ConfigError if vLLM is not installed; ModelError if it cannot open the model.
    """

    unit_size = 1024

    def __init__(
        self,
        teacher: str,
        location: str,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        dtype: str = "bfloat16",
        trust_remote_code: bool = False,
        nats: bool = False,
    ) -> None:
        try:
            import vllm
        except ImportError:
            message = "--engine vllm needs a GPU and the package vllm: pip install 'potstill[vllm]'"
            raise ConfigError(message) from None
        self.vllm, self.tokenizer, self.sampling, self.nats = vllm, tokenizer, sampling, nats
        self.identity = {"teacher": teacher, "revision": location, **identify_tokenizer(tokenizer)}
        try:
            self.llm = vllm.LLM(
                location, dtype=dtype, seed=sampling.seed, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # vLLM has no base class for its errors
            message = f"{teacher}: vLLM cannot open it ({_reason(error)})"
            raise ModelError(f"{message}; correct that, or use --engine local") from error

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """Yield the answers of one unit after the other, each seeded by its key.

        Raises: ChatTemplateError; ModelError if vLLM fails, for example on a long prompt.
        """
        for unit in units:
            texts = [
                render(self.tokenizer, one.messages, tools=one.tools, for_answer=True)
                for one in unit
            ]
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            prompts = [{"prompt_token_ids": prompt} for prompt in ids]
            try:
                parameters = [self._parameters(request) for request in unit]
                outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
            except Exception as error:
                raise ModelError(
                    f"vLLM failed on {len(ids)} prompts of up to {max(map(len, ids))} tokens "
                    f"({_reason(error)}); correct that and run the same command again to continue"
                ) from error
            pairs = zip(unit, outputs, strict=True)
            yield [self._answer(request.key, output.outputs[0]) for request, output in pairs]

    def _parameters(self, request: Request) -> object:
        return self.vllm.SamplingParams(
            max_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=request.seed,
            # 0: the sampled token's alone, before temperature and top_p
            logprobs=0 if self.nats else None,
            detokenize=False,
        )

    def _answer(self, key: str, output: _CompletionOutput) -> Answer:
        ids, ended = list(output.token_ids), output.finish_reason == "stop"
        text_ids = ids[:-1] if ended else ids  # without the end token
        text = self.tokenizer.decode(text_ids, skip_special_tokens=True).strip()
        nats_per_token = -output.cumulative_logprob / max(1, len(ids)) if self.nats else None
        return Answer(key, text, not ended, ids, nats_per_token)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
