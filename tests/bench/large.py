"""A cluster of 1,000 nodes beside one of 3: what each step costs the event loop.

    python -m tests.bench.large [--nodes 1000] [--rounds 50]

There is no network: the connections are stand-ins that take bytes and send none, so what is measured is the proxy's
own work. It is CPU time of this thread, so that other work on the machine counts little. Each step runs once a
round, on new objects, as they come from the cluster or from the store. A step with a mark passes when the median of
its rounds is within it; the worst round is shown beside it. Exits with 1 when a mark is missed.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TypeVar, cast

import trio
import trio.testing
from rich.console import Console
from rich.table import Table

from proxy.admin.endpoints import facts_of_view
from proxy.exchange.exchange import Exchange
from proxy.exchange.routes import KINDS, NodeRoutes
from proxy.frontend.client import ClientConnection
from proxy.frontend.server import Server
from proxy.frontend.subscriptions import CHANNEL, Subscriptions
from proxy.hub import Endpoint, Hub
from proxy.log import configure
from proxy.protocol.encode import command
from proxy.replicas.service import ReplicaOptions, Replicas
from proxy.settings import Settings
from proxy.store.records import pack_nodes, unpack_nodes
from proxy.topology.service import Topology
from proxy.upstream.connect import Dialer
from proxy.upstream.connection import NodeConnection, PushHandler
from proxy.upstream.load import NodeLoad
from proxy.upstream.nodes import Lane, Nodes
from proxy.upstream.private import PrivateConnections
from proxy.upstream.reply_slot import ReplySlot
from proxy.upstream.subscription_line import SubscriptionLine
from routing.cluster_nodes import LineCache, NodesParser, Report
from routing.command import lookup
from routing.discovery import Known, Merging, whom_to_ask, with_all_moved, with_moved
from routing.slot import SLOT_COUNT
from routing.topology import EMPTY_VIEW, Address, Node, Role, Shard, TopologyView, ranges
from tests.bench.proxies import positive
from tests.proxy.world import FakeTransport, idle_snapshots

SWAP_MARK_MILLISECONDS = 2.0
STRETCH_MARK_MILLISECONDS = 2.0  # the longest that one step may keep the loop from its sockets
STEP_MARK_MILLISECONDS = 1.0
DECISION_MARK_RATIO = (
    1.25  # of the many nodes' median to the few nodes'; equal work differs by the caches alone
)
RANGES_OF_A_PRIMARY = 4
ASKED = 16  # nodes that one round of discovery asks
SUBSCRIBED_CLIENTS = 100
OWED_OF_A_CONNECTION = 1
DECISIONS = 20_000
MOVED_SLOTS = 500
PIPELINE = 250  # as many as one pass takes of a client
FEW_NODES = 3

T = TypeVar("T")


# -- clusters


def view_of(primaries: int, replicas: int, seed: int = 1) -> TopologyView:
    """Shards with about RANGES_OF_A_PRIMARY slot ranges each; the first ``replicas`` primaries have a replica."""
    shuffled = random.Random(seed)
    pieces = primaries * RANGES_OF_A_PRIMARY
    cuts = [0, *sorted(shuffled.sample(range(1, SLOT_COUNT), pieces - 1)), SLOT_COUNT]
    order = [index % primaries for index in range(pieces)]
    shuffled.shuffle(order)
    owners: list[int] = []
    for index, (low, high) in zip(order, pairwise(cuts), strict=True):
        owners += [index] * (high - low)
    shards = tuple(
        Shard(
            node_of(index, config_epoch=index + 1),
            (node_of(primaries + index, primary_id=node_of(index).id),) if index < replicas else (),
        )
        for index in range(primaries)
    )
    return TopologyView(1, primaries, shards, tuple(owners))


def node_of(index: int, *, primary_id: str | None = None, config_epoch: int = 0) -> Node:
    role = Role.PRIMARY if primary_id is None else Role.REPLICA
    return Node(
        f"{index:040x}", Address(f"10.0.{index >> 8}.{index & 255}", 6379), role, primary_id, config_epoch
    )


def again(view: TopologyView, before: TopologyView | None = None) -> TopologyView:
    """The same content in new objects, as a store gives it; the nodes are the same objects while they are as before."""
    is_same = before is not None and view.shards is before.shards
    return replace(
        view,
        revision=view.revision + 1,
        shards=view.shards if is_same else unpack_nodes(pack_nodes(view.shards)),
        shard_of_slot=(*view.shard_of_slot,),
    )


def with_failover(view: TopologyView) -> TopologyView:
    """The first shard's primary is replaced by a node that had no slots."""
    promoted = node_of(len(view.shards) * 2 + 5)
    return replace(view, shards=(Shard(promoted, view.shards[0].replicas), *view.shards[1:]))


