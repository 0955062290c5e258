"""A server of our own, in a thread, that can be told to misbehave; what a real one does is in test_real_server.py."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from potstill.errors import ServerError
from potstill.generation import Sampling, ServerEngine, requests
from potstill.generation import server as server_module

SAMPLING = Sampling(max_new_tokens=5, seed=1)
Reply = tuple[int, Any, dict[str, str]]


class Server:
    """``reply(body, nth)``: what the nth call with that prompt is answered."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.flying = self.most_flying = 0
        self.owner = "us"
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, nth: answered(body)
        self.models: Any = None
        self.lock = threading.Lock()


def answered(body: dict[str, Any], reason: str = "stop", **more: Any) -> Reply:
    text = "on " + body["messages"][-1]["content"]
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason, **more}]}, {}


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
            state.keys.append(self.headers.get("Authorization"))
            self.send(*(state.models or (200, {"data": [{"id": "teacher", "owned_by": state.owner}]}, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with state.lock:
                state.flying += 1
                state.most_flying = max(state.most_flying, state.flying)
                state.calls[prompt] += 1
                state.bodies.append(body)
                nth = state.calls[prompt]
            reply = state.reply(body, nth)
            with state.lock:
                state.flying -= 1
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


def ask(url: str, count: int = 6, **more: Any) -> dict[str, Any]:
    engine = ServerEngine(url, "teacher", SAMPLING, **{"patience_seconds": 5, **more})
    units = [[request] for request in requests([[{"role": "user", "content": f"{i}"}] for i in range(count)], SAMPLING, {})]
    return {answer.key: answer for unit in engine.answer(units) for answer in unit}


def test_every_prompt_is_answered_once_and_many_are_in_flight(server: tuple[Server, str]) -> None:
    state, url = server
    barrier = threading.Barrier(4)
    state.reply = lambda body, nth: (barrier.wait(5), answered(body))[1]
    answers = ask(url, 12, concurrency=4)
    assert sorted(answer.text for answer in answers.values()) == sorted(f"on {i}" for i in range(12))
    assert set(state.calls.values()) == {1}
    assert state.most_flying == 4
    body = state.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["model"]) == (5, 0.7, 0.95, "teacher")
    assert len({body["seed"] for body in state.bodies}) == 12


@pytest.mark.parametrize(("status", "headers"), [(429, {"Retry-After": "0"}), (429, {}), (500, {}), (503, {})])
def test_errors_that_pass_are_asked_again(server: tuple[Server, str], status: int, headers: dict[str, str]) -> None:
    state, url = server
    state.reply = lambda body, nth: (status, {"error": "busy"}, headers) if nth < 3 else answered(body)
    assert len(ask(url)) == 6
    assert set(state.calls.values()) == {3}


def test_patience_has_an_end(server: tuple[Server, str]) -> None:
    state, url = server
    state.reply = lambda body, nth: (503, {}, {})
    with pytest.raises(ServerError, match=r"status 503 for 0\.1 seconds; run the same command again to continue"):
        ask(url, patience_seconds=0.1)


def test_answers_that_arrived_before_an_error_are_given_out(server: tuple[Server, str]) -> None:
    state, url = server
    state.reply = lambda body, nth: (
        (404, {"error": "no such model"}, {}) if body["messages"][0]["content"] == "4" else answered(body)
    )
    engine = ServerEngine(url, "teacher", SAMPLING, concurrency=1)
    units = [[request] for request in requests([[{"role": "user", "content": f"{i}"}] for i in range(6)], SAMPLING, {})]
    seen = []
    with pytest.raises(ServerError, match="status 404: .*no such model"):
        seen.extend(answer.text for unit in engine.answer(units) for answer in unit)
    # Whatever pytest.raises cut short, four answers had been given.
    assert state.calls["3"] == 1
    assert state.calls["5"] == 0


def test_the_key_comes_from_the_environment(server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    state, url = server
    ask(url, 1)
    monkeypatch.setenv("POTSTILL_API_KEY", "sesame")
    ask(url, 1)
    assert state.keys == [None, "Bearer sesame"]


def test_what_vllm_adds_is_asked_for_and_kept(server: tuple[Server, str]) -> None:
    state, url = server
    state.owner = "vllm"
    state.reply = lambda body, nth: answered(
        body, "length", token_ids=[7, 8], logprobs={"content": [{"logprob": -1.0}, {"logprob": -2.0}]}
    )
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
        ((302, {}, {"Location": "http://127.0.0.1:1/"}), "status 302"),
    ],
)
def test_a_server_that_will_not_do_is_refused_at_once(server: tuple[Server, str], models: Any, line: str) -> None:
    state, url = server
    state.models = models
    with pytest.raises(ServerError, match=line):
        ask(url)


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
def test_a_reply_that_is_not_the_protocols_is_shown(server: tuple[Server, str], reply: Any) -> None:
    state, url = server
    state.reply = lambda body, nth: (200, reply, {})
    with pytest.raises(ServerError, match="not a chat completion|not JSON"):
        ask(url)


def test_without_a_server_there_is_one_line_at_once() -> None:
    with pytest.raises(ServerError, match=r"no answer \(.*refused.*start the server, or check --server"):
        ask("http://127.0.0.1:9")
    with pytest.raises(ServerError, match="not a server's address"):
        ask("localhost:8000")


def test_a_refused_prompt_is_an_empty_answer_and_a_server_that_refuses_all_an_error(server: tuple[Server, str]) -> None:
    state, url = server
    state.reply = lambda body, nth: (400, {"error": "too long"}, {}) if body["messages"][0]["content"] == "4" else answered(body)
    asked = list(requests([[{"role": "user", "content": f"{i}"}] for i in range(6)], SAMPLING, {}))
    given = {one.key: one.text for [one] in ServerEngine(url, "teacher", SAMPLING, concurrency=2).answer([[one] for one in asked])}
    assert given.keys() == {one.key for one in asked}
    assert [given[one.key] == "" for one in asked] == [False, False, False, False, True, False]
    state.reply = lambda body, nth: (400, {"error": "no"}, {})
    with pytest.raises(ServerError, match="status 400"):
        list(ServerEngine(url, "teacher", SAMPLING, concurrency=2).answer([[one] for one in asked]))
