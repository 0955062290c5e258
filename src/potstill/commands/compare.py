"""Several methods side by side: the same student, data, order of data and budget, trained one after another.

OUTPUT_DIR/
  config.yaml         what was asked for
  data/               train.jsonl and held_out.jsonl; reference.jsonl: the same questions with the reference answers
  text-seed0/         an ordinary run's folder for each method and seed, and in it answers.jsonl
  untouched/          answers.jsonl of the student before
  comparison.json     measures, differences with intervals, verdicts, regressions
  comparison.html     the page

A run that has come to its end is kept: the same command goes on after an interrupt, and one with more methods or seeds adds to it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.alignment import shared_rows
from potstill.commands.distill import DistillRecipe
from potstill.comparison import (
    ANSWERS,
    UNTOUCHED,
    Answers,
    Entrants,
    FinishedRun,
    as_html,
    as_text,
    compare_runs,
    open_run,
    read_answers,
)
from potstill.comparison.text_measures import measures_against
from potstill.data import read_conversations, without_answer
from potstill.data.conversations import with_reference
from potstill.defaults import PASSES
from potstill.distillation import check_pair, opener_of, run_distillation, split_data
from potstill.errors import ConfigError, DataError, PotstillError, VocabularyMismatch
from potstill.evaluation.held_out import last_question
from potstill.generation import answer_prompts
from potstill.models import load_tokenizer
from potstill.run_folder import RunFolder, write_json, write_whole
from potstill.training import METHODS
from potstill.training.kept_memory import keep_freed_memory

REFERENCE = "reference"
ADDABLE = ("methods", "recipes", "seeds", "text_measures")
"""What a later call may change without making the runs that are there another comparison's."""


@dataclass(frozen=True, kw_only=True)
class CompareRecipe(DistillRecipe):
    """Train several methods on the same data and budget, and say which is better."""

    teacher: str = ""
    """Hub id, model folder, GGUF file, or demo."""
    student: str = ""
    """The same, for the model to be trained, by each method anew."""
    data: str = ""
    """Conversations with the teacher's answers; a row's "reference" is an answer of other origin, for the method reference."""
    method: str = "logits"
    """Not used here, but part of a recipe for distill, which can be given as it is: see --methods."""
    methods: str | None = None
    """Separated by commas: text, logits, cross, and reference (cross-entropy on the reference answers). Without it: reference if
    every row has one, text, and logits or, for different tokenizers, cross. The untouched student always takes part."""
    recipes: str | None = None
    """Instead of methods: YAML files for distill, separated by commas, with the same data and budget."""
    runs: str | None = None
    """Instead of training: folders of finished runs, separated by commas. Those that differ in -seedN alone are one method's."""
    seeds: str = "0"
    """Separated by commas: each method is trained once with each."""
    answers: int = 32
    """Held-out prompts that each student answers, to see whether it stops, loops, and how long it talks. 0: none."""
    answer_tokens: int = 128
    """Tokens at which such an answer is cut off."""
    text_measures: str = ""
    """chrf, rouge_l or both, separated by a comma: answers against the teacher's (needs potstill[measures])."""


Plan = dict[str, DistillRecipe]


def run(recipe: CompareRecipe) -> None:
    """Compare and print the table."""
    from potstill.commands.parsing import parse

    if recipe.device in ("auto", "cpu"):
        keep_freed_memory()
    files = listed(recipe.recipes)
    recipes = {Path(file).stem: parse(["distill", "--config", file])[1] for file in files}
    if files and len(recipes) < max(2, len(files)):
        raise ConfigError(f"--recipes {recipe.recipes}: give two or more files of different names")
    comparison = compare(recipe, recipes)
    page = Path(recipe.output_dir).expanduser() / "comparison.html"
    print(f"\n{as_text(comparison)}\n\npage: {page}")


