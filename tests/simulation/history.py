"""One history: a cluster, proxies, clients and troubles, all from one seed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import trio

from proxy.settings import ClusterSettings, Settings, SnapshotSettings
from proxy.store.memory import MemoryStore
from routing.slot import slot_of
from tests.simulation.cluster import Cluster, ServerNode
from tests.simulation.ledger import Broken, Ledger
from tests.simulation.promises import Counts, Judge, SnapshotView
from tests.simulation.proxies import SimClient, SimProxy
from tests.simulation.stores import StoreLink
from tests.simulation.workload import Workload, read_of
from tests.simulation.world import SimClock, World, seeded, simulated_sockets

SHARDS = 3
REQUEST_DEADLINE_SECONDS = 0.4
WRITERS = 3
READERS = 1
OPERATIONS = 13  # of each client
PAUSE_SECONDS = 0.02  # between two operations of a client, on average
HISTORY_SECONDS_MAX = 20.0  # ten times as long as the longest should be
SNAPSHOT_SETTINGS = SnapshotSettings(
    open_deadline_seconds=0.6,
    drain_seconds=0.15,
    hold_seconds=0.1,
    member_ttl_seconds=0.6,
    sweep_pause_seconds=0.02,
)
LAGS_SECONDS = (0.0, 0.002, 0.02, 0.1, 0.3)  # of replicas
ENGINES = ("6.2.14", "7.0.15", "8.0.1", "8.1.0", "9.1.0")


@dataclass
class Outcome:
    """What a history came to."""

    seed: int
    broken: str = ""
    counts: Counts = field(default_factory=Counts)
    troubles: dict[str, int] = field(default_factory=dict)
    trace: int = 0
    seconds: float = 0.0  # of the history
    log: list[str] = field(default_factory=list)


class History:
    """Plays one."""

    def __init__(self, seed: int, clock: SimClock, *, keeps_log: bool = False) -> None:
        self.world = World(seed, clock)
        if keeps_log:
            self.world.log = []
        self.rng = self.world.rng
        self.ledger = Ledger()
        engine_version = self.rng.choice(ENGINES)
        self.cluster = self.world.cluster = self.ledger.cluster = Cluster(
            self.world, self.ledger, SHARDS, 1, engine_version=engine_version
        )
        for node in self.cluster.nodes[SHARDS:]:
            node.lag_seconds = self.rng.choice(LAGS_SECONDS)
        self.workload = Workload(self.rng, self.ledger)
        self.ledger.use(self.workload.keys)
        self.judge = Judge(self.ledger)
        self.proxies: list[SimProxy] = []
        self.views: dict[int, SnapshotView] = {}  # those that served
        self._proxy_names = 0
        self._busy = 0  # clients that are not done
        self._done = trio.Event()
        self._rushing = trio.Event()
        # What kind of history it is.
        self.proxy_count = self.rng.choice((1, 1, 1, 2))
        self.crashes = self.rng.random() < 0.25
        self.is_shared = self.proxy_count > 1 or self.crashes or self.rng.random() < 0.2
        self.settings = replace(
            Settings(),
            cluster=ClusterSettings(request_deadline_seconds=REQUEST_DEADLINE_SECONDS),
            snapshots=SNAPSHOT_SETTINGS,
        )

    async def play(self) -> None:
        self.store = MemoryStore()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.judge.on_broken = nursery.cancel_scope.cancel
            self.world.on_fault = lambda error: self.judge.fail(
                Broken(f"a handler raised {_place_of(error)}")
            )
            nursery.start_soon(self._end_in_time)
            nursery.start_soon(self.store.run)
            comes_late = self.proxy_count > 1 and self.world.seed % 4 == 3
            for _ in range(self.proxy_count - comes_late):
                await self._start_proxy()
            async with trio.open_nursery() as tasks:
                self._busy = WRITERS + READERS
                self._start(tasks, await self._client_of_one(), "first", [self.workload.first()])
                for number in range(WRITERS):
                    tasks.start_soon(self._client, f"w{number}", 0.75)
                for number in range(READERS):
                    tasks.start_soon(self._client, f"r{number}", 0.0)
                tasks.start_soon(self._trouble)
                if comes_late:
                    tasks.start_soon(self._join)
                for _ in range(self.rng.choice((1, 1, 1, 2))):
                    tasks.start_soon(self._snapshots)
            await self._settle()
            self._check()
            nursery.cancel_scope.cancel()

    async def _end_in_time(self) -> None:
        """Nobody waits for ever."""
        await trio.sleep(HISTORY_SECONDS_MAX)
        waiting = [
            f"{words!r} at {client.proxy.name}"
            for client in self._all_clients()
            for words in client.unanswered
        ]
        self.judge.fail(Broken(f"the history does not end; unanswered: {'; '.join(waiting) or 'nothing'}"))

    def _all_clients(self) -> list[SimClient]:
        return [client for proxy in self.proxies for client in proxy._clients]

    def _check(self) -> None:
        """What can only be said at the end."""
        try:
            self.judge.check_writes()
            self.judge.check_order()
            for view in self.views.values():
                view.check()
        except Broken as broken:
            self.judge.fail(broken)

    # -- proxies

    async def _start_proxy(self) -> None:
        self._proxy_names += 1
        proxy = SimProxy(
            self.world,
            f"p{self._proxy_names}",
            StoreLink(self.world, self.store, is_shared=self.is_shared),
            self.settings,
            with_keeper=self.rng.random() < 0.05,
            asks_markers=self.world.seed % 2 == 0,
        )
        await self._nursery.start(proxy.run)
        self.proxies.append(proxy)

    async def _join(self) -> None:
        """One more proxy, while the other may have snapshots of its own; and a client that writes there."""
        await trio.sleep(self.rng.uniform(0.1, 0.3))
        await self._start_proxy()
        self._busy += 1
        await self._client("joined", 0.9)

    async def _client_of_one(self) -> SimClient:
        """A client of a proxy that runs."""
        while not (running := [proxy for proxy in self.proxies if proxy.is_up]):
            await trio.sleep(0.005)
        return SimClient(self.rng.choice(running))

    # -- clients

    async def _client(self, name: str, writes: float) -> None:
        client = await self._client_of_one()
        for _ in range(OPERATIONS):
            with trio.move_on_after(self.rng.expovariate(1 / PAUSE_SECONDS)):
                await self._rushing.wait()
                await trio.sleep(self.rng.uniform(0.0, 0.009))
            if client.is_lost:
                client = await self._client_of_one()
            count = self.rng.randint(1, 3) if self.rng.random() < 0.2 else 1
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    if self.rng.random() < writes:
                        commands = self.workload.write()
                    else:
                        commands = [self.workload.read()]
                    self._start(nursery, client, name, commands)
        self._busy -= 1
        if not self._busy:
            self._done.set()

    async def _snapshots(self) -> None:
        """Opens one after another; reads each at once, by chance, and before it is closed."""
        while not self._done.is_set():
            await trio.sleep(self.rng.expovariate(1 / 0.04))
            view = await self._open()
            if view is None:
                continue
            for _ in range(self.rng.randint(1, 4)):
                await self._read(view)
                await trio.sleep(self.rng.expovariate(1 / 0.06))
            with trio.move_on_after(0.3):
                await self._done.wait()
            await self._read(view)
            if self.rng.random() < 0.8:
                await self._close(view)

    async def _open(self) -> SnapshotView | None:
        client = await self._client_of_one()
        asked_at = self.world.now
        reply = await client.call(b"STEADY.SNAPSHOT", b"OPEN")
        client.close()
        if reply is None or reply[:1] != b":":
            self.world.tell(f"{client.proxy.name} opens no snapshot: {reply!r}")
            self.judge.counts.snapshots_refused += 1
            return None
        number = int(reply[1:-2])
        self.world.tell(f"{client.proxy.name} opened snapshot {number}")
        self.judge.counts.snapshots_opened += 1
        view = self.views[number] = SnapshotView(self.ledger, number, asked_at, self.world.now)
        return view

    async def _close(self, view: SnapshotView) -> None:
        client = await self._client_of_one()
        reply = await client.call(b"STEADY.SNAPSHOT", b"CLOSE", b"%d" % view.id)
        client.close()
        self.world.tell(f"{client.proxy.name} on closing snapshot {view.id}: {reply!r}")
        self.judge.counts.snapshots_aborted += b"aborted" in (reply or b"")

    async def _read(self, view: SnapshotView) -> None:
        """Many keys, all at once, from one client."""
        client = await self._client_of_one()
        bound = await client.call(b"STEADY.READ", b"SNAPSHOT", b"%d" % view.id)
        keys = self.rng.sample(self.workload.keys, len(self.workload.keys) // 4)
        requests = [read_of(key) for key in keys]
        strings = sorted(key for key in keys if key.rpartition(b"}")[2][:1] == b"s")
        if len(strings) > 1:
            requests.append((b"MGET", *strings))
        if bound is None or bound[:1] == b"-":
            self.judge.counts.snapshot_reads_refused += len(requests)
            return
        since = self.world.now
        name = f"{client.proxy.name}'s client"
        async with trio.open_nursery() as nursery:
            for words in requests:
                done = trio.Event()

                def on_reply(
                    reply: bytes | None, words: tuple[bytes, ...] = words, done: trio.Event = done
                ) -> None:
                    self.judge.on_snapshot_read(view, name, words, reply, since, self.world.now)
                    done.set()

                client.start(words, on_reply)
                nursery.start_soon(done.wait)
        client.close()

    def _start(
        self, nursery: trio.Nursery, client: SimClient, name: str, commands: list[tuple[bytes, ...]]
    ) -> None:
        operation = self.ledger.send(name, commands, self.world.now)
        requests = commands if len(commands) == 1 else [(b"MULTI",), *commands, (b"EXEC",)]
        done = trio.Event()
        last: list[bytes | None] = []

        def on_reply(reply: bytes | None) -> None:
            last.append(reply)
            if len(last) == len(requests):
                self.judge.on_reply(operation, last[-1], self.world.now)
                done.set()

        for words in requests:
            client.start(words, on_reply)
        nursery.start_soon(done.wait)

    # -- troubles

    async def _trouble(self) -> None:
        choices: dict[Callable[[], object], int] = {
            self._migrate: 5,
            self._fail_over: 3,
            self._stall: 3,
            self._break_connections: 2,
            self._lag: 2,
            self._restart: 2,
            self._delay: 4,
        }
        if self.crashes:
            choices[self._crash_proxy] = 3
        if self.is_shared:
            choices[self._cut_store] = 1
        if self.cluster.is_atomic:
            choices[self._hand_over] = 5
        kinds, weights = list(choices), list(choices.values())
        async with trio.open_nursery() as nursery:
            while self._busy:
                await trio.sleep(self.rng.expovariate(1 / 0.06))
                nursery.start_soon(self.rng.choices(kinds, weights)[0])

    async def _migrate(self) -> None:
        """A slot key by key, now and then with more than milliseconds in between."""
        cluster, rng = self.cluster, self.rng
        if cluster.is_moving:
            return
        cluster.is_moving = True
        try:
            tag = rng.choice(self.workload.tags)
            slot = slot_of(tag)
            source = cluster.owner(slot)
            target = cluster.primary(rng.choice([shard for shard in range(SHARDS) if shard != source.shard]))
            await self._until_well(source.shard, target.shard)
            source, target = cluster.owner(slot), cluster.primary(target.shard)
            self.world.tell(f"slot {slot} opens from {source.index} to {target.index}")
            cluster.open_slot(slot, target)
            self.workload.hot = tag
            pace = rng.choice((0.0005, 0.003, 0.012))
            if rng.random() < 0.5:
                self._nursery.start_soon(self._rush, b"{%b}%b" % (tag, rng.choice((b"r1", b"r2"))))
            while True:
                await trio.sleep(rng.expovariate(1 / pace))
                source = cluster.owner(slot)
                await self._until_well(source.shard, target.shard)
                source = cluster.owner(slot)
                keys = cluster.keys_in_slot(source, slot)
                if not keys:
                    break
                key = rng.choice(keys)
                self.world.tell(f"key {key!r} goes")
                cluster.migrate_key(slot, key)
            cluster.close_slot(slot)
            self.workload.hot = None
            self.world.tell(f"slot {slot} closed")
            await trio.sleep(0.03)
        finally:
            cluster.is_moving = False

    async def _rush(self, key: bytes) -> None:
        """All writers write one key at nearly the same time."""
        await trio.sleep(self.rng.uniform(0.0, 0.01))
        self.workload.rush = key
        self._rushing.set()
        self._rushing = trio.Event()
        await trio.sleep(0.014)
        self.workload.rush = None

    async def _hand_over(self) -> None:
        """A slot at once."""
        cluster = self.cluster
        if cluster.is_moving:
            return
        cluster.is_moving = True
        slot = slot_of(self.rng.choice(self.workload.keys))
        source = cluster.owner(slot)
        shard = self.rng.choice([shard for shard in range(SHARDS) if shard != source.shard])
        await self._until_well(source.shard, shard)
        self.world.tell(f"slot {slot} is handed over to shard {shard}")
        cluster.hand_over(slot, cluster.primary(shard))
        await trio.sleep(0.03)
        cluster.is_moving = False

    async def _until_well(self, *shards: int) -> None:
        """Until the primaries run and are known to be primaries."""
        while any(
            not node.is_up or node.is_stalled or node.told or node.belief.primary_of[shard].who != node.index
            for shard in shards
            for node in [self.cluster.primary(shard)]
        ):
            await trio.sleep(0.002)

    async def _fail_over(self) -> None:
        cluster, rng = self.cluster, self.rng
        shard = rng.randrange(SHARDS)
        old = cluster.primary(shard)
        new = next(
            (node for node in cluster.nodes if node.source is old and node.is_up and not node.is_stalled),
            None,
        )
        if new is None or old.is_stalled or not old.is_up:
            return
        if rng.random() < 0.3:
            self.world.tell(f"node {new.index} takes over from {old.index} gracefully")
            cluster.fail_over_gracefully(shard, new)
            return
        is_stalled = rng.random() < 0.4
        self.world.tell(f"node {old.index} {'stands still' if is_stalled else 'dies'}")
        if is_stalled:
            old.stall()
        else:
            old.crash()
        await trio.sleep(rng.uniform(0.02, 0.12))
        while new.is_stalled:
            await trio.sleep(0.01)
        cluster.down.add(old.index)
        self.world.tell(f"node {new.index} takes over from {old.index}")
        cluster.fail_over(shard, new)
        await trio.sleep(rng.uniform(0.02, 0.3))
        cluster.down.discard(old.index)
        self.world.tell(f"node {old.index} is back")
        if is_stalled:
            old.go_on()
        else:
            cluster.restart(old)

    async def _stall(self) -> None:
        node = self.rng.choice(self.cluster.nodes)
        if node.is_stalled or not node.is_up:
            return
        self.cluster.counts["stalls"] += 1
        seconds = self.rng.choice((0.01, 0.05, 0.3, 0.5)) * self.rng.uniform(0.5, 1.2)
        self.world.tell(f"node {node.index} stands still for {seconds:.3f}")
        node.stall()
        await trio.sleep(seconds)
        node.go_on()

    async def _break_connections(self) -> None:
        node: ServerNode = self.rng.choice(self.cluster.nodes)
        if node.is_up and not node.is_stalled:
            self.cluster.counts["resets"] += 1
            self.world.tell(f"the connections of node {node.index} break")
            node.kill_connections()

    async def _crash_proxy(self) -> None:
        running = [proxy for proxy in self.proxies if proxy.is_up]
        if not running:
            return
        proxy = self.rng.choice(running)
        self.world.tell(f"{proxy.name} dies")
        self.cluster.counts["proxy crashes"] = self.cluster.counts.get("proxy crashes", 0) + 1
        proxy.crash()
        await trio.sleep(self.rng.uniform(0.0, 0.1))
        await self._start_proxy()

    async def _cut_store(self) -> None:
        """A proxy cannot reach the store for a time."""
        running = [proxy for proxy in self.proxies if proxy.is_up]
        if not running:
            return
        proxy = self.rng.choice(running)
        self.world.tell(f"{proxy.name} cannot reach the store")
        proxy.store.is_down = True
        await trio.sleep(self.rng.choice((0.02, 0.1, 0.2)))
        proxy.store.is_down = not proxy.is_up

    async def _restart(self) -> None:
        """A primary dies, and is back before anybody takes over: with what it had saved lately, or with nothing."""
        cluster, rng = self.cluster, self.rng
        node = cluster.primary(rng.randrange(SHARDS))
        if not node.is_up or node.is_stalled or node.migrating or node.importing or cluster.is_moving:
            return
        cluster.save(node)
        await trio.sleep(rng.uniform(0.0, 0.15))
        if not node.is_up or node.is_stalled or cluster.primary(node.shard) is not node or cluster.is_moving:
            return
        if rng.random() < 0.2:
            node.saved = None
        self.world.tell(f"node {node.index} dies")
        cluster.is_moving = True  # nothing moves meanwhile
        node.crash()
        await trio.sleep(rng.uniform(0.002, 0.03))
        self.world.tell(
            f"node {node.index} is back with {'nothing' if node.saved is None else 'what it had saved'}"
        )
        cluster.restart(node)
        cluster.is_moving = False

    async def _delay(self) -> None:
        """What a proxy sends over one connection is held up on the way, as packets are that get lost."""
        await trio.lowlevel.checkpoint()
        sockets = [
            sock for proxy in self.proxies if proxy.is_up for sock in proxy.hub.sockets if sock.is_open
        ]
        if sockets:
            self.world.tell("a connection is held up")
            self.cluster.counts["delays"] = self.cluster.counts.get("delays", 0) + 1
            self.rng.choice(sockets).hold_up(self.rng.choice((0.05, 0.5, 0.8)))

    async def _lag(self) -> None:
        node = self.rng.choice(self.cluster.nodes)
        if not node.is_primary:
            node.catch_up()
            node.lag_seconds = self.rng.choice(LAGS_SECONDS)
        await trio.lowlevel.checkpoint()

    async def _settle(self) -> None:
        """Let all that is under way come to its end."""
        for node in self.cluster.nodes:
            node.go_on()
        await trio.sleep(0.1)


def run(
    seed: int,
    *,
    keeps_log: bool = False,
    plant: Callable[[], object] = nullcontext,
    history: type[History] = History,
) -> Outcome:
    """Play the history of one seed."""
    clock = SimClock()
    outcome = Outcome(seed)
    played: list[History] = []

    async def main() -> None:
        one = history(seed, clock, keeps_log=keeps_log)
        played.append(one)
        await one.play()

    with seeded(seed), simulated_sockets(), plant():  # type: ignore[attr-defined]
        try:
            trio.run(main, clock=clock.of_trio)
        except Exception as fault:
            outcome.broken = f"a task ended with {_place_of(fault)}"
    one = played[0]
    if one.judge.broken is not None:
        outcome.broken = str(one.judge.broken)
    outcome.counts, outcome.troubles = one.judge.counts, dict(one.cluster.counts)
    outcome.trace, outcome.seconds = one.world.trace, clock.time
    outcome.log = one.world.log or []
    return outcome


def _place_of(fault: BaseException) -> str:
    """The first error of a group, and where it was raised."""
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    if isinstance(fault, trio.TrioInternalError) and fault.__cause__ is not None:
        fault = fault.__cause__  # raised while the clock jumped, so by the network or what it called
    frames = traceback.extract_tb(fault.__traceback__)[-6:]
    return f"{fault!r} in " + " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
