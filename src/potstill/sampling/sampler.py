"""How answers are sampled, and the sampler itself: one uniform number a token, drawn by the answer's own seed.

B rows of a batch, V vocabulary. Since nothing but an answer's seed decides its random numbers, its company in a batch and an
interrupted run's history do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.errors import ConfigError

LIKELY_TOKENS = 64
"""How many tokens are sorted at first: nearly every nucleus is smaller, and sorting 32 × 49 152 takes longer than the model."""


@dataclass(frozen=True)
class Sampling:
    """What decides an answer beside its prompt and its teacher. Raises: ConfigError for a value that does not make sense."""

    max_new_tokens: int = 256
    """An answer that reaches it is cut off, and says so."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that together have this probability; 1 among all."""
    samples: int = 1
    """Answers to each prompt."""
    system: str | None = None
    """A system prompt, put before each prompt that has none."""
    seed: int = 0
    """Another seed, other answers."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature {self.temperature}: must be 0 or above; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}: a probability, so above 0 and at most 1; 1 samples among all tokens")
        for name in ("max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(f"{self.samples} samples at temperature 0 would all be the same; raise --temperature")


def uniforms(seed: int, count: int) -> Tensor:
    """``count`` numbers in [0, 1), float64, which are the seed's alone."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_tokens(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """One token a row, ``[B]``, from ``logits [B, V]`` in float32 and one number in [0, 1) a row, ``uniform [B]``.

    The token is where the cumulative distribution over the nucleus passes ``uniform``. The nucleus is the smallest set of likeliest
    tokens that together reach ``top_p`` of softmax(logits / temperature), renormalised. Temperature 0 takes the likeliest token.

    >>> sample_tokens(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.9]), temperature=1.0, top_p=0.6)
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if probabilities.device.type == "mps":  # which has no float64
        probabilities = probabilities.cpu()
    if top_p == 1:
        reached = probabilities.cumsum(-1, dtype=torch.float64)
        return _place(reached, uniform, reached[:, -1:]).squeeze(-1).to(logits.device)
    likely, tokens = _likeliest(probabilities, top_p)
    reached = likely.cumsum(-1, dtype=torch.float64)
    # A token stands in the nucleus if those before it do not reach top_p: at least one always does.
    mass = (reached * (reached - likely < top_p)).amax(-1, keepdim=True)
    return tokens.gather(-1, _place(reached, uniform, mass)).squeeze(-1).to(logits.device)


def _likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Enough of the likeliest tokens to reach ``top_p`` in every row, likeliest first: probabilities and ids, each ``[B, k]``."""
    count = min(LIKELY_TOKENS, probabilities.shape[-1])
    likely, tokens = probabilities.topk(count)
    while count < probabilities.shape[-1] and float(likely.sum(-1).min()) < top_p:
        count = min(8 * count, probabilities.shape[-1])
        likely, tokens = probabilities.topk(count)
    return likely, tokens


def _place(reached: Tensor, uniform: Tensor, mass: Tensor) -> Tensor:
    """The first place in each row where ``reached [B, k]`` passes ``uniform [B]`` × ``mass [B, 1]``: ``[B, 1]``."""
    sought = uniform.to(reached.device)[:, None] * mass
    return torch.searchsorted(reached, sought, right=True).clamp_(max=reached.shape[-1] - 1)
