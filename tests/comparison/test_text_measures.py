"""Measures of an answer as text."""

from __future__ import annotations

import sys

import pytest

from potstill.comparison.text_measures import length_words, loops, measures_against, stops
from potstill.errors import ConfigError


def answer(text: str, **more: object) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}],
        **more,
    }


def test_an_answer_that_the_token_limit_cut_off_did_not_stop() -> None:
    assert (stops(answer("Because.")), stops(answer("Becau", cut_off=True))) == (1.0, 0.0)


def test_an_answer_that_repeats_the_same_words_loops() -> None:
    assert (
        loops(answer("the rain falls " * 12)),
        loops(answer("The rain falls on the hills.")),
    ) == (1.0, 0.0)
    assert length_words(answer("The rain, it falls.")) == 4


@pytest.mark.parametrize("name", ["chrf", "rouge_l"])
def test_equal_texts_score_100_and_different_texts_less_in_any_script(name: str) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    score = measures_against([name])[name]
    assert score("Дождь идёт", "Дождь идёт") == pytest.approx(100)
    assert score("Дождь идёт", "Дождь кончился") < 80
    assert score("", "Дождь") == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score")
    assert measures_against(["rouge_l"])["rouge_l"](
        "the wet cat", "the cat sat here"
    ) == pytest.approx(100 * 2 * 2 / (3 + 4))


def test_an_unknown_measure_or_a_missing_library_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="'bleurt' is not known; use one of chrf, rouge_l"):
        measures_against(["bleurt"])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match=r"pip install 'potstill\[measures\]'"):
        measures_against(["chrf"])
