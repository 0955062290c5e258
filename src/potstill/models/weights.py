"""Open a checkpoint, and refuse one that transformers would complete with random weights.

transformers initializes missing weights at random and skips weights that it does not know, with a
warning. For distillation both are errors: the teacher or the student would be another model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
import sys
from collections.abc import Collection, Iterator
from typing import Any

from potstill.errors import ModelError
from potstill.models.explained import Source
from potstill.models.quantized import import_quietly, is_quantized

NAMED = 3
"""Weights that an error names."""
SAMPLING_SETTINGS = (
    *("temperature", "top_p", "top_k", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
)
BEAM_SETTINGS = ("early_stopping", "length_penalty")
OUTPUT_SETTINGS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def open_checkpoint(location: Source, *, source: Source, **opening: Any) -> Any:
    """Open a causal language model with `from_pretrained`; ``source`` is its name in errors.

    It is opened whole, also under DeepSpeed's ZeRO 3, which would shard every model that is opened
    after its configuration was read, teachers included. The Trainer shards the student.

    Raises: ModelError if weights are missing, have another shape, or belong to another
    architecture.
    """
    import_quietly("transformers.modeling_utils")
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    with _captured_reports() as reports:
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                location,
                **opening,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused here, by name
                output_loading_info=True,
            )
        except RuntimeError as error:
            report = "\n".join(reports)
            failed = re.findall(r"^(.+?) *\|.*CONVERSION", report, re.MULTILINE)
            if not failed:
                raise
            reason = re.search(r"^\w+Error: .*$", report, re.MULTILINE)
            if reason and "quantization_config" in opening:
                raise RuntimeError(reason.group()) from error
            found = f"weights are missing or damaged, so {_listed(failed)} cannot be made of them"
            raise ModelError(f"{source}: {found}; get the whole checkpoint") from error
    _refuse_misfit(source, model, **loading)
    note_untied(model)
    _leave_out_router_loss(source, model.config.get_text_config())
    mend_generation_config(source, model.generation_config)
    return model


def refuse_infinite(source: Source, model: Any) -> None:
    """Raises: ModelError if a weight is NaN or infinite, or the embedding is all zeros."""
    name = infinite_weight(model)
    if name:
        dtype = str(model.get_parameter(name).dtype).removeprefix("torch.")
        raise ModelError(
            f"{source}: the weight {name} is NaN or infinite in {dtype}; open it in bfloat16 "
            "or float32 if it was saved in one of them, else get an undamaged copy"
        )
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    if embedding is not None and not embedding.is_meta and not embedding.any():
        raise ModelError(f"{source}: its embedding is all zeros; get an undamaged copy")


def infinite_weight(model: Any) -> str | None:
    """Return the name of a weight that is NaN or infinite. A bias of −∞ removes a token: no."""
    import torch

    for name, weight in model.named_parameters():
        if is_quantized(weight):
            continue
        if weight.is_meta or not weight.numel():
            continue
        low, high = map(float, torch.aminmax(weight.detach()))  # one pass, which keeps NaN
        is_lower_bounded = math.isfinite(low) or (weight.dim() == 1 and low == -math.inf)
        if not (math.isfinite(high) and is_lower_bounded):
            return str(name)
    return None


def mend_generation_config(source: Source, config: Any) -> None:
    """Remove settings without effect, if transformers would refuse to save the config with them.

    Raises: ModelError if it would still refuse.
    """
    if config is None or _savable(config) is None:
        return
    without_effect: list[str] = []
    if config.do_sample is not True:
        without_effect += SAMPLING_SETTINGS
    if config.num_beams in (None, 1):
        without_effect += BEAM_SETTINGS
    if not config.return_dict_in_generate:
        without_effect += OUTPUT_SETTINGS
    if config.use_cache is False:
        without_effect.append("cache_implementation")
    if (config.pad_token_id or 0) < 0:
        without_effect.append("pad_token_id")
    for name in without_effect:
        setattr(config, name, None)
    reason = _savable(config)
    if reason:
        found = f"transformers cannot save its generation config ({reason})"
        raise ModelError(f"{source}: {found}; correct its generation_config.json")


def _savable(config: Any) -> str | None:
    """Return why transformers would refuse to save a generation config, None if it would not."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())[:200]
    return None


