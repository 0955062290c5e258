"""Train small additions to a model's frozen weights: LoRA, by peft.

Each linear layer W [out, in] but the LM head becomes W + (alpha / r)·B·A with trained A [r, in] and
B [out, r]. B begins at 0, so that the model begins unchanged.

Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError, ModelError


def check_lora(rank: int | None, alpha: float | None = None) -> None:
    """Raises: ConfigError for a number out of range, or if peft is not installed."""
    if rank is None:
        if alpha is not None:
            raise ConfigError(f"lora_alpha {alpha:g} without lora; give --lora RANK as well")
        return
    if rank < 1:
        raise ConfigError(f"lora {rank}: a rank, so at least 1; leave it out to train all weights")
    if alpha is not None and not alpha > 0:
        raise ConfigError(f"lora_alpha {alpha:g}: must be above 0")
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"lora {rank}: needs the package peft: pip install 'potstill[peft]'")


def with_lora(model: Any, rank: int, *, alpha: float | None = None, seed: int = 0) -> Any:
    """Return ``model`` frozen, with a LoRA adapter on every linear layer except the LM head.

    ``alpha`` is 2·``rank`` by default. The adapter is in float32; A is drawn with ``seed``.
    Raises: ModelError if the model has no linear layers that peft knows.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    name = type(model).__name__
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            found = f"peft cannot add LoRA to {name} ({str(error).splitlines()[0]})"
            raise ModelError(f"{found}; leave out --lora") from error
    # The embedding is frozen. Else peft asks the hub at every checkpoint whether it has changed.
    only_adapter = functools.partial(wrapped.save_pretrained, save_embedding_layers=False)
    wrapped.save_pretrained = only_adapter
    return wrapped


def trained_share(model: Any) -> tuple[int, int]:
    """Return the numbers of trained parameters and of all of ``model``."""
    sizes = [(one.requires_grad, one.numel()) for one in model.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Let ``model`` be its base, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(was_training)


def name_base(model: Any, source: str | Path) -> None:
    """Let the saved adapter name ``source`` as its base model; a folder by its full path."""
    path = Path(source).expanduser()
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(path.resolve() if path.exists() else source)
