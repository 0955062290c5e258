"""Who plays: a finished run's teacher, its student before and its student after."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.alignment import token_bytes
from potstill.data.chat_templates import ensure_chat_template
from potstill.errors import OpaqueTokenizer, RunFolderError
from potstill.evaluation.token_views import spelled
from potstill.models import dtype_of, load_model
from potstill.run_folder import RunFolder


@dataclass(frozen=True)
class Player:
    """A model with its tokenizer, and what each of its tokens stands for: bytes, or None for a special one."""

    name: str
    source: str
    model: Any
    tokenizer: Any
    tokens: list[bytes | None]

    def spell(self, token: int) -> str:
        """One token by itself, as the report spells it; a padded head has rows without a token."""
        return spelled(token, self.tokens, self.tokenizer) or f"token {token}"

    def read(self, tokens: Sequence[int]) -> list[str]:
        """The text of tokens in a row, a part for each: a character that several make up stands with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [
            self.spell(token)
            if self._piece(token) is None
            else decoder.decode(self._piece(token) or b"")
            for token in tokens
        ]

    def is_special(self, token: int) -> bool:
        """Whether it marks structure and stands for no text."""
        return self._piece(token) is None

    def _piece(self, token: int) -> bytes | None:
        return self.tokens[token] if token < len(self.tokens) else None


def open_players(run_dir: str | os.PathLike[str], *, device: str = "auto") -> list[Player]:
    """Teacher, student before and student after, as the run's ``config.yaml`` names them.

    Raises: RunFolderError if the folder is no run or the run has not come to its end; as `load_model` for each model.
    """
    run = RunFolder(run_dir)
    config = run.read_config()
    for key in ("teacher", "student", "output_dir"):
        if not isinstance(config.get(key), str):
            raise RunFolderError(
                f"{run.config}: names no {key}, so not a run of distill or demo; give such a run's folder"
            )
    if not run.student.is_dir():
        raise RunFolderError(
            f"{run.path}: no student there yet; let the run come to its end, with its own command"
        )
    sources = {
        "teacher": config["teacher"],
        "student before": config["student"],
        "student after": str(run.student),
    }
    return [
        _open(name, _moved(source, config["output_dir"], run.path), config, device)
        for name, source in sources.items()
    ]


def _moved(source: str, output_dir: str, path: Path) -> str:
    """A model inside the run's own folder is looked for where that folder is now."""
    inside = Path(source)
    return (
        str(path / inside.relative_to(output_dir)) if inside.is_relative_to(output_dir) else source
    )


def _open(name: str, source: str, config: dict[str, Any], device: str) -> Player:
    dtype = dtype_of(config.get("precision", "bf16"))
    model, tokenizer = load_model(
        source, dtype=dtype, device=device, trust_remote_code=bool(config.get("trust_remote_code"))
    )
    ensure_chat_template(tokenizer, config.get("chat_template") or "plain")
    try:
        tokens = token_bytes(tokenizer)
    except OpaqueTokenizer:  # blanks between its tokens are lost, the rest reads
        tokens = [tokenizer.decode([token]).encode() for token in range(len(tokenizer))]
    return Player(name, source, model, tokenizer, tokens)
