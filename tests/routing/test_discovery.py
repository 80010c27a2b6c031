"""Whom discovery believes: a slot goes to the newest claim of a witness, and never back on hearsay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.cluster_nodes import AtomicMigration, NodeLine, Report
from routing.discovery import Known, Merging, best_lines, merge, whom_to_ask, with_all_moved, with_moved
from routing.slot import SLOT_COUNT
from routing.topology import (
    EMPTY_VIEW,
    UNOWNED,
    Address,
    Migration,
    MigrationKind,
    Node,
    Role,
    Shard,
    TopologyView,
)

NOTHING = Known(EMPTY_VIEW, (0,) * SLOT_COUNT)


def node(name: str, epoch: int = 1, **kwargs: object) -> Node:
    return Node(name, Address(name, 7000), Role.PRIMARY, config_epoch=epoch, **kwargs)  # type: ignore[arg-type]


def replica(name: str, of: str) -> NodeLine:
    return NodeLine(Node(name, Address(name, 7000), Role.REPLICA, of))


def line(name: str, low: int, high: int, epoch: int = 1, **kwargs: object) -> NodeLine:
    return NodeLine(node(name, epoch, **kwargs), ((low, high),) if high >= low else ())


def report(
    myself: NodeLine, *others: NodeLine, epoch: int = 1, jobs: Sequence[AtomicMigration] = ()
) -> Report:
    return Report(myself, others, epoch, True, tuple(jobs))


def owner(view: TopologyView, slot: int) -> str | None:
    primary = view.primary_of(slot)
    return None if primary is None else primary.id


A, B = line("a", 0, 99, 1), line("b", 100, SLOT_COUNT - 1, 2)


def test_a_view_of_all() -> None:
    known = merge([report(A, B, replica("r", "a")), report(B, A, replica("r", "a"))], NOTHING, {})
    view = known.view
    assert [(shard.primary.id, [node.id for node in shard.replicas]) for shard in view.shards] == [
        ("a", ["r"]),
        ("b", []),
    ]
    assert [owner(view, slot) for slot in (0, 99, 100, SLOT_COUNT - 1)] == ["a", "a", "b", "b"]
    assert (view.revision, view.unowned_count) == (1, 0)
    assert [known.claim_epochs[slot] for slot in (0, 100)] == [1, 2]


def test_a_replica_repeats_the_open_slots_of_its_primary() -> None:
    """Valkey's replicas do: it is one migration, to the primary, whether that answered or not."""
    importing = replace(B, importing=((5, "a"),))
    repeating = replace(replica("r", "b"), importing=((5, "a"),))
    for reports in (
        [report(A, B, repeating), report(importing, A, repeating), report(repeating, A, B)],
        [report(A, B, repeating), report(repeating, A, B)],
    ):
        assert merge(reports, NOTHING, {}).view.migrations == (
            Migration((5,), "a", "b", MigrationKind.STEPWISE),
        )


def test_the_same_news_gives_the_same_view() -> None:
    reports = [report(A, B), report(B, A)]
    known = merge(reports, NOTHING, {})
    assert merge(reports, known, {}).view is known.view
    assert merge(reports[::-1], known, {}).view is known.view
    assert merge([], known, {}) is known


def test_a_node_that_was_reset_is_no_member_any_more() -> None:
    """It left, knows nobody and still answers. A cluster whose nodes have not met yet has members all the same."""
    reset, met = line("c", 1, 0, 0), [report(A, B), report(B, A)]
    view = merge([*met, report(reset)], NOTHING, {}).view
    assert [shard.primary.id for shard in view.shards] == ["a", "b"]
    named = merge([report(A, B, reset), report(B, A), report(reset)], NOTHING, {}).view
    assert [shard.primary.id for shard in named.shards] == ["a", "b", "c"]
    strangers = merge([report(A), report(B)], NOTHING, {}).view
    assert [shard.primary.id for shard in strangers.shards] == ["a", "b"]


def test_of_two_claims_the_higher_epoch_wins_in_either_order() -> None:
    """The old owner has not heard yet that the slot was taken over."""
    old, new = line("a", 0, 99, 1), line("b", 50, 99, 3)
    for reports in ([report(old, new), report(new, old)], [report(new, old), report(old, new)]):
        view = merge(reports, NOTHING, {}).view
        assert (owner(view, 49), owner(view, 50)) == ("a", "b")


