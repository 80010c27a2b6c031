"""A real cluster on loopback for the length of a block.

`running_cluster` owns the servers, their directory and the guard that ends them if this process dies.
`Cluster` is the handle: call a node, kill, freeze, continue and restart nodes, wait until all agree. It
writes nothing to disk that outlives a restart of a node but the node's own cluster map: the servers save no
data.

The servers are one cluster from their start: each finds its cluster map written beside its configuration, as it
would after a restart. Servers that meet instead wait for gossip, which takes seconds longer.
"""

from __future__ import annotations

import errno
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from proxy.embedded.connection import Argument, Connection, ConnectionLost, ServerError, connected
from proxy.embedded.engine import Engine
from proxy.embedded.guard import Guard, signal_group, wait_ended
from proxy.embedded.nodemap import NodeMap, parse_nodes
from routing.slot import SLOT_COUNT
from routing.topology import Address

HOST = "127.0.0.1"
BUS_PORT_OFFSET = 10_000  # the engines' fixed distance; Redis 6.2 cannot be told another bus port
PORT_MAX = 65_535 - BUS_PORT_OFFSET
NODE_TIMEOUT_MS = 5_000  # a busy machine makes shorter ones fail over by themselves

# Free ports are sought where neither they nor their bus ports are ones that Linux gives to outgoing
# connections.
_FREE_PORTS = range(10_100, 32_768 - BUS_PORT_OFFSET)
_POLL_SECONDS = 0.02
_SETTLE_SECONDS = 60.0  # until a new cluster serves takes 2, agreeing on a moved slot about 1
_MAP_FILE = "nodes.conf"
_NODE_ID_BYTES = 20  # in hex 40 digits; of shard ids too
_REAP_SECONDS = 10.0  # SIGKILL needs milliseconds; longer means a kernel in trouble


class ClusterError(Exception):
    """The cluster could not be started or does not settle; the message says why."""


@dataclass(slots=True, eq=False)
class Node:
    """One server. ``primary`` is what it was formed with; after a failover ask the cluster, not this."""

    address: Address
    directory: Path
    primary: Node | None = None  # None: formed as a primary
    id: str = ""  # 40 hex digits; "" in a cluster that was found
    process: subprocess.Popen[bytes] | None = None  # None: not running, or detached
    is_frozen: bool = False  # by SIGSTOP

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def __str__(self) -> str:
        return str(self.address)


