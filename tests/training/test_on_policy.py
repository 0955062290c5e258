"""On-policy training: which batches, whose text, which loss, and what a kill leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import conversations, tiny_model, toy_tokenizer
from potstill.data.prompt_rows import prompt_length
from potstill.errors import CollapsedRollouts, ConfigError, DataError, RunFolderError
from potstill.sampling import RefilledSampler
from potstill.teachers import KeptTeacher, LocalTeacher, LossSettings
from potstill.training import DistillationConfig, DistillationTrainer
from potstill.training.on_policy import OBJECTIVE
from training.test_objectives import across
from training.test_trainer import trainer, weights

SETTINGS: dict[str, Any] = {
    "on_policy": 0.5,
    "rollout_size": 8,
    "rollout_reuse": 2,
    "rollout_tokens": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
}


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "rollouts").glob("*"))


def logged(one: DistillationTrainer, name: str) -> list[float]:
    return [row[name] for row in one.state.log_history if name in row]


def train_recording(one: DistillationTrainer) -> list[dict[str, Any]]:
    """Train, and return every micro-batch."""
    seen: list[dict[str, Any]] = []
    original = one.summed_loss

    def recorded(model: Any, inputs: Any) -> Any:
        if model.training:
            seen.append(dict(inputs))
        return original(model, inputs)

    one.summed_loss = recorded  # type: ignore[method-assign]
    one.train()
    return seen


def supervised_text(batch: dict[str, Any]) -> set[tuple[int, ...]]:
    labels = batch["labels"]
    return {tuple(row[row != -100].tolist()) for row in labels}


def test_at_share_zero_nothing_changes(tmp_path: Path) -> None:
    """Bit for bit, whatever the other settings."""
    plain = trainer(tmp_path / "a", max_steps=3)
    plain.train()
    off = trainer(tmp_path / "b", max_steps=3, rollout_tokens=6, on_policy_divergence="forward_kl")
    off.train()
    assert off.on_policy is None
    assert not rounds(tmp_path / "b")
    for name, tensor in weights(plain.model).items():
        assert torch.equal(tensor, off.model.state_dict()[name])


def test_half_of_the_micro_batches_are_the_students_text(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=12, packed=False, **SETTINGS)
    seen = train_recording(one)
    own = [OBJECTIVE in batch for batch in seen]
    assert own == [False, True] * 6
    # 8 answers in batches of 4, twice: 4 micro-batches a round.
    assert rounds(tmp_path) == ["round-00001-rank-0.safetensors"]
    assert len(logged(one, "rollout_ended")) == 2
    first = [supervised_text(batch) for batch in seen if OBJECTIVE in batch][:4]
    assert first[0] | first[1] == first[2] | first[3]  # the second pass, in another order
    data = set().union(*(supervised_text(batch) for batch in seen if OBJECTIVE not in batch))
    assert not data & (first[0] | first[1])


def test_rollouts_begin_after_a_share_of_the_run(tmp_path: Path) -> None:
    one = trainer(
        tmp_path,
        max_steps=4,
        on_policy_from=0.5,
        gradient_accumulation_steps=2,
        **{**SETTINGS, "on_policy": 1.0, "per_device_train_batch_size": 2},
    )
    assert [OBJECTIVE in batch for batch in train_recording(one)] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_on_a_fixed_text_the_loss_is_the_off_policy_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, divergence: str
) -> None:
    rows = conversations(8)
    off = trainer(tmp_path / "a", rows=rows, divergence=divergence)
    answers, last = {}, []
    for row in off.train_dataset:
        start = prompt_length(row["labels"])
        stop = 1 + max(i for i, label in enumerate(row["labels"]) if label != -100)
        answers[tuple(row["input_ids"][:start])] = row["input_ids"][start:stop]
        # Of several answers the student writes only the last again.
        labels = [-100] * start + row["labels"][start:]
        last.append({"input_ids": row["input_ids"], "labels": labels})

    def sample(self: Any, prompts: Any, seeds: Any, *, longest: int) -> Any:
        from potstill.sampling import SampledRow

        made = [SampledRow(prompt, 0, 1) for prompt in prompts]
        for row in made:
            row.tokens = list(answers[tuple(row.prompt)])
        return made

    monkeypatch.setattr(RefilledSampler, "sample", sample)
    on = trainer(
        tmp_path / "b",
        rows=rows,
        on_policy=1.0,
        on_policy_divergence=divergence,
        rollout_size=8,
        per_device_train_batch_size=8,
    )
    own = next(batch for batch in train_recording(on) if OBJECTIVE in batch)
    batch = off.objective.layout(last)
    student = tiny_model(layers=2, seed=7)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    assert tokens == int((own["labels"][:, 1:] != -100).sum())
    expected = off.summed_loss(student, batch)
    actual = on.summed_loss(student, own)
    torch.testing.assert_close(actual / tokens, expected / tokens, rtol=1e-6, atol=1e-6)


def test_the_expected_gradient_is_that_of_all_texts_enumerated() -> None:
    """E over the student's texts of Σ_t KL(p_t ‖ q_t), with the visited states held fixed."""
    from potstill.data import BatchLayout
    from potstill.training.objectives import LogitsObjective
    from potstill.training.rollout_rows import SameTokens

    vocabulary, end, horizon, prompt = 5, 4, 3, [1, 2]
    student, teacher = (tiny_model(layers=1, seed=seed).double() for seed in (1, 2))
    with torch.no_grad():
        for one in (student, teacher):
            one.lm_head.weight.mul_(20)
    texts: list[list[int]] = [[]]
    for _ in range(horizon):
        texts = [
            longer
            for text in texts
            for longer in ([text] if text[-1:] == [end] else [[*text, i] for i in range(5)])
        ]
    source = {"input_ids": [*prompt, 3], "labels": [-100, -100, 3]}
    rows = [SameTokens(vocabulary).row(source, y, ended=y[-1] == end) for y in texts]
    layout = BatchLayout(0, packed=False)
    own = LocalTeacher(teacher)
    kept = KeptTeacher.of(own, [layout([row]) for row in rows], torch.device("cpu"))
    objective = LogitsObjective(
        toy_tokenizer(), layout, kept, vocabulary, LossSettings(divergence="reverse_kl")
    )
    probability = []
    expected = torch.zeros((), dtype=torch.float64)
    for text in texts:
        ids = torch.tensor([[*prompt, *text]])
        chosen = slice(len(prompt) - 1, -1)
        p = student(ids).logits[0, chosen, :vocabulary].log_softmax(-1)
        q = teacher(ids).logits[0, chosen, :vocabulary].log_softmax(-1)
        likelihood = p.gather(-1, torch.tensor(text)[:, None]).sum().exp().detach()
        probability.append(float(likelihood))
        expected = expected + likelihood * (p.exp() * (p - q)).sum()
    assert sum(probability) == pytest.approx(1)
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    actual = sum(
        weight * objective.summed_loss(student, layout([row]))
        for weight, row in zip(probability, rows, strict=True)
    )
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(actual, list(student.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_training_on_its_own_text_brings_a_student_nearer_to_the_teacher(tmp_path: Path) -> None:
    one = trainer(
        tmp_path,
        max_steps=30,
        on_policy=1.0,
        rollout_size=16,
        rollout_tokens=8,
        per_device_train_batch_size=8,
    )
    one.train()
    losses = logged(one, "loss")
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


@pytest.mark.parametrize("step", [1, 3, 4, 6, 7])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(
    tmp_path: Path, step: int, share: float
) -> None:
    settings = {**SETTINGS, "on_policy": share, "max_steps": 9, "gradient_accumulation_steps": 2}
    settings["per_device_train_batch_size"] = 2
    whole = trainer(tmp_path / "a", **settings)
    whole.train()
    killed = trainer(tmp_path / "b", save_strategy="steps", save_steps=step, **settings)
    killed.train()
    last = tmp_path / "b" / f"checkpoint-{step}"
    for other in (tmp_path / "b").glob("checkpoint-*"):
        if other != last:
            other.rename(tmp_path / other.name)
    resumed = trainer(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(last))
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert logged(whole, "rollout_entropy") == logged(resumed, "rollout_entropy")


def test_a_run_without_its_rollouts_is_not_continued(tmp_path: Path) -> None:
    settings = {**SETTINGS, "on_policy": 1.0, "max_steps": 6}
    trainer(tmp_path, save_strategy="steps", save_steps=2, **settings).train()
    (path,) = (tmp_path / "rollouts").glob("round-00000*")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunFolderError, match="missing or damaged"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_run_is_not_continued_with_another_teacher(tmp_path: Path) -> None:
    settings = {**SETTINGS, "on_policy": 1.0, "max_steps": 6}
    trainer(tmp_path, save_strategy="steps", save_steps=2, **settings).train()
    other = trainer(tmp_path, teacher=tiny_model(layers=4, seed=9), **settings)
    with pytest.raises(RunFolderError, match="the teacher with which the run began"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_looping_answers_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(tmp_path, max_steps=4, **{**SETTINGS, "rollout_tokens": 40})
    assert one.on_policy is not None
    with torch.no_grad():
        one.model.lm_head.weight.zero_()
        one.model.lm_head.weight[5] = 0
    monkeypatch.setattr(
        "potstill.sampling.refilled.sample_tokens",
        lambda logits, *_, **__: torch.full((len(logits),), 5),
    )
    with pytest.raises(CollapsedRollouts, match=r"repeat earlier ones.*--on-policy-from") as found:
        one.train()
    assert "\n" not in str(found.value)


def test_logits_rows_end_before_an_id_that_the_teacher_lacks(tmp_path: Path) -> None:
    one = trainer(tmp_path, tiny_model(layers=2, rows=300), max_steps=2, **SETTINGS)
    assert one.on_policy is not None
    row = one.train_dataset[0]
    made = one.on_policy.rows.row(row, [5, 6, 299, 7], ended=False)
    assert made is not None
    assert made["labels"][-3:] == [-100, 5, 6]
    assert one.on_policy.rows.row(row, [299], ended=False) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"on_policy": 1.5}, "between 0"),
        ({"on_policy": -0.1}, "between 0"),
        ({"on_policy": 0.5, "method": "text"}, "no teacher corrects"),
        ({"on_policy": 0.5, "rollout_reuse": 0}, "at least 1"),
        ({"on_policy": 0.5, "rollout_size": 6}, "multiple of the batch size"),
        ({"on_policy": 0.5, "on_policy_from": 1.0}, "share of the run"),
        ({"on_policy": 0.5, "rollout_temperature": -1.0}, "0 or above"),
        ({"on_policy_divergence": "no"}, "on_policy_divergence 'no' is not known"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        trainer(tmp_path, **settings)


def test_data_without_prompts_or_without_room(tmp_path: Path) -> None:
    text = [{"text": "in the rain"} for _ in range(8)]
    with pytest.raises(DataError, match="has a prompt"):
        trainer(tmp_path, rows=text, **SETTINGS)
    few = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        for _ in range(4)
    ]
    one = trainer(tmp_path, rows=few, **SETTINGS)
    short = max(len(row["input_ids"]) for row in one.train_dataset) - 3
    rows = [{**row, "labels": row["input_ids"]} for row in one.train_dataset]
    for row in rows:
        row["labels"] = [-100] * (short + 1) + row["labels"][short + 1 :]
    with pytest.raises(DataError, match="leave no room"):
        trainer(tmp_path, rows=rows, max_length=short, **SETTINGS)


def test_a_student_that_cannot_end_is_refused(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]} for _ in range(8)]
    student = tiny_model(layers=2)
    student.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="cannot end an answer"):
        DistillationTrainer(
            student,
            tiny_model(),
            DistillationConfig(str(tmp_path), on_policy=1.0, use_cpu=True, report_to=[]),
            train_dataset=rows,
            processing_class=tokenizer,
            teacher_tokenizer=toy_tokenizer(),
        )


