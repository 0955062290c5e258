"""Which architectures let packed conversations see each other, found by running them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import random_model, tiny_model
from potstill.models.heads import hidden_states
from potstill.models.isolation import Isolation, isolation

ALIKE = {"num_key_value_heads": 2}
APART: dict[str, dict[str, Any]] = {
    "llama": ALIKE,
    "mistral": ALIKE,
    "qwen3": {**ALIKE, "head_dim": 8},
    "gemma3_text": {**ALIKE, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {**ALIKE, "num_local_experts": 4},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "gpt_oss": {**ALIKE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {},
}


@pytest.mark.parametrize("family", [*APART, *TOGETHER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_packed_only_if_conversations_do_not_see_each_other(
    family: str, dtype: torch.dtype
) -> None:
    model = random_model(family, **(APART | TOGETHER)[family]).to(dtype)
    assert isolation(model) == Isolation(packed=family in APART, padded=True)
    assert isolation(model, one_row=True).packed == (family in APART)
    assert model.training is False


def test_padding_that_is_seen_needs_a_mask() -> None:
    """Attention in both directions, as of models that write no text from left to right."""
    model = tiny_model()
    model.config.is_causal = False
    assert isolation(model.train()) == Isolation(packed=False, padded=False)
    assert model.training


def test_without_a_mask_the_states_are_those_with_a_mask() -> None:
    model = tiny_model()
    ids = torch.arange(16).view(2, 8)
    inputs = {"input_ids": ids, "position_ids": torch.arange(8).expand(2, 8)}
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with torch.no_grad():
        without = hidden_states(model, inputs)  # type: ignore[arg-type]
        masked = hidden_states(model, {**inputs, "attention_mask": mask})  # type: ignore[typeddict-item]
    assert torch.equal(without[mask.bool()], masked[mask.bool()])


def test_a_model_without_weights_is_neither() -> None:
    with torch.device("meta"):
        model = random_model("llama", **ALIKE)
    assert isolation(model) == Isolation(packed=False, padded=False)
