"""From a wanted size, such as 80M, 50% or 400MB, to the shapes of models that have it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

from potstill.errors import ConfigError
from potstill.students.families import Sizes, family_of, head_size, resized, sizes_of
from potstill.students.layers import choose_layers, with_layers

TOLERANCE = 0.02
"""How far a student may be from the wanted number of parameters."""
FEWEST_NEURONS = 0.25
"""The smallest share of FFN neurons that is tried."""
NEURON_STEP = 8
"""FFNs of at least 512 neurons are cut to a multiple of this: GPUs multiply such sizes faster."""
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes of a weight by precision. Scales of quantized weights are not counted."""
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
BYTE_UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def wanted_parameters(text: str, teacher: int) -> int:
    """Return the parameters of a size: a number with K, M or B, or a share of the teacher's.

    >>> wanted_parameters("80M", 135_000_000), wanted_parameters("50%", 135_000_000)
    (80000000, 67500000)

    Raises: ConfigError if it is no size, or not below the teacher's.
    """
    match = re.fullmatch(r"\s*(\d+(?:[_,]\d{3})*(?:\.\d+)?)\s*([KMB%]?)\s*", text.upper())
    if match is None:
        raise ConfigError(f"parameters {text!r}: not a size; give 80M, 0.5B, 50% or a number")
    number = float(re.sub("[_,]", "", match[1]))
    wanted = number / 100 * teacher if match[2] == "%" else number * UNITS[match[2]]
    return _below_teacher(f"parameters {text}", wanted, teacher)


def parameters_of_bytes(text: str, precision: str, teacher: int) -> int:
    """Return the parameters that fit into so many bytes of weights, such as 400MB or 0.4GB.

    Raises: ConfigError for no size, an unknown precision, or more than the teacher has.
    """
    if precision not in BYTES:
        raise ConfigError(f"precision {precision!r}: not known; give one of {', '.join(BYTES)}")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", text.upper())
    if match is None or match[2] not in BYTE_UNITS:
        raise ConfigError(f"bytes {text!r}: not a size; give 400MB, 0.4GB or 380MiB")
    wanted = float(match[1]) * BYTE_UNITS[match[2]] / BYTES[precision]
    return _below_teacher(f"bytes {text} in {precision}", wanted, teacher)


