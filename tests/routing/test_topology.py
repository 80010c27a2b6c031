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
