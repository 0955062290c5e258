"""Compute what comparison.json holds: measures per method, a verdict per pair, and regressions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from potstill.comparison.abilities import Abilities, abilities, directions, in_figures
from potstill.comparison.finished_runs import FinishedRun, refuse_unlike, same_tokens
from potstill.comparison.text_measures import length_words, loops, measures_against, stops
from potstill.data.words import words
from potstill.errors import RunFolderError
from potstill.evaluation.measures import MEASURES, OWN_MEASURES, TOKEN_MEASURES
from potstill.evaluation.paired import Ratios, interval, paired_difference, regressions, verdict
from potstill.evaluation.scores import measure_ratios

UNTOUCHED = "untouched"
WORST_PROMPTS = 5

RunsByMethod = dict[str, list[FinishedRun]]
Answers = list[dict[str, Any]]
RatiosByMeasure = dict[str, dict[str, Ratios]]
"""By measure, then by method: one row per seed, one column per conversation."""


def compare_runs(
    runs: RunsByMethod, *, untouched_answers: Answers | None = None, text_measures: list[str]
) -> dict[str, Any]:
    """Return the content of comparison.json; ``runs`` holds one run per seed for each method.

    The verdicts use KL if all students have the teacher's tokenizer, else bits per byte, which
    are comparable across tokenizers.
    Raises: RunFolderError if the runs cannot be compared; ConfigError as `measures_against`.
    """
    runs = {name: sorted(each, key=lambda run: run.seed) for name, each in runs.items()}
    flat = [run for each in runs.values() for run in each]
    refuse_unlike(flat)
    seeds = _same_seeds(runs)
    ratios = _token_ratios(runs) | _answer_ratios(runs, untouched_answers, text_measures)
    deciding = "kl_nats_per_token" if "kl_nats_per_token" in ratios else "bits_per_byte"
    scores = abilities(runs, UNTOUCHED)
    names = sorted(ratios[deciding], key=lambda name: ratios[deciding][name].value)  # best first
    return {
        "measure": deciding,
        "conversations": len(flat[0].conversations["prompts"]),
        "answers": ratios["stops"][names[0]].numerator.shape[1] if "stops" in ratios else 0,
        "seeds": seeds,
        "notes": _notes(ratios, seeds),
        "tasks": directions(runs) if scores else {},
        "teacher": _teacher(flat[0], scores.get("teacher", {}), answered="stops" in ratios),
        "methods": {
            name: _method(name, runs.get(name, []), ratios, scores.get(name, {})) for name in names
        },
        "pairs": [
            _pair(one, other, ratios, deciding) for one, other in itertools.combinations(names, 2)
        ],
        "regressions": _regressions(runs, ratios[deciding], deciding),
    }


def _same_seeds(runs: RunsByMethod) -> list[int]:
    seeds = {name: [run.seed for run in each] for name, each in runs.items()}
    (first, expected), *rest = seeds.items()
    if len(set(expected)) < len(expected):
        raise RunFolderError(
            f"{first}: seed {_listed(expected)} is there more than once; give each run once"
        )
    for name, found in rest:
        if found != expected:
            raise RunFolderError(
                f"{first} and {name} cannot be compared: the seeds are {_listed(expected)} in the "
                f"first and {_listed(found)} in the second; train both with the same"
            )
    return expected


def _token_ratios(runs: RunsByMethod) -> RatiosByMeasure:
    """Return the measures that all runs have and that are the same quantity in all of them.

    The untouched student is included if all runs started from the same student.
    """
    flat = [run for each in runs.values() for run in each]
    measured = {
        name: [measure_ratios(run.conversations["after"]) for run in each]
        for name, each in runs.items()
    }
    if len({run.config.get("student") for run in flat}) == 1:
        first = next(iter(runs.values()))
        measured[UNTOUCHED] = [measure_ratios(run.conversations["before"]) for run in first]
    usable = [
        name
        for name in TOKEN_MEASURES | OWN_MEASURES
        if (name == "bits_per_byte" or same_tokens(flat))
        and all(one.get(name) for seeds in measured.values() for one in seeds)
    ]
    return {
        measure: {
            name: Ratios(
                *(np.stack(part) for part in zip(*(one[measure] for one in seeds), strict=True))
            )
            for name, seeds in measured.items()
        }
        for measure in usable
    }


def _answer_ratios(
    runs: RunsByMethod, untouched: Answers | None, text_measures: list[str]
) -> RatiosByMeasure:
    """Return the measures of the answers; empty if not all runs answered the same prompts."""
    answers = {name: [run.answers() for run in each] for name, each in runs.items()}
    if untouched:
        answers[UNTOUCHED] = [untouched] * len(next(iter(answers.values())))
    asked = {
        tuple(row["prompt"] for row in rows) if rows else ()
        for each in answers.values()
        for rows in each
    }
    if len(asked) != 1 or not next(iter(asked)):
        return {}
    functions = {"stops": stops, "loops": loops, "length_words": length_words}
    for name, against in measures_against(text_measures).items():
        functions[name] = lambda row, against=against: against(  # type: ignore[misc]
            row["messages"][-1]["content"], row["teacher"]
        )
    measured: RatiosByMeasure = {}
    for measure, function in functions.items():
        for name, each in answers.items():
            values = np.array([[function(row) for row in rows or []] for rows in each])
            measured.setdefault(measure, {})[name] = Ratios(values, np.ones_like(values))
    return measured


def _teacher(run: FinishedRun, scores: Abilities, *, answered: bool) -> dict[str, Any]:
    """Return the teacher's measures, and the mean length of its answers to the same prompts."""
    values = {name: run.evaluation["teacher"].get(name) for name in TOKEN_MEASURES}
    rows = (run.answers() or []) if answered else []
    if rows:
        values["length_words"] = sum(len(words(row["teacher"])) for row in rows) / len(rows)
    figures, ends = in_figures(scores)
    return {**values, **figures, "ci95": ends}


