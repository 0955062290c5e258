"""The example without potstill computes the loss and the gradient that potstill computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from conftest import conversations, tiny_model, toy_tokenizer
from potstill import DistillationConfig
from potstill.training import make_objective

SCRIPT = Path(__file__).parent.parent / "examples" / "distillation_from_scratch.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("from_scratch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loss_and_gradient_of_the_example_are_those_of_the_library(tmp_path: Path) -> None:
    teacher, student = tiny_model(layers=4), tiny_model(layers=2, seed=1)
    tokenizer = toy_tokenizer()
    config = DistillationConfig(str(tmp_path), packed=False, report_to=[])
    objective = make_objective(config, student, tokenizer, teacher, tokenizer)
    dataset, _ = objective.encode(conversations(6), max_length=128)
    batch = objective.layout([dataset[i] for i in range(6)])
    gradients, losses = [], []
    ids, labels = batch["input_ids"], batch["labels"]
    mask = (torch.arange(ids.shape[1]) < batch["lengths"][:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}  # the library needs no mask here
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[..., : objective.rows]
    for ours in (True, False):
        student.zero_grad()
        if ours:
            loss = objective.summed_loss(student, batch)
        else:
            student_logits = student(**inputs).logits[..., : objective.rows]
            loss = example().kl_sum(teacher_logits, student_logits, labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    assert mask.min() == 0  # some rows are padded
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_batch_of_the_example_labels_only_the_answers() -> None:
    ids, labels, mask = example().batch_of([([5, 6], [7]), ([5], [8, 9, 3])], pad=3)
    assert ids.tolist() == [[5, 6, 7, 3], [5, 8, 9, 3]]
    assert labels.tolist() == [[-100, -100, 7, -100], [-100, 8, 9, 3]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