def _below_teacher(name: str, wanted: float, teacher: int) -> int:
    if not 1 <= wanted < teacher:
        found = f"{wanted:,.0f} parameters, and the teacher has {teacher:,}"
        raise ConfigError(f"{name}: {found}; give a size below the teacher's")
    return round(wanted)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Sizes that were set by hand; None is free."""

    layers: list[int] | int | None = None
    hidden: int | None = None
    neurons: int | None = None
    groups: int | None = None
    experts: int | None = None


class Shapes:
    """The models that can be cut from a teacher's configuration."""

    def __init__(self, config: Any) -> None:
        family_of(config)
        self.config, self.teacher = config, sizes_of(config)

    @property
    def fewest_neurons(self) -> int:
        """Return the smallest number of neurons that is tried."""
        fewest = max(1, int(FEWEST_NEURONS * self.teacher.neurons))
        step = NEURON_STEP if self.teacher.experts else 1
        return -(-fewest // step) * step

    @functools.cache  # noqa: B019 - one object a search
    def parameters(self, sizes: Sizes) -> int:
        """Return the exact number of parameters, without allocating any."""
        import torch
        from transformers import AutoModelForCausalLM

        layers = choose_layers(sizes.layers, of=self.teacher.layers)
        config = resized(with_layers(self.config, layers), sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        return int(model.num_parameters())

    def with_size(self, wanted: int, sizes: Sizes) -> Sizes | None:
        """Return ``sizes`` with as many neurons as fit ``wanted`` parameters, None if none do."""
        few = dataclasses.replace(sizes, neurons=self.fewest_neurons)
        many = dataclasses.replace(sizes, neurons=self.teacher.neurons)
        low, high = self.parameters(few), self.parameters(many)
        slope = (high - low) / max(1, many.neurons - few.neurons)
        neurons = few.neurons + round((wanted - low) / slope) if slope else many.neurons
        if self.teacher.neurons >= 64 * NEURON_STEP or sizes.experts:
            neurons = round(neurons / NEURON_STEP) * NEURON_STEP
        neurons = min(max(neurons, few.neurons), many.neurons)
        found = dataclasses.replace(sizes, neurons=neurons)
        return found if self.fits(wanted, found) else None

    def fits(self, wanted: int, sizes: Sizes) -> bool:
        """Return whether the model is within `TOLERANCE` of the wanted size."""
        return abs(self.parameters(sizes) - wanted) <= TOLERANCE * wanted

    def depths(self, wanted: int, fixed: Fixed, count: int = 5) -> list[Sizes]:
        """Return sizes of different depth, from all layers to all neurons, that fit ``wanted``.

        Raises: ConfigError if none does.
        """
        base = self.base(fixed)
        depths = range(1, self.teacher.layers + 1)
        if fixed.layers is not None:
            depths = range(base.layers, base.layers + 1)
        found = [
            sizes
            for layers in depths
            if (sizes := self._sized(wanted, dataclasses.replace(base, layers=layers), fixed))
        ]
        if not found:
            raise ConfigError(self._no_fit(wanted, base, fixed))
        chosen = choose_layers(min(count, len(found)), of=len(found))
        return [found[i] for i in chosen]

    def base(self, fixed: Fixed) -> Sizes:
        """Return the teacher's sizes with those that were set by hand."""
        layers = fixed.layers
        given = {
            "layers": len(layers) if isinstance(layers, list) else layers,
            "hidden": fixed.hidden,
            "neurons": fixed.neurons,
            "groups": fixed.groups,
            "experts": fixed.experts,
        }
        base = dataclasses.replace(
            self.teacher, **{name: value for name, value in given.items() if value is not None}
        )
        return self._with_heads(base, fixed)

    def variants(self, wanted: int, sizes: Sizes, fixed: Fixed) -> list[Sizes]:
        """Return sizes of the same depth with fewer groups, hidden channels or experts."""
        tried: list[Sizes] = []
        if (
            fixed.groups is None
            and sizes.groups > 1
            and not family_of(self.config).heads_make_hidden
        ):
            fewer = max(1, min(sizes.groups - 1, round(sizes.groups * 0.75)))
            tried.append(dataclasses.replace(sizes, groups=fewer))
        if fixed.hidden is None and not family_of(self.config).heads_make_hidden:
            step = math.lcm(self.config.num_attention_heads, NEURON_STEP)
            hidden = round(sizes.hidden * 0.9 / step) * step
            tried.append(dataclasses.replace(sizes, hidden=max(step, hidden)))
        if fixed.experts is None and sizes.experts > 1:
            experts = max(1, round(sizes.experts * 0.75))
            tried.append(dataclasses.replace(sizes, experts=experts))
        found = (self._sized(wanted, one, fixed) for one in tried)
        return [one for one in found if one is not None and one != sizes]

    def _with_heads(self, sizes: Sizes, fixed: Fixed) -> Sizes:
        """Return sizes whose hidden size and heads agree, where one determines the other."""
        if not family_of(self.config).heads_make_hidden:
            return sizes
        size = head_size(self.config)
        if fixed.hidden is not None and fixed.groups is None and fixed.hidden % size == 0:
            return dataclasses.replace(sizes, groups=fixed.hidden // size)
        if fixed.groups is not None and fixed.hidden is None:
            return dataclasses.replace(sizes, hidden=fixed.groups * size)
        return sizes

    def _sized(self, wanted: int, sizes: Sizes, fixed: Fixed) -> Sizes | None:
        if fixed.neurons is None:
            return self.with_size(wanted, sizes)
        return sizes if self.fits(wanted, sizes) else None

    def _no_fit(self, wanted: int, base: Sizes, fixed: Fixed) -> str:
        least_layers = base.layers if fixed.layers is not None else 1
        least_neurons = base.neurons
        if fixed.neurons is None:
            least_neurons = self.fewest_neurons
        least = self.parameters(
            dataclasses.replace(base, layers=least_layers, neurons=least_neurons)
        )
        most = self.parameters(base)
        need = f"sizes from {least:,} to {most:,} can be reached so"
        more = "" if fixed.hidden else "; a smaller --hidden-size also narrows the embedding"
        return f"parameters {wanted:,}: no student of this size; {need}{more}"
