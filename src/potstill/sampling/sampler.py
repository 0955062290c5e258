"""Sample tokens: settings, and a sampler that uses one uniform number per token.

B rows of a batch, V vocabulary. An answer's random numbers depend on its seed alone, not on the
other answers in its batch or on an interruption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.errors import ConfigError

LIKELY_TOKENS = 64
"""Number of tokens to sort first: few nuclei are larger, and sorting all of V is slow."""


@dataclass(frozen=True)
class Sampling:
    """Hold the settings that, with prompt and teacher, decide an answer. Raises: ConfigError."""

    max_new_tokens: int = 256
    """Maximum number of tokens in an answer."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 0.95
    """Sample among the most likely tokens with this total probability; 1 uses all."""
    samples: int = 1
    """Number of answers to each prompt."""
    system: str | None = None
    """System prompt for the prompts that have none."""
    seed: int = 0
    """A different seed gives different answers."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            need = "must be 0 or above; 0 takes the most likely token"
            raise ConfigError(f"temperature {self.temperature}: {need}")
        if not 0 < self.top_p <= 1:
            need = "must be above 0 and at most 1; 1 samples among all tokens"
            raise ConfigError(f"top_p {self.top_p}: {need}")
        for name in ("max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            found = f"{self.samples} samples at temperature 0 would all be the same"
            raise ConfigError(f"{found}; raise --temperature")


def uniforms(seed: int, count: int) -> Tensor:
    """Return ``count`` numbers in [0, 1), float64, that depend on the seed alone."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_tokens(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Return one token per row ``[B]`` for ``logits [B, V]`` in float32.

    ``uniform [B]`` has one number in [0, 1) per row; the token is the first at which the cumulative
    distribution over the nucleus exceeds it. The nucleus is the smallest set of most likely tokens
    that reaches ``top_p`` of softmax(logits / temperature), renormalized. Temperature 0 takes the
    argmax.

    >>> logits, uniform = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.9])
    >>> sample_tokens(logits, uniform, temperature=1.0, top_p=0.6)
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if probabilities.device.type == "mps":  # MPS has no float64
        probabilities = probabilities.cpu()
    if top_p == 1:
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        return _index(cumulative, uniform, cumulative[:, -1:]).squeeze(-1).to(logits.device)
    likely, tokens = _most_likely(probabilities, top_p)
    cumulative = likely.cumsum(-1, dtype=torch.float64)
    # A token is in the nucleus if those before it do not reach top_p: the first always is.
    mass = (cumulative * (cumulative - likely < top_p)).amax(-1, keepdim=True)
    return tokens.gather(-1, _index(cumulative, uniform, mass)).squeeze(-1).to(logits.device)


def _most_likely(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return probabilities and ids ``[B, k]``, sorted, that reach ``top_p`` in every row."""
    count = min(LIKELY_TOKENS, probabilities.shape[-1])
    likely, tokens = probabilities.topk(count)
    while count < probabilities.shape[-1] and float(likely.sum(-1).min()) < top_p:
        count = min(8 * count, probabilities.shape[-1])
        likely, tokens = probabilities.topk(count)
    return likely, tokens


def _index(cumulative: Tensor, uniform: Tensor, mass: Tensor) -> Tensor:
    """Return the first index ``[B, 1]`` where ``cumulative`` exceeds ``uniform`` × ``mass``."""
    threshold = uniform.to(cumulative.device)[:, None] * mass
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.clamp_(max=cumulative.shape[-1] - 1)
