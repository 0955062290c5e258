"""Prepare held-out answers token by token, and the worst prompts and tokens, for the templates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation import measure_ratios
from potstill.report.formatting import cut, figure, number, objects, printable, token_text

KL_STEPS_NATS = (0.03, 0.1, 0.3, 1.0, 3.0)  # fixed, so that two reports can be compared
WORST_PROMPTS = 8
PROMPT_BYTES = 300

TopTokens = list[tuple[str, float]]
"""The most likely next tokens of one model at one position, with their probabilities."""
Models = Mapping[str, tuple[str, Mapping[str, Any]]]
"""By model: ``before`` or ``after``, and the evaluation.json to read it from."""


@dataclass(frozen=True)
class TokenView:
    """One answer: its tokens, one cell per token and model, and what each model predicted."""

    prompt: str
    models: list[str]
    tokens: list[dict[str, Any]]
    from_teacher: bool
    """True if the nats are a divergence from the teacher; False if they are −log p of the token."""
    predicting: list[str]
    """The models that have predictions."""
    predictions: list[list[TopTokens]]
    """Per token, per model in ``predicting``; empty if not recorded."""


def run_views(evaluation: Mapping[str, Any]) -> list[TokenView]:
    """Return the views of one run, before and after training."""
    shown = {"Before training": ("before", evaluation), "After training": ("after", evaluation)}
    return token_views(shown)


def token_views(models: Models) -> list[TokenView]:
    """Return the answers that were recorded for all models, token by token."""
    whens = [when for when, _ in models.values()]
    recorded = [_answers(evaluation) for _, evaluation in models.values()]
    views = []
    for answers in zip(*recorded, strict=False):
        rows = [objects(answer.get("tokens")) for answer in answers]
        texts = [[str(token.get("text", "")) for token in row] for row in rows]
        if not texts[0] or any(text != texts[0] for text in texts):
            continue
        measure = next((name for name in ("kl", "nll") if _any_measured(rows, whens, name)), "kl")
        tokens = [
            {
                "text": token_text(text),
                "breaks": "\n" in text,
                "cells": [
                    _cell(row[i].get(f"{when}_{measure}_nats"))
                    for row, when in zip(rows, whens, strict=True)
                ],
            }
            for i, text in enumerate(texts[0])
        ]
        prompt, from_teacher = str(answers[0].get("prompt", "")), measure == "kl"
        predictions = _predictions(list(models), whens, rows)
        views.append(TokenView(prompt, list(models), tokens, from_teacher, *predictions))
    return views


def _answers(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    return objects([evaluation.get("token_view")]) + objects(evaluation.get("more_token_views"))


def _any_measured(rows: list[list[dict[str, Any]]], whens: list[str], measure: str) -> bool:
    return any(
        number(token.get(f"{when}_{measure}_nats")) is not None
        for row, when in zip(rows, whens, strict=True)
        for token in row
    )


def _cell(nats: object) -> dict[str, Any]:
    found = number(nats)
    if found is None:
        return {"nats": "not measured", "level": None}
    return {"nats": f"{figure(found)} nats", "level": sum(found >= step for step in KL_STEPS_NATS)}


def _predictions(
    names: list[str], whens: list[str], rows: list[list[dict[str, Any]]]
) -> tuple[list[str], list[list[TopTokens]]]:
    """Return the models with predictions, and these per token; empty unless every student has all.

    The teacher comes first if it has all of its own.
    """
    students = [
        [_top_tokens(token, when) for token in row] for row, when in zip(rows, whens, strict=True)
    ]
    if not all(top for column in students for top in column):
        return [], []
    teacher = [_top_tokens(token, "teacher") for token in rows[0]]
    columns = [teacher, *students] if all(teacher) else students
    predicting = ["Teacher", *names] if all(teacher) else names
    return predicting, [list(each) for each in zip(*columns, strict=True)]


def _top_tokens(token: Mapping[str, Any], model: str) -> TopTokens:
    recorded = token.get("next")
    pairs = recorded.get(model) if isinstance(recorded, dict) else None
    found = []
    for pair in pairs if isinstance(pairs, list) else []:
        text, probability = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        share = number(probability)
        if isinstance(text, str) and share is not None:
            found.append((token_text(text), share))
    return found


def worst_tokens(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens at which the trained student is furthest from its teacher."""
    return [
        {
            "context": str(printable(str(row.get("context", "")))),
            "text": token_text(row.get("text", "")),
            "before": _cell(row.get("before_kl_nats"))["nats"],
            "after": _cell(row.get("after_kl_nats"))["nats"],
            "predictions": {
                name: [(text, _percent(share)) for text, share in _top_tokens(row, model)[:3]]
                for name, model in (("Teacher", "teacher"), ("Student", "after"))
            },
        }
        for row in objects(evaluation.get("worst_tokens"))
    ]


def _percent(share: float) -> str:
    return "<\u2009½\u00a0%" if share < 0.005 else f"{100 * share:.0f}\u00a0%"


def worst_prompts(models: Models) -> tuple[str, list[tuple[str, list[str]]]]:
    """Return the unit, and the prompts on which the last model is worst, with all models' values.

    The value is the divergence from the teacher in nats per token; without one (two tokenizers),
    bits per byte above the teacher's. Empty if evaluation.json has no sums per conversation.
    """
    try:
        columns, unit = _excess(models)
        first = next(iter(models.values()))[1]
        prompts = [str(prompt) for prompt in first["conversations"]["prompts"]]
        last = columns[-1]
        order = [i for i in np.argsort(-last, kind="stable") if np.isfinite(last[i])]
        return unit, [
            (_short(prompts[i]), [figure(float(column[i])) for column in columns])
            for i in order[:WORST_PROMPTS]
        ]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return "", []


def _excess(models: Models) -> tuple[list[Any], str]:
    ratios = [
        measure_ratios(evaluation["conversations"][when]) for when, evaluation in models.values()
    ]
    kl = [one["kl_nats_per_token"] for one in ratios]
    if all(pair is not None for pair in kl):
        return [
            _divided(*pair) for pair in kl if pair is not None
        ], "nats per token from the teacher"
    bits = [_divided(*pair) for one in ratios if (pair := one["bits_per_byte"]) is not None]
    first = next(iter(models.values()))[1]
    teacher = measure_ratios(first["conversations"]["teacher"])["bits_per_byte"]
    excess = [column - _divided(*teacher) for column in bits if teacher is not None]
    return excess, "bits per byte above the teacher"


def _divided(above: Any, below: Any) -> Any:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _short(prompt: str) -> str:
    kept, left_out = cut(prompt, PROMPT_BYTES)
    return kept + ("…" if left_out else "")


def as_json(view: TokenView) -> dict[str, Sequence[Any]]:
    """Return what the page's script reads: model names, and (text, probability) per prediction."""
    return {"names": view.predicting, "predictions": view.predictions}
