"""Test the Ray engine on this machine with two workers, one of them killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import ConfigError
from potstill.generation import Answer, LocalEngine, Request, Sampling, requests

SAMPLING = Sampling(max_new_tokens=24)


class RecordingEngine(LocalEngine):
    """Records its process id as a file in `pids`."""

    pids: Path

    def answer_unit(self, unit: Any) -> list[Answer]:
        (self.pids / str(os.getpid())).touch()
        return super().answer_unit(unit)


class Make:
    def __init__(self, model: Path, pids: Path) -> None:
        self.model, self.pids = model, pids

    def __call__(self) -> LocalEngine:
        from potstill import load_model

        opened = load_model(self.model, dtype="float32")
        engine = RecordingEngine(*opened, SAMPLING, source="teacher", batch_size=4, unit_size=8)
        engine.pids = self.pids
        return engine


def raise_config_error() -> LocalEngine:
    raise ConfigError("no such teacher")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_no_answer_is_lost_when_a_worker_is_killed(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # the default starves workers on a busy machine
    ray = pytest.importorskip("ray", reason="pip install 'potstill[ray]'")
    from potstill.generation.ray import RayEngine

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    try:
        with pytest.raises(ConfigError, match="^no such teacher$"):
            RayEngine(raise_config_error)
        make = Make(model_folder(), tmp_path)
        prompts = [[{"role": "user", "content": f"the rain {i}"}] for i in range(320)]
        wanted = list(requests(prompts, SAMPLING, {}))
        units: list[list[Request]] = [wanted[start : start + 8] for start in range(0, 320, 8)]
        answers, killed = [], None
        for answered in RayEngine(make, workers=2).answer(units):
            answers += answered
            if killed is None:
                killed = int(next(tmp_path.iterdir()).name)
                os.kill(killed, signal.SIGKILL)
        assert len(list(tmp_path.iterdir())) >= 2
        expected = [answer for unit in units for answer in make().answer_unit(unit)]
        by_key = attrgetter("key")
        assert sorted(answers, key=by_key) == sorted(expected, key=by_key)
    finally:
        ray.shutdown()
