"""Open a model that is too large for one card on several."""

from __future__ import annotations

from typing import Any, cast

import torch

from potstill.errors import ModelError
from potstill.models import ModelOpener
from potstill.models.quantized import saved_method
from potstill.protocols import CausalLM, Tokenizer


def open_over_cards(source: str, opener: ModelOpener) -> tuple[CausalLM, Tokenizer]:
    """Open a model on the machine's cards: on the first one if it fits, else on as many as needed.

    Raises: as `potstill.load_model`; ModelError if the cards have too little memory.
    """
    if opener.device not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return opener.model_and_tokenizer(source)
    from accelerate import dispatch_model
    from accelerate.utils import get_max_memory

    cards = {k: v for k, v in get_max_memory().items() if k != "cpu"}
    if opener.quantize or saved_method(opener.config(source)):
        # Quantized for a CPU, the weights may not be moved to a card.
        return opener.model_and_tokenizer(source, max_memory=cards)
    on_cpu = ModelOpener(**{**vars(opener), "device": "cpu"})
    model, tokenizer = on_cpu.model_and_tokenizer(source)
    placed = device_map(model, cards)
    return cast(CausalLM, dispatch_model(model, placed)), tokenizer


def device_map(model: Any, max_memory: dict[Any, int]) -> dict[str, Any]:
    """Return the card of each module. Raises: ModelError if the cards have too little memory."""
    from accelerate import infer_auto_device_map

    blocks = getattr(model, "_no_split_modules", None)
    placed: dict[str, Any] = infer_auto_device_map(
        model, {**max_memory, "cpu": 0, "disk": 2**60}, list(blocks or ())
    )
    if "disk" in placed.values():
        need = sum(one.numel() * one.element_size() for one in model.parameters())
        raise ModelError(
            f"{model.config.name_or_path}: {need / 2**30:.1f} GiB of weights do not fit the cards' "
            f"{sum(max_memory.values()) / 2**30:.1f} GiB; use --precision bf16, more cards, or "
            "--device cpu"
        )
    return placed
