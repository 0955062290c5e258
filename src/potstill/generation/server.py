"""A teacher behind any OpenAI-compatible endpoint (vLLM, `transformers serve`, llama.cpp), many requests in flight.

Errors are of two kinds. A server that is busy (429), stumbling (5xx) or away is asked again, each time after a longer pause, until
``patience_seconds`` have passed without an answer. A prompt that it refuses (beyond its context, say) gets an empty answer. What
asking again cannot mend (no such model, a wrong key, a reply that is not the protocol's) ends the run with one line; everything
answered by then is kept.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from potstill.errors import ServerError
from potstill.generation.engine import Answer, Request, Unit
from potstill.generation.sampling import Sampling

KEY_VARIABLE = "POTSTILL_API_KEY"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
WORTH_ASKING_AGAIN = {408, 409, 425, 429}
REFUSALS, MOST_REFUSED = {400, 413, 422}, 100
"""Of a prompt; if none of so many is answered, the server refuses all."""


class ServerEngine:
    """Answers with the model ``teacher`` of the server at ``url``, up to ``concurrency`` requests at a time.

    The key, where one is needed, is read from the environment (``POTSTILL_API_KEY``, else ``OPENAI_API_KEY``) and written nowhere.
    Raises: ServerError if there is no server, if it refuses the key, or if it does not serve ``teacher``; from `answer`, as above.
    """

    unit_size = 1

    def __init__(
        self,
        url: str,
        teacher: str,
        sampling: Sampling,
        *,
        concurrency: int = 32,
        patience_seconds: float = 300,
        nats: bool = False,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ServerError(f"{url}: not a server's address; give one like http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.teacher, self.sampling, self.concurrency, self.nats = teacher, sampling, concurrency, nats
        self.patience_seconds = patience_seconds
        self._stop = threading.Event()
        served = self._served()
        if teacher not in served:
            raise ServerError(
                f"{self.url}: serves {', '.join(served) or 'no model'}, not {teacher}; name the teacher as the server does"
            )
        self._is_vllm = served[teacher] == "vllm"
        self.identity = {"teacher": teacher, "revision": None, "tokenizer": None, "chat_template": None}

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """Each answer as it arrives, in any order; last, empty ones to prompts that the server refused while it answered others."""
        answered, refused = 0, list[RefusedPrompt]()
        for one in self._results(request for unit in units for request in unit):
            if isinstance(one, Answer):
                answered += 1
                yield [one]
                continue
            refused.append(one)
            if not answered and len(refused) == MOST_REFUSED:
                raise one
        if refused and not answered:
            raise refused[0]
        if refused:
            print(f"{len(refused)} prompts refused, and kept as empty answers; the first: {refused[0]}", flush=True)
        yield from ([Answer(one.key, "", False, None, None)] for one in refused)

    def _results(self, requests: Iterable[Request]) -> Iterator[Answer | RefusedPrompt]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            flying: set[Future[Answer | RefusedPrompt]] = set()
            try:
                for request in requests:
                    flying.add(pool.submit(self._answer, request))
                    if len(flying) == self.concurrency:
                        landed, flying = wait(flying, return_when=FIRST_COMPLETED)
                        yield from _arrived(landed)
                while flying:
                    landed, flying = wait(flying, return_when=FIRST_COMPLETED)
                    yield from _arrived(landed)
            finally:  # an error, or a caller that wants no more: nobody waits out their pauses
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._stop.clear()

    def _answer(self, request: Request) -> Answer | RefusedPrompt:
        body: dict[str, Any] = {
            "model": self.teacher,
            "messages": request.messages,
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": request.seed % 2**31,
        }
        if self.nats:
            body["logprobs"] = True
        if self._is_vllm:  # which would sample by the model's own generation config where it is not told
            body |= {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        try:
            return self._read(request, self._insist("/chat/completions", body))
        except RefusedPrompt as error:
            error.key = request.key
            return error

    def _read(self, request: Request, reply: Any) -> Answer:
        try:
            choice = reply["choices"][0]
            text, reason = (choice["message"]["content"] or "").strip(), choice["finish_reason"]
            nats = [-token["logprob"] for token in choice["logprobs"]["content"]] if self.nats else []
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            shown = json.dumps(reply, ensure_ascii=False)[:120]
            raise ServerError(
                f"{self.url}: a reply that is not a chat completion ({error!r} in {shown}); a server is needed that "
                "speaks OpenAI's protocol" + (" and gives logprobs" if self.nats else "")
            ) from error
        return Answer(request.key, text, reason == "length", choice.get("token_ids"), sum(nats) / len(nats) if nats else None)

    def _insist(self, path: str, body: dict[str, Any]) -> Any:
        """The reply, asked for again and again while that may help. Raises: ServerError."""
        pause, since = FIRST_PAUSE_SECONDS, None
        while True:
            try:
                return self._call(path, body)
            except _Retry as error:
                since = since or time.monotonic()  # from the first failure on: a slow answer is not an absent server
                left = self.patience_seconds - (time.monotonic() - since)
                if left <= 0 or self._stop.is_set():
                    raise ServerError(
                        f"{self.url}: {error} for {self.patience_seconds:g} seconds; the same command goes on"
                    ) from None
                # Half of it by chance, so that requests which failed together do not come back together.
                self._stop.wait(min(left, error.pause_seconds or pause * random.uniform(0.5, 1)))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _served(self) -> dict[str, str]:
        """The models that the server names, and who it says made them."""
        try:
            reply = self._call("/models", timeout=10)
            return {model["id"]: model.get("owned_by", "") for model in reply["data"]}
        except _Retry as error:
            raise ServerError(f"{self.url}: {error}; start the server, or check --server") from None
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.url}/models: not a list of models; check that --server is OpenAI-compatible") from error

    def _call(self, path: str, body: dict[str, Any] | None = None, timeout: float = 600) -> Any:
        """One request. Raises: ServerError, or _Retry where asking again may help."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            call = urllib.request.Request(self.url + path, data, headers)
            with _OPENER.open(call, timeout=timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self._explained(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(f"no answer ({getattr(error, 'reason', None) or error!r})") from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerError(f"{self.url}{path}: answered {content[:60]!r}, which is not JSON; check --server") from error

    def _explained(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in WORTH_ASKING_AGAIN or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            return _Retry(f"status {error.code}", float(after) if after.isdigit() else None)
        if error.code in (401, 403):
            return ServerError(f"{self.url}: refuses the key (status {error.code}); set {KEY_VARIABLE} in the environment")
        said = " ".join(error.read(300).decode(errors="replace").split())
        kind = RefusedPrompt if error.code in REFUSALS else ServerError
        return kind(f"{self.url}: status {error.code}: {said[:200]}")


def _arrived(landed: Iterable[Future[Answer | RefusedPrompt]]) -> Iterator[Answer | RefusedPrompt]:
    """What has arrived, and only then the first failure among it."""
    failed = [future for future in landed if future.exception()]
    yield from (future.result() for future in landed if future not in failed)
    for future in failed:
        future.result()


class RefusedPrompt(ServerError):
    """The server answers, but not this: a prompt beyond its context, say."""

    key = ""
    """The request's."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever a redirect points."""

    def redirect_request(self, *_: Any) -> None:
        """A redirect is an error."""


_OPENER = urllib.request.build_opener(_NoRedirect)


class _Retry(Exception):
    """A failure that may pass."""

    def __init__(self, message: str, pause_seconds: float | None = None) -> None:
        super().__init__(message)
        self.pause_seconds = pause_seconds
