"""Models that cannot be a teacher or a student: one line, status 2, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import conversations, tiny_model, toy_tokenizer, write_rows
from potstill import cli

COMMANDS = {
    "teacher": "distill bad student --data data.jsonl --output-dir run --max-steps 1",
    "student": "distill teacher bad --data data.jsonl --output-dir run --max-steps 1",
    "evaluate": "evaluate bad --teacher teacher --data data.jsonl",
    "generate": "generate bad --prompts prompts.jsonl --output-dir run",
    "cut": "student bad --output-dir run",
}
ON_CPU = " --device cpu --precision fp32"


def potstill(command: str) -> int:
    return cli.main(shlex.split(command))


def edit_json(file: Path, **changes: Any) -> None:
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: one for name, one in settings.items() if one != "REMOVED"}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def written(name: str, text: str | bytes) -> Callable[[Path], None]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data) and None


def removed(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def replaced_by(architecture: str, **sizes: Any) -> Callable[[Path], None]:
    """Replace the model by one of another kind."""

    def replace(folder: Path) -> None:
        made = getattr(transformers, f"{architecture}Config")(**sizes)
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
        model = transformers.AutoModel.from_config(made)
        model.save_pretrained(folder)

    return replace


SMALL: dict[str, Any] = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "intermediate_size": 32}
T5 = {"vocab_size": 272, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
VIT |= {"intermediate_size": 32}


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def two_formats(folder: Path) -> None:
    """Add shards and an index of another model."""
    tiny_model(seed=9).save_pretrained(folder / "other", max_shard_size="40KB")
    for file in (folder / "other").glob("model*"):
        shutil.move(file, folder / file.name)
    shutil.rmtree(folder / "other")


def loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a model")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def weights(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(edit(load_file(file)), file, metadata={"format": "pt"})

    return apply


def broken_link(name: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("absent-blob")

    return link


Edit = Callable[[Path], None]
BAD: dict[str, tuple[Edit, str]] = {
    "no model_type": (config(model_type="REMOVED", architectures="REMOVED"), "its model type"),
    "model_type unknown": (config(model_type="perceptron"), "perceptron"),
    "config.json not JSON": (written("config.json", "{"), "config.json"),
    "config.json empty": (written("config.json", ""), "config.json"),
    "config.json a list": (written("config.json", "[]"), "config.json"),
    "config.json not UTF-8": (written("config.json", b"\xff\xfe{}"), "config.json"),
    "encoder only": (replaced_by("Bert", **SMALL), "BertLMHeadModel|bert"),
    "encoder and decoder": (replaced_by("T5", **T5), "T5Config|t5"),
    "vision": (replaced_by("ViT", **VIT), "ViTConfig|vit"),
    "pickled weights": (pickled, "only pickled weights"),
    "two checkpoints": (two_formats, "two checkpoints"),
    "vocab_size": (
        config(vocab_size=100, pad_token_id=None),
        r"\[272, 32\], and config.json needs \[100, 32\]",
    ),
    "hidden_size": (config(hidden_size=64), "shape"),
    "heads do not divide": (config(num_attention_heads=5), "."),
    "vocab_size a word": (config(vocab_size="many"), "vocab_size"),
    "negative layers": (config(num_hidden_layers=-1), "."),
    "no layers": (config(num_hidden_layers=0), "layers"),
    "dtype unknown": (config(dtype="float31", torch_dtype="float31"), "float31"),
    "rope unknown": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "spiral"),
    "rope incomplete": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "factor"),
    "activation unknown": (config(hidden_act="snake"), "snake"),
    "pad beyond the vocabulary": (config(pad_token_id=999), "the pad_token_id of config.json"),
    "code of its own": (
        config(auto_map={"AutoModelForCausalLM": "x.Y"}, model_type="mine"),
        "mine",
    ),
    "tokenizer.json not JSON": (written("tokenizer.json", "{"), "tokenizer"),
    "tokenizer.json another JSON": (written("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer.json cut": (
        lambda folder: (
            (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
            and None
        ),
        "tokenizer",
    ),
    "tokenizer_config.json not JSON": (written("tokenizer_config.json", "{"), "tokenizer"),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "no tokenizer there"),
    "chat template broken": (written("chat_template.jinja", "{% for %}"), "template"),
    "chat template without answer": (written("chat_template.jinja", "hello"), "template"),
    "chat template not UTF-8": (written("chat_template.jinja", b"\xff\xfe"), "template"),
    "generation_config.json not JSON": (written("generation_config.json", "{"), "generation"),
    "no weights": (removed("model.safetensors"), "no .safetensors file"),
    "no config.json": (removed("config.json"), "no config.json"),
    "weights are a broken link": (broken_link("model.safetensors"), "model.safetensors"),
    "config.json is a broken link": (broken_link("config.json"), "config.json"),
    "weights of no tensors": (weights(lambda tensors: {}), "no weights for"),
    "weights all zero": (
        weights(lambda tensors: {name: one * 0 for name, one in tensors.items()}),
        "zero",
    ),
    "a loop of links": (loop, "bad"),
    "a file": (a_file, "bad"),
    "an empty folder": (empty, "no config.json there|no tokenizer there"),
    "a missing folder": (shutil.rmtree, "bad"),
}
"""By name: how a good folder is made bad, and what the error must say (a pattern)."""
OF_TEMPLATE = [name for name in BAD if name.startswith("chat template")]


@pytest.fixture
def place(pair_folder: Path) -> Iterator[Path]:
    """Make data, prompts and ``bad``, still a good model."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    write_rows(pair_folder / "prompts.jsonl", [{"prompt": "the rain"}])
    tiny_model(layers=2).save_pretrained(pair_folder / "bad")
    toy_tokenizer().save_pretrained(pair_folder / "bad")
    yield pair_folder
    for path in (pair_folder / "bad", *(pair_folder / "bad").glob("*")):
        if path.exists() and not path.is_symlink():
            path.chmod(0o755)


