"""Which of a teacher's layers would be missed least?

Layers are left out one after another, each time the one without which the model stays nearest to the whole model on some text. A
student that starts there is much nearer its teacher than one of evenly spaced layers: of SmolLM2-135M's 30 layers the best 15 are
3.1 nats a token from the whole, others that look as reasonable 6.6.

Source: Song et al. 2024 (SLEB), arXiv 2402.09025, section 3, with the divergence from the whole model in place of perplexity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from potstill.data import BatchLayout, tokenize_conversations
from potstill.data.conversations import Conversation
from potstill.errors import ConfigError
from potstill.models.heads import hidden_states,  supervised, trainable_head
from potstill.losses import fused_linear_divergence
from potstill.students.layers import layer_list

CONVERSATIONS = 12


@torch.no_grad()
def least_missed_layers(
    model: Any, tokenizer: Any, conversations: Iterable[Conversation], keep: int, *, max_length: int = 512
) -> list[int]:
    """The numbers of ``keep`` layers, in order. The first 12 conversations decide; their answers' tokens are looked at.

    Takes about (layers² − keep²) / 2 forward passes. Raises: ConfigError for a count out of range; DataError without answers.
    """
    layers: Any = model.get_submodule(layer_list(model)[0])
    if not 1 <= keep <= len(layers):
        raise ConfigError(f"keep-layers {keep}: the teacher has {len(layers)} layers; keep between 1 and {len(layers)}")
    rows, _ = tokenize_conversations(_first(conversations), tokenizer, max_length=max_length)
    batch = BatchLayout(tokenizer.pad_token_id or 0, packed=False)([rows[i] for i in range(len(rows))])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    head = trainable_head(model)
    outputs: list[Any] = []
    with layers[0].register_forward_hook(lambda _, __, output: outputs.append(output)):
        whole, observed = supervised(hidden_states(model, batch), labels)
    in_tuple = isinstance(outputs[0], tuple)

    def distance(absent: set[int]) -> Tensor:
        with _without(layers, absent, in_tuple):
            hidden, _ = supervised(hidden_states(model, batch), labels)
        return fused_linear_divergence(hidden, head, whole, head, labels=observed)

    absent: set[int] = set()
    for _ in tqdm(range(len(layers) - keep), desc="  choosing layers", unit="layer"):
        candidates = [i for i in range(len(layers)) if i not in absent]
        absent.add(min(candidates, key=lambda i: float(distance(absent | {i}))))
    return [i for i in range(len(layers)) if i not in absent]


@contextlib.contextmanager
def _without(layers: nn.ModuleList, absent: set[int], in_tuple: bool) -> Iterator[None]:
    """While it lasts, what comes into an absent layer goes out of it unchanged."""

    def pass_by(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if in_tuple else hidden_states

    for i in absent:
        layers[i].forward = pass_by
    try:
        yield
    finally:
        for i in absent:
            del layers[i].forward


def _first(conversations: Iterable[Conversation]) -> list[Conversation]:
    return [conversation for conversation, _ in zip(conversations, range(CONVERSATIONS), strict=False)]
