"""Use a teacher that `potstill serve` offers at a URL: its head once, then hidden states."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import ssl
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import httpx
import tenacity
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from potstill.data import IGNORED, BatchLayout
from potstill.errors import ConfigError, ModelError, ServerError
from potstill.losses import Head
from potstill.models import ModelOpener
from potstill.models.gguf import cache_folder
from potstill.models.heads import model_inputs
from potstill.models.vocabulary import highest_id
from potstill.processes import print_main
from potstill.protocols import Batch, Tokenizer
from potstill.teachers.captured import batch_rows
from potstill.teachers.stored_head import HEAD, TOKENIZER, read_head
from potstill.teachers.targets import LossSettings, StatesTarget

TOKEN_VARIABLE = "POTSTILL_TOKEN"
IDENTITY = "x-potstill-teacher"
"""The header in which every reply names the teacher that made it."""
PATIENCE_SECONDS = 300.0
"""How long a server that does not answer is asked again."""
RETRIED = (429, 502, 503, 504)
FORMAT = 1
NOT_OURS = "not a server of potstill serve; check the address"


class _Unavailable(Exception):
    """No answer; another attempt may have one."""


class ServedTeacher:
    """Ask a server for hidden states. It survives a restart of the server with the same teacher.

    Raises: ServerError if the server is none of potstill, refuses the token or does not answer.
    """

    model: None = None

    def __init__(self, url: str, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.url, self.patience_seconds = url.rstrip("/"), patience_seconds
        self.tokenizer: Tokenizer | None = None
        self._client = _client(self.url)
        weakref.finalize(self, self._client.close)
        self._identity: str | None = None
        self.facts = self._facts()
        self._identity = identity(self.facts)
        self.dtype: torch.dtype = getattr(torch, self.facts["dtype"])
        self.folder = self._downloaded()
        self.head, _ = read_head(
            self.folder, self.facts["head"], again=f"delete {self.folder} and run again"
        )
        self._heads: dict[torch.device, Head] = {}

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the head."""
        return len(self.head)

    def targets(self, batch: Batch) -> StatesTarget:
        """Return hidden states ``[N, H]`` at the supervised positions, and the head."""
        device = batch["labels"].device
        hidden = self._states(self._request_body(batch))
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        if hidden.shape != (count, self.head.weight.shape[1]):
            raise ServerError(
                f"{self.url}: answered with states of shape {tuple(hidden.shape)} for "
                f"{count} tokens; is a proxy between?"
            )
        return StatesTarget(hidden.to(device), self._head_on(device))

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
            dict[str, Tensor], {**model_inputs(batch), "input_ids": ids, "chosen": chosen}
        )
        return save({name: column.cpu().contiguous() for name, column in columns.items()})

    def _states(self, body: bytes) -> Tensor:
        content = self._retried("POST", "/states", body)
        try:
            return load(content)["hidden"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ServerError(f"{self.url}: its answer is not safetensors ({error})") from error

    def _facts(self) -> dict[str, Any]:
        try:
            reply = self._request("GET", "/teacher")
        except _Unavailable as error:
            raise ServerError(
                f"{self.url}: {error}; start it with potstill serve, or check the address"
            ) from None
        try:
            facts: dict[str, Any] = reply.json()
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
        folder = cache_folder() / "served" / identity(self.facts)
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
                (unfinished / file).write_bytes(self._retried("GET", f"/files/{file}"))
            try:
                os.replace(unfinished, folder)
            except OSError:
                if not folder.is_dir():  # another process may have been first
                    raise
        return folder

    def _retried(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Return the content of a reply, asking again while the server does not answer."""

        def start_clock(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1:  # patience begins at the failure, not at the request
                state.start_time = state.outcome_timestamp or 0.0

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Unavailable),
            wait=tenacity.wait_random_exponential(0.2, 10, min=0.1),
            stop=tenacity.stop_after_delay(self.patience_seconds),
            after=start_clock,
            before_sleep=self._note,
            reraise=True,
        )
        try:
            reply: httpx.Response = retrying(self._request, method, path, body)
        except _Unavailable as error:
            raise ServerError(
                f"{self.url}: {error} for {self.patience_seconds:g} seconds; start the server, and "
                "run the same command again to continue"
            ) from None
        return reply.content

    def _note(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1:
            print_main(f"note: {self.url} does not answer; asking again")

    def _request(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        try:
            reply = self._client.request(method, self.url + path, content=body)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise _Unavailable(f"no answer ({str(error) or repr(error)})") from error
        if reply.status_code in (401, 403):
            raise ServerError(
                f"{self.url}: refuses the token (status {reply.status_code}); set {TOKEN_VARIABLE} "
                "to that of the server"
            )
        if reply.status_code in RETRIED:
            raise _Unavailable(f"status {reply.status_code}")
        if self._identity not in (None, reply.headers.get(IDENTITY)):
            raise ServerError(
                f"{self.url}: now serves another teacher; serve {self.facts['teacher']} as before, "
                "and run the same command again"
            )
        if not reply.is_success:
            if IDENTITY not in reply.headers:
                raise ServerError(f"{self.url}: {NOT_OURS} (status {reply.status_code})")
            text = " ".join(reply.text.split())[:200]
            raise ServerError(f"{self.url}{path}: status {reply.status_code}: {text}")
        return reply

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
    same = json.dumps({name: facts.get(name) for name in names}, sort_keys=True)
    return hashlib.sha256(same.encode()).hexdigest()[:16]


def _client(url: str) -> httpx.Client:
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not (token.isascii() and token.isprintable()):  # httpx's own error would print it
        raise ServerError(f"{TOKEN_VARIABLE}: holds a character that no token may have; set it")
    return httpx.Client(
        headers={"Authorization": f"Bearer {token}"} if token else {},
        follow_redirects=False,  # a redirect must not carry the token to another server
        timeout=httpx.Timeout(600, connect=10),
        verify=ssl.create_default_context(),
    )
