"""A quantized teacher: what it costs is measured, recorded, and never mixed with the full one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import conversations, toy_tokenizer, write_rows
from models.quantized_folders import quantizable_model, write_compressed, write_fp8, write_model
from potstill import cli
from potstill.data import BatchLayout, encode_conversation, tokenize_conversations
from potstill.models import ModelOpener
from potstill.report.verdict import quantized_teacher
from potstill.teachers import CapturedTeacher, LocalTeacher, open_teacher, quantization_cost
from potstill.teachers.quantization_cost import (
    MEASURED_TOKENS,
    ExactStates,
    QuantizationCost,
    cost_text,
    known_quantization,
)
from potstill.teachers.served import identity
from potstill.teachers.stored_head import store_head

ON_CPU = ["--device", "cpu", "--precision", "fp32"]


def opener(quantize: str | None = None, dtype: str = "float32") -> ModelOpener:
    return ModelOpener(device="cpu", dtype=dtype, quantize=quantize)


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """A working folder whose teacher can be quantized, with data."""
    (pair_folder / "teacher").unlink()
    write_model(pair_folder / "teacher")
    write_rows(pair_folder / "data.jsonl", conversations(16))
    return pair_folder


def potstill(*words: str) -> int:
    return cli.main([*words, *ON_CPU])


def distill(teacher: str, run: str, *more: str) -> int:
    command = ["distill", teacher, "student", "--data", "data.jsonl", "--output-dir", run]
    return potstill(*command, "--max-steps", "3", "--batch-size", "4", *more)


def capture(folder: str, *more: str) -> int:
    return potstill("capture", "teacher", "--data", "data.jsonl", "--output-dir", folder, *more)


def measured(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(run, "evaluation.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_the_cost_is_the_divergence_of_the_two_models_own_logits(tmp_path: Path, kind: str) -> None:
    folder = str(write_model(tmp_path))
    rows = [encode_conversation(one, toy_tokenizer()) for one in conversations(12)]
    exact = ExactStates.collect(folder, opener(kind), rows)
    assert exact is not None
    full, rounded = (opener(one).model(folder) for one in (None, kind))
    cost = exact.compare(LocalTeacher(rounded))
    nats, agreeing, tokens = [], [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (
                one(input_ids=ids).logits[0].double().log_softmax(-1) for one in (full, rounded)
            )
        learned = [i for i, label in enumerate(row["labels"][1:]) if label != -100]
        nats.append(float((p.exp() * (p - q)).sum(-1)[learned].sum()))
        agreeing.append(int((p.argmax(-1) == q.argmax(-1))[learned].sum()))
        tokens.append(len(learned))
    assert cost.nats == pytest.approx(nats, rel=1e-3, abs=3e-6)  # float32
    assert cost.agreeing == agreeing
    assert cost.tokens == tokens
    found = cost.as_dict()
    assert found["kl_nats_per_token"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-3, abs=1e-7)
    low, high = found["ci95"]
    assert low < found["kl_nats_per_token"] < high
    assert f"of {sum(tokens)} tokens" in cost_text(found)


def test_the_interval_covers_the_mean_of_the_population() -> None:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40, (4000,), generator=random)
    nats = tokens * torch.rand(4000, generator=random) * 0.1
    mean, covered = float(nats.sum() / tokens.sum()), 0
    for some in torch.randperm(4000, generator=random).split(40):
        sums = QuantizationCost(nats[some].tolist(), [0] * len(some), tokens[some].tolist())
        low, high = sums.as_dict()["ci95"]
        covered += low < mean < high
    assert 87 <= covered <= 100


def test_few_conversations_have_no_interval_and_many_are_cut(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path))
    few = QuantizationCost([0.1] * 5, [1] * 5, [2] * 5).as_dict()
    assert "ci95" not in few
    rows = [encode_conversation(conversations(1)[0], toy_tokenizer())] * 4000
    exact = ExactStates.collect(folder, opener(), rows)
    assert exact is not None
    count = sum(map(len, exact.hidden))
    assert MEASURED_TOKENS <= count < MEASURED_TOKENS + len(rows[0]["input_ids"])


class TestCapture:
    @pytest.mark.parametrize("kind", ["8bit", "4bit"])
    def test_states_are_the_quantized_teachers_and_the_manifest_says_so(
        self, place: Path, kind: str
    ) -> None:
        assert capture("stored", "--quantize-teacher", kind) == 0
        stored = open_teacher("stored")
        assert isinstance(stored, CapturedTeacher)
        assert stored.manifest["quantize_teacher"] == kind
        rows = [encode_conversation(one, toy_tokenizer()) for one in conversations(16)]
        batch = BatchLayout(265, packed=False)(rows)
        live = LocalTeacher(opener(kind).model("teacher")).targets(batch)
        torch.testing.assert_close(stored.targets(batch).hidden, live.hidden, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
        known = known_quantization(stored)
        assert known is not None
        dataset, _ = tokenize_conversations(conversations(16), toy_tokenizer(), max_length=512)
        tokens = sum(label != -100 for row in dataset for label in row["labels"][1:])
        assert known["tokens"] == tokens
        assert known["kl_nats_per_token"] > 0

    def test_it_is_not_continued_with_the_full_teacher_or_the_other_way_round(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert capture("rounded", "--quantize-teacher", "8bit") == 0
        assert capture("full") == 0
        write_rows(Path("data.jsonl"), conversations(20))
        capsys.readouterr()
        for folder, flags, found in (
            ("rounded", [], "8bit, not None"),
            ("rounded", ["--quantize-teacher", "4bit"], "8bit, not 4bit"),
            ("full", ["--quantize-teacher", "8bit"], "None, not 8bit"),
        ):
            assert capture(folder, *flags) == 2
            assert f"captured with quantize_teacher {found}" in capsys.readouterr().err
        assert capture("rounded", "--quantize-teacher", "8bit") == 0
        assert len(open_teacher("rounded")) == 20  # type: ignore[arg-type]

    def test_another_model_saved_with_quantized_weights_is_noticed(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Only buffers differ: norms, embeddings and head are the same."""
        shutil.rmtree("teacher")
        write_compressed(Path("teacher"))
        assert capture("stored") == 0
        from safetensors.torch import load_file, save_file

        file = Path("teacher/model.safetensors")
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"].neg_()
        save_file(weights, file, metadata={"format": "pt"})
        write_rows(Path("data.jsonl"), conversations(20))
        assert capture("stored") == 2
        assert "captured from other weights of this teacher" in capsys.readouterr().err

    def test_a_teacher_that_does_not_fit_in_full_precision(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(quantization_cost, "fits_in_memory", lambda *_: False)
        assert capture("stored", "--quantize-teacher", "8bit") == 0
        found = known_quantization(open_teacher("stored"))
        assert found is not None
        assert found["not_measured"] == quantization_cost.TOO_LARGE
        assert quantization_cost.TOO_LARGE in quantized_teacher({"quantization": found})


class TestRun:
    def test_a_run_records_the_quantization_and_continues_only_with_it(
        self, place: Path, interrupt_at: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with interrupt_at(2):
            assert distill("teacher", "run", "--quantize-teacher", "8bit") == 130
        assert distill("teacher", "run") == 2
        assert "holds a run with quantize_teacher 8bit, not None" in capsys.readouterr().err
        assert distill("teacher", "run", "--quantize-teacher", "8bit") == 0
        assert "the teacher is quantized (torchao Int8WeightOnly): " in capsys.readouterr().out
        found = measured("run")["quantization"]
        assert found["quantization"] == "torchao Int8WeightOnly"
        assert found["kl_nats_per_token"] > 0
        page = Path("run/report.html").read_text()
        assert "The teacher&#39;s weights are quantized (torchao Int8WeightOnly)." in page
        assert f"on {found['tokens']} tokens of the text" in page

    def test_the_students_weights_stay_in_full_precision(self, place: Path) -> None:
        assert distill("teacher", "run", "--quantize-teacher", "8bit") == 0
        assert distill("teacher", "plain") == 0
        for run in ("run", "plain"):
            config = json.loads(Path(run, "student/config.json").read_text())
            assert "quantization_config" not in config
        kept = [measured(run) for run in ("run", "plain")]
        assert "quantization" not in kept[1]
        values = [one["before"]["kl_nats_per_token"] for one in kept]
        assert values[0] != values[1]  # it is measured from the quantized teacher
        assert values[0] == pytest.approx(values[1], rel=0.1)

    def test_runs_with_and_without_it_are_not_compared(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert distill("teacher", "run", "--quantize-teacher", "8bit") == 0
        assert distill("teacher", "plain") == 0
        from potstill.comparison.finished_runs import open_run, refuse_unlike
        from potstill.errors import RunFolderError

        with pytest.raises(RunFolderError, match="the teacher's quantization is torchao"):
            refuse_unlike([open_run(one) for one in ("run", "plain")])

    def test_a_capture_gives_its_cost_to_the_report(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert capture("stored", "--quantize-teacher", "4bit") == 0
        shutil.rmtree("teacher")
        assert distill("stored", "run", "--quantize-teacher", "4bit") == 2
        error = capsys.readouterr().err
        assert "cannot be quantized here; give --quantize-teacher to potstill capture" in error
        assert not Path("run").exists()
        assert distill("stored", "run") == 0
        stored = known_quantization(open_teacher("stored"))
        assert measured("run")["quantization"] == stored
        assert "(bitsandbytes nf4)" in Path("run/report.html").read_text()

    def test_the_model_behind_a_capture_is_quantized_as_the_capture_is(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_rows(Path("data.jsonl"), conversations(10))
        assert capture("stored", "--quantize-teacher", "8bit") == 0
        write_rows(Path("data.jsonl"), conversations(16))
        assert distill("stored", "run", "--teacher-model", "teacher") == 2
        assert "captured with quantize_teacher 8bit, not None" in capsys.readouterr().err
        more = ["--teacher-model", "teacher", "--quantize-teacher", "8bit"]
        assert distill("stored", "run", *more) == 0
        assert len(open_teacher("stored")) == 16  # type: ignore[arg-type]

    def test_a_teacher_saved_with_quantized_weights_has_no_cost(self, place: Path) -> None:
        shutil.rmtree("teacher")
        write_fp8(Path("teacher"))
        assert distill("teacher", "run") == 0
        found = measured("run")["quantization"]
        assert found["quantization"] == "fp8 opened in full precision"
        assert found["not_measured"] == quantization_cost.SAVED

    def test_the_self_check_passes_across_tokenizers_too(self, place: Path) -> None:
        assert distill("teacher", "run", "--quantize-teacher", "8bit", "--method", "cross") == 0


def test_a_server_of_the_quantized_teacher_is_another_teacher(place: Path, tmp_path: Path) -> None:
    found = {}
    for kind in (None, "8bit", "4bit"):
        folder = tmp_path / str(kind)
        folder.mkdir()
        facts = store_head(folder, opener(kind).model("teacher"), toy_tokenizer(), "teacher")
        found[kind] = facts
    assert len({identity(one) for one in found.values()}) == 3
    assert found[None]["quantization"] is None
    same_weights = {**found["8bit"], "quantization": "another"}
    assert identity(same_weights) != identity(found["8bit"])
    heads = {one["head"]["sha256"] for one in found.values()}
    assert len(heads) == 1  # the head is exact


def test_generate_answers_with_it_and_keeps_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("prompts.jsonl"), [{"prompt": f"the rain {i}"} for i in range(3)])
    command = ["generate", "teacher", "--prompts", "prompts.jsonl", "--output-dir", "answers"]
    command += ["--max-new-tokens", "4", "--keep", "cut_off,empty,repetition_loop"]
    assert potstill(*command, "--quantize-teacher", "8bit") == 0
    manifest = json.loads(Path("answers/manifest.json").read_text())
    assert manifest["made_with"]["quantize_teacher"] == "8bit"
    capsys.readouterr()
    assert potstill(*command) == 2
    assert "answers" in capsys.readouterr().err
    for engine in (["--engine", "vllm"], ["--server", "http://127.0.0.1:9"]):
        assert potstill(*command, "--quantize-teacher", "8bit", *engine) == 2
        assert "opens the teacher itself; leave it out" in capsys.readouterr().err


class TestDoctor:
    def test_it_measures_the_cost_and_plans_the_memory(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["doctor", "teacher", "student", "--data", "data.jsonl", "--device", "cpu"]
        command += ["--precision", "fp32", "--with-weights"]
        assert cli.main([*command, "--quantize-teacher", "4bit"]) == 0
        page = capsys.readouterr().out
        assert "quantized to 4bit" in page
        assert "nats" in page
        assert "teacher in 4bit" in page
        assert "--quantize-teacher 4bit" in page
        assert cli.main([*command, "--quantize-teacher", "4bit", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        cost = found["quantization_cost"]
        assert cost["kl_nats_per_token"] > 0
        model = quantizable_model()
        body = sum(w.numel() for name, w in model.named_parameters() if "proj" in name)
        rest = sum(w.numel() for w in model.parameters()) - body
        memory = found["costs"]["logits"]["teacher_memory_bytes"]
        assert memory == pytest.approx(4 * rest + body * (0.5 + 4 / 64))
        assert cli.main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["quantization_cost"] is None
        assert found["costs"]["logits"]["teacher_memory_bytes"] == 4 * (rest + body)

    def test_saved_quantizations_are_noted(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_fp8(Path("saved"))
        assert cli.main(["doctor", "saved", "student"]) == 0
        assert "saved quantized (fp8)" in " ".join(capsys.readouterr().out.split())
        assert cli.main(["doctor", "teacher", "saved"]) == 0
        assert "it cannot be trained" in " ".join(capsys.readouterr().out.split())
        assert cli.main(["doctor", "saved", "student", "--quantize-teacher", "8bit"]) == 2
        assert "quantized already (fp8)" in capsys.readouterr().err
