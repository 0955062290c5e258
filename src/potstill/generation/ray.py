"""Teachers on many machines by Ray Data: ``pip install 'potstill[ray]'``. Scheduling, and what is done when one dies, is Ray's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from potstill.errors import ConfigError, PotstillError
from potstill.generation.engine import Answer, Engine, Request, Unit

WINDOW = 16
"""Units a worker is given at a time: Ray knows them all from the start, and a million prompts are too many to know."""


class RayEngine:
    """Answers with ``workers`` actors, each holding the engine that ``make`` makes there.

    ``gpus``: of each actor, which sees no others; without it one, if the machines have any. Raises: ConfigError if Ray is not
    installed; PotstillError if ``make`` raises one.
    """

    def __init__(self, make: Callable[[], Engine], *, workers: int = 1, gpus: float | None = None) -> None:
        try:
            import ray.data
        except ImportError:
            raise ConfigError("--engine ray needs the package ray: pip install 'potstill[ray]'") from None
        ray.init(ignore_reinit_error=True)  # joins the machines that RAY_ADDRESS names, or is alone on this one
        self.ray, self.make, self.workers = ray, make, workers
        self.gpus = min(1.0, ray.cluster_resources().get("GPU", 0)) if gpus is None else gpus
        about = ray.remote(num_gpus=self.gpus)(_about)
        try:
            self.identity, self.unit_size = ray.get(about.remote(make))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PotstillError):
                raise error.cause from error
            raise

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """Units in the order in which workers finish them."""
        remaining = iter(units)
        while window := list(itertools.islice(remaining, WINDOW * self.workers)):
            units_as_text = [{"unit": json.dumps([asdict(request) for request in unit])} for unit in window]
            answered = self.ray.data.from_items(units_as_text, override_num_blocks=len(window)).map_batches(
                _Worker, fn_constructor_args=(self.make,), batch_size=1, concurrency=self.workers, num_gpus=self.gpus
            )
            for row in answered.iter_rows():
                yield [Answer(**answer) for answer in json.loads(row["answers"])]


class _Worker:
    """An actor: an engine that answers one unit at a time."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.engine = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        units = [[Request(**request) for request in json.loads(unit)] for unit in batch["unit"]]
        return {"answers": [json.dumps([answer.as_row() for answer in answers]) for answers in self.engine.answer(units)]}


def _about(make: Callable[[], Engine]) -> tuple[dict[str, Any], int]:
    engine = make()
    return engine.identity, engine.unit_size