def _refuse_misfit(
    source: Source,
    model: Any,
    missing_keys: Collection[str],
    unexpected_keys: Collection[str],
    mismatched_keys: Collection[tuple[str, Any, Any]],
    **_: Any,
) -> None:
    """Raises: ModelError for a checkpoint that is not of exactly this model."""
    name, quantizer = type(model).__name__, getattr(model, "hf_quantizer", None)
    saved_quantized = quantizer is not None and quantizer.pre_quantized
    # Quantized weights are buffers. Other buffers are computed from the configuration.
    buffers = set() if saved_quantized else {buffer for buffer, _ in model.named_buffers()}
    missing = sorted(set(missing_keys) - buffers)
    unused = sorted(key for key in unexpected_keys if _is_inside(model, key))
    prefix = _wrapper_prefix(missing, unexpected_keys)
    if prefix:
        found = f"its weights are saved with the prefix {prefix!r} of a wrapper"
        raise ModelError(f"{source}: {found}; save them again from the model inside of the wrapper")
    if mismatched_keys:
        key, saved, needed = min(mismatched_keys, key=lambda one: one[0])
        found = f"{key} has the shape {list(saved)}, and config.json needs {list(needed)}"
        raise ModelError(f"{source}: {found}; use the config.json of these weights")
    if missing:
        found = f"no weights for {_listed(missing)}, which {name} needs"
        need = "get the whole checkpoint, or the config.json of these weights"
        if missing == ["lm_head.weight"]:
            need = "get the whole checkpoint; if the embedding is the head, set tie_word_embeddings"
        raise ModelError(f"{source}: {found}; {need}")
    if unused and not saved_quantized:
        found = f"{name} does not use its weights {_listed(unused)}"
        raise ModelError(f"{source}: {found}; use the config.json of these weights")


def _is_inside(model: Any, key: str) -> bool:
    """Return whether a weight belongs to a part of the model, such as a layer or the head.

    Other parts (a vision tower, a value head, layers for multi-token prediction) can be left out.
    """
    parts = key.split(".")
    modules = {name for name, _ in model.named_modules()}
    known = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
    return next((name for name in known if name in modules), "") not in (
        "",
        model.base_model_prefix,
    )


def _wrapper_prefix(missing: list[str], unexpected: Collection[str]) -> str | None:
    """Return the prefix under which all missing weights were saved, if there is one."""
    if not missing:
        return None
    ends = (key for key in unexpected if key.endswith(f".{missing[0]}"))
    prefixes = (key.removesuffix(missing[0]) for key in ends)
    saved = set(unexpected)
    return next((one for one in prefixes if all(f"{one}{key}" in saved for key in missing)), None)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def note_untied(model: Any) -> None:
    """Correct the configuration of a model whose saved embedding and head differ.

    transformers does not tie them then. A model that is made from the configuration must not
    either, or its embedding is overwritten by its head.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [getattr(module, "weight", None) for module in (head, embedding)]
    if weights[0] is not None and weights[0] is not weights[1]:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _leave_out_router_loss(source: Source, config: Any) -> None:
    """Switch off the loss that balances a mixture's experts: no loss of distillation uses it.

    With it on, transformers cannot generate with a cache and a padded batch.
    """
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
        _note_router_loss(str(source))


@functools.cache
def _note_router_loss(source: str) -> None:
    print(
        f"note: {source}: output_router_logits is switched off; the loss that balances the "
        "experts is not part of distillation, whose loss is the distance to the teacher alone",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _captured_reports() -> Iterator[list[str]]:
    """Keep transformers from logging what is refused here with one line."""
    reports: list[str] = []

    def is_no_report(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not any(words in text for words in ("LOAD REPORT", "specifies to tie")):
            return True
        reports.append(text)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_report)
    try:
        yield reports
    finally:
        logger.removeFilter(is_no_report)
