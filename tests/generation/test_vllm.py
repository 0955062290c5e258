"""The vLLM engine against a stand-in with vLLM's own signatures (those of 0.33), whose model is a tiny one of transformers.

vLLM itself wants a GPU. What its classes take, what they give back, and what they refuse is written down here as its source has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import tiny_model
from potstill import cli
from potstill.errors import ChatTemplateError, ConfigError, ModelError
from potstill.generation import LocalEngine, Request, Sampling, requests
from potstill.sampling.sampler import sample_tokens, uniforms
from potstill.generation.vllm import VllmEngine

SAMPLING = Sampling(max_new_tokens=12, seed=3)
MAX_MODEL_LEN = 256
ENDS = [265, *range(0, 256, 9)]


@dataclass
class SamplingParams:
    """vllm.SamplingParams: the fields that matter, with vLLM's defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True


@dataclass
class CompletionOutput:
    """vllm.outputs.CompletionOutput: the id that ended an answer is among its ids, and stands in the sum of log-probabilities."""

    index: int
    text: str
    token_ids: Any
    cumulative_logprob: float | None
    logprobs: list[dict[int, Any]] | None
    routed_experts: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool


class VLLMValidationError(Exception):
    """Not a ValueError, from 0.33 on."""


class LLM:
    """vllm.LLM: answers come in the order of the prompts; of a model's defaults only its ends are applied."""

    opened: list[dict[str, Any]] = []

    def __init__(
        self, model: str, *, trust_remote_code: bool = False, dtype: str = "auto", seed: int = 0, tensor_parallel_size: int = 1
    ) -> None:
        if not Path(model).is_dir():
            raise OSError(f"{model} is not a\nlocal folder")
        LLM.opened.append({"model": model, "dtype": dtype, "seed": seed, "trust_remote_code": trust_remote_code})
        self.model = tiny_model().double()

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
    ) -> list[RequestOutput]:
        assert sampling_params is not None
        assert len(prompts) == len(sampling_params)
        assert not use_tqdm
        for prompt in prompts:
            if len(prompt["prompt_token_ids"]) > MAX_MODEL_LEN:
                raise VLLMValidationError(
                    f"The decoder prompt (length {len(prompt['prompt_token_ids'])}) is longer than the maximum model length of 256."
                )
        pairs = zip(prompts, sampling_params, strict=True)
        return [self._one(i, prompt["prompt_token_ids"], params) for i, (prompt, params) in enumerate(pairs)]

    @torch.no_grad()
    def _one(self, number: int, prompt: list[int], params: SamplingParams) -> RequestOutput:
        assert params.seed is not None
        assert params.max_tokens is not None
        numbers, said, likely, reason = uniforms(params.seed, params.max_tokens), list[int](), 0.0, "length"
        for number_of_token in numbers:
            logits = self.model(torch.tensor([prompt + said])).logits[:, -1].float()
            token = int(sample_tokens(logits, number_of_token[None], temperature=params.temperature, top_p=params.top_p))
            said.append(token)
            likely += float(logits.log_softmax(-1)[0, token])
            if token in ENDS:
                reason = "stop"
                break
        asked = params.logprobs is not None
        output = CompletionOutput(0, "", tuple(said), likely if asked else None, [] if asked else None, finish_reason=reason)
        return RequestOutput(str(number), None, prompt, None, [output], True)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "opened", [])
    return module


def unit(sampling: Sampling = SAMPLING, count: int = 10) -> list[Request]:
    prompts = [f"the rain {i}" + " in the rain" * (i % 4) for i in range(count)]
    return list(requests([[{"role": "user", "content": prompt}] for prompt in prompts], sampling, {}))


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(max_new_tokens=5, temperature=0), Sampling(max_new_tokens=5, top_p=0.5)])
def test_answers_ids_ends_and_likelihoods_are_those_of_the_local_engine(tokenizer: Any, tmp_path: Path, sampling: Sampling) -> None:
    """Sampled by one seed from one model they must agree in everything: both are given the same ids and seeds."""
    engine = VllmEngine("teacher", str(tmp_path), tokenizer, sampling, nats=True)
    local = LocalEngine(tiny_model().double(), tokenizer, sampling, nats=True)
    local.ends = set(ENDS)
    asked = unit(sampling)
    (answers,) = engine.answer([asked])
    expected = local.answer_unit(asked)
    for answer, other in zip(answers, expected, strict=True):
        assert answer.as_row() | {"nats_per_token": None} == other.as_row() | {"nats_per_token": None}
        assert answer.nats_per_token == pytest.approx(other.nats_per_token, rel=1e-5)
    if sampling is SAMPLING:
        assert {answer.cut_off for answer in answers} == {True, False}


@pytest.mark.usefixtures("vllm")
def test_an_answer_is_its_keys_whatever_it_is_asked_with(tokenizer: Any, tmp_path: Path) -> None:
    engine, asked = VllmEngine("teacher", str(tmp_path), tokenizer, SAMPLING), unit()
    together = [answer for answers in engine.answer([asked[:7], asked[7:]]) for answer in answers]
    alone = [answer for answers in engine.answer([request] for request in reversed(asked)) for answer in answers]
    assert together == alone[::-1]
    assert all(answer.nats_per_token is None for answer in together)


@pytest.mark.usefixtures("vllm")
def test_the_model_is_opened_in_the_precision_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    engine = VllmEngine("teacher", str(tmp_path), tokenizer, SAMPLING, dtype="float16")
    assert LLM.opened == [{"model": str(tmp_path), "dtype": "float16", "seed": 3, "trust_remote_code": False}]
    assert engine.identity.keys() == {"teacher", "revision", "tokenizer", "chat_template"}


@pytest.mark.usefixtures("vllm")
def test_what_goes_wrong_inside_vllm_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^teacher: vLLM cannot open it \(nowhere is not a local folder\); .*--engine local$"):
        VllmEngine("teacher", "nowhere", tokenizer, SAMPLING)
    engine = VllmEngine("teacher", str(tmp_path), tokenizer, SAMPLING)
    long = list(requests([[{"role": "user", "content": "x" * 400}]], SAMPLING, {}))
    with pytest.raises(ModelError, match=r"vLLM gave up on 1 prompts of up to \d{3} tokens \(.*maximum model length of 256"):
        next(engine.answer([long]))
    engine = VllmEngine("teacher", str(tmp_path), type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer), SAMPLING)
    with pytest.raises(ChatTemplateError):
        next(engine.answer([unit()]))


def test_without_vllm_one_line_says_what_to_install(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'potstill\[vllm\]'"):
        VllmEngine("teacher", "folder", tokenizer, SAMPLING)


@pytest.mark.usefixtures("vllm")
def test_the_command_keeps_what_vllm_says(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").symlink_to(model_folder())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the rain"}\n{"prompt": "in the rain"}\n')
    command = ["generate", "teacher", "--prompts", "prompts.jsonl", "--output-dir", "out", "--engine", "vllm", "--keep", "cut_off"]
    assert cli.main([*command, "--max-new-tokens", "6", "--samples", "3", "--choose", "likeliest"]) == 0
    assert LLM.opened[0]["dtype"] == "bfloat16"
    assert '"nats_per_token"' in (tmp_path / "out" / "conversations.jsonl").read_text()
    assert '"engine": "vllm"' in (tmp_path / "out" / "manifest.json").read_text()
