from __future__ import annotations

import pytest
import torch

from conftest import conversations, tiny_model, toy_tokenizer
from potstill.errors import ConfigError
from potstill.students.layer_choice import most_important_layers

INPUTS = {"input_ids": torch.arange(12)[None]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen2"])
def test_layers_without_effect_are_removed_first(family: str) -> None:
    model = tiny_model(family, layers=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            idle = any(f".{layer}." in name for layer in (1, 3))
            last = any(part in name for part in ("o_proj", "down_proj", "c_proj"))
            parameter *= 0 if idle and last else 20 if last else 1
    before = model(**INPUTS).logits
    assert most_important_layers(model, toy_tokenizer(), conversations(4), 3) == [0, 2, 4]
    assert torch.equal(model(**INPUTS).logits, before)


def test_all_layers_or_a_single_one_can_be_kept() -> None:
    model = tiny_model(layers=3)
    assert most_important_layers(model, toy_tokenizer(), conversations(2), 3) == [0, 1, 2]
    assert len(most_important_layers(model, toy_tokenizer(), conversations(2), 1)) == 1


@pytest.mark.parametrize("keep", [0, 4])
def test_a_count_out_of_range_is_refused(keep: int) -> None:
    with pytest.raises(ConfigError, match="keep between 1 and 3"):
        most_important_layers(tiny_model(layers=3), toy_tokenizer(), conversations(2), keep)
