"""Open a LoRA adapter (peft): its base model, with the adapter's weights merged into it."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError, ModelError
from potstill.models.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from potstill.models.weights import note_untied

Shapes = dict[str, list[int]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Adapter:
    """A folder with adapter_config.json, and the base model that it names."""

    folder: Path
    base: str
    revision: str | None

    @property
    def has_tokenizer(self) -> bool:
        """Return whether a tokenizer was saved with the adapter."""
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)


def adapter_at(location: str) -> Adapter | None:
    """Return the adapter in a folder, None if there is none. Raises: ModelError."""
    folder = Path(location)
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_bytes())
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"damaged ({type(error).__name__})"
        raise ModelError(f"{file}: {found}; copy or download it again") from error
    if not base or not isinstance(base, str):
        need = "write the hub id or folder of the model that it was trained on there"
        raise ModelError(f"{file}: base_model_name_or_path is empty; {need}")
    if Path(base).expanduser().resolve() == folder.resolve():
        raise ModelError(f"{file}: names itself as the base model; name the model it was made from")
    return Adapter(folder, base, revision)


def merged(model: Any, adapter: Adapter) -> Any:
    """Return the base ``model`` with the adapter's weights merged into its own.

    Raises: ConfigError if peft is not installed; ModelError if the adapter does not fit.
    """
    if importlib.util.find_spec("peft") is None:
        need = "pip install 'potstill[peft]'"
        raise ConfigError(f"{adapter.folder}: a LoRA adapter needs the package peft: {need}")
    from peft import PeftConfig, PeftModel
    from safetensors import safe_open

    config = PeftConfig.from_pretrained(str(adapter.folder))
    if config.is_prompt_learning or config.task_type not in (None, "CAUSAL_LM"):
        found = f"an adapter of type {config.peft_type} for {config.task_type}"
        raise ModelError(f"{adapter.folder}: {found}; only LoRA of a causal model can be merged")
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    _resize(model, shapes)
    absent = [name for name in config.modules_to_save or () if not _has(shapes, name)]
    if absent:
        found = f"{ADAPTER_CONFIG} names {absent[0]}, and {ADAPTER_WEIGHTS} does not have it"
        raise ModelError(f"{adapter.folder}: {found}; get the whole adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ties, which are corrected below
        wrapped = PeftModel(model, config)
        loaded = wrapped.load_adapter(str(adapter.folder), "default", torch_device="cpu")
        unknown = (key for key in loaded.unexpected_keys if not _is_copy(key, shapes))
        unfit = [*unknown, *loaded.missing_keys]
        if unfit:  # peft skips them silently
            found = f"its weights do not fit {adapter.base} ({len(unfit)}, first {unfit[0]})"
            raise ModelError(f"{adapter.folder}: {found}; give the base model it was trained on")
        whole = wrapped.merge_and_unload(safe_merge=True)
    note_untied(whole)
    for parameter in whole.parameters():  # peft has frozen the base
        parameter.requires_grad_(parameter.is_floating_point())
    return whole


def _resize(model: Any, shapes: Shapes) -> None:
    """Give the base as many vocabulary rows as the embedding or head saved with the adapter."""
    modules = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [f".{name}.weight" for name, one in model.named_modules() if id(one) in modules]
    rows = {shape[0] for key, shape in shapes.items() if key.endswith(tuple(names))}
    if len(rows) == 1 and rows != {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _is_copy(key: str, shapes: Shapes) -> bool:
    """Return whether a weight was saved a second time under a plain name, as peft does."""
    parts = key.split(".")
    plain = ".".join(part for part in parts if part not in ("modules_to_save", "original_module"))
    return plain != key and plain in shapes


def _has(shapes: Shapes, module: str) -> bool:
    return any(f".{module}." in key for key in shapes)
