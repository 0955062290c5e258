"""A tiny random model of every family that can be narrowed."""

from __future__ import annotations

from typing import Any

import torch

FAMILIES = (
    *("llama", "llama_with_biases", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"),
    *("gemma2", "gemma3", "phi", "phi3", "gpt2"),
)
MIXTURES = ("qwen2_moe", "qwen3_moe")


def narrow_model(family: str, *, layers: int = 3, seed: int = 0, tied: bool | None = None) -> Any:
    """A random model with 32 hidden channels, 2 key/value groups (GPT-2, Phi: 4) and biases."""
    import transformers

    ids = {"vocab_size": 272, "bos_token_id": 264, "eos_token_id": 265, "pad_token_id": 265}
    shape: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    groups: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    }
    of: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", groups),
        "llama_with_biases": ("Llama", {**groups, "attention_bias": True, "mlp_bias": True}),
        "mistral": ("Mistral", groups),
        "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
        "qwen3": ("Qwen3", groups),
        "qwen2_moe": (
            "Qwen2Moe",
            {"num_key_value_heads": 2, "shared_expert_intermediate_size": 24, **experts},
        ),
        "qwen3_moe": ("Qwen3Moe", {**groups, **experts}),
        "gemma2": ("Gemma2", groups),
        "gemma3": ("Gemma3Text", groups),
        "phi": ("Phi", {}),
        "phi3": ("Phi3", {"num_key_value_heads": 2}),
    }
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            n_layer=layers, n_embd=32, n_head=4, n_positions=512, **ids
        )
    else:
        name, more = of[family]
        config = getattr(transformers, f"{name}Config")(**ids, **shape, **more)
    if tied is not None:
        config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms also differ from channel to channel
            weight += 0.05 * torch.randn_like(weight)
    model.generation_config.eos_token_id = 265
    model.generation_config.pad_token_id = 265
    return model.eval()
