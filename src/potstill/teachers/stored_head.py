"""Store a teacher's LM head and tokenizer in a folder, for captures and servers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.errors import ModelError
from potstill.losses import CallableHead, Head
from potstill.models.heads import output_head
from potstill.models.logits_check import check_logits
from potstill.models.quantized import quantization_of, stored_tensors
from potstill.protocols import CausalLM, Tokenizer
from potstill.run_folder import whole_folder
from potstill.shards import checksum

SAMPLE = "The rain in Spain stays mainly in the plain."
HEAD, TOKENIZER = "head.safetensors", "tokenizer"


def store_head(
    folder: Path, model: CausalLM, tokenizer: Tokenizer, name: str, **more: Tensor
) -> dict[str, Any]:
    """Write the head and the tokenizer of ``model``; return what a manifest says about them.

    ``more`` are further tensors of the head's file. Raises: ModelError for a quantized head;
    SelfCheckFailed for a model whose logits are not its head's.
    """
    head = output_head(model)
    if isinstance(head, CallableHead):
        raise ModelError(
            f"{name}: its LM head is quantized and cannot be stored; use a model whose head has "
            "floating-point weights"
        )
    checked: Any = model
    check_logits("teacher", checked, tokenizer.encode(SAMPLE), model.device)
    with whole_folder(folder / TOKENIZER) as unfinished:
        tokenizer.save_pretrained(unfinished)
    tensors = {"weight": head.weight.detach().cpu().contiguous(), **more}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu()
    unfinished_head = folder / ".head.unfinished"
    save_file(tensors, unfinished_head)
    unfinished_head.replace(folder / HEAD)
    return {
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_hash(model),
        "quantization": quantization_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "hidden_size": head.weight.shape[1],
        "head": {
            "rows": len(head),
            "scale": head.scale,
            "softcap": head.softcap,
            "sha256": checksum(folder / HEAD),
        },
    }


def read_head(folder: Path, facts: dict[str, Any], *, again: str) -> tuple[Head, dict[str, Tensor]]:
    """Return the head, and all tensors of its file. ``again`` says how to make the file again.

    Raises: ModelError if the file is missing or damaged.
    """
    file = folder / HEAD
    if not file.is_file() or checksum(file) != facts["sha256"]:
        raise ModelError(f"{file}: damaged or missing; {again}")
    tensors = load_file(file)
    head = Head(tensors["weight"], tensors.get("bias"), facts["scale"], facts["softcap"])
    return head, tensors


def weights_hash(model: CausalLM) -> str:
    """Return 16 digits that identify the weights, from a few values of each tensor."""
    digest = hashlib.sha256()
    # Quantized weights consist of several tensors, some of which are no parameters.
    named: Any = model.named_parameters() if quantization_of(model) is None else None
    for name, tensor in named or stored_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().flatten()
        step = max(1, len(values) // 64)
        digest.update(values[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
