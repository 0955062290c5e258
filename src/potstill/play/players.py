"""Open the three models of a finished run: teacher, student before, student after."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.alignment import token_bytes
from potstill.data.chat_templates import set_chat_template
from potstill.errors import OpaqueTokenizer, RunFolderError
from potstill.evaluation.token_views import spelled
from potstill.models import dtype_of, load_model
from potstill.protocols import CausalLM, Tokenizer
from potstill.run_folder import RunFolder


@dataclass(frozen=True)
class Player:
    """Hold one of the compared models with its tokenizer."""

    name: str
    source: str
    model: CausalLM
    tokenizer: Tokenizer
    tokens: list[bytes | None]
    """The bytes of every token id; None for a special token."""

    def spell(self, token: int) -> str:
        """Return a token's spelling as in the report; an id without a token gets "token ID"."""
        return spelled(token, self.tokens, self.tokenizer) or f"token {token}"

    def read(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token; a character of several tokens is the text of the last."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts = []
        for token in tokens:
            text = self._bytes_of(token)
            parts.append(self.spell(token) if text is None else decoder.decode(text))
        return parts

    def is_special(self, token: int) -> bool:
        """Return True if the token has no text."""
        return self._bytes_of(token) is None

    def _bytes_of(self, token: int) -> bytes | None:
        return self.tokens[token] if token < len(self.tokens) else None


def open_players(run_dir: str | os.PathLike[str], *, device: str = "auto") -> list[Player]:
    """Open teacher, student before and student after, as the run's ``config.yaml`` names them.

    Raises: RunFolderError if the folder is no run or the run is not finished; the errors of
    `load_model`.
    """
    run = RunFolder(run_dir)
    config = run.read_config()
    for key in ("teacher", "student", "output_dir"):
        if not isinstance(config.get(key), str):
            raise RunFolderError(
                f"{run.config}: names no {key}, so not a run of distill or demo; "
                "give the folder of such a run"
            )
    if not run.student.is_dir():
        raise RunFolderError(
            f"{run.path}: no student there yet; finish the run with its own command"
        )
    sources = {
        "teacher": config["teacher"],
        "student before": config["student"],
        "student after": str(run.student),
    }
    return [
        _open(name, _current_source(source, config["output_dir"], run.path), config, device)
        for name, source in sources.items()
    ]


def _current_source(source: str, output_dir: str, path: Path) -> str:
    """Return the path of a model after its run's folder was moved; other sources are unchanged."""
    model = Path(source)
    return str(path / model.relative_to(output_dir)) if model.is_relative_to(output_dir) else source


def _open(name: str, source: str, config: dict[str, Any], device: str) -> Player:
    dtype = dtype_of(config.get("precision", "bf16"))
    model, tokenizer = load_model(
        source, dtype=dtype, device=device, trust_remote_code=bool(config.get("trust_remote_code"))
    )
    set_chat_template(tokenizer, config.get("chat_template") or "plain")
    try:
        tokens = token_bytes(tokenizer)
    except OpaqueTokenizer:  # only the spaces between its tokens are lost
        tokens = [tokenizer.decode([token]).encode() for token in range(len(tokenizer))]
    return Player(name, source, model, tokenizer, tokens)
