"""Use a teacher on vLLM: its most likely tokens at each position, and one cell for all others.

A source is ``vllm+http://HOST:PORT``, or with ``https``. After a question mark it can have

    top_k=64             tokens asked for; more than 20 need `vllm serve --max-logprobs`
    model=NAME           one of several that are served
    tokenizer=SOURCE     hub id or folder; without it, what the server says it serves

Nothing is stored: each pass over the data asks again.
"""

from __future__ import annotations

import functools
import json
import urllib.parse
from collections.abc import Iterable
from typing import Any

import httpx

from potstill.data.batch_rows import batch_rows
from potstill.errors import ConfigError, PotstillError, ServerError
from potstill.models import ModelOpener
from potstill.protocols import Batch, Tokenizer
from potstill.teachers.ahead import RequestsAhead
from potstill.teachers.connection import PATIENCE_SECONDS, Connection, ServerKind
from potstill.teachers.prompt_logprobs import Reply, check_texts, request_body
from potstill.teachers.targets import LossSettings
from potstill.teachers.top_k import TopKTarget

PREFIX = "vllm+"
TOP_K = 20
"""What vLLM gives unless it is started with another --max-logprobs."""
OPTIONS = ("top_k", "model", "tokenizer")


def is_vllm(source: str) -> bool:
    """Return whether a source is the address of a vLLM server."""
    return source.startswith((f"{PREFIX}http://", f"{PREFIX}https://"))


def open_vllm(source: str, opener: ModelOpener) -> VLLMTeacher:
    """Open the teacher of a vLLM server, and its tokenizer."""
    teacher = VLLMTeacher(source)
    teacher.tokenizer = teacher.open_tokenizer(opener)
    return teacher


def open_vllm_tokenizer(source: str, opener: ModelOpener) -> Tokenizer:
    """Open the tokenizer of a vLLM server's teacher."""
    return VLLMTeacher(source).open_tokenizer(opener)


class VLLMTeacher:
    """Ask a vLLM server for the most likely tokens. It survives a restart of the same server.

    Raises: ConfigError for an option that is not known; ServerError if the server is of another
    kind, refuses the token or does not answer.
    """

    model: None = None
    reads_new_text = False
    """Its targets are not whole distributions, which on-policy training needs."""

    def __init__(self, source: str, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        address = urllib.parse.urlsplit(source.removeprefix(PREFIX))
        options = _options(source, address.query)
        self.top_k = _top_k(source, options.get("top_k", str(TOP_K)))
        path = address.path.rstrip("/") or "/v1"
        self.url = f"{address.scheme}://{address.netloc}{path}"
        self.connection = Connection(self.url, patience_seconds, kind=VLLM)
        self.name, root = self._served(options.get("model"))
        self.tokenizer_source = options.get("tokenizer") or root
        self.tokenizer: Tokenizer | None = None
        self._texts_checked = False
        post = functools.partial(self.connection.patiently, "POST", "/completions")
        self._ahead = RequestsAhead(post)

    @property
    def vocabulary_rows(self) -> int:
        """Return the number of tokens of the tokenizer; the server does not tell that of rows."""
        assert self.tokenizer is not None
        return len(self.tokenizer)

    def targets(self, batch: Batch) -> TopKTarget:
        """Return the most likely tokens at the supervised positions. Raises: ServerError."""
        rows = list(batch_rows(batch))
        try:
            reply = Reply(self._ahead.take(self._body(batch)), rows, model=self.name)
            if not self._texts_checked and self.tokenizer is not None:
                check_texts(reply.texts(), self.tokenizer)
                self._texts_checked = True
            target = reply.target(top_k=self.top_k, vocabulary=self.vocabulary_rows)
        except ServerError as error:
            raise error if self.url in str(error) else ServerError(f"{self.url}: {error}") from None
        return target.to(batch["labels"].device)

    def prefetch(self, batch: Batch) -> None:
        """Request what `targets` will be asked for soon."""
        self._ahead.announce(self._body(batch))

    def require(self, rows: Iterable[dict[str, Any]], loss: LossSettings | None = None) -> None:
        """Accept all conversations. Raises: ConfigError for a loss that needs all logits."""
        if "teacher_input_ids" in next(iter(rows), {}):
            raise ConfigError(
                f"{PREFIX}{self.url}: gives the {self.top_k} most likely tokens; method cross "
                "needs the teacher's hidden states; use potstill serve, or --method text"
            )
        if loss is not None:
            TopKTarget.refuse(loss)

    def open_tokenizer(self, opener: ModelOpener) -> Tokenizer:
        """Open the teacher's tokenizer here. Raises: ConfigError if it cannot be opened."""
        try:
            return opener.tokenizer(self.tokenizer_source)
        except PotstillError as error:
            raise ConfigError(
                f"{PREFIX}{self.url}: the tokenizer of {self.name} ({error}); give a hub id or a "
                f"folder that this machine has: {PREFIX}{self.url}?tokenizer=SOURCE"
            ) from error

    def _body(self, batch: Batch) -> bytes:
        return request_body(list(batch_rows(batch)), model=self.name, top_k=self.top_k)

    def _served(self, wanted: str | None) -> tuple[str, str]:
        """Return the name of the served model, and where the server has it from."""
        try:
            models = json.loads(self.connection.once("GET", "/models"))["data"]
            served = {str(one["id"]): str(one.get("root") or one["id"]) for one in models}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.url}: {VLLM.not_this}") from error
        chosen = wanted or (next(iter(served)) if len(served) == 1 else "")
        if chosen not in served:
            raise ServerError(
                f"{self.url}: serves {', '.join(served) or 'no model'}"
                f"{f', not {wanted}' if wanted else ''}; choose one: "
                f"{PREFIX}{self.url}?model=NAME"
            )
        return chosen, served[chosen]


def _options(source: str, query: str) -> dict[str, str]:
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in OPTIONS:
            raise ConfigError(f"{source}: no option {name!r}; known are {', '.join(OPTIONS)}")
    return options


def _top_k(source: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{source}: top_k {text!r}: a number of tokens, so at least 1")
    return int(text)


def _error_text(reply: httpx.Response) -> str | None:
    """Return the message of an error, in the form of OpenAI, of older vLLM, or of its framework."""
    try:
        content = reply.json()
        content = content.get("error", content)
        message = content.get("message") or content["detail"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return None if message == "Not Found" else " ".join(str(message).split())[:300]


VLLM = ServerKind(
    command="vllm serve TEACHER",
    not_this="not a vLLM server with /v1/completions; check the address",
    token_variables=("POTSTILL_API_KEY", "OPENAI_API_KEY"),
    error_text=_error_text,
)
