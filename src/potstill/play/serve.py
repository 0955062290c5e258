"""A run's playground on a port of this machine, which asks nothing of anybody.

Gradio's telemetry is off, and a content security policy forbids the browser whatever is not this server's own.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError
from potstill.play.players import Player, open_players

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # Gradio makes functions of its templates


def play(
    run_dir: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Serve the playground of a finished run until it is interrupted.

    Raises: ConfigError if Gradio is missing or the port is taken, before any model is opened; as `open_players`.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("play needs the package gradio: pip install 'potstill[play]'")
    _check_port(host, port)
    server = serve(
        open_players(run_dir, device=device),
        title=Path(run_dir).resolve().name,
        host=host,
        port=port,
    )
    print(f"playground: {server.local_url} (Ctrl+C ends it)", flush=True)
    server.block_thread()


def serve(players: Sequence[Player], *, title: str, host: str, port: int) -> Any:
    """The page's server, in a thread of its own: ``local_url`` says where, ``close()`` ends it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio
    from starlette.middleware import Middleware

    from potstill.play.page import make_page

    page = make_page(players, title)
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=Path(__file__).parent / "page.css",
        app_kwargs={"middleware": [Middleware(_OwnThingsOnly)]},
    )
    return page


class _OwnThingsOnly:
    """Puts `POLICY` on whatever the server answers."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                ]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ):
            pass
    except (OSError, OverflowError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = (
            "is taken"
            if taken
            else f"cannot be served ({getattr(error, 'strerror', None) or error})"
        )
        raise ConfigError(
            f"port {port} of {host} {reason}; give another --port, or another --host"
        ) from error
