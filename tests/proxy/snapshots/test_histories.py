"""A connection is believed about a snapshot only while the history behind it is proven to contain the cut.

The nodes here say what the test lets them say; the look for news is made by hand.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio
from trio.testing import MockClock

from proxy.snapshots.histories import Histories, HistoryGuard, restored
from proxy.topology.service import Topology
from proxy.upstream.reply_slot import ConnectionLostError
from routing.offsets import Point
from routing.slot import SLOT_COUNT
from routing.snapshot import Floor
from routing.snapshot_floors import ShardFloor
from routing.topology import Address, Migration, MigrationKind, Node, Role, Shard, TopologyView

ONE, TWO = Address("node", 7000), Address("node", 7001)
FIRST, SECOND, THIRD, OTHER = b"1" * 40, b"2" * 40, b"3" * 40, b"9" * 40
NEVER = b"0" * 40
HALF = SLOT_COUNT // 2
ID = 7


class FakeConnection:
    """What one node says."""

    def __init__(self, address: Address, history: bytes) -> None:
        self.address = address
        self.says_history, self.offset = history, 100
        self.says_second, self.second_offset = NEVER, -1
        self.role = "master"
        self.is_lost = False
        self.known: set[bytes] = set()
        self.history = b""
        self.guarded_step = -1
        self.queued: list[object] = []
        self.closed = ""
        self.asked = 0

    def info(self) -> bytes:
        text = (
            f"# Replication\r\nrole:{self.role}\r\nconnected_slaves:0\r\nmaster_replid:{self.says_history.decode()}\r\n"
            f"master_replid2:{self.says_second.decode()}\r\nmaster_repl_offset:{self.offset}\r\n"
            f"second_repl_offset:{self.second_offset}\r\nslave_repl_offset:{self.offset}\r\n"
        ).encode()
        return b"$%d\r\n%b\r\n" % (len(text), text)

    async def request(self, raw: bytes) -> bytes:
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if self.is_lost:
            raise ConnectionLostError("lost", sent=True)
        return self.info()

    def queue(self, slot: object) -> None:
        self.queued.append(slot)

    def close(self, reason: str) -> None:
        self.closed = reason

    def promote(self, history: bytes, at: int) -> None:
        """Another one of the shard took over at this offset."""
        self.says_second, self.second_offset = self.says_history, at
        self.says_history = history


class World:
    """Two shards, a snapshot with settled floors at offset 100 of each, and the histories."""

    def __init__(self) -> None:
        self.connections = {ONE: FakeConnection(ONE, FIRST), TWO: FakeConnection(TWO, OTHER)}
        self.first_of_two = HALF
        self.migrations: tuple[Migration, ...] = ()
        self.config_epoch = 1
        self.topology = Topology()
        self.see()
        self.ended: dict[int, str] = {}
        self.new_floors = 0
        self.histories = Histories(self.topology, self, self._on_unproven, self._on_floors)  # type: ignore[arg-type]

    @property
    def one(self) -> FakeConnection:
        return self.connections[ONE]

    @property
    def two(self) -> FakeConnection:
        return self.connections[TWO]

    def see(self) -> None:
        nodes = [
            Node(name * 40, address, Role.PRIMARY, config_epoch=self.config_epoch)
            for name, address in (("a", ONE), ("b", TWO))
        ]
        owners = [0] * self.first_of_two + [1] * (SLOT_COUNT - self.first_of_two)
        view = TopologyView(0, 1, tuple(Shard(node, ()) for node in nodes), tuple(owners), self.migrations)
        self.topology.adopt(view, trio.current_time())

    def begin(self, snapshot_id: int = ID) -> None:
        floors = {
            FIRST: ShardFloor(Point(FIRST, 100), frozenset(range(HALF)), 1),
            OTHER: ShardFloor(Point(OTHER, 100), frozenset(range(HALF, SLOT_COUNT)), 1),
        }
        self.histories.begin(snapshot_id, floors)

    async def look(self) -> None:
        self.topology.looked_at = trio.current_time() + 1  # a look that began after this
        await self.histories._look()

    def floor(self, history: bytes) -> ShardFloor:
        return self.histories.floors[ID][history]

    def writing_to(self, address: Address) -> Iterable[FakeConnection]:
        return [self.connections[address]]

    def asking(self, address: Address) -> FakeConnection:
        return self.connections[address]

    def _on_unproven(self, numbers: Iterable[int], reason: str) -> None:
        for number in list(numbers):
            self.ended[number] = reason
            self.histories.end(number)

    def _on_floors(self) -> None:
        self.new_floors += 1


IMPORTING = Migration((5,), "b" * 40, "a" * 40, MigrationKind.STEPWISE)


async def test_in_ordinary_operation_nothing_ends() -> None:
    """Reads and writes, a graceful failover, and slots that come and go."""
    world = World()
    world.begin()
    world.one.offset = world.two.offset = 500
    await world.look()
    world.one.promote(SECOND, 501)
    world.one.offset = 600
    await world.look()
    assert world.floor(SECOND).point == Point(SECOND, 100)
    assert world.new_floors == 1
    world.migrations = (IMPORTING,)
    world.see()
    await world.look()
    assert not world.floor(SECOND).is_settled
    world.migrations, world.first_of_two = (), HALF + 1
    world.see()
    world.one.offset = 700
    await world.look()
    assert world.floor(SECOND).is_settled
    assert world.floor(SECOND).point.offset == 700
    world.one.promote(THIRD, 701)
    await world.look()
    assert not world.ended


async def test_a_replica_that_had_not_the_cut_ends_the_snapshot() -> None:
    world = World()
    world.begin()
    world.one.promote(SECOND, 100)  # it had what came before 100
    await world.look()
    assert "the snapshot needs 100" in world.ended[ID]


async def test_two_failovers_between_two_looks_prove_nothing() -> None:
    world = World()
    world.begin()
    world.one.promote(SECOND, 300)
    world.one.promote(THIRD, 400)
    await world.look()
    assert ID in world.ended


async def test_a_failover_during_a_migration_into_the_shard_ends_the_snapshot() -> None:
    world = World()
    world.begin()
    await world.look()
    world.migrations = (IMPORTING,)
    world.see()
    world.migrations = ()  # the new primary knows nothing of it
    world.see()
    world.one.promote(SECOND, 300)
    await world.look()
    assert "migration" in world.ended[ID]


async def test_a_migration_that_is_seen_before_the_first_look_unsettles_the_floor() -> None:
    """It came between the barrier's question and the first look, which brings the histories of the nodes."""
    world = World()
    world.migrations = (IMPORTING,)
    world.see()
    world.begin()
    await world.look()
    assert not world.floor(FIRST).is_settled
    world.migrations = ()
    world.see()
    world.one.promote(SECOND, 300)
    await world.look()
    assert "migration" in world.ended[ID]


