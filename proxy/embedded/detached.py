"""A cluster that outlives the command that started it.

Its directory is how later commands find it: a record of its shape, and one directory per node in which the
server itself writes its process id. A process is taken for a node only if it still runs in that node's
directory, so an id that another program got meanwhile is never killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from proxy.embedded.cluster import (
    HOST,
    NODE_TIMEOUT_MS,
    Cluster,
    ClusterError,
    Node,
    choose_ports,
    lay_out,
    log_end,
    missing_to_serve,
    wait_formed,
)
from proxy.embedded.connection import ConnectionLost, ServerError, connected
from proxy.embedded.engine import Engine
from routing.topology import Address, Role

RECORD = "cluster.json"
_PID_FILE = "node.pid"
_DAEMON = ("--daemonize", "yes", "--pidfile", _PID_FILE, "--logfile", "server.log")
_HAS_PROC = Path("/proc/self/cwd").exists()
_POLL_SECONDS = 0.005
_ANSWER_SECONDS = 2.0  # a node that takes longer is reported as one that does not answer
_START_SECONDS = 10.0
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class NodeState:
    """What one node does now."""

    address: Address
    pid: int | None  # None: it does not run
    role: Role | None = None  # None: it does not answer
    serves: bool = False  # cluster_state is ok there and, at a replica, its link is up
    slot_count: int = 0


async def start_detached(
    engine: Engine,
    directory: Path,
    primaries: int,
    replicas: int,
    base_port: int,
    node_timeout_ms: int = NODE_TIMEOUT_MS,
) -> Cluster:
    """Start a cluster that serves and goes on when this process ends.

    Raises ClusterError when a cluster is recorded in ``directory``, a port is busy, or it does not form; what
    was started is then stopped again, also if cancelled.
    """
    if (directory / RECORD).exists():
        raise ClusterError(f"{directory} records a cluster already; stop it first")
    ports = choose_ports(primaries * (1 + replicas), base_port)
    directory.mkdir(parents=True, exist_ok=True)
    cluster = lay_out(engine, ports, primaries, directory, node_timeout_ms, _DAEMON)
    _write_record(cluster)
    try:
        for node in cluster.nodes:
            await _start_daemon(cluster, node)
        await wait_formed(cluster)
    except BaseException:
        with trio.CancelScope(shield=True):
            await stop_detached(directory)
        raise
    return cluster


def find_detached(directory: Path) -> Cluster | None:
    """The cluster recorded in ``directory``, running or not; None when there is none.

    Raises ClusterError when the record cannot be understood.
    """
    file = directory / RECORD
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        known = record["engine"]
        engine = Engine(tuple(known["server"]), tuple(known["cli"]), known["name"], known["version"])
        nodes: list[Node] = []
        for entry in record["nodes"]:
            primary = None if entry["primary"] is None else nodes[entry["primary"]]
            port = int(entry["port"])
            nodes.append(Node(Address(HOST, port), directory.absolute() / f"node-{port}", primary))
    except (ValueError, KeyError, TypeError, IndexError) as fault:
        raise ClusterError(f"{file} is not the record of a cluster: {fault!r}") from fault
    return Cluster(engine, directory.absolute(), tuple(nodes), _DAEMON)


async def stop_detached(directory: Path) -> int:
    """Kill the nodes of the cluster recorded in ``directory``, remove what it kept there, and return how many
    ran.

    Raises ClusterError when a node does not end. Nothing to stop is 0.
    """
    cluster = find_detached(directory)
    if cluster is None:
        return 0
    running = [(node, pid) for node in cluster.nodes if (pid := await node_pid(node)) is not None]
    for _, pid in running:
        os.kill(pid, signal.SIGKILL)  # it saves nothing, so there is nothing to wait for
    for node, pid in running:
        with trio.move_on_after(_END_SECONDS):
            await _wait_pid(node, is_there=False)
            continue
        raise ClusterError(f"{node}: process {pid} does not end")
    for node in cluster.nodes:
        shutil.rmtree(node.directory, ignore_errors=True)
    (directory / RECORD).unlink()
    return len(running)


async def node_state(cluster: Cluster, node: Node) -> NodeState:
    """What the node does now, within 2 s."""
    pid = await node_pid(node)
    if pid is None:
        return NodeState(node.address, None)
    with trio.move_on_after(_ANSWER_SECONDS):
        try:
            role = (await cluster.call(node, "ROLE"))[0]
            owned = (await cluster.map_at(node)).owned_by_teller
            missing = await missing_to_serve(node)
        except (ConnectionLost, ServerError):
            return NodeState(node.address, pid)
        kind = Role.PRIMARY if role == b"master" else Role.REPLICA
        return NodeState(node.address, pid, kind, not missing, len(owned))
    return NodeState(node.address, pid)


async def node_pid(node: Node) -> int | None:
    """The process id of the node's server; None when it does not run."""
    try:
        pid = int((node.directory / _PID_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return pid if await _is_server_of(node, pid) else None


async def _wait_pid(node: Node, *, is_there: bool) -> None:
    """Return once the node's server runs, or does not."""
    while True:
        if (await node_pid(node) is not None) is is_there:
            return
        await trio.sleep(_POLL_SECONDS)


async def _is_server_of(node: Node, pid: int) -> bool:
    if _HAS_PROC:
        try:
            return Path(f"/proc/{pid}/cwd").readlink() == node.directory.resolve()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False  # gone, or waiting to be collected, or somebody else's
    # Without /proc the server itself is asked; a frozen one cannot be told from a stranger.
    with trio.move_on_after(_ANSWER_SECONDS):
        try:
            async with connected(node.address) as asked:
                information = await asked.call("INFO", "server")
        except (ConnectionLost, ServerError):
            return False
        return f"process_id:{pid}\r\n".encode() in information
    return False


async def _start_daemon(cluster: Cluster, node: Node) -> None:
    """Return once the server runs on its own and its process id is known. Raises ClusterError.

    Shielded: a server that was started but is not known yet could not be stopped.
    """
    with trio.move_on_after(_START_SECONDS) as patience:
        patience.shield = True
        done = await trio.run_process(
            [*cluster.engine.server, "node.conf", *cluster.extra],
            cwd=node.directory,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        if done.returncode != 0:
            words = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()[-3:]
            raise ClusterError(f"{node}: the server did not start: {' / '.join(words)}")
        await _wait_pid(node, is_there=True)
        return
    raise ClusterError(f"{node}: the server did not start: {log_end(node.log)}")


def _write_record(cluster: Cluster) -> None:
    index_of = {id(node): index for index, node in enumerate(cluster.nodes)}
    record = {
        "engine": asdict(cluster.engine),
        "nodes": [
            {
                "port": node.address.port,
                "primary": None if node.primary is None else index_of[id(node.primary)],
            }
            for node in cluster.nodes
        ],
    }
    (cluster.directory / RECORD).write_text(json.dumps(record, indent=2) + "\n")
