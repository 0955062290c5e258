"""Make the data set of `potstill generate`. Its recipe is in generate.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.commands.generate import GenerateRecipe
from potstill.data import read_prompts
from potstill.errors import ConfigError, DataError
from potstill.generation import Engine, LocalEngine, ServerEngine, filters
from potstill.generation.card import WHAT
from potstill.generation.dataset import CHOICES, Choose
from potstill.generation.filters import Filter
from potstill.generation.make import make_dataset, standard_filters
from potstill.models import ModelOpener, dtype_of, locate
from potstill.models.adapters import adapter_at
from potstill.models.chat_template import kept_date
from potstill.models.quantized import check_kind
from potstill.reading import Reading
from potstill.sampling import Sampling
from potstill.shards import made_with_at


def generate(recipe: GenerateRecipe) -> Path:
    """Answer the prompts, or continue an interrupted run; filter; return the conversations file.

    Raises: ConfigError, DataError, ModelError, RunFolderError, ServerError.
    """
    sampling = Sampling(**{name: getattr(recipe, name) for name in Sampling.__dataclass_fields__})
    chosen, choose = _filters(recipe), _choice(recipe)
    recipe = dataclasses.replace(recipe, template_date=_template_date(recipe))
    prompts = _PromptFile(recipe.prompts, recipe.reading)
    if not sum(1 for _ in prompts):  # reads all, to find a malformed row before any work is done
        need = 'each line holds one, as {"prompt": …} or {"messages": …}'
        raise DataError(f"{recipe.prompts}: no prompt there; {need}")
    _check_quantization(recipe)
    engine = _engine(recipe, sampling)
    made_with: dict[str, Any] = {"engine": "server" if recipe.server else recipe.engine}
    if not recipe.server:
        made_with |= {"precision": recipe.precision, "batch_size": recipe.batch_size}
        made_with["template_date"] = recipe.template_date
        if recipe.quantize_teacher:
            made_with["quantize_teacher"] = recipe.quantize_teacher
    made_with["likeliest"] = recipe.choose == "likeliest"
    return make_dataset(
        Path(recipe.output_dir).expanduser(),
        prompts,
        engine,
        sampling,
        drop=chosen,
        choose=choose,
        similarity=recipe.similarity,
        made_with=made_with,
    )


def _template_date(recipe: GenerateRecipe) -> str:
    """Return the date for chat templates: a data set that is continued later keeps its own."""
    stored = made_with_at(Path(recipe.output_dir).expanduser()).get("template_date")
    return kept_date(recipe.template_date, stored)


def _check_quantization(recipe: GenerateRecipe) -> None:
    check_kind(recipe.quantize_teacher)
    maker = "--server" if recipe.server else f"--engine {recipe.engine}"
    if recipe.quantize_teacher and (recipe.server or "vllm" in recipe.engine):
        raise ConfigError(
            f"--quantize-teacher {recipe.quantize_teacher}: {maker} opens the teacher itself; "
            "leave it out, and quantize the model there"
        )


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
    dtype_of(recipe.precision)  # raise before a model is opened
    makers = {"local": _local, "vllm": _vllm, "ray": _local, "ray-vllm": _vllm}
    if recipe.engine not in makers:
        known = ", ".join(makers)
        raise ConfigError(f"engine {recipe.engine!r} is not known; use {known}, or give --server")
    make = functools.partial(makers[recipe.engine], recipe, sampling)
    if not recipe.engine.startswith("ray"):
        return make()
    from potstill.generation.ray import RayEngine

    return RayEngine(make, workers=recipe.workers, gpus=0 if recipe.device == "cpu" else None)


def _local(recipe: GenerateRecipe, sampling: Sampling) -> Engine:
    model, tokenizer = ModelOpener.of_teacher(recipe).model_and_tokenizer(recipe.teacher)
    return LocalEngine(
        model,
        tokenizer,
        sampling,
        source=recipe.teacher,
        batch_size=recipe.batch_size,
        # A kill loses at most a unit, a few minutes of work.
        unit_size=(2 if model.device.type == "cpu" else 8) * recipe.batch_size,
        nats=recipe.choose == "likeliest",
    )


def _vllm(recipe: GenerateRecipe, sampling: Sampling) -> Engine:
    from potstill.generation.vllm import VllmEngine

    location = locate(recipe.teacher)
    if adapter_at(location):
        merge = f"potstill student {recipe.teacher} --keep-layers all --output-dir MERGED"
        raise ConfigError(f"{recipe.teacher}: vllm needs a whole model, not an adapter; {merge}")
    return VllmEngine(
        recipe.teacher,
        location,
        ModelOpener.of(recipe).tokenizer(recipe.teacher),
        sampling,
        dtype=dtype_of(recipe.precision),
        trust_remote_code=recipe.trust_remote_code,
        nats=recipe.choose == "likeliest",
    )


def _filters(recipe: GenerateRecipe) -> dict[str, Filter]:
    keep = {name.strip() for name in recipe.keep.split(",") if name.strip()}
    unknown = keep - WHAT.keys()
    if unknown:
        known = ", ".join(list(WHAT)[1:])
        raise ConfigError(f"--keep {min(unknown)}: no such reason; reasons are {known}")
    if not 0 < recipe.similarity <= 1:
        need = "above 0 and at most 1; 1 drops no near duplicates"
        raise ConfigError(f"similarity {recipe.similarity}: {need}")
    chosen = standard_filters() | filters.length(recipe.min_characters, recipe.max_characters)
    if recipe.script:
        chosen["wrong_script"] = filters.wrong_script(recipe.script)
    if recipe.language:
        chosen["wrong_language"] = filters.wrong_language(recipe.language)
    if recipe.held_out:
        held_out = read_prompts(recipe.held_out)
        questions = (row["messages"][-1]["content"] for row in held_out)
        chosen["contaminated"] = filters.contaminated(questions)
    if recipe.filter:
        is_kept = filters.users_function(recipe.filter)
        chosen["user"] = lambda row: not is_kept(row)
    return {name: is_bad for name, is_bad in chosen.items() if name not in keep}


def _choice(recipe: GenerateRecipe) -> Choose | None:
    if recipe.choose in CHOICES:
        return CHOICES[recipe.choose]
    if ".py:" not in recipe.choose:
        known = ", ".join(CHOICES)
        raise ConfigError(f"choose {recipe.choose!r} is not known; use {known} or FILE.py:FUNCTION")
    return filters.users_function(recipe.choose)


class _PromptFile:
    """Iterate over the conversations of a prompt file, read anew each time."""

    def __init__(self, source: str, reading: Reading) -> None:
        self.source, self.reading = source, reading

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_prompts(self.source, reading=self.reading)
