"""Test the vLLM engine with a fake vLLM, because the real one needs a GPU.

The fake classes have the signatures, results and errors of vLLM 0.33, and run a tiny transformers
model.
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
from potstill.generation.vllm import VllmEngine
from potstill.sampling.sampler import sample_tokens, uniforms

SAMPLING = Sampling(max_new_tokens=12, seed=3)
MAX_MODEL_LEN = 256
ENDS = [265, *range(0, 256, 9)]


@dataclass
class SamplingParams:
    """Fake vllm.SamplingParams: the relevant fields with vLLM's defaults."""

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
    """Fake vllm.outputs.CompletionOutput: ids and log-probability include the end token."""

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
    """Fake of vLLM's error, which is not a ValueError from 0.33 on."""


class LLM:
    """Fake vllm.LLM: answers in prompt order; only the end tokens of the model's defaults apply."""

    opened: list[dict[str, Any]] = []

    def __init__(
        self,
        model: str,
        *,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        seed: int = 0,
        tensor_parallel_size: int = 1,
    ) -> None:
        if not Path(model).is_dir():
            raise OSError(f"{model} is not a\nlocal folder")
        LLM.opened.append(
            {"model": model, "dtype": dtype, "seed": seed, "trust_remote_code": trust_remote_code}
        )
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
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if (longest := max(map(len, ids))) > MAX_MODEL_LEN:
            raise VLLMValidationError(
                f"The decoder prompt (length {longest}) is longer than the maximum model length of "
                f"{MAX_MODEL_LEN}."
            )
        return list(map(self._complete, range(len(ids)), ids, sampling_params))

    @torch.no_grad()
    def _complete(self, number: int, prompt: list[int], params: SamplingParams) -> RequestOutput:
        assert params.seed is not None
        assert params.max_tokens is not None
        settings = {"temperature": params.temperature, "top_p": params.top_p}
        ids, logprob, reason = list[int](), 0.0, "length"
        for uniform in uniforms(params.seed, params.max_tokens):
            logits = self.model(torch.tensor([prompt + ids])).logits[:, -1].float()
            token = int(sample_tokens(logits, uniform[None], **settings))
            ids.append(token)
            logprob += float(logits.log_softmax(-1)[0, token])
            if token in ENDS:
                reason = "stop"
                break
        logprobs = (None, None) if params.logprobs is None else (logprob, [])
        output = CompletionOutput(0, "", tuple(ids), *logprobs, finish_reason=reason)
        return RequestOutput(str(number), None, prompt, None, [output], True)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "opened", [])
    return module


def unit(sampling: Sampling = SAMPLING, count: int = 10) -> list[Request]:
    texts = [f"the rain {i}" + " in the rain" * (i % 4) for i in range(count)]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    return list(requests(prompts, sampling, {}))


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    "sampling",
    [SAMPLING, Sampling(max_new_tokens=5, temperature=0), Sampling(max_new_tokens=5, top_p=0.5)],
)
def test_answers_ids_and_likelihoods_are_equal_to_those_of_the_local_engine(
    tokenizer: Any, tmp_path: Path, sampling: Sampling
) -> None:
    engine = VllmEngine("teacher", str(tmp_path), tokenizer, sampling, nats=True)
    local = LocalEngine(tiny_model().double(), tokenizer, sampling, nats=True)
    local.sampler.ends = set(ENDS)
    asked = unit(sampling)
    (answers,) = engine.answer([asked])
    expected = local.answer_unit(asked)
    for answer, other in zip(answers, expected, strict=True):
        ignored = {"nats_per_token": None}
        assert answer.as_row() | ignored == other.as_row() | ignored
        assert answer.nats_per_token == pytest.approx(other.nats_per_token, rel=1e-5)
    if sampling is SAMPLING:
        assert {answer.cut_off for answer in answers} == {True, False}


@pytest.mark.usefixtures("vllm")
def test_an_answer_does_not_depend_on_the_other_requests(tokenizer: Any, tmp_path: Path) -> None:
    engine, asked = VllmEngine("teacher", str(tmp_path), tokenizer, SAMPLING), unit()
    together = [answer for answers in engine.answer([asked[:7], asked[7:]]) for answer in answers]
    alone = [answer for request in reversed(asked) for [answer] in engine.answer([[request]])]
    assert together == alone[::-1]
    assert all(answer.nats_per_token is None for answer in together)


@pytest.mark.usefixtures("vllm")
def test_the_model_is_opened_in_the_requested_dtype(tokenizer: Any, tmp_path: Path) -> None:
    engine = VllmEngine("teacher", str(tmp_path), tokenizer, SAMPLING, dtype="float16")
    assert LLM.opened == [
        {"model": str(tmp_path), "dtype": "float16", "seed": 3, "trust_remote_code": False}
    ]
    assert engine.identity.keys() == {"teacher", "revision", "tokenizer", "chat_template"}


@pytest.mark.usefixtures("vllm")
def test_an_error_inside_vllm_is_a_model_error_of_one_line(tokenizer: Any, tmp_path: Path) -> None:
    message = r"^teacher: vLLM cannot open it \(nowhere is not a local folder\); .*--engine local$"
    with pytest.raises(ModelError, match=message):
        VllmEngine("teacher", "nowhere", tokenizer, SAMPLING)
    engine = VllmEngine("teacher", str(tmp_path), tokenizer, SAMPLING)
    long = list(requests([[{"role": "user", "content": "x" * 400}]], SAMPLING, {}))
    message = r"vLLM failed on 1 prompts of up to \d{3} tokens \(.*maximum model length of 256"
    with pytest.raises(ModelError, match=message):
        next(engine.answer([long]))
    without_template = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    engine = VllmEngine("teacher", str(tmp_path), without_template, SAMPLING)
    with pytest.raises(ChatTemplateError):
        next(engine.answer([unit()]))


def test_without_vllm_the_error_names_the_package_to_install(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'potstill\[vllm\]'"):
        VllmEngine("teacher", "folder", tokenizer, SAMPLING)


@pytest.mark.usefixtures("vllm")
def test_the_generate_command_stores_the_answers_of_vllm(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").symlink_to(model_folder())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the rain"}\n{"prompt": "in the rain"}\n')
    command = "generate teacher --prompts prompts.jsonl --output-dir out --engine vllm"
    options = "--keep cut_off --max-new-tokens 6 --samples 3 --choose likeliest"
    assert cli.main([*command.split(), *options.split()]) == 0
    assert LLM.opened[0]["dtype"] == "bfloat16"
    assert '"nats_per_token"' in (tmp_path / "out" / "conversations.jsonl").read_text()
    assert '"engine": "vllm"' in (tmp_path / "out" / "manifest.json").read_text()
