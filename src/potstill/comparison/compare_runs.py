"""What finished runs say of one another: each method's measures, the verdict for each pair, and where a student became worse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from potstill.comparison.abilities import Abilities, abilities, directions, in_figures
from potstill.comparison.finished_runs import FinishedRun, refuse_unlike, same_tokens
from potstill.comparison.text_measures import length_words, loops, measures_against, stops
from potstill.errors import RunFolderError
from potstill.evaluation.measures import MEASURES, TOKEN_MEASURES
from potstill.evaluation.paired import Ratios, interval, paired_difference, regressions, verdict
from potstill.evaluation.scores import measure_ratios
from potstill.generation.words import words

UNTOUCHED = "untouched"
WORST = 5

Entrants = dict[str, list[FinishedRun]]
Answers = list[dict[str, Any]]


def compare_runs(
    entrants: Entrants, *, untouched_answers: Answers | None = None, text_measures: list[str]
) -> dict[str, Any]:
    """What comparison.json holds, of methods by name, each with a run for every seed.

    The verdicts speak of KL where all students have the teacher's tokens, else of bits per byte, which any two tokenizers allow.
    Raises: RunFolderError if the runs cannot be compared; ConfigError as `measures_against`.
    """
    entrants = {name: sorted(runs, key=lambda run: run.seed) for name, runs in entrants.items()}
    runs = [run for each in entrants.values() for run in each]
    refuse_unlike(runs)
    seeds = _same_seeds(entrants)
    ratios = _measured(entrants) | _answered(entrants, untouched_answers, text_measures)
    deciding = "kl_nats_per_token" if "kl_nats_per_token" in ratios else "bits_per_byte"
    able = abilities(entrants, UNTOUCHED)
    names = sorted(ratios[deciding], key=lambda name: ratios[deciding][name].value)  # best first
    return {
        "measure": deciding,
        "conversations": len(runs[0].conversations["prompts"]),
        "answers": ratios["stops"][names[0]].numerator.shape[1] if "stops" in ratios else 0,
        "seeds": seeds,
        "notes": _notes(ratios, seeds),
        "tasks": directions(entrants) if able else {},
        "teacher": _teacher(runs[0], able.get("teacher", {}), answered="stops" in ratios),
        "methods": {
            name: _method(name, entrants.get(name, []), ratios, able.get(name, {}))
            for name in names
        },
        "pairs": [
            _pair(one, other, ratios, deciding) for one, other in itertools.combinations(names, 2)
        ],
        "regressions": _became_worse(entrants, ratios[deciding], deciding),
    }


def _same_seeds(entrants: Entrants) -> list[int]:
    seeds = {name: [run.seed for run in runs] for name, runs in entrants.items()}
    (first, expected), *rest = seeds.items()
    if len(set(expected)) < len(expected):
        raise RunFolderError(
            f"{first}: seed {_listed(expected)} is there more than once; give each run once"
        )
    for name, found in rest:
        if found != expected:
            raise RunFolderError(
                f"{first} and {name} cannot be compared: the seeds are {_listed(expected)} in the one and {_listed(found)} in the "
                "other; train both with the same"
            )
    return expected


def _measured(entrants: Entrants) -> dict[str, dict[str, Ratios]]:
    """Each measure of each method, and of the student before, where all runs have it and mean the same by it."""
    runs = [run for each in entrants.values() for run in each]
    columns = {
        name: [measure_ratios(run.conversations["after"]) for run in each]
        for name, each in entrants.items()
    }
    if len({run.config.get("student") for run in runs}) == 1:
        first = next(iter(entrants.values()))
        columns[UNTOUCHED] = [measure_ratios(run.conversations["before"]) for run in first]
    usable = [
        name
        for name in TOKEN_MEASURES
        if (name == "bits_per_byte" or same_tokens(runs))
        and all(row[name] for rows in columns.values() for row in rows)
    ]
    return {
        measure: {
            name: Ratios(
                *(np.stack(part) for part in zip(*(row[measure] for row in rows), strict=True))
            )
            for name, rows in columns.items()
        }
        for measure in usable
    }


def _answered(
    entrants: Entrants, untouched: Answers | None, text_measures: list[str]
) -> dict[str, dict[str, Ratios]]:
    """What the answers say, where every run was asked the same prompts."""
    answers = {name: [run.answers() for run in runs] for name, runs in entrants.items()}
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
        functions[name] = lambda row, against=against: against(
            row["messages"][-1]["content"], row["teacher"]
        )  # type: ignore[misc]
    measured: dict[str, dict[str, Ratios]] = {}
    for measure, function in functions.items():
        for name, each in answers.items():
            values = np.array([[function(row) for row in rows or []] for rows in each])
            measured.setdefault(measure, {})[name] = Ratios(values, np.ones_like(values))
    return measured


def _teacher(run: FinishedRun, able: Abilities, *, answered: bool) -> dict[str, Any]:
    """The teacher's own measures, and how long its answers are to the prompts that the students answered, too."""
    values = {name: run.evaluation["teacher"].get(name) for name in TOKEN_MEASURES}
    rows = (run.answers() or []) if answered else []
    if rows:
        values["length_words"] = sum(len(words(row["teacher"])) for row in rows) / len(rows)
    figures, ends = in_figures(able)
    return {**values, **figures, "ci95": ends}


