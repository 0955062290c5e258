"""Which losses share a plot, and what the plot shows."""

import re
from typing import Any

import pytest

from potstill.report.curves import Curve, _smoothed, panels

LOGITS = {"method": "logits", "divergence": "forward_kl", "data": "train.jsonl"}


def rows(count: int = 30, **more: Any) -> list[dict[str, Any]]:
    return [
        {"step": n, "loss": 2 + 3 / n, "tokens": 100 * n, "seconds": 2.0 * n, **more}
        for n in range(1, count + 1)
    ]


def test_seeds_and_recipes_of_one_quantity_share_plots_over_tokens_and_over_seconds() -> None:
    curves = [
        Curve("slow", 0, LOGITS, rows()),
        Curve("slow", 0, {**LOGITS, "seed": 1}, rows()),
        Curve("fast", 1, LOGITS, rows()),
    ]
    (panel,) = panels(curves)
    assert panel.quantity == "KL(teacher ‖ student)"
    tokens, seconds = panel.drawings
    assert ">tokens</text>" in tokens
    assert ">seconds</text>" in seconds
    assert [tokens.count(f">{name}</text>") for name in ("slow", "fast")] == [1, 1]


@pytest.mark.parametrize(
    "other",
    [
        {"method": "text"},
        {"method": "cross"},
        {"method": "cross", "alignment": "cells"},
        {"divergence": "reverse_kl"},
        {"temperature": 2.0},
        {"hard_label_weight": 0.5},
        {"data": "reference.jsonl"},
    ],
)
def test_losses_of_different_quantities_or_texts_have_separate_plots(
    other: dict[str, Any],
) -> None:
    curves = [Curve("one", 0, LOGITS, rows()), Curve("other", 1, {**LOGITS, **other}, rows())]
    assert len(panels(curves)) == 2


def test_a_run_without_a_logged_loss_is_left_out() -> None:
    assert panels([Curve("", 0, LOGITS, [{"step": 1}])]) == []


def test_without_token_counts_the_axis_is_steps_and_long_runs_are_in_hours() -> None:
    without = [
        {"step": row["step"], "loss": row["loss"], "seconds": 1000 * row["seconds"]}
        for row in rows()
    ]
    (panel,) = panels([Curve("", 0, LOGITS, without)])
    assert [
        re.findall(r">(tokens|step|seconds|minutes|hours)</text>", drawing)
        for drawing in panel.drawings
    ] == [
        ["step"],
        ["hours"],
    ]


def test_a_name_with_markup_is_drawn_as_text() -> None:
    (panel,) = panels([Curve("$x^2$<script>", 0, LOGITS, rows())])
    assert "<script" not in panel.drawings[0]
    assert "x^2$&lt;script&gt;" in panel.drawings[0]


def test_the_colors_are_those_of_the_page() -> None:
    (panel,) = panels([Curve("", 0, LOGITS, rows())])
    assert "var(--c0)" in panel.drawings[0]
    assert set(re.findall(r"#[0-9a-f]{6}", panel.drawings[0])) <= {"#ffffff", "#000000"}


def test_one_outlier_does_not_change_the_running_median() -> None:
    losses = [1.0] * 100
    losses[50] = 100.0
    points = [(float(step), loss) for step, loss in enumerate(losses)]
    assert {y for _, y in _smoothed(points)} == {1.0}


def test_an_on_policy_run_has_a_panel_for_each_kind_of_text_and_of_round() -> None:
    config = {**LOGITS, "on_policy": 0.5, "on_policy_divergence": "reverse_kl"}
    logged = [
        {"step": n, "tokens": 10 * n, "seconds": n, "loss": 1.0, f"{kind}_policy_loss": 1 / n}
        for n, kind in ((1, "off"), (2, "on"), (3, "off"), (4, "on"))
    ]
    rounds = [
        {"step": n, "tokens": 10 * n, "seconds": n, "rollout_ended": 0.5, "rollout_tokens": 9.0}
        for n in (1, 3)
    ]
    found = panels([Curve("", 0, config, [*rounds, *logged])])
    assert [one.quantity for one in found] == [
        "KL(teacher ‖ student)",
        "KL(student ‖ teacher), on the student's own answers",
        "The student's own answers: those that end",
        "The student's own answers: length",
    ]
    assert "0.500 at step 2" not in found[0].caption
    assert found[0].of == "per supervised token of the training text"
    assert (found[2].of, found[3].of) == ("share of a round", "tokens an answer")
    assert "Thin: each round" in found[3].caption
