"""Tiny models and a toy tokenizer: no network, no weights, everything in seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # more threads are slower for tiny models

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
ABSENT = not (CHROMIUM and shutil.which("chromedriver") and importlib.util.find_spec("selenium"))
IN_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(
        ABSENT and os.environ.get("CI") != "true",
        reason="needs chromium, chromedriver and selenium",
    ),
]
SWITCHES = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
]
SWITCHES += [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "r a", "ra in", "Ġ a", "o n"]


def toy_tokenizer(*, chat_template: str | None = CHATML, added: tuple[str, ...] = ()) -> Any:
    """A byte-level BPE tokenizer with 256 bytes, eight merges, and ChatML's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(merge.split()) for merge in MERGES)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(merge.split()) for merge in MERGES])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", *added)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = chat_template
    return fast


def sentencepiece_tokenizer(*, chat_template: str | None = None) -> Any:
    """A BPE tokenizer like Llama 2's: ``▁``, a dummy prefix, ``<0xNN>``, and its own words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *map(chr, range(33, 127)), "é"]
    merges = ["▁ t", "h e", "▁t he", "r a", "i n", "ra in", "▁ rain", "w e", "we t", "o n"]
    words = [*specials, *bytes_, *letters, *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    pairs = [tuple(merge.split()) for merge in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
    fast.chat_template = chat_template
    return fast


def learned(conversation: dict[str, Any], tokenizer: Any, **options: Any) -> list[str]:
    """The supervised text, one string per run of labels."""
    from potstill.data import encode_conversation

    row = encode_conversation(conversation, tokenizer, **options)
    runs: list[list[int]] = [[]]
    for label in row["labels"]:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def with_flash_attention(model: Any) -> Any:
    """Give ``model`` attention with the name of a variable-length kernel, which needs a GPU."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("flash_stand_in", sdpa_attention_forward)
    AttentionMaskInterface.register("flash_stand_in", sdpa_mask)
    model.config._attn_implementation = "flash_stand_in"
    return model


def random_model(family: str, **settings: Any) -> Any:
    """A random model of any family of transformers, with 2 layers and hidden size 32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": 272,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "pad_token_id": 265,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**common, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_model(
    family: str = "llama",
    *,
    layers: int = 4,
    rows: int = 272,
    hidden: int = 32,
    seed: int = 0,
    tied: bool | None = None,
) -> Any:
    """A random model of a family, with at most a few ten thousand weights."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": rows,
        "bos_token_id": 264,
        "eos_token_id": 265,
        "pad_token_id": 265,
    }
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            n_layer=layers, n_embd=hidden, n_head=4, n_positions=512, **common
        )
    else:
        shape = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": 64,
            "num_attention_heads": 4,
        }
        more = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
        name = {
            "llama": "Llama",
            "qwen2": "Qwen2",
            "qwen3": "Qwen3",
            "gemma2": "Gemma2",
            "gemma3": "Gemma3Text",
            "mistral": "Mistral",
        }
        config = getattr(transformers, f"{name[family]}Config")(**common, **shape, **more)
    if tied is not None:
        config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 265
    model.generation_config.pad_token_id = 265
    return model.eval()


def conversations(count: int = 12) -> list[dict[str, Any]]:
    """Short conversations of different lengths, some with two answers."""
    rows = []
    for i in range(count):
        messages = [
            {"role": "user", "content": f"the rain {i}?"},
            {"role": "assistant", "content": "in the rain " * (1 + i % 5)},
        ]
        if i % 3 == 0:
            messages += [
                {"role": "user", "content": "and then"},
                {"role": "assistant", "content": f"on {i} the"},
            ]
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return toy_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a folder with a tiny model and the toy tokenizer."""

    def make(**shape: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        tiny_model(**shape).save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def short_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation lets the student answer; a few tokens suffice in most tests."""
    if "potstill.evaluation.own_answers" in sys.modules:
        monkeypatch.setattr("potstill.evaluation.own_answers.ANSWER_TOKENS", 4)


@pytest.fixture
def pair_folder(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with a teacher of 4 layers and a student of 2; answers are short."""
    from potstill.distillation import run as pipeline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "SAMPLE_TOKENS", 4)
    (tmp_path / "teacher").symlink_to(model_folder(layers=4))
    (tmp_path / "student").symlink_to(model_folder(layers=2, seed=1))
    return tmp_path


@pytest.fixture
def interrupt_at(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """A context that interrupts training (by ``method``, if given) before a step."""
    from potstill.training.trainer import DistillationTrainer

    original = DistillationTrainer.training_step

    @contextlib.contextmanager
    def interrupting(step: int, *, method: str | None = None) -> Iterator[None]:
        def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step and method in (None, self.args.method):
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(DistillationTrainer, "training_step", interrupted)
            yield

    return interrupting


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, which logs console messages and requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or "chromium"
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()
