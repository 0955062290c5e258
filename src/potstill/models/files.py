"""Check the files of a model before they are opened: whole, real, and of one kind."""

from __future__ import annotations

import json
from pathlib import Path

from potstill.errors import ModelError, ModelNotFound, UnsafeWeights

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_FOUND = "a Git LFS pointer, not the file itself; run git lfs pull there"


def check_folder(folder: Path) -> None:
    """Check that a folder has a configuration and whole weights, or an adapter and its weights.

    Raises: ModelNotFound, UnsafeWeights, ModelError.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not (is_adapter or (folder / "config.json").is_file()):
        need = "a Hugging Face model folder, a .gguf file or a hub id is needed"
        raise ModelNotFound(f"{folder}: no config.json there; {need}")
    check_settings(folder)
    weights = sorted(folder.glob("*.safetensors"))
    whole = [path for path in weights if path.name != ADAPTER_WEIGHTS]
    if is_adapter and whole:
        found = f"both an adapter ({ADAPTER_CONFIG}) and a whole model ({whole[0].name})"
        raise ModelError(f"{folder}: {found}; move one of them to another folder")
    if weights and bool(whole) != is_adapter:
        _check_shards(folder)
        for path in weights:
            _check_safetensors(path)
        return
    pickled = sorted(path for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
    if pickled:
        raise UnsafeWeights(
            f"{folder}: only pickled weights ({pickled[0].name}), which can run code when opened; "
            "open the folder with transformers where you trust it and call save_pretrained"
        )
    beside = ADAPTER_CONFIG if is_adapter else "config.json"
    raise ModelNotFound(f"{folder}: no .safetensors file beside {beside}; copy the weights there")


def check_settings(folder: Path) -> None:
    """Raises: ModelError if a file is a Git LFS pointer, or a configuration not a JSON object."""
    for pattern in ("*.safetensors", "*.json", "*.model"):
        for path in sorted(folder.glob(pattern)):
            refuse_pointer(path)
    # transformers goes on without a generation config that it cannot read.
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and not is_json_object(folder / name):
            raise ModelError(f"{folder / name}: not a JSON object; copy or download it again")


def is_json_object(path: Path) -> bool:
    """Return whether a file holds a JSON object."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def refuse_pointer(path: Path) -> None:
    """Raises: ModelError if a file is a Git LFS pointer, ModelNotFound if it cannot be read."""
    try:
        is_pointer = is_lfs_pointer(path)
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        raise ModelNotFound(f"{path}: {found}; check its permissions and links") from error
    if is_pointer:
        raise ModelError(f"{path}: {POINTER_FOUND}")


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is what Git LFS writes in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def check_gguf(path: Path) -> None:
    """Raises: ModelError if a GGUF file is a Git LFS pointer, another format, or cut off."""
    refuse_pointer(path)
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except Exception as error:  # numpy's, by where the file ends
        reason = " ".join(str(error).split())[:120]
        found = f"not a whole GGUF file ({reason})"
        raise ModelError(f"{path}: {found}; copy or download it again") from error
    if not tensors:
        raise ModelError(f"{path}: a GGUF file without weights; give the one with the model")


def _check_shards(folder: Path) -> None:
    """Check that every file that the index names is there."""
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"damaged ({type(error).__name__})"
        raise ModelError(f"{index}: {found}; copy or download it again") from error
    if WHOLE not in named and (folder / WHOLE).is_file():
        found = f"two checkpoints, {WHOLE} and the {len(named)} files of {INDEX}"
        raise ModelError(f"{folder}: {found}; move one of them to another folder")
    absent = [name for name in named if not (folder / name).is_file()]
    if absent:
        found = f"{len(absent)} of the {len(named)} files of {INDEX} are missing ({absent[0]})"
        raise ModelError(f"{folder}: {found}; copy or download them")


def _check_safetensors(path: Path) -> None:
    """Check that the file is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return
    except SafetensorError as error:
        found = f"damaged or cut off ({' '.join(str(error).split())[:120]})"
        raise ModelError(f"{path}: {found}; copy or download it again") from error
