"""Task scores: means over seeds, only for equal questions, and which direction is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.comparison.abilities import abilities, directions, in_figures
from potstill.comparison.finished_runs import FinishedRun


def run(after: float, *, questions: int = 40) -> FinishedRun:
    def measured(value: float) -> dict[str, Any]:
        found = {
            "acc": value,
            "perplexity": 9.0,
            "stderr": {"acc": 0.05, "perplexity": None},
            "lower_is_better": ["perplexity"],
        }
        return {"quiz": {"questions": questions, **found}}

    return FinishedRun(
        Path(),
        {},
        {"tasks": {"teacher": measured(0.9), "before": measured(0.3), "after": measured(after)}},
    )


def test_a_method_has_the_mean_over_its_seeds_and_the_interval_of_one_run() -> None:
    found = abilities({"logits": [run(0.6), run(0.8)], "text": [run(0.5), run(0.5)]}, "untouched")
    assert list(found) == ["teacher", "untouched", "logits", "text"]
    figures, ends = in_figures(found["logits"])
    assert figures == {"quiz acc": 0.7, "quiz perplexity": 9.0}
    assert ends == {"quiz acc": [0.7 - 0.098, 0.7 + 0.098]}
    assert found["untouched"]["quiz acc"][0] == 0.3


def test_runs_with_different_questions_are_not_compared() -> None:
    without = FinishedRun(Path(), {}, {})
    for other in (run(0.5, questions=20), without):
        assert abilities({"logits": [run(0.6)], "text": [other]}, "untouched") == {}
        assert abilities({"text": [other], "logits": [run(0.6)]}, "untouched") == {}
    assert directions({"text": [without]}) == {}


def test_lower_is_better_for_perplexity() -> None:
    assert directions({"logits": [run(0.6)]}) == {"quiz acc": "higher", "quiz perplexity": "lower"}
