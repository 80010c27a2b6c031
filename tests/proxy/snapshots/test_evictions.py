"""A server that evicts keys while a snapshot is open is noticed, once for each time that it does."""

from __future__ import annotations

from proxy.protocol.encode import bulk
from proxy.snapshots.evictions import Evictions, evicted_keys
from routing.topology import Address

ONE, TWO = Address("a", 1), Address("b", 2)


def stats(evicted: int) -> bytes:
    return bulk(b"# Stats\r\nexpired_keys:7\r\nevicted_keys:%d\r\nkeyspace_hits:1\r\n" % evicted)


def test_only_what_is_evicted_since_the_first_look_counts() -> None:
    evictions = Evictions()
    assert evictions.look({ONE: stats(5), TWO: stats(0)}) == []
    assert evictions.look({ONE: stats(5), TWO: stats(1)}) == [TWO]
    assert evictions.look({ONE: stats(6)}) == [ONE]
    evictions.forget()
    assert evictions.look({ONE: stats(9)}) == []


def test_a_server_that_restarted_counts_anew() -> None:
    evictions = Evictions()
    evictions.look({ONE: stats(5)})
    assert evictions.look({ONE: stats(0)}) == []
    assert evictions.look({ONE: stats(1)}) == [ONE]


def test_what_is_no_such_answer_is_no_eviction() -> None:
    assert evicted_keys(b"-LOADING wait\r\n") is None
    assert evicted_keys(bulk(b"evicted_keys:x\r\n")) is None
    assert Evictions().look({ONE: b"-LOADING wait\r\n"}) == []
