"""Make a student from a teacher: keep some of its layers.

A student that starts from its teacher's own layers learns far faster than one that starts from nothing: the embedding, the head
and the residual stream they share already fit (Sanh et al. 2019, DistilBERT, arXiv 1910.01108, section 3; Sajjad et al. 2020,
arXiv 2004.03844).
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


def choose_layers(keep: int | Sequence[int], *, of: int) -> list[int]:
    """Which of a teacher's ``of`` layers stay: a count, spaced evenly with both ends kept, or an explicit list in order.

    >>> choose_layers(4, of=10)
    [0, 3, 6, 9]

    Raises: ConfigError for a layer that does not exist, a repeated one, or a count out of range.
    """
    if isinstance(keep, int):
        if not 1 <= keep <= of:
            raise ConfigError(f"keep-layers {keep}: the teacher has {of} layers; keep between 1 and {of}")
        return [0] if keep == 1 else [round(i * (of - 1) / (keep - 1)) for i in range(keep)]
    layers = list(keep)
    for layer in layers:
        if not 0 <= layer < of:
            raise ConfigError(f"keep-layers {layer}: no such layer; the teacher's are numbered 0 to {of - 1}")
    if not layers or sorted(set(layers)) != layers:
        raise ConfigError(f"keep-layers {','.join(map(str, layers))}: give each layer once, in rising order")
    return layers


NUMBERS_OF_LAYERS = ("mlp_only_layers", "moe_layers")
"""Lists that a configuration has of layers' numbers (mixtures of experts), not with an entry for each layer."""


def keep_layers(teacher: Any, keep: int | Sequence[int]) -> Any:
    """A new model with the chosen layers of ``teacher`` and everything else of it, in the teacher's dtype, on the cpu.

    Raises: ConfigError as `choose_layers`; ModelError for an architecture whose layers are not one plain list.
    """
    from transformers import AutoModelForCausalLM

    prefix, count = layer_list(teacher)
    layers = choose_layers(keep, of=count)
    config = copy.deepcopy(teacher.config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = len(layers)
    for name, value in list(vars(text_config).items()):
        if name in NUMBERS_OF_LAYERS and isinstance(value, list):
            setattr(text_config, name, [layers.index(layer) for layer in value if layer in layers])
        elif isinstance(value, list) and len(value) == count:  # one entry a layer, such as layer_types (Gemma, Qwen)
            setattr(text_config, name, [value[layer] for layer in layers])
    try:
        student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
        student.load_state_dict(_renumbered(teacher.state_dict(), prefix, layers))
    except (ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[-160:]
        raise ModelError(f"{type(teacher).__name__}: its layers cannot be left out one by one: {reason}") from error
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def save_student(
    student: Any, tokenizer: Any, folder: Path, *, provenance: dict[str, Any], weights: dict[str, Any] | None = None
) -> None:
    """Write an ordinary Hugging Face folder: safetensors, tokenizer, generation config, and a card that says what it is.

    ``weights`` instead of the student's own: those of a model in shards, gathered.
    """
    student.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_model_card(provenance), encoding="utf-8")


def layer_list(model: Any) -> tuple[str, int]:
    """The name and the length of the model's list of layers: ``model.layers``, ``transformer.h``, …"""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and re.search(r"(^|\.)(layers|h|blocks)$", name)
    ]
    if len(lists) != 1:
        raise ModelError(f"{type(model).__name__}: its layers are not one plain list, so none can be left out; open an issue")
    return lists[0], count


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


def _model_card(provenance: dict[str, Any]) -> str:
    front = {"library_name": "transformers", "tags": ["potstill", "distillation"]}
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    facts = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in provenance.items())
    return f"---\n{lines}\n---\n\n# A student\n\nMade with potstill.\n\n| what | value |\n|---|---|\n{facts}\n"
