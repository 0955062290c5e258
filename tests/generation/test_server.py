"""Test the server engine with a scripted server; test_real_server.py has a real one."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from potstill.errors import ServerError
from potstill.generation import Request, Sampling, ServerEngine, requests
from potstill.generation import server as server_module

SAMPLING = Sampling(max_new_tokens=5, seed=1)
Reply = tuple[int, Any, dict[str, str]]


class Server:
    """State of a server that answers the nth call with a prompt by `reply(body, nth)`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.received_keys: list[str | None] = []
        self.in_flight = self.max_in_flight = 0
        self.owner = "us"
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, nth: answered(body)
        self.models: Any = None
        self.lock = threading.Lock()


def answered(body: dict[str, Any], reason: str = "stop", **more: Any) -> Reply:
    text = "on " + body["messages"][-1]["content"]
    choice = {"message": {"content": text}, "finish_reason": reason, **more}
    return 200, {"choices": [choice]}, {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, str]]:
    monkeypatch.setattr(server_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def send(self, status: int, value: Any, headers: dict[str, str]) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            state.received_keys.append(self.headers.get("Authorization"))
            models = [{"id": "teacher", "owned_by": state.owner}]
            self.send(*(state.models or (200, {"data": models}, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with state.lock:
                state.in_flight += 1
                state.max_in_flight = max(state.max_in_flight, state.in_flight)
                state.calls[prompt] += 1
                state.bodies.append(body)
                nth = state.calls[prompt]
            reply = state.reply(body, nth)
            with state.lock:
                state.in_flight -= 1
            self.send(*reply)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield state, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def units(count: int = 6) -> list[list[Request]]:
    prompts = [[{"role": "user", "content": f"{i}"}] for i in range(count)]
    return [[request] for request in requests(prompts, SAMPLING, {})]


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


def ask(url: str, count: int = 6, **more: Any) -> dict[str, Any]:
    engine = ServerEngine(url, "teacher", SAMPLING, **{"patience_seconds": 5, **more})
    return {answer.key: answer for unit in engine.answer(units(count)) for answer in unit}


def test_each_prompt_is_answered_once_with_several_requests_in_flight(
    server: tuple[Server, str],
) -> None:
    state, url = server
    barrier = threading.Barrier(4)
    state.reply = lambda body, nth: (barrier.wait(5), answered(body))[1]
    answers = ask(url, 12, concurrency=4)
    assert sorted(answer.text for answer in answers.values()) == sorted(
        f"on {i}" for i in range(12)
    )
    assert set(state.calls.values()) == {1}
    assert state.max_in_flight == 4
    body = state.bodies[0]
    expected = {"max_tokens": 5, "temperature": 0.7, "top_p": 0.95, "model": "teacher"}
    assert {name: body[name] for name in expected} == expected
    assert len({body["seed"] for body in state.bodies}) == 12


@pytest.mark.parametrize(
    ("status", "headers"), [(429, {"Retry-After": "0"}), (429, {}), (500, {}), (503, {})]
)
def test_transient_errors_are_retried(
    server: tuple[Server, str], status: int, headers: dict[str, str]
) -> None:
    state, url = server
    busy = (status, {"error": "busy"}, headers)
    state.reply = lambda body, nth: busy if nth < 3 else answered(body)
    assert len(ask(url)) == 6
    assert set(state.calls.values()) == {3}


def test_retries_end_after_the_patience(server: tuple[Server, str]) -> None:
    state, url = server
    state.reply = lambda body, nth: (503, {}, {})
    message = r"status 503 for 0\.1 seconds; run the same command again to continue"
    with pytest.raises(ServerError, match=message):
        ask(url, patience_seconds=0.1)


def test_a_pause_of_retry_after_seconds_ends_when_the_caller_stops(
    server: tuple[Server, str],
) -> None:
    state, url = server
    busy = (503, {}, {"Retry-After": "30"})
    state.reply = lambda body, nth: busy if prompt_of(body) == "1" else answered(body)
    start_seconds = time.monotonic()
    engine = ServerEngine(url, "teacher", SAMPLING, concurrency=2)
    with closing(engine.answer(units(3))) as answers:
        assert [next(answers)[0].text, next(answers)[0].text] == ["on 0", "on 2"]
        time.sleep(0.2)
        assert state.calls["1"] == 1
    assert time.monotonic() - start_seconds < 10


def test_answers_received_before_an_error_are_yielded(server: tuple[Server, str]) -> None:
    state, url = server
    missing = (404, {"error": "no such model"}, {})
    state.reply = lambda body, nth: missing if prompt_of(body) == "4" else answered(body)
    engine = ServerEngine(url, "teacher", SAMPLING, concurrency=1)
    texts = []
    with pytest.raises(ServerError, match="status 404: .*no such model"):
        texts.extend(answer.text for unit in engine.answer(units()) for answer in unit)
    # pytest.raises discards what extend received, so count the calls.
    assert state.calls["3"] == 1
    assert state.calls["5"] == 0


def test_the_key_comes_from_the_environment_and_is_never_printed(
    server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, url = server
    ask(url, 1)
    monkeypatch.setenv("POTSTILL_API_KEY", "sesame\n")
    ask(url, 1)
    assert state.received_keys == [None, "Bearer sesame"]
    monkeypatch.setenv("POTSTILL_API_KEY", "sesame\nopen")
    with pytest.raises(ServerError, match="^POTSTILL_API_KEY: holds a character that no key may"):
        ask(url, 1)


def test_token_ids_and_logprobs_of_vllm_are_kept(server: tuple[Server, str]) -> None:
    state, url = server
    state.owner = "vllm"
    logprobs = {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}
    state.reply = lambda body, nth: answered(body, "length", token_ids=[7, 8], logprobs=logprobs)
    (answer,) = ask(url, 1, nats=True).values()
    assert (answer.teacher_ids, answer.nats_per_token, answer.cut_off) == ([7, 8], 1.5, True)
    assert state.bodies[0]["return_token_ids"]


@pytest.mark.parametrize(
    ("models", "line"),
    [
        ((401, {}, {}), "refuses the key .*POTSTILL_API_KEY"),
        ((200, {"data": [{"id": "other"}]}, {}), "serves other, not teacher"),
        ((200, {"data": []}, {}), "serves no model, not teacher"),
        ((200, b"<html>", {}), "which is not JSON"),
        ((200, ["x"], {}), "not a list of models"),
        ((302, {}, {"Location": "/v1/models"}), "status 302"),
    ],
)
def test_an_unsuitable_server_is_an_error_at_once(
    server: tuple[Server, str], models: Any, line: str
) -> None:
    state, url = server
    state.models = models
    with pytest.raises(ServerError, match=line):
        ask(url)
    assert len(state.received_keys) == 1  # no retry, and no redirect followed


@pytest.mark.parametrize(
    "reply",
    [
        {},
        [],
        {"choices": []},
        {"choices": [{"message": {}}]},
        {"choices": [{"message": {"content": "a"}}]},
        {"choices": [{"message": {"content": [{"text": "a"}]}, "finish_reason": "stop"}]},
        b"{",
    ],
)
def test_an_invalid_reply_is_an_error(server: tuple[Server, str], reply: Any) -> None:
    state, url = server
    state.reply = lambda body, nth: (200, reply, {})
    with pytest.raises(ServerError, match="not a chat completion|not JSON"):
        ask(url)


def test_a_missing_server_is_an_error_at_once() -> None:
    message = r"no answer \(.*refused.*start the server, or check --server"
    with pytest.raises(ServerError, match=message):
        ask("http://127.0.0.1:9")
    with pytest.raises(ServerError, match="not a server's address"):
        ask("localhost:8000")


def test_a_refused_prompt_gets_an_empty_answer_and_refusing_all_is_an_error(
    server: tuple[Server, str],
) -> None:
    state, url = server
    too_long = (400, {"error": "too long"}, {})
    state.reply = lambda body, nth: too_long if prompt_of(body) == "4" else answered(body)
    given = {key: answer.text for key, answer in ask(url, concurrency=2).items()}
    asked = [request.key for [request] in units()]
    assert given.keys() == set(asked)
    assert [given[key] == "" for key in asked] == [False, False, False, False, True, False]
    state.reply = lambda body, nth: (400, {"error": "no"}, {})
    with pytest.raises(ServerError, match="status 400"):
        ask(url, concurrency=2)
