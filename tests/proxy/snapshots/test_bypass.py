"""Who writes past the proxies while a snapshot is open is found in CLIENT LIST, and nobody else is blamed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from proxy.protocol.encode import bulk
from proxy.snapshots.bypass import SHOWN_MAX, WRITERS_MAX, BypassWatch, writes
from proxy.upstream.connect import ConnectError
from routing.topology import Address

A, B = Address("node", 7000), Address("node", 7001)


@dataclass
class Servers:
    """Nodes that answer CLIENT LIST with the lines put down for them."""

    lines: dict[Address, list[str]] = field(default_factory=lambda: {A: [], B: []})
    down: set[Address] = field(default_factory=set)
    looks: int = 0

    def client(
        self, address: Address, number: int, cmd: str, *, name: str = "", flags: str = "N", idle: int = 0
    ) -> None:
        self.lines[address].append(
            f"id={number} addr=10.0.0.9:{number} laddr=h:2 fd=8 name={name} age=90 idle={idle} flags={flags} "
            f"db=0 events=r cmd={cmd} user=default\n"
        )

    async def ask(self, address: Address, raw: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        self.looks += address == A
        if address in self.down:
            raise ConnectError(f"{address}: refused")
        return bulk("".join(self.lines[address]))


class Snapshots:
    """When the oldest open snapshot was cut, and what time it is, in Unix seconds."""

    def __init__(self) -> None:
        self.open_since: float | None = 1000.0
        self.now = 1010.0


@pytest.fixture
def servers() -> Servers:
    return Servers()


@pytest.fixture
def snapshots() -> Snapshots:
    return Snapshots()


@pytest.fixture
def watch(servers: Servers, snapshots: Snapshots) -> BypassWatch:
    return BypassWatch(
        servers.ask,
        lambda: [A, B],
        lambda: {"peer"},
        "me",
        2.0,
        lambda: snapshots.open_since,
        now=lambda: snapshots.now,
    )


def gauges(watch: BypassWatch) -> dict[str, float]:
    return {sample.family.name: float(str(sample.value)) for sample in watch.samples()}


async def test_a_writer_is_told_with_where_what_and_since_when(
    watch: BypassWatch, servers: Servers, snapshots: Snapshots
) -> None:
    servers.client(A, 5, "set")
    servers.client(B, 6, "client|list")
    await watch.look()
    assert watch.warnings() == [
        "1 client writes past the proxies, seen first 0 s ago, and snapshot reads may show what they wrote: "
        "10.0.0.9:5 (SET) at node:7000; let them connect to a proxy"
    ]
    assert gauges(watch)["steadyread_bypassing_writers"] == 1
    await watch.look()
    snapshots.now += 15
    await watch.look()
    snapshots.now += 15
    servers.lines[A].clear()  # it left; what it wrote stays
    servers.client(B, 7, "xgroup|create")
    await watch.look()
    (warning,) = watch.warnings()
    assert warning.startswith("2 clients write past the proxies, seen first 30 s ago")
    assert "10.0.0.9:7 (XGROUP CREATE) at node:7001" in warning
    assert gauges(watch)["steadyread_bypassing_writers"] == 1


async def test_others_are_not_blamed(watch: BypassWatch, servers: Servers) -> None:
    servers.client(A, 1, "set", name="steadyread:me")
    servers.client(A, 2, "set", name="steadyread:peer")
    servers.client(A, 3, "replconf", flags="S")
    servers.client(A, 4, "set", flags="M")
    servers.client(A, 20, "set", flags="i")  # writes that come with a slot
    servers.client(A, 21, "cluster|syncslots", flags="E")
    servers.client(A, 5, "get")
    servers.client(A, 6, "NULL")
    servers.client(A, 7, "restore-asking")
    servers.client(A, 8, "cluster|setslot")
    servers.client(A, 9, "no-such-command")
    servers.client(A, 10, "set", idle=11)  # before the snapshot opened
    await watch.look()
    assert watch.warnings() == []
    assert watch.strangers() == []
    servers.client(A, 11, "set", idle=9)
    await watch.look()
    assert len(watch.warnings()) == 1


async def test_warnings_of_a_later_snapshot_leave_out_what_was_before(
    watch: BypassWatch, servers: Servers
) -> None:
    servers.client(A, 5, "set", idle=5)
    await watch.look()
    assert len(watch.warnings(since=1004.0)) == 1
    assert watch.warnings(since=1005.0) == []


async def test_few_of_many_are_shown_and_memory_is_bounded(watch: BypassWatch, servers: Servers) -> None:
    for number in range(1, WRITERS_MAX + 100):
        servers.client(A, number, "set")
    await watch.look()
    (warning,) = watch.warnings()
    assert warning.count("(SET)") == SHOWN_MAX
    assert f"and {WRITERS_MAX - SHOWN_MAX} more" in warning
    assert gauges(watch)["steadyread_bypassing_writers"] == WRITERS_MAX + 99


async def test_a_proxy_without_the_store_is_a_stranger(watch: BypassWatch, servers: Servers) -> None:
    """Whatever it did last; it is no bypassing writer besides."""
    servers.client(A, 5, "get", name="steadyread:other")
    servers.client(A, 6, "set", name="steadyread:other")
    servers.client(B, 7, "set", name="steadyread")
    await watch.look()
    assert watch.strangers() == ["steadyread at node:7001", "steadyread:other at node:7000"]
    (warning,) = watch.warnings()
    assert warning.startswith(
        "proxies that do not share this one's store use the cluster: steadyread at node"
    )
    assert await watch.find_strangers() == [warning]
    assert gauges(watch) == {"steadyread_bypassing_writers": 0, "steadyread_stranger_proxies": 2}


async def test_a_node_that_cannot_be_asked_is_told(watch: BypassWatch, servers: Servers) -> None:
    """Who does not know whether there are strangers must not act as if there were none."""
    servers.down.add(B)
    servers.client(A, 5, "set")
    await watch.look()
    expected = ["who is connected to a node cannot be told: node:7001: refused"]
    assert watch.problems() == expected
    assert len(watch.warnings()) == 1
    assert await watch.find_strangers() == expected
    servers.down.clear()
    await watch.look()
    assert watch.problems() == []


async def test_looks_are_made_only_while_a_snapshot_is_open(
    watch: BypassWatch, servers: Servers, snapshots: Snapshots, autojump_clock: trio.testing.MockClock
) -> None:
    snapshots.open_since = None
    servers.client(A, 5, "set")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.sleep(100)
        assert servers.looks == 0
        snapshots.open_since = 1000.0
        watch.chain_changed()
        await trio.sleep(5)
        assert servers.looks == 3  # at once, and each two seconds
        assert len(watch.warnings()) == 1
        snapshots.open_since = None
        watch.chain_changed()
        await trio.sleep(100)
        assert servers.looks == 3
        assert watch.warnings() == []
        assert gauges(watch) == {"steadyread_bypassing_writers": 0, "steadyread_stranger_proxies": 0}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("cmd", "expected"),
    [
        (b"set", True),
        (b"eval", True),
        (b"fcall", True),
        (b"exec", True),
        (b"xgroup", True),  # as Redis 6.2 has it
        (b"xgroup|create", True),
        (b"restore", True),
        (b"flushall", True),
        (b"blpop", True),
        (b"get", False),
        (b"eval_ro", False),
        (b"migrate", False),
        (b"restore-asking", False),
        (b"cluster", False),
        (b"cluster|setslot", False),
        (b"function|load", False),
        (b"publish", False),
        (b"NULL", False),
    ],
)
def test_which_commands_write_data_of_a_client(cmd: bytes, expected: bool) -> None:
    assert writes(cmd) is expected
