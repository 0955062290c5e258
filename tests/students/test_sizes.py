from __future__ import annotations

import dataclasses

import pytest

from potstill.errors import ConfigError, ModelError
from potstill.students.families import Sizes, sizes_of
from potstill.students.layers import keep_layers
from potstill.students.sizes import Fixed, Shapes, parameters_of_bytes, wanted_parameters
from potstill.students.width import keep_first, narrow
from students.narrow_models import FAMILIES, narrow_model

TEACHER = 100_000_000


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("80M", 80_000_000),
        ("0.05B", 50_000_000),
        ("50%", 50_000_000),
        ("33.3 %", 33_300_000),
        ("1500k", 1_500_000),
        ("81,400,000", 81_400_000),
        ("81_400_000", 81_400_000),
    ],
)
def test_sizes_are_read_with_units_and_shares(text: str, parameters: int) -> None:
    assert wanted_parameters(text, TEACHER) == parameters


@pytest.mark.parametrize("text", ["", "M", "80X", "-80M", "8e7", "80MB", "nan", "1..5M", "%"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size; give 80M"):
        wanted_parameters(text, TEACHER)


@pytest.mark.parametrize("text", ["100M", "100%", "120M", "0.2B", "0", "0%"])
def test_a_size_that_is_not_below_the_teachers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the teacher has 100,000,000"):
        wanted_parameters(text, TEACHER)


def test_bytes_are_those_of_the_weights_in_a_precision() -> None:
    assert parameters_of_bytes("80MB", "int8", TEACHER) == 80_000_000
    assert parameters_of_bytes("0.1GB", "bf16", TEACHER) == 50_000_000
    assert parameters_of_bytes("10MiB", "int4", TEACHER) == 2 * 10 * 2**20
    with pytest.raises(ConfigError, match="precision 'int7'"):
        parameters_of_bytes("80MB", "int7", TEACHER)
    with pytest.raises(ConfigError, match="bytes '80M': not a size"):
        parameters_of_bytes("80M", "int8", TEACHER)
    with pytest.raises(ConfigError, match="the teacher has"):
        parameters_of_bytes("80GB", "int8", TEACHER)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_of_a_shape_are_those_of_the_model(family: str) -> None:
    model = narrow_model(family)
    whole = sizes_of(model.config)
    sizes = dataclasses.replace(whole, layers=2, neurons=8, experts=whole.experts // 2)
    cut = keep_layers(model, 2)
    student = narrow(cut, keep_first(cut, sizes))
    assert Shapes(model.config).parameters(sizes) == student.num_parameters()


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_candidate_is_within_two_percent_of_the_wanted_size(
    family: str, share: float
) -> None:
    config = narrow_model(family, layers=6).config
    config.moe_intermediate_size = 256  # a multiple of 8 is near every size
    shapes = Shapes(config)
    wanted = round(share * shapes.parameters(shapes.teacher))
    found = shapes.depths(wanted, Fixed())
    assert found
    for sizes in [*found, *shapes.variants(wanted, found[0], Fixed())]:
        assert abs(shapes.parameters(sizes) - wanted) <= 0.02 * wanted
        assert sizes.neurons >= shapes.fewest_neurons


def test_candidates_reach_from_all_layers_to_all_neurons() -> None:
    shapes = Shapes(narrow_model("llama", layers=8).config)
    wanted = round(0.7 * shapes.parameters(shapes.teacher))
    found = shapes.depths(wanted, Fixed())
    assert len(found) == 5 or len(found) == len({one.layers for one in found})
    assert max(one.neurons for one in found) >= 40
    assert max(one.layers for one in found) > min(one.layers for one in found)


def test_sizes_set_by_hand_stay() -> None:
    shapes = Shapes(narrow_model("llama", layers=6).config)
    wanted = round(0.6 * shapes.parameters(shapes.teacher))
    for sizes in shapes.depths(wanted, Fixed(groups=1, layers=[0, 1, 2, 5])):
        assert (sizes.groups, sizes.layers) == (1, 4)
    assert shapes.base(Fixed(hidden=24, neurons=20)) == Sizes(6, 24, 20, 2)


def test_in_gpt2_heads_or_hidden_size_set_each_other() -> None:
    shapes = Shapes(narrow_model("gpt2").config)
    assert shapes.base(Fixed(hidden=16)) == shapes.base(Fixed(groups=2))
    assert shapes.base(Fixed(groups=2)).hidden == 16


def test_a_size_that_cannot_be_reached_says_which_can() -> None:
    shapes = Shapes(narrow_model("llama").config)
    with pytest.raises(ConfigError, match=r"no student of this size; sizes from .* to .* can"):
        shapes.depths(3000, Fixed())
    with pytest.raises(ConfigError, match="no student of this size"):
        shapes.depths(shapes.parameters(shapes.teacher) // 2, Fixed(layers=3, neurons=40))


def test_a_family_without_a_table_is_refused_before_anything_is_opened() -> None:
    config = narrow_model("llama").config
    config.model_type = "rwkv"
    with pytest.raises(ModelError, match="a rwkv model cannot be narrowed, only llama"):
        Shapes(config)
