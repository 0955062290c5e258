"""Each method's loss on whole batches, as in a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.toys import sentencepiece
from conftest import (
    conversations,
    random_model,
    tiny_model,
    toy_tokenizer,
    with_flash_attention,
)
from potstill.training import DistillationConfig, DistillationTrainer
from potstill.training.cross_objective import ALIGNMENTS, OVER_CELLS


def trainer(folder: Path, student: Any = None, **settings: Any) -> DistillationTrainer:
    tokenizer = settings.pop("tokenizer", None) or toy_tokenizer()
    teacher = settings.pop("teacher", None) or tiny_model(layers=4)
    common = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return DistillationTrainer(
        student or tiny_model(layers=2, seed=1),
        teacher,
        DistillationConfig(str(folder), **common, **settings),
        train_dataset=conversations(24),
        processing_class=tokenizer,
        teacher_tokenizer=toy_tokenizer(),
    )  # fmt: skip


def across(folder: Path, **settings: Any) -> DistillationTrainer:
    """A student whose tokens are SentencePiece's."""
    tokenizer = sentencepiece(prepend="first")
    return trainer(
        folder,
        tiny_model(layers=2, rows=len(tokenizer), seed=1),
        tokenizer=tokenizer,
        method="cross",
        **settings,
    )


def loss_of(one: DistillationTrainer) -> torch.Tensor:
    batch = next(iter(one.get_train_dataloader()))
    with torch.no_grad():
        return one.summed_loss(one.model.eval(), batch)


@pytest.mark.parametrize("packed", [True, False])
def test_cross_with_one_tokenizer_is_logit_distillation(
    tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Special tokens and padded rows are in no cell, and have almost no probability here."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    results = []
    for method in ("logits", "cross"):
        student = tiny_model(layers=2, seed=1)
        with torch.no_grad():
            student.lm_head.weight[:200] *= 100
        results.append(loss_of(trainer(tmp_path, student, method=method, packed=packed)))
    torch.testing.assert_close(*results, rtol=0.01, atol=0)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_cross_lowers_its_loss_whatever_the_students_tokens(
    tmp_path: Path, alignment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    one = across(tmp_path, alignment=alignment, max_steps=12, learning_rate=1e-2)
    one.train()
    losses = [row["loss"] for row in one.state.log_history if "loss" in row]
    assert losses[-1] < (0.9 if alignment == "uld" else 0.8) * losses[0]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("alignment", OVER_CELLS)
def test_over_cells_any_divergence_is_finite_and_learns(
    tmp_path: Path, alignment: str, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    one = across(
        tmp_path, alignment=alignment, divergence=divergence, max_steps=12, learning_rate=1e-2
    )
    one.train()
    losses = [row["loss"] for row in one.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_every_alignment_gives_the_same_loss_packed_padded_and_in_two_batches(
    tmp_path: Path, alignment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    results = []
    for packed, sizes in ((True, (8,)), (False, (8,)), (True, (3, 5))):
        one = across(tmp_path, alignment=alignment, packed=packed)
        rows = iter(one.train_dataset)
        batches = [one.objective.layout([next(rows) for _ in range(size)]) for size in sizes]
        with torch.no_grad():
            results.append(sum(one.summed_loss(one.model.eval(), batch) for batch in batches))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["text", "logits", "cross"])
def test_the_loss_is_the_same_packed_and_padded(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    results = [loss_of(trainer(tmp_path, method=method, packed=packed)) for packed in (True, False)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["logits", "text"])
def test_rows_are_packed_only_for_models_that_separate_conversations(
    tmp_path: Path, method: str
) -> None:
    """Regression: OPT, BLOOM and gpt-oss read the conversation before, without an error."""
    leaking = random_model("opt", ffn_dim=64, word_embed_proj_dim=32)
    for student, teacher, packed in (
        (tiny_model(layers=2, seed=1), tiny_model(), True),
        (leaking, tiny_model(), False),
        (tiny_model(layers=2, seed=1), leaking, method == "text"),
    ):
        one = trainer(tmp_path, student, teacher=teacher, method=method)
        assert one.objective.layout.packed == packed
        assert not one.objective.layout.masked


def test_one_model_of_two_with_variable_length_attention_uses_one_line(tmp_path: Path) -> None:
    """Regression: the layout of a flash-attention teacher was decided by its student."""
    teacher = with_flash_attention(tiny_model())
    assert trainer(tmp_path, teacher=teacher, method="logits").objective.layout.one_line
    assert not trainer(tmp_path, teacher=teacher, method="text").objective.layout.one_line
