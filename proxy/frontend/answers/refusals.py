"""What the proxy refuses: commands that steer, watch or describe one server, where the proxy stands for many.

One line each says why, and what to use instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy.frontend.answers.parties import Answer, Connection, Handler, Refused
from proxy.protocol import encode

_CONNECT = "connect to the node itself (`steadyread topology` lists them)"
_SHARED = "clients share the connections to the nodes, so one client's own writes cannot be waited for"

# Command, or subcommand after a bar -> why it is refused, and what to do instead. A command stands for
# those of its subcommands that have no answer of their own.
REASONS = {
    "ACL": f"users and their rules belong to the nodes: {_CONNECT}",
    "BGREWRITEAOF": f"it concerns one server's disk: {_CONNECT}",
    "BGSAVE": f"it concerns one server's disk: {_CONNECT}",
    "COMMANDLOG": f"it is one server's log: {_CONNECT}",
    "DEBUG": f"it can harm a server that all share: {_CONNECT}",
    "FAILOVER": f"the cluster decides who is primary: send CLUSTER FAILOVER to the replica, {_CONNECT}",
    "LASTSAVE": f"it concerns one server's disk: {_CONNECT}",
    "LATENCY": f"it is one server's record: {_CONNECT}, or see the proxy's metrics",
    "MEMORY": f"it describes one server's memory: {_CONNECT}; MEMORY USAGE key works here",
    "MIGRATE": "it moves keys to a server where the cluster does not look for them: move slots with "
    "`redis-cli --cluster reshard`, or copy with DUMP and RESTORE",
    "MODULE": f"modules are loaded server by server: {_CONNECT}; MODULE LIST works here",
    "MONITOR": f"it watches one server: {_CONNECT}",
    "MOVE": "a cluster has one database: use RENAME",
    "PFDEBUG": f"it is for testing a server: {_CONNECT}",
    "PFSELFTEST": f"it is for testing a server: {_CONNECT}",
    "PSYNC": "the proxy has no replication history: replicate from a node",
    "REPLCONF": "the proxy has no replication history: replicate from a node",
    "REPLICAOF": "the proxy cannot become a replica: use CLUSTER REPLICATE at a node",
    "RESTORE-ASKING": "it is a step of a slot migration, which the proxy follows by itself: use RESTORE",
    "SAVE": f"it concerns one server's disk: {_CONNECT}",
    "SCRIPT|DEBUG": f"it holds up a server that all share: {_CONNECT}",
    "SHUTDOWN": f"a client may not stop what all share: {_CONNECT}, or send the proxy SIGTERM",
    "SLAVEOF": "the proxy cannot become a replica: use CLUSTER REPLICATE at a node",
    "SLOWLOG": f"it is one server's log: {_CONNECT}, or see the proxy's metrics",
    "SWAPDB": "a cluster has one database: use RENAME key by key",
    "SYNC": "the proxy has no replication history: replicate from a node",
    "WAIT": f"{_SHARED}: set min-replicas-to-write on the nodes",
    "WAITAOF": f"{_SHARED}: set appendfsync always on the nodes",
}

# Of these, some subcommands are served: ACL WHOAMI, MEMORY USAGE, MODULE LIST.
PARTLY_SERVED = frozenset({"ACL", "MEMORY", "MODULE"})


def refusal_of(name: str) -> Handler:
    """The handler of the command ``name``, which has a reason."""
    answer = Refused(encode.error(f"ERR {name.replace('|', ' ')} is refused: {REASONS[name]}"))

    def handler(connection: Connection, args: Sequence[bytes], now: float, /) -> Answer:
        return answer

    return handler
