from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from conftest import conversations, toy_tokenizer
from potstill.data import tokenize_conversations
from potstill.errors import DataError
from potstill.students.families import sizes_of
from potstill.students.importance import choose_parts, measure_importance
from potstill.students.layerwise import Calibration, first_inputs, layers_of, run_layer
from potstill.students.refit import _Moments, _ridge, refit
from potstill.students.search import cut_student
from potstill.students.states import TeacherStates
from students.narrow_models import FAMILIES, narrow_model


def calibration(count: int = 12) -> Calibration:
    encoded, _ = tokenize_conversations(conversations(count), toy_tokenizer())
    return Calibration.of(list(encoded), 265, least=1, size=4)


def final_states(model: Any, text: Calibration) -> torch.Tensor:
    """The hidden states behind the last layer at every token."""
    found = []
    with torch.no_grad():
        for batch, mask in zip(text.batches, text.masks, strict=True):
            hidden, arguments = first_inputs(model, batch)
            for layer, one in zip(layers_of(model), arguments, strict=True):
                hidden = run_layer(layer, hidden, one)
            found.append(hidden[mask])
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_one_by_one_give_what_the_model_gives(family: str) -> None:
    model, text = narrow_model(family), calibration(4)
    by_model = []
    norm = model.get_submodule(next(
        name for name, _ in model.named_modules()
        if name in ("model.norm", "model.final_layernorm", "transformer.ln_f")
    ))  # fmt: skip
    with (
        torch.no_grad(),
        norm.register_forward_pre_hook(lambda _, inputs: by_model.append(inputs[0])),
    ):
        for batch in text.batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = torch.cat([one[mask] for one, mask in zip(by_model, text.masks, strict=True)])
    torch.testing.assert_close(final_states(model, text), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_moves_a_cut_student_towards_its_teacher(family: str) -> None:
    teacher, text = narrow_model(family), calibration()
    whole = sizes_of(teacher.config)
    change = {"layers": 2} if whole.experts else {"layers": 2, "neurons": whole.neurons // 2}
    with TeacherStates(teacher, text) as states:
        importance = measure_importance(teacher, text, states)
        cut = choose_parts(teacher, importance, dataclasses.replace(whole, **change))
        student = cut_student(teacher, cut)
        before = final_states(student, text)
        refit(student, teacher, cut, text, states)
    wanted, after = final_states(teacher, text), final_states(student, text)
    assert (after - wanted).square().mean() < 0.9 * (before - wanted).square().mean()


@pytest.mark.parametrize("family", [one for one in FAMILIES if "moe" not in one])
def test_a_student_with_fewer_channels_is_refitted_at_its_inputs_too(family: str) -> None:
    teacher, text = narrow_model(family), calibration()
    whole = sizes_of(teacher.config)
    change = {"hidden": 16, "groups": 2} if family == "gpt2" else {"hidden": 24}
    with TeacherStates(teacher, text) as states:
        importance = measure_importance(teacher, text, states)
        cut = choose_parts(teacher, importance, dataclasses.replace(whole, **change))
        student = cut_student(teacher, cut)
        old = {name: weight.clone() for name, weight in student.named_parameters()}
        before = final_states(student, text)
        refit(student, teacher, cut, text, states)
    wanted = final_states(teacher, text)[:, cut.kept.hidden]
    after = final_states(student, text)
    assert (after - wanted).square().mean() < (before - wanted).square().mean()
    changed = {
        name for name, weight in student.named_parameters() if not torch.equal(weight, old[name])
    }
    inputs = ("q_proj", "qkv_proj", "c_attn", "up_proj", "fc1", "c_fc")
    assert any(part in name for name in changed for part in inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_of_a_whole_model_changes_its_logits_by_rounding_only(family: str) -> None:
    teacher, text = narrow_model(family), calibration(6)
    with TeacherStates(teacher, text) as states:
        importance = measure_importance(teacher, text, states)
        cut = choose_parts(teacher, importance, sizes_of(teacher.config))
        student = cut_student(teacher, cut)
        refit(student, teacher, cut, text, states)
    wanted = final_states(teacher, text)
    error = (final_states(student, text) - wanted).norm() / wanted.norm()
    assert error < 0.005  # the teacher's states are stored in bfloat16


def test_the_ridge_solution_is_the_minimum_that_gradient_descent_finds() -> None:
    torch.manual_seed(0)
    inputs, residual, weights = torch.randn(40, 5), torch.randn(40, 3), torch.rand(40)
    squares = inputs.T @ (inputs * weights[:, None])
    products = inputs.T @ (residual * weights[:, None])
    found = _ridge(squares, products, 0.1)
    change = torch.zeros(5, 3, requires_grad=True)
    optimizer = torch.optim.LBFGS([change], max_iter=200, tolerance_grad=1e-9)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        errors = (weights[:, None] * (inputs @ change - residual).square()).sum()
        loss = errors + 0.1 * squares.diagonal().mean() * change.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, change.detach(), rtol=1e-3, atol=1e-4)


def test_noise_is_not_fitted() -> None:
    torch.manual_seed(0)
    noise, signal = _Moments(), _Moments()
    truth = torch.randn(30, 4)
    for _ in range(2):
        inputs = torch.randn(40, 30)
        noise.add(inputs, torch.randn(40, 4), torch.ones(40))
        signal.add(inputs, inputs @ truth, torch.ones(40))
    assert noise.solve().norm() < 0.1 * truth.norm()
    assert (signal.solve() - truth).norm() < 0.05 * truth.norm()


def test_too_little_calibration_text_is_refused() -> None:
    encoded, _ = tokenize_conversations(conversations(2), toy_tokenizer())
    with pytest.raises(DataError, match="the calibration text has 2 conversations and .* tokens"):
        Calibration.of(list(encoded), 265)
