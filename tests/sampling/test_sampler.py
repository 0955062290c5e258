from __future__ import annotations

from typing import Any

import pytest
import torch

from potstill.errors import ConfigError
from potstill.sampling.sampler import Sampling, sample_tokens, uniforms


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> dict[int, float]:
    """By hand: add the most likely tokens one by one until top_p is reached."""
    probabilities = torch.softmax(logits.double() / temperature, -1).tolist()
    kept: dict[int, float] = {}
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = probabilities[token]
    return {token: share / sum(kept.values()) for token, share in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.95), (2.0, 0.3), (0.5, 0.999)]
)
@pytest.mark.parametrize("vocabulary", [3, 300])
def test_token_frequencies_are_the_probabilities_of_the_nucleus(
    temperature: float, top_p: float, vocabulary: int
) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    expected = nucleus(logits, temperature, top_p)
    count = 20_000
    uniform = (
        torch.arange(count, dtype=torch.float64) + 0.5
    ) / count  # every uniform number once: deterministic
    tokens = sample_tokens(logits.expand(count, -1), uniform, temperature=temperature, top_p=top_p)
    seen = torch.bincount(tokens, minlength=vocabulary) / count
    assert seen.tolist() == pytest.approx(
        [expected.get(token, 0.0) for token in range(vocabulary)], abs=2 / count + 1e-6
    )


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert sample_tokens(
        torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.99]), temperature=0, top_p=0.9
    ).tolist() == [1]


def test_a_token_of_probability_zero_is_never_taken() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for number in (0.0, 0.5, 1 - 2**-53):
        uniform = torch.tensor([number], dtype=torch.float64)
        assert sample_tokens(logits, uniform, temperature=1.0, top_p=1.0).tolist() == [1]
        assert sample_tokens(logits, uniform, temperature=1.0, top_p=0.9).tolist() == [1]


def test_uniform_numbers_depend_on_the_seed_alone() -> None:
    assert torch.equal(uniforms(2**47 + 5, 9), uniforms(2**47 + 5, 9))
    assert not torch.equal(uniforms(1, 9), uniforms(2, 9))
    assert torch.equal(uniforms(1, 9)[:3], uniforms(1, 3))


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"samples": 0},
        {"samples": 2, "temperature": 0},
    ],
)
def test_invalid_settings_are_an_error(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**setting)
