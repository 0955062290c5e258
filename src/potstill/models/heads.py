"""Run a model up to its LM head, and describe that head for the losses.

B batch, T time, H hidden size, V vocabulary, N supervised tokens. A loss over a large vocabulary
needs hidden states and head apart, so that only supervised positions are projected, chunk by chunk
(losses/fused.py). The model is called as usual, with its head's forward replaced for one call by a
function that records its input. That works through every wrapper (DDP, FSDP, PEFT, torch.compile)
and for every architecture with output embeddings.
"""

from __future__ import annotations

import inspect
import math
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.losses import CallableHead, Head, Projection
from potstill.losses.fused import as_any_head
from potstill.models.quantized import is_quantized
from potstill.protocols import Batch, CausalLM

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_inputs(batch: Batch) -> Batch:
    """Return the columns of a batch that a model's forward takes, by the forward's names."""
    columns: dict[str, Any] = {name: batch.get(name) for name in MODEL_INPUTS if name in batch}
    if "cu_seq_lens" in batch:
        columns["cu_seq_lens_q"] = columns["cu_seq_lens_k"] = batch["cu_seq_lens"]
        columns["max_length_q"] = columns["max_length_k"] = batch["longest"]
    return cast(Batch, columns)


def teacher_inputs(batch: Batch) -> Batch:
    """Return the columns of a batch that a `potstill.teachers.Teacher` takes."""
    names = (*MODEL_INPUTS, "labels", "lengths", "cu_seq_lens", "longest")
    return cast(Batch, {name: column for name, column in batch.items() if name in names})


def has_variable_length(model: nn.Module | CausalLM) -> bool:
    """Return whether attention finds borders of conversations only in a batch of one row."""
    return "flash" in str(getattr(unwrapped(model).config, "_attn_implementation", ""))


def takes_bounds(model: nn.Module | CausalLM) -> bool:
    """Return whether the model's forward passes further arguments on to its attention."""
    inner = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in parameters)


