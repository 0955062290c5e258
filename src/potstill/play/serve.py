"""Serve the playground of a run on a local port, without requests to other hosts.

Gradio's telemetry is off, and a content security policy allows the browser only this server.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.errors import ConfigError
from potstill.play.players import Player, open_players
from potstill.ports import bound_socket

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio compiles its templates to functions in the browser, which needs unsafe-eval.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def play(
    run_dir: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Serve the playground of a finished run until it is interrupted.

    Raises: ConfigError if Gradio is missing or the port is taken, before a model is opened; the
    errors of `open_players`.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("play needs the package gradio: pip install 'potstill[play]'")
    bound_socket(host, port).close()
    players = open_players(run_dir, device=device)
    server = serve(players, title=Path(run_dir).resolve().name, host=host, port=port)
    print(f"playground: {server.local_url} (Ctrl+C ends it)", flush=True)
    server.block_thread()


def serve(players: Sequence[Player], *, title: str, host: str, port: int) -> Any:
    """Start the server in its own thread; it has ``local_url`` and ``close()``."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio
    from starlette.middleware import Middleware

    from potstill.play.page import make_page

    page = make_page(players, title)
    theme = gradio.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
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
        theme=theme,
        css_paths=Path(__file__).parent / "page.css",
        app_kwargs={"middleware": [Middleware(_ContentSecurityPolicy)]},
    )
    return page


class _ContentSecurityPolicy:
    """Add `POLICY` to every response of the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], header]
            await send(message)

        await self.app(scope, receive, send_with_policy)
