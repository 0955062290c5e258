"""Choose how attention is computed, by the name of an implementation in transformers."""

from __future__ import annotations

import copy
from typing import Any

from potstill.errors import ConfigError
from potstill.models.explained import Source


def attention_of(source: Source, config: Any, attention: str | None) -> dict[str, str]:
    """Return the argument of `from_pretrained` for ``attention``; empty for None.

    Raises: ConfigError if the model cannot be computed with it here.
    """
    if attention is None:
        return {}
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # without weights
            AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ConfigError(
            f"attention {attention}: {source} cannot be computed with it here ({reason[:300]}); "
            "install its package, or leave out --attention"
        ) from error
    return {"attn_implementation": attention}