def on_device(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with every column on ``device``."""
    return cast(
        Batch,
        {
            name: column.to(device) if isinstance(column, Tensor) else column
            for name, column in batch.items()
        },
    )


def hidden_states(model: nn.Module | CausalLM, inputs: Batch) -> Tensor:
    """Return the input of the LM head of ``model``, ``[B, T, H]``."""
    head = head_module(model)
    recorder = _recorders.setdefault(head, _HiddenStateRecorder())
    previous = head.__dict__.get("forward")  # accelerate may have set a forward of its own
    head.forward = recorder.record
    try:
        model(**inputs, use_cache=False)
    finally:
        del head.forward
        if previous is not None:
            head.forward = previous
        hidden, recorder.hidden = recorder.hidden, None
    assert hidden is not None
    return hidden


class _HiddenStateRecorder:
    """Replace a head's forward to capture its input.

    One per head, kept: torch.compile would recompile for a new one.
    """

    hidden: Tensor | None = None

    def record(self, hidden: Tensor) -> Tensor:
        """Keep the hidden states; return a stand-in for logits, which is not read."""
        self.hidden = hidden
        return hidden[..., :1]


_recorders: weakref.WeakKeyDictionary[nn.Module, _HiddenStateRecorder] = weakref.WeakKeyDictionary()


def carries_state(model: Any) -> bool:
    """Return whether the model has recurrences or convolutions, which ignore packing bounds."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False)) or not ATTENTION.issuperset(kinds)


def output_head(model: nn.Module | CausalLM, *, rows: int | None = None) -> Head | CallableHead:
    """Return the LM head of ``model`` cut to its first ``rows``: weight, bias, scale and softcap.

    A head whose weights are quantized becomes a `CallableHead`.
    """
    module = head_module(model)
    config = unwrapped(model).config.get_text_config()
    scale, softcap = _logit_scale(config), next(iter(_settings(config, SOFTCAPS)), None)
    if _is_quantized(module):
        size = getattr(module, "out_features", config.vocab_size)
        return CallableHead(module, size, scale=scale, softcap=softcap, rows=rows)
    bias = getattr(module, "bias", None)
    return Head(_effective_weight(module), bias=bias, scale=scale, softcap=softcap, rows=rows)


def trainable_head(model: nn.Module | CausalLM, *, rows: int | None = None) -> Head:
    """Return the student's head. Raises: ModelError if its weights are quantized."""
    head = output_head(model, rows=rows)
    if isinstance(head, CallableHead):
        name = type(unwrapped(model)).__name__
        raise ModelError(
            f"the LM head of {name} is quantized; a student needs a floating-point head"
        )
    return head


def _is_quantized(module: nn.Module) -> bool:
    """Return whether the head's logits are not those of its ``weight``, which only it can use."""
    weight = getattr(module, "weight", None)
    # A scheme of compressed-tensors can also round the input of a head with floating-point weights.
    return (
        not isinstance(weight, Tensor)
        or is_quantized(weight)
        or getattr(module, "quantization_scheme", None) is not None
    )


def head_logits(model: nn.Module | CausalLM, inputs: Batch) -> Tensor:
    """Return the logits ``[B, T, V]`` of a few tokens, computed as the losses compute them."""
    hidden = hidden_states(model, inputs)
    head = as_any_head(output_head(model))
    states = hidden.flatten(0, 1)
    states = states.to(head.weight.device) if isinstance(head, Head) else states
    projection = Projection(states, head)
    return projection.logits(slice(0, len(projection.hidden))).view(*hidden.shape[:2], -1)


def refuse_infinite_logits(model: nn.Module | CausalLM, logits: Tensor) -> None:
    """Raises: ModelError if ``logits [B, V]`` have NaN, +∞ or no token. −∞ removes a token."""
    if not logits.amax(-1).isfinite().all():
        name = unwrapped(model).config.name_or_path or type(unwrapped(model)).__name__
        raise ModelError(
            f"{name}: its logits are NaN or infinite in {str(model.dtype).removeprefix('torch.')}; "
            "use --precision bf16 or fp32, or check the weights"
        )


def supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states and next tokens of the N supervised positions: ``[N, H]``, ``[N]``.

    ``labels [B, T]`` have the position of their token, −100 where nothing is learned; the first
    label of a conversation is always −100.
    """
    chosen = labels[:, 1:] != -100
    return hidden[:, :-1][chosen], labels[:, 1:][chosen]


def unwrapped(model: nn.Module | CausalLM) -> Any:
    """Return the model inside DDP, FSDP and torch.compile. A PEFT model is kept as it is."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def head_module(model: nn.Module | CausalLM) -> nn.Module:
    """Return the LM head. Raises: ModelError if there is none."""
    module = unwrapped(model).get_output_embeddings()
    if module is None:
        found = f"{type(unwrapped(model)).__name__} has no output embeddings"
        raise ModelError(f"{found}; a causal language model is needed")
    return module  # type: ignore[no-any-return]


def _effective_weight(module: nn.Module) -> Tensor:
    """Return the weight of the product, LoRA included (only A and B then get a gradient)."""
    base: Tensor = module.weight  # type: ignore[assignment]
    adapters = getattr(module, "active_adapters", None)
    if not adapters or getattr(module, "disable_adapters", False):
        return base
    # Without get_delta_weight (PEFT's modules_to_save), the weight is the trained copy's.
    if getattr(module, "merged", False) or not hasattr(module, "get_delta_weight"):
        return base
    if any(getattr(module, "use_dora", {}).get(name) for name in adapters):
        found = "the head has a DoRA adapter, whose weight is not a sum"
        raise ModelError(f"{found}; use plain LoRA, or leave the head out of its targets")
    deltas = [module.get_delta_weight(name) for name in adapters]  # type: ignore[operator]
    return base + torch.stack(deltas).sum(0)


FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite
# Gemma, RecurrentGemma, xLSTM
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def _logit_scale(config: Any) -> float:
    """Return the factor of the logits, from the settings of the architectures that have one."""
    return math.prod(_settings(config, FACTORS)) / math.prod(_settings(config, DIVISORS))


def _settings(config: Any, names: tuple[str, ...]) -> list[float]:
    found = (getattr(config, name, None) for name in names)
    return [float(value) for value in found if value is not None]
