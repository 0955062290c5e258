from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from potstill.errors import ConfigError
from potstill.students.families import family_of, sizes_of
from potstill.students.importance import choose_parts, measure_importance
from potstill.students.layerwise import layers_of
from students.narrow_models import FAMILIES, MIXTURES, narrow_model
from students.test_refit import calibration


def silence(model: Any, layer: int, neurons: list[int], groups: list[int]) -> None:
    """Make neurons and groups of a layer add nothing to the residual stream."""
    family, chosen = family_of(model.config), layers_of(model)[layer]
    with torch.no_grad():
        for name, kept, width in (
            (family.ffn_output, neurons, 1),
            (family.attention_output, groups, model.config.hidden_size // len_groups(model)),
        ):
            weight = chosen.get_submodule(name).weight
            columns = weight.T if not family.is_transposed else weight
            for number in kept:
                columns[number * width : (number + 1) * width] = 0


def len_groups(model: Any) -> int:
    return sizes_of(model.config).groups


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in MIXTURES])
def test_neurons_and_groups_that_add_nothing_are_dropped_first(family: str) -> None:
    model = narrow_model(family)
    silence(model, 1, [0, 5, 9], [1])
    importance = measure_importance(model, calibration())
    whole = sizes_of(model.config)
    sizes = dataclasses.replace(whole, neurons=whole.neurons - 3)
    if family != "gpt2":
        sizes = dataclasses.replace(sizes, groups=whole.groups - 1)
    kept = choose_parts(model, importance, sizes).kept
    assert not {0, 5, 9} & set(kept.neurons[1].tolist())
    assert importance.groups[1].argmin() == 1
    if family != "gpt2":
        assert 1 not in kept.groups[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_does_nothing_is_dropped_first(family: str) -> None:
    model = narrow_model(family)
    if family in MIXTURES:
        for name, weight in layers_of(model)[1].named_parameters():
            if "down_proj" in name or "o_proj" in name:
                weight.data.zero_()
    else:
        layers, family_table = layers_of(model), family_of(model.config)
        norms = family_table.output_norms or ()
        for name, weight in layers[1].named_parameters():
            outputs = (family_table.ffn_output, family_table.attention_output, *norms)
            if name.rpartition(".")[0] in outputs:
                weight.data.fill_(-family_table.norm_offset if name.endswith("norm.weight") else 0)
    importance = measure_importance(model, calibration())
    sizes = dataclasses.replace(sizes_of(model.config), layers=2)
    assert choose_parts(model, importance, sizes).layers == [0, 2]


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_the_router_avoids_and_their_silent_neurons_are_dropped(family: str) -> None:
    model = narrow_model(family)
    mixture = layers_of(model)[0].mlp
    with torch.no_grad():
        mixture.gate.weight[2] = mixture.gate.weight[0]  # as likely as another one, then silent
        mixture.experts.down_proj[3, :, :8] = 0
        mixture.experts.down_proj[0, :, 8:] = 0
    importance = measure_importance(model, calibration())
    experts, neurons = importance.experts[0], importance.neurons[0]
    assert experts.shape == (4,)
    assert neurons.shape == (4, 16)
    assert len(importance.experts[1]) == 0  # a dense layer
    sizes = dataclasses.replace(sizes_of(model.config), neurons=8, experts=2)
    kept = choose_parts(model, importance, sizes).kept
    assert kept.experts[0].tolist() == sorted(experts.topk(2).indices.tolist())
    for number, chosen in zip(kept.experts[0].tolist(), kept.neurons[0].tolist(), strict=True):
        if number in (0, 3):
            assert chosen == list(range(0, 8) if number == 0 else range(8, 16))


def test_more_layers_than_the_teacher_has_are_refused() -> None:
    model = narrow_model("llama")
    importance = measure_importance(model, calibration(4))
    with pytest.raises(ConfigError, match="keep between 1 and 3"):
        choose_parts(model, importance, dataclasses.replace(sizes_of(model.config), layers=4))
