"""What former snapshots left is swept, markers first, and nothing else ever; what cannot be proven is not claimed.

The cluster here is two dictionaries with a map of slots; tests/live/test_sweep.py has real servers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from zlib import crc32

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.protocol.encode import array, bulk, error, integer
from proxy.protocol.replies import decode
from proxy.snapshots.sweep import Sweeper, SweepPace
from proxy.topology.service import Topology
from proxy.upstream.connect import ConnectError
from routing.slot import SLOT_COUNT, slot_of
from routing.snapshot import Chain
from routing.snapshot_names import INTERNAL_PATTERN, absent, marker, parse, preimage, tags
from routing.topology import Address, Migration, MigrationKind, Node, Role, Shard, TopologyView

ADDRESSES = (Address("node", 7000), Address("node", 7001))
PAGE = 3  # keys that a SCAN looks at
PACE = SweepPace(pause_seconds=0.01, interval_seconds=600.0, settle_seconds=8.0)


def internal(kind: Callable[[int, int, bytes], bytes], snapshot_id: int, key: bytes) -> bytes:
    return kind(slot_of(key), snapshot_id, key)


Clock = trio.testing.MockClock


class World:
    """Two nodes, a chain, and a sweeper."""

    def __init__(self) -> None:
        self.keys: tuple[dict[bytes, None], dict[bytes, None]] = ({}, {})
        self.owners = [0] * (SLOT_COUNT // 2) + [1] * (SLOT_COUNT // 2)
        self.migrating: int | None = None  # this slot, from 0 to 1
        self.chain = Chain()
        self.last_id = 100
        self.stranger_reasons: list[str] = []
        self.deleted: list[list[bytes]] = []  # per UNLINK
        self.at_once = self.at_once_max = 0
        self.scans = 0
        self.on_scan: Callable[[int], None] = lambda number: None
        self.failures: list[bytes | Exception] = []  # of the next SCANs
        self.unlink_failure: Callable[[list[bytes]], bytes | None] = lambda names: None
        self.looks = True  # discovery goes on
        self.topology = Topology()
        self.see()
        self.sweeper = Sweeper(
            self.ask,
            self.execute,
            self.topology,
            PACE,
            chain=lambda: self.chain,
            sweepable=lambda snapshot_id: snapshot_id <= self.last_id,
            strangers=self.strangers,
        )

    def see(self) -> None:
        nodes = [Node(f"{index:040d}", address, Role.PRIMARY) for index, address in enumerate(ADDRESSES)]
        migrations = (
            ()
            if self.migrating is None
            else (Migration((self.migrating,), nodes[0].id, nodes[1].id, MigrationKind.STEPWISE),)
        )
        view = TopologyView(0, 1, tuple(Shard(node) for node in nodes), tuple(self.owners), migrations)
        self.topology.adopt(view, trio.current_time() if self.looks else -1.0)

    async def discover(self) -> None:
        """What the keeper does: look when it is wanted."""
        while True:
            await self.topology.wanted.wait()
            self.topology.take_wanted()
            await trio.sleep(0.1)
            self.see()

    def put(self, *names: bytes) -> None:
        for name in names:
            self.keys[self.owners[slot_of(name)]][name] = None

    def all_keys(self) -> set[bytes]:
        return {*self.keys[0], *self.keys[1]}

    async def strangers(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return self.stranger_reasons

    async def ask(self, address: Address, raw: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        words = decode(raw)
        assert words[0] == b"SCAN"
        assert words[2:] == [b"MATCH", INTERNAL_PATTERN, b"COUNT", b"1000"]
        self.scans += 1
        self.on_scan(self.scans)
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        # A cursor is a place among the hashes of names: what is there all the time is returned, whatever goes.
        place = int(words[1])
        ranked = sorted((crc32(name) + 1, name) for name in self.keys[ADDRESSES.index(address)])
        page = [item for item in ranked if item[0] > place][:PAGE]
        following = page[-1][0] if len(page) == PAGE else 0
        found = [name for _, name in page if name.startswith(b"steady{")]
        return array([bulk(str(following)), array([bulk(name) for name in found])])

    async def execute(self, raw: bytes, slot: int) -> bytes:
        words = decode(raw)
        names = words[1:]
        assert words[0] == b"UNLINK"
        assert {slot_of(name) for name in names} == {slot}
        self.at_once += 1
        self.at_once_max = max(self.at_once, self.at_once_max)
        await trio.sleep(0.001)
        self.at_once -= 1
        if (failure := self.unlink_failure(names)) is not None:
            return failure
        self.deleted.append(names)
        sides = self.keys if slot == self.migrating else (self.keys[self.owners[slot]],)
        return integer(sum(1 for name in names for side in sides if side.pop(name, b"") is None))


@pytest.fixture
async def world(autojump_clock: Clock, nursery: trio.Nursery) -> World:
    world = World()
    nursery.start_soon(world.discover)
    return world


def fill(world: World, ids: tuple[int, ...], count: int = 20) -> dict[int, set[bytes]]:
    """Markers and pre-images of ``count`` keys for each id, and as many keys of clients. id -> names."""
    made: dict[int, set[bytes]] = {}
    for number in range(count):
        key = b"key:%d" % number
        world.put(key)
        for snapshot_id in ids:
            names = {internal(marker, snapshot_id, key), internal(preimage, snapshot_id, key)}
            made.setdefault(snapshot_id, set()).update(names)
            world.put(*names)
    return made


async def test_what_is_kept_no_more_is_deleted_and_nothing_else(world: World, autojump_clock: Clock) -> None:
    """An id in the chain stays, and so does one that this proxy does not know to be given up."""
    made = fill(world, (7, 8, 9, 101))
    world.put(b"steady", b"steady{1}:x", b"steady{1}:m:x:y")
    world.chain = Chain((8, 9))
    everything = world.all_keys()
    done = await world.sweeper.sweep_once()
    assert done is not None
    assert world.all_keys() == everything - made[7]
    assert world.sweeper.keys_swept_total == len(made[7])
    assert world.sweeper.may_have_keys
    assert world.sweeper.problems() == []


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sets(st.tuples(st.sampled_from("mp"), st.integers(1, 4), st.integers(0, 6))),
    st.sets(st.integers(1, 4)),
)
def test_any_mix_of_keys(names: set[tuple[str, int, int]], chain: set[int]) -> None:
    """Also pre-images without markers, and markers without pre-images."""

    async def run() -> None:
        world = World()
        made = {
            internal(marker if kind == "m" else preimage, snapshot_id, b"k%d" % number): snapshot_id
            for kind, snapshot_id, number in names
        }
        world.put(*made)
        world.chain = Chain(tuple(sorted(chain)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.discover)
            for _ in range(2):
                await world.sweeper.sweep_once()
            nursery.cancel_scope.cancel()
        assert world.all_keys() == {name for name, snapshot_id in made.items() if snapshot_id in chain}
        for name in made:
            deleted = [index for index, batch in enumerate(world.deleted) if name in batch]
            found = parse(name)
            assert found is not None
            if found.kind == b"p" and deleted:
                first = marker(slot_of(name), found.snapshot_id, found.key)
                assert any(first in batch for batch in world.deleted[: deleted[0]]), "P before M"

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_a_preimage_stays_while_its_marker_may_be_there(world: World, autojump_clock: Clock) -> None:
    """A reader who finds no pre-image must find no marker either."""
    made = fill(world, (7,))
    lasting = internal(marker, 7, b"key:3")
    world.unlink_failure = lambda names: error("NOTREADY x") if lasting in names else None
    assert await world.sweeper.sweep_once() is None
    assert {lasting, internal(preimage, 7, b"key:3")} <= world.all_keys()
    assert world.sweeper.problems() == [f"keys of slot {slot_of(b'key:3')} cannot be swept: NOTREADY x"]
    assert world.sweeper.keys_swept_total == len(made[7] - world.all_keys())
    world.unlink_failure = lambda names: None
    assert await world.sweeper.sweep_once() is not None
    assert world.sweeper.problems() == []
    assert made[7].isdisjoint(world.all_keys())


async def test_keys_of_one_slot_go_in_one_command_at_rest_and_singly_while_it_is_split(
    world: World, autojump_clock: Clock
) -> None:
    slot = slot_of(b"{t}1")
    keys = [b"{t}%d" % number for number in range(2)]
    for number in range(2):
        world.put(internal(marker, 7, keys[number]))
    await world.sweeper.sweep_once()
    assert [len(batch) for batch in world.deleted] == [2]
    world.deleted.clear()
    world.owners[slot] = 0
    world.migrating = slot
    world.see()
    world.keys[0][internal(marker, 7, keys[0])] = None
    world.keys[1][internal(marker, 7, keys[1])] = None
    world.keys[0][internal(preimage, 7, keys[1])] = None
    await world.sweeper.sweep_once()
    assert all(len(batch) == 1 for batch in world.deleted)
    assert world.all_keys() == set()


async def test_a_slot_that_came_to_be_split_is_swept_key_by_key(world: World, autojump_clock: Clock) -> None:
    for number in range(2):
        world.put(internal(marker, 7, b"{t}%d" % number))
    world.unlink_failure = lambda names: error("NOTREADY TRYAGAIN") if len(names) > 1 else None
    assert await world.sweeper.sweep_once() is not None
    assert world.all_keys() == set()


async def test_a_bounded_number_of_deletions_is_under_way(world: World, autojump_clock: Clock) -> None:
    for number in range(PAGE):
        for count in range(100):
            world.put(internal(marker, 7, b"%d-%d" % (number, count)))
    # One page with all of them.
    names = list(world.all_keys())
    current = type("Current", (), {"swept": 0})()
    await world.sweeper._unlink({slot_of(name): {name: None} for name in names}, current)  # type: ignore[arg-type]
    assert 1 < world.at_once_max <= 16
    assert world.all_keys() == set()


async def test_a_key_that_moved_past_the_scan_is_found_by_a_later_pass(
    world: World, autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    """And the pass that missed it, with a map that changed, is not the last one, nor proves anything."""
    key = next(b"key:%d" % n for n in range(100) if slot_of(b"key:%d" % n) >= SLOT_COUNT // 2)
    name = internal(marker, 7, key)
    world.put(name)

    def move(number: int) -> None:
        if number == 2:  # the first node was scanned
            del world.keys[1][name]
            world.owners[slot_of(key)] = 0
            world.keys[0][name] = None

    world.on_scan = move
    first = await world.sweeper.sweep_once()
    assert first is not None
    assert (first.found, first.is_still) == (0, False)
    nursery.start_soon(world.sweeper.run)
    await trio.sleep(10)
    assert world.all_keys() == set()
    await trio.sleep(20)
    assert not world.sweeper.may_have_keys


async def test_passes_repeat_while_slots_move(
    world: World, autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    """With growing pauses; they end with one that saw the map stand still."""
    world.migrating = 5
    world.see()
    nursery.start_soon(world.sweeper.run)
    await trio.sleep(300)
    assert 7 <= world.sweeper.passes_total <= 10
    assert world.sweeper.may_have_keys
    world.migrating = None
    world.see()
    await trio.sleep(600)
    assert not world.sweeper.may_have_keys


@pytest.mark.parametrize(("before", "after"), [(None, 5), (5, None)])
async def test_a_pass_during_which_slots_began_or_ceased_to_move_proves_nothing(
    world: World, autojump_clock: Clock, before: int | None, after: int | None
) -> None:
    """Keys may have gone there and back, though the map is the same in the end."""
    world.migrating = before
    world.see()

    def change(number: int) -> None:
        world.migrating = after

    world.on_scan = change
    done = await world.sweeper.sweep_once()
    assert done is not None
    assert not done.is_still


async def test_without_a_look_at_the_cluster_nothing_is_proven(world: World, autojump_clock: Clock) -> None:
    """What the last look showed may be old news: slots may have moved while the pass went on."""
    world.looks = False
    done = await world.sweeper.sweep_once()
    assert done is not None
    assert not done.is_still
    assert world.sweeper.may_have_keys


async def test_that_there_are_no_keys_is_claimed_only_once_late_writes_have_landed(
    world: World, autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    nursery.start_soon(world.sweeper.run)
    await trio.sleep(PACE.settle_seconds - 1)
    assert world.sweeper.passes_total == 1
    assert world.sweeper.may_have_keys
    await trio.sleep(2)
    assert world.sweeper.passes_total == 2
    assert not world.sweeper.may_have_keys
    world.chain = Chain((7,))
    assert world.sweeper.may_have_keys  # before anyone is told
    world.sweeper.chain_changed()
    world.chain = Chain()
    world.sweeper.chain_changed()
    assert world.sweeper.may_have_keys
    await trio.sleep(1)
    assert world.sweeper.passes_total == 3  # at once
    assert world.sweeper.may_have_keys
    world.put(internal(marker, 7, b"late"))
    await trio.sleep(20)
    assert world.all_keys() == set()
    assert not world.sweeper.may_have_keys


OTHER_TAG = next(
    n for n in range(10**6) if slot_of(b"%d" % n) == slot_of(b"k") and b"%d" % n != tags()[slot_of(b"k")]
)


@pytest.mark.parametrize(
    "name",
    [
        internal(marker, 101, b"k"),
        absent(5),
        b"steady{0}:m:5:other",
        b"steady{00}:m:5:",
        b"steady{%d}:m:5:k" % OTHER_TAG,
        internal(preimage, 5, b"k").replace(b":5:", b":05:"),
    ],
)
async def test_any_internal_name_speaks_against_it(world: World, autojump_clock: Clock, name: bytes) -> None:
    """Of a snapshot that nobody here knows to be over, of a form that nobody here makes: not deleted either."""
    assert parse(name) is not None
    world.put(name)
    done = await world.sweeper.sweep_once()
    assert done is not None
    assert done.is_still
    assert world.sweeper.may_have_keys
    assert world.all_keys() == {name}
    assert len(world.sweeper.problems()) == (name != internal(marker, 101, b"k"))


async def test_a_chain_that_changed_and_changed_back_during_a_pass_proves_nothing(
    world: World, autojump_clock: Clock
) -> None:
    def change(number: int) -> None:
        for chain in (Chain((7,)), Chain()):
            world.chain = chain
            world.sweeper.chain_changed()

    world.sweeper._changed_at = -1000.0
    world.on_scan = change
    await world.sweeper.sweep_once()
    assert world.sweeper.may_have_keys


async def test_a_snapshot_that_opens_wakes_nobody_and_one_that_leaves_the_chain_does(
    world: World, autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    nursery.start_soon(world.sweeper.run)
    await trio.sleep(60)
    passes = world.sweeper.passes_total
    world.chain = Chain((7,))
    world.sweeper.chain_changed()
    fill(world, (7,))
    await trio.sleep(60)
    assert world.sweeper.passes_total == passes
    world.chain = Chain()
    world.sweeper.chain_changed()
    await trio.sleep(5)
    assert not any(parse(name) for name in world.all_keys())
    passes = world.sweeper.passes_total
    await trio.sleep(2 * PACE.interval_seconds)
    assert passes + 2 <= world.sweeper.passes_total <= passes + 4  # now and then all the same


async def test_nothing_is_swept_while_strangers_use_the_cluster(
    world: World, autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    """The snapshots that they keep are unknown here."""
    made = fill(world, (7,))
    world.stranger_reasons = ["proxies that do not share this one's store use the cluster: x"]
    nursery.start_soon(world.sweeper.run)
    await trio.sleep(30)
    assert made[7] <= world.all_keys()
    assert world.sweeper.may_have_keys
    assert world.sweeper.problems() == [f"nothing is swept: {world.stranger_reasons[0]}"]
    assert world.sweeper.passes_failed_total > 1
    world.stranger_reasons = []
    await trio.sleep(60)
    assert made[7].isdisjoint(world.all_keys())
    assert world.sweeper.problems() == []


@pytest.mark.parametrize(
    "failure",
    [
        ConnectError("node:7000: refused"),
        trio.TooSlowError(),
        error("NOTREADY node"),
        b"+OK\r\n",
        b"*2\r\n$1\r\n0\r\n",
    ],
    ids=["refused", "slow", "error", "nonsense", "cut"],
)
async def test_a_node_that_fails_is_told_and_asked_again(
    world: World, autojump_clock: Clock, nursery: trio.Nursery, failure: bytes | Exception
) -> None:
    made = fill(world, (7,))
    world.failures = [failure]
    assert await world.sweeper.sweep_once() is None
    assert world.sweeper.problems()[0].startswith("node:7000 cannot be swept: ")
    assert world.sweeper.passes_failed_total == 1
    assert world.sweeper.running_since is None
    nursery.start_soon(world.sweeper.run)
    await trio.sleep(5)
    assert made[7].isdisjoint(world.all_keys())
    assert world.sweeper.problems() == []


async def test_an_unknown_cluster_is_not_an_empty_one(world: World, autojump_clock: Clock) -> None:
    world.topology.view = replace(world.topology.view, shards=())
    assert await world.sweeper.sweep_once() is None
    assert world.sweeper.problems() == ["nothing is swept: the cluster is not known yet"]


async def test_keys_that_only_a_former_owner_has_are_told(world: World, autojump_clock: Clock) -> None:
    """No redirection leads to them. Once may be another proxy's sweep, which was quicker."""
    name = internal(marker, 7, b"key")
    world.keys[1 - world.owners[slot_of(name)]][name] = None
    await world.sweeper.sweep_once()
    assert world.sweeper.problems() == []
    await world.sweeper.sweep_once()
    assert world.sweeper.problems()[0].startswith("1 keys of former snapshots are left at nodes")


async def test_a_pass_is_paced_and_shows_its_progress(world: World, autojump_clock: Clock) -> None:
    for number in range(30 * PAGE):
        world.put(b"key:%d" % number)
    began = trio.current_time()
    running: list[float] = []

    def look(number: int) -> None:
        values = {sample.family.name: sample.value for sample in world.sweeper.samples()}
        running.append(float(str(values["steadyread_snapshot_sweep_running_seconds"])))

    world.on_scan = look
    await world.sweeper.sweep_once()
    assert trio.current_time() - began >= (world.scans - len(ADDRESSES)) * PACE.pause_seconds
    assert world.scans >= 30
    assert running == sorted(running)
    assert running[-1] > 0
    values = {sample.family.name: sample.value for sample in world.sweeper.samples()}
    assert values["steadyread_snapshot_sweep_running_seconds"] == 0
    assert values["steadyread_snapshot_sweep_passes_total"] == 1
