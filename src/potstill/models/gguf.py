"""Convert a GGUF file once, into a model folder in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from potstill.models.explained import readable_errors
from potstill.models.files import check_gguf
from potstill.models.quantized import import_quietly
from potstill.models.weights import open_checkpoint


def cache_folder() -> Path:
    """Return the folder of converted models: ``$POTSTILL_CACHE``, else ``~/.cache/potstill``."""
    return Path(os.environ.get("POTSTILL_CACHE") or Path.home() / ".cache" / "potstill")


def converted(gguf: Path) -> Path:
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

    import_quietly("transformers.modeling_utils")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with readable_errors(gguf):
        check_gguf(gguf)
        place = {"gguf_file": gguf.name}
        opened = open_checkpoint(gguf.parent, source=gguf, dtype=torch.float32, **place)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
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
