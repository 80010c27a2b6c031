"""What the nodes themselves say, asked directly: which internal keys they have, and how many of the clients'."""

from __future__ import annotations

import trio

from proxy.embedded.cluster import Cluster, Node
from proxy.embedded.connection import ConnectionLost, ServerError
from routing import snapshot_names
from routing.topology import Address

SCAN_COUNT = 1000
POLL_SECONDS = 0.1


async def names_at(cluster: Cluster, node: Node | Address) -> list[bytes]:
    """All keys of the node. Raises ConnectionLost and ServerError."""
    names: list[bytes] = []
    cursor = b"0"
    async with cluster.connection(node) as connection:
        while True:
            cursor, found = await connection.call("SCAN", cursor, "COUNT", SCAN_COUNT)
            names += found
            if cursor == b"0":
                return names


async def internal_keys(cluster: Cluster) -> list[bytes]:
    """Of all running nodes, replicas too."""
    found: list[bytes] = []
    for node in cluster.nodes:
        if node.process is not None and not node.is_frozen:
            found += [n for n in await names_at(cluster, node) if n.startswith(snapshot_names.PREFIX)]
    return found


async def seconds_until_swept(cluster: Cluster, seconds_max: float) -> tuple[float, list[bytes]]:
    """How long it took, and what was left when the time was over."""
    began = trio.current_time()
    while True:
        try:
            left = await internal_keys(cluster)
        except (ConnectionLost, ServerError):
            left = [b"(a node did not answer)"]
        passed = trio.current_time() - began
        if not left or passed > seconds_max:
            return passed, left
        await trio.sleep(POLL_SECONDS)


async def client_keys(cluster: Cluster) -> int:
    """How many keys the cluster has for its clients, while nobody writes. Raises ConnectionLost and ServerError."""
    names: set[bytes] = set()
    for line in (await cluster.map_at(running(cluster)[0])).primaries:
        names |= {n for n in await names_at(cluster, line.address) if not snapshot_names.is_internal(n)}
    return len(names)


def running(cluster: Cluster) -> list[Node]:
    return [node for node in cluster.nodes if node.process is not None and not node.is_frozen]


async def primary_of(cluster: Cluster, slot: int) -> Node:
    """By a majority of one: the map of a node that runs. Raises ConnectionLost."""
    for node in running(cluster):
        owner = (await cluster.map_at(node)).owner_of(slot)
        found = cluster.node_at(owner.address)
        if found.process is not None:
            return found
    raise LookupError(f"nobody that runs owns slot {slot}")


async def flush(cluster: Cluster) -> None:
    """Take all keys away, on whatever nodes are primaries now. Raises ConnectionLost and ServerError."""
    for node in running(cluster):
        async with cluster.connection(node) as connection:
            if (await connection.call("ROLE"))[0] == b"master":
                await connection.call("FLUSHALL")