def compare(recipe: CompareRecipe, recipes: Plan | None = None) -> dict[str, Any]:
    """Train what is not trained yet, compare all, write comparison.json and comparison.html. Returns the comparison.

    ``recipes``: whole recipes by name, instead of ``recipe.methods``. Raises: ConfigError, DataError; RunFolderError if runs
    cannot be compared, naming what differs; whatever `run_distillation` raises.
    """
    text_measures = listed(recipe.text_measures)
    measures_against(text_measures)  # a missing library is known before hours of training
    folder = RunFolder(recipe.output_dir)
    if recipe.runs:
        entrants, untouched = _named_runs(listed(recipe.runs)), None
    else:
        entrants, untouched = (
            _trained_runs(folder, recipe, recipes or {}),
            read_answers(folder.path / UNTOUCHED),
        )
    comparison = compare_runs(entrants, untouched_answers=untouched, text_measures=text_measures)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.path / "comparison.json", comparison)
    page = as_html(
        comparison,
        entrants,
        untouched,
        folder=folder.path,
        settings=dataclasses.asdict(recipe),
        command=_command(folder, recipe),
    )
    write_whole(folder.path / "comparison.html", page)
    return comparison


def _command(folder: RunFolder, recipe: CompareRecipe) -> str:
    """What to type to do it again: beside this folder what is to be trained, into it what is trained."""
    if recipe.runs:
        return shlex.join(
            ["potstill", "compare", "--runs", recipe.runs, "--output-dir", str(folder.path)]
        )
    again = os.path.normpath(folder.path / ".." / f"{folder.path.resolve().name}-again")
    return shlex.join(
        ["potstill", "compare", "--config", str(folder.config), "--output-dir", again]
    )


def listed(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _named_runs(folders: list[str]) -> Entrants:
    """Runs that are there already; those whose folders differ in ``-seedN`` alone are one method's."""
    entrants: Entrants = {}
    for folder in folders:
        entrants.setdefault(re.sub(r"-seed\d+$", "", folder.rstrip("/")), []).append(
            open_run(folder)
        )
    if len(entrants) < 2:
        raise ConfigError(
            f"--runs {','.join(folders)}: one method alone; give the folders of two or more"
        )
    return entrants


def _trained_runs(folder: RunFolder, recipe: CompareRecipe, recipes: Plan) -> Entrants:
    """A run for each method and seed, trained now or before. A mistake found before the first has begun leaves nothing behind."""
    missing = [name.upper() for name in ("teacher", "student", "data") if not getattr(recipe, name)]
    if missing and not recipes:
        raise ConfigError(
            f"compare needs {', '.join(missing)}, or --recipes, or --runs; potstill compare --help shows all"
        )
    if recipe.answers < 0:
        raise ConfigError(f"--answers {recipe.answers}: must be at least 0")
    _refuse_unlike_recipes(recipes)
    seeds, asked = _seeds(recipe.seeds), dataclasses.asdict(recipe)
    folder.refuse_other({name: value for name, value in asked.items() if name not in ADDABLE})
    base = next(iter(recipes.values())) if recipes else _distill_recipe(recipe)
    train, held_out = _data(folder, base)
    plan = _plan(folder, recipes or _by_method(recipe, base, train), train)
    for one in plan.values():
        check_pair(one)
    try:
        folder.begin(asked)
        _write_data(folder, train, held_out)
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
    """One run, trained to its end and asked the held-out prompts, unless that was done before."""
    run = RunFolder(folder.path / f"{name}-seed{one.seed}")
    one = dataclasses.replace(one, output_dir=str(run.path))
    run.refuse_other(dataclasses.asdict(one))
    done = (run.path / "report.html").is_file() and run.evaluation.is_file()
    print(f"{name}, seed {one.seed}{': done before' if done else ''}", flush=True)
    if not done:
        run_distillation(one)
    _answer(run.path, str(run.student), one, recipe, held_out)
    return open_run(run.path)


def _distill_recipe(recipe: CompareRecipe) -> DistillRecipe:
    return DistillRecipe(
        **{item.name: getattr(recipe, item.name) for item in dataclasses.fields(DistillRecipe)}
    )


def _by_method(recipe: CompareRecipe, base: DistillRecipe, train: list[Any]) -> Plan:
    """A recipe for each method asked for, or for those that the data and the tokenizers allow."""
    known = (*METHODS, REFERENCE)
    without = sum("reference" not in row or "messages" not in row for row in train)
    names = listed(recipe.methods) or [
        *([] if without else [REFERENCE]),
        "text",
        _with_logits(base),
    ]
    for name in names:
        if name not in known:
            raise ConfigError(f"method {name!r} is not known; use some of {', '.join(known)}")
    if REFERENCE in names and without:
        raise DataError(
            f"{base.data}: {without} of {len(train)} conversations to train on have no reference; "
            'give every row its "reference", or leave the method out'
        )
    return {name: dataclasses.replace(base, method=name) for name in names}


def _with_logits(base: DistillRecipe) -> str:
    try:
        shared_rows(
            *(
                load_tokenizer(name, trust_remote_code=base.trust_remote_code)
                for name in (base.teacher, base.student)
            )
        )
    except VocabularyMismatch:
        return "cross"
    return "logits"


def _plan(folder: RunFolder, recipes: Plan, train: list[Any]) -> Plan:
    """The recipes on the comparison's own copy of the data, with as many steps in each where no budget was given."""
    plan = {}
    for name, one in recipes.items():
        steps = one.max_steps
        if steps is None and one.seconds is None:
            steps = PASSES * -(-len(train) // (one.batch_size * one.gradient_accumulation_steps))
        plan[name] = dataclasses.replace(
            one,
            method="text" if one.method == REFERENCE else one.method,
            data=str(
                folder.data / ("reference.jsonl" if one.method == REFERENCE else "train.jsonl")
            ),
            eval_data=str(folder.data / "held_out.jsonl"),
            max_steps=steps,
        )
    return plan


def _refuse_unlike_recipes(recipes: Plan) -> None:
    """What would be found out after the training, found out before it."""
    for name, one in recipes.items():
        (first, expected) = next(iter(recipes.items()))
        budget = () if expected.seconds else ("batch_size", "gradient_accumulation_steps")
        for key in (
            "teacher",
            "data",
            "eval_data",
            "eval_fraction",
            "max_steps",
            "seconds",
            *budget,
            "max_length",
            "precision",
        ):
            if getattr(one, key) != getattr(expected, key):
                raise ConfigError(
                    f"{first} and {name} cannot be compared: {key} is {getattr(expected, key)} in the one and {getattr(one, key)} "
                    "in the other; give both the same"
                )


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in listed(text)]
    except ValueError:
        raise ConfigError(
            f"--seeds {text}: give whole numbers separated by commas: 0,1,2"
        ) from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text!r}: give at least one, each once: 0,1,2")
    return seeds


