"""No snapshot is opened where a server evicts, is nearly full, or does not say; the text names node and way out."""

from __future__ import annotations

import pytest

from proxy.protocol.encode import bulk
from proxy.protocol.replies import decode
from proxy.snapshots.room import refusals
from routing.topology import Address

A, B = Address("node", 7000), Address("node", 7001)


def info(policy: str = "noeviction", maxmemory: str = "0", used: str = "1000") -> bytes:
    """As the engines answer, shortened."""
    return bulk(
        f"# Memory\r\nused_memory:{used}\r\nused_memory_human:1.00K\r\nmaxmemory:{maxmemory}\r\n"
        f"maxmemory_human:0B\r\nmaxmemory_policy:{policy}\r\nmem_allocator:jemalloc-5.2.1\r\n"
    )


def verbatim(reply: bytes) -> bytes:
    """The same text as RESP3 has it."""
    text = decode(reply)
    return b"=%d\r\ntxt:%b\r\n" % (len(text) + 4, text)


@pytest.mark.parametrize(
    "reply",
    [
        info(),
        info("volatile-lru"),
        info("volatile-ttl"),
        info(maxmemory="1000", used="900"),
        verbatim(info()),
    ],
    ids=["no limit", "volatile-lru", "volatile-ttl", "at the limit", "verbatim"],
)
def test_room(reply: bytes) -> None:
    assert refusals({A: reply}, 90) == []


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (info("allkeys-lru"), "evicts keys (maxmemory-policy allkeys-lru)"),
        (info("allkeys-random", "0"), "set maxmemory-policy to noeviction"),
        (info("newest-first"), "evicts keys"),
        (info(maxmemory="1000", used="901"), "uses 91 % of its maxmemory, more than 90 %"),
        (info(maxmemory="1000", used="5000"), "uses 500 % of its maxmemory"),
        (info(used="much"), "does not tell maxmemory"),
        (info(maxmemory="-1"), "does not tell maxmemory"),
        (info(policy=""), "does not tell maxmemory"),
        (bulk(""), "does not tell maxmemory"),
        (b"+OK\r\n", "does not tell maxmemory"),
        (b"$-1\r\n", "does not tell maxmemory"),
        (b"-NOPERM this user has no permissions to run 'info'\r\n", "let this proxy's user run INFO"),
        (b"$5\r\nab", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_no_room(reply: bytes, text: str) -> None:
    (refusal,) = refusals({A: info(), B: reply}, 90)
    assert refusal.startswith("node:7001 ")
    assert text in refusal


def test_each_node_is_told() -> None:
    assert [text[:9] for text in refusals({B: info("allkeys-lfu"), A: b"+OK\r\n"}, 90)] == [
        "node:7000",
        "node:7001",
    ]
