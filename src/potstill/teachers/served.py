"""Use a teacher that `potstill serve` offers at a URL: its head once, then hidden states."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from potstill.data import IGNORED, BatchLayout
from potstill.data.batch_rows import batch_rows
from potstill.errors import ConfigError, ModelError, ServerError
from potstill.losses import Head
from potstill.models import ModelOpener
from potstill.models.gguf import cache_folder
from potstill.models.heads import MODEL_INPUTS
from potstill.models.vocabulary import highest_id
from potstill.protocols import Batch, Tokenizer
from potstill.teachers.ahead import RequestsAhead
from potstill.teachers.connection import NOT_OURS, PATIENCE_SECONDS, Connection
from potstill.teachers.stored_head import HEAD, TOKENIZER, read_head
from potstill.teachers.targets import LossSettings, StatesTarget

FORMAT = 1


class ServedTeacher:
    """Ask a server for hidden states. It survives a restart of the server with the same teacher.

    Raises: ServerError if the server is none of potstill, refuses the token or does not answer.
    """

    model: None = None

    def __init__(self, url: str, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.url = url.rstrip("/")
        self.tokenizer: Tokenizer | None = None
        self.connection = Connection(self.url, patience_seconds)
        self.facts = self._facts()
        self.connection.identity = self.identity
        self.dtype: torch.dtype = getattr(torch, self.facts["dtype"])
        self.folder = self._downloaded()
        self._heads: dict[torch.device, Head] = {}
        post = functools.partial(self.connection.patiently, "POST", "/states")
        self._ahead = RequestsAhead(post)

    @functools.cached_property
    def head(self) -> Head:
        """The LM head, read when it is needed: the tokenizer alone does not need it."""
        again = f"delete {self.folder} and run again"
        return read_head(self.folder, self.facts["head"], again=again)[0]

    @property
    def identity(self) -> str:
        """Digits that are the same for the same weights, dtype, tokenizer and template."""
        return identity(self.facts)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the head."""
        return len(self.head)

    def targets(self, batch: Batch) -> StatesTarget:
        """Return hidden states ``[N, H]`` at the supervised positions, and the head."""
        device = batch["labels"].device
        hidden = self._states(self._ahead.take(self._request_body(batch)))
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        if hidden.shape != (count, self.head.weight.shape[1]):
            raise ServerError(
                f"{self.url}: answered with states of shape {tuple(hidden.shape)} for "
                f"{count} tokens; is a proxy between?"
            )
        return StatesTarget(hidden.to(device), self._head_on(device))

    def prefetch(self, batch: Batch) -> None:
        """Request the states of a batch for which `targets` will be called soon."""
        self._ahead.announce(self._request_body(batch))

    def require(self, rows: Iterable[dict[str, Any]], loss: LossSettings | None = None) -> None:
        """Check that the teacher has all token ids. Raises: ModelError."""
        prefix = "teacher_" if highest_id(rows, "teacher_input_ids") >= 0 else ""
        highest = highest_id(rows, f"{prefix}input_ids")
        if highest >= self.facts["embedding_rows"]:
            raise ModelError(
                f"the data has the token id {highest}, and {self.facts['teacher']} at {self.url} "
                f"has only {self.facts['embedding_rows']} rows in its vocabulary; serve a teacher "
                "that has all tokens of its tokenizer"
            )

    def _request_body(self, batch: Batch) -> bytes:
        if not self.facts["reads_packed"] and "attention_mask" not in batch:
            batch = BatchLayout(0, packed=False)(list(batch_rows(batch)))
        chosen = torch.zeros_like(batch["labels"], dtype=torch.bool)
        chosen[:, :-1] = batch["labels"][:, 1:] != IGNORED
        ids = batch["input_ids"]
        # The id of padding is the student's: the teacher may not have it. Nothing follows padding.
        is_last = chosen.flip(1).cumsum(1).flip(1) == 0
        ids = ids.masked_fill(is_last & (ids >= self.facts["embedding_rows"]), 0)
        columns = cast(
            dict[str, Tensor],
            {
                **{name: column for name, column in batch.items() if name in MODEL_INPUTS},
                "input_ids": ids,
                "chosen": chosen,
            },
        )
        return save({name: column.cpu().contiguous() for name, column in columns.items()})

    def _states(self, content: bytes) -> Tensor:
        try:
            return load(content)["hidden"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ServerError(f"{self.url}: its answer is not safetensors ({error})") from error

    def _facts(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads(self.connection.once("GET", "/teacher"))
            if facts["kind"] != "teacher":
                raise KeyError
            served = facts["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url}: {NOT_OURS}") from error
        if served != FORMAT:
            raise ServerError(
                f"{self.url}: serves in format {served}, and this version reads format {FORMAT}; "
                "use the same version of potstill on both machines"
            )
        return facts

    def _downloaded(self) -> Path:
        """Return the cached folder with head and tokenizer, downloaded once for each teacher."""
        folder = cache_folder() / "served" / self.identity
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as name:
            unfinished = Path(name) / "teacher"
            for file in self.facts["files"]:
                parts = Path(file).parts
                if file != HEAD and (parts[0] != TOKENIZER or len(parts) != 2 or ".." in parts):
                    raise ServerError(f"{self.url}: offers a file {file!r}; nothing was written")
                (unfinished / file).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / file).write_bytes(self.connection.patiently("GET", f"/files/{file}"))
            try:
                os.replace(unfinished, folder)
            except OSError:
                if not folder.is_dir():  # another process may have been first
                    raise
        return folder

    def _head_on(self, device: torch.device) -> Head:
        if device not in self._heads:
            self._heads[device] = self.head.to(device)
        return self._heads[device]


def is_url(source: str) -> bool:
    """Return whether a source is the address of a server."""
    return source.startswith(("http://", "https://"))


def open_served(source: str, opener: ModelOpener) -> ServedTeacher:
    """Open the teacher of a server."""
    teacher = ServedTeacher(source)
    teacher.tokenizer = _tokenizer(teacher, opener)
    return teacher


def open_served_tokenizer(source: str, opener: ModelOpener) -> Tokenizer:
    """Open the tokenizer of a server's teacher."""
    return _tokenizer(ServedTeacher(source), opener)


def _tokenizer(teacher: ServedTeacher, opener: ModelOpener) -> Tokenizer:
    # The server's template is in the files of its tokenizer.
    if opener.chat_template not in (None, "plain"):
        given = Path(str(opener.chat_template)).expanduser()
        own = dataclasses.replace(opener, chat_template=None).tokenizer(teacher.folder / TOKENIZER)
        if given.is_file() and given.read_text(encoding="utf-8") != own.chat_template:
            raise ConfigError(
                f"{teacher.url}: serves with another chat template than {given}; give the same "
                "--chat-template to potstill serve"
            )
    return opener.tokenizer(teacher.folder / TOKENIZER)


def identity(facts: dict[str, Any]) -> str:
    """Return 16 digits that are the same if the targets are the same."""
    names = ("weights", "dtype", "tokenizer", "chat_template", "files", "head")
    known = {name: facts.get(name) for name in names}
    if facts.get("quantization"):
        known["quantization"] = facts["quantization"]
    same = json.dumps(known, sort_keys=True)
    return hashlib.sha256(same.encode()).hexdigest()[:16]
