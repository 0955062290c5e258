"""Generate answers with a teacher behind an OpenAI-compatible endpoint (vLLM, llama.cpp, …).

Errors are of three kinds. A server that is busy (429), failing (5xx) or unreachable is retried
with growing pauses until `patience_seconds` have passed since the first failure. A prompt that the
server refuses, for example because it exceeds the context, gets an empty answer. Every other error
(unknown model, wrong key, invalid reply) ends the run; the answers received by then are kept.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx
import tenacity

from potstill.errors import ConfigError, ServerError
from potstill.generation.engine import Answer, Request, Unit
from potstill.processes import print_main
from potstill.sampling.sampler import Sampling

KEY_VARIABLE = "POTSTILL_API_KEY"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
RETRIED_STATUSES, REFUSED_PROMPT_STATUSES = {408, 409, 425, 429}, {400, 413, 422}
MAX_REFUSED_PROMPTS = 100
"""If the server refuses this many prompts and answers none, it is assumed to refuse all."""


class RefusedPrompt(ServerError):
    """The server works, but refuses the prompt of the request `key`."""

    key = ""


class ServerEngine:
    """Answer with the model `teacher` of the server at `url`, `concurrency` requests at a time.

    The API key is read from the environment (`POTSTILL_API_KEY`, else `OPENAI_API_KEY`).
    Raises: ServerError if no server answers, if it refuses the key or does not serve `teacher`.
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
        self.teacher, self.sampling, self.nats = teacher, sampling, nats
        self.concurrency, self.patience_seconds = concurrency, patience_seconds
        self._stop = threading.Event()
        self._client = _open_client(concurrency)
        weakref.finalize(self, self._client.close)
        owners = self._model_owners()
        if teacher not in owners:
            raise ServerError(
                f"{self.url}: serves {', '.join(owners) or 'no model'}, not {teacher}; "
                "name the teacher as the server does"
            )
        self._is_vllm = owners[teacher] == "vllm"
        unknown = dict.fromkeys(("revision", "tokenizer", "chat_template"))
        self.identity: dict[str, str | None] = {"teacher": teacher, **unknown}

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """Yield each answer as it arrives; at the end, empty answers to refused prompts.

        Raises: ServerError; RefusedPrompt if the server refuses every prompt.
        """
        answered, refused = 0, list[RefusedPrompt]()
        for result in self._results(request for unit in units for request in unit):
            if isinstance(result, Answer):
                answered += 1
                yield [result]
                continue
            refused.append(result)
            if not answered and len(refused) == MAX_REFUSED_PROMPTS:
                raise result
        if refused and not answered:
            raise refused[0]
        if refused:
            print_main(f"{len(refused)} prompts refused and kept as empty answers: {refused[0]}")
        yield from ([Answer(error.key, "", False, None, None)] for error in refused)

    def _results(self, requests: Iterable[Request]) -> Iterator[Answer | RefusedPrompt]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            pending: set[Future[Answer | RefusedPrompt]] = set()
            try:
                for request in requests:
                    pending.add(pool.submit(self._answer, request))
                    if len(pending) == self.concurrency:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        yield from _results_before_errors(done)
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from _results_before_errors(done)
            finally:  # after an error, or if the caller stops iterating, end all pauses at once
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._stop.clear()

    def _answer(self, request: Request) -> Answer | RefusedPrompt:
        if request.tools:
            raise ConfigError(
                "a prompt has tools, and a server returns tool calls in a form of its own; use "
                "--engine local or vllm, or prompts without tools"
            )
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
        if self._is_vllm:  # overrides the sampling defaults of the model's generation config
            body |= {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        try:
            return self._parse(request, self._request_with_retries("/chat/completions", body))
        except RefusedPrompt as error:
            error.key = request.key
            return error

    def _parse(self, request: Request, reply: Any) -> Answer:
        try:
            choice = reply["choices"][0]
            text, reason = (choice["message"]["content"] or "").strip(), choice["finish_reason"]
            tokens = choice["logprobs"]["content"] if self.nats else []
            nats = [-token["logprob"] for token in tokens]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            start = json.dumps(reply, ensure_ascii=False)[:120]
            raise ServerError(
                f"{self.url}: the reply is not a chat completion ({error!r} in {start}); use a "
                "server with OpenAI's protocol" + (" that returns logprobs" if self.nats else "")
            ) from error
        mean_nats = sum(nats) / len(nats) if nats else None
        return Answer(request.key, text, reason == "length", choice.get("token_ids"), mean_nats)

    def _request_with_retries(self, path: str, body: dict[str, Any]) -> Any:
        """Return the reply to one request. Raises: ServerError."""
        backoff = tenacity.wait_random_exponential(
            FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, min=FIRST_PAUSE_SECONDS / 2
        )

        def start_clock(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1:  # the time of the first failure, not of the request
                state.start_time = state.outcome_timestamp or 0.0

        def pause_seconds(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            pause = getattr(error, "retry_after_seconds", None) or backoff(state)
            return min(pause, self.patience_seconds - (state.seconds_since_start or 0.0))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TransientError),
            after=start_clock,
            wait=pause_seconds,
            stop=tenacity.stop_after_delay(self.patience_seconds)
            | tenacity.stop_when_event_set(self._stop),
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        try:
            return retrying(self._request, path, body)
        except _TransientError as error:
            raise ServerError(
                f"{self.url}: {error} for {self.patience_seconds:g} seconds; "
                "run the same command again to continue"
            ) from None

    def _model_owners(self) -> dict[str, str]:
        """Return the owner of each model that the server lists."""
        try:
            reply = self._request("/models", timeout_seconds=10)
            return {model["id"]: model.get("owned_by", "") for model in reply["data"]}
        except _TransientError as error:
            raise ServerError(f"{self.url}: {error}; start the server, or check --server") from None
        except (KeyError, TypeError) as error:
            raise ServerError(
                f"{self.url}/models: not a list of models; check that --server is OpenAI-compatible"
            ) from error

    def _request(
        self, path: str, body: dict[str, Any] | None = None, timeout_seconds: float = 600
    ) -> Any:
        """Send one request and return the JSON reply. Raises: ServerError, _TransientError."""
        method, url = "GET" if body is None else "POST", self.url + path
        try:
            response = self._client.request(method, url, json=body, timeout=timeout_seconds)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise _TransientError(f"no answer ({str(error) or repr(error)})") from error
        if not response.is_success:
            raise self._status_error(response)
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(
                f"{url}: answered {response.content[:60]!r}, which is not JSON; check --server"
            ) from error

    def _status_error(self, response: httpx.Response) -> Exception:
        status = response.status_code
        if status in RETRIED_STATUSES or status >= 500:
            seconds = response.headers.get("Retry-After", "")
            return _TransientError(f"status {status}", float(seconds if seconds.isdecimal() else 0))
        if status in (401, 403):
            return ServerError(f"{self.url}: refuses the key (status {status}); set {KEY_VARIABLE}")
        text = " ".join(response.text.split())[:200]
        kind = RefusedPrompt if status in REFUSED_PROMPT_STATUSES else ServerError
        return kind(f"{self.url}: status {status}: {text}; check --server and the settings")


class _TransientError(Exception):
    """A failure that a retry may fix."""

    def __init__(self, message: str, retry_after_seconds: float = 0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


def _open_client(concurrency: int) -> httpx.Client:
    key = (os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):  # httpx's own error would print the key
        raise ServerError(f"{KEY_VARIABLE}: holds a character that no key may have; set it again")
    try:
        return httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            follow_redirects=False,  # a redirect must not carry the key to another server
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            verify=ssl.create_default_context(),  # the system's certificates, not certifi's
        )
    except (ImportError, ValueError, httpx.InvalidURL) as error:  # from the proxy variables
        raise ServerError(f"unusable proxy ({error}); correct or unset ALL_PROXY") from error


def _results_before_errors(
    done: Iterable[Future[Answer | RefusedPrompt]],
) -> Iterator[Answer | RefusedPrompt]:
    failed = [future for future in done if future.exception()]
    yield from (future.result() for future in done if future not in failed)
    for future in failed:
        future.result()
