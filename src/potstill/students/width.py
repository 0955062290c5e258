"""Narrow a model: keep some hidden channels, FFN neurons, attention heads and experts.

Weights are sliced, never changed, except in Gemma, where the embedding's factor √hidden is
compensated. The result is an ordinary model of the same family; which weight is cut along which
dimension is in `families.py`.

Source: Muralidharan et al. 2024 (Minitron), arXiv 2407.14679, section 2.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.errors import ModelError
from potstill.protocols import CausalLM
from potstill.students.families import (
    STACKED,
    Family,
    Sizes,
    family_of,
    head_size,
    resized,
    sizes_of,
)
from potstill.students.layers import layer_list


@dataclass(frozen=True)
class Kept:
    """What is kept of a model, as rising numbers; every list has one entry per layer."""

    hidden: Tensor
    """Hidden channels ``[H']``, the same in every layer."""
    groups: Sequence[Tensor]
    """Key/value groups ``[K']`` of each layer."""
    neurons: Sequence[Tensor]
    """FFN neurons ``[F']`` of each layer; those of each kept expert ``[E', M']`` in a mixture."""
    experts: Sequence[Tensor] = ()
    """Experts ``[E']`` of each layer of a mixture; dense layers have an empty entry."""
    shared: Sequence[Tensor] = ()
    """Neurons of the shared expert ``[S']`` of each layer that has one."""


def keep_first(model: CausalLM, sizes: Sizes) -> Kept:
    """Return the first channels, groups, neurons and experts: the least that `narrow` needs.

    Raises: ConfigError, ModelError.
    """
    config = model.config
    new = resized(config, sizes)
    count = config.num_hidden_layers
    mixtures = [is_mixture(model, layer) for layer in range(count)]
    per_expert = torch.arange(sizes.neurons).expand(max(1, sizes.experts), -1)
    dense = torch.arange(sizes_of(new).neurons if not sizes.experts else new.intermediate_size)
    shared = torch.arange(getattr(new, "shared_expert_intermediate_size", None) or 0)
    return Kept(
        hidden=torch.arange(sizes.hidden),
        groups=[torch.arange(sizes.groups)] * count,
        neurons=[per_expert if mixture else dense for mixture in mixtures],
        experts=[torch.arange(sizes.experts if mixture else 0) for mixture in mixtures],
        shared=[shared] * count,
    )


def is_mixture(model: CausalLM, layer: int) -> bool:
    """Return whether a layer has experts."""
    prefix, _ = layer_list(model)
    layers: Any = model.get_submodule(prefix)
    return hasattr(getattr(layers[layer], "mlp", None), "experts")


def narrow(model: CausalLM, kept: Kept) -> Any:
    """Return a new model with what is ``kept`` of ``model``, in its dtype, on the CPU.

    Raises: ModelError for a family without a table, or weights that the table does not name;
    ConfigError for sizes that the family cannot have.
    """
    from transformers import AutoModelForCausalLM

    family, old = family_of(model.config), sizes_of(model.config)
    refuse_quantized(model)
    prefix, count = layer_list(model)
    experts = next((len(one) for one in kept.experts if len(one)), 0)
    mixtures = [i for i in range(count) if is_mixture(model, i)]
    neurons = kept.neurons[mixtures[0] if mixtures else 0].shape[-1]
    sizes = Sizes(count, len(kept.hidden), neurons, len(kept.groups[0]), experts)
    config = resized(model.config, sizes)
    indices = [cut_indices(model.config, kept, layer, layer in mixtures) for layer in range(count)]
    state = {}
    for name, tensor in model.state_dict().items():
        layer, letters = _letters(name, tensor, prefix, family, type(model).__name__)
        state[name] = sliced(tensor, letters, indices[layer])
    if family.scales_embeddings and sizes.hidden != old.hidden:
        _compensate_embedding_scale(model, state, family, (old.hidden / sizes.hidden) ** 0.5)
    student = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-160:]
        found = f"a narrower one has other weights than expected: {reason}"
        raise ModelError(f"{type(model).__name__}: {found}; open an issue") from error
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def refuse_quantized(model: CausalLM) -> None:
    """Raises: ModelError if the weights are quantized: they cannot be cut."""
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    quantized = getattr(model, "hf_quantizer", None) is not None
    if quantized or any(weight.dtype not in floats for weight in model.parameters()):
        found = f"{model.config.name_or_path or type(model).__name__}: its weights are quantized"
        raise ModelError(f"{found}; a student is cut from the original weights, in bf16 or fp32")