def test_a_node_is_the_only_witness_of_its_own_claims() -> None:
    """B still tells of a's former slots; a itself says less, and is believed."""
    view = merge([report(line("a", 0, 49, 1), B), report(B, line("a", 0, 99, 1))], NOTHING, {}).view
    assert (owner(view, 49), owner(view, 50)) == ("a", None)
    assert view.unowned_count == 50


def test_of_a_silent_node_the_newest_hearsay_counts() -> None:
    told = [report(B, line("a", 0, 10, 1)), report(line("c", 1, 0, 3), line("a", 0, 20, 5), B)]
    for reports in (told, told[::-1]):
        view = merge(reports, NOTHING, {}).view
        assert (owner(view, 20), owner(view, 21)) == ("a", None)


def test_a_slot_does_not_go_back_on_stale_hearsay() -> None:
    """B took the slot over and then fell silent; c still tells of a's older claim, and a does not answer either."""
    taken = line("b", 0, SLOT_COUNT - 1, 7)
    known = merge([report(taken, line("a", 1, 0, 1), line("c", 1, 0, 3))], NOTHING, {})
    stale = report(line("c", 1, 0, 3), line("a", 0, 99, 1), line("b", 100, SLOT_COUNT - 1, 2))
    again = merge([stale], known, {})
    assert (owner(again.view, 0), owner(again.view, 100)) == ("b", "b")
    assert again.claim_epochs[0] == 7
    # When it goes on, nothing wears off.
    assert owner(merge([stale], again, {}).view, 0) == "b"
    # A newer claim than b's does replace it: its replica was promoted.
    promoted = report(line("c", 0, SLOT_COUNT - 1, 8), line("b", 100, SLOT_COUNT - 1, 2))
    assert owner(merge([promoted], again, {}).view, 0) == "c"


def test_an_owner_that_answers_can_give_a_slot_away_to_a_lower_epoch() -> None:
    """What it says of itself counts, so a slot that it does not claim any more is the other claimant's."""
    known = merge([report(line("b", 0, 99, 7), line("a", 1, 0, 1))], NOTHING, {})
    view = merge([report(line("b", 50, 99, 7), line("a", 0, 49, 1))], known, {}).view
    assert owner(view, 0) == "a"


def test_a_move_that_was_adopted_during_the_round_is_kept() -> None:
    reports = [report(A, B), report(B, A)]
    known = merge(reports, NOTHING, {})
    moved = with_moved(known.view, 5, Address("b", 7000))
    again = merge(reports, Known(moved, known.claim_epochs), {5: Address("b", 7000)})
    assert owner(again.view, 5) == "b"
    assert again.view is moved
    # The next round asks anew: what both say then is true.
    assert owner(merge(reports, again, {}).view, 5) == "a"


def test_an_adopted_move_is_not_undone_by_hearsay_of_the_same_age() -> None:
    """A said MOVED to b; now neither answers, and c has not heard of it."""
    known = merge([report(A, B), report(B, A)], NOTHING, {})
    moved = with_moved(known.view, 5, Address("b", 7000))
    heard = report(line("c", 1, 0, 3), A, B)
    again = merge([heard], Known(moved, known.claim_epochs), {})
    assert (owner(again.view, 5), owner(again.view, 6)) == ("b", "a")


def test_open_slots_are_migrations_seen_from_either_side() -> None:
    a = replace(A, migrating=((5, "b"), (6, "b")))
    b = replace(B, importing=((6, "a"), (7, "a")))
    expected = (Migration((5, 6, 7), "a", "b", MigrationKind.STEPWISE),)
    assert merge([report(a, b), report(b, a)], NOTHING, {}).view.migrations == expected
    done = replace(line("b", 5, SLOT_COUNT - 1, 9), importing=((5, "a"), (6, "a"), (7, "a")))
    assert merge([report(a, done), report(done, a)], NOTHING, {}).view.migrations == ()


def test_a_job_of_atomic_migration_is_told_by_both_sides_once() -> None:
    job = AtomicMigration("job", ((5, 7),), "a", "b", "replicating")
    view = merge([report(A, B, jobs=[job]), report(B, A, jobs=[job])], NOTHING, {}).view
    assert view.migrations == (Migration((5, 6, 7), "a", "b", MigrationKind.ATOMIC),)