def _method(
    name: str, runs: list[FinishedRun], ratios: RatiosByMeasure, scores: Abilities
) -> dict[str, Any]:
    own = {measure: by_name[name] for measure, by_name in ratios.items() if name in by_name}
    ends = {measure: list(interval(ratio)) for measure, ratio in own.items()}
    figures, ends_of_figures = in_figures(scores)
    return {
        **{measure: ratio.value for measure, ratio in own.items()},
        **figures,
        "ci95": ends | ends_of_figures,
        "steps": [run.config.get("max_steps") for run in runs],
        "runs": [str(run.folder) for run in runs],
    }


def _pair(one: str, other: str, ratios: RatiosByMeasure, deciding: str) -> dict[str, Any]:
    differences = {
        measure: paired_difference(by_name[one], by_name[other])
        for measure, by_name in ratios.items()
        if one in by_name and other in by_name
    }
    return {
        "one": one,
        "other": other,
        "verdict": verdict(one, other, differences[deciding], MEASURES[deciding]),
        "certain": differences[deciding].certain,
        "differences": {
            name: {"difference": d.value, "ci95": [d.low, d.high], "certain": d.certain}
            for name, d in differences.items()
        },
    }


def _regressions(runs: RunsByMethod, ratios: dict[str, Ratios], deciding: str) -> dict[str, Any]:
    """Return by method the share of prompts that became worse, and the worst of them."""
    if UNTOUCHED not in ratios:
        return {}
    worse = {}
    for name, each in runs.items():
        prompts = each[0].conversations["prompts"]
        found = regressions(ratios[UNTOUCHED], ratios[name], MEASURES[deciding])
        worst = [
            {"prompt": prompts[i], "before": before, "after": after}
            for i, before, after in found[:WORST_PROMPTS]
        ]
        worse[name] = {"share": len(found) / len(prompts), "worst": worst}
    return worse


def _notes(ratios: RatiosByMeasure, seeds: list[int]) -> list[str]:
    notes = []
    if "kl_nats_per_token" not in ratios:
        notes.append("The tokenizers differ: only bits per byte can be compared between runs.")
    if "stops" not in ratios:
        notes.append(
            "Not every run has answers to the same prompts, so the answers are not compared."
        )
    if len(seeds) == 1:
        notes.append(
            "One seed: the intervals cover the choice of conversations, but not the randomness of "
            "training; give --seeds 0,1,2."
        )
    notes.append(
        "Each interval is a 95 % interval by itself: of twenty pairs without any difference, about "
        "one will seem to have one."
    )
    return notes


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
