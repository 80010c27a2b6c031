"""Reads at a snapshot that are answered without a node, and which replies may answer later ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import pytest
import trio
from trio.testing import MockClock

from proxy.protocol.encode import array, bulk, error
from proxy.protocol.replies import ServerError
from proxy.snapshots.own_writes import Kept
from routing.slot import slot_of
from routing.snapshot import SnapshotState
from routing.snapshot_names import marker, preimage
from tests.proxy.exchange.test_open_requests import OK, command
from tests.proxy.exchange.test_snapshot_writes import HISTORY, ID, serve, set_chain
from tests.proxy.world import Client, World, keys_of

NIL = b"$-1\r\n"


@dataclass
class Keys:
    """What the first node has; ``asked`` are the requests that it got, but for guards."""

    world: World
    values: dict[bytes, bytes] = field(default_factory=dict)
    lifetimes: dict[bytes, int] = field(default_factory=dict)  # milliseconds; of those that expire
    errors: dict[bytes, bytes] = field(default_factory=dict)  # by command
    history: bytes = HISTORY
    asked: list[list[bytes]] = field(default_factory=list)

    async def answer(self) -> None:
        """All that has come, and what that leads to."""
        node = self.world.nodes[0]
        for _ in range(6):
            for words in node.take():
                node.reply(self._reply(words))
            await self.world.settle()

    def _reply(self, words: list[bytes]) -> bytes:
        name, *keys = words
        if name == b"INFO":
            return bulk(b"role:master\r\nmaster_replid:" + self.history + b"\r\n")
        self.asked.append(words)
        if name in self.errors:
            return self.errors[name]
        found = [bulk(self.values[key]) if key in self.values else NIL for key in keys]
        if name == b"PTTL":
            lifetime = self.lifetimes.get(keys[0], -1) if keys[0] in self.values else -2
            return b":%d\r\n" % lifetime
        return {b"GET": found[0], b"MGET": array(found), b"SET": OK}[name]


@pytest.fixture
def keys(world: World) -> Keys:
    return Keys(world)


def reader_of(world: World) -> Client:
    client = world.client()
    client.connection.snapshot_id = ID
    return client


async def get(keys: Keys, client: Client, key: bytes) -> object:
    """Its reply. The spelling is known before, so that each takes the fast way."""
    client.send(command("GET", key))
    await keys.answer()
    [value] = client.values()
    return value


async def warm(keys: Keys, client: Client, key: bytes) -> object:
    """Read it as often as it takes to be kept, and forget what was asked for that."""
    await get(keys, client, b"{%b}other" % key)
    for _ in range(2):
        value = await get(keys, client, key)
    keys.asked.clear()
    return value


def alone(world: World) -> dict[bytes, Kept | None]:
    """This proxy alone writes: the keys that it has written since the cut."""
    written = world.exchange.snapshots.own_writes.since[ID] = {}
    return written


@pytest.mark.parametrize("is_alone", [False, True])
@pytest.mark.parametrize("is_there", [False, True])
async def test_a_key_that_is_read_again_is_answered_without_a_node(
    world: World, keys: Keys, is_alone: bool, is_there: bool
) -> None:
    """A nil is a value, too."""
    key = keys_of(world, 0)[0]
    serve(world, ID)
    if is_alone:
        alone(world)
    if is_there:
        keys.values[key] = b"v"
    value = await warm(keys, reader_of(world), key)
    keys.values[key] = b"never seen"
    other = reader_of(world)
    other.send(command("GET", key) * 3)
    world.turn()
    assert other.values() == [value] * 3 == [b"v" if is_there else None] * 3
    assert not keys.asked
    assert world.exchange.snapshot_reads.cache.hits_total == 3


async def test_a_key_that_was_read_once_is_not_kept(world: World, keys: Keys) -> None:
    serve(world, ID)
    client = reader_of(world)
    for key in keys_of(world, 0, 40):
        await get(keys, client, key)
    assert not any(words[0] == b"PTTL" for words in keys.asked)
    assert world.exchange.snapshot_reads.cache.fills_total == 0


async def test_hits_keep_their_place_among_replies_of_nodes(world: World, keys: Keys) -> None:
    """Promise 6."""
    a, b = keys_of(world, 0)[:2]
    keys.values |= {a: b"a", b: b"b"}
    serve(world, ID)
    world.upstream(0).known.add(b)
    client = reader_of(world)
    await warm(keys, client, a)
    client.send(command("GET", a) + command("GET", b) + command("GET", a) + command("SET", b, "2"))
    world.turn()
    assert client.values() == [b"a"]
    await keys.answer()
    assert client.values() == [b"b", b"a", b"OK"]


async def test_a_value_stays_no_longer_than_its_key_lived_when_it_was_asked(
    world: World, keys: Keys, autojump_clock: MockClock
) -> None:
    """Counted from before the question was sent: the way to the node and back is not added."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    keys.lifetimes[key] = 5000
    serve(world, ID)
    client = reader_of(world)
    await get(keys, client, key)
    client.send(command("GET", key))
    sent_at = trio.current_time()
    await trio.sleep(3)
    await keys.answer()
    assert client.values() == [b"v"]
    keys.asked.clear()
    await trio.sleep_until(sent_at + 4.9)
    assert await get(keys, client, key) == b"v"
    assert not keys.asked
    await trio.sleep_until(sent_at + 5)
    keys.values.clear()
    assert await get(keys, client, key) is None
    assert keys.asked


