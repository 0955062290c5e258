"""Paired differences against brute force and known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from potstill.evaluation.measures import MEASURES
from potstill.evaluation.paired import (
    Difference,
    Ratios,
    interval,
    paired_difference,
    regressions,
    verdict,
)


def ratios(values: object, weights: object = None) -> Ratios:
    numerator = np.atleast_2d(np.asarray(values, dtype=float))
    return Ratios(
        numerator,
        np.ones_like(numerator)
        if weights is None
        else np.atleast_2d(np.asarray(weights, dtype=float)),
    )


def test_a_measure_divides_sums_and_not_each_conversation() -> None:
    assert ratios([1.0, 9.0], [1.0, 3.0]).value == pytest.approx(10 / 4)
    assert ratios([[1.0, 9.0], [0.0, 2.0]], [[1.0, 3.0], [1.0, 3.0]]).value == pytest.approx(
        (10 / 4 + 2 / 4) / 2
    )
    assert ratios(
        [[1.0, 9.0], [0.0, 3.0]], [[1.0, 3.0], [1.0, 3.0]]
    ).per_conversation().tolist() == [0.5, 2.0]


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_interval_is_that_of_every_possible_resampling(seeds: int) -> None:
    """Three conversations and one or two seeds have few resamplings, so all are listed."""
    random = np.random.default_rng(1)
    one, other = (
        Ratios(random.random((seeds, 3)), random.random((seeds, 3)) + 1) for _ in range(2)
    )

    def value(of: Ratios, seed: int, drawn: tuple[int, ...]) -> float:
        return float(
            sum(of.numerator[seed, c] for c in drawn) / sum(of.denominator[seed, c] for c in drawn)
        )

    differences = [
        np.mean([value(one, s, drawn) - value(other, s, drawn) for s in chosen])
        for drawn in itertools.product(range(3), repeat=3)
        for chosen in itertools.product(range(seeds), repeat=seeds)
    ]
    found = paired_difference(one, other, resamples=40_000)
    assert found.value == pytest.approx(one.value - other.value)
    low, high = np.percentile(
        np.repeat(differences, 1000), [2.5, 97.5]
    )  # each as often as it is likely
    assert (found.low, found.high) == pytest.approx(
        (low, high), abs=0.03 * (max(differences) - min(differences))
    )


def test_the_interval_of_one_measure_is_that_of_its_difference_from_zero() -> None:
    random = np.random.default_rng(0)
    one = ratios(random.random((2, 12)), random.random((2, 12)) + 1)
    zero = Ratios(np.zeros_like(one.numerator), one.denominator)
    found = paired_difference(one, zero)
    assert interval(one) == pytest.approx((found.low, found.high))


def test_what_two_methods_have_in_common_does_not_widen_the_interval() -> None:
    random = np.random.default_rng(0)
    hardness = random.normal(5, 3, size=80)
    one, other = (
        ratios(hardness + random.normal(0, 0.1, 80)),
        ratios(hardness + 0.2 + random.normal(0, 0.1, 80)),
    )
    found = paired_difference(one, other)
    assert found.certain
    assert found.half_width < 0.05  # unpaired it would be about 0.9
    assert found.value == pytest.approx(-0.2, abs=0.05)


def test_swapping_the_methods_changes_only_the_sign() -> None:
    random = np.random.default_rng(0)
    one, other = ratios(random.random((3, 20))), ratios(random.random((3, 20)))
    there, back = paired_difference(one, other), paired_difference(other, one)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )


def test_no_difference_is_called_certain_about_once_in_twenty_times() -> None:
    random = np.random.default_rng(0)
    certain = sum(
        paired_difference(
            ratios(random.normal(size=60)), ratios(random.normal(size=60)), resamples=400
        ).certain
        for _ in range(200)
    )
    assert 3 <= certain <= 22


def test_seeds_that_disagree_widen_the_interval() -> None:
    same, apart = np.full((3, 40), 1.0), np.repeat([[0.0], [1.0], [2.0]], 40, axis=1)
    zero = ratios(np.zeros((3, 40)))
    assert paired_difference(ratios(same), zero).certain
    assert not paired_difference(ratios(apart), zero).certain


def test_few_conversations_give_no_verdict() -> None:
    found = paired_difference(ratios([1.0] * 5), ratios([2.0] * 5))
    assert not found.certain
    assert "too few held-out conversations" in verdict(
        "a", "b", found, MEASURES["kl_nats_per_token"]
    )


def test_unpaired_measures_are_an_error() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        paired_difference(ratios([1.0, 2.0]), ratios([1.0]))


@pytest.mark.parametrize(("measure", "first"), [("bits_per_byte", "b"), ("top1_agreement", "a")])
def test_a_verdict_names_the_better_one_first(measure: str, first: str) -> None:
    said = verdict("a", "b", Difference(0.3, 0.2, 0.4, 50), MEASURES[measure])
    assert said.startswith(f"{first} better than {'a' if first == 'b' else 'b'} by 0.300 ± 0.100 ")


def test_regressions_are_the_conversations_that_became_worse_the_worst_first() -> None:
    before, after = ratios([1.0, 1.0, 1.0, 1.0]), ratios([1.5, 0.5, 3.0, 1.0])
    assert regressions(before, after, MEASURES["bits_per_byte"]) == [(2, 1.0, 3.0), (0, 1.0, 1.5)]
    assert regressions(before, after, MEASURES["top1_agreement"]) == [(1, 1.0, 0.5)]


def test_an_empty_answer_is_no_regression_where_bytes_are_counted() -> None:
    before, after = ratios([1.0, 1.0], [2.0, 0.0]), ratios([2.0, 3.0], [2.0, 0.0])
    assert regressions(before, after, MEASURES["bits_per_byte"]) == [(0, 0.5, 1.0)]