def _method(
    name: str, runs: list[FinishedRun], ratios: dict[str, dict[str, Ratios]], able: Abilities
) -> dict[str, Any]:
    values = {
        measure: by_name[name].value for measure, by_name in ratios.items() if name in by_name
    }
    ends = {
        measure: list(interval(by_name[name]))
        for measure, by_name in ratios.items()
        if name in by_name
    }
    figures, ends_of_figures = in_figures(able)
    return {
        **values,
        **figures,
        "ci95": ends | ends_of_figures,
        "steps": [run.config.get("max_steps") for run in runs],
        "runs": [str(run.folder) for run in runs],
    }


def _pair(
    one: str, other: str, ratios: dict[str, dict[str, Ratios]], deciding: str
) -> dict[str, Any]:
    differences = {
        measure: paired_difference(by_name[one], by_name[other])
        for measure, by_name in ratios.items()
        if one in by_name and other in by_name
    }
    said = verdict(one, other, differences[deciding], MEASURES[deciding])
    as_json = {
        name: {"difference": d.value, "ci95": [d.low, d.high], "certain": d.certain}
        for name, d in differences.items()
    }
    return {
        "one": one,
        "other": other,
        "verdict": said,
        "certain": differences[deciding].certain,
        "differences": as_json,
    }


def _became_worse(entrants: Entrants, ratios: dict[str, Ratios], deciding: str) -> dict[str, Any]:
    if UNTOUCHED not in ratios:
        return {}
    worse = {}
    for name, runs in entrants.items():
        prompts = runs[0].conversations["prompts"]
        found = regressions(ratios[UNTOUCHED], ratios[name], MEASURES[deciding])
        worst = [
            {"prompt": prompts[i], "before": was, "after": now} for i, was, now in found[:WORST]
        ]
        worse[name] = {"share": len(found) / len(prompts), "worst": worst}
    return worse


def _notes(ratios: dict[str, dict[str, Ratios]], seeds: list[int]) -> list[str]:
    notes = []
    if "kl_nats_per_token" not in ratios:
        notes.append("The tokenizers differ: only bits a byte mean the same in all runs.")
    if "stops" not in ratios:
        notes.append(
            "Not every run kept answers to the same prompts, so nothing is said of the text."
        )
    if len(seeds) == 1:
        notes.append(
            "One seed: the intervals speak of other conversations, not of another training; give --seeds 0,1,2."
        )
    notes.append(
        "Each interval is a 95 % one by itself: of twenty pairs without any difference, about one will seem to have one."
    )
    return notes


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
