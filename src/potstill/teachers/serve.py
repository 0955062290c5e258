"""Open a teacher, store its head, and run the server of `server.py`."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from pathlib import Path
from typing import Protocol

from potstill.errors import ConfigError
from potstill.models import ModelOpener, dtype_of
from potstill.teachers.capture import template_hashes
from potstill.teachers.cards import open_over_cards
from potstill.teachers.connection import TOKEN_VARIABLE
from potstill.teachers.server import make_app
from potstill.teachers.stored_head import store_head

KEEP_ALIVE_SECONDS = 600
"""A step may take long: a connection that is closed meanwhile is a needless failure."""


class ServeSettings(Protocol):
    """The settings of `potstill serve`."""

    @property
    def teacher(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...


def serve(settings: ServeSettings) -> None:
    """Serve until interrupted.

    Raises: ConfigError for a port in use, or an address of other machines without a token, before
    the model is opened; as `ModelOpener`.
    """
    import uvicorn

    token = os.environ.get(TOKEN_VARIABLE, "").strip() or None
    if token is None and not _is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host}: other machines can reach it; set a token in {TOKEN_VARIABLE} "
            "(the same for potstill distill), or serve at 127.0.0.1"
        )
    with _bound(settings.host, settings.port) as listening:
        opener = ModelOpener(
            device=settings.device,
            dtype=dtype_of(settings.precision),
            chat_template=settings.chat_template,
            trust_remote_code=settings.trust_remote_code,
        )
        model, tokenizer = open_over_cards(settings.teacher, opener)
        model.eval().requires_grad_(False)
        with tempfile.TemporaryDirectory(prefix="potstill-serve-") as folder:
            facts = store_head(Path(folder), model, tokenizer, settings.teacher)
            facts |= {"teacher": settings.teacher, **template_hashes(tokenizer)}
            app = make_app(model, Path(folder), facts, token)
            host, port = listening.getsockname()[:2]
            print(f"{settings.teacher} at http://{host}:{port} (Ctrl+C ends it)", flush=True)
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_SECONDS
            )
            uvicorn.Server(config).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound. Raises: ConfigError."""
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        if listening is not None:
            listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"port {port} of {host}: {reason}; give another --port, or another --host"
        ) from error
    return listening
