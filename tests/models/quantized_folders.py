"""Tiny models that were saved with quantized weights, as on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import tiny_model, toy_tokenizer


def quantizable_model(*, layers: int = 4, seed: int = 1) -> Any:
    """A model whose matrices bitsandbytes can compute with on a CPU: multiples of 64 and 32."""
    shape = {
        "vocab_size": 288,
        "num_hidden_layers": layers,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    ids = {"bos_token_id": 264, "eos_token_id": 265, "pad_token_id": 265}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape, **ids)).eval()


def write_model(folder: Path, model: Any = None) -> Path:
    """Write a model, `quantizable_model` by default, and the toy tokenizer."""
    (model or quantizable_model()).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def write_fp8(folder: Path, *, seed: int = 1, skip: tuple[str, ...] = ("lm_head",)) -> Path:
    """Write a model with block-wise FP8 weights, which a CPU opens in full precision."""
    tiny_model(seed=seed).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    made = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        made[name] = weight
        if "proj" in name:
            blocks = weight.view(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            scaled = blocks / scale[:, None, :, None]
            made[name] = scaled.view_as(weight).to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = scale
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    settings["modules_to_not_convert"] = list(skip)  # type: ignore[assignment]
    claim(folder, settings)
    return folder


def write_compressed(folder: Path, *, seed: int = 1, with_head: bool = False) -> Path:
    """Write a model with weights and inputs in int8, saved by compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = tiny_model(seed=seed)
    chosen = QuantizationConfig(
        config_groups={"W8A8": ["Linear"]},
        ignore=[] if with_head else ["lm_head"],
        quantization_status="frozen",
    )
    apply_quantization_config(model, chosen)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 127
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def write_quantized(folder: Path, source: Path, kind: str) -> Path:
    """Save a model that was opened with ``quantize``, as its package saves it."""
    from potstill.models import load_model

    model, tokenizer = load_model(source, dtype="float32", device="cpu", quantize=kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_claim(folder: Path, source: Path, method: str) -> Path:
    """Copy a model, and let its configuration say that its weights are quantized."""
    shutil.copytree(source, folder)
    claim(folder, {"quant_method": method, "bits": 4, "group_size": 32})
    return folder


def claim(folder: Path, quantization: dict[str, Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": quantization}))
