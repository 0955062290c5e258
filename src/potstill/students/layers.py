"""Make a student with some of its teacher's layers.

It learns far faster than from random weights, because embedding, head and residual stream already
fit (Sanh et al. 2019, DistilBERT, arXiv 1910.01108, section 3; Sajjad et al. 2020, arXiv
2004.03844).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from potstill.errors import ConfigError, ModelError
from potstill.models.vocabulary import embedding_rows
from potstill.models.weights import infinite_weight
from potstill.protocols import CausalLM, Tokenizer


def choose_layers(keep: int | Sequence[int], *, of: int) -> list[int]:
    """Return the layers to keep: ``keep`` evenly spaced ones with both ends, or the given list.

    >>> choose_layers(4, of=10)
    [0, 3, 6, 9]

    Raises: ConfigError for a layer that does not exist, a repeated one, or a count out of range.
    """
    if isinstance(keep, int):
        if not 1 <= keep <= of:
            found = f"the teacher has {of} layers; keep between 1 and {of}"
            raise ConfigError(f"keep-layers {keep}: {found}")
        return [0] if keep == 1 else [round(i * (of - 1) / (keep - 1)) for i in range(keep)]
    layers = list(keep)
    for layer in layers:
        if not 0 <= layer < of:
            need = f"the teacher's are numbered 0 to {of - 1}"
            raise ConfigError(f"keep-layers {layer}: no such layer; {need}")
    if not layers or sorted(set(layers)) != layers:
        found = ",".join(map(str, layers))
        raise ConfigError(f"keep-layers {found}: give each layer once, in rising order")
    return layers


LAYER_NUMBER_LISTS = ("mlp_only_layers", "moe_layers")
"""Configuration lists of layer numbers (mixtures of experts), not of one entry a layer."""


def keep_layers(teacher: CausalLM, keep: int | Sequence[int]) -> Any:
    """Return a new model with the chosen layers of ``teacher``, in its dtype, on the CPU.

    Raises: ConfigError as `choose_layers`; ModelError if the layers are not one plain list.
    """
    from transformers import AutoModelForCausalLM

    prefix, count = layer_list(teacher)
    layers = choose_layers(keep, of=count)
    config = with_layers(teacher.config, layers)
    try:
        student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
        student.load_state_dict(_renumbered(teacher.state_dict(), prefix, layers))
    except (ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[-160:]
        found = f"its layers cannot be removed one by one: {reason}"
        raise ModelError(f"{type(teacher).__name__}: {found}") from error
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def with_layers(config: Any, layers: Sequence[int]) -> Any:
    """Return a copy of ``config`` for a model with these layers of its model."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    count, text_config.num_hidden_layers = text_config.num_hidden_layers, len(layers)
    for name, value in list(vars(text_config).items()):
        if name in LAYER_NUMBER_LISTS and isinstance(value, list):
            numbers = [layers.index(layer) for layer in value if layer in layers]
            setattr(text_config, name, numbers)
        elif isinstance(value, list) and len(value) == count:  # one entry a layer: layer_types
            setattr(text_config, name, [value[layer] for layer in layers])
    return config


def save_student(
    student: CausalLM,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    provenance: dict[str, Any],
    weights: dict[str, Any] | None = None,
    notes: str = "",
) -> None:
    """Write a Hugging Face folder: safetensors, tokenizer, generation config and model card.

    ``weights`` replaces the student's state dict: the gathered weights of a sharded model.
    ``notes`` stand at the end of the card, in Markdown.
    Raises: ModelError if a weight is NaN or infinite.
    """
    infinite = infinite_weight(student) if weights is None else None
    if infinite:
        found = f"the student's weight {infinite} is NaN or infinite, so it is not saved"
        raise ModelError(f"{found}; lower --learning-rate if it was trained")
    for config in (student.config, student.config.get_text_config(), student.generation_config):
        pad = getattr(config, "pad_token_id", None)
        if pad is not None and pad >= embedding_rows(student):  # the Trainer copies the tokenizer's
            config.pad_token_id = None
    student.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_model_card(provenance, notes), encoding="utf-8")


def layer_list(model: CausalLM) -> tuple[str, int]:
    """Return name and length of the model's list of layers: ``model.layers``, ``transformer.h``."""
    count = model.config.get_text_config().num_hidden_layers
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    names = [name for name in names if re.search(r"(^|\.)(layers|h|blocks)$", name)]
    if len(names) != 1:
        found = "its layers are not one plain list, so none can be removed"
        raise ModelError(f"{type(model).__name__}: {found}; open an issue")
    return names[0], count


def _renumbered(state: dict[str, Any], prefix: str, layers: Sequence[int]) -> dict[str, Any]:
    new_number = {old: new for new, old in enumerate(layers)}
    kept = {}
    for name, tensor in state.items():
        match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if match is None:
            kept[name] = tensor
        elif int(match[1]) in new_number:
            kept[f"{prefix}.{new_number[int(match[1])]}.{match[2]}"] = tensor
    return kept


def _model_card(provenance: dict[str, Any], notes: str) -> str:
    front = {"library_name": "transformers", "tags": ["potstill", "distillation"]}
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    facts = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in provenance.items())
    text = f"# A student\n\nMade with potstill.\n\n| what | value |\n|---|---|\n{facts}\n"
    more = f"\n## Students that were tried\n\n{notes}" if notes else ""
    return f"---\n{lines}\n---\n\n{text}{more}"