@dataclass(slots=True)
class Cluster:
    """Nodes, primaries first, and what can be done to them."""

    engine: Engine
    directory: Path
    nodes: tuple[Node, ...]
    extra: tuple[str, ...] = ()  # further words of each server's command line
    guard: Guard | None = field(default=None, repr=False)

    @property
    def primaries(self) -> tuple[Node, ...]:
        """The nodes that were formed as primaries."""
        return tuple(node for node in self.nodes if node.primary is None)

    @property
    def replicas(self) -> tuple[Node, ...]:
        """The nodes that were formed as replicas."""
        return tuple(node for node in self.nodes if node.primary is not None)

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(node.address for node in self.nodes)

    def node_at(self, address: Address) -> Node:
        """Raises LookupError when no node of the cluster listens there."""
        for node in self.nodes:
            if node.address == address:
                return node
        raise LookupError(f"no node of this cluster listens at {address}")

    async def call(self, address: Address | Node, *parts: Argument) -> Any:
        """One command on a connection of its own. Raises ServerError and ConnectionLost."""
        async with self.connection(address) as connection:
            return await connection.call(*parts)

    def connection(self, address: Address | Node) -> AbstractAsyncContextManager[Connection]:
        """A connection for the length of an ``async with`` block."""
        return connected(address.address if isinstance(address, Node) else address)

    async def map_at(self, address: Address | Node) -> NodeMap:
        """The whole cluster as this node sees it. Raises ConnectionLost."""
        return parse_nodes(await self.call(address, "CLUSTER", "NODES"))

    async def kill(self, node: Node) -> None:
        """SIGKILL, and wait until it is gone. Its replica takes over after the node timeout."""
        process = _running(node)
        signal_group(process, signal.SIGKILL)
        await wait_ended(process)
        self._forget(node)

    def stop_process(self, node: Node) -> None:
        """SIGSTOP: the node is silent but its connections stay."""
        signal_group(_running(node), signal.SIGSTOP)
        node.is_frozen = True

    def cont(self, node: Node) -> None:
        """SIGCONT."""
        signal_group(_running(node), signal.SIGCONT)
        node.is_frozen = False

    async def restart(self, node: Node) -> None:
        """Start a node that was killed, and wait until it answers; it knows its cluster but has no data."""
        if node.process is not None:
            raise ClusterError(f"{node} runs already")
        self._spawn(node)
        await wait_answering(node)

    async def wait_same_map(self) -> None:
        """Return once every running node, replicas too, shows the same map, and no slot is on the move.

        The map is which slots each node has and whose replica it is. Raises ClusterError after 60 s.
        """
        with _deadline("the nodes do not agree on the map") as say:
            while True:
                maps = await self._maps()
                if maps and all(map_.is_settled for map_ in maps) and len({m.agreement for m in maps}) == 1:
                    return
                say(f"{len({m.agreement for m in maps})} maps, settled: {[m.is_settled for m in maps]}")
                await trio.sleep(_POLL_SECONDS)

    async def wait_serving(self) -> None:
        """Return once every running node shows the same map and serves it, and every replica's link is up.

        After a kill that is so until the others notice: wait for the replica's promotion first.
        Raises ClusterError after 60 s.
        """
        await self.wait_same_map()
        with _deadline("the cluster does not serve") as say:
            for node in self._running_nodes():
                while missing := await missing_to_serve(node):
                    say(f"{node}: {missing}")
                    await trio.sleep(_POLL_SECONDS)

    async def wait_replicas_listed(self, primaries: Iterable[Address]) -> None:
        """Return once the first node's CLUSTER SLOTS lists every replica of these primaries.

        From Redis 7.0 on a replica is left out until gossip tells of an offset above 0, so its shard must
        have been written to; until then clients that learn of replicas there read at primaries.
        Raises ClusterError after 60 s.
        """
        with _deadline("CLUSTER SLOTS lists not every replica") as say:
            for primary in primaries:
                wanted = sum(node.primary is self.node_at(primary) for node in self.nodes)
                while (listed := await self._replicas_listed(primary)) < wanted:
                    say(f"{listed} of {wanted} of {primary}")
                    await trio.sleep(_POLL_SECONDS)

    async def _replicas_listed(self, primary: Address) -> int:
        for _, _, first, *replicas in await self.call(self.nodes[0], "CLUSTER", "SLOTS"):
            if (first[0].decode(), first[1]) == primary:
                return len(replicas)
        return 0

    async def _maps(self) -> list[NodeMap]:
        return [await self.map_at(node) for node in self._running_nodes()]

    def _running_nodes(self) -> tuple[Node, ...]:
        if self.guard is None:
            return self.nodes  # detached: all are expected to run
        return tuple(node for node in self.nodes if node.process is not None and not node.is_frozen)

    def _spawn(self, node: Node) -> None:
        """No await until the guard knows the process."""
        if self.guard is None:
            raise ClusterError("a detached cluster's nodes are started together")
        command = [*self.engine.server, "node.conf", *self.extra]
        node.process = self.guard.spawn(command, node.directory, node.log)

    def _forget(self, node: Node) -> None:
        assert self.guard is not None
        assert node.process is not None
        self.guard.forget(node.process)
        node.process = None
        node.is_frozen = False

    async def _end(self) -> None:
        """Kill and reap every server."""
        for node in self.nodes:
            if node.process is not None:
                signal_group(node.process, signal.SIGKILL)
        for node in self.nodes:
            if node.process is not None:
                await self.kill(node)


