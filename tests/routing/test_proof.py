"""What a stamp proves, and why it does not (promise 2)."""

from __future__ import annotations

from math import inf

import pytest

from routing.offsets import NO_POINT, OffsetHistory, Point, Sample
from routing.proof import Refusal, judge

X, Y = b"a" * 40, b"b" * 40


def stamp(offset: int, replid: bytes = X, *, is_syncing: bool = False) -> Sample:
    return Sample(False, Point(replid, offset), NO_POINT, is_syncing=is_syncing)


def sampled(*pairs: tuple[float, int]) -> OffsetHistory:
    history = OffsetHistory(60)
    for at, offset in pairs:
        history.add(at, Point(X, offset))
    return history


@pytest.mark.parametrize(
    ("sample", "refusal"),
    [
        (stamp(100), None),
        (stamp(99), Refusal.BEHIND),
        (stamp(1000, Y), Refusal.OTHER_HISTORY),
        (stamp(100, is_syncing=True), Refusal.SYNCING),
    ],
)
def test_a_floor_is_reached_in_its_own_history_only(sample: Sample, refusal: Refusal | None) -> None:
    assert judge(inf, sampled(), Point(X, 100), sample, 0.0) == (refusal, -inf)


@pytest.mark.parametrize(
    ("sample", "now", "expected"),
    [
        (stamp(10), 1.5, (None, 1.0)),  # exactly as old as it may be
        (stamp(10), 1.6, (Refusal.TOO_OLD, 1.0)),
        (stamp(20), 2.4, (None, 2.0)),
        (stamp(9), 1.0, (Refusal.TOO_OLD, -inf)),  # older than anything that was sampled
        (stamp(20, Y), 2.0, (Refusal.OTHER_HISTORY, -inf)),
        (stamp(20, is_syncing=True), 2.0, (Refusal.SYNCING, -inf)),
    ],
)
def test_a_bound_is_kept_by_what_was_sampled(
    sample: Sample, now: float, expected: tuple[Refusal | None, float]
) -> None:
    assert judge(0.5, sampled((1.0, 10), (2.0, 20)), None, sample, now) == expected
