"""Turn the exceptions of transformers and the hub into one-line errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from potstill.errors import ModelError, ModelNotFound, PotstillError, UnsafeWeights
from potstill.models.files import is_json_object

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
    elif damaged := _damaged_file(source):
        found = f"{damaged} is damaged; copy or download it again"
    elif "padding_idx" in lowered:
        found = "the pad_token_id of config.json is not below its vocab_size; use the config.json "
        found += "of these weights"
    elif "backend tokenizer" in lowered or "can't load tokenizer" in lowered:
        found = "no tokenizer there (tokenizer.json or tokenizer.model); copy its files there"
    elif not Path(source).exists() and any(words in lowered for words in UNREACHABLE):
        found = "not on this disk, and not available from the hub (no network, or no such model); "
        found += "check the name, or give a folder or a .gguf file"
    else:
        return ModelError(f"{source}: cannot be opened as a causal language model: {text[:300]}")
    return kind(f"{source}: {found}")


def _damaged_file(source: Source) -> str | None:
    """Return the name of a text file in the folder that is the reason, because it is unreadable."""
    folder = Path(source).expanduser()
    for path in sorted(folder.glob("*.json")):
        if not is_json_object(path):
            return path.name
    for path in sorted(folder.glob("*.jinja")):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return path.name
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file() and "model" not in json.loads(tokenizer.read_bytes()):
        return tokenizer.name
    return None
