"""Estimate the cost of a run from two configurations: FLOPs, hours, memory and disk.

A conversation has T tokens, N of them supervised. A model has P parameters, P_b of them in its body
(only the active experts count), a head of V × H, and L layers with attention width A. One forward
pass of a conversation costs

    2·P_b·T          every body weight multiplies and adds once per token
    2·L·A·T²         causal attention: T/2 tokens on average, two products of width A
    2·V·H·N          the head, at supervised positions only

and a backward pass twice that. The student pays three forward passes, the teacher one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from potstill.errors import ConfigError, ModelError
from potstill.models.quantized import (
    BYTES_PER_WEIGHT,
    import_quietly,
    saved_method,
    without_quantization,
)


@dataclass(frozen=True)
class Card:
    """An accelerator: dense peak FLOP/s and memory, from its data sheet."""

    bf16_flops_per_second: float
    fp32_flops_per_second: float
    memory_bytes: float


CARDS = {
    "a10": Card(125e12, 31.2e12, 24e9),
    "a100": Card(312e12, 19.5e12, 80e9),
    "a100-40gb": Card(312e12, 19.5e12, 40e9),
    "b200": Card(2250e12, 75e12, 180e9),
    "h100": Card(989e12, 67e12, 80e9),
    "h200": Card(989e12, 67e12, 141e9),
    "l4": Card(121e12, 30.3e12, 24e9),
    "l40s": Card(362e12, 91.6e12, 48e9),
    "mi300x": Card(1307e12, 163.4e12, 192e9),
    "rtx3090": Card(71e12, 35.6e12, 24e9),
    "rtx4090": Card(165e12, 82.6e12, 24e9),
}
UTILIZATION = 0.4
"""Share of the peak that training reaches; small models and short batches reach less."""
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ACTIVATION_BYTES = {"bf16": 12, "fp16": 12, "fp32": 17}
"""Kept for the backward pass per element of ``numbers_a_layer`` and token, without checkpointing.
Measured on Llama, Qwen 3, Gemma 3 and GPT-2 with fused attention: 9 to 15 (bf16 autocast), 15 to 20
(fp32)."""
CHUNK_BYTES = 256 * 2**20
"""The least size of a chunk of logits on a GPU (losses/projection.py)."""
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class ModelSize:
    """The dimensions of a model that its cost depends on."""

    parameters: int
    """All weights; tied ones count once."""
    body_parameters: int
    """Weights used per token between the embedding and the head."""
    vocabulary_rows: int
    """V: head rows, with padding."""
    hidden_size: int
    """H."""
    layers: int
    """L."""
    attention_width: int
    """A: number of heads × head width."""
    numbers_a_layer: int
    """Elements per token and layer: residual stream, queries, keys, inner feed-forward layer."""
    quantizable: int = 0
    """Weights of the matrices that a quantization changes: all linear layers but the head."""
    linear_sides: int = 0
    """Sum of inputs and outputs of all linear layers but the head: weights of LoRA with rank 1."""
    quantization: str | None = None
    """How the weights were saved, such as fp8; None if they are not quantized."""

    def forward_flops(self, tokens: float, supervised: float) -> float:
        """Return the FLOPs of one conversation, with the head at supervised tokens only."""
        attention = 2 * self.layers * self.attention_width * tokens**2
        head = 2 * self.vocabulary_rows * self.hidden_size * supervised
        return 2 * self.body_parameters * tokens + attention + head


@dataclass(frozen=True)
class Plan:
    """The size of a run. Token counts are means over conversations, cut at the length limit."""

    steps: int
    conversations_a_step: int
    tokens: float
    """In the student's tokenizer."""
    supervised: float
    """Supervised tokens, in the student's tokenizer."""
    teacher_tokens: float
    """In the tokenizer that the teacher reads."""
    teacher_supervised: float
    largest_batch_tokens: int
    """Student tokens of the largest micro-batch."""
    precision: str = "bf16"
    quantize_teacher: str | None = None
    """8bit or 4bit."""
    lora: int | None = None
    """Rank of an adapter, which alone is trained."""
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class Cost:
    """The cost of a run without evaluation (a few percent), with both models on one device."""

    student_flops: float
    teacher_flops: float
    hours: float | None
    """On the named card, at `UTILIZATION` of its peak."""
    student_memory_bytes: float
    """What is trained: float32 weights, gradients and two Adam moments; and all weights in
    ``precision``."""
    activation_memory_bytes: float
    """Activations of the largest micro-batch, and the loss's logits."""
    teacher_memory_bytes: float
    disk_bytes: float
    """Largest size of the run folder: checkpoints with Adam's moments, and the student."""

    @property
    def flops(self) -> float:
        """Return the FLOPs of both models."""
        return self.student_flops + self.teacher_flops

    @property
    def memory_bytes(self) -> float:
        """Return the peak memory of a step."""
        return self.student_memory_bytes + self.activation_memory_bytes + self.teacher_memory_bytes