@asynccontextmanager
async def running_cluster(
    engine: Engine,
    primaries: int = 3,
    replicas: int = 1,
    directory: Path | None = None,
    base_port: int | None = None,
    node_timeout_ms: int = NODE_TIMEOUT_MS,
    extra: Sequence[str] = (),
) -> AsyncIterator[Cluster]:
    """A cluster of ``primaries`` with ``replicas`` each that serves; gone at the end of the block.

    ``directory`` None means a temporary one that is removed; ``base_port`` None means free ports, else the
    nodes take base_port, base_port + 1, ... ``extra`` are further words of each server's command line.
    Nothing is left running after an exception, a cancellation, or the death of this process by any signal.
    Raises ClusterError when the servers do not start or do not form a cluster.
    """
    with held_ports(primaries * (1 + replicas), base_port) as ports:
        where = Path(tempfile.mkdtemp(prefix="steadyread-")) if directory is None else directory
        guard = Guard(remove=where if directory is None else None)
        try:
            cluster = lay_out(engine, ports, primaries, where, node_timeout_ms, extra)
            cluster.guard = guard
            try:
                for node in cluster.nodes:
                    cluster._spawn(node)
                await wait_formed(cluster)
                yield cluster
            finally:
                with trio.move_on_after(_REAP_SECONDS) as reaping:
                    reaping.shield = True
                    await cluster._end()
        finally:
            guard.close()


def choose_ports(count: int, base_port: int | None = None) -> list[int]:
    """Ports on which servers and their cluster bus can listen now. Raises ClusterError naming a busy one."""
    if base_port is not None:
        if not 0 < base_port <= PORT_MAX - count + 1:
            raise ClusterError(
                f"ports {base_port} to {base_port + count - 1} do not fit: the cluster bus listens"
                f" {BUS_PORT_OFFSET} higher, so the highest port can be {PORT_MAX}"
            )
        ports = list(range(base_port, base_port + count))
        for port in ports:
            for needed in (port, port + BUS_PORT_OFFSET):
                if not _is_free(needed):
                    use = "a node" if needed == port else f"the cluster bus of port {port}"
                    raise ClusterError(
                        f"port {needed}, needed for {use}, is in use; choose another base port"
                    )
        return ports
    with held_ports(count) as ports:
        return ports


@contextmanager
def held_ports(count: int, base_port: int | None = None) -> Iterator[list[int]]:
    """``choose_ports``; of free ones, those that no other cluster of ours takes before the end of the block.

    That nothing listens is not enough: another may look at the same moment, or while a killed node's port is not
    in use. So a port and its bus port have a name each in the abstract namespace of Unix sockets, which one
    process can have, and which ends with it.
    """
    if base_port is not None:
        yield choose_ports(count, base_port)
        return
    with ExitStack() as holds:
        held: list[int] = []
        for port in random.sample(_FREE_PORTS, k=len(_FREE_PORTS)):
            with ExitStack() as hold:
                if all(_hold(needed, hold) and _is_free(needed) for needed in (port, port + BUS_PORT_OFFSET)):
                    holds.enter_context(hold.pop_all())
                    held.append(port)
            if len(held) == count:
                break
        else:
            raise ClusterError(f"found only {len(held)} free ports of {count}")
        yield held


def _hold(port: int, hold: ExitStack) -> bool:
    """Take the port's name until ``hold`` ends. False when another has it."""
    name = hold.enter_context(socket.socket(socket.AF_UNIX))
    try:
        name.bind(f"\0steadyread-port-{port}")
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def lay_out(
    engine: Engine,
    ports: Sequence[int],
    primaries: int,
    directory: Path,
    node_timeout_ms: int,
    extra: Sequence[str] = (),
) -> Cluster:
    """Write each node's directory, configuration and cluster map, emptied of an earlier run; start nothing."""
    nodes: list[Node] = []
    for index, port in enumerate(ports):
        primary = None if index < primaries else nodes[(index - primaries) % primaries]
        where = directory.absolute() / f"node-{port}"
        node = Node(Address(HOST, port), where, primary, secrets.token_hex(_NODE_ID_BYTES))
        shutil.rmtree(node.directory, ignore_errors=True)
        node.directory.mkdir(parents=True)
        (node.directory / "node.conf").write_text(_configuration(node, node_timeout_ms))
        nodes.append(node)
    cluster = Cluster(engine, directory.absolute(), tuple(nodes), tuple(extra))
    _write_maps(cluster)
    return cluster


def _configuration(node: Node, node_timeout_ms: int) -> str:
    return f"""\
port {node.address.port}
bind {HOST}
dir "{node.directory}"
cluster-enabled yes
cluster-config-file {_MAP_FILE}
cluster-node-timeout {node_timeout_ms}
appendonly no
save ""
# a replica's first synchronisation starts at once instead of waiting for others to join it
repl-diskless-sync no
"""