def refused(place: Path, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail; return its line of error."""
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    assert potstill(command) == 2, command
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "LOAD REPORT" not in error
    [line] = [line for line in error.splitlines() if "potstill: " in line]
    assert sorted(place.rglob("*")) == before
    return line


@pytest.mark.parametrize(("edit", "says"), BAD.values(), ids=BAD)
def test_a_bad_model_is_one_line_whatever_the_command(
    place: Path, edit: Edit, says: str, request: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(place / "bad")
    needs_template = request.node.callspec.id in OF_TEMPLATE
    for name, command in COMMANDS.items():
        if name == "cut" and needs_template:
            continue
        line = refused(place, command + (ON_CPU if name != "cut" else ""), capsys)
        assert re.search(says, line), f"{name}: {line}"
        is_named = "bad" in line or "the teacher has" in line or needs_template
        assert is_named, f"{name}: {line}"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (COMMANDS["evaluate"] + " --device cuda", "'cuda' is not available"),
        (COMMANDS["evaluate"] + " --device cuda:7", "'cuda:7' is not available"),
        (COMMANDS["evaluate"] + " --device mps", "'mps' is not available"),
        (COMMANDS["evaluate"] + " --device meta", "'meta' is not available"),
        (COMMANDS["evaluate"] + " --device cpu:cpu", "not known"),
        (COMMANDS["evaluate"] + " --device xpu", "'xpu' is not available"),
        (COMMANDS["teacher"] + " --device cuda", "'cuda' is not available"),
        (COMMANDS["generate"] + " --device cuda", "'cuda' is not available"),
        ("evaluate '' --teacher teacher --data data.jsonl", "."),
        ("evaluate bad/ --teacher bad/config.json --data data.jsonl", "neither a model folder"),
        ("evaluate bad --teacher bad/model.safetensors --data data.jsonl", "neither a model"),
        ("evaluate bad --teacher ../nowhere/at/all --data data.jsonl", "neither a model folder"),
        ("evaluate bad --teacher https://huggingface.co/a/b --data data.jsonl", "a/b"),
        ("evaluate bad --teacher 'two words' --data data.jsonl", "two words"),
        ("evaluate bad --teacher org/name@main --data data.jsonl", "org/name@main"),
        ("evaluate bad --teacher model.gguf --data data.jsonl", "no such GGUF file"),
    ],
)
def test_a_bad_device_or_name_is_one_line(
    place: Path, command: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "cuda" in command:
        pytest.skip("there is a GPU")
    assert re.search(says, refused(place, command, capsys))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_what_may_not_be_read_is_one_line(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "bad" / name).chmod(0)
    assert "ermission" in refused(place, COMMANDS["evaluate"] + ON_CPU, capsys)