def test_a_failing_node_is_shown_until_it_answers() -> None:
    failing = line("a", 0, 99, 1, is_failing=True)
    view = merge([report(B, failing)], NOTHING, {}).view
    assert next(view.nodes()).is_failing
    view = merge([report(B, failing), report(A, B)], NOTHING, {}).view
    assert not next(view.nodes()).is_failing


def test_moved_to_the_known_owner_is_no_news() -> None:
    view = merge([report(A, B)], NOTHING, {}).view
    assert with_moved(view, 5, Address("a", 7000)) is view


def test_moved_to_another_owner_ends_the_slots_migration() -> None:
    a = replace(A, migrating=((5, "b"), (6, "b")))
    view = merge([report(a, B)], NOTHING, {}).view
    moved = with_moved(view, 5, Address("b", 7000))
    assert (owner(moved, 5), owner(moved, 6)) == ("b", "a")
    assert moved.migrations == (Migration((6,), "a", "b", MigrationKind.STEPWISE),)
    assert moved.revision == view.revision + 1


@pytest.mark.parametrize("name", ["r", "stranger"])
def test_moved_to_who_was_no_primary_is_a_shard_of_its_own(name: str) -> None:
    view = merge([report(A, B, replica("r", "a"))], NOTHING, {}).view
    moved = with_moved(view, 5, Address(name, 7000))
    primary = moved.primary_of(5)
    assert primary is not None
    assert primary.address == Address(name, 7000)
    assert primary.role is Role.PRIMARY
    assert with_moved(moved, 5, Address(name, 7000)) is moved


CLAIM = st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9))


@given(st.lists(CLAIM, min_size=1, max_size=3, unique_by=lambda claim: claim[0]), st.randoms())
def test_of_witnesses_the_order_does_not_matter_and_the_newest_claim_wins(
    claims: list[tuple[str, int, int, int]], random: object
) -> None:
    lines = [line(name, low, high, epoch) for name, low, high, epoch in claims]
    reports = [report(mine, *[other for other in lines if other is not mine]) for mine in lines]
    known = merge(reports, NOTHING, {})
    random.shuffle(reports)  # type: ignore[attr-defined]
    assert merge(reports, NOTHING, {}) == known
    for slot in range(10):
        claiming = [(epoch, name) for name, low, high, epoch in claims if low <= slot <= high]
        assert owner(known.view, slot) == (max(claiming)[1] if claiming else None)
    assert known.view.shard_of_slot[10:] == (UNOWNED,) * (SLOT_COUNT - 10)


def test_a_slot_that_nobody_claims_keeps_its_owner_once() -> None:
    """A look that asked the new owner before and the former one after a hand-over finds none: a second look tells."""
    known = merge([report(A, B), report(B, A)], NOTHING, {})
    without = replace(A, slot_ranges=((0, 4), (6, 99)))
    straddling = [report(without, B), report(B, A)]
    doubted = merge(straddling, known, {})
    assert (owner(doubted.view, 5), doubted.unclaimed) == ("a", {5})
    assert doubted.view is known.view
    gone = merge(straddling, doubted, {})
    assert (owner(gone.view, 5), gone.unclaimed) == (None, frozenset())
    handed_over = replace(B, slot_ranges=((5, 5), (100, SLOT_COUNT - 1)))
    found = merge([report(without, B), report(handed_over, A)], doubted, {})
    assert (owner(found.view, 5), found.unclaimed) == ("b", frozenset())


def test_a_migration_goes_on_while_nobody_is_asked_who_could_tell() -> None:
    """In a large cluster a round asks a few; only the source and the target know of their open slots."""
    a = replace(A, migrating=((5, "b"), (6, "b")))
    c = line("c", 1, 0, 3)
    known = merge([report(a, B, c)], NOTHING, {})
    assert known.view.migrations == (Migration((5, 6), "a", "b", MigrationKind.STEPWISE),)
    assert merge([report(c, A, B)], known, {}).view is known.view
    # B is heard to have taken slot 5, with a newer epoch: only 6 is left.
    taken = replace(B, node=node("b", 9), slot_ranges=((5, 5), *B.slot_ranges))
    assert merge([report(c, A, taken)], known, {}).view.migrations == (
        Migration((6,), "a", "b", MigrationKind.STEPWISE),
    )
    # Either party's own word ends it.
    for teller in (report(A, B, c), report(B, A, c)):
        assert merge([teller], known, {}).view.migrations == ()


