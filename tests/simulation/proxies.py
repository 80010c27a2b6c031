"""One real proxy in the simulated world, wired as ``proxy.app`` wires it, and its clients.

All wiring of the simulation is here. What is left out of the tree: admin, hooks, listeners, reload, and the files.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import trio

from proxy.cache.memory import SnapshotCache
from proxy.exchange.exchange import Exchange
from proxy.frontend.client import ClientConnection
from proxy.frontend.server import Server
from proxy.protocol.encode import frame
from proxy.protocol.replies import end_of_reply
from proxy.replicas.service import ReplicaOptions, Replicas
from proxy.settings import CacheSettings, Settings
from proxy.snapshots.links import Links
from proxy.snapshots.service import Snapshots
from proxy.topology.discovery import Discovery
from proxy.topology.keeper import Keeper
from proxy.topology.service import Topology
from proxy.upstream.abandoned import Abandoned
from proxy.upstream.load import Loads, OverloadRules
from proxy.upstream.nodes import Lane, Nodes
from proxy.upstream.private import PrivateConnections
from routing.admission import AdmissionRules
from routing.limit import LimitRules
from routing.slot import SLOT_COUNT, slot_of
from routing.timeline import TimelineLimits
from routing.topology import UNOWNED, Migration, MigrationKind, Node, Role, Shard, TopologyView
from tests.simulation.cluster import Belief, Claim, Cluster
from tests.simulation.stores import StoreLink
from tests.simulation.workload import TAGS
from tests.simulation.world import Pipe, SimDialer, SimHub, World

CONNECT_TIMEOUT_SECONDS = 0.3
CACHE_BYTES = 1 << 20
# In some seeds few requests go to a node at once, so that many wait for a permit and some are shed. They wait for short
# times, as histories are short.
TIGHT = OverloadRules(
    LimitRules(floor=1, ceiling=3, first=2), AdmissionRules(wait_seconds=(1.0, 0.02, 0.005), waiting_max=3)
)
RECOVER_SECONDS = 0.2
LOOK_SECONDS = 0.1  # between two looks of the light observer
FILLERS = 4  # slots of each shard, beside those that are used, in the light observer's view
LOOK_AGAIN_SECONDS = 0.01  # between two looks, however much one is wanted
ANSWER_SECONDS = 0.002  # that half a look takes at the most


class SimProxy:
    """A proxy process. ``run`` serves until ``crash``."""

    def __init__(
        self,
        world: World,
        name: str,
        store: StoreLink,
        settings: Settings,
        *,
        with_keeper: bool,
        asks_markers: bool,
    ) -> None:
        """``asks_markers``: also while it alone writes, as one of several does."""
        self.world = world
        self.name = name
        self.store = store
        self.settings = settings
        self.is_up = False
        self.hub = SimHub(world)
        self._with_keeper = with_keeper
        self._asks_markers = asks_markers
        self._scope = trio.CancelScope()
        self._clients: list[SimClient] = []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """As ``Proxy.run``. Served when the first view is there and all primaries are connected."""
        world, settings = self.world, self.settings
        deadline_seconds = settings.cluster.request_deadline_seconds
        abandoned = Abandoned()
        dialer = SimDialer(
            self.hub,
            "",
            "",
            CONNECT_TIMEOUT_SECONDS,
            1 << 26,
            proxy_id=self.name,
            abandoned=abandoned,
            world=world,
            name=self.name,
        )
        self.topology = Topology()
        self.private = PrivateConnections(dialer, 100)
        self.server = Server(settings, self.topology)
        keeper: Keeper | None = None
        if self._with_keeper:
            seeds = [node.address for node in world.cluster.nodes[: world.cluster.shard_count]]
            keeper = Keeper(
                self.topology,
                Discovery(dialer, seeds),
                self.store,
                self.name,
                refresh_seconds=settings.cluster.refresh_interval_seconds,
                limits=TimelineLimits(),
                clock=world.unix_seconds,
            )
        with self._scope:
            async with trio.open_nursery() as nursery:
                loads = Loads(TIGHT if world.seed % 7 in (3, 4) else None)
                self.nodes = Nodes(dialer, nursery, deadline_seconds, loads=loads)
                nursery.start_soon(self.nodes.loads.run)
                nursery.start_soon(self.server.pacing.run)
                replica_nodes = Nodes(
                    replace(dialer, is_readonly=True), nursery, deadline_seconds, lanes=(Lane.READ,)
                )
                self.replicas = Replicas(replica_nodes, self.topology, ReplicaOptions(settle_seconds=5.0))
                # Reads at replicas are not simulated here, and their tables would cost more than all else of a view.
                self.topology.unsubscribe(self.replicas._on_view)
                self.snapshots = Snapshots(
                    settings.snapshots,
                    self.topology,
                    Links(self.nodes, self.private),
                    self.store,
                    abandoned,
                    self.name,
                    now=world.unix_seconds,
                )
                if self._asks_markers:
                    self.snapshots.own_writes.begin = lambda snapshot_id: None  # type: ignore[method-assign]
                self.cache = SnapshotCache(CacheSettings(bytes_max=CACHE_BYTES))
                if world.seed % 3:  # few keys are read three times
                    self.cache.is_read_again = lambda key: True  # type: ignore[method-assign]
                self.exchange = Exchange(
                    self.hub,
                    self.nodes,
                    self.topology,
                    self.private,
                    self.replicas,
                    self.snapshots,
                    nursery,
                    request_deadline_seconds=deadline_seconds,
                    script_cache_bytes_max=1 << 20,
                    cache=self.cache,
                )
                nursery.start_soon(self.nodes.watch)
                nursery.start_soon(self.cache.run)
                nursery.start_soon(keeper.run if keeper is not None else self._observe)
                await self.snapshots.recover(RECOVER_SECONDS)
                nursery.start_soon(self.snapshots.run)
                await self._first_view()
                self.is_up = True
                task_status.started()
                await trio.sleep_forever()

    def crash(self) -> None:
        """As by SIGKILL: no task does anything any more, and the kernel closes the sockets."""
        self.is_up = False
        self.store.is_down = True
        self.hub.die()
        for client in list(self._clients):
            client.lose()
        self._scope.cancel()

    async def _first_view(self) -> None:
        while not self.topology.view.shards:
            await self.topology.wait_change()
        while any(
            self.nodes.connection(shard.primary.address, 2, lane) is None
            for shard in self.topology.view.shards
            for lane in Lane
        ):
            await self.nodes.wait_change()

    # -- the light observer, at a fraction of the keeper's cost

    async def _observe(self) -> None:
        """What discovery would find: the newest claims of the nodes that answer, as they were some time ago."""
        world, topology = self.world, self.topology
        seen: Map | None = None
        while True:
            topology.take_wanted()
            began = trio.current_time()
            await trio.sleep(world.rng.uniform(0.0, ANSWER_SECONDS))
            found = map_of(world.cluster)
            await trio.sleep(world.rng.uniform(0.0, ANSWER_SECONDS))
            if found != seen or topology.moved_since(began):
                seen = found
                topology.adopt(view_of(world.cluster, found), began)
            topology.looked_at = max(topology.looked_at, began)
            with trio.move_on_after(LOOK_SECONDS):
                await topology.wanted.wait()
            await trio.sleep(LOOK_AGAIN_SECONDS)


@dataclass(frozen=True)
class Map:
    """What the nodes that answer claim, the newest of each."""

    primaries: tuple[tuple[int, int], ...]  # shard -> epoch, node
    slots: tuple[tuple[int, int, int], ...]  # slot, epoch, shard
    moving: tuple[Migration, ...]


def map_of(cluster: Cluster) -> Map:
    best = Belief([Claim(0, which) for which in range(cluster.shard_count)])
    answering = [node for node in cluster.nodes if node.is_up and not node.is_stalled]
    for node in answering:
        for shard, claim in enumerate(node.belief.primary_of):
            best.adopt_primary(shard, claim)
        for slot, claim in node.belief.shard_of.items():
            best.adopt_slot(slot, claim)
    migrations: dict[tuple[int, int], list[int]] = {}
    for node in answering:
        for slot, target in node.migrating.items():
            if best.owner(slot) == node.index:
                migrations.setdefault((node.index, target), []).append(slot)
    ids = [node.id for node in cluster.nodes]
    return Map(
        tuple([(claim.epoch, claim.who) for claim in best.primary_of]),
        tuple(sorted([(slot, claim.epoch, claim.who) for slot, claim in best.shard_of.items()])),
        tuple(
            [
                Migration(tuple(sorted(slots)), ids[source], ids[target], MigrationKind.STEPWISE)
                for (source, target), slots in sorted(migrations.items())
            ]
        ),
    )


def view_of(cluster: Cluster, found: Map) -> TopologyView:
    shards = []
    for shard, (epoch, who) in enumerate(found.primaries):
        primary = cluster.nodes[who]
        replicas = [
            Node(other.id, other.address, Role.REPLICA, primary.id, epoch)
            for other in cluster.nodes
            if other.shard == shard and other is not primary
        ]
        # Who takes a slot over takes a new epoch, too.
        taken = [slot_epoch for _, slot_epoch, owner in found.slots if owner == shard]
        node = Node(primary.id, primary.address, Role.PRIMARY, config_epoch=max([epoch, *taken]))
        shards.append(Shard(node, tuple(replicas)))
    owners = list(_even(len(shards)))
    for slot, _, shard in found.slots:
        owners[slot] = shard
    epochs = [epoch for epoch, _ in found.primaries] + [epoch for _, epoch, _ in found.slots]
    return TopologyView(0, max(epochs), tuple(shards), tuple(owners), found.moving)


@cache
def _even(shards: int) -> tuple[int, ...]:
    """slot -> shard of the even split, of the slots that histories use and a few more: more would cost too much."""
    used = {slot_of(tag) for tag in TAGS}
    used |= {-(-shard * SLOT_COUNT // shards) + more for shard in range(shards) for more in range(FILLERS)}
    return tuple([slot * shards // SLOT_COUNT if slot in used else UNOWNED for slot in range(SLOT_COUNT)])


class SimTransport:
    """What the proxy writes to a client. Every message is taken at once, and arrives later."""

    def __init__(self, client: SimClient) -> None:
        self.unsent_bytes = 0
        self._client = client
        self._pipe = Pipe(client.world, client.on_data)

    def write(self, data: bytes) -> None:
        self._pipe.send(data)

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def close(self) -> None:
        self._pipe.send(None)


class SimClient:
    """One client of one proxy: sends requests, and takes the replies in their order."""

    def __init__(self, proxy: SimProxy) -> None:
        self.world = proxy.world
        self.proxy = proxy
        self.is_lost = False
        self._received = b""
        self.unanswered: deque[Sequence[bytes]] = deque()
        self._waiting: deque[Callable[[bytes | None], None]] = deque()
        self._to_proxy = Pipe(proxy.world, self._reached)
        self.connection = ClientConnection(proxy.server, proxy.exchange, SimTransport(self), "peer", "local")
        proxy.server.add(self.connection)
        proxy._clients.append(self)

    def start(self, words: Sequence[bytes], on_reply: Callable[[bytes | None], None]) -> None:
        """Send; ``on_reply`` gets the reply, or None when the connection ended before."""
        if self.is_lost:
            on_reply(None)
            return
        self._waiting.append(on_reply)
        self.unanswered.append(words)
        self._to_proxy.send(frame(words))

    async def call(self, *words: bytes) -> bytes | None:
        """The reply; None when the connection ended before it came."""
        replies: list[bytes | None] = []
        done = trio.Event()

        def on_reply(reply: bytes | None) -> None:
            replies.append(reply)
            done.set()

        self.start(words, on_reply)
        await done.wait()
        return replies[0]

    def on_data(self, data: bytes | None) -> None:
        if self.is_lost:
            return
        if data is None:
            self.lose()
            return
        self.world.note("client", data)
        self._received += data
        while self._received and (end := end_of_reply(self._received)) >= 0:
            reply, self._received = self._received[:end], self._received[end:]
            self.unanswered.popleft()
            self._waiting.popleft()(reply)

    def lose(self) -> None:
        """The connection is gone."""
        if self.is_lost:
            return
        self.is_lost = True
        with contextlib.suppress(ValueError):
            self.proxy._clients.remove(self)
        while self._waiting:
            self._waiting.popleft()(None)

    def close(self) -> None:
        """The client leaves."""
        if not self.is_lost:
            self._to_proxy.send(None)
            self.lose()

    def _reached(self, data: bytes | None) -> None:
        if not self.proxy.is_up or self.connection.is_closed:
            return
        if data is None:
            self.proxy.hub.in_turn(self.connection.on_end)
        else:
            self.proxy.hub.in_turn(lambda: self.connection.receive(data))