def _write_maps(cluster: Cluster) -> None:
    """Each node's map of the whole cluster, in the engines' own format."""
    lines: dict[str, tuple[str, str]] = {}  # node id -> what stands before and after "myself," in its line
    shares = _shares(len(cluster.primaries))
    for epoch, (primary, slots) in enumerate(zip(cluster.primaries, shares, strict=True), start=1):
        shard_id = secrets.token_hex(_NODE_ID_BYTES)
        replicas = [node for node in cluster.replicas if node.primary is primary]
        for node in (primary, *replicas):
            where = _place(node, shard_id if cluster.engine.knows_shard_ids else "")
            role = f"slave {primary.id}" if node.primary else "master -"
            owned = "" if node.primary else f" {slots[0]}-{slots[-1]}"
            lines[node.id] = f"{node.id} {where} ", f"{role} 0 0 {epoch} connected{owned}\n"
    epochs = f"vars currentEpoch {len(cluster.primaries)} lastVoteEpoch 0\n"
    for teller in cluster.nodes:
        text = "".join(
            before + ("myself," if node_id == teller.id else "") + after
            for node_id, (before, after) in lines.items()
        )
        (teller.directory / _MAP_FILE).write_text(text + epochs)


def _place(node: Node, shard_id: str) -> str:
    """The second word of the node's line: host:port@bus-port,hostname,shard-id."""
    host, port = node.address
    place = f"{host}:{port}@{port + BUS_PORT_OFFSET}"
    return f"{place},,shard-id={shard_id}" if shard_id else place


def _shares(count: int) -> Iterator[range]:
    """All slots in ``count`` shares of nearly one size."""
    edges = [round(index * SLOT_COUNT / count) for index in range(count + 1)]
    return (range(edges[index], edges[index + 1]) for index in range(count))


async def wait_formed(cluster: Cluster) -> None:
    """Return once the servers that were started with their maps serve. Raises ClusterError."""
    for node in cluster.nodes:
        await wait_answering(node)
    await cluster.wait_serving()


async def wait_answering(node: Node) -> None:
    """Return once the node answers PING. Raises ClusterError with the end of its log when it ended."""
    with _deadline(f"{node} does not answer, see {node.log},") as say:
        while True:
            if node.process is not None and node.process.poll() is not None:
                raise ClusterError(f"{node}: the server ended at its start: {log_end(node.log)}")
            try:
                async with connected(node.address) as connection:
                    await connection.call("PING")
            except (ConnectionLost, ServerError) as fault:
                say(str(fault))
                await trio.sleep(_POLL_SECONDS / 2)
            else:
                return


def log_end(log: Path) -> str:
    """The last lines of a log, for an error message."""
    if not log.exists():
        return "it wrote no log"
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])


async def missing_to_serve(node: Node) -> str:
    """What keeps the node from serving; empty when nothing does."""
    async with connected(node.address) as connection:
        state = _fields(await connection.call("CLUSTER", "INFO"))
        if state.get("cluster_state") != "ok":
            return f"cluster_state {state.get('cluster_state')}"
        return await _missing_to_replicate(connection)


async def _missing_to_replicate(connection: Connection) -> str:
    replication = _fields(await connection.call("INFO", "replication"))
    if replication["role"] == "slave" and replication.get("master_link_status") != "up":
        return "its link to the primary is not up"
    return ""


def _fields(text: bytes) -> dict[str, str]:
    """``name:value`` lines of INFO and CLUSTER INFO."""
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


def _running(node: Node) -> subprocess.Popen[bytes]:
    if node.process is None:
        raise ClusterError(f"{node} does not run")
    return node.process


@contextmanager
def _deadline(what: str) -> Iterator[Callable[[str], None]]:
    """Turn waiting too long into a ClusterError that tells what was last said."""
    last = "nothing was seen"

    def say(seen: str) -> None:
        nonlocal last
        last = seen

    try:
        with trio.fail_after(_SETTLE_SECONDS):
            yield say
    except trio.TooSlowError as late:
        raise ClusterError(f"{what} after {_SETTLE_SECONDS:.0f} s: {last}") from late