def model_size(config: Any, *, trust_remote_code: bool = False) -> ModelSize:
    """Measure a model on torch's meta device, without weights.

    Raises: ModelError if no causal model can be built from the configuration.
    """
    import torch

    import_quietly("transformers.modeling_utils")
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    plain = without_quantization(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, trust_remote_code=trust_remote_code)
    except Exception as error:  # an architecture's code can raise any exception
        found = "no causal language model can be built from it"
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{type(config).__name__}: {found} ({reason})") from error
    head = model.get_output_embeddings().weight
    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    active = _active_expert_share(text)
    body = sum(
        parameter.numel() * (active if re.search(r"\bexperts\b", name) else 1)
        for name, parameter in model.named_parameters()
        if parameter is not head and id(parameter) not in looked_up
    )
    heads = getattr(text, "num_attention_heads", None) or 0  # recurrent models have none
    head_width = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    return ModelSize(
        parameters=model.num_parameters(),
        body_parameters=round(body),
        vocabulary_rows=len(head),
        hidden_size=head.shape[1],
        layers=text.num_hidden_layers,
        attention_width=heads * head_width,
        numbers_a_layer=text.hidden_size + (heads + key_heads) * head_width + _inner(text),
        quantizable=sum(weight.numel() for weight in _linear_weights(model, head)),
        linear_sides=sum(sum(weight.shape) for weight in _linear_weights(model, head)),
        quantization=saved_method(config),
    )


def _inner(text: Any) -> int:
    """Return the width inside the feed-forward layers; their mean if they differ."""
    names = ("intermediate_size", "n_inner")
    inner = next((found for name in names if (found := getattr(text, name, None))), None)
    if isinstance(inner, list):
        return round(sum(inner) / len(inner))
    return inner or 4 * text.hidden_size  # type: ignore[no-any-return]


def _linear_weights(model: Any, head: Any) -> list[Any]:
    """Return the weights of linear layers other than the head."""
    import torch

    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return [module.weight for module in linear if module.weight is not head]


