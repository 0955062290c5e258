"""The formulas against what torch itself counts on real forward passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_model
from potstill.doctor.cost import (
    CARDS,
    KEPT_CHECKPOINTS,
    ModelSize,
    Plan,
    estimate,
    find_card,
    loss_bytes,
    model_size,
)
from potstill.errors import ConfigError
from potstill.models.lora import trained_share, with_lora

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt2"]
PLAN = Plan(
    steps=10,
    conversations_a_step=4,
    tokens=100,
    supervised=50,
    teacher_tokens=100,
    teacher_supervised=50,
    largest_batch_tokens=400,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_from_the_configuration_alone(family: str) -> None:
    model = tiny_model(family)
    size = model_size(model.config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (size.vocabulary_rows, size.hidden_size) == tuple(
        model.get_output_embeddings().weight.shape
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_are_those_that_torch_counts(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    tokens = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    size = model_size(model.config)
    # eager attention also computes the half that the causal mask hides
    hidden_half = 2 * size.layers * size.attention_width * tokens**2
    assert size.forward_flops(tokens, tokens) + hidden_half == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )


def test_a_token_meets_only_its_own_experts() -> None:
    from transformers import MixtralConfig

    shape = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    few = model_size(
        MixtralConfig(**shape, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=2)
    )
    many = model_size(
        MixtralConfig(**shape, num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2)
    )
    assert many.parameters > 3 * few.parameters
    assert many.body_parameters == pytest.approx(few.body_parameters, rel=0.01)


def test_a_frozen_teacher_costs_one_pass_and_a_student_three() -> None:
    size = model_size(tiny_model().config)
    text, logits = (estimate(method, size, size, PLAN) for method in ("text", "logits"))
    assert text.teacher_flops == text.teacher_memory_bytes == 0
    assert logits.teacher_flops == pytest.approx(logits.student_flops / 3)
    assert logits.flops == pytest.approx(40 * 4 * size.forward_flops(100, 50))


def test_hours_are_flops_by_four_tenths_of_the_peak() -> None:
    size = ModelSize(10**9, 10**9, 0, 0, 0, 0, 0)
    cost = estimate("text", size, size, PLAN, card="h100")
    assert cost.hours == pytest.approx(3 * 2e9 * 100 * 40 / (0.4 * 989e12) / 3600)
    assert estimate("text", size, size, PLAN).hours is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_activations_are_within_a_third_of_what_autograd_keeps(family: str) -> None:
    model = tiny_model(family, layers=8, hidden=64).train()
    for module in model.modules():  # GPT-2's default dropout would turn fused attention off
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(torch.ones(1, 400, dtype=torch.long), use_cache=False)
    measured = sum(
        tensor.untyped_storage().nbytes()
        for storage, tensor in kept.items()
        if storage not in weights
    )
    size = model_size(model.config)
    assert size.layers * size.numbers_a_layer * 400 * 17 == pytest.approx(measured, rel=0.34)


def test_training_state_is_counted_by_the_parameter() -> None:
    size = model_size(tiny_model().config)
    cost = estimate("text", size, size, PLAN)
    assert cost.student_memory_bytes == 18 * size.parameters
    assert cost.disk_bytes == (12 * (KEPT_CHECKPOINTS + 1) + 4) * size.parameters


def test_an_adapter_is_all_that_is_trained() -> None:
    """The number of its weights is peft's."""
    pytest.importorskip("peft")
    model = tiny_model()
    size, plan = model_size(model.config), replace(PLAN, lora=4)
    trained, total = trained_share(with_lora(model, 4))
    assert (4 * size.linear_sides, size.parameters) == (trained, total - trained)
    cost, whole = (estimate("text", size, size, one) for one in (plan, PLAN))
    assert cost.student_memory_bytes == 16 * trained + 2 * size.parameters
    assert cost.disk_bytes == (12 * (KEPT_CHECKPOINTS + 1) + 4) * trained
    assert cost.student_flops == pytest.approx(2 / 3 * whole.student_flops)
    head = size.vocabulary_rows * size.hidden_size
    assert loss_bytes(size, None, plan) == loss_bytes(size, None, PLAN) - 4 * head


def test_activation_checkpointing_keeps_a_layers_inputs_and_costs_a_forward_pass() -> None:
    size, plan = model_size(tiny_model().config), replace(PLAN, activation_checkpointing=True)
    less, whole = (estimate("text", size, size, one) for one in (plan, PLAN))
    loss = loss_bytes(size, None, PLAN)
    kept = (less.activation_memory_bytes - loss) / PLAN.largest_batch_tokens
    assert kept == 4 * size.layers * size.hidden_size + 12 * size.numbers_a_layer
    assert less.student_flops == pytest.approx(4 / 3 * whole.student_flops)


def test_the_loss_takes_a_chunk_of_logits_and_the_gradient_of_the_head() -> None:
    """Llama 3.2: half of the student's head in float32 is 525 MB, more than 256 MiB."""
    small = model_size(tiny_model().config)
    student = replace(small, vocabulary_rows=128_256, hidden_size=2048)
    teacher = replace(small, vocabulary_rows=128_256, hidden_size=3072)
    plan = replace(PLAN, largest_batch_tokens=8192)
    chunk, head = 2 * 128_256 * 2048, 128_256 * 2048
    assert loss_bytes(student, teacher, plan) == 2.5 * chunk + 4 * head
    assert loss_bytes(student, None, plan) == 1.5 * chunk + 4 * head
    large = replace(teacher, hidden_size=8192)  # projects four of the student's chunks at once
    assert loss_bytes(student, large, plan) == 5.5 * chunk + 4 * head
    few = replace(plan, largest_batch_tokens=100, precision="fp32")
    assert loss_bytes(student, teacher, few) == 2 * 4 * 128_256 * 100 + 4 * head


def test_an_unknown_card_or_precision_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="use one of a10, a100"):
        find_card("abacus")
    assert find_card("H100") is CARDS["h100"]
    size = model_size(tiny_model().config)
    with pytest.raises(ConfigError, match="bf16, fp16, fp32"):
        estimate("text", size, size, Plan(1, 1, 1, 1, 1, 1, 1, precision="fp12"))
