"""The verdict at the top of a comparison's page, and the plot of the pairs."""

from typing import Any

import pytest

from potstill.comparison.page import _pair_positions, verdict


def pair(one: str, other: str, difference: float, half_width: float = 0.1) -> dict[str, Any]:
    certain = abs(difference) > half_width
    ends = [difference - half_width, difference + half_width]
    words = (
        f"{one} better than {other}" if certain else f"no difference seen between {one} and {other}"
    )
    differences = {
        "kl_nats_per_token": {"difference": difference, "ci95": ends, "certain": certain}
    }
    return {
        "one": one,
        "other": other,
        "verdict": words,
        "certain": certain,
        "differences": differences,
    }


def compared(*pairs: dict[str, Any]) -> dict[str, Any]:
    names = dict.fromkeys(name for one in pairs for name in (one["one"], one["other"]))
    return {
        "measure": "kl_nats_per_token",
        "methods": {name: {} for name in names},
        "pairs": list(pairs),
        "conversations": 60,
        "answers": 0,
        "seeds": [0],
    }


def test_the_verdict_is_the_best_against_the_second_then_against_the_untouched_student() -> None:
    found = verdict(
        compared(
            pair("logits", "text", -0.5),
            pair("logits", "untouched", -2.0),
            pair("text", "untouched", -1.5),
        )
    )
    assert (found.tone, found.headline) == ("good", "Logits better than text.")
    assert found.reason.startswith(
        "Logits better than untouched. Paired over 60 held-out conversations, seed 0;"
    )


@pytest.mark.parametrize(
    ("best", "difference", "tone"),
    [("logits", -0.5, "good"), ("logits", -0.05, "open"), ("untouched", -0.5, "bad")],
)
def test_the_tone_is_good_only_if_a_method_is_certainly_better(
    best: str, difference: float, tone: str
) -> None:
    other = "text" if best == "untouched" else "untouched"
    assert verdict(compared(pair(best, other, difference))).tone == tone


def test_all_pairs_share_one_axis_and_its_zero() -> None:
    drawn = _pair_positions(
        compared(pair("a", "b", -0.05), pair("a", "c", -0.9), pair("b", "c", -0.85))
    )
    # The axis goes from 0.05 behind to 1 ahead.
    for one, ahead in zip(drawn, (0.05, 0.9, 0.85), strict=True):
        assert one["zero"] == pytest.approx(100 * 0.05 / 1.05)
        assert one["at"] == pytest.approx(100 * (0.05 + ahead) / 1.05)
    assert all(0 <= one["low"] <= one["at"] <= one["high"] <= 100 for one in drawn)