def estimate(
    method: str, teacher: ModelSize, student: ModelSize, plan: Plan, *, card: str | None = None
) -> Cost:
    """Return the cost of ``plan`` with ``method``: text, logits or cross.

    Raises: ConfigError for an unknown precision or card.
    """
    if plan.precision not in BYTES:
        raise ConfigError(
            f"precision {plan.precision!r} is not known; use one of {', '.join(BYTES)}"
        )
    conversations = plan.steps * plan.conversations_a_step
    passes = 3 if plan.lora is None else 2  # frozen weights get no gradient
    passes += plan.activation_checkpointing
    student_flops = passes * conversations * student.forward_flops(plan.tokens, plan.supervised)
    teacher_flops, teacher_memory = 0.0, 0.0
    if method != "text":
        teacher_flops = conversations * teacher.forward_flops(
            plan.teacher_tokens, plan.teacher_supervised
        )
        teacher_memory = teacher_bytes(teacher, plan.precision, plan.quantize_teacher)
    activations = plan.largest_batch_tokens * _activation_bytes(student, plan)
    trained = student.parameters if plan.lora is None else plan.lora * student.linear_sides
    hours = None
    if card is not None:
        flops_per_second = _flops_per_second(card, plan.precision)
        hours = (student_flops + teacher_flops) / flops_per_second / 3600
    return Cost(
        student_flops=student_flops,
        teacher_flops=teacher_flops,
        hours=hours,
        student_memory_bytes=16 * trained + _frozen_bytes(student, plan),
        activation_memory_bytes=activations
        + loss_bytes(student, None if method == "text" else teacher, plan),
        teacher_memory_bytes=teacher_memory,
        # Weights and two moments in float32. + 1: a checkpoint is written before one is deleted.
        disk_bytes=(KEPT_CHECKPOINTS + 1) * 12 * trained + 4 * trained,
    )


def _activation_bytes(student: ModelSize, plan: Plan) -> float:
    """Return the bytes per token that are kept for the backward pass.

    With checkpointing: each layer's input in float32, and all of one layer.
    """
    layer = student.numbers_a_layer * ACTIVATION_BYTES[plan.precision]
    if plan.activation_checkpointing:
        return student.layers * 4 * student.hidden_size + layer
    return student.layers * layer


def _frozen_bytes(student: ModelSize, plan: Plan) -> float:
    """Return the bytes of weights in ``precision``: a copy of trained ones, or all with LoRA."""
    copied = plan.precision != "fp32" or plan.lora is not None
    return student.parameters * BYTES[plan.precision] if copied else 0


def loss_bytes(student: ModelSize, teacher: ModelSize | None, plan: Plan) -> float:
    """Return the bytes that the fused loss takes on a GPU: logits, and its weight gradient.

    A chunk of tokens has the student's logits in float32, which become their gradient; a copy of
    it in 16 bits; and the teacher's logits, if there is a ``teacher``.
    """
    head = student.vocabulary_rows * student.hidden_size
    chunk = max(CHUNK_BYTES, 2 * head)
    teachers = 0
    if teacher is not None:  # it projects a multiple of the student's chunk at once
        teachers = max(1, 2 * teacher.vocabulary_rows * teacher.hidden_size // chunk)
    chunk = min(chunk, 4 * student.vocabulary_rows * plan.largest_batch_tokens)
    rounded = 0 if plan.precision == "fp32" else 0.5
    return (1 + teachers + rounded) * chunk + (4 * head if plan.lora is None else 0)


def teacher_bytes(teacher: ModelSize, precision: str, quantize: str | None) -> float:
    """Return the bytes of a teacher's weights, quantized to ``quantize`` if it is given."""
    if quantize is None:
        return teacher.parameters * BYTES[precision]
    exact = teacher.parameters - teacher.quantizable
    return exact * BYTES[precision] + teacher.quantizable * BYTES_PER_WEIGHT[quantize]


def find_card(name: str) -> Card:
    """Return the card of this name. Raises: ConfigError if `CARDS` does not list it."""
    if name.lower() not in CARDS:
        raise ConfigError(f"card {name!r} is not known; use one of {', '.join(CARDS)}")
    return CARDS[name.lower()]


def _flops_per_second(card: str, precision: str) -> float:
    found = find_card(card)
    fp32, bf16 = found.fp32_flops_per_second, found.bf16_flops_per_second
    return UTILIZATION * (fp32 if precision == "fp32" else bf16)


def _active_expert_share(config: Any) -> float:
    """Return the share of experts active for a token; 1 for a dense model."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((count for name in names if (count := getattr(config, name, None))), None)
    if isinstance(chosen, list):  # for each layer
        chosen = sum(chosen) / len(chosen)
    return chosen / count if chosen and count else 1.0
