"""Ask a server over HTTP, and ask again while it restarts."""

from __future__ import annotations

import os
import ssl
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import tenacity

from potstill.errors import ServerError
from potstill.processes import print_main

TOKEN_VARIABLE = "POTSTILL_TOKEN"
IDENTITY = "x-potstill-teacher"
"""The header in which every reply names the teacher that made it."""
PATIENCE_SECONDS = 300.0
"""How long a server that does not answer is asked again."""
RETRIED = (429, 502, 503, 504)
NOT_OURS = "not a server of potstill serve; check the address"


class _Unavailable(Exception):
    """No answer; another attempt may have one."""


@dataclass(frozen=True)
class ServerKind:
    """What is known of the servers that a connection is made for."""

    command: str
    """Starts one."""
    not_this: str
    """Says what to do if a server is of another kind."""
    token_variables: tuple[str, ...]
    """The environment variables that may hold its token; the first that is set is used."""
    error_text: Callable[[httpx.Response], str | None]
    """Return what a reply that is no success says; None if it is not of this kind of server."""


def _own_error(reply: httpx.Response) -> str | None:
    return " ".join(reply.text.split())[:200] if IDENTITY in reply.headers else None


POTSTILL = ServerKind("potstill serve", NOT_OURS, (TOKEN_VARIABLE,), _own_error)


class Connection:
    """A connection to a server at ``url``. Every reply must have ``identity``, if set."""

    def __init__(self, url: str, patience_seconds: float, *, kind: ServerKind = POTSTILL) -> None:
        self.url, self.patience_seconds, self.kind = url, patience_seconds, kind
        self.identity: str | None = None
        self._client = _client(kind.token_variables)
        weakref.finalize(self, self._client.close)

    def once(self, method: str, path: str) -> bytes:
        """Return the content of a reply. Raises: ServerError."""
        try:
            return self._request(method, path).content
        except _Unavailable as error:
            raise ServerError(
                f"{self.url}: {error}; start it with {self.kind.command}, or check the address"
            ) from None

    def patiently(self, method: str, path: str, body: bytes | None = None) -> bytes:
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
                f"{self.url}: refuses the token (status {reply.status_code}); set "
                f"{self.kind.token_variables[0]} to that of the server"
            )
        if reply.status_code in RETRIED:
            raise _Unavailable(f"status {reply.status_code}")
        if self.identity not in (None, reply.headers.get(IDENTITY)):
            raise ServerError(
                f"{self.url}: now serves another teacher; serve the former one, and run the "
                "same command again"
            )
        if not reply.is_success:
            text = self.kind.error_text(reply)
            if text is None:
                raise ServerError(f"{self.url}: {self.kind.not_this} (status {reply.status_code})")
            raise ServerError(f"{self.url}{path}: status {reply.status_code}: {text}")
        return reply


def _client(token_variables: tuple[str, ...]) -> httpx.Client:
    variable = next((name for name in token_variables if os.environ.get(name)), token_variables[0])
    token = os.environ.get(variable, "").strip()
    if not (token.isascii() and token.isprintable()):  # httpx's own error would print it
        raise ServerError(f"{variable}: holds a character that no token may have; set it")
    try:
        return httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            follow_redirects=False,  # a redirect must not carry the token to another server
            timeout=httpx.Timeout(600, connect=10),
            verify=ssl.create_default_context(),
        )
    except (ImportError, ValueError, httpx.InvalidURL) as error:  # from the proxy variables
        raise ServerError(f"unusable proxy ({error}); correct or unset ALL_PROXY") from error
