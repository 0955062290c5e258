"""A teacher's hidden states on calibration text, in a temporary file rather than in memory."""

from __future__ import annotations

import tempfile
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from potstill.protocols import CausalLM
from potstill.students.layerwise import Calibration, layers_of


class TeacherStates:
    """Hidden states before every layer, in its middle, and after the last one, in bfloat16.

    Point 2l is before layer l, 2l + 1 before its FFN, 2L after the last of L layers. The file is
    mapped into memory and deleted at the end of the ``with`` block.
    """

    def __init__(self, model: CausalLM, calibration: Calibration) -> None:
        layers: list[nn.Module] = list(layers_of(model))
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}
        counts = [int(mask.sum()) for mask in calibration.masks]
        self._starts = [0, *accumulate(counts)]
        self.points = 2 * len(layers) + 1
        self._hidden = model.config.get_text_config().hidden_size
        self._device = model.device

    def __enter__(self) -> TeacherStates:
        self._folder = tempfile.TemporaryDirectory(prefix="potstill-states-")
        shape = (self.points, self._starts[-1], self._hidden)
        self._values: Tensor = torch.from_file(
            str(Path(self._folder.name) / "states"),
            shared=True,
            size=shape[0] * shape[1] * shape[2],
            dtype=torch.bfloat16,
        ).view(shape)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        del self._values
        self._folder.cleanup()

    def layer_of(self, layer: nn.Module) -> int:
        """Return the number of one of the model's layers."""
        return self._numbers[id(layer)]

    def put(self, point: int, batch: int, values: Tensor) -> None:
        """Store the states ``[N, H]`` of a batch's tokens."""
        self._values[point, self._starts[batch] : self._starts[batch + 1]] = values.cpu()

    def get(self, point: int, batch: int) -> Tensor:
        """Return the states ``[N, H]`` of a batch's tokens, in float32."""
        found = self._values[point, self._starts[batch] : self._starts[batch + 1]]
        return found.to(self._device).float()
