"""Test the server engine with `transformers serve`, killed and restarted during the run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from potstill.generation import AnswerStore, Sampling, ServerEngine, requests

COUNT = 300


class RealServer:
    """A server process that can be killed and restarted at the same address."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        executable = str(Path(sys.executable).parent / "transformers")
        command = [executable, "serve", str(self.model), "--port", str(self.port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", "--host", "127.0.0.1"],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def wait(self) -> None:
        for _ in range(240):
            try:
                urllib.request.urlopen(self.url + "/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(self.log.read_text()[-2000:])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def real_server(tmp_path: Path, model_folder: Callable[..., Path]) -> Iterator[RealServer]:
    if not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    server = RealServer(model_folder(), tmp_path / "server.log")
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_request_is_answered_once_when_the_server_is_killed_and_restarted(
    real_server: RealServer, tmp_path: Path
) -> None:
    sampling = Sampling(max_new_tokens=8)
    prompts = [[{"role": "user", "content": f"the rain {i}"}] for i in range(COUNT)]
    wanted = list(requests(prompts, sampling, {}))
    settings = {"concurrency": 8, "patience_seconds": 120}
    engine = ServerEngine(real_server.url, str(real_server.model), sampling, **settings)
    killed = threading.Event()

    def kill_and_restart() -> None:
        real_server.kill()
        time.sleep(2)
        real_server.start()

    with AnswerStore(tmp_path / "out", {}) as store:
        for unit in engine.answer([request] for request in wanted):
            store.add(unit)
            if len(store) == COUNT // 3 and not killed.is_set():
                killed.set()
                restart = threading.Thread(target=kill_and_restart)
                restart.start()
        restart.join()
    text = (tmp_path / "out" / "answers" / "00000.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    assert sorted(line["key"] for line in lines) == sorted(request.key for request in wanted)
    assert all(line["text"] or not line["cut_off"] for line in lines)
