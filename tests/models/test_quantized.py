"""Quantized weights: the head stays exact, and nothing reads packed numbers as weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import conversations, tiny_model, toy_tokenizer, write_rows
from models.quantized_folders import (
    quantizable_model,
    write_claim,
    write_compressed,
    write_fp8,
    write_model,
    write_quantized,
)
from potstill import cli
from potstill.data import BatchLayout, encode_conversation
from potstill.errors import ConfigError, ModelError
from potstill.losses import CallableHead, Head, forward_kl
from potstill.models import ModelOpener, load_model, quantized
from potstill.models.heads import output_head
from potstill.models.quantized import KINDS, is_quantized, quantization_of, stored_tensors
from potstill.models.size import fits_in_memory, weight_bytes
from potstill.teachers import LocalTeacher, LossSettings
from potstill.teachers.stored_head import weights_hash

FULL = ModelOpener(device="cpu", dtype="float32")
EACH = pytest.mark.parametrize("kind", KINDS)


def opened(source: Any, kind: str | None = None, dtype: str = "float32") -> Any:
    return load_model(source, dtype=dtype, device="cpu", quantize=kind)[0]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@EACH
def test_the_body_is_quantized_and_the_head_is_exact(folder: Path, kind: str) -> None:
    full, rounded = opened(folder), opened(folder, kind)
    changed = [name for name, weight in rounded.named_parameters() if is_quantized(weight)]
    assert len(changed) == 4 * 7
    assert all("proj" in name for name in changed)
    heads = [output_head(model) for model in (full, rounded)]
    assert all(isinstance(head, Head) for head in heads)
    assert torch.equal(heads[0].weight, heads[1].weight)
    ids = torch.arange(40).view(2, 20)
    logits = [model(input_ids=ids).logits for model in (full, rounded)]
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 1e-4 < difference < (0.02 if kind == "8bit" else 0.3)
    assert quantization_of(full) is None
    assert KINDS[kind] in str(quantization_of(rounded))


@EACH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_conversation_does_not_depend_on_the_others_of_its_batch(
    folder: Path, kind: str, dtype: str
) -> None:
    model = opened(folder, kind, dtype)
    assert model.dtype == getattr(torch, dtype)
    rows = [encode_conversation(one, toy_tokenizer()) for one in conversations(6)]
    layout, teacher = BatchLayout(265, packed=False), LocalTeacher(model)
    together = teacher.targets(layout(rows)).hidden.float()
    alone = torch.cat([teacher.targets(layout([row])).hidden for row in rows]).float()
    assert (together - alone).abs().max() <= (1e-5 if dtype == "float32" else 0.02) * alone.max()


@EACH
def test_the_hash_of_the_weights_tells_quantized_models_apart(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    model = opened(folder, kind)
    first = weights_hash(model)
    model(input_ids=torch.arange(20)[None])  # bitsandbytes packs weights anew at this
    assert weights_hash(model) == first == weights_hash(opened(folder, kind))
    others = [opened(folder, one) for one in (None, *KINDS) if one != kind]
    changed = quantizable_model()  # the same embeddings, norms and head; one matrix differs
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight.mul_(-1)
    others.append(opened(write_model(tmp_path, changed), kind))
    assert len({first, *map(weights_hash, others)}) == 4


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float8_e4m3fn, True)],
)
def test_numbers_of_8_bits_are_not_read_as_the_weights_of_a_head(
    dtype: torch.dtype, rounded: bool
) -> None:
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(dtype), requires_grad=False)
    assert isinstance(output_head(model), CallableHead if rounded else Head)


def test_a_head_that_rounds_its_input_is_called_and_not_read(tmp_path: Path) -> None:
    exact, rounding = (
        opened(write_compressed(tmp_path / name, with_head=name == "b")) for name in "ab"
    )
    assert isinstance(output_head(exact), Head)
    assert isinstance(output_head(rounding), CallableHead)


@EACH
def test_the_loss_of_a_quantized_head_is_that_of_its_models_logits(folder: Path, kind: str) -> None:
    """The expected value comes from the model's own logits, and knows of no head."""
    model = opened(folder, kind)
    model.lm_head = with_quantized_head(opened(folder), kind)
    model.requires_grad_(False)
    head = output_head(model)
    assert isinstance(head, CallableHead)
    rows = [encode_conversation(one, toy_tokenizer()) for one in conversations(5)]
    batch = BatchLayout(265, packed=False)(rows)
    chosen = batch["labels"][:, 1:] != -100
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ][chosen]
    hidden = torch.randn(int(chosen.sum()), 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(288, 32, generator=torch.Generator().manual_seed(1))
    target = LocalTeacher(model).targets(batch)
    labels = batch["labels"][:, 1:][chosen]
    loss = target.summed_loss(hidden, Head(weight), labels, LossSettings())
    expected = forward_kl(logits.float(), hidden @ weight.T).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


def with_quantized_head(model: Any, kind: str) -> Any:
    """Return the head of ``model``, quantized by the package alone."""
    head = model.lm_head
    if kind == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(head, Int8WeightOnlyConfig(set_inductor_config=False))
        return head
    import bitsandbytes

    packed = bitsandbytes.nn.Linear4bit(64, 288, bias=False, quant_type="nf4")
    packed.load_state_dict(head.state_dict())
    return packed.to("cpu").eval()


class TestSavedOnTheHub:
    @EACH
    def test_what_the_packages_save_opens_again(
        self, folder: Path, tmp_path: Path, kind: str
    ) -> None:
        saved = write_quantized(tmp_path / "saved", folder, kind)
        one, other = opened(folder, kind), opened(saved)
        assert quantization_of(one) == quantization_of(other)
        ids = torch.arange(20)[None]
        torch.testing.assert_close(one(input_ids=ids).logits, other(input_ids=ids).logits)

    @pytest.mark.parametrize(
        ("write", "named"),
        [
            (write_fp8, "fp8 opened in full precision"),
            (write_compressed, "compressed-tensors int-quantized"),
        ],
    )
    def test_fp8_and_compressed_tensors_open(
        self, tmp_path: Path, write: Callable[[Path], Path], named: str
    ) -> None:
        model, full = opened(write(tmp_path / "saved")), tiny_model(seed=1)
        assert quantization_of(model) == named
        ids = torch.arange(20)[None]
        logits = [one(input_ids=ids).logits for one in (model, full)]
        assert 0 < (logits[0] - logits[1]).abs().max() < 0.1 * logits[1].abs().max()
        assert torch.equal(output_head(model).weight, full.lm_head.weight)

    @pytest.mark.parametrize(
        ("method", "needs"),
        [
            ("gptq", "optimum gptqmodel"),
            ("awq", "gptqmodel"),
            ("compressed-tensors", "compressed-tensors"),
            ("torchao", "torchao"),
            ("quanto", "optimum-quanto"),
        ],
    )
    def test_a_missing_package_is_named(
        self,
        folder: Path,
        tmp_path: Path,
        method: str,
        needs: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(quantized, "_is_installed", lambda name: False)
        claimed = write_claim(tmp_path / "claimed", folder, method)
        expected = rf"its weights are quantized \({method}\), which needs: pip install {needs}$"
        with pytest.raises(ConfigError, match=expected):
            opened(claimed)

    def test_a_second_quantization_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"quantized already \(fp8\); leave out"):
            opened(write_fp8(tmp_path / "saved"), "8bit")

    def test_a_student_is_not_quantized(
        self, pair_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_rows(Path("data.jsonl"), conversations(12))
        write_compressed(Path("saved"))
        command = "distill teacher saved --data data.jsonl --output-dir run --max-steps 1"
        assert cli.main([*command.split(), "--device", "cpu"]) == 2
        assert (
            "saved: its weights are quantized (compressed-tensors int-quantized), and"
            in capsys.readouterr().err
        )
        assert not Path("run").exists()
        assert cli.main(["student", "saved", "--keep-layers", "2", "--output-dir", "cut"]) == 2
        assert "give the model from which it was quantized" in capsys.readouterr().err
        assert not Path("cut").exists()


class TestWhatCannotBeDone:
    def test_an_unknown_kind(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="'2bit' is not known; use 8bit or 4bit"):
            opened(folder, "2bit")

    @EACH
    def test_a_package_that_is_not_installed(
        self, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(quantized, "_is_installed", lambda name: False)
        with pytest.raises(ConfigError, match=rf"needs the package {KINDS[kind]}: pip install"):
            opened(folder, kind)

    def test_a_model_without_linear_layers(self, tmp_path: Path) -> None:
        tiny_model("gpt2", hidden=64).save_pretrained(tmp_path)
        toy_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"nothing to quantize in GPT2.*teacher 4bit, or"):
            opened(tmp_path, "8bit")
        assert any(is_quantized(weight) for weight in opened(tmp_path, "4bit").parameters())

    def test_an_adapter(self, folder: Path, tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(opened(folder), LoraConfig(target_modules=["q_proj"]))
        adapted.peft_config["default"].base_model_name_or_path = str(folder)
        adapted.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ConfigError, match="before it is merged; potstill student"):
            opened(tmp_path / "adapter", "8bit")

    @EACH
    def test_a_machine_that_cannot(
        self, pair_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        """Torch's own matrix product fails here, as a kernel does that was not built."""

        def broken(*_: Any, **__: Any) -> Any:
            raise NotImplementedError("no kernel for this card")

        if kind == "8bit":
            from torchao.quantization import Int8Tensor

            monkeypatch.setattr(Int8Tensor, "from_hp", broken)
        else:
            import bitsandbytes

            monkeypatch.setattr(bitsandbytes, "matmul_4bit", broken)
        write_rows(Path("data.jsonl"), conversations(12))
        write_model(Path("large"))
        command = "capture large --data data.jsonl --output-dir run --device cpu"
        assert cli.main([*command.split(), "--quantize-teacher", kind]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "do not work on cpu of this machine" in line
        assert "no kernel for this card" in line

    def test_weights_that_are_not_finite(self, folder: Path, tmp_path: Path) -> None:
        model = quantizable_model()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3, 4] = torch.nan
        write_model(tmp_path, model)
        for kind in KINDS:
            with pytest.raises(ModelError, match="NaN or infinite"):
                opened(tmp_path, kind)

    @EACH
    def test_a_checkpoint_without_a_weight(self, folder: Path, tmp_path: Path, kind: str) -> None:
        from safetensors.torch import load_file, save_file

        write_model(tmp_path)
        file = tmp_path / "model.safetensors"
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"no weights for model.layers.1.mlp.up_proj.weight"):
            opened(tmp_path, kind)
        extra = {**load_file(folder / "model.safetensors"), "lm_head.bias": torch.ones(288)}
        save_file(extra, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match="does not use its weights lm_head.bias"):
            opened(tmp_path, kind)


def test_the_bytes_of_the_weights_and_whether_they_fit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_fp8(tmp_path / "full")
    count = sum(one.numel() for one in tiny_model(seed=1).parameters())
    config = FULL.config(folder)
    assert weight_bytes(config, "float32") == 4 * count
    assert weight_bytes(config, "bfloat16") == 2 * count
    saved = FULL.config(write_fp8(tmp_path / "saved"))
    assert weight_bytes(saved, "float32") == 4 * count
    assert fits_in_memory(folder, FULL)
    import psutil

    memory = type("Memory", (), {"available": 4 * count})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert not fits_in_memory(folder, FULL)


def test_stored_tensors_are_plain(folder: Path) -> None:
    for kind in (None, *KINDS):
        for _, tensor in stored_tensors(opened(folder, kind)):
            assert type(tensor) in (torch.Tensor, torch.nn.Parameter)


def test_an_opener_quantizes_only_the_teacher() -> None:
    from potstill.commands.capture import CaptureRecipe

    recipe = CaptureRecipe("demo", "data", "out", quantize_teacher="8bit")
    assert ModelOpener.of(recipe).quantize is None
    assert ModelOpener.of_teacher(recipe).quantize == "8bit"
    assert json.dumps(ModelOpener.of_teacher(recipe).quantize)
