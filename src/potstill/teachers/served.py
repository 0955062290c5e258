"""Use a teacher that `potstill serve` offers at a URL: its head once, then hidden states."""

from __future__ import annotations

import dataclasses
import hashlib
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

from potstill.errors import ConfigError, ServerError
from potstill.losses import Head
from potstill.models import ModelOpener
from potstill.models.gguf import cache_folder
from potstill.models.heads import model_inputs
from potstill.processes import print_main
from potstill.protocols import Batch, Tokenizer
from potstill.teachers.stored_head import HEAD, TOKENIZER, read_head
from potstill.teachers.targets import LossSettings, StatesTarget

TOKEN_VARIABLE = "POTSTILL_TOKEN"
PATIENCE_SECONDS = 300.0
"""How long a server that does not answer is asked again."""
RETRIED = (429, 502, 503, 504)


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
        self.facts = self._facts()
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
        chosen = torch.zeros_like(batch["labels"], dtype=torch.bool)
        chosen[:, :-1] = batch["labels"][:, 1:] != -100
        columns = cast(dict[str, Tensor], {**model_inputs(batch), "chosen": chosen})
        body = save({name: column.cpu().contiguous() for name, column in columns.items()})
        hidden = self._states(body)
        if hidden.shape != (int(chosen.sum()), self.head.weight.shape[1]):
            raise ServerError(
                f"{self.url}: answered with states of shape {tuple(hidden.shape)} for "
                f"{int(chosen.sum())} tokens; is a proxy between?"
            )
        return StatesTarget(hidden.to(device), self._head_on(device))

    def require(self, rows: Iterable[dict[str, Any]], loss: LossSettings | None = None) -> None:
        """Accept any conversations that fit into a request: the model reads all of them."""

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
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self.url}: not a server of potstill serve; check the address"
            ) from error
        return facts

    def _downloaded(self) -> Path:
        """Return the cached folder with head and tokenizer, downloaded once for each teacher."""
        key = hashlib.sha256(repr(sorted(_identity(self.facts).items())).encode()).hexdigest()[:16]
        folder = cache_folder() / "served" / key
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
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Unavailable),
            wait=tenacity.wait_random_exponential(0.2, 10, min=0.1),
            stop=tenacity.stop_after_delay(self.patience_seconds),
            before_sleep=self._note,
            reraise=True,
        )
        try:
            reply: httpx.Response = retrying(self._request_same, method, path, body)
        except _Unavailable as error:
            raise ServerError(
                f"{self.url}: {error} for {self.patience_seconds:g} seconds; start the server, and "
                "run the same command again to continue"
            ) from None
        return reply.content

    def _note(self, state: tenacity.RetryCallState) -> None:
        self._is_away = True
        if state.attempt_number == 1:
            print_main(f"note: {self.url} does not answer; asking again")

    _is_away = False

    def _request_same(self, method: str, path: str, body: bytes | None) -> httpx.Response:
        """Send a request; after an interruption, first make sure that the teacher is the same."""
        if self._is_away:
            found = self._request("GET", "/teacher").json()
            if _identity(found) != _identity(self.facts):
                raise ServerError(
                    f"{self.url}: now serves another teacher ({found.get('teacher')}); serve "
                    f"{self.facts['teacher']} as before, and run the same command again"
                )
            self._is_away = False
        return self._request(method, path, body)

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
        if not reply.is_success:
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


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same for the targets to be the same."""
    names = ("weights", "dtype", "tokenizer", "chat_template", "files")
    return {name: facts.get(name) for name in names} | {"head": facts.get("head", {}).get("sha256")}


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