async def test_a_floor_is_not_taken_anew_from_before_the_slots_were_seen_to_be_there(
    autojump_clock: MockClock,
) -> None:
    world = World()
    world.begin()
    await world.look()
    world.migrations = (IMPORTING,)
    world.see()
    world.migrations = ()
    request = world.one.request

    async def while_it_ends(raw: bytes) -> bytes:
        reply = await request(raw)
        world.first_of_two = HALF + 1
        world.see()
        return reply

    world.one.request = while_it_ends  # type: ignore[method-assign]
    await world.look()
    assert not world.floor(FIRST).is_settled
    world.one.request = request  # type: ignore[method-assign]
    await world.look()
    assert world.floor(FIRST).is_settled


async def test_a_history_that_changed_while_writes_counted_on_known_markers_ends_all() -> None:
    world = World()
    world.begin()
    await world.look()
    world.one.known.add(b"key")
    world.one.promote(SECOND, 900)
    await world.look()
    assert "counted on" in world.ended[ID]
    assert not world.one.known


async def test_what_is_known_is_forgotten_when_the_node_is_a_replica() -> None:
    world = World()
    world.begin()
    await world.look()
    world.one.known.add(b"key")
    world.one.role = "slave"
    await world.look()
    assert not world.one.known
    assert not world.ended


