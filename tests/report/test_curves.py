"""Which losses share a drawing, and what is drawn of them."""

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


def test_seeds_and_recipes_of_one_quantity_share_a_drawing_over_tokens_and_over_seconds() -> None:
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
def test_losses_that_are_not_the_same_quantity_on_the_same_text_have_a_drawing_each(
    other: dict[str, Any],
) -> None:
    assert (
        len(
            panels(
                [Curve("one", 0, LOGITS, rows()), Curve("other", 1, {**LOGITS, **other}, rows())]
            )
        )
        == 2
    )


def test_a_run_that_has_logged_nothing_is_left_out() -> None:
    assert panels([Curve("", 0, LOGITS, [{"step": 1}])]) == []


def test_without_counted_tokens_the_axis_is_steps_and_long_runs_are_told_in_hours() -> None:
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


def test_a_name_is_drawn_as_text_whatever_is_in_it() -> None:
    (panel,) = panels([Curve("$x^2$<script>", 0, LOGITS, rows())])
    assert "<script" not in panel.drawings[0]
    assert "x^2$&lt;script&gt;" in panel.drawings[0]


def test_the_colours_are_those_of_the_page() -> None:
    (panel,) = panels([Curve("", 0, LOGITS, rows())])
    assert "var(--c0)" in panel.drawings[0]
    assert set(re.findall(r"#[0-9a-f]{6}", panel.drawings[0])) <= {"#ffffff", "#000000"}


def test_one_hard_batch_leaves_no_trace_in_the_bold_line() -> None:
    losses = [1.0] * 100
    losses[50] = 100.0
    assert {y for _, y in _smoothed(list(zip(range(100), losses, strict=True)))} == {1.0}  # type: ignore[arg-type]
