"""Compute the shards of a capture on many machines with Ray Data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from potstill.errors import ConfigError, ModelError, PotstillError
from potstill.models import ModelOpener
from potstill.teachers.local import LocalTeacher
from potstill.teachers.shard_maker import Encoded, ShardMaker
from potstill.teachers.stored_head import weights_hash

SHARDS_PER_WORKER = 4
"""Shards in one Ray data set, whose results are in Ray's memory until they are written."""


def ray_or_refuse() -> Any:
    """Return Ray, joined to the cluster at RAY_ADDRESS or started here. Raises: ConfigError."""
    try:
        import ray.data
    except ImportError:
        message = "--engine ray needs the package ray: pip install 'potstill[ray]'"
        raise ConfigError(message) from None
    ray.init(ignore_reinit_error=True)
    return ray


def ray_shards(
    shards: Iterable[list[Encoded]],
    maker: ShardMaker,
    source: str,
    opener: ModelOpener,
    weights: str,
    *,
    workers: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each shard, in the order in which ``workers`` actors finish them.

    ``weights`` identifies the teacher's weights (`weights_hash`), which each actor compares.
    Raises: ConfigError if Ray is not installed; ModelError for other weights.
    """
    ray = ray_or_refuse()
    wants_gpu = opener.device != "cpu"
    gpus = min(1.0, ray.cluster_resources().get("GPU", 0)) if wants_gpu else 0
    remaining = iter(shards)
    while group := list(itertools.islice(remaining, SHARDS_PER_WORKER * workers)):
        items = [{"rows": json.dumps([_plain(row) for row in rows])} for rows in group]
        made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Worker,
            fn_constructor_args=(maker, source, opener, weights),
            batch_size=1,
            concurrency=workers,
            num_gpus=gpus,
        )
        try:
            for row in made.iter_rows():
                yield load(row["shard"])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, PotstillError):
                raise cause from error
            raise


class _Worker:
    """A Ray actor with its own copy of the teacher."""

    def __init__(self, maker: ShardMaker, source: str, opener: ModelOpener, weights: str) -> None:
        model = opener.model(source)
        if weights_hash(model) != weights:
            raise ModelError(
                f"{source}: another worker has other weights of this name; give all machines the "
                "same model"
            )
        self.maker, self.teacher = maker, LocalTeacher(model)

    def __call__(self, batch: dict[str, Sequence[str]]) -> dict[str, list[bytes]]:
        shards = [self.maker.make(self.teacher, json.loads(rows)) for rows in batch["rows"]]
        contiguous = [{name: one.contiguous() for name, one in shard.items()} for shard in shards]
        return {"shard": [save(shard) for shard in contiguous]}


def _plain(row: Encoded) -> dict[str, list[int]]:
    return {name: list(row[name]) for name in ("input_ids", "labels")}
