from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import conversations, tiny_model, toy_tokenizer
from potstill.errors import ConfigError, ModelError, NonFiniteLoss, VocabularyMismatch
from potstill.losses import DIVERGENCES
from potstill.training import DistillationConfig, DistillationTrainer, MetricsFile


def trainer(
    folder: Path, student: Any = None, *, teacher: Any = None, rows: Any = None, **settings: Any
) -> DistillationTrainer:
    settings = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **settings,
    }
    settings.setdefault("save_strategy", "no")
    return DistillationTrainer(
        student or tiny_model(layers=2, seed=1),
        teacher or tiny_model(layers=4),
        DistillationConfig(str(folder), logging_steps=1, **settings),
        train_dataset=rows or conversations(24),
        processing_class=toy_tokenizer(),
        teacher_tokenizer=toy_tokenizer(),
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def losses(one: DistillationTrainer) -> list[float]:
    return [row["loss"] for row in one.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "settings",
    [{"method": "text"}, {"method": "logits", "hard_label_weight": 0.3}],
    ids=["text", "mixed"],
)
def test_training_lowers_the_loss(tmp_path: Path, settings: dict[str, Any]) -> None:
    one = trainer(tmp_path, max_steps=12, **settings)
    one.train()
    assert losses(one)[-1] < 0.8 * losses(one)[0]


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_the_loss_is_the_divergence_of_dense_logits_averaged_over_supervised_tokens(
    tmp_path: Path, divergence: str
) -> None:
    student, teacher = tiny_model(layers=2, seed=1), tiny_model(layers=4)
    one = trainer(tmp_path, student, teacher=teacher, divergence=divergence, temperature=1.7)
    batch = next(iter(one.get_train_dataloader()))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    chosen = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        dense = [
            model(**inputs, use_cache=False).logits[:, :-1][chosen][:, : one.objective.rows]
            for model in (teacher, student)
        ]
        expected = DIVERGENCES[divergence](*dense, temperature=1.7).mean()
        actual = one.compute_loss(student.train(), batch, num_items_in_batch=chosen.sum())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_student_equal_to_its_teacher_has_loss_zero(tmp_path: Path) -> None:
    one = trainer(tmp_path, tiny_model(layers=4), teacher=tiny_model(layers=4))
    before = weights(one.model)
    one.args.weight_decay = 0.0
    one.train()
    assert max(losses(one)) < 1e-5
    assert all(
        torch.allclose(before[name], tensor, atol=1e-2)
        for name, tensor in one.model.state_dict().items()
    )


def test_four_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    """Conversations differ in length, so a mean of the micro-batches' means would differ."""
    results = []
    for size, steps in ((8, 1), (2, 4)):
        one = trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
        )
        one.train()
        results.append((losses(one), weights(one.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-3, atol=2e-4)


def test_a_resumed_run_has_the_same_bits_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", save_strategy="steps", save_steps=3, max_steps=6)
    whole.train()
    resumed = trainer(tmp_path / "b", max_steps=6, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert all(
        torch.equal(tensor, resumed.model.state_dict()[name])
        for name, tensor in weights(whole.model).items()
    )


def test_a_resumed_runs_metrics_continue_after_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for resume in (None, str(tmp_path / "a" / "checkpoint-2")):
        one = trainer(tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=4)
        one.add_callback(MetricsFile(file, one))
        one.train(resume_from_checkpoint=resume)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == sorted(row["tokens"] for row in rows)
    assert rows[-1]["seconds"] > rows[1]["seconds"] > 0


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    student = tiny_model(layers=2)
    with torch.no_grad():
        student.lm_head.weight[5] = float("nan")
    before = weights(student)
    with pytest.raises(NonFiniteLoss, match="logits of the student .*NaN or infinite in float32"):
        trainer(tmp_path, student).train()
    assert all(
        torch.equal(t, before[n]) or t.isnan().any() for n, t in student.state_dict().items()
    )


def test_evaluation_loss_is_a_mean_over_tokens_whatever_the_batches(tmp_path: Path) -> None:
    results = []
    for size in (1, 5):
        one = trainer(tmp_path, per_device_eval_batch_size=size)
        results.append(one.evaluate(one.train_dataset)["eval_loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_heads_of_one_family_with_padded_rows_are_cut_to_the_shared_tokens(tmp_path: Path) -> None:
    one = trainer(tmp_path, tiny_model(layers=2, rows=270), teacher=tiny_model(rows=320))
    assert one.objective.rows == len(toy_tokenizer()) == 266
    one.train()
    assert losses(one)[-1] < losses(one)[0]


def test_different_tokenizers_are_refused_by_the_first_token_that_differs(tmp_path: Path) -> None:
    other = toy_tokenizer()
    other.convert_ids_to_tokens = lambda ids: [
        f"t{i}" if i == 7 else toy_tokenizer().convert_ids_to_tokens(i) for i in ids
    ]
    with pytest.raises(VocabularyMismatch, match="id 7 is .* use --method cross or --method text"):
        DistillationTrainer(
            tiny_model(),
            tiny_model(),
            DistillationConfig(str(tmp_path), use_cpu=True),
            processing_class=toy_tokenizer(),
            teacher_tokenizer=other,
        )


@pytest.mark.parametrize(
    "trick", [{"gradient_checkpointing": True}, {"bf16": True}, {"packed": False}]
)
def test_the_trainers_own_features_keep_working(tmp_path: Path, trick: dict[str, Any]) -> None:
    plain, tricked = trainer(tmp_path, max_steps=2), trainer(tmp_path, max_steps=2, **trick)
    plain.train()
    tricked.train()
    assert losses(tricked) == pytest.approx(losses(plain), rel=2e-2)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_lora_student_learns_and_its_base_stays(tmp_path: Path, modules: list[str]) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model(layers=2, seed=1)
    original = copy.deepcopy(base.lm_head.weight)
    student = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
    )
    one = trainer(tmp_path, student, max_steps=12, learning_rate=5e-2)
    one.train()
    assert losses(one)[-1] < losses(one)[0]
    assert torch.equal(student.get_base_model().get_output_embeddings().weight, original)
    adapters = {name: p for name, p in student.named_parameters() if "lora_B" in name}
    assert all(p.abs().sum() > 0 for p in adapters.values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "osmosis"}, "text, logits"),
        ({"divergence": "kl"}, "forward_kl"),
        ({"temperature": 0.0}, "above 0"),
        ({"hard_label_weight": 1.5}, "between 0 and 1"),
        ({"skew": 1.0}, "between 0 and 1"),
    ],
)
def test_invalid_settings_are_an_error(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DistillationConfig(str(tmp_path), use_cpu=True, **settings)


def test_mixed_precision_reaches_the_loss(tmp_path: Path) -> None:
    """Regression: accelerate wraps only the model's forward; the head ran in float32."""
    for bf16 in (True, False):
        with trainer(tmp_path, bf16=bf16).compute_loss_context_manager():
            assert torch.is_autocast_enabled("cpu") == bf16


def test_several_evaluation_sets_and_conversations_given_late_are_evaluated(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    pair = one.model, one.objective.teacher.model  # type: ignore[union-attr]
    two = DistillationTrainer(
        *pair,
        one.args,
        conversations(8),
        {"some": conversations(8), "more": conversations(12)},
        toy_tokenizer(),
        teacher_tokenizer=toy_tokenizer(),
    )
    found = two.evaluate()
    assert {"eval_some_loss", "eval_more_loss"} <= found.keys()
    assert one.evaluate(conversations(8))["eval_loss"] == pytest.approx(found["eval_some_loss"])
    assert one.evaluate(iter(conversations(8)))["eval_loss"] == pytest.approx(
        found["eval_some_loss"]
    )
    assert one.evaluate([*two.eval_dataset["some"]])["eval_loss"] == pytest.approx(
        found["eval_some_loss"]
    )  # tokenized rows


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_peft_trains_whole_is_the_one_that_learns(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model(layers=2, seed=1, tied=False)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    student = peft.get_peft_model(base, settings)
    before = weights(student)
    one = trainer(tmp_path, student)
    one.train()
    changed = {
        name for name, tensor in weights(student).items() if not torch.equal(tensor, before[name])
    }
    assert any("lm_head.modules_to_save" in name for name in changed)
    assert not any("original_module" in name for name in changed)


@pytest.mark.filterwarnings("ignore")
def test_a_dora_head_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM"
    )
    student = peft.get_peft_model(tiny_model(layers=2, seed=1, tied=False), settings)
    with pytest.raises(ModelError, match="DoRA"):
        trainer(tmp_path, student).train()
