"""INFO, ROLE, TIME: the proxy as one server. INFO keyspace is the sum of all primaries' reports."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from proxy.frontend.answers.clients import verbatim
from proxy.frontend.answers.parties import Answer, Connection, GatherKeyspace
from proxy.protocol import encode

_DEFAULT = (
    "server",
    "clients",
    "memory",
    "persistence",
    "stats",
    "replication",
    "cpu",
    "modules",
    "errorstats",
    "cluster",
    "keyspace",
)
_ALL = (*_DEFAULT[:7], "modules", "commandstats", "errorstats", "latencystats", "cluster", "keyspace")
_GROUPS = {"default": _DEFAULT, "all": _ALL, "everything": _ALL}


@dataclass(frozen=True, slots=True)
class Keyspace:
    """What the cluster holds, as one database."""

    keys: int = 0
    expires: int = 0
    average_ttl_milliseconds: int = 0

    @classmethod
    def merge(cls, bodies: Iterable[bytes]) -> Keyspace:
        """The sum of several nodes' ``INFO keyspace``. Raises ValueError if one cannot be read."""
        keys = expires = weighted_ttl = 0
        for body in bodies:
            for line in body.splitlines():
                database, _, numbers = line.partition(b":")
                if database != b"db0":
                    continue
                fields = dict(field.split(b"=", 1) for field in numbers.split(b","))
                try:
                    node_keys, node_expires, ttl = (
                        int(fields[name]) for name in (b"keys", b"expires", b"avg_ttl")
                    )
                except KeyError as missing:
                    raise ValueError(f"INFO keyspace has no field {missing}: {line!r}") from None
                keys += node_keys
                expires += node_expires
                weighted_ttl += ttl * node_expires
        return cls(keys, expires, weighted_ttl // expires if expires else 0)


def info(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """INFO [section ...]. Names without a meaning give nothing, as in Redis."""
    wanted: set[str] = set()
    for arg in args[1:] or (b"default",):
        name = arg.decode("ascii", "replace").lower()
        wanted.update(_GROUPS.get(name, (name,)))
    sections = tuple(name for name in _ALL if name in wanted)
    if "keyspace" in sections:
        return GatherKeyspace(sections)
    return reply(connection, sections, now, keyspace=None)


def reply(connection: Connection, sections: Sequence[str], now: float, keyspace: Keyspace | None) -> bytes:
    """The reply with ``sections``. ``keyspace`` None: it could not be gathered, and its section says so."""
    server = connection.server
    totals = server.totals()
    clients = server.settings.clients
    uptime_seconds = max(0, int(now - server.started_at))
    tables: dict[str, dict[str, object]] = {
        "server": {
            "redis_version": server.engine_version,
            "redis_git_sha1": "00000000",
            "redis_git_dirty": 0,
            "redis_build_id": "0",
            "redis_mode": "standalone",
            "steadyread_version": server.version,
            "os": f"{platform.system()} {platform.release()} {platform.machine()}",
            "arch_bits": 64 if sys.maxsize > 2**32 else 32,
            "process_id": os.getpid(),
            "run_id": server.run_id,
            "tcp_port": connection.local_address.rpartition(":")[2],
            "server_time_usec": int(now * 1_000_000),
            "uptime_in_seconds": uptime_seconds,
            "uptime_in_days": uptime_seconds // 86400,
            "executable": sys.executable,
            "config_file": "",
        },
        "clients": {
            "connected_clients": sum(1 for _ in server.clients()),
            "cluster_connections": 0,
            "maxclients": clients.connections_max,
            "blocked_clients": totals.blocked_clients,
            "tracking_clients": 0,
            "pubsub_clients": totals.subscribed_clients,
            "watching_clients": totals.watching_clients,
        },
        "memory": {
            "used_memory": totals.resident_bytes,
            "used_memory_human": human(totals.resident_bytes),
            "used_memory_rss": totals.resident_bytes,
            "used_memory_rss_human": human(totals.resident_bytes),
            "used_memory_peak": totals.resident_bytes_peak,
            "used_memory_peak_human": human(totals.resident_bytes_peak),
            "maxmemory": 0,
            "maxmemory_human": "0B",
            "maxmemory_policy": "noeviction",
        },
        "persistence": {
            # Clients wait for loading:0 before they send commands. The proxy stores nothing.
            "loading": 0,
            "async_loading": 0,
            "rdb_changes_since_last_save": 0,
            "rdb_bgsave_in_progress": 0,
            "rdb_last_save_time": int(server.started_at),
            "rdb_last_bgsave_status": "ok",
            "aof_enabled": 0,
            "aof_rewrite_in_progress": 0,
        },
        "stats": {
            "total_connections_received": totals.connections_received,
            "total_commands_processed": totals.commands_processed,
            "instantaneous_ops_per_sec": totals.commands_per_second,
            "total_net_input_bytes": totals.received_bytes,
            "total_net_output_bytes": totals.sent_bytes,
            "rejected_connections": totals.connections_rejected,
            "evicted_clients": 0,
            "pubsub_channels": totals.channels,
            "pubsub_patterns": totals.patterns,
            "pubsubshard_channels": totals.shard_channels,
            "total_error_replies": totals.error_replies,
        },
        "replication": {
            "role": "master",
            "connected_slaves": 0,
            "master_failover_state": "no-failover",
            "master_replid": "0" * 40,
            "master_replid2": "0" * 40,
            "master_repl_offset": 0,
            "second_repl_offset": -1,
            "repl_backlog_active": 0,
        },
        "cpu": {
            "used_cpu_sys": f"{totals.cpu_system_seconds:.6f}",
            "used_cpu_user": f"{totals.cpu_user_seconds:.6f}",
        },
        "cluster": {"cluster_enabled": 0},
        "keyspace": _keyspace(keyspace),
    }
    text = "\r\n".join(
        f"# {name.capitalize()}\r\n"
        + "".join(f"{field}:{value}\r\n" for field, value in tables.get(name, {}).items())
        for name in sections
    )
    return verbatim(text.encode(), connection)


def human(size_bytes: int) -> str:
    """``2.02M``, as the engines write sizes."""
    if size_bytes < 1024:
        return f"{size_bytes}B"
    for power, unit in enumerate("KMG", start=1):
        if size_bytes < 1024 ** (power + 1):
            return f"{size_bytes / 1024**power:.2f}{unit}"
    return f"{size_bytes / 1024**4:.2f}T"


def _keyspace(keyspace: Keyspace | None) -> dict[str, object]:
    if keyspace is None:
        return {"steadyread_keyspace": "unavailable"}
    if not keyspace.keys:
        return {}
    return {
        "db0": f"keys={keyspace.keys},expires={keyspace.expires},avg_ttl={keyspace.average_ttl_milliseconds}"
    }


def role(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """ROLE of a primary without replicas; offset 0, because the proxy has no replication history."""
    return encode.array([encode.bulk(b"master"), encode.integer(0), encode.EMPTY_ARRAY])


def time(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    seconds, microseconds = divmod(int(now * 1_000_000), 1_000_000)
    return encode.array([encode.bulk(str(seconds)), encode.bulk(str(microseconds))])


def lolwut(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """LOLWUT, whatever version it asks for: stones move, and the reads across them stay level."""
    drawing = (
        "   .--.        .---.      .--.\n"
        "--/    \\------/     \\----/    \\--->\n"
        "~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~\n"
    )
    return verbatim(f"{drawing}Steadyread ver. {connection.server.version}\n".encode(), connection)
