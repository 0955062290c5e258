"""Measure on calibration text what a model uses, and keep the most used parts of it.

In one pass, for every layer: x is the input of the output projection W of attention or FFN,

    a neuron's or head's importance = √(Σ over tokens and its channels of x² · ‖column of W‖²)

the size of what it adds to the residual stream. A hidden channel's is the size of what the norms
put out there, an expert's the weight that the router gives it, a layer's the change of direction of
the residual stream, 1 − cosine.

Source: Sun et al. 2023 (Wanda), arXiv 2306.11695, section 3, for |weight| · ‖activation‖;
Men et al. 2024 (ShortGPT), arXiv 2403.03853, section 3, for layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from potstill.errors import ConfigError
from potstill.progress import Progress
from potstill.protocols import CausalLM
from potstill.students.families import Family, Sizes, family_of, head_size, resized, sizes_of
from potstill.students.layerwise import (
    Calibration,
    each_batch,
    inputs_of,
    layers_of,
)
from potstill.students.states import TeacherStates
from potstill.students.width import Kept, is_mixture


@dataclass
class Importance:
    """How much each part of a model is used; lists have one entry per layer."""

    hidden: Tensor
    """``[H]``"""
    groups: list[Tensor] = field(default_factory=list)
    """``[K]``"""
    neurons: list[Tensor] = field(default_factory=list)
    """``[F]``, or ``[E, M]`` in a mixture."""
    experts: list[Tensor] = field(default_factory=list)
    """``[E]``, empty for a dense layer."""
    shared: list[Tensor] = field(default_factory=list)
    """``[S]``, empty without a shared expert."""
    layers: list[float] = field(default_factory=list)
    """1 − cosine of the hidden states before and after each layer."""


@dataclass(frozen=True)
class Cut:
    """The layers that are kept of a teacher, and what is kept of them."""

    layers: list[int]
    kept: Kept
    sizes: Sizes


@torch.no_grad()
def measure_importance(
    model: CausalLM, calibration: Calibration, states: TeacherStates | None = None
) -> Importance:
    """Run the model once over the calibration text; fill ``states`` if given."""
    family, layers = family_of(model.config), layers_of(model)
    sums = [_LayerSums(family, layer, is_mixture(model, i)) for i, layer in enumerate(layers)]
    with Progress("measuring the teacher", len(calibration.batches), unit="batches") as progress:
        for number, mask, hidden, arguments in each_batch(model, calibration):
            for i, layer in enumerate(layers):
                hidden = sums[i].run(layer, hidden, arguments[i], mask, states, number)
            if states is not None:
                states.put(2 * len(layers), number, hidden[mask])
            progress.update()
    size, groups = head_size(model.config), sizes_of(model.config).groups
    return Importance(
        hidden=torch.stack([one.normed for one in sums]).sum(0).sqrt(),
        groups=[_per_group(one.heads, groups, size) for one in sums],
        neurons=[one.neurons.sqrt() for one in sums],
        experts=[one.experts for one in sums],
        shared=[one.shared.sqrt() for one in sums],
        layers=[float(one.turned / calibration.tokens) for one in sums],
    )


def _per_group(channels: Tensor, groups: int, size: int) -> Tensor:
    return channels.view(groups, -1).sum(1).sqrt()


class _LayerSums:
    """Sums over tokens of one layer."""

    def __init__(self, family: Family, layer: Any, mixture: bool) -> None:
        self.family, self.mixture = family, mixture
        self.normed: Any = 0.0
        self.heads: Any = 0.0
        self.neurons: Any = 0.0
        self.experts: Any = torch.zeros(0)
        self.shared: Any = torch.zeros(0)
        self.turned: Any = 0.0
        has_shared = mixture and hasattr(layer.mlp, "shared_expert")
        self.shared_output = "mlp.shared_expert.down_proj" if has_shared else ""
        ffn = "mlp.experts" if mixture else family.ffn_output
        more = [self.shared_output] if has_shared else []
        first_ffn = family.ffn if mixture else family.ffn_inputs[0]
        self.names = {
            "attention": family.attention_inputs[0],
            "heads": family.attention_output,
            "middle": family.ffn_norm,
            "normed": first_ffn,
            "ffn": ffn,
        }
        self.wanted = [*dict.fromkeys(self.names.values()), *more]

    def run(
        self, layer: Any, hidden: Tensor, arguments: Any, mask: Tensor, states: Any, number: int
    ) -> Tensor:
        """Add a batch; return the hidden states after the layer."""
        output: Tensor
        found, output = inputs_of(self.wanted, layer, hidden, arguments)
        flat = mask.flatten()

        def tokens(name: str) -> Tensor:
            inputs: Tensor = found[name][0]
            return inputs.reshape(-1, inputs.shape[-1])[flat].float()

        names, family = self.names, self.family
        for name in {names["attention"], names["normed"]}:
            self.normed = self.normed + tokens(name).square().sum(0)
        self.heads = self.heads + _outgoing(layer, family, names["heads"], tokens(names["heads"]))
        if self.mixture:
            self._mixture(layer, found["mlp.experts"], flat)
        else:
            self.neurons = self.neurons + _outgoing(
                layer, family, names["ffn"], tokens(names["ffn"])
            )
        if self.shared_output:
            inputs = tokens(self.shared_output)
            added = _outgoing(layer, family, self.shared_output, inputs)
            self.shared = added if not len(self.shared) else self.shared + added
        cosine = torch.cosine_similarity(hidden[mask].float(), output[mask].float(), dim=-1)
        self.turned = self.turned + (1 - cosine).sum()
        if states is not None:
            states.put(2 * states.layer_of(layer), number, hidden[mask])
            middle = found[names["middle"]][0]
            states.put(2 * states.layer_of(layer) + 1, number, middle[mask])
        return output

    def _mixture(self, layer: Any, inputs: tuple[Any, ...], flat: Tensor) -> None:
        """Add the router's weights, and each expert's neurons."""
        experts = layer.mlp.experts
        hidden, chosen, weights = inputs[0], inputs[1], inputs[2].float()
        count, size = experts.down_proj.shape[0], experts.down_proj.shape[2]
        if not len(self.experts):
            self.experts = torch.zeros(count, device=hidden.device)
            self.neurons = torch.zeros(count, size, device=hidden.device)
        for number in range(count):
            token, place = torch.where((chosen == number) & flat[:, None])
            if not len(token):
                continue
            gate, up = (hidden[token] @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
            weight = weights[token, place]
            features = (experts.act_fn(gate) * up).float() * weight[:, None]
            columns = experts.down_proj[number].float().square().sum(0)
            self.experts[number] += weight.sum()
            self.neurons[number] += features.square().sum(0) * columns


def _outgoing(layer: Any, family: Family, name: str, inputs: Tensor) -> Tensor:
    """Return Σ x² · ‖column‖² for each input channel of a projection."""
    weight: Tensor = layer.get_submodule(name).weight.float()
    return inputs.square().sum(0) * weight.square().sum(1 if family.is_transposed else 0)


def choose_parts(
    model: CausalLM, importance: Importance, sizes: Sizes, layers: Sequence[int] | None = None
) -> Cut:
    """Return the most used parts of these sizes; ``layers`` are given, or the most used ones.

    Raises: ConfigError for sizes that the family cannot have.
    """
    old = sizes_of(model.config)
    config = resized(model.config, sizes)
    if not 1 <= sizes.layers <= old.layers:
        found = f"the teacher has {old.layers} layers; keep between 1 and {old.layers}"
        raise ConfigError(f"keep-layers {sizes.layers}: {found}")
    if layers is None:
        layers = sorted(_most(torch.tensor(importance.layers), sizes.layers).tolist())
    dense = config.intermediate_size if old.experts else sizes.neurons
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    neurons, experts = [], []
    for layer in layers:
        if not len(importance.experts[layer]):
            experts.append(torch.arange(0))
            neurons.append(_most(importance.neurons[layer], dense))
            continue
        chosen = _most(importance.experts[layer], sizes.experts)
        experts.append(chosen)
        neurons.append(_most(importance.neurons[layer][chosen], sizes.neurons))
    kept = Kept(
        hidden=_most(importance.hidden, sizes.hidden),
        groups=[_most(importance.groups[layer], sizes.groups) for layer in layers],
        neurons=neurons,
        experts=experts if old.experts else (),
        shared=[
            _most(importance.shared[layer], min(shared, len(importance.shared[layer])))
            for layer in layers
        ],
    )
    return Cut(list(layers), kept, sizes)


def _most(importance: Tensor, count: int) -> Tensor:
    """Return the numbers of the largest, rising, along the last dimension, on the CPU."""
    return importance.topk(count, dim=-1).indices.sort(dim=-1).values.cpu()
