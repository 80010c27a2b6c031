"""The view's own questions, and addresses as text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.slot import SLOT_COUNT
from routing.topology import EMPTY_VIEW, UNOWNED, Address, Node, Role, Shard, TopologyView, ranges


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