@pytest.mark.parametrize("is_alone", [False, True])
async def test_of_a_written_key_the_pre_image_is_kept_for_as_long_as_that_lives(
    world: World, keys: Keys, is_alone: bool, autojump_clock: MockClock
) -> None:
    key = keys_of(world, 0)[0]
    slot = slot_of(key)
    saved = preimage(slot, ID, key)
    keys.values |= {key: b"new", saved: b"old", marker(slot, ID, key): b"p"}
    keys.lifetimes[saved] = 5000
    serve(world, ID)
    if is_alone:
        alone(world)[key] = None
    client = reader_of(world)
    assert await warm(keys, client, key) == b"old"
    assert await get(keys, client, key) == b"old"
    assert not keys.asked
    await trio.sleep(5)
    del keys.values[saved]
    assert await get(keys, client, key) is None


async def test_a_known_pre_image_is_kept_too(world: World, keys: Keys, autojump_clock: MockClock) -> None:
    key = keys_of(world, 0)[0]
    saved = preimage(slot_of(key), ID, key)
    keys.values |= {key: b"new", saved: b"old"}
    keys.lifetimes[saved] = 5000
    serve(world, ID)
    alone(world)[key] = Kept(HISTORY, command("GET", saved))
    client = reader_of(world)
    assert await warm(keys, client, key) == b"old"
    assert await get(keys, client, key) == b"old"
    assert not keys.asked
    await trio.sleep(5)
    del keys.values[saved]
    assert await get(keys, client, key) is None


async def test_what_was_kept_before_a_write_is_right_after_it(world: World, keys: Keys) -> None:
    key = keys_of(world, 0)[0]
    keys.values[key] = b"old"
    serve(world, ID)
    written = alone(world)
    client = reader_of(world)
    await warm(keys, client, key)
    written[key] = None
    keys.values[key] = b"new"
    assert await get(keys, client, key) == b"old"


# -- what must not be kept


async def test_a_value_whose_key_was_written_while_it_was_read_is_not_kept(
    world: World, keys: Keys, autojump_clock: MockClock
) -> None:
    """A read that was not proven fills nothing: it goes another way, and so does the next one."""
    key = keys_of(world, 0)[0]
    slot = slot_of(key)
    keys.values |= {key: b"new", preimage(slot, ID, key): b"old", marker(slot, ID, key): b"p"}
    serve(world, ID)
    written = alone(world)
    client = reader_of(world)
    world.exchange.snapshot_reads.cache.is_read_again(key)
    await get(keys, client, b"{%b}other" % key)
    client.send(command("GET", key))
    written[key] = None
    await keys.answer()
    assert client.values() == [b"old"]
    assert world.exchange.snapshot_reads.cache.fills_total == 0


async def test_a_value_with_a_marker_that_came_with_a_newer_snapshot_is_not_kept(
    world: World, keys: Keys, autojump_clock: MockClock
) -> None:
    key = keys_of(world, 0)[0]
    slot = slot_of(key)
    keys.values |= {key: b"new", preimage(slot, ID + 1, key): b"old", marker(slot, ID + 1, key): b"p"}
    serve(world, ID)
    client = reader_of(world)
    await get(keys, client, b"{%b}other" % key)
    world.exchange.snapshot_reads.cache.is_read_again(key)
    client.send(command("GET", key))
    set_chain(world, ID, ID + 1)
    await keys.answer()
    assert client.values() == [b"old"]
    assert world.exchange.snapshot_reads.cache.fills_total == 0