def _data(folder: RunFolder, base: DistillRecipe) -> tuple[list[Any], list[Any]]:
    """Conversations to train on and held-out ones: the copy, if there is one, so that a file changed meanwhile changes nothing."""
    copies = [folder.data / "train.jsonl", folder.data / "held_out.jsonl"]
    train, held_out = (
        (list(map(list, map(read_conversations, copies))))
        if copies[1].is_file()
        else split_data(base)
    )
    if not train or not held_out:
        raise DataError(
            f"{base.data}: too few conversations to train on some and hold out others; give --eval-data or more data"
        )
    return train, held_out


def _write_data(folder: RunFolder, train: list[Any], held_out: list[Any]) -> None:
    folder.data.mkdir(exist_ok=True)
    if all("reference" in row and "messages" in row for row in train):
        write_rows(folder.data / "reference.jsonl", [with_reference(row) for row in train])
    write_rows(folder.data / "train.jsonl", train)
    write_rows(folder.data / "held_out.jsonl", held_out)


def _answer(
    place: Path, source: str, one: DistillRecipe, recipe: CompareRecipe, held_out: list[Any]
) -> None:
    """Let a student answer the first held-out prompts, and lay the teacher's answers beside its own."""
    rows = [row for row in held_out if row.get("messages", [{}])[-1].get("role") == "assistant"][
        : recipe.answers
    ]
    if not rows or (place / ANSWERS).is_file():
        return
    print(f"  {len(rows)} answers of {source}", flush=True)
    prompts = [without_answer(row["messages"]) for row in rows]
    student, tokenizer = opener_of(one).model(source), opener_of(one).tokenizer(one.student)
    answers = answer_prompts(
        student, tokenizer, prompts, max_new_tokens=recipe.answer_tokens, seed=one.seed
    )
    asked_and_wanted = zip(rows, answers, strict=True)
    beside = [
        {"prompt": last_question(row), "teacher": row["messages"][-1]["content"], **answer}
        for row, answer in asked_and_wanted
    ]
    place.mkdir(exist_ok=True)
    write_rows(place / ANSWERS, beside)


def write_rows(path: Path, rows: Answers) -> None:
    """JSON Lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
