"""Open a teacher, store its head, and run the server of `server.py`."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from pathlib import Path

from potstill.errors import ConfigError
from potstill.models import ModelOpener
from potstill.ports import bound_socket
from potstill.teachers.capture import template_hashes
from potstill.teachers.cards import open_over_cards
from potstill.teachers.connection import TOKEN_VARIABLE
from potstill.teachers.server import make_app
from potstill.teachers.stored_head import store_head

KEEP_ALIVE_SECONDS = 600
"""A step may take long: a connection that is closed meanwhile is a needless failure."""


def serve(teacher: str, opener: ModelOpener, *, host: str, port: int) -> None:
    """Serve until interrupted.

    Raises: ConfigError for a port in use, or an address of other machines without a token, before
    the model is opened; as `ModelOpener`.
    """
    import uvicorn

    token = os.environ.get(TOKEN_VARIABLE, "").strip() or None
    if token is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: other machines can reach it; set a token in {TOKEN_VARIABLE} "
            "(the same for potstill distill), or serve at 127.0.0.1"
        )
    with bound_socket(host, port) as listening:
        model, tokenizer = open_over_cards(teacher, opener)
        model.eval().requires_grad_(False)
        with tempfile.TemporaryDirectory(prefix="potstill-serve-") as folder:
            facts = store_head(Path(folder), model, tokenizer, teacher)
            facts |= {"teacher": teacher, **template_hashes(tokenizer)}
            app = make_app(model, Path(folder), facts, token)
            host, port = listening.getsockname()[:2]
            print(f"{teacher} at http://{host}:{port} (Ctrl+C ends it)", flush=True)
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_SECONDS
            )
            uvicorn.Server(config).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
