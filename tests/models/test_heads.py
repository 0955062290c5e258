from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from potstill.losses import Projection
from potstill.models.heads import hidden_states, output_head

INPUTS = {"input_ids": torch.arange(24).reshape(2, 12)}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_hidden_states_and_head_together_give_the_models_logits(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        hidden = hidden_states(model, INPUTS)
        logits = torch.cat(
            [z.clone() for _, z in Projection(hidden.flatten(0, 1), output_head(model)).blocks()]
        )
        torch.testing.assert_close(
            logits.view(2, 12, -1), model(**INPUTS).logits, rtol=1e-4, atol=1e-5
        )


def test_the_heads_forward_is_restored_even_after_an_error() -> None:
    model = tiny_model()
    with pytest.raises(Exception):  # noqa: B017, PT011
        hidden_states(model, {"input_ids": torch.tensor([[10**6]])})
    assert model(**INPUTS).logits.shape == (2, 12, 272)
    model.lm_head.forward = lambda hidden: hidden * 0
    hidden_states(model, INPUTS)
    assert model(**INPUTS).logits.abs().sum() == 0


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_compiled_once() -> None:
    model = tiny_model()
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(
                hidden_states(compiled, INPUTS), hidden_states(model, INPUTS)
            )
        frames = counter.frame_count
        hidden_states(compiled, INPUTS)
    assert counter.frame_count == frames
