"""Kept states: the teacher's, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny_model
from potstill.data import BatchLayout
from potstill.teachers import KeptTeacher, LocalTeacher, LossSettings


def rows() -> list[dict[str, Any]]:
    made = []
    for length in (3, 5, 9, 4):
        ids = list(range(length, 2 * length))
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


@pytest.mark.parametrize("packed", [True, False])
def test_states_are_found_in_batches_of_another_order_and_size(packed: bool) -> None:
    teacher, layout = LocalTeacher(tiny_model()), BatchLayout(0, packed=packed)
    batches = [layout(rows()[:1]), layout(rows()[1:])]
    kept = KeptTeacher.of(teacher, batches, torch.device("cpu"))
    batch = layout(rows()[::-1][:3])
    expected, actual = teacher.targets(batch), kept.targets(batch)
    torch.testing.assert_close(actual.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    student = torch.randn(len(actual.hidden), 32)
    labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    head: Any = LocalTeacher(tiny_model(seed=3)).targets(batch).head
    losses = [
        one.summed_loss(student, head, labels, LossSettings(divergence="jensen_shannon"))
        for one in (expected, actual)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_a_conversation_that_is_not_kept_is_an_error() -> None:
    layout = BatchLayout(0)
    kept = KeptTeacher.of(LocalTeacher(tiny_model()), [layout(rows()[:1])], torch.device("cpu"))
    with pytest.raises(KeyError):
        kept.targets(layout(rows()[1:2]))