@pytest.mark.parametrize("is_alone", [False, True])
async def test_errors_and_values_of_an_unknown_lifetime_are_not_kept(
    world: World, keys: Keys, is_alone: bool, autojump_clock: MockClock
) -> None:
    key = keys_of(world, 0)[0]
    serve(world, ID)
    if is_alone:
        alone(world)
    client = reader_of(world)
    wrong_type = error("WRONGTYPE Operation against a key holding the wrong kind of value")
    keys.values[key] = b"v"
    keys.errors = {b"GET": wrong_type, b"MGET": array([NIL, NIL])}
    assert isinstance(await warm(keys, client, key), ServerError)
    keys.errors = {b"PTTL": error("NOPERM this user has no permissions")}
    assert await warm(keys, client, key) == b"v"
    assert world.exchange.snapshot_reads.cache.fills_total == 0


async def test_a_value_of_another_history_is_not_kept(
    world: World, keys: Keys, autojump_clock: MockClock
) -> None:
    """A node that failed over meanwhile: its connection is closed before the value is looked at."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    serve(world, ID)
    client = reader_of(world)
    await get(keys, client, key)
    keys.history = b"e" * 40
    client.send(command("GET", key))
    await keys.answer()
    assert world.exchange.snapshot_reads.cache.fills_total == 0


async def test_a_value_larger_than_the_limit_is_not_kept(world: World, keys: Keys) -> None:
    key = keys_of(world, 0)[0]
    keys.values[key] = b"x" * 65536
    serve(world, ID)
    await warm(keys, reader_of(world), key)
    assert world.exchange.snapshot_reads.cache.fills_total == 0


# -- when the snapshot serves no more


@pytest.mark.parametrize("state", [SnapshotState.CLOSING, SnapshotState.CLOSED, SnapshotState.ABORTED])
async def test_nothing_outlives_its_snapshot(world: World, keys: Keys, state: SnapshotState) -> None:
    """By the record, as it comes from the store: in that step."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    serve(world, ID)
    client = reader_of(world)
    await warm(keys, client, key)
    cache, snapshots = world.exchange.snapshot_reads.cache, world.exchange.snapshots
    shelf = cache.shelf(ID, 2)
    old = snapshots._serving[ID]
    closing = old.moved_to(SnapshotState.CLOSING)
    new = (
        closing
        if state is SnapshotState.CLOSING
        else (closing.moved_to(state) if state is SnapshotState.CLOSED else old.moved_to(state, "test"))
    )
    snapshots._on_record(old, new)
    assert shelf is not None
    assert shelf.get(key) is None
    assert cache.bytes_held == 0
    assert isinstance(await get(keys, client, key), ServerError)


async def test_nothing_outlives_an_abort_of_this_proxy(world: World, keys: Keys) -> None:
    """Before the store knows."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    serve(world, ID)
    client = reader_of(world)
    await warm(keys, client, key)
    snapshots = world.exchange.snapshots
    snapshots.book.records[ID] = snapshots._serving[ID]
    snapshots._abort([ID], "test")
    assert world.exchange.snapshot_reads.cache.bytes_held == 0
    assert isinstance(await get(keys, client, key), ServerError)


async def test_a_value_that_comes_when_its_snapshot_has_ended_fills_nothing(world: World, keys: Keys) -> None:
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    serve(world, ID)
    client = reader_of(world)
    await get(keys, client, key)
    client.send(command("GET", key))
    snapshots = world.exchange.snapshots
    old = snapshots._serving[ID]
    closing = snapshots.book.records[ID] = old.moved_to(SnapshotState.CLOSING)
    snapshots._on_record(old, closing)  # what was asked before may be used
    await keys.answer()
    assert client.values() == [b"v"]
    assert world.exchange.snapshot_reads.cache.fills_total == 0


async def test_without_a_lease_nothing_is_answered(
    world: World, keys: Keys, autojump_clock: MockClock
) -> None:
    """Another proxy may have ended the snapshot. If it serves when the lease is back, what was kept is right."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    serve(world, ID)
    client = reader_of(world)
    await warm(keys, client, key)
    members = world.exchange.snapshots.members
    members.valid_until = trio.current_time() + 1
    assert await get(keys, client, key) == b"v"
    await trio.sleep(1)
    refused = await get(keys, client, key)
    assert isinstance(refused, ServerError)
    assert str(refused).startswith("NOTREADY")
    members.valid_until = inf
    assert await get(keys, client, key) == b"v"
    assert not keys.asked


async def test_hits_need_no_node(world: World, keys: Keys, autojump_clock: MockClock) -> None:
    """While a node is gone, what is kept of its keys is still answered."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    serve(world, ID)
    client = reader_of(world)
    await warm(keys, client, key)
    world.nodes[0].accepts = False
    world.nodes[0].lose()
    world.turn()
    client.send(command("GET", key))
    assert client.values() == [b"v"]
