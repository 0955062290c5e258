from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import conversations, tiny_model, toy_tokenizer
from potstill.errors import ConfigError, DataError, ModelError
from potstill.models.heads import hidden_states, output_head, supervised
from potstill.students import search
from potstill.students.families import Sizes
from potstill.students.search import search_student
from potstill.students.sizes import Fixed, Shapes
from students.narrow_models import narrow_model

TEXT = conversations(32)


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.students.layerwise.MINIMUM_TOKENS", 50)


def test_the_best_of_all_candidates_is_returned_and_has_the_wanted_size() -> None:
    teacher = tiny_model(layers=6)
    wanted = round(0.7 * teacher.num_parameters())
    found = search_student(teacher, toy_tokenizer(), TEXT, wanted=wanted)
    assert abs(found.student.num_parameters() - wanted) <= 0.02 * wanted
    best = min(found.candidates, key=lambda one: one.kl_refitted)
    assert found.cut.sizes == best.sizes
    for one in found.candidates:
        assert abs(one.parameters - wanted) <= 0.02 * wanted
    assert len({one.sizes for one in found.candidates}) == len(found.candidates) > 3
    assert found.student.dtype == teacher.dtype


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"]
)
def test_the_reported_kl_is_that_of_the_returned_student_on_text_it_was_not_fitted_to(
    dtype: torch.dtype, close: float
) -> None:
    """In bfloat16 autocast could keep the rounded weights of before the refit."""
    teacher, tokenizer = narrow_model("llama", layers=4).to(dtype), toy_tokenizer()
    fitted: list[int] = []
    original = search.refit

    def recording(student: Any, teacher: Any, cut: Any, text: Any, *rest: Any, **more: Any) -> None:
        fitted.extend(len(batch["input_ids"]) for batch in text.batches)
        original(student, teacher, cut, text, *rest, **more)

    held_out = TEXT[::4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "refit", recording)
        found = search_student(teacher, tokenizer, TEXT, wanted=None, fixed=Fixed(neurons=20))
    assert sum(fitted) == len(TEXT) - len(held_out)
    nats, tokens = 0.0, 0
    for row in held_out:
        encoded = search.tokenize_conversations([row], tokenizer)[0][0]
        batch: Any = {name: torch.tensor([encoded[name]]) for name in ("input_ids", "labels")}
        labels = batch.pop("labels")
        logits = []
        for model in (teacher, found.student):
            with torch.no_grad():
                states, _ = supervised(hidden_states(model, batch), labels)
                head: Any = output_head(model)
                logits.append((states @ head.weight.T).double().log_softmax(-1))
        nats += float((logits[0].exp() * (logits[0] - logits[1])).sum())
        tokens += len(logits[0])
    assert found.kl_refitted == pytest.approx(nats / tokens, rel=close)
    assert found.kl_refitted != found.kl_as_cut
    assert found.held_out_tokens == tokens


def test_sizes_set_by_hand_need_no_search() -> None:
    teacher = tiny_model(layers=4)
    fixed = Fixed(layers=[0, 3], neurons=16, groups=1)
    found = search_student(teacher, toy_tokenizer(), TEXT, wanted=None, fixed=fixed)
    assert found.cut.sizes == Sizes(2, 32, 16, 1)
    assert found.cut.layers == [0, 3]
    assert found.candidates == []


def test_a_quantized_teacher_too_little_text_and_text_without_answers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, tokenizer = tiny_model(layers=4), toy_tokenizer()
    with pytest.raises(DataError, match="the calibration text has"):
        search_student(teacher, tokenizer, TEXT[:2], wanted=None, fixed=Fixed(neurons=16))
    layer = teacher.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="its weights are quantized"):
        search_student(teacher, tokenizer, TEXT, wanted=None, fixed=Fixed(neurons=16))


def test_sizes_without_a_candidate_are_refused_before_the_teacher_runs() -> None:
    teacher = tiny_model(layers=4)
    teacher.forward = None
    with pytest.raises(ConfigError, match="no student of this size"):
        search_student(teacher, toy_tokenizer(), TEXT, wanted=3000)
    assert dataclasses.is_dataclass(Fixed)
    assert Shapes(teacher.config).teacher.layers == 4


def test_a_student_folder_has_the_table_of_all_in_its_card_and_its_record(
    tmp_path: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from transformers import AutoModelForCausalLM

    from conftest import write_rows
    from potstill import cli

    write_rows(tmp_path / "text.jsonl", TEXT)
    teacher, folder = model_folder(layers=6), tmp_path / "student"
    command = ["student", str(teacher), "--data", str(tmp_path / "text.jsonl")]
    command += ["--output-dir", str(folder)]
    assert cli.main([*command, "--parameters", "70%"]) == 0
    record = json.loads((folder / "student.json").read_text())
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.num_parameters() == record["parameters"]
    assert student.config.num_hidden_layers == record["sizes"]["layers"] == len(record["layers"])
    card = (folder / "README.md").read_text()
    for one in record["candidates"]:
        assert f"{one['kl_refitted']:.3f}" in card
    assert f"{record['kl_refitted_nats']:.3f}" in card
    assert "KL refitted" in capsys.readouterr().out
    assert cli.main([*command, "--parameters", "70%"]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--parameters 200%", "give a size below the teacher's"),
        ("--parameters 1K", "no student of this size"),
        ("--parameters many", "not a size"),
        ("--parameters 80% --bytes 1MB", "give one of them"),
        ("--precision int8", "give --bytes too"),
        ("--bytes 10KB --precision int3", "precision 'int3'"),
        ("--kv-groups 3", "the teacher has 2"),
        ("--hidden-size 30", "not a multiple of the 4 attention heads"),
        ("--intermediate-size 0", "give 1 to 64"),
        ("--keep-layers 9 --kv-groups 1", "has 4 layers"),
        ("--experts 2", "the teacher is no mixture"),
        ("--parameters 80% --tokenizer demo", "together with the size"),
    ],
)
def test_bad_sizes_are_one_line_and_leave_nothing(
    flags: str,
    says: str,
    tmp_path: Path,
    model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from potstill import cli

    folder = tmp_path / "student"
    command = ["student", str(model_folder(layers=4)), "--output-dir", str(folder)]
    capsys.readouterr()
    assert cli.main([*command, *flags.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
    assert not folder.exists()


def test_without_data_the_teacher_answers_prompts_itself(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from potstill import cli

    monkeypatch.setattr("potstill.commands.student.PROMPTS", 8)
    monkeypatch.setattr("potstill.commands.student.ANSWER_TOKENS", 8)
    folder = tmp_path / "student"
    command = ["student", str(model_folder(layers=4)), "--output-dir", str(folder)]
    assert cli.main([*command, "--keep-layers", "0,3", "--kv-groups", "1"]) == 0
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.config.num_hidden_layers == 2
    assert student.config.num_attention_heads == 2
