"""One fetch at a time for each key of a snapshot, from memcached or its node, and who gets what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from proxy.cache.memcached import Memcached, Question, identity_of, subject_of
from proxy.protocol.encode import bulk
from proxy.protocol.replies import ServerError
from routing.slot import slot_of
from routing.snapshot import SnapshotState
from routing.snapshot_names import marker, preimage
from tests.proxy.exchange.test_open_requests import command
from tests.proxy.exchange.test_snapshot_cache import Keys, alone, get, reader_of
from tests.proxy.exchange.test_snapshot_writes import ID, serve
from tests.proxy.world import Client, World, keys_of


class FakeMemcached:
    """Answers when it is told to. ``asked`` and ``kept`` are by key."""

    def __init__(self, world: World) -> None:
        self.is_bypassed = False
        self.entries: dict[bytes, bytes] = {}  # by subject
        self.questions: list[Question] = []
        self.kept: list[tuple[Question, bytes, float | None]] = []
        fetches = world.exchange.snapshot_fetches
        fetches.memcached = cast("Memcached", self)
        self._deliver = fetches._on_answers

    def ask(self, question: Question) -> bool:
        self.questions.append(question)
        return True

    def keep(self, question: Question, reply: bytes, ends_at: float | None) -> None:
        self.kept.append((question, reply, ends_at))
        self.entries[question.subject] = reply

    def answer(self) -> int:
        """All that was asked, in one batch. How many."""
        questions, self.questions = self.questions, []
        for question in questions:
            question.found = self.entries.get(question.subject)
        self._deliver(questions)
        return len(questions)


@pytest.fixture
def keys(world: World) -> Keys:
    return Keys(world)


@pytest.fixture
def memcached(world: World) -> FakeMemcached:
    return FakeMemcached(world)


def subject(world: World, key: bytes, resp: int = 2) -> bytes:
    record = world.exchange.snapshots.record_of_serving(ID)
    assert record is not None
    return subject_of(identity_of(record), resp, key)


async def read_once(keys: Keys, client: Client, *names: bytes) -> None:
    """So that the next read of them is worth a fetch; and the spelling is known, so that they take the fast way."""
    for key in (b"{%b}spelling" % names[0], *names):
        await get(keys, client, key)
    keys.asked.clear()


def served(world: World, keys: Keys) -> bytes:
    """A key of the first node that is "v" as of a snapshot, which serves."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    serve(world, ID)
    return key


async def asking(world: World, keys: Keys, count: int) -> tuple[bytes, list[Client]]:
    """Such a key, which was read once, and so many clients that ask for it now."""
    key = served(world, keys)
    clients = [reader_of(world) for _ in range(count)]
    await read_once(keys, clients[0], key)
    for client in clients:
        client.send(command("GET", key))
    return key, clients


def gets_of(keys: Keys, key: bytes) -> int:
    return sum(words[0] in (b"GET", b"MGET") and key in words for words in keys.asked)


def values_of(clients: Sequence[Client]) -> list[object]:
    return [client.values() for client in clients]


# -- memcached


async def test_what_memcached_has_is_answered_without_a_node_and_kept_here(
    world: World, keys: Keys, memcached: FakeMemcached
) -> None:
    key = keys_of(world, 0)[0]
    serve(world, ID)
    client = reader_of(world)
    await read_once(keys, client, key)
    memcached.entries[subject(world, key)] = bulk(b"v")
    client.send(command("GET", key))
    await keys.answer()
    assert client.values() == []
    assert memcached.answer() == 1
    assert client.values() == [b"v"]
    client.send(command("GET", key))
    world.turn()
    assert client.values() == [b"v"]
    assert not memcached.questions
    assert not keys.asked


@pytest.mark.parametrize("is_alone", [False, True])
async def test_what_memcached_lacks_is_read_at_the_node_and_kept_in_both(
    world: World, keys: Keys, memcached: FakeMemcached, is_alone: bool
) -> None:
    key = served(world, keys)
    if is_alone:
        alone(world)
    client = reader_of(world)
    await read_once(keys, client, key)
    client.send(command("GET", key))
    await keys.answer()
    assert not keys.asked
    memcached.answer()
    await keys.answer()
    assert client.values() == [b"v"]
    assert memcached.entries == {subject(world, key): bulk(b"v")}
    client.send(command("GET", key))
    assert client.values() == [b"v"]
    assert gets_of(keys, key) == 1


async def test_a_key_that_is_read_once_is_not_asked_for(
    world: World, keys: Keys, memcached: FakeMemcached
) -> None:
    serve(world, ID)
    client = reader_of(world)
    for key in keys_of(world, 0, 40):
        await get(keys, client, key)
    assert not memcached.questions


async def test_a_key_that_expires_is_not_kept_in_memcached(
    world: World, keys: Keys, memcached: FakeMemcached
) -> None:
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    keys.lifetimes[key] = 5000
    serve(world, ID)
    client = reader_of(world)
    await read_once(keys, client, key)
    client.send(command("GET", key))
    memcached.answer()
    await keys.answer()
    assert client.values() == [b"v"]
    assert not memcached.kept
    assert world.exchange.snapshot_reads.cache.fills_total == 1


