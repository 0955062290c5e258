"""Make a data set: prompts → stored answers of the teacher → filtered conversations and a card."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from potstill.data.conversations import Conversation
from potstill.errors import PotstillError
from potstill.generation import filters
from potstill.generation.card import counts_table, dataset_card
from potstill.generation.dataset import CONVERSATIONS, Choose, write_dataset
from potstill.generation.engine import Engine, Request
from potstill.generation.filters import Filter
from potstill.generation.keys import answered, digest, requests
from potstill.generation.store import AnswerStore, parse_answer
from potstill.processes import print_main
from potstill.progress import Progress
from potstill.run_folder import write_whole
from potstill.sampling import Sampling


def make_dataset(
    folder: Path,
    prompts: Iterable[Conversation | list[dict[str, Any]]],
    engine: Engine,
    sampling: Sampling,
    *,
    drop: dict[str, Filter],
    choose: Choose | None = None,
    similarity: float = 0.8,
    made_with: dict[str, Any] | None = None,
) -> Path:
    """Write a data set of ``engine``'s answers to ``prompts`` in ``folder``; return its file.

    ``prompts`` are read more than once. ``drop``: filters by the reason to drop an answer.
    ``made_with``: other settings that decide the answers. Raises: RunFolderError if the folder's
    answers were made with other settings; DataError if no answer is left.
    """

    def wanted() -> Iterator[Request]:
        return requests(prompts, sampling, engine.identity)

    keys = [request.key for request in wanted()]
    settings = {**engine.identity, **(made_with or {}), **asdict(sampling), "prompts": digest(keys)}
    with _removed_if_unanswered(folder), AnswerStore(folder, settings) as store:
        for name in store.damaged:
            print_main(f"{name}: damaged or missing; its answers are made again")
        _answer_all(wanted(), len(keys), engine, store, folder)
        store.seal()
        rows = (
            answered(request, parse_answer(row), sampling)
            for request, row in zip(wanted(), store.read(keys), strict=True)
        )
        counts = write_dataset(folder, rows, drop, choose=choose, similarity=similarity)
        store.note(answers=len(keys), counts=counts)
    write_whole(folder / "README.md", dataset_card(settings, counts))
    print_main(counts_table(counts))
    return folder / CONVERSATIONS


@contextlib.contextmanager
def _removed_if_unanswered(folder: Path) -> Iterator[None]:
    """Remove a new folder on an error before the first answer: other settings can then use it."""
    is_new = not folder.exists()
    try:
        yield
    except PotstillError:
        if is_new and not any(file.stat().st_size for file in folder.glob("answers/*.jsonl")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def standard_filters(*, keep: Collection[str] = ()) -> dict[str, Filter]:
    """Return the default filters by reason, without the reasons in ``keep``."""
    standard = {
        "empty": filters.empty,
        "cut_off": filters.cut_off,
        "repetition_loop": filters.repetition_loop,
        "refusal": filters.refusal,
    }
    return {name: is_bad for name, is_bad in standard.items() if name not in keep}


def _answer_all(
    wanted: Iterator[Request], count: int, engine: Engine, store: AnswerStore, folder: Path
) -> None:
    """Request and store the units that are not stored yet."""
    if count == len(store):
        return
    print_main(f"{count - len(store)} answers to make for {folder}")
    units = iter(lambda: list(itertools.islice(wanted, engine.unit_size)), [])
    missing = (unit for unit in units if not all(request.key in store for request in unit))
    with Progress("answering", count, unit="answers", done=len(store), leave=True) as progress:
        for answers in engine.answer(missing):
            store.add(answers)
            progress.update(len(answers))
