"""Which run folders can be opened, and how tokens are spelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import sentencepiece_tokenizer, tiny_model, toy_tokenizer
from potstill.errors import RunFolderError
from potstill.play import Player, open_players


def player(tokenizer: object = None) -> Player:
    from potstill.alignment import token_bytes

    tokenizer = tokenizer or toy_tokenizer()
    return Player("teacher", "toy", tiny_model(), tokenizer, token_bytes(tokenizer))


def make_run(folder: Path, make_model: Callable[..., Path], **settings: str) -> Path:
    """Make a run folder like `distill`, with the student before training inside it."""
    folder.mkdir()
    (folder / "student").symlink_to(make_model(layers=2, seed=1))
    (folder / "student-before").symlink_to(make_model(layers=2, seed=2))
    config = {
        "teacher": str(make_model()),
        "student": str(folder / "student-before"),
        "output_dir": str(folder),
        "precision": "fp32",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))
    return folder


def test_a_run_opens_teacher_student_before_and_student_after(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    players = open_players(make_run(tmp_path / "run", model_folder), device="cpu")
    assert [one.name for one in players] == ["teacher", "student before", "student after"]
    assert [one.model.config.num_hidden_layers for one in players] == [4, 2, 2]
    weights = [one.model.get_input_embeddings().weight for one in players]
    assert not weights[1].equal(weights[2])


def test_a_student_inside_a_run_is_found_after_the_folder_was_moved(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    moved = make_run(tmp_path / "run", model_folder).rename(tmp_path / "elsewhere")
    assert open_players(moved, device="cpu")[1].source == str(moved / "student-before")


def test_a_folder_that_is_no_run_or_not_finished_is_refused(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    with pytest.raises(RunFolderError, match="not a run"):
        open_players(tmp_path)
    run = make_run(tmp_path / "run", model_folder)
    (run / "student").unlink()
    with pytest.raises(RunFolderError, match="no student there yet"):
        open_players(run)
    (run / "config.yaml").write_text("prompts: answers.jsonl")
    with pytest.raises(RunFolderError, match="names no teacher"):
        open_players(run)


def test_the_parts_join_to_the_text_and_a_character_belongs_to_its_last_byte() -> None:
    toy = player()
    ids = toy.tokenizer("the rain é")["input_ids"]
    parts = toy.read(ids)
    assert "".join(parts) == "the rain é"
    assert parts[-2:] == ["", "é"]
    assert toy.spell(ids[-1]) == "\\xa9"


def test_spaces_of_sentencepiece_tokens_are_kept_and_special_tokens_are_named() -> None:
    llama = player(sentencepiece_tokenizer())
    ids = llama.tokenizer("wet rain", add_special_tokens=False)["input_ids"]
    assert "".join(llama.read(ids)) == " wet rain"
    end = llama.tokenizer.eos_token_id
    assert (llama.spell(end), llama.is_special(end)) == ("</s>", True)