def test_a_teacher_that_ends_answers_with_another_token_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for template, noted in ((None, True), (toy_tokenizer().chat_template, False)):
        own = toy_tokenizer(chat_template=template)
        own.eos_token = "<|im_start|>"
        teacher = LocalTeacher(tiny_model(), tokenizer=own)
        trainer(tmp_path, teacher=teacher, **SETTINGS)
        assert ("it will not be taught to stop" in capsys.readouterr().out) == noted


def test_a_capture_cannot_read_new_text(tmp_path: Path) -> None:
    teacher = LocalTeacher(tiny_model())
    teacher.reads_new_text = False  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="give the teacher itself or the address"):
        trainer(tmp_path, teacher=teacher, **SETTINGS)


def test_lora_students_write_with_their_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = peft.get_peft_model(tiny_model(layers=2, seed=1), config)
    one = trainer(tmp_path, student, max_steps=2, **SETTINGS)
    assert one.on_policy is not None
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1)
        copy = one.on_policy.copy.refreshed(student, torch.device("cpu"))
        torch.testing.assert_close(copy(ids).logits, student(ids).logits, rtol=1e-5, atol=1e-5)
    one.train()


def test_across_tokenizers_the_student_keeps_its_ids_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    one = across(
        tmp_path,
        max_steps=20,
        packed=False,
        learning_rate=1e-2,
        on_policy=1.0,
        rollout_size=16,
        rollout_tokens=12,
        per_device_train_batch_size=8,
    )
    sampled: list[list[int]] = []
    original = RefilledSampler.sample

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = original(self, *args, **kwargs)
        sampled.extend(row.tokens for row in rows)
        return rows

    monkeypatch.setattr(RefilledSampler, "sample", sample)
    seen = train_recording(one)
    assert one.on_policy is not None
    for batch in seen[:2]:
        for tokens in supervised_text(batch):
            # Places without a target are left out.
            assert any(set(tokens) <= set(ids) for ids in sampled)
    losses = logged(one, "loss")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_across_tokenizers_the_teacher_reads_the_bytes_that_the_student_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    one = across(tmp_path, on_policy=1.0, rollout_size=8)
    assert one.on_policy is not None
    rows, tokenizer, source = one.on_policy.rows, one.processing_class, one.train_dataset[1]
    teacher = toy_tokenizer()
    end = tokenizer.eos_token_id
    for text in ("the rain", "é on, wet", "in"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        made = rows.row(source, [*ids, end], ended=True)
        assert made["input_ids"][-len(ids) - 1 :] == [*ids, end]
        theirs = [token for token in made["teacher_labels"] if token != -100]
        assert teacher.decode(theirs) == f"{text}<|im_end|>"
        assert made["labels"][-1] == end  # the teacher says whether to stop
        places = zip(made["labels"], made["teacher_index"], strict=True)
        assert all((label == -100) == (index == -1) for label, index in places)
    broken = [*tokenizer("in", add_special_tokens=False)["input_ids"], 3 + 0xC3, end]
    made = rows.row(source, broken, ended=True)
    assert made["input_ids"][-2:] != broken[-2:]  # cut before half a character
    assert rows.row(source, [3 + 0xC3], ended=False) is None


def test_across_tokenizers_only_alignments_of_distributions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="alignment uld: not possible"):
        across(tmp_path, alignment="uld", on_policy=0.5)