def cut_indices(config: Any, kept: Kept, layer: int, mixture: bool) -> dict[str, Tensor]:
    """Return the kept numbers of each letter's dimension in one layer."""
    size, all_groups = head_size(config), sizes_of(config).groups
    heads_per_group = config.num_attention_heads // all_groups
    groups = kept.groups[layer]
    within = torch.arange(heads_per_group * size)
    found = {
        "H": kept.hidden,
        "Q": (groups[:, None] * heads_per_group * size + within).flatten(),
        "K": (groups[:, None] * size + torch.arange(size)).flatten(),
    }
    if mixture:
        found |= {"E": kept.experts[layer], "M": kept.neurons[layer]}
        found |= {"S": kept.shared[layer]} if len(kept.shared) else {}
    else:
        found["F"] = kept.neurons[layer]
    return found


def _letters(name: str, tensor: Tensor, prefix: str, family: Family, model: str) -> tuple[int, str]:
    """Return the layer of a weight (0 outside the layers) and one letter per dimension."""
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
    module = match[2] if match else name
    part = re.sub(r"\.(weight|bias)$", "", module)
    table = family.layer if match else family.outside
    letters = table.get(part if match else part.rpartition(".")[2])
    if letters is not None and module.endswith(".bias") and len(letters) > 1:
        letters = letters[-1 if family.is_transposed and match else 0]
    if letters is None or len(letters) != tensor.dim():
        raise ModelError(f"{model}: no rule says how its weight {name} is cut; open an issue")
    return (int(match[1]) if match else 0), letters


def sliced(tensor: Tensor, letters: str, indices: dict[str, Tensor]) -> Tensor:
    """Return the kept part of a weight."""
    for dimension, letter in enumerate(letters):
        if letter == ".":
            continue
        parts = STACKED.get(letter, letter)
        if parts[0] == "M":  # each expert has its own neurons
            tensor = _expert_neurons(tensor, dimension, len(parts), indices["M"])
            continue
        sizes, start = _part_sizes(tensor.shape[dimension], letter, indices), 0
        rows = []
        for part, size in zip(parts, sizes, strict=True):
            rows.append(indices[part] + start)
            start += size
        tensor = tensor.index_select(dimension, torch.cat(rows).to(tensor.device))
    return tensor.clone()


def _part_sizes(size: int, letter: str, indices: dict[str, Tensor]) -> list[int]:
    """Return the uncut size of each part of a dimension."""
    if letter == "P":  # q is as many times k as there are query heads in a group
        queries = len(indices["Q"]) // len(indices["K"])
        return [size * queries // (queries + 2), *[size // (queries + 2)] * 2]
    parts = len(STACKED.get(letter, letter))
    return [size // parts] * parts


def _expert_neurons(tensor: Tensor, dimension: int, parts: int, kept: Tensor) -> Tensor:
    """Return ``tensor [E', …]`` with each expert's own neurons ``kept [E', M']``."""
    size = tensor.shape[dimension] // parts
    rows = torch.cat([kept + part * size for part in range(parts)], 1).to(tensor.device)
    return torch.stack(
        [one.index_select(dimension - 1, chosen) for one, chosen in zip(tensor, rows, strict=True)]
    )


def _compensate_embedding_scale(
    model: CausalLM, state: dict[str, Tensor], family: Family, factor: float
) -> None:
    """Multiply the embedding by ``factor``; if it is the head too, divide the final norm."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = {name for name, weight in model.named_parameters(remove_duplicate=False)
             if weight is embedding}  # fmt: skip
    for name in names:
        state[name] = state[name] * factor
    if head is embedding:
        name = next(name for name in state if name.endswith(f".{family.final_norm}.weight")
                    and ".layers." not in name)  # fmt: skip
        state[name] = (state[name] + family.norm_offset) / factor - family.norm_offset
