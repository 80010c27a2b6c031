"""A client opens, closes and looks at snapshots, and binds its reads to one. The snapshots are plain objects.

Whether a read shows the snapshot is not asked here: only what the connection is bound to.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from proxy.exchange.open_requests import CURRENT
from proxy.frontend.client import ClientConnection
from proxy.protocol.encode import command as encoded
from proxy.settings import ReadRuleSettings, ReadSettings, Settings
from proxy.topology.audit import Operator
from routing.levels import Level, ReadLevel
from tests.proxy.snapshot_desk import ABORTED, PlainDesk, facts_of
from tests.proxy.world import Client, FakeTransport, World, keys_of, world_of

RULES = ReadSettings(rules=(ReadRuleSettings("cache:", "eventual"),))
NO_SNAPSHOT = (
    b"-NOTREADY no snapshot is open; open one with STEADY.SNAPSHOT OPEN, or choose another level\r\n"
)


@pytest.fixture
async def desk(world: World) -> PlainDesk:
    world.exchange.snapshots = desk = PlainDesk()
    return desk


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with world_of(2, settings=Settings(reads=RULES)) as world:
        yield world


async def said(world: World, client: Client, line: str) -> bytes:
    client.send(encoded(*line.split()))
    await world.settle()
    [reply] = client.replies()
    return reply


def bound_to(client: Client) -> tuple[int, bool]:
    """Its snapshot, and whether anything else decides about its reads."""
    return client.connection.snapshot_id, client.connection.policy is not None


async def test_opening_replies_with_the_id_and_names_the_client(world: World, desk: PlainDesk) -> None:
    client = world.client()
    assert await said(world, client, "STEADY.SNAPSHOT OPEN NAME report TTL 600") == b":7\r\n"
    await said(world, client, "CLIENT SETNAME nightly")
    assert await said(world, client, "STEADY.SNAPSHOT OPEN") == b":8\r\n"
    assert desk.asked == [
        ("open", "report", 600.0, Operator("client", "peer")),
        ("open", "", None, Operator("nightly", "peer")),
    ]


async def test_what_cannot_be_done_is_the_error_of_the_snapshots(world: World, desk: PlainDesk) -> None:
    """Promise 9."""
    client = world.client()
    desk.problem = "SNAPSHOTOPEN 8 snapshots are open (setting snapshots.open_max); close one"
    assert await said(world, client, "STEADY.SNAPSHOT OPEN") == f"-{desk.problem}\r\n".encode()
    assert (await said(world, client, "STEADY.SNAPSHOT CLOSE 7")).startswith(
        b"-ERR there is no snapshot 7: it was never opened, or ended long ago; STEADY.SNAPSHOT LIST"
    )
    desk.known.append(facts_of(7, ABORTED))
    assert await said(world, client, "STEADY.SNAPSHOT CLOSE 7") == b"-ERR snapshot 7 is aborted already\r\n"


async def test_closing_and_not_the_last_one_while_the_mode_is_snapshot(world: World, desk: PlainDesk) -> None:
    desk.known += [facts_of(7), facts_of(8)]
    client = world.client()
    world.server.adopt_mode(Level.SNAPSHOT)
    assert await said(world, client, "STEADY.SNAPSHOT CLOSE 8") == b"+OK\r\n"
    refused = await said(world, client, "STEADY.SNAPSHOT CLOSE 7")
    assert refused.startswith(
        b"-SNAPSHOTOPEN snapshot 7 is the last that serves, and the routing mode is snapshot"
    )
    world.server.adopt_mode(Level.STRONG)
    assert await said(world, client, "STEADY.SNAPSHOT CLOSE 7") == b"+OK\r\n"
    assert [asked[:2] for asked in desk.asked] == [("close", 8), ("close", 7)]


async def test_facts_are_a_map_and_in_resp2_names_and_values_in_turn(world: World, desk: PlainDesk) -> None:
    desk.known += [facts_of(5, ABORTED, reason="budget: it is 25 h old"), facts_of(7, warnings=("a", "b"))]
    client = world.client()
    client.send(encoded("STEADY.SNAPSHOT", "INFO", "7") + encoded("STEADY.SNAPSHOT", "LIST"))
    client.send(encoded("HELLO", "3"))
    await world.settle()
    [one, all_, _] = client.values()
    assert dict(zip(one[::2], one[1::2], strict=True)) == {
        b"id": 7,
        b"name": None,
        b"state": b"serving",
        b"opened_at": b"2027-01-15T08:00:00.000Z",
        b"age_seconds": b"60.000000",
        b"expires_at": None,
        b"epoch": 12,
        b"reason": None,
        b"opened_by": None,
        b"keys_preserved": 3,
        b"bytes_preserved": 700,
        b"keys_too_large": 1,
        b"preserves": 4,
        b"preserve_seconds_mean": b"0.000500",
        b"preserve_seconds_max": b"0.001000",
        b"barrier_seconds": b"0.012500",
        b"warnings": [b"a", b"b"],
    }
    assert [each[:2] for each in all_] == [[b"id", 5], [b"id", 7]]
    client.send(encoded("STEADY.SNAPSHOT", "LIST") + encoded("STEADY.SNAPSHOT", "INFO", "6"))
    [all_, unknown] = client.values()
    assert [(each[b"id"], each[b"reason"]) for each in all_] == [(5, b"budget: it is 25 h old"), (7, None)]
    assert str(unknown).startswith("ERR there is no snapshot 6")


async def test_reads_are_bound_to_a_snapshot_that_serves(world: World, desk: PlainDesk) -> None:
    desk.known += [facts_of(6), facts_of(7), facts_of(8, ABORTED)]
    client = world.client()
    assert bound_to(client) == (0, True)  # by its rules
    assert await said(world, client, "STEADY.READ SNAPSHOT 6") == b"+OK\r\n"
    assert bound_to(client) == (6, False)
    assert await said(world, client, "STEADY.READ") == b"$10\r\nsnapshot 6\r\n"
    refused = await said(world, client, "STEADY.READ SNAPSHOT 8")
    assert refused == b"-SNAPSHOTTOOOLD snapshot 8 has ended; open another one\r\n"
    assert bound_to(client) == (6, False)
    assert await said(world, client, "STEADY.READ AUTO") == b"+OK\r\n"
    assert bound_to(client) == (0, True)


async def test_current_is_the_one_that_is_current_then(world: World, desk: PlainDesk) -> None:
    client = world.client()
    assert await said(world, client, "STEADY.READ SNAPSHOT CURRENT") == NO_SNAPSHOT
    assert bound_to(client) == (0, True)
    client.send(encoded("STEADY.SNAPSHOT", "OPEN") + encoded("STEADY.READ", "SNAPSHOT", "CURRENT"))
    await world.settle()
    assert client.replies() == [b":7\r\n", b"+OK\r\n"]
    await said(world, client, "STEADY.SNAPSHOT OPEN")
    assert bound_to(client) == (7, False)
    assert await said(world, client, "STEADY.READ") == b"$10\r\nsnapshot 7\r\n"


async def test_the_mode_and_a_listener_bind_to_whichever_is_current_whatever_the_rules_say(
    world: World, desk: PlainDesk
) -> None:
    """Mode snapshot is of all proxies of a store, so it may come before this one knows the snapshot."""
    client, strong = world.client(), world.client()
    await said(world, strong, "STEADY.READ STRONG")
    world.server.adopt_mode(Level.SNAPSHOT)
    assert bound_to(client) == (CURRENT, False)
    assert bound_to(strong) == (0, False)
    assert await said(world, client, "STEADY.READ") == b"$4\r\nauto\r\n"
    world.server.adopt_mode(Level.STRONG)
    assert bound_to(client) == (0, True)
    by_port = ClientConnection(
        world.server, world.exchange, FakeTransport(), "peer", "local", ReadLevel(Level.SNAPSHOT)
    )
    assert (by_port.snapshot_id, by_port.policy) == (CURRENT, None)


async def test_reset_and_another_resp_version(world: World, desk: PlainDesk) -> None:
    desk.known.append(facts_of(7))
    client = world.client()
    await said(world, client, "STEADY.READ SNAPSHOT 7")
    await said(world, client, "HELLO 3")
    assert bound_to(client) == (7, False)
    await said(world, client, "RESET")
    assert bound_to(client) == (0, True)


async def test_not_within_a_transaction(world: World, desk: PlainDesk) -> None:
    client = world.client()
    await said(world, client, "MULTI")
    refused = await said(world, client, "STEADY.SNAPSHOT OPEN")
    assert refused == b"-ERR STEADY.SNAPSHOT is not run in a transaction; send it before MULTI\r\n"
    assert desk.asked == []


async def test_a_snapshot_shows_what_its_client_was_told_before(
    autojump_clock: MockClock, world: World
) -> None:
    """Promise 4 for one client: opening waits until what it sent before is answered, and what follows waits too."""

    class Slow(PlainDesk):
        async def open(self, name: str, ttl_seconds: float | None, operator: Operator) -> object:  # type: ignore[override]
            assert was_answered
            await trio.sleep(1.0)
            return await super().open(name, ttl_seconds, operator)

    world.exchange.snapshots = desk = Slow()  # type: ignore[assignment]  # it does give a record
    [key] = keys_of(world, 0, 1)
    was_answered = False
    client = world.client()
    client.send(encoded("SET", key, "v") + encoded("STEADY.SNAPSHOT", "OPEN") + encoded("INCR", key))
    await world.settle()
    assert desk.asked == []
    assert world.nodes[0].take() == [[b"SET", key, b"v"]]
    was_answered = True
    world.nodes[0].reply(b"+OK\r\n")
    await world.settle()
    assert world.nodes[0].take() == []
    await trio.sleep(1.5)
    await world.settle()
    assert world.nodes[0].take() == [[b"INCR", key]]
    world.nodes[0].reply(b":1\r\n")
    await world.settle()
    assert client.replies() == [b"+OK\r\n", b":7\r\n", b":1\r\n"]
