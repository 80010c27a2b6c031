"""Reads what a node says: CLUSTER NODES, CLUSTER INFO, Valkey 9's CLUSTER GETSLOTMIGRATIONS, and parts of INFO.

CLUSTER NODES is asked of every engine, because it alone carries config epochs, and a node's own line alone
carries its open slots. Source: the engines' documentation of the commands, and what servers were seen to answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routing.slot import SLOT_COUNT
from routing.topology import Address, Node, Role


@dataclass(frozen=True, slots=True)
class NodeLine:
    """One line of CLUSTER NODES."""

    node: Node
    slot_ranges: tuple[tuple[int, int], ...] = ()  # inclusive
    migrating: tuple[tuple[int, str], ...] = ()  # (slot, id of the target); only a node's own line has them
    importing: tuple[tuple[int, str], ...] = ()  # (slot, id of the source)


@dataclass(frozen=True, slots=True)
class AtomicMigration:
    """One job of Valkey's atomic slot migration, as the source or the target tells it."""

    name: str
    slot_ranges: tuple[tuple[int, int], ...]
    source_id: str
    target_id: str
    state: str
    message: str = ""  # why it failed
    created_at: int | None = None  # Unix seconds by the telling node's clock
    updated_at: int | None = None  # the same, of its last change or of the peer's last sign of life
    remaining_bytes: int | None = None  # what the target has still to be sent


@dataclass(frozen=True, slots=True)
class Replication:
    """INFO replication of one node. Offsets are comparable within one replication id only."""

    role: Role
    offset: int  # of a primary: written; of a replica: applied
    replid: str
    replid2: str = ""  # the history before the last failover; empty when there is none
    second_offset: int | None = None  # up to which ``replid2`` is this history too
    link_up: bool = True  # of a replica, to its primary; a primary needs none
    is_syncing: bool = False  # of a replica: it is being sent the whole data set
    primary: Address | None = None  # of a replica


@dataclass(frozen=True, slots=True)
class Report:
    """What one node said at one time."""

    myself: NodeLine
    others: tuple[NodeLine, ...]
    current_epoch: int
    is_cluster_ok: bool
    atomic_migrations: tuple[AtomicMigration, ...] = ()  # that run
    finished_migrations: tuple[AtomicMigration, ...] = ()  # the newest first
    replication: Replication | None = None
    key_count: int | None = None  # in all databases
    used_bytes: int | None = None  # of memory


class ReportError(ValueError):
    """A node's answer is not what the command is documented to give."""


def parse_nodes(text: str, asked: Address) -> tuple[NodeLine, tuple[NodeLine, ...]]:
    """(the node's own line, the others'). An address that the node does not know of itself becomes ``asked``.

    Nodes without address, or in handshake, are left out: they cannot be reached yet. Raises ReportError.
    """
    myself: NodeLine | None = None
    others: list[NodeLine] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) < 8:
            raise ReportError(f"CLUSTER NODES of {asked}: a line with {len(fields)} fields: {line[:100]!r}")
        flags = fields[2].split(",")
        if "noaddr" in flags or "handshake" in flags:
            continue
        is_myself = "myself" in flags
        node_line = _parse_line(fields, flags, asked, is_myself)
        if is_myself:
            myself = node_line
        else:
            others.append(node_line)
    if myself is None:
        raise ReportError(f"CLUSTER NODES of {asked} does not name the node itself")
    return myself, tuple(others)


def _parse_line(fields: Sequence[str], flags: Sequence[str], asked: Address, is_myself: bool) -> NodeLine:
    try:
        endpoint, _, extras = fields[1].partition(",")
        address = Address.parse(endpoint.partition("@")[0])
        if is_myself and not address.host:
            address = Address(asked.host, address.port or asked.port)
        node = Node(
            id=fields[0],
            address=address,
            role=Role.PRIMARY if "master" in flags else Role.REPLICA,
            primary_id=None if fields[3] == "-" else fields[3],
            config_epoch=int(fields[6]),
            is_failing="fail" in flags or "fail?" in flags,
            is_linked=is_myself or fields[7] == "connected",
            hostname="" if "=" in extras.partition(",")[0] else extras.partition(",")[0],
        )
        owned: list[tuple[int, int]] = []
        migrating: list[tuple[int, str]] = []
        importing: list[tuple[int, str]] = []
        for part in fields[8:]:
            if part.startswith("["):
                slot, arrow, other = part[1:-1].partition("->-")
                if arrow:
                    migrating.append((int(slot), other))
                else:
                    slot, arrow, other = part[1:-1].partition("-<-")
                    if not arrow:
                        raise ValueError(f"an open slot that goes nowhere: {part!r}")
                    importing.append((int(slot), other))
            else:
                low, _, high = part.partition("-")
                owned.append((int(low), int(high or low)))
    except ValueError as error:
        raise ReportError(f"CLUSTER NODES of {asked}: {error}") from error
    open_slots = [(slot, slot) for slot, _ in migrating + importing]
    if any(not 0 <= low <= high < SLOT_COUNT for low, high in owned + open_slots):
        raise ReportError(f"CLUSTER NODES of {asked}: slots out of range for node {node.id}")
    return NodeLine(node, tuple(owned), tuple(migrating), tuple(importing))


