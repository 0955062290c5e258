"""What a student writes itself, and how far it is from its teacher there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import conversations, tiny_model, toy_tokenizer
from potstill import evaluate
from potstill.data import tokenize_conversations
from potstill.evaluation.own_answers import COLUMNS, measure_own_answers
from potstill.losses import reverse_kl
from potstill.sampling import RefilledSampler
from potstill.teachers import LocalTeacher


def measured(student: Any, teacher: Any, **more: Any) -> dict[str, list[float]]:
    dataset, _ = tokenize_conversations(conversations(6), toy_tokenizer())
    settings = {"rows": 266, "tokens": 8, **more}
    return measure_own_answers(student, toy_tokenizer(), dataset, LocalTeacher(teacher), **settings)


def test_the_divergence_is_that_of_dense_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_model(layers=2, seed=1), tiny_model(layers=4)
    written: list[Any] = []
    original = RefilledSampler.sample

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        written.extend(original(self, *args, **kwargs))
        return written

    monkeypatch.setattr(RefilledSampler, "sample", sample)
    found = measured(student, teacher)
    assert tuple(found) == COLUMNS
    for i, row in enumerate(written):
        ids = torch.tensor([[*row.prompt, *row.tokens]])
        places = slice(len(row.prompt) - 1, -1)
        with torch.no_grad():
            logits = [model(ids).logits[0, places, :266] for model in (teacher, student)]
        assert found["own_kl_nats"][i] == pytest.approx(float(reverse_kl(*logits).sum()), rel=1e-4)
        assert found["own_tokens"][i] == len(row.tokens)


def test_the_teacher_as_its_own_student_is_at_zero() -> None:
    found = measured(tiny_model(), tiny_model())
    assert sum(found["own_kl_nats"]) == pytest.approx(0, abs=1e-4)
    assert sum(found["own_tokens"]) > 0


def test_only_some_prompts_are_answered_and_the_others_count_for_nothing() -> None:
    found = measured(tiny_model(layers=2), tiny_model(), most=2)
    assert found["own_answers"] == [1, 1, 0, 0, 0, 0]
    assert found["own_tokens"][2:] == [0, 0, 0, 0]


def test_a_teacher_that_cannot_read_new_text_measures_nothing() -> None:
    dataset, _ = tokenize_conversations(conversations(6), toy_tokenizer())
    teacher = LocalTeacher(tiny_model())
    teacher.reads_new_text = False  # type: ignore[attr-defined]
    student = tiny_model(layers=2)
    assert measure_own_answers(student, toy_tokenizer(), dataset, teacher, rows=266) == {}


def test_two_students_are_compared_on_their_own_answers() -> None:
    teacher = tiny_model()
    tokenizer = toy_tokenizer()
    one, other = (
        evaluate(
            student, teacher, conversations(12), tokenizer=tokenizer, teacher_tokenizer=tokenizer
        )
        for student in (teacher, tiny_model(layers=2, seed=1))
    )
    difference = one.compare(other)["own_kl_nats_per_token"]
    assert difference.certain
    assert difference.value < 0