async def test_the_entry_of_another_snapshot_with_the_same_number_is_not_used(
    world: World, keys: Keys, memcached: FakeMemcached
) -> None:
    """A store that was lost numbers anew, and memcached still has what was read before."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"old"
    serve(world, ID)
    client = reader_of(world)
    await read_once(keys, client, key)
    client.send(command("GET", key))
    memcached.answer()
    await keys.answer()
    assert client.values() == [b"old"]
    snapshots = world.exchange.snapshots
    record = snapshots._serving[ID]
    world.exchange.snapshot_reads.cache.end(ID)
    snapshots._serving[ID] = replace(record, opened_at=record.opened_at + 1)
    keys.values[key] = b"new"
    client.send(command("GET", key))
    memcached.answer()
    await keys.answer()
    assert client.values() == [b"new"]


async def test_an_answer_that_comes_when_the_snapshot_has_ended_is_not_used(
    world: World, keys: Keys, memcached: FakeMemcached, autojump_clock: MockClock
) -> None:
    key = keys_of(world, 0)[0]
    serve(world, ID)
    client = reader_of(world)
    await read_once(keys, client, key)
    memcached.entries[subject(world, key)] = bulk(b"v")
    client.send(command("GET", key))
    snapshots = world.exchange.snapshots
    snapshots.book.records[ID] = snapshots._serving[ID]
    snapshots._abort([ID], "test")
    memcached.answer()
    await keys.answer()
    [reply] = client.values()
    assert isinstance(reply, ServerError)


async def test_an_answer_that_comes_without_a_lease_is_not_used(
    world: World, keys: Keys, memcached: FakeMemcached, autojump_clock: MockClock
) -> None:
    """Another proxy may have ended the snapshot."""
    key = keys_of(world, 0)[0]
    serve(world, ID)
    client = reader_of(world)
    await read_once(keys, client, key)
    memcached.entries[subject(world, key)] = bulk(b"v")
    client.send(command("GET", key))
    world.exchange.snapshots.members.valid_until = trio.current_time()
    memcached.answer()
    await keys.answer()
    [reply] = client.values()
    assert isinstance(reply, ServerError)
    assert str(reply).startswith("NOTREADY")


async def test_while_memcached_is_bypassed_reads_go_to_the_nodes_in_the_same_step(
    world: World, keys: Keys, memcached: FakeMemcached
) -> None:
    key = served(world, keys)
    client = reader_of(world)
    await read_once(keys, client, key)
    memcached.is_bypassed = True
    client.send(command("GET", key))
    await keys.answer()
    assert client.values() == [b"v"]
    assert not memcached.questions


async def test_replies_keep_their_order_and_writes_go_on(
    world: World, keys: Keys, memcached: FakeMemcached
) -> None:
    """Promise 6. What follows a read that waits is not held: it cannot change what the read shows."""
    a, b = keys_of(world, 0)[:2]
    keys.values |= {a: b"a", b: b"b"}
    serve(world, ID)
    world.upstream(0).known |= {a, b}
    client = reader_of(world)
    await read_once(keys, client, a, b)
    memcached.entries[subject(world, a)] = bulk(b"a")
    client.send(command("GET", a) + command("GET", b) + command("GET", a) + command("SET", a, "2"))
    await keys.answer()
    assert client.values() == []
    assert memcached.answer() == 2
    await keys.answer()
    assert client.values() == [b"a", b"b", b"a", b"OK"]


async def test_each_resp_version_has_its_own(world: World, keys: Keys, memcached: FakeMemcached) -> None:
    key = keys_of(world, 0)[0]
    serve(world, ID)
    client = reader_of(world)
    await read_once(keys, client, key)
    memcached.entries[subject(world, key, 2)] = b"$-1\r\n"
    memcached.entries[subject(world, key, 3)] = b"_\r\n"
    client.send(command("GET", key) + command("HELLO", "3"))
    memcached.answer()
    await world.settle()
    client.connection.snapshot_id = ID  # which HELLO sets to what the listener says
    client.send(command("GET", key))
    memcached.answer()
    first, _, last = client.replies()
    assert (first, last) == (b"$-1\r\n", b"_\r\n")


# -- one fetch at a time


@pytest.mark.parametrize("with_memcached", [False, True])
async def test_reads_of_a_key_wait_for_the_fetch_that_is_under_way(
    world: World, keys: Keys, with_memcached: bool
) -> None:
    memcached = FakeMemcached(world) if with_memcached else None
    key = served(world, keys)
    clients = [reader_of(world) for _ in range(5)]
    await read_once(keys, clients[0], key)
    for client in clients[:3]:
        client.send(command("GET", key) * 2)
    if memcached is not None:
        assert memcached.answer() == 1
    for client in clients[3:]:
        client.send(command("GET", key))
    await keys.answer()
    assert values_of(clients) == [[b"v"] * 2] * 3 + [[b"v"]] * 2
    assert gets_of(keys, key) == 1
    assert world.exchange.snapshot_fetches.shared_total == 7
    assert not world.exchange.snapshot_fetches._fetches


async def test_another_client_takes_the_fetch_over_when_the_first_has_left(
    world: World, keys: Keys, memcached: FakeMemcached
) -> None:
    key, clients = await asking(world, keys, 3)
    clients[0].connection.close("left")
    memcached.answer()
    clients[1].connection.close("left")  # while its read is at the node
    await keys.answer()
    assert clients[2].values() == [b"v"]
    assert gets_of(keys, key) == 1
    assert not world.exchange.snapshot_fetches._fetches


async def test_when_all_have_left_nothing_is_sent(world: World, keys: Keys, memcached: FakeMemcached) -> None:
    key = keys_of(world, 0)[0]
    serve(world, ID)
    client = reader_of(world)
    await read_once(keys, client, key)
    client.send(command("GET", key))
    client.connection.close("left")
    memcached.answer()
    await keys.answer()
    assert not keys.asked
    assert not world.exchange.snapshot_fetches._fetches


@pytest.mark.parametrize("with_memcached", [False, True])
async def test_when_a_fetch_comes_to_nothing_each_reads_by_itself(
    world: World, keys: Keys, with_memcached: bool, autojump_clock: MockClock
) -> None:
    """As when the key was written while it was read."""
    memcached = FakeMemcached(world) if with_memcached else None
    key = keys_of(world, 0)[0]
    slot = slot_of(key)
    keys.values |= {key: b"new", preimage(slot, ID, key): b"old", marker(slot, ID, key): b"p"}
    serve(world, ID)
    written = alone(world)
    clients = [reader_of(world) for _ in range(3)]
    await read_once(keys, clients[0], keys_of(world, 0)[1])
    world.exchange.snapshot_reads.cache.is_read_again(key)
    for client in clients:
        client.send(command("GET", key))
    if memcached is not None:
        memcached.answer()
    written[key] = None
    await keys.answer()
    await keys.answer()
    assert values_of(clients) == [[b"old"]] * 3
    assert not world.exchange.snapshot_fetches._fetches


async def test_who_waits_gets_nothing_whose_time_is_over(
    world: World, keys: Keys, autojump_clock: MockClock
) -> None:
    """A reply that took long, of a key that expires meanwhile: it is right for who asked first, and no later."""
    key = keys_of(world, 0)[0]
    keys.values[key] = b"v"
    keys.lifetimes[key] = 500
    serve(world, ID)
    first, second = reader_of(world), reader_of(world)
    await read_once(keys, first, key)
    first.send(command("GET", key))
    await trio.sleep(0.4)
    second.send(command("GET", key))
    await trio.sleep(0.2)
    node = world.nodes[0]
    world.turn()
    for words in node.take():
        node.reply(keys._reply(words))
    keys.values.clear()
    await keys.answer()
    assert first.values() == [b"v"]
    assert second.values() == [None]


async def test_when_its_node_is_lost_all_who_wait_read_it_where_it_is_then(
    world: World, keys: Keys, autojump_clock: MockClock
) -> None:
    _, clients = await asking(world, keys, 3)
    world.nodes[0].lose()
    await world.connect()
    for connection in world.upstreams.connections():
        connection.history = b"f" * 40
    for _ in range(10):
        await keys.answer()
        await trio.sleep(0.1)
    assert values_of(clients) == [[b"v"]] * 3


async def test_a_fault_while_an_answer_is_used_ends_its_clients_alone(
    world: World, keys: Keys, memcached: FakeMemcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = keys_of(world, 0)[:2]
    serve(world, ID)
    first, second = reader_of(world), reader_of(world)
    await read_once(keys, first, a, b)
    memcached.entries |= {subject(world, a): bulk(b"a"), subject(world, b): bulk(b"b")}
    first.send(command("GET", a))
    second.send(command("GET", b))
    shelf = world.exchange.snapshot_reads.cache.shelf(ID, 2)
    assert shelf is not None
    put = type(shelf).put

    def broken(self: object, key: bytes, reply: bytes, until: float) -> None:
        assert until == inf
        if key == a:
            raise RuntimeError("a bug")
        put(shelf, key, reply, until)

    monkeypatch.setattr(type(shelf), "put", broken)
    memcached.answer()
    assert first.connection.is_closed
    assert second.values() == [b"b"]


@pytest.mark.parametrize("state", [SnapshotState.CLOSING])
async def test_who_waits_when_it_begins_to_close_is_served(
    world: World, keys: Keys, state: SnapshotState
) -> None:
    """What was asked before may be used."""
    _, clients = await asking(world, keys, 2)
    snapshots = world.exchange.snapshots
    old = snapshots._serving[ID]
    new = snapshots.book.records[ID] = old.moved_to(state)
    snapshots._on_record(old, new)
    await keys.answer()
    assert values_of(clients) == [[b"v"]] * 2
