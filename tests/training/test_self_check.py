"""The check before the first step: passes for every method, detects errors, changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.toys import sentencepiece
from conftest import tiny_model, toy_tokenizer
from potstill.errors import SelfCheckFailed
from potstill.teachers import LocalTeacher
from potstill.training.cross_objective import ALIGNMENTS
from potstill.training.objectives import LogitsObjective
from potstill.training.self_check import check_objective
from training.test_objectives import trainer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))


def across(folder: Path, **settings: Any) -> Any:
    tokenizer = sentencepiece(prepend="first")
    return trainer(
        folder,
        tiny_model(layers=2, rows=len(tokenizer), seed=1),
        tokenizer=tokenizer,
        method="cross",
        **settings,
    )


def check(one: Any, objective: Any = None) -> None:
    check_objective(objective or one.objective, one.model, [one.train_dataset[i] for i in range(4)])


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("packed", [True, False])
def test_every_alignment_passes(tmp_path: Path, alignment: str, packed: bool) -> None:
    check(across(tmp_path, alignment=alignment, packed=packed))


@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"]
)
def test_every_divergence_of_a_teacher_from_itself_is_zero(tmp_path: Path, divergence: str) -> None:
    check(
        trainer(
            tmp_path, method="logits", divergence=divergence, temperature=1.5, hard_label_weight=0.3
        )
    )
    check(across(tmp_path, divergence=divergence))


@pytest.mark.parametrize("settings", [{"method": "text"}, {"method": "logits"}])
def test_half_precision_passes(tmp_path: Path, settings: dict[str, Any]) -> None:
    one = trainer(tmp_path, bf16=True, max_steps=1, **settings)
    one.train()


class _Late(LocalTeacher):
    """Its targets are one position late."""

    def targets(self, batch: dict[str, torch.Tensor]) -> Any:
        target = super().targets(batch)
        return dataclasses.replace(target, hidden=target.hidden.roll(1, 0))


class _Mean(LogitsObjective):
    def summed_loss(self, student: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().summed_loss(student, batch) / (batch["labels"] != -100).sum()


@pytest.mark.parametrize("method", ["logits", "cross"])
def test_targets_shifted_by_one_position_are_detected(tmp_path: Path, method: str) -> None:
    one = across(tmp_path) if method == "cross" else trainer(tmp_path, method="logits")
    with torch.no_grad():
        one.objective.teacher.model.lm_head.weight *= 50  # so confident that a shift matters
    late = dataclasses.replace(
        one.objective, teacher=_Late(one.objective.teacher.model, rows=one.objective.teacher.rows)
    )
    with pytest.raises(SelfCheckFailed, match="away from itself, and must be 0"):
        check(one, late)


def test_a_mean_instead_of_a_sum_is_detected(tmp_path: Path) -> None:
    one = trainer(tmp_path, method="logits")
    fields = {
        item.name: getattr(one.objective, item.name) for item in dataclasses.fields(one.objective)
    }
    with pytest.raises(SelfCheckFailed, match="their two halves"):
        check(one, _Mean(**fields))


def test_a_failed_check_stops_the_run_before_a_weight_has_changed(tmp_path: Path) -> None:
    one = trainer(tmp_path, method="logits", max_steps=3)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    fields = {
        item.name: getattr(one.objective, item.name) for item in dataclasses.fields(one.objective)
    }
    one.objective = _Mean(**fields)
    with pytest.raises(SelfCheckFailed):
        one.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.model.state_dict().items())


def test_the_check_draws_no_random_numbers_and_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    one = trainer(tmp_path, method="logits")
    one.model.train()
    state = torch.get_rng_state()
    check(one)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.model.training
    assert all(parameter.grad is None for parameter in one.model.parameters())


def test_a_run_has_the_same_bits_as_without_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for checked in (True, False):
        one = trainer(tmp_path, method="logits", max_steps=3)
        one._checked = not checked
        one.train()
        runs.append(one.model.state_dict())
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_cross_with_one_tokenizer_has_a_self_divergence(tmp_path: Path) -> None:
    one = trainer(tmp_path, method="cross", tokenizer=toy_tokenizer())
    nats = one.objective.self_divergence([one.train_dataset[i] for i in range(4)])
    assert abs(float(nats)) < 1e-3


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_unknown_operation_on_logits_is_detected(tmp_path: Path, who: str) -> None:
    one = trainer(tmp_path, method="logits")
    model = one.model if who == "student" else one.objective.teacher.model
    original = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            return dataclasses.replace(output, logits=output.logits * 0.5)

    model.__class__ = Scaled
    with pytest.raises(SelfCheckFailed, match=f"the logits of the {who}, Scaled, are"):
        check(one)
