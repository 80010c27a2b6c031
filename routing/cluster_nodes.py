"""Reads what a node says of the cluster: CLUSTER NODES, CLUSTER INFO and Valkey 9's CLUSTER GETSLOTMIGRATIONS.

CLUSTER NODES is asked of every engine, because it alone carries config epochs, and a node's own line alone
carries its open slots. Source: the engines' documentation of the commands, and what servers were seen to answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """One running job of Valkey's atomic slot migration, as the source or the target tells it."""

    name: str
    slot_ranges: tuple[tuple[int, int], ...]
    source_id: str
    target_id: str
    state: str


@dataclass(frozen=True, slots=True)
class Report:
    """What one node said at one time."""

    myself: NodeLine
    others: tuple[NodeLine, ...]
    current_epoch: int
    is_cluster_ok: bool
    atomic_migrations: tuple[AtomicMigration, ...] = ()


class ReportError(ValueError):
    """A node's answer is not what the command is documented to give."""


class LineCache:
    """Lines of CLUSTER NODES by their text without its two times, which alone change from answer to answer.

    It holds at most 2 * LINES_MAX lines; those that were not met among the last LINES_MAX new ones are forgotten.
    """

    LINES_MAX = 8192  # what 1,000 nodes say of each other, and changes of it; about 10 MB

    def __init__(self) -> None:
        self._recent: dict[tuple[str, ...], NodeLine] = {}
        self._older: dict[tuple[str, ...], NodeLine] = {}

    def __len__(self) -> int:
        return len(self._recent) + len(self._older)

    def get(self, key: tuple[str, ...]) -> NodeLine | None:
        """The line of that text, the same object each time."""
        line = self._recent.get(key)
        if line is None and (line := self._older.get(key)) is not None:
            self.put(key, line)
        return line

    def put(self, key: tuple[str, ...], line: NodeLine) -> None:
        if len(self._recent) >= self.LINES_MAX:
            self._older, self._recent = self._recent, {}
        self._recent[key] = line


class NodesParser:
    """Reads one answer to CLUSTER NODES, some lines at a time: 1,000 at once would keep others waiting.

        parser = NodesParser(text, asked, cache)
        while parser.step():
            await trio.lowlevel.checkpoint()
        myself, others = parser.result()

    Nodes without address, or in handshake, are left out: they cannot be reached yet.
    """

    LINES_PER_STEP = 100  # a tenth of a millisecond when they are known, a millisecond when they are new

    def __init__(self, text: str, asked: Address, cache: LineCache) -> None:
        self._lines = text.splitlines()
        self._asked = asked
        self._cache = cache
        self._at = 0
        self._myself: NodeLine | None = None
        self._others: list[NodeLine] = []

    def step(self) -> bool:
        """Parse the next lines. Returns whether any are left. Raises ReportError."""
        lines = self._lines[self._at : self._at + self.LINES_PER_STEP]
        self._at += len(lines)
        known = self._cache.get
        for line in lines:
            parts = line.split(None, 6)
            if len(parts) == 7:
                key = (parts[0], parts[1], parts[2], parts[3], parts[6])
                node_line = known(key)
                if node_line is not None:
                    self._others.append(node_line)
                else:
                    self._parse(line, key)
            elif parts:
                self._parse(line, ())
        return self._at < len(self._lines)

    def result(self) -> tuple[NodeLine, tuple[NodeLine, ...]]:
        """(the node's own line, the others'), once all is parsed. Raises ReportError."""
        if self._myself is None:
            raise ReportError(f"CLUSTER NODES of {self._asked} does not name the node itself")
        return self._myself, tuple(self._others)

    def _parse(self, line: str, key: tuple[str, ...]) -> None:
        fields = line.split()
        if len(fields) < 8:
            raise ReportError(
                f"CLUSTER NODES of {self._asked}: a line with {len(fields)} fields: {line[:100]!r}"
            )
        flags = fields[2].split(",")
        if "noaddr" in flags or "handshake" in flags:
            return
        if "myself" in flags:  # never kept: what it means depends on who was asked
            self._myself = _parse_line(fields, flags, self._asked, True)
        else:
            node_line = _parse_line(fields, flags, self._asked, False)
            self._cache.put(key, node_line)
            self._others.append(node_line)


def parse_nodes(text: str, asked: Address) -> tuple[NodeLine, tuple[NodeLine, ...]]:
    """(the node's own line, the others'). An address that the node does not know of itself becomes ``asked``.

    All at once, and nothing remembered; ``NodesParser`` for more than a few nodes. Raises ReportError.
    """
    parser = NodesParser(text, asked, LineCache())
    while parser.step():
        pass
    return parser.result()


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


def parse_atomic_migrations(jobs: Sequence[Any]) -> tuple[AtomicMigration, ...]:
    """The jobs that still run, from CLUSTER GETSLOTMIGRATIONS as decoded (a map, or a flat list, a job).

    Raises ReportError when a job lacks what the documentation promises.
    """
    running = []
    if not isinstance(jobs, Sequence):
        raise ReportError(f"CLUSTER GETSLOTMIGRATIONS: expected a list, got {jobs!r:.200}")
    for job in jobs:
        try:
            fields = _fields(job)
            state = fields["state"]
            if state.lower() in FINISHED_STATES:
                continue
            slot_ranges = []
            for part in fields["slot_ranges"].split():
                low, _, high = part.partition("-")
                slot_ranges.append((int(low), int(high or low)))
            if any(not 0 <= low <= high < SLOT_COUNT for low, high in slot_ranges):
                raise ValueError("slots out of range")
            running.append(
                AtomicMigration(
                    name=fields["name"],
                    slot_ranges=tuple(slot_ranges),
                    source_id=fields["source_node"],
                    target_id=fields["target_node"],
                    state=state,
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"CLUSTER GETSLOTMIGRATIONS: {error!r} in {job!r:.200}") from error
    return tuple(running)


def _fields(job: Any) -> dict[str, str]:
    pairs = job.items() if isinstance(job, Mapping) else zip(job[::2], job[1::2], strict=True)
    return {_text(name): _text(value) for name, value in pairs}


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