def test_equal_shards_stay_the_same_tuple_when_slots_move() -> None:
    """So that who follows the nodes sees at once that nothing concerns it."""
    known = merge([report(A, B), report(B, A)], NOTHING, {})
    a, b = line("a", 0, 49, 1), replace(B, slot_ranges=((50, SLOT_COUNT - 1),))
    again = merge([report(a, b), report(b, a)], known, {})
    assert owner(again.view, 50) == "b"
    assert again.view.shards is known.view.shards


def test_a_merge_in_steps_counts_what_is_known_at_its_end() -> None:
    """A MOVED that comes between two steps is not lost."""
    reports = [report(A, B), report(B, A)]
    known = merge(reports, NOTHING, {})
    merging = Merging(reports)
    while merging.step():
        pass
    moved = with_moved(known.view, 5, Address("b", 7000))
    again = merging.finish(Known(moved, known.claim_epochs), {5: Address("b", 7000)})
    assert again.view is moved


def test_many_moves_are_as_one_after_the_other() -> None:
    """A known owner's, a replica's, a stranger's, and one that is no news."""
    a = replace(A, migrating=((5, "b"), (6, "b")))
    view = merge([report(a, B, replica("r", "a"))], NOTHING, {}).view
    names = {5: "b", 6: "r", 7: "stranger", 8: "r", 9: "a"}
    moves = {slot: Address(name, 7000) for slot, name in names.items()}
    one_by_one = view
    for slot, address in moves.items():
        one_by_one = with_moved(one_by_one, slot, address)
    at_once = with_all_moved(view, moves)
    assert at_once == replace(one_by_one, revision=view.revision + 1)
    assert with_all_moved(view, {9: Address("a", 7000)}) is view


def test_a_line_of_many_reports_is_as_good_as_equal_lines() -> None:
    """Whether or not equal lines are the same object; the first of equal epochs counts."""
    shared = [report(line("x", 1, 0), A, B), report(line("y", 1, 0), A, B)]
    apart = [replace(r, others=tuple(replace(other) for other in r.others)) for r in shared]
    assert best_lines(shared) == best_lines(apart)


def cluster(primaries: int, replicas: int, migrations: tuple[Migration, ...] = ()) -> TopologyView:
    followers = [
        Node(f"r{n}", Address(f"r{n}", 7000), Role.REPLICA, f"p{n % primaries}") for n in range(replicas)
    ]
    shards = tuple(Shard(node(f"p{n}"), tuple(followers[n::primaries])) for n in range(primaries))
    return TopologyView(1, 1, shards, (0,) * SLOT_COUNT, migrations)


def test_a_small_cluster_is_asked_whole() -> None:
    view = cluster(8, 8)
    assert set(whom_to_ask(view, 3, 16)) == {node.address for node in view.nodes()}


@pytest.mark.parametrize(("primaries", "replicas"), [(500, 500), (1000, 0), (3, 60), (17, 0)])
def test_in_a_large_cluster_everyone_is_asked_in_turn(primaries: int, replicas: int) -> None:
    """And never more than the round's size."""
    view = cluster(primaries, replicas)
    asked: set[Address] = set()
    for turn in range(400):
        now = whom_to_ask(view, turn, 16)
        assert len(now) == len(set(now)) == 16
        asked.update(now)
    assert asked == {node.address for node in view.nodes()}


def test_who_knows_of_a_migration_and_who_was_heard_of_is_asked_at_each_round() -> None:
    view = cluster(500, 500, (Migration((1,), "p300", "p400", MigrationKind.STEPWISE),))
    heard = Address("r250", 7000)
    for turn in range(10):
        asked = whom_to_ask(view, turn, 16, [heard, Address("stranger", 1)])
        assert {Address("p300", 7000), Address("p400", 7000), heard} <= set(asked)
        assert Address("stranger", 1) not in asked
        assert len(asked) == 16
