from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model
from potstill.errors import ConfigError
from potstill.students.layers import choose_layers, keep_layers, save_student


def test_layers_are_spaced_evenly_with_both_ends_kept() -> None:
    assert choose_layers(15, of=30)[0] == 0
    assert choose_layers(15, of=30)[-1] == 29
    assert len(set(choose_layers(15, of=30))) == 15
    assert choose_layers(1, of=4) == [0]
    assert choose_layers([0, 2], of=4) == [0, 2]


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (5, "has 4 layers"),
        (0, "has 4 layers"),
        ([0, 4], "numbered 0 to 3"),
        ([1, 0], "once"),
        ([], "once"),
    ],
)
def test_layers_that_do_not_exist_are_refused(keep: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose_layers(keep, of=4)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt2"]
)
def test_a_student_of_every_family_is_an_ordinary_folder_and_computes_what_its_layers_compute(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    teacher = tiny_model(family, layers=4)
    save_student(
        keep_layers(teacher, [0, 3]), tokenizer, tmp_path, provenance={"made from": "a test"}
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert student.config.num_hidden_layers == 2
    # The oracle: the teacher itself with its middle layers doing nothing.
    layers = teacher.transformer.h if family == "gpt2" else teacher.model.layers
    for middle in (layers[1], layers[2]):
        middle.forward = lambda hidden_states, *_, **__: hidden_states
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(
            student(ids).logits, teacher(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5
        )
    assert "made from" in (tmp_path / "README.md").read_text()


def test_keeping_every_layer_changes_nothing() -> None:
    teacher = tiny_model("llama")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(keep_layers(teacher, 4)(ids).logits, teacher(ids).logits)
