"""Train and compare the methods of `potstill compare`. Its recipe is in compare.py."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from potstill.alignment import shared_rows
from potstill.commands.compare import CompareRecipe
from potstill.commands.distill import DistillRecipe
from potstill.comparison import (
    UNTOUCHED,
    FinishedRun,
    RunsByMethod,
    as_html,
    compare_runs,
    measures_against,
    open_run,
    read_answers,
    read_data,
    write_answers,
    write_data,
)
from potstill.defaults import PASSES
from potstill.distillation import check_pair, opener_of, run_distillation, split_data
from potstill.errors import ConfigError, DataError, PotstillError, VocabularyMismatch
from potstill.models import load_tokenizer
from potstill.models.chat_template import kept_date
from potstill.processes import print_main
from potstill.reading import Reading
from potstill.run_folder import RunFolder, write_json, write_whole
from potstill.training import METHODS

REFERENCE, ON_POLICY = "reference", "on-policy"
SHARE = 0.5
"""Of on-policy micro-batches, if --on-policy is not given."""
ADDABLE = ("methods", "recipes", "seeds", "text_measures")
"""Settings that a later call may change while the finished runs stay usable."""

Plan = dict[str, DistillRecipe]


def compare(recipe: CompareRecipe, recipes: Plan | None = None) -> dict[str, Any]:
    """Train what is missing, write comparison.json and comparison.html, return the comparison.

    ``recipes``: complete recipes by name, instead of ``recipe.methods``.
    Raises: ConfigError, DataError; RunFolderError that names what differs if runs cannot be
    compared; the errors of `run_distillation`.
    """
    text_measures = listed(recipe.text_measures)
    measures_against(text_measures)  # find a missing package before hours of training
    folder = RunFolder(recipe.output_dir)
    if recipe.runs:
        runs, untouched = _named_runs(listed(recipe.runs)), None
    else:
        runs = _trained_runs(folder, recipe, recipes or {})
        untouched = read_answers(folder.path / UNTOUCHED)
    comparison = compare_runs(runs, untouched_answers=untouched, text_measures=text_measures)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.path / "comparison.json", comparison)
    page = as_html(
        comparison,
        runs,
        untouched,
        folder=folder.path,
        settings=dataclasses.asdict(recipe),
        command=_command(folder, recipe),
    )
    write_whole(folder.path / "comparison.html", page)
    return comparison


def _command(folder: RunFolder, recipe: CompareRecipe) -> str:
    """Return the command that repeats the comparison; training goes to a new folder beside it."""
    if recipe.runs:
        source, output = ["--runs", recipe.runs], str(folder.path)
    else:
        source = ["--config", str(folder.config)]
        output = os.path.normpath(folder.path / ".." / f"{folder.path.resolve().name}-again")
    return shlex.join(["potstill", "compare", *source, "--output-dir", output])


def listed(text: str | None) -> list[str]:
    """Return the parts between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _named_runs(folders: list[str]) -> RunsByMethod:
    """Open finished runs; folders that differ only in ``-seedN`` belong to one method."""
    runs: RunsByMethod = {}
    for folder in folders:
        method = re.sub(r"-seed\d+$", "", folder.rstrip("/"))
        runs.setdefault(method, []).append(open_run(folder))
    if len(runs) < 2:
        raise ConfigError(
            f"--runs {','.join(folders)}: only one method; give the folders of two or more"
        )
    return runs


def _trained_runs(folder: RunFolder, recipe: CompareRecipe, recipes: Plan) -> RunsByMethod:
    """Return one run per method and seed, trained now or earlier.

    A new folder is deleted again if an error occurs before the first run has begun.
    """
    missing = [name.upper() for name in ("teacher", "student", "data") if not getattr(recipe, name)]
    if missing and not recipes:
        raise ConfigError(
            f"compare needs {', '.join(missing)}, or --recipes, or --runs; "
            "potstill compare --help shows all"
        )
    if recipe.answers < 0:
        raise ConfigError(f"--answers {recipe.answers}: must be at least 0")
    _check_recipes_match(recipes)
    stored = folder.read_config() if folder.config.is_file() else {}
    date = kept_date(recipe.template_date, stored.get("template_date"))
    recipe = dataclasses.replace(recipe, template_date=date)
    recipes = {
        name: dataclasses.replace(one, template_date=one.template_date or date)
        for name, one in recipes.items()
    }
    seeds, settings = _seeds(recipe.seeds), dataclasses.asdict(recipe)
    folder.refuse_other({name: value for name, value in settings.items() if name not in ADDABLE})
    base = next(iter(recipes.values())) if recipes else _distill_recipe(recipe)
    train, held_out = _data(folder, base)
    plan = _plan(folder, recipes or _by_method(recipe, base, train), train)
    for one in plan.values():
        check_pair(one)
    try:
        folder.begin(settings)
        write_data(folder.data, train, held_out)
        _answer(folder.path / UNTOUCHED, base.student, base, recipe, held_out)
        return {
            name: [
                _run(folder, name, dataclasses.replace(one, seed=seed), recipe, held_out)
                for seed in seeds
            ]
            for name, one in plan.items()
        }
    except PotstillError:
        if not any(folder.path.glob("*/config.yaml")):
            shutil.rmtree(folder.path)
        raise


