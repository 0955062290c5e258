"""One capture teaches three students: same tokenizer, another vocabulary, and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CHATML, conversations, sentencepiece_tokenizer, tiny_model, toy_tokenizer
from potstill.models import ModelOpener
from potstill.shards import checksum
from potstill.teachers import CapturedTeacher, capture_conversations
from potstill.training import DistillationConfig, DistillationTrainer

STUDENTS = ["same", "another vocabulary", "lora"]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("captured")
    tiny_model(layers=4).save_pretrained(place / "teacher")
    toy_tokenizer().save_pretrained(place / "teacher")
    capture_conversations(
        str(place / "teacher"),
        conversations(24),
        place / "capture",
        max_length=512,
        opener=ModelOpener(device="cpu", dtype="float32"),
        progress=False,
    )
    return place / "capture"


def student_of(kind: str) -> tuple[Any, Any, str]:
    """Return a student, its tokenizer and the method."""
    if kind == "another vocabulary":
        tokenizer = sentencepiece_tokenizer(chat_template=CHATML)
        return tiny_model(layers=2, seed=1, rows=len(tokenizer)), tokenizer, "cross"
    student = tiny_model(layers=2, seed=1)
    if kind == "lora":
        import peft

        torch.manual_seed(3)
        chosen = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        student = peft.get_peft_model(student, chosen)
    return student, toy_tokenizer(), "logits"


def trained(kind: str, teacher: Any, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of six steps, and the weights after them."""
    student, tokenizer, method = student_of(kind)
    settings = DistillationConfig(
        str(folder),
        method=method,
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    one = DistillationTrainer(
        student,
        teacher,
        settings,
        train_dataset=conversations(24),
        processing_class=tokenizer,
        teacher_tokenizer=toy_tokenizer(),
    )
    one.train()
    losses = [row["loss"] for row in one.state.log_history if "loss" in row]
    return losses, {name: value.detach() for name, value in student.named_parameters()}


@pytest.mark.parametrize("kind", STUDENTS)
def test_it_learns_from_the_capture_what_it_learns_from_the_live_teacher(
    captured: Path, tmp_path: Path, kind: str
) -> None:
    before = {path: checksum(path) for path in captured.rglob("*.*") if path.is_file()}
    losses, weights = trained(kind, CapturedTeacher(captured), tmp_path / "stored")
    expected, others = trained(kind, tiny_model(layers=4), tmp_path / "live")
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-2, atol=1e-4)
    assert before == {path: checksum(path) for path in captured.rglob("*.*") if path.is_file()}