async def test_after_a_restart_of_the_proxy_only_an_unchanged_history_will_do() -> None:
    for promoted in (False, True):
        world = World()
        world.histories.begin(
            ID, restored({"x": Floor(FIRST.decode(), 100), "y": Floor(OTHER.decode(), 100)})
        )
        if promoted:
            world.one.promote(SECOND, 900)
        await world.look()
        assert (ID in world.ended) is promoted


async def test_a_connection_is_judged_by_what_it_says_itself() -> None:
    world = World()
    world.begin()
    connection = world.one
    assert not world.histories.has_floors_of(ID, connection)  # type: ignore[arg-type]
    assert await world.histories.judge(connection, trio.current_time() + 1)  # type: ignore[arg-type]
    assert world.histories.has_floors_of(ID, connection)  # type: ignore[arg-type]
    world.histories.end(ID)
    assert not world.histories.has_floors_of(ID, connection)  # type: ignore[arg-type]


async def test_a_replica_or_a_silent_node_is_not_judged(autojump_clock: MockClock) -> None:
    world = World()
    world.begin()
    world.one.role = "slave"
    assert not await world.histories.judge(world.one, trio.current_time() + 1)  # type: ignore[arg-type]
    world.two.is_lost = True
    assert not await world.histories.judge(world.two, trio.current_time() + 1)  # type: ignore[arg-type]
    assert not world.ended


async def test_an_unknown_history_is_judged_only_by_a_view_that_is_no_older(
    autojump_clock: MockClock,
) -> None:
    world = World()
    world.begin()
    world.one.promote(SECOND, 300)
    world.topology.looked_at = trio.current_time() - 1
    assert not await world.histories.judge(world.one, trio.current_time() + 1)  # type: ignore[arg-type]
    assert not world.ended


async def test_the_guard_closes_a_connection_whose_node_is_not_what_was_judged() -> None:
    for change in ("none", "history", "role", "error"):
        connection = FakeConnection(ONE, FIRST)
        connection.history = FIRST
        if change == "history":
            connection.promote(SECOND, 300)
        elif change == "role":
            connection.role = "slave"
        reply = b"-LOADING it does\r\n" if change == "error" else connection.info()
        HistoryGuard().on_reply(reply, connection)  # type: ignore[arg-type]
        assert bool(connection.closed) is (change != "none")


async def test_one_guard_stands_before_the_reads_of_a_step() -> None:
    world = World()
    guard = world.histories.guard
    for step in (4, 4, 5, -1, -1):
        guard(world.one, step)  # type: ignore[arg-type]
    assert len(world.one.queued) == 4


async def test_after_a_restart_nothing_is_read_before_every_history_of_the_cut_was_seen(
    autojump_clock: MockClock,
) -> None:
    """A node may have come back empty and handed its slots on, while no proxy watched."""
    world = World()
    world.histories.begin(ID, restored({"x": Floor(FIRST.decode(), 100), "y": Floor(OTHER.decode(), 100)}))
    assert world.histories.is_in_doubt(3)
    world.two.is_lost = True
    await world.look()
    assert world.histories.is_in_doubt(3)
    world.two.is_lost = False
    await world.look()
    assert not world.histories.is_in_doubt(3)
    again = World()
    again.histories.begin(ID, restored({"x": Floor(FIRST.decode(), 100), "y": Floor(OTHER.decode(), 100)}))
    again.two.says_history = THIRD  # it lost all, and
    again.first_of_two = SLOT_COUNT  # its slots went to the other one
    again.see()
    await again.look()
    assert ID in again.ended


async def test_a_node_that_came_back_empty_and_was_drained_clears_no_doubt() -> None:
    world = World()
    world.begin()
    await world.look()
    world.two.says_history = THIRD
    world.first_of_two = SLOT_COUNT
    world.see()
    for _ in range(3):
        await world.look()
        assert world.histories.is_in_doubt(HALF)


async def test_a_failed_over_primary_is_not_looked_for_after_a_restart() -> None:
    world = World()
    world.begin()
    await world.look()
    world.one.promote(SECOND, 900)
    await world.look()
    assert not world.ended
    assert set(world.histories.recorded(ID)) == {SECOND.decode(), OTHER.decode()}
