from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import tiny_model, toy_tokenizer
from potstill.errors import ConfigError, ModelError, ModelNotFound, UnsafeWeights
from potstill.models import load_config, load_generation_config, load_model, load_tokenizer


def test_importing_potstill_imports_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    program = f"import sys, potstill, potstill.cli; assert not {heavy}, 'heavy'"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_opens_in_the_requested_dtype(
    model_folder: Callable[..., Path], dtype: str
) -> None:
    model, tokenizer = load_model(model_folder(), dtype=dtype, device="cpu")
    assert model.dtype == getattr(torch, dtype)
    assert not model.training
    assert tokenizer.pad_token_id is not None


def test_a_folder_with_only_pickled_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeWeights, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nobody/nothing", "not in the hub's cache"),
        ("./nowhere", "neither a model folder nor a .gguf file"),
        ("missing.gguf", "no such GGUF file"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(source: str, says: str) -> None:
    with pytest.raises(ModelNotFound, match=says) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no config.json"):
        load_model(tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="no .safetensors"):
        load_model(tmp_path)


def test_configurations_and_tokenizers_open_where_there_are_no_weights(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    assert load_config(tmp_path).vocab_size == 272
    assert len(load_tokenizer(tmp_path)) == 266
    assert load_generation_config(tmp_path).eos_token_id == 265  # from the configuration
    model.generation_config.eos_token_id = [1, 2]
    model.generation_config.save_pretrained(tmp_path)
    assert load_generation_config(tmp_path).eos_token_id == [1, 2]


def test_a_damaged_weights_file_is_one_line(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ModelError, match="damaged or cut off"):
        load_model(tmp_path)


def test_an_unknown_dtype_or_device_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="float31"):
        load_model("nobody/nothing", dtype="float31")
    with pytest.raises(ConfigError, match="not known"):
        load_model("nobody/nothing", device="abacus")


@pytest.mark.slow
def test_the_demo_model_is_converted_once_and_then_opened_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    load_model("demo", dtype="bfloat16", device="cpu")
    assert "converting" in capsys.readouterr().err
    model, tokenizer = load_model("demo", dtype="bfloat16", device="cpu")
    assert "converting" not in capsys.readouterr().err
    assert model.num_parameters() == 134_515_008
    assert tokenizer.chat_template
