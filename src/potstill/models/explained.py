"""Turn the exceptions of transformers and the hub into one-line errors."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from potstill.errors import ModelError, ModelNotFound, PotstillError, UnsafeWeights

Source = str | os.PathLike[str]
UNREACHABLE = ("connect", "offline", "couldn't find", "not a valid model identifier", "resolve")
REFUSED = r"\b40[13] (client error|unauthorized|forbidden)"


class readable_errors(contextlib.AbstractContextManager[None]):
    """Turn the exceptions of transformers and the hub into one-line errors of ours."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        is_full = type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, Exception) and not isinstance(error, PotstillError) and not is_full:
            raise explained(self.source, error) from error


def explained(source: Source, error: BaseException) -> ModelError:
    text = " ".join(str(error).split())
    lowered = text.lower()
    kind: type[ModelError] = ModelNotFound
    if isinstance(error, PermissionError):
        found = f"{error.filename}: not readable ({error.strerror}); change its permissions"
    elif "gated" in lowered or re.search(
        r"\b40[13] (client error|unauthorized|forbidden)", lowered
    ):
        found = "a gated model; accept its terms on the hub and log in with `hf auth login`"
    elif "trust_remote_code" in lowered:
        kind = UnsafeWeights
        found = "needs to run code of its own; read it, then pass --trust-remote-code"
    elif (
        "safetensors" in lowered and "pytorch_model.bin" in lowered
    ) or "no file named model.safetensors" in lowered:
        kind = UnsafeWeights
        found = "no safetensors there, and pickled weights are not opened; convert the model first"
    elif "unrecognized model in" in lowered and Path(source).is_dir():
        found = "no config.json there that names its model type; give a model folder or a hub id"
    elif "backend tokenizer" in lowered or "can't load tokenizer" in lowered:
        found = "no tokenizer there (tokenizer.json or tokenizer.model); copy its files there"
    elif any(words in lowered for words in UNREACHABLE):
        found = "not on this disk, and not available from the hub (no network, or no such model); "
        found += "check the name, or give a folder or a .gguf file"
    else:
        return ModelError(f"{source}: cannot be opened as a causal language model: {text[:300]}")
    return kind(f"{source}: {found}")
