"""What CLUSTER NODES says, in the words of old and new engines."""

from __future__ import annotations

import pytest

from proxy.embedded.nodemap import parse_nodes
from routing.topology import Address

A, B, C = "a" * 40, "b" * 40, "c" * 40

TEXT = f"""\
{A} 127.0.0.1:7001@17001 myself,master - 0 0 1 connected 0-2 5 [5->-{B}] [9-<-{B}]
{B} 127.0.0.1:7002@17002,host.example,,shard-id=1f master - 0 1700000000000 2 connected 3-4 6-16383
{C} ::1:7003@17003 slave {A} 0 1700000000000 1 disconnected
""".encode()


def test_lines_of_every_engine_are_understood() -> None:
    """Slots, ranges, migrations, replicas, host names and IPv6."""
    map_ = parse_nodes(TEXT)
    first, second, third = map_.lines
    assert first.slots == {0, 1, 2, 5} == map_.owned_by(A) == map_.owned_by_teller
    assert first.moving == (f"[5->-{B}]", f"[9-<-{B}]")
    assert second.address == Address("127.0.0.1", 7002)
    assert second.is_linked
    assert (third.primary_id, third.slots, third.is_linked) == (A, frozenset(), False)
    assert third.address == Address("::1", 7003)
    assert map_.primaries == (first, second)
    assert map_.owner_of(5).id == A
    assert map_.owned_by("f" * 40) == frozenset()


def test_a_map_on_the_move_is_not_settled() -> None:
    """An open slot or a handshake at the teller; slots elsewhere say nothing."""
    assert not parse_nodes(TEXT).is_settled
    calm = TEXT.replace(f" [5->-{B}] [9-<-{B}]".encode(), b"")
    assert parse_nodes(calm).is_settled
    assert not parse_nodes(
        calm.replace(b"7002@17002,host.example,,shard-id=1f master", b"0@0 handshake")
    ).is_settled


def test_agreement_is_about_slots_and_replicas_alone() -> None:
    """The teller, ping times and flags do not count; an owner or a replica's primary does."""
    calm = TEXT.replace(f" [5->-{B}] [9-<-{B}]".encode(), b"")
    elsewhere = calm.replace(b"myself,", b"").replace(b"1700000000000", b"1700000009999")
    assert parse_nodes(calm).agreement == parse_nodes(elsewhere).agreement
    assert parse_nodes(calm).agreement != parse_nodes(calm.replace(b"0-2 5", b"0-2")).agreement
    assert (
        parse_nodes(calm).agreement
        != parse_nodes(calm.replace(f"slave {A}".encode(), f"slave {B}".encode())).agreement
    )


def test_an_unowned_slot_has_no_owner() -> None:
    with pytest.raises(LookupError):
        parse_nodes(TEXT.replace(b"6-16383", b"7-16383")).owner_of(6)
