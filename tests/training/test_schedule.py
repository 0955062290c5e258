"""Which micro-batches are on-policy: exact shares, in a place that the number alone decides."""

from __future__ import annotations

import pytest

from potstill.training.schedule import OnPolicySchedule


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_the_share_is_exact_and_places_are_consecutive(share: float) -> None:
    schedule = OnPolicySchedule.of_run(share, 0.25, 100, 2, 7)
    places = [schedule.place(number) for number in range(200)]
    assert not any(places[:50])
    own = [place for place in places if place is not None]
    assert len(own) == int(150 * share + 1e-9)
    assert own == [divmod(k, 7) for k in range(len(own))]


def test_what_came_before_does_not_depend_on_where_a_run_resumes() -> None:
    schedule = OnPolicySchedule.of_run(0.3, 0.1, 50, 1, 4)
    for number in range(50):
        earlier = sum(schedule.place(n) is not None for n in range(number))
        assert schedule.before(number) == earlier