def with_node_added(view: TopologyView) -> TopologyView:
    """A primary joins in the midst of the order of ids, and takes one slot of each of 16 others."""
    place = len(view.shards) // 2
    joined = Shard(replace(node_of(len(view.shards) * 2 + 6), id=view.shards[place].primary.id + "+"))
    owners = [owner + (owner >= place) for owner in view.shard_of_slot]
    owners[:: SLOT_COUNT // 16] = [place] * 16
    return replace(
        view, shards=(*view.shards[:place], joined, *view.shards[place:]), shard_of_slot=tuple(owners)
    )


def with_other_map(view: TopologyView) -> TopologyView:
    """The same shards, each slot elsewhere."""
    return replace(view, shard_of_slot=tuple((owner + 1) % len(view.shards) for owner in view.shard_of_slot))


def with_slot_moved(view: TopologyView) -> TopologyView:
    target = view.shards[(view.shard_of_slot[77] + 1) % len(view.shards)].primary.address
    return with_moved(view, 77, target)


def with_slots_moved(view: TopologyView) -> TopologyView:
    """A failover as MOVED replies tell it."""
    return with_all_moved(view, dict.fromkeys(range(MOVED_SLOTS), view.shards[-1].primary.address))


CHANGES: dict[str, Callable[[TopologyView], TopologyView]] = {
    "one slot moved": with_slot_moved,
    "a failover": with_failover,
    "a node added": with_node_added,
    "a different map": with_other_map,
}


def nodes_text(view: TopologyView, myself: Node, now: int) -> str:
    """CLUSTER NODES as ``myself`` answers it; ``now`` varies the times, which change from round to round."""
    owned: dict[int, list[int]] = {}
    for slot, owner in enumerate(view.shard_of_slot):
        owned.setdefault(owner, []).append(slot)
    lines = []
    for index, shard in enumerate(view.shards):
        for node in (shard.primary, *shard.replicas):
            flags = "master" if node.role is Role.PRIMARY else "slave"
            if node.id == myself.id:
                flags = f"myself,{flags}"
            parts = [
                node.id,
                f"{node.address}@16379,host-{node.id[-4:]}.example",
                flags,
                node.primary_id or "-",
                "0",
                str(1795340280000 + now * 1000 + hash((node.id, myself.id, now)) % 1000),
                str(shard.primary.config_epoch),
                "connected",
            ]
            if node.role is Role.PRIMARY:
                parts += [
                    f"{low}-{high}" if low < high else str(low) for low, high in ranges(owned.get(index, ()))
                ]
            lines.append(" ".join(parts))
    return "\n".join(lines) + "\n"


# -- a data plane without a network


class QuietHub(Hub):
    """Watches nothing."""

    def add(self, endpoint: Endpoint) -> None:
        pass

    def remove(self, endpoint: Endpoint) -> None:
        pass


class QuietSocket:
    def close(self) -> None:
        pass


@dataclass(frozen=True)
class QuietDialer(Dialer):
    """Connects at once, to nothing."""

    async def open(
        self,
        address: Address,
        *,
        resp: int = 2,
        on_closed: Callable[[NodeConnection, str], None] = lambda connection, reason: None,
        on_ready: Callable[[], None] = lambda: None,
        on_push: PushHandler | None = None,
        load: NodeLoad | None = None,
    ) -> NodeConnection:
        await trio.lowlevel.checkpoint()
        return NodeConnection(
            self.hub,
            cast("trio.socket.socket", QuietSocket()),  # type: ignore[name-defined]
            address,
            unsent_bytes_max=self.unsent_bytes_max,
            on_closed=on_closed,
            on_ready=on_ready,
            on_push=on_push,
            load=load,
        )


class Plane:
    """The data plane of one proxy: both RESP versions in use, both lanes connected to every primary."""

    def __init__(self, nursery: trio.Nursery, view: TopologyView) -> None:
        self.hub = QuietHub()
        dialer = QuietDialer(self.hub, "", "", 1.0, 1 << 26)
        self.topology = Topology()
        self.nodes = Nodes(dialer, nursery, 5.0)
        self.replica_nodes = Nodes(dialer, nursery, 5.0, lanes=(Lane.READ,))
        self.replicas = Replicas(self.replica_nodes, self.topology, ReplicaOptions())
        private = PrivateConnections(dialer, 100)
        self.exchange = Exchange(
            self.hub,
            self.nodes,
            self.topology,
            private,
            self.replicas,
            idle_snapshots(self.topology, self.nodes, private),
            nursery,
            request_deadline_seconds=5.0,
            script_cache_bytes_max=1 << 20,
        )
        self.exchange.routes.use(3)
        self.server = Server(Settings(), self.topology)
        nursery.start_soon(self.server.pacing.run)
        self.client = self.new_client()
        self.topology.adopt(view, trio.current_time())

    def new_client(self) -> ClientConnection:
        client = ClientConnection(self.server, self.exchange, FakeTransport(), "peer", "local")
        self.server.add(client)
        return client

    async def connect(self) -> None:
        """Let the keepers connect to every primary and leave all others."""
        await trio.testing.wait_all_tasks_blocked()
        for routes in self.exchange.routes.of_slot:
            assert all(route.ready for route in routes), "the stand-ins never became connected"

    def subscribe_clients(self) -> None:
        """Clients with a line each, as SUBSCRIBE leaves them; none to the primary that fails."""
        primaries = [shard.primary.address for shard in self.topology.view.shards[1:]]
        for number in range(SUBSCRIBED_CLIENTS):
            subscriptions = Subscriptions(self.new_client())
            address = primaries[number % len(primaries)]
            line = SubscriptionLine(address, lambda line, push: None, lambda line, reason: None)
            subscriptions._lines[address] = line
            subscriptions.channels.add(b"news")
            subscriptions._set_carrier((CHANNEL, b"news"), line)

    def owe(self) -> None:
        """Each connection of the write lane owes replies to a client that is held already."""
        command_ = lookup([b"GET", b"k"])
        assert command_ is not None
        client = self.new_client()
        client._draining = True
        for slot, routes in enumerate(self.exchange.routes.of_slot):
            route = routes[KINDS[2][Lane.WRITE]]
            assert isinstance(route, NodeConnection)
            if len(route.owed) < OWED_OF_A_CONNECTION:
                route.owed.append(ReplySlot(client, command_, b"", slot))

    def forget_requests(self) -> None:
        """Drop what was queued, sent or not."""
        self.hub.dirty.clear()
        self.client.slots.clear()
        self.client.dirty = False
        for connection in self.nodes.connections():
            connection.out.clear()
            connection.owed.clear()
            connection.dirty = False


@asynccontextmanager
async def plane_of(view: TopologyView) -> AsyncIterator[Plane]:
    async with trio.open_nursery() as nursery:
        plane = Plane(nursery, view)
        await plane.connect()
        try:
            yield plane
        finally:
            nursery.cancel_scope.cancel()
            plane.hub.close()


# -- measuring


@dataclass(frozen=True, slots=True)
class Row:
    """One step's rounds. ``mark`` is in the unit of the samples; None: shown only."""

    name: str
    samples: tuple[float, ...]
    unit: str = "ms"
    mark: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def passes(self) -> bool:
        return self.mark is None or self.median <= self.mark


def milliseconds(step: Callable[[], T]) -> tuple[float, T]:
    """The CPU time that ``step`` takes, and its result."""
    began = time.thread_time()
    result = step()
    return (time.thread_time() - began) * 1e3, result


async def swaps(view: TopologyView, rounds: int) -> dict[str, list[float]]:
    """Kind of change -> milliseconds of each round's swap to the changed view, which is then taken back."""
    found: dict[str, list[float]] = {kind: [] for kind in CHANGES}
    async with plane_of(view) as plane:
        plane.subscribe_clients()
        gc.collect()
        gc.freeze()
        for _ in range(rounds):
            for kind, change in CHANGES.items():
                plane.owe()
                changed = again(change(plane.topology.view), plane.topology.view)
                found[kind].append(
                    milliseconds(partial(plane.topology.adopt, changed, trio.current_time()))[0]
                )
                assert plane.topology.view.shard_of_slot is changed.shard_of_slot
                plane.forget_requests()
                await plane.connect()
                plane.topology.adopt(again(view), trio.current_time())
                await plane.connect()
        gc.unfreeze()
    return found


async def decisions(view: TopologyView, few: TopologyView, rounds: int) -> Iterator[Row]:
    """The look-up that each request costs, and the whole way of plain requests to their connections' queues."""
    hash_slots = [random.Random(3).randrange(SLOT_COUNT) for _ in range(DECISIONS)]
    pipeline = b"".join(command("GET", f"key-{number}") for number in range(PIPELINE))
    look: tuple[list[float], list[float]] = ([], [])
    queue: tuple[list[float], list[float]] = ([], [])
    async with plane_of(view) as many, plane_of(few) as small:
        for _ in range(rounds):
            for which, plane in enumerate((many, small)):
                routes = plane.exchange.routes.of_slot
                look[which].append(milliseconds(partial(_look_up, routes, hash_slots))[0] * 1e6 / DECISIONS)
                plane.hub._in_turn = True
                queue[which].append(milliseconds(partial(plane.client.receive, pipeline))[0] * 1e3 / PIPELINE)
                assert len(plane.client.slots) == PIPELINE
                plane.forget_requests()
                plane.hub._in_turn = False
    many_name, few_name = f"{len(list(view.nodes()))} nodes", f"{len(few.shards)} nodes"
    ratio = tuple(a / b for a, b in zip(*look, strict=True))
    return iter(
        [
            Row(f"routing decision, {many_name}", tuple(look[0]), "ns"),
            Row(f"routing decision, {few_name}", tuple(look[1]), "ns"),
            Row("routing decision, ratio", ratio, "", DECISION_MARK_RATIO),
            Row(f"a GET parsed and queued, {many_name}", tuple(queue[0]), "us"),
            Row(f"a GET parsed and queued, {few_name}", tuple(queue[1]), "us"),
        ]
    )


def _look_up(routes_of_slot: Sequence[NodeRoutes], hash_slots: Sequence[int]) -> None:
    kind = KINDS[2][Lane.READ]
    for hash_slot in hash_slots:
        route = routes_of_slot[hash_slot][kind]
        if not route.ready:
            raise AssertionError(f"slot {hash_slot} has no route")


def discovery(view: TopologyView, rounds: int) -> Iterator[Row]:
    """What rounds of discovery cost when nothing changes but the times that nodes tell."""
    known = Known(EMPTY_VIEW, (0,) * SLOT_COUNT)
    cache = LineCache()
    nodes = {node.address: node for node in view.nodes()}
    reading: list[list[float]] = []
    merging: list[list[float]] = []
    for number in range(rounds):
        if number % 2:
            view = with_newer_claim(view)
        reports = []
        for address in whom_to_ask(view, number, ASKED):
            parser = NodesParser(nodes_text(view, nodes[address], number), address, cache)
            reading.append(_stepwise(parser.step))
            reports.append(Report(*parser.result(), view.epoch, True))
        parts = Merging(reports)
        took = _stepwise(parts.step)
        before = known.view
        finishing, known = milliseconds(partial(parts.finish, known, {}))
        assert (known.view is not before) == (number == 0 or number % 2 == 1)
        merging.append([*took, finishing])
    for name, rounds_of_steps, mark in (
        ("read one report", reading, STEP_MARK_MILLISECONDS),
        (f"merge {ASKED} reports", merging, STRETCH_MARK_MILLISECONDS),
    ):
        yield Row(name, tuple(map(sum, rounds_of_steps)))
        yield Row(f"{name}: its longest step", tuple(map(max, rounds_of_steps)), mark=mark)


def _stepwise(step: Callable[[], bool]) -> list[float]:
    """Milliseconds of each step until none is left."""
    found = []
    is_left = True
    while is_left:
        took, is_left = milliseconds(step)
        found.append(took)
    return found


def with_newer_claim(view: TopologyView) -> TopologyView:
    """One slot's next owner has taken it over with a new epoch."""
    moved = with_slot_moved(view)
    index = moved.shard_of_slot[77]
    taker = moved.shards[index]
    primary = replace(
        taker.primary, config_epoch=1 + max(shard.primary.config_epoch for shard in view.shards)
    )
    shards = (*moved.shards[:index], replace(taker, primary=primary), *moved.shards[index + 1 :])
    return replace(moved, shards=shards)


def questions(view: TopologyView, rounds: int) -> Iterator[Row]:
    """What is asked of a view that came new."""
    steps: dict[str, Callable[[TopologyView], object]] = {
        "compare equal views": lambda new: new == view,
        "facts for the admin port": lambda new: facts_of_view(new, None),
        "learn of one moved slot": with_slot_moved,
        f"learn of {MOVED_SLOTS} moved slots": with_slots_moved,
    }
    for name, step in steps.items():
        views = [replace(again(view), revision=view.revision) for _ in range(rounds)]
        yield Row(name, tuple(milliseconds(partial(step, new))[0] for new in views))


def _reference() -> int:
    return sum(number * number for number in range(10_000))


async def measure(nodes: int, rounds: int) -> list[Row]:
    halves, whole, few = view_of(nodes // 2, nodes // 2), view_of(nodes, 0), view_of(FEW_NODES, 0)
    rows = [Row("reference: sum 10,000 squares", tuple(milliseconds(_reference)[0] for _ in range(rounds)))]
    for name, view in ((f"{nodes // 2} + {nodes // 2}", halves), (f"{nodes} + 0", whole)):
        for kind, samples in (await swaps(view, rounds)).items():
            rows.append(Row(f"swap, {name}: {kind}", tuple(samples), mark=SWAP_MARK_MILLISECONDS))
    rows += await decisions(whole, few, rounds)
    rows += discovery(halves, rounds)
    rows += questions(halves, rounds)
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="CPU time in the event loop")
    table.add_column("step", no_wrap=True)
    for heading in ("", "fastest", "median", "worst", "mark", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            row.unit,
            f"{min(row.samples):.2f}",
            f"{row.median:.2f}",
            f"{max(row.samples):.2f}",
            "" if row.mark is None else f"{row.mark:g}",
            "" if row.mark is None else "PASS" if row.passes else "FAIL",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.large",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=positive, default=1000)
    parser.add_argument("--rounds", type=positive, default=50)
    options = parser.parse_args()
    configure("info", stream=open(os.devnull, "w"))  # noqa: SIM115  # logging costs what it costs
    rows = trio.run(measure, options.nodes, options.rounds)
    show(rows, Console())
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