def _run(
    folder: RunFolder, name: str, one: DistillRecipe, recipe: CompareRecipe, held_out: list[Any]
) -> FinishedRun:
    """Train one run and write its answers, unless that was done earlier."""
    run = RunFolder(folder.path / f"{name}-seed{one.seed}")
    one = dataclasses.replace(one, output_dir=str(run.path))
    run.refuse_other(dataclasses.asdict(one))
    done = (run.path / "report.html").is_file() and run.evaluation.is_file()
    print_main(f"{name}, seed {one.seed}{': done before' if done else ''}")
    if not done:
        run_distillation(one)
    _answer(run.path, str(run.student), one, recipe, held_out)
    return open_run(run.path)


def _answer(
    place: Path, model: str, one: DistillRecipe, recipe: CompareRecipe, held_out: list[Any]
) -> None:
    rows = [row for row in held_out if row.get("messages", [{}])[-1].get("role") == "assistant"]
    rows, sampling = rows[: recipe.answers], {"max_new_tokens": recipe.answer_tokens}
    write_answers(place, rows, opener_of(one), model, one.student, seed=one.seed, **sampling)


def _distill_recipe(recipe: CompareRecipe) -> DistillRecipe:
    names = [item.name for item in dataclasses.fields(DistillRecipe)]
    return DistillRecipe(**{name: getattr(recipe, name) for name in names})


def _by_method(recipe: CompareRecipe, base: DistillRecipe, train: list[Any]) -> Plan:
    """Return a recipe per method: the named methods, or those that data and tokenizers allow."""
    known = (*METHODS, ON_POLICY, REFERENCE)
    without = sum("reference" not in row or "messages" not in row for row in train)
    names = listed(recipe.methods)
    if not names:
        names = [*([] if without else [REFERENCE]), "text", _logit_method(base)]
    for name in names:
        if name not in known:
            raise ConfigError(f"method {name!r} is not known; use some of {', '.join(known)}")
    if REFERENCE in names and without:
        raise DataError(
            f"{base.data}: {without} of {len(train)} training conversations have no reference; "
            'give every row a "reference", or leave this method out'
        )
    plan = {name: dataclasses.replace(base, method=name, on_policy=0.0) for name in names}
    if ON_POLICY in plan:
        method, share = _logit_method(base), base.on_policy or SHARE
        plan[ON_POLICY] = dataclasses.replace(base, method=method, on_policy=share)
    return plan


def _logit_method(base: DistillRecipe) -> str:
    """Return ``logits`` if teacher and student share a tokenizer, else ``cross``."""
    trust = base.trust_remote_code
    tokenizers = [
        load_tokenizer(name, trust_remote_code=trust) for name in (base.teacher, base.student)
    ]
    try:
        shared_rows(*tokenizers)
    except VocabularyMismatch:
        return "cross"
    return "logits"


def _plan(folder: RunFolder, recipes: Plan, train: list[Any]) -> Plan:
    """Point the recipes to the copied data; give each the same steps if there is no budget."""
    plan = {}
    for name, one in recipes.items():
        steps = one.max_steps
        if steps is None and one.seconds is None:
            steps = PASSES * -(-len(train) // (one.batch_size * one.gradient_accumulation_steps))
        is_reference = one.method == REFERENCE
        plan[name] = dataclasses.replace(
            one,
            method="text" if is_reference else one.method,
            data=str(folder.data / ("reference.jsonl" if is_reference else "train.jsonl")),
            eval_data=str(folder.data / "held_out.jsonl"),
            eval_split=None,
            **dataclasses.asdict(Reading()),  # the copies are already read
            max_steps=steps,
        )
    return plan


def _check_recipes_match(recipes: Plan) -> None:
    """Raise ConfigError before training if the runs could not be compared after it."""
    keys = ["teacher", "data", "eval_data", "eval_split", "eval_fraction", "max_steps", "seconds"]
    keys += ["split", "data_name", "columns", "merge_system", "template_date"]
    keys += ["batch_size", "gradient_accumulation_steps", "max_length", "precision"]
    for name, one in recipes.items():
        first, expected = next(iter(recipes.items()))
        free = ("batch_size", "gradient_accumulation_steps") if expected.seconds else ()
        for key in keys:
            here, there = getattr(expected, key), getattr(one, key)
            if here != there and key not in free:
                raise ConfigError(
                    f"{first} and {name} cannot be compared: {key} is {here} in {first} and "
                    f"{there} in {name}; give both the same"
                )


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in listed(text)]
    except ValueError:
        raise ConfigError(
            f"--seeds {text}: give whole numbers separated by commas: 0,1,2"
        ) from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text!r}: give at least one seed, each once: 0,1,2")
    return seeds


def _data(folder: RunFolder, base: DistillRecipe) -> tuple[list[Any], list[Any]]:
    """Return training and held-out data; prefer the copy, since the original may have changed."""
    train, held_out = read_data(folder.data) or split_data(base)
    if not train or not held_out:
        raise DataError(
            f"{base.data}: too few conversations to train on some and hold out others; "
            "give --eval-data or more data"
        )
    return train, held_out
