"""Open a model with quantized weights: quantize it while it is opened, or open it as it was saved.

8bit   torchao, weight-only: one scale a row of a matrix
4bit   bitsandbytes, NF4: one scale for 64 weights

Both compute in the model's dtype, from weights that are dequantized for each product: a token's
states do not depend on the other conversations of a batch. (With LLM.int8 of bitsandbytes they do,
because the columns that it keeps in 16 bits are chosen for the whole batch.) Embeddings, norms and
the LM head are not quantized.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import logging
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from potstill.errors import ConfigError, ModelError, PotstillError
from potstill.models.explained import Source

KINDS = {"8bit": "torchao", "4bit": "bitsandbytes"}
"""What --quantize-teacher takes, and the package that does it."""
BYTES_PER_WEIGHT = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
PACKAGES = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "eetq": ("eetq",),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "quanto": ("optimum.quanto",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
"""What transformers needs to open a model that was saved with a quantization."""
DISTRIBUTIONS = {"optimum.quanto": "optimum-quanto"}
NOISY = {"torchao": "transformers.integrations.torchao", "bitsandbytes": "bitsandbytes"}
"""Packages that warn when they are imported, and the module whose import does."""

_saved_methods: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def check_kind(kind: str | None) -> None:
    """Raises: ConfigError for an unknown kind, or one whose package is not installed."""
    if kind is None:
        return
    if kind not in KINDS:
        raise ConfigError(f"quantize_teacher {kind!r} is not known; use {' or '.join(KINDS)}")
    package = KINDS[kind]
    if not _is_installed(package):
        raise ConfigError(
            f"--quantize-teacher {kind} needs the package {package}: "
            "pip install 'potstill[quantize]'"
        )


def quantizing(kind: str, dtype: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize to ``kind``, a name of `KINDS`."""
    import torch

    import_quietly(NOISY[KINDS[kind]])
    if kind == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        # set_inductor_config would change the settings of torch.compile for the whole process.
        chosen: Any = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        from transformers import BitsAndBytesConfig

        chosen = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else None,
        )
    return {"quantization_config": chosen}


def refuse_unopenable(source: Source, config: Any, quantize: str | None) -> None:
    """Check, from its configuration, that a model with quantized weights can be opened here.

    Raises: ConfigError if a package is missing, or if ``quantize`` asks for a second quantization.
    """
    method = saved_method(config)
    if method is None:
        return
    if quantize is not None:
        raise ConfigError(
            f"{source}: its weights are quantized already ({method}); leave out --quantize-teacher"
        )
    absent = [name for name in PACKAGES.get(method, ()) if not _is_installed(name)]
    if absent:
        names = " ".join(DISTRIBUTIONS.get(name, name).replace("_", "-") for name in absent)
        raise ConfigError(
            f"{source}: its weights are quantized ({method}), which needs: pip install {names}"
        )
    if method in NOISY:
        import_quietly(NOISY[method])


def saved_method(config: Any) -> str | None:
    """Return the quantization with which a model was saved, such as ``fp8``; None for none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    known = found if isinstance(found, dict) else found.to_dict()
    method = known.get("quant_method") or "unknown"
    return str(getattr(method, "value", method))


def without_quantization(config: Any) -> Any:
    """Return a copy of the configuration of the same model in full precision."""
    plain = copy.deepcopy(config)
    if saved_method(config) is not None:
        del plain.quantization_config
    return plain


def note_saved_method(model: Any, method: str | None) -> None:
    """Remember that a model was saved with a quantization, for `quantization_of`."""
    if method is not None:
        _saved_methods[model] = method


def quantization_of(model: Any) -> str | None:
    """Return how the weights of an open model are quantized, with the number of bits if known."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:  # transformers opens some in full precision where kernels are missing
        method = _saved_methods.get(model)
        return None if method is None else f"{method} opened in full precision"
    config = quantizer.quantization_config
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if method == "bitsandbytes":
        return f"{method} {'8bit' if config.load_in_8bit else config.bnb_4bit_quant_type}"
    if method == "torchao":
        return f"{method} {type(config.quant_type).__name__.removesuffix('Config')}"
    details = [method, getattr(getattr(config, "quantization_config", None), "format", None)]
    bits = getattr(config, "bits", None)
    details += [f"{bits}bit" if bits else None]
    return " ".join(filter(None, details))


def refuse_unquantized(source: Source, model: Any, kind: str) -> None:
    """Raises: ModelError if no weight of the model became one of ``kind``."""
    if not any(is_quantized(weight) for weight in model.parameters()):
        other = next(name for name in KINDS if name != kind)
        raise ModelError(
            f"{source}: {KINDS[kind]} found nothing to quantize in {type(model).__name__}; "
            f"use --quantize-teacher {other}, or leave it out"
        )


def refuse_quantized_student(source: Source, student: Any) -> None:
    """Raises: ModelError if the weights of a model that is to be trained are quantized."""
    if getattr(student, "hf_quantizer", None) is not None:
        found = f"its weights are quantized ({quantization_of(student)})"
        raise ModelError(
            f"{source}: {found}, and a student is trained in full precision; give the model from "
            "which it was quantized"
        )


def refuse_uncomputable(source: Source, model: Any) -> None:
    """Run a quantized model on two tokens: some kernels fail only when they are used.

    Raises: ModelError if this machine cannot compute with it, or its logits are not finite.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            logits = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whichever kernel
        raise unable(source, quantization_of(model), device, error) from error
    if not logits.float().amax(-1).isfinite().all():
        raise ModelError(
            f"{source}: its logits are NaN or infinite with quantized weights; get an undamaged "
            "copy, or open it without a quantization"
        )


def unable(source: Source, quantization: str | None, device: Any, reason: object) -> ModelError:
    """Return the error for a quantization that this machine cannot do."""
    text = " ".join(str(reason).split())[:200] or type(reason).__name__
    return ModelError(
        f"{source}: quantized weights ({quantization}) do not work on {device} of this machine "
        f"({text}); use another quantization, another device, or full precision"
    )


@contextlib.contextmanager
def quantizing_errors(source: Source, kind: str | None, device: Any) -> Iterator[None]:
    """Turn what a package says while it quantizes to ``kind`` into one line; None does nothing."""
    import torch

    try:
        yield
    except (PotstillError, torch.OutOfMemoryError):
        raise
    except (ImportError, RuntimeError, ValueError) as error:
        if kind is None:
            raise
        raise unable(source, kind, device, error) from error


def is_quantized(weight: Any) -> bool:
    """Return whether a tensor holds quantized numbers, which are not the weights themselves."""
    library = type(weight).__module__.partition(".")[0]
    return library != "torch" or not weight.is_floating_point() or weight.dtype.itemsize < 2


def stored_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield all plain tensors of a model by name, also those of which quantized ones consist."""
    for name, tensor in model.state_dict().items():
        yield from _parts(name, tensor)


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return
    if type(tensor).__module__.partition(".")[0] == "torch" or not hasattr(
        tensor, "__tensor_flatten__"
    ):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def import_quietly(package: str) -> None:
    """Import a package without its warnings of kernels that were built for other machines."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package)
    finally:
        logging.disable(level)
