"""A capture on two Ray workers has the shards of a capture in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import conversations
from potstill.errors import ConfigError
from potstill.models import ModelOpener
from potstill.teachers import capture_conversations

FLOAT = ModelOpener(device="cpu", dtype="float32")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep", ["states", "states8", "sparse"])
def test_the_shards_are_those_of_one_process(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # the default starves workers on a busy machine
    ray = pytest.importorskip("ray", reason="pip install 'potstill[ray]'")
    monkeypatch.setattr("potstill.teachers.capture.SHARD_CONVERSATIONS", 4)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    teacher = str(model_folder(seed=1))
    manifests = []
    try:
        for engine in ("local", "ray"):
            folder = tmp_path / engine
            for count in (6, 19):  # the second call adds to the first
                capture_conversations(
                    teacher,
                    conversations(count),
                    folder,
                    keep=keep,
                    max_length=512,
                    opener=FLOAT,
                    engine=engine,
                    progress=False,
                )
            manifests.append(json.loads((folder / "manifest.json").read_text()))
    finally:
        ray.shutdown()
    local, by_ray = manifests
    assert local["shards"] == by_ray["shards"]  # with checksums
    assert len(local["shards"]) > 3
    assert local.keys() == by_ray.keys()


def test_an_unknown_engine_and_no_workers_are_refused(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"max_length": 512, "opener": FLOAT}
    for settings, says in (({"engine": "spark"}, "local, ray"), ({"workers": 0}, "at least 1")):
        with pytest.raises(ConfigError, match=says):
            capture_conversations("teacher", [], tmp_path / "no", **settings, **more)
    assert not (tmp_path / "no").exists()
