"""Each method's loss on whole batches, as in a trainer."""

from __future__ import annotations

import itertools
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
from potstill.data import BatchLayout, PairLayout
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


def varlen_attention(module: Any, query: Any, key: Any, value: Any, _: Any, **given: Any) -> Any:
    """Attend within each conversation, whose bounds must be given, as a varlen kernel does."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds, longest = given["cu_seq_lens_q"].tolist(), given["max_length_q"]
    assert bounds == given["cu_seq_lens_k"].tolist()
    assert longest == given["max_length_k"] == max(b - a for a, b in itertools.pairwise(bounds))
    assert (bounds[-1], given["cu_seq_lens_q"].dtype) == (query.shape[2], torch.int32)
    scaling = given.get("scaling")
    parts = [
        sdpa_attention_forward(
            module, *(x[:, :, a:b] for x in (query, key, value)), None, scaling=scaling
        )[0]
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=1), None


@pytest.mark.parametrize("method", ["logits", "cross"])
def test_a_varlen_kernel_is_given_the_bounds_of_the_conversations(
    tmp_path: Path, method: str
) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("flash_varlen", varlen_attention)
    AttentionMaskInterface.register("flash_varlen", lambda *_, **__: None)
    losses = []
    for attention in ("sdpa", "flash_varlen"):
        teacher, student = tiny_model(), tiny_model(layers=2, seed=1)
        one = trainer(tmp_path, student, teacher=teacher, method=method)
        if attention != "sdpa":
            # The probe runs without bounds for padding, which such a kernel does not need.
            for model in (teacher, student):
                model.config._attn_implementation = attention
            layout = BatchLayout(265, one_line=True, bounds=True)
            one.objective.layout = PairLayout(layout, layout) if method == "cross" else layout
        dataset, _ = one.objective.encode(conversations(5), max_length=128)
        batch = one.objective.layout([dataset[i] for i in range(5)])
        assert ("cu_seq_lens" in batch) == (attention != "sdpa")
        with torch.no_grad():
            losses.append(one.objective.summed_loss(student, batch))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_a_forward_that_takes_no_further_arguments_gets_no_bounds(tmp_path: Path) -> None:
    teacher = with_flash_attention(tiny_model())
    assert trainer(tmp_path, teacher=teacher, method="logits").objective.layout.bounds
    forward = type(teacher).forward

    class Bare(type(teacher)):  # type: ignore[misc]
        def forward(self, input_ids: Any, position_ids: Any = None, use_cache: bool = False) -> Any:
            return forward(self, input_ids, position_ids=position_ids, use_cache=use_cache)

    teacher.__class__ = Bare
    layout = trainer(tmp_path, teacher=teacher, method="logits").objective.layout
    assert layout.one_line
    assert not layout.bounds