def parse_info(text: str) -> dict[str, str]:
    """``name:value`` lines, as INFO and CLUSTER INFO give them; headings are skipped."""
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line and not line.startswith("#"))
    return {name: value.strip() for name, _, value in pairs}


FINISHED_STATES = frozenset({"success", "failed", "cancelled", "canceled"})
SUCCESS_STATE = "success"


def parse_atomic_migrations(jobs: Sequence[Any]) -> tuple[AtomicMigration, ...]:
    """The jobs that still run, from CLUSTER GETSLOTMIGRATIONS as decoded (a map, or a flat list, a job).

    A replica lists its primary's jobs without their ends; those are left out, because the primary tells them in
    full. Raises ReportError when a job lacks what the documentation promises.
    """
    return tuple(job for job in _jobs(jobs) if job.state.lower() not in FINISHED_STATES)


def parse_finished_migrations(jobs: Sequence[Any]) -> tuple[AtomicMigration, ...]:
    """The jobs that ended, in the node's order, which is the newest first. Raises ReportError."""
    return tuple(job for job in _jobs(jobs) if job.state.lower() in FINISHED_STATES)


def parse_replication(text: str) -> Replication:
    """From INFO replication, which reads the same from Redis 6.2 to Valkey 9.1. Raises ReportError."""
    fields = parse_info(text)
    try:
        role = Role.PRIMARY if _known(fields["role"], ("master", "slave")) == "master" else Role.REPLICA
        is_replica = role is Role.REPLICA
        second_offset = int(fields["second_repl_offset"])
        return Replication(
            role=role,
            offset=int(fields["slave_repl_offset" if is_replica else "master_repl_offset"]),
            replid=fields["master_replid"],
            replid2="" if second_offset < 0 else fields["master_replid2"],
            second_offset=None if second_offset < 0 else second_offset,
            link_up=not is_replica or fields["master_link_status"] == "up",
            is_syncing=is_replica and fields["master_sync_in_progress"] != "0",
            primary=Address(fields["master_host"], int(fields["master_port"])) if is_replica else None,
        )
    except (KeyError, ValueError) as error:
        raise ReportError(f"INFO replication: {error!r} in {text!r:.200}") from error


def parse_key_count(text: str) -> int:
    """From INFO keyspace: the keys of all databases; a database without keys is not named. Raises ReportError."""
    count = 0
    for name, value in parse_info(text).items():
        if name.startswith("db") and name[2:].isdecimal():
            keys = dict(part.partition("=")[::2] for part in value.split(",")).get("keys", "")
            if not keys.isdecimal():
                raise ReportError(f"INFO keyspace: {name} has no count of keys: {value!r:.200}")
            count += int(keys)
    return count


def parse_used_bytes(text: str) -> int:
    """From INFO memory. Raises ReportError."""
    used = parse_info(text).get("used_memory", "")
    if not used.isdecimal():
        raise ReportError(f"INFO memory: used_memory is {used!r:.100}")
    return int(used)


def _jobs(jobs: Sequence[Any]) -> Iterator[AtomicMigration]:
    if not isinstance(jobs, Sequence):
        raise ReportError(f"CLUSTER GETSLOTMIGRATIONS: expected a list, got {jobs!r:.200}")
    for job in jobs:
        try:
            fields = _fields(job)
            state = fields["state"]
            if fields["name"] and "source_node" not in fields and "target_node" not in fields:
                continue  # a replica's
            slot_ranges = []
            for part in fields["slot_ranges"].split():
                low, _, high = part.partition("-")
                slot_ranges.append((int(low), int(high or low)))
            if any(not 0 <= low <= high < SLOT_COUNT for low, high in slot_ranges):
                raise ValueError("slots out of range")
            updates = [_whole(fields, name) for name in ("last_update_time", "last_ack_time")]
            yield AtomicMigration(
                name=fields["name"],
                slot_ranges=tuple(slot_ranges),
                source_id=fields["source_node"],
                target_id=fields["target_node"],
                state=state,
                message=fields.get("message", ""),
                created_at=_whole(fields, "create_time"),
                updated_at=max((update for update in updates if update is not None), default=None),
                remaining_bytes=_whole(fields, "remaining_repl_size"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"CLUSTER GETSLOTMIGRATIONS: {error!r} in {job!r:.200}") from error


def _fields(job: Any) -> dict[str, str]:
    pairs = job.items() if isinstance(job, Mapping) else zip(job[::2], job[1::2], strict=True)
    return {_text(name): _text(value) for name, value in pairs}


def _whole(fields: Mapping[str, str], name: str) -> int | None:
    return int(fields[name]) if name in fields else None


def _known(word: str, words: Sequence[str]) -> str:
    if word not in words:
        raise ValueError(f"{word!r} is none of {', '.join(words)}")
    return word


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
