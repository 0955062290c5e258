"""A copy of the student that writes rollouts.

The student may be wrapped, sharded over processes, and in float32; its copy is whole, in the
precision of the run, with adapters merged.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from potstill.errors import ConfigError

WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class SamplingCopy:
    """Hold a copy of ``student`` in ``dtype``; `refreshed` gives it the current weights.

    Make it before the student is wrapped or sharded. It takes the memory of one more student.
    """

    def __init__(self, student: nn.Module, dtype: torch.dtype) -> None:
        self.model: Any = copy.deepcopy(student).eval().requires_grad_(False)
        # Buffers keep their dtype: rotary frequencies lose too much in bfloat16.
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self.has_adapter, self._is_merged = hasattr(self.model, "merge_adapter"), False

    @torch.no_grad()
    def refreshed(self, student: nn.Module, device: torch.device) -> Any:
        """Return the copy with the weights of ``student``, on ``device``.

        All processes must call it. Raises: ConfigError for weights that ZeRO-3 holds.
        """
        self.model.to(device)
        if self._is_merged:
            self.model.unmerge_adapter()
        own = {_plain(name): parameter for name, parameter in self.model.named_parameters()}
        for name, parameter in student.named_parameters():
            if hasattr(parameter, "ds_id"):
                raise ConfigError(
                    "on_policy: DeepSpeed ZeRO-3 keeps only a part of the student in each process; "
                    "use ZeRO-2 or FSDP 2"
                )
            current: Any = parameter
            if hasattr(current, "full_tensor"):  # FSDP 2 holds a part: gather the others
                current = current.full_tensor()
            own.pop(_plain(name)).copy_(current)
        assert not own, f"weights of the copy without a source: {sorted(own)}"
        if not self.has_adapter:
            return self.model
        self.model.merge_adapter()
        self._is_merged = True
        return self.model.get_base_model()


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
