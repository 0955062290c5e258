"""`potstill generate`: prompts → the teacher's answers, kept as they come → a data set, filtered and described.

Like the pipeline this is the application: it knows recipes, prints, and leaves every idea to potstill.generation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from potstill.config import GenerateRecipe
from potstill.data import read_prompts
from potstill.data.chat_templates import ensure_chat_template
from potstill.errors import ConfigError, DataError
from potstill.generation import (
    AnswerStore,
    Engine,
    LocalEngine,
    Request,
    Sampling,
    ServerEngine,
    answered,
    counts_table,
    dataset_card,
    filters,
    requests,
    write_dataset,
)
from potstill.generation.card import WHAT
from potstill.generation.dataset import CHOICES, CONVERSATIONS, Choose
from potstill.generation.filters import Filter
from potstill.generation.keys import digest
from potstill.generation.store import parse_answer
from potstill.models import dtype_of, load_model, load_tokenizer, locate
from potstill.run_folder import write_whole

__all__ = ["CONVERSATIONS", "generate", "make_dataset", "standard_filters"]


def generate(recipe: GenerateRecipe) -> Path:
    """Let the teacher answer, go on with an interrupted run, filter. Returns the file of conversations.

    Raises: ConfigError, DataError, ModelError, RunFolderError, ServerError.
    """
    sampling = Sampling(**{name: getattr(recipe, name) for name in Sampling.__dataclass_fields__})
    chosen, choose = _filters(recipe), _choice(recipe)
    prompts = _PromptFile(recipe.prompts)
    if not sum(1 for _ in prompts):  # all of them: a broken row is found before any work is done
        raise DataError(f'{recipe.prompts}: no prompt there; each line holds one, as {{"prompt": …}} or {{"messages": …}}')
    engine = _engine(recipe, sampling)
    settings = {} if recipe.server else {"precision": recipe.precision, "batch_size": recipe.batch_size}
    return make_dataset(
        Path(recipe.output_dir).expanduser(),
        prompts,
        engine,
        sampling,
        filters=chosen,
        choose=choose,
        similarity=recipe.similarity,
        made_with={"engine": "server" if recipe.server else recipe.engine, **settings, "likeliest": recipe.choose == "likeliest"},
    )


def make_dataset(
    folder: Path,
    prompts: Iterable[list[dict[str, Any]]],
    engine: Engine,
    sampling: Sampling,
    *,
    filters: dict[str, Filter],
    choose: Choose | None = None,
    similarity: float = 0.8,
    made_with: dict[str, Any] | None = None,
) -> Path:
    """A data set of ``engine``'s answers to ``prompts`` (read more than once) in ``folder``. Returns its file of conversations.

    ``made_with``: what else decides the answers. Raises: RunFolderError if the folder's answers were made otherwise; DataError if
    no answer is left.
    """

    def wanted() -> Iterator[Request]:
        return requests(prompts, sampling, engine.identity)

    keys = [request.key for request in wanted()]
    decides = {**engine.identity, **(made_with or {}), **asdict(sampling), "prompts": digest(keys)}
    with AnswerStore(folder, decides) as store:
        for name in store.damaged:
            print(f"{name}: damaged or gone; its answers are made again", flush=True)
        _answer_all(wanted(), len(keys), engine, store, folder)
        store.seal()
        rows = (answered(request, parse_answer(row), sampling) for request, row in zip(wanted(), store.read(keys), strict=True))
        counts = write_dataset(folder, rows, filters, choose=choose, similarity=similarity)
        store.note(answers=len(keys), counts=counts)
    write_whole(folder / "README.md", dataset_card(decides, counts))
    print(counts_table(counts), flush=True)
    return folder / CONVERSATIONS


def standard_filters(*, keep: Collection[str] = ()) -> dict[str, Filter]:
    """The filters that every data set passes, by reason, but for those in ``keep``."""
    every = {
        "empty": filters.empty,
        "cut_off": filters.cut_off,
        "repetition_loop": filters.repetition_loop,
        "refusal": filters.refusal,
    }
    return {name: is_bad for name, is_bad in every.items() if name not in keep}


def _answer_all(wanted: Iterator[Request], count: int, engine: Engine, store: AnswerStore, folder: Path) -> None:
    """Ask for whole units, those that are there left out: a unit that lost one answer has lost all."""
    if count == len(store):
        return
    print(f"{count - len(store)} answers to go into {folder}", flush=True)
    cut = iter(lambda: list(itertools.islice(wanted, engine.unit_size)), [])
    missing = (unit for unit in cut if not all(request.key in store for request in unit))
    with tqdm(total=count, initial=len(store), unit="answer", desc="  answering") as progress:
        for answers in engine.answer(missing):
            store.add(answers)
            progress.update(len(answers))


def _engine(recipe: GenerateRecipe, sampling: Sampling) -> Engine:
    if recipe.server:
        return ServerEngine(
            recipe.server,
            recipe.teacher,
            sampling,
            concurrency=recipe.batch_size,
            patience_seconds=recipe.patience,
            nats=recipe.choose == "likeliest",
        )
    dtype_of(recipe.precision)  # refused before anything is opened
    makers = {"local": _local, "vllm": _vllm, "ray": _local, "ray-vllm": _vllm}
    if recipe.engine not in makers:
        raise ConfigError(f"engine {recipe.engine!r} is not known; use {', '.join(makers)}, or give --server")
    make = functools.partial(makers[recipe.engine], recipe, sampling)
    if not recipe.engine.startswith("ray"):
        return make()
    from potstill.generation.ray import RayEngine

    return RayEngine(make, workers=recipe.workers, gpus=0 if recipe.device == "cpu" else None)


def _local(recipe: GenerateRecipe, sampling: Sampling) -> Engine:
    model, tokenizer = load_model(
        recipe.teacher, dtype=dtype_of(recipe.precision), device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    return LocalEngine(
        model,
        _with_template(tokenizer, recipe),
        sampling,
        source=recipe.teacher,
        batch_size=recipe.batch_size,
        unit_size=(2 if model.device.type == "cpu" else 8) * recipe.batch_size,  # what a kill may cost: minutes on either
        nats=recipe.choose == "likeliest",
    )


def _vllm(recipe: GenerateRecipe, sampling: Sampling) -> Engine:
    from potstill.generation.vllm import VllmEngine

    return VllmEngine(
        recipe.teacher,
        locate(recipe.teacher),
        _with_template(load_tokenizer(recipe.teacher, trust_remote_code=recipe.trust_remote_code), recipe),
        sampling,
        dtype=dtype_of(recipe.precision),
        trust_remote_code=recipe.trust_remote_code,
        nats=recipe.choose == "likeliest",
    )


def _with_template(tokenizer: Any, recipe: GenerateRecipe) -> Any:
    ensure_chat_template(tokenizer, recipe.chat_template)
    return tokenizer


def _filters(recipe: GenerateRecipe) -> dict[str, Filter]:
    keep = {name.strip() for name in recipe.keep.split(",") if name.strip()}
    unknown = keep - WHAT.keys()
    if unknown:
        raise ConfigError(f"--keep {min(unknown)}: no such reason; reasons are {', '.join(list(WHAT)[1:])}")
    if not 0 < recipe.similarity <= 1:
        raise ConfigError(f"similarity {recipe.similarity}: above 0 and at most 1; 1 drops no near duplicates")
    chosen = standard_filters() | filters.length(recipe.min_characters, recipe.max_characters)
    if recipe.script:
        chosen["wrong_script"] = filters.wrong_script(recipe.script)
    if recipe.language:
        chosen["wrong_language"] = filters.wrong_language(recipe.language)
    if recipe.held_out:
        chosen["contaminated"] = filters.contaminated(row["messages"][-1]["content"] for row in read_prompts(recipe.held_out))
    if recipe.filter:
        says_keep = filters.users_function(recipe.filter)
        chosen["user"] = lambda row: not says_keep(row)
    return {name: is_bad for name, is_bad in chosen.items() if name not in keep}


def _choice(recipe: GenerateRecipe) -> Choose | None:
    if recipe.choose in CHOICES:
        return CHOICES[recipe.choose]
    if ".py:" not in recipe.choose:
        raise ConfigError(f"choose {recipe.choose!r} is not known; use {', '.join(CHOICES)} or FILE.py:FUNCTION")
    return filters.users_function(recipe.choose)


class _PromptFile:
    """The conversations of a file of prompts, read from it each time."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return (row["messages"] for row in read_prompts(self.source))
