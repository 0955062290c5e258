"""Generate answers on many machines with Ray Data, which schedules and restarts the workers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

from potstill.errors import ConfigError, PotstillError
from potstill.generation.engine import Answer, Engine, Request, Unit

UNITS_PER_WORKER = 16
"""Number of units in one Ray data set, which holds all of its units in memory."""


class RayEngine:
    """Answer with `workers` actors. Each one creates its engine by `make`.

    Each actor gets `gpus` GPUs; by default one if the machines have GPUs, else none.
    Raises: ConfigError if Ray is not installed; any PotstillError of `make`.
    """

    def __init__(
        self, make: Callable[[], Engine], *, workers: int = 1, gpus: float | None = None
    ) -> None:
        try:
            import ray.data
        except ImportError:
            message = "--engine ray needs the package ray: pip install 'potstill[ray]'"
            raise ConfigError(message) from None
        # Join the cluster at RAY_ADDRESS, or start a local one.
        ray.init(ignore_reinit_error=True)
        self.ray, self.make, self.workers = ray, make, workers
        self.gpus = min(1.0, ray.cluster_resources().get("GPU", 0)) if gpus is None else gpus
        describe = ray.remote(num_gpus=self.gpus)(_describe)
        try:
            self.identity, self.unit_size = ray.get(describe.remote(make))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PotstillError):
                raise error.cause from error
            raise

    def answer(self, units: Iterable[Unit]) -> Iterator[list[Answer]]:
        """Yield the answers of each unit, in the order in which workers finish them."""
        remaining = iter(units)
        while group := list(itertools.islice(remaining, UNITS_PER_WORKER * self.workers)):
            items = [{"units": json.dumps([asdict(request) for request in unit])} for unit in group]
            answered = self.ray.data.from_items(items, override_num_blocks=len(group)).map_batches(
                _Worker,
                fn_constructor_args=(self.make,),
                batch_size=1,
                concurrency=self.workers,
                num_gpus=self.gpus,
            )
            for row in answered.iter_rows():
                yield [Answer(**answer) for answer in json.loads(row["answers"])]


class _Worker:
    """A Ray actor whose engine answers one unit at a time."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.engine = make()

    def __call__(self, batch: dict[str, Sequence[str]]) -> dict[str, list[str]]:
        units = [[Request(**request) for request in json.loads(unit)] for unit in batch["units"]]
        answered = self.engine.answer(units)
        return {"answers": [json.dumps([one.as_row() for one in answers]) for answers in answered]}


def _describe(make: Callable[[], Engine]) -> tuple[dict[str, str | None], int]:
    engine = make()
    return engine.identity, engine.unit_size
