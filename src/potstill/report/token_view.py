"""Some held-out answers token by token, and the places where the student is worst, as the templates want them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation import measure_ratios
from potstill.report.formatting import cut, figure, number, objects, printable, token_text

KL_STEPS_NATS = (0.03, 0.1, 0.3, 1.0, 3.0)  # fixed, so that two reports can be laid side by side
WORST_PROMPTS = 8
PROMPT_BYTES = 300

Next = list[list[tuple[str, float]]]
"""For each model the likeliest next tokens, with their probabilities."""


@dataclass(frozen=True)
class TokenView:
    """One answer: its tokens, each with a cell a model, and what the models would have said in each place."""

    prompt: str
    models: list[str]
    tokens: list[dict[str, Any]]
    from_teacher: bool
    """Whether nats are a divergence from the teacher, or else the surprise at the token."""
    said_by: list[str]
    said: list[Next]
    """A list a token; empty where nobody recorded it."""


def run_views(evaluation: Mapping[str, Any]) -> list[TokenView]:
    """Of one run: before and after training."""
    shown = {"Before training": ("before", evaluation), "After training": ("after", evaluation)}
    return token_views(shown)


def token_views(models: Mapping[str, tuple[str, Mapping[str, Any]]]) -> list[TokenView]:
    """The answers that all models were seen on: by name, ``before`` or ``after`` and the evaluation.json that has it."""
    everybody = [(when, _answers(evaluation)) for when, evaluation in models.values()]
    views = []
    for answers in zip(*(answers for _, answers in everybody), strict=False):
        texts = [
            [str(row.get("text", "")) for row in objects(answer.get("tokens"))]
            for answer in answers
        ]
        if not texts[0] or any(text != texts[0] for text in texts):
            continue
        rows = [objects(answer["tokens"]) for answer in answers]
        whens = [when for when, _ in everybody]
        measure = next((name for name in ("kl", "nll") if _any_measured(rows, whens, name)), "kl")
        tokens = [
            {
                "text": token_text(text),
                "breaks": "\n" in text,
                "cells": [
                    _cell(row[place].get(f"{when}_{measure}_nats"))
                    for row, when in zip(rows, whens, strict=True)
                ],
            }
            for place, text in enumerate(texts[0])
        ]
        said_by, said = _said(list(models), whens, rows)
        views.append(
            TokenView(
                str(answers[0].get("prompt", "")),
                list(models),
                tokens,
                measure == "kl",
                said_by,
                said,
            )
        )
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


def _said(
    names: list[str], whens: list[str], rows: list[list[dict[str, Any]]]
) -> tuple[list[str], list[Next]]:
    """Whose top fives there are, and those of each token; nothing unless every student has all of its own."""
    by_student = [
        [_likeliest(token, when) for token in row] for row, when in zip(rows, whens, strict=True)
    ]
    if not all(said for column in by_student for said in column):
        return [], []
    teacher = [_likeliest(token, "teacher") for token in rows[0]]
    columns = [teacher, *by_student] if all(teacher) else by_student
    return (["Teacher"] if all(teacher) else []) + names, [
        list(place) for place in zip(*columns, strict=True)
    ]


def _likeliest(token: Mapping[str, Any], who: str) -> list[tuple[str, float]]:
    said = token.get("next")
    pairs = said.get(who) if isinstance(said, dict) else None
    found = []
    for pair in pairs if isinstance(pairs, list) else []:
        text, probability = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        share = number(probability)
        if isinstance(text, str) and share is not None:
            found.append((token_text(text), share))
    return found


def worst_tokens(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the student is furthest from its teacher after training, and who would have said what there."""
    return [
        {
            "context": str(printable(str(row.get("context", "")))),
            "text": token_text(row.get("text", "")),
            "before": _cell(row.get("before_kl_nats"))["nats"],
            "after": _cell(row.get("after_kl_nats"))["nats"],
            "said": {
                name: [(text, _percent(share)) for text, share in _likeliest(row, who)[:3]]
                for name, who in (("Teacher", "teacher"), ("Student", "after"))
            },
        }
        for row in objects(evaluation.get("worst_tokens"))
    ]


def _percent(share: float) -> str:
    return "<\u2009½\u00a0%" if share < 0.005 else f"{100 * share:.0f}\u00a0%"


def worst_prompts(
    models: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> tuple[str, list[tuple[str, list[str]]]]:
    """The unit, and the held-out prompts that the last model is worst at, each with its figure of every model.

    Worst is the largest divergence from the teacher, nats a token; where there is none (two tokenizers), the most bits a byte above
    the teacher's. Nothing where evaluation.json keeps no sums a conversation.
    """
    try:
        columns, unit = _excess(models)
        prompts = [
            str(prompt) for prompt in next(iter(models.values()))[1]["conversations"]["prompts"]
        ]
        order = [i for i in np.argsort(-columns[-1], kind="stable") if np.isfinite(columns[-1][i])][
            :WORST_PROMPTS
        ]
        return unit, [
            (_short(prompts[i]), [figure(float(column[i])) for column in columns]) for i in order
        ]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return "", []


def _excess(models: Mapping[str, tuple[str, Mapping[str, Any]]]) -> tuple[list[Any], str]:
    ratios = [
        measure_ratios(evaluation["conversations"][when]) for when, evaluation in models.values()
    ]
    kl = [one["kl_nats_per_token"] for one in ratios]
    if all(pair is not None for pair in kl):
        return [_divided(*pair) for pair in kl if pair is not None], "nats a token from the teacher"
    bits = [
        _divided(*pair) for pair in (one["bits_per_byte"] for one in ratios) if pair is not None
    ]
    teacher = measure_ratios(next(iter(models.values()))[1]["conversations"]["teacher"])[
        "bits_per_byte"
    ]
    return [
        column - _divided(*teacher) for column in bits if teacher is not None
    ], "bits a byte above the teacher"


def _divided(above: Any, below: Any) -> Any:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _short(prompt: str) -> str:
    kept, left_out = cut(prompt, PROMPT_BYTES)
    return kept + ("…" if left_out else "")


def as_json(view: TokenView) -> dict[str, Sequence[Any]]:
    """What the page's script reads: names, and for each token of each model pairs of text and probability."""
    return {"names": view.said_by, "said": view.said}
