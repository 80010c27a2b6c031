"""Whether a primary has a snapshot's floor: every combination of what it may say, against what was replicated.

The judge here is the data itself: a shard's writes are numbered, a promoted replica has a first part of them, and the
floor is safe if all up to it are there and no other shard's writes have come in between in an order of their own.
"""

from __future__ import annotations

from itertools import product

import pytest

from routing.offsets import NO_POINT, NO_SECOND_HISTORY, Point, Sample
from routing.snapshot_floors import Proven, ShardFloor, Unproven, judge, retaken

FIRST, SECOND, OTHER = b"1" * 40, b"2" * 40, b"9" * 40
MINE, MORE, FEWER = frozenset({1, 2}), frozenset({1, 2, 3}), frozenset({1})
FLOOR_OFFSET = 100


def floors_with(slots: frozenset[int] | None, *, is_settled: bool) -> dict[bytes, ShardFloor]:
    return {
        FIRST: ShardFloor(Point(FIRST, FLOOR_OFFSET), slots, 1, is_settled=is_settled),
        OTHER: ShardFloor(Point(OTHER, 5), frozenset({9}), 1),
    }


def is_proven(
    floors: dict[bytes, ShardFloor], sample: Sample, slots: frozenset[int], importing: bool
) -> bool:
    return isinstance(judge(floors, sample, slots, 2, is_importing=importing), Proven)


@pytest.mark.parametrize(
    ("applied", "slots", "known", "is_settled", "importing"),
    list(
        product((98, 99, 100, 101, 500), (MINE, MORE, FEWER), (MINE, None), (True, False), (True, False)),
    ),
)
def test_a_promoted_replica_is_proven_exactly_if_it_had_all_up_to_the_floor(
    applied: int, slots: frozenset[int], known: frozenset[int] | None, is_settled: bool, importing: bool
) -> None:
    """``applied``: the last byte of the former history that it had. Its second offset is that of the next one."""
    sample = Sample(True, Point(SECOND, applied + 50), Point(FIRST, applied + 1))
    has_the_floor = applied >= FLOOR_OFFSET
    came_by_migration = slots == MORE or importing or not is_settled
    is_watched = known is not None
    floors = floors_with(known, is_settled=is_settled)
    assert is_proven(floors, sample, slots, importing) is (
        has_the_floor and not came_by_migration and is_watched
    )


@pytest.mark.parametrize("offset", [99, 100, 101])
@pytest.mark.parametrize("known", [MINE, None])
@pytest.mark.parametrize("importing", [True, False])
def test_the_same_history_is_proven_if_it_is_no_shorter(
    offset: int, known: frozenset[int] | None, importing: bool
) -> None:
    sample = Sample(True, Point(FIRST, offset), NO_POINT)
    floors = floors_with(known, is_settled=not importing)
    assert is_proven(floors, sample, MORE, importing) is (offset >= FLOOR_OFFSET)


@pytest.mark.parametrize("second", [Point(NO_SECOND_HISTORY, -1), Point(b"8" * 40, 500), NO_POINT])
def test_an_unknown_history_is_proven_only_where_there_are_no_slots(second: Point) -> None:
    sample = Sample(True, Point(SECOND, 500), second)
    floors = floors_with(MINE, is_settled=True)
    assert not is_proven(floors, sample, MINE, False)
    verdict = judge(floors, sample, frozenset(), 2, is_importing=True)
    assert isinstance(verdict, Proven)
    assert verdict.floor.slots == frozenset()
    assert not verdict.floor.is_settled


def test_the_floor_of_a_continued_history_is_the_former_one_at_the_new_name() -> None:
    sample = Sample(True, Point(SECOND, 600), Point(FIRST, 301))
    verdict = judge(floors_with(MINE, is_settled=True), sample, FEWER, 2, is_importing=False)
    assert verdict == Proven(ShardFloor(Point(SECOND, FLOOR_OFFSET), MINE, 2))
    # A second failover in turn, from a node that had everything of the second history but nothing of what came after.
    floors = {SECOND: verdict.floor}
    again = judge(
        floors, Sample(True, Point(b"3" * 40, 700), Point(SECOND, 302)), FEWER, 3, is_importing=False
    )
    assert isinstance(again, Proven)


@pytest.mark.parametrize(
    ("slots", "epoch", "importing", "settled"),
    [
        (MINE, 1, False, True),
        (FEWER, 1, False, True),
        (MORE, 1, False, False),
        (MINE, 1, True, False),
        (MINE, 2, False, False),
    ],
)
def test_a_floor_is_unsettled_by_whatever_may_have_brought_slots(
    slots: frozenset[int], epoch: int, importing: bool, settled: bool
) -> None:
    floor = retaken(Sample(True, Point(FIRST, FLOOR_OFFSET), NO_POINT), MINE, 1)
    seen = floor.seen(slots, epoch, is_importing=importing)
    assert seen.is_settled is settled
    assert seen.seen(MINE, 1, is_importing=False).is_settled is (settled and slots == MINE)  # it stays so


def test_the_reason_says_what_is_missing() -> None:
    verdict = judge(
        floors_with(MINE, is_settled=True),
        Sample(True, Point(SECOND, 600), Point(FIRST, 100)),
        MINE,
        2,
        is_importing=False,
    )
    assert verdict == Unproven("it was promoted at offset 100, and the snapshot needs 100")


def test_a_node_that_owns_nothing_proves_nothing_of_what_nobody_watched() -> None:
    """It may have come back empty, and handed its slots on before the proxy began."""
    sample = Sample(True, Point(SECOND, 500), NO_POINT)
    assert not is_proven(floors_with(None, is_settled=True), sample, frozenset(), False)


def test_a_floor_speaks_for_the_slots_that_were_there_when_it_was_taken_and_for_none_while_more_come() -> (
    None
):
    (slot, *_) = MINE
    (other,) = MORE - MINE
    floor = ShardFloor(Point(FIRST, FLOOR_OFFSET), MINE, 1)
    assert floor.has_keys_of(slot)
    assert not floor.has_keys_of(other)
    assert not floor.seen(MINE, 1, is_importing=True).has_keys_of(slot)
    assert not ShardFloor(Point(FIRST, FLOOR_OFFSET), None).has_keys_of(slot)
