"""The view's own questions, and addresses as text."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.slot import SLOT_COUNT
from routing.topology import (
    EMPTY_VIEW,
    FINGERPRINT_BYTES,
    UNOWNED,
    Address,
    Migration,
    MigrationKind,
    Node,
    Role,
    Shard,
    TopologyView,
    ranges,
)


@given(st.sets(st.integers(0, 40)))
def test_ranges_are_the_runs(numbers: set[int]) -> None:
    found = list(ranges(sorted(numbers)))
    assert {n for low, high in found for n in range(low, high + 1)} == numbers
    assert all(high + 1 < low for (_, high), (low, _) in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:6379", Address("127.0.0.1", 6379)),
        ("[::1]:6379", Address("::1", 6379)),
        ("::1:6379", Address("::1", 6379)),
        ("node.example:0", Address("node.example", 0)),
        (":6379", Address("", 6379)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:x", "host:65536", "host:-1", "host:1_0", "host:\u0661"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        Address.parse(text)


def test_owners_and_nodes() -> None:
    a, r, b = (Node(name, Address(name, 1), Role.PRIMARY) for name in "arb")
    owners = (0, 0, 1) + (UNOWNED,) * (SLOT_COUNT - 3)
    view = TopologyView(1, 1, (Shard(a, (r,)), Shard(b)), owners)
    assert [view.primary_of(slot) for slot in (0, 2, 3)] == [a, b, None]
    assert list(view.nodes()) == [a, r, b]
    assert view.slot_ranges_of(0) == ((0, 1),)
    assert view.unowned_count == SLOT_COUNT - 3
    assert EMPTY_VIEW.unowned_count == SLOT_COUNT


@given(st.lists(st.tuples(st.integers(UNOWNED, 2), st.integers(1, 9)), max_size=12))
def test_slot_ranges_are_the_runs_of_each_owner(runs: list[tuple[int, int]]) -> None:
    """However often an owner's slots are torn apart; UNOWNED has ranges too."""
    owners = [owner for owner, length in runs for _ in range(length)]
    owners += [1] * (SLOT_COUNT - len(owners))
    shards = tuple(Shard(Node(str(n), Address("h", n), Role.PRIMARY)) for n in range(3))
    view = TopologyView(1, 1, shards, tuple(owners))
    for owner in range(UNOWNED, 3):
        mine = [slot for slot, other in enumerate(owners) if other == owner]
        assert view.slot_ranges_of(owner) == tuple(ranges(mine))


def test_an_address_serves_while_any_node_there_is_not_failing() -> None:
    """A node that took over a failed one's address may be in the view beside it."""
    here, there = Address("here", 1), Address("there", 1)
    old = Node("old", here, Role.PRIMARY, is_failing=True)
    dead = Node("dead", there, Role.REPLICA, "old", is_failing=True)
    view = TopologyView(1, 1, (Shard(old, (dead,)),), (UNOWNED,) * SLOT_COUNT)
    assert not view.is_serving(here)
    assert not view.is_serving(there)
    young = Node("young", here, Role.REPLICA, "old")
    view = TopologyView(2, 1, (Shard(old, (dead, young)),), (UNOWNED,) * SLOT_COUNT)
    assert view.is_serving(here)


def test_what_is_worked_out_once_is_no_part_of_the_content() -> None:
    view = TopologyView(1, 1, (), (UNOWNED,) * SLOT_COUNT)
    other = TopologyView(1, 1, (), (UNOWNED,) * SLOT_COUNT)
    assert view.unowned_count == SLOT_COUNT
    assert view.slot_ranges_of(UNOWNED) == ((0, SLOT_COUNT - 1),)
    assert view == other


# -- the fingerprint


def view_of(owner_ids: list[str], order: list[str], epoch: int = 1) -> TopologyView:
    """slot -> owner's id ("" for nobody) for the first slots, the rest of the last one; shards in this order."""
    shards = tuple(Shard(Node(name, Address("h", 1), Role.PRIMARY)) for name in order)
    owner_ids = owner_ids + owner_ids[-1:] * (SLOT_COUNT - len(owner_ids))
    return TopologyView(1, epoch, shards, tuple(order.index(name) if name else UNOWNED for name in owner_ids))


OWNERS = st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=6)


@settings(max_examples=40)
@given(OWNERS, OWNERS, st.permutations("abcd"), st.permutations("abcd"))
def test_fingerprints_are_equal_where_each_slot_has_the_same_primary(
    one: list[str], other: list[str], order: list[str], other_order: list[str]
) -> None:
    first, second = view_of(one, order), view_of(other, other_order)
    same = [first.primary_of(slot) for slot in range(6)] == [second.primary_of(slot) for slot in range(6)]
    assert (first.fingerprint == second.fingerprint) is same


def test_what_is_not_who_owns_which_slot_does_not_count_for_the_fingerprint() -> None:
    view = view_of(["a", "b"], ["a", "b"])
    primary = replace(
        view.shards[0].primary, address=Address("elsewhere", 2), config_epoch=9, is_failing=True
    )
    shard = Shard(primary, (Node("r", Address("h", 3), Role.REPLICA, "a"),))
    other = TopologyView(
        2,
        2,
        (shard, view.shards[1], Shard(Node("idle", Address("h", 4), Role.PRIMARY))),
        view.shard_of_slot,
        (Migration((0,), "a", "b", MigrationKind.STEPWISE),),
    )
    assert other.fingerprint == view.fingerprint


def test_the_fingerprint_is_the_same_on_every_machine_and_release() -> None:
    """Tokens carry it from one proxy to another."""
    assert view_of(["a", "", "b"], ["b", "a"]).fingerprint.hex() == "c8a00dbcb34aec11"
    assert view_of(list("jihgfedcba"), list("abcdefghij")).fingerprint.hex() == "4ebeeac9126c007a"
    assert EMPTY_VIEW.fingerprint.hex() == "7bf601c6445fc5ff"
    assert len(EMPTY_VIEW.fingerprint) == FINGERPRINT_BYTES


@pytest.mark.parametrize("is_scattered", [False, True])
def test_the_fingerprint_of_a_thousand_shards_costs_little(is_scattered: bool) -> None:
    """One to one and a half milliseconds; here the quickest of several, with room for a busy machine."""
    owners = [slot * 1000 // SLOT_COUNT for slot in range(SLOT_COUNT)]
    if is_scattered:
        random.Random(1).shuffle(owners)
    shards = tuple(Shard(Node(f"{n:040x}", Address("h", n), Role.PRIMARY)) for n in range(1000))
    took = []
    for _ in range(5):
        view = TopologyView(1, 1, shards, tuple(owners))
        begun = time.perf_counter()
        fingerprint = view.fingerprint
        took.append(time.perf_counter() - begun)
        assert view.fingerprint is fingerprint  # worked out once
    assert min(took) < 0.006
