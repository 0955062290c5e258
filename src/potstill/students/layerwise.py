"""Run a model one layer at a time, and look at what goes in and out of its modules."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.data import BatchLayout
from potstill.errors import DataError
from potstill.models.heads import hidden_states, model_inputs, on_device
from potstill.protocols import Batch, CausalLM
from potstill.students.layers import layer_list

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with behind its hidden states: masks, positions."""
MINIMUM_TOKENS = 256
"""The fewest tokens of calibration text that are accepted."""


@dataclass(frozen=True)
class Calibration:
    """Calibration text as padded batches of similar length."""

    batches: Sequence[Batch]
    numbers: Sequence[int]
    """The batches' numbers in the whole text."""

    def part(self, tokens: int) -> Calibration:
        """Return evenly spread batches with about this many tokens, at least two."""
        count = len(self.batches)
        wanted = min(count, max(2, round(count * tokens / self.tokens)))
        chosen = [i * count // wanted for i in range(wanted)]
        return Calibration([self.batches[i] for i in chosen], [self.numbers[i] for i in chosen])

    @functools.cached_property
    def masks(self) -> list[Tensor]:
        """Return where each batch has a token, ``[B, T]`` of bool."""
        return [batch["attention_mask"].bool() for batch in self.batches]

    @functools.cached_property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return sum(int(mask.sum()) for mask in self.masks)

    @classmethod
    def of(
        cls,
        encoded: Sequence[Any],
        pad: int,
        device: torch.device | str = "cpu",
        *,
        size: int = 16,
        least: int = MINIMUM_TOKENS,
    ) -> Calibration:
        """Lay out tokenized conversations. Raises: DataError if they are too short."""
        rows = sorted(encoded, key=lambda row: len(row["input_ids"]))
        found = sum(len(row["input_ids"]) for row in rows)
        if found < least or len(rows) < 2:
            need = f"at least 2 conversations and {MINIMUM_TOKENS} tokens are needed, better 5000"
            raise DataError(
                f"the calibration text has {len(rows)} conversations and {found} tokens; {need}; "
                "give more with --data"
            )
        size = min(size, (len(rows) + 1) // 2)  # two halves at least
        layout = BatchLayout(pad, packed=False)
        starts = range(0, len(rows), size)
        batches = [layout(rows[start : start + size]) for start in starts]
        return cls([on_device(batch, device) for batch in batches], range(len(batches)))


def layers_of(model: CausalLM) -> Any:
    """Return the list of the model's layers."""
    return model.get_submodule(layer_list(model)[0])


@torch.no_grad()
def first_inputs(model: CausalLM, batch: Batch) -> tuple[Tensor, list[Arguments]]:
    """Return the hidden states ``[B, T, H]`` before the first layer, and every layer's arguments.

    No layer is computed.
    """
    layers = layers_of(model)
    seen: list[tuple[Tensor, Arguments]] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((hidden, (args, kwargs)))
        return hidden

    for layer in layers:
        layer.forward = record
    try:
        hidden_states(model, model_inputs(batch))
    finally:
        for layer in layers:
            del layer.forward
    return seen[0][0], [arguments for _, arguments in seen]


def run_layer(layer: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Return the hidden states after a layer."""
    output = layer(hidden, *arguments[0], **arguments[1])
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


class _Reached(Exception):
    """The module whose input was wanted has been reached."""


def input_of(name: str, layer: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Return the first input of a module of ``layer``; what follows it is not computed."""
    found = _inputs_until(layer.get_submodule(name), layer, hidden, arguments)
    return found


def ffn_features(layer: nn.Module, ffn: str, output: str, normed: Tensor) -> Tensor:
    """Return the input of the FFN's ``output`` projection for the FFN's own input ``normed``."""
    return _inputs_until(layer.get_submodule(output), layer.get_submodule(ffn), normed, ((), {}))


def _inputs_until(
    module: nn.Module, whole: nn.Module, hidden: Tensor, arguments: Arguments
) -> Tensor:
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0])
        raise _Reached

    with module.register_forward_pre_hook(stop):
        try:
            whole(hidden, *arguments[0], **arguments[1])
        except _Reached:
            return found[0]
    raise AssertionError("the module was not run")


def inputs_of(names: Sequence[str], layer: nn.Module, hidden: Tensor, arguments: Arguments) -> Any:
    """Return the arguments of each named module in one run of ``layer``, and the layer's output."""
    found: dict[str, tuple[Any, ...]] = {}
    hooks = []
    for name in names:

        def record(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            found[name] = inputs

        hooks.append(layer.get_submodule(name).register_forward_pre_hook(record))
    try:
        output = run_layer(layer, hidden, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found, output


def each_batch(model: CausalLM, calibration: Calibration) -> Iterator[Any]:
    """Yield number, mask, first hidden states and arguments of each batch."""
    columns = (calibration.numbers, calibration.batches, calibration.masks)
    for number, batch, mask in zip(*columns, strict=True):
        yield number, mask, *first_inputs(model, batch)
