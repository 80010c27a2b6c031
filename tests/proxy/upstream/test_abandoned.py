"""What may still execute at a node is listed until it is known to be gone, however much it is."""

from __future__ import annotations

from proxy.upstream.abandoned import ALL, PER_ADDRESS_MAX, Abandoned
from routing.topology import Address

HERE, THERE = Address("node", 7000), Address("node", 7001)


def ids(abandoned: Abandoned) -> list[tuple[Address, int]]:
    return [(entry.address, entry.client_id) for entry in abandoned.pending()]


def test_each_is_listed_until_it_is_removed() -> None:
    abandoned = Abandoned()
    abandoned.add(HERE, 5, "no reply")
    abandoned.add(THERE, 5, "closed")
    first, second = abandoned.pending()
    assert (first.address, first.client_id, first.reason) == (HERE, 5, "no reply")
    abandoned.remove(first)
    abandoned.remove(first)
    assert abandoned.pending() == [second]
    assert abandoned.added_total == 2  # removing does not hide that they came


def test_past_the_bound_one_entry_stands_for_all_of_a_node() -> None:
    abandoned = Abandoned()
    for client_id in range(1, PER_ADDRESS_MAX + 1):
        abandoned.add(HERE, client_id, "x")
    assert len(abandoned.pending()) == PER_ADDRESS_MAX
    abandoned.add(THERE, 1, "x")
    for client_id in range(1000, 2000):
        abandoned.add(HERE, client_id, "x")
    assert ids(abandoned) == [(HERE, ALL), (THERE, 1)]


def test_an_unknown_id_stands_for_all_of_a_node() -> None:
    abandoned = Abandoned()
    abandoned.add(HERE, 7, "x")
    abandoned.add(HERE, ALL, "x")
    abandoned.add(HERE, 8, "x")
    assert ids(abandoned) == [(HERE, ALL)]


def test_one_that_came_while_another_was_killed_stays() -> None:
    """Its client may be none of those that were listed at the node before."""
    abandoned = Abandoned()
    for client_id in (ALL, 7):
        abandoned.add(HERE, client_id, "x")
    (before,) = abandoned.pending()
    abandoned.add(HERE, 8, "y")
    abandoned.remove(before)
    assert [entry.number for entry in abandoned.pending()] == [3]


def test_what_is_open_is_known_by_node_and_id() -> None:
    abandoned = Abandoned()
    abandoned.opened(HERE, 5)
    assert abandoned.is_open(HERE, 5)
    assert not abandoned.is_open(THERE, 5)
    abandoned.closed(HERE, 5)
    abandoned.closed(HERE, 5)
    assert not abandoned.is_open(HERE, 5)
    assert not abandoned._open
