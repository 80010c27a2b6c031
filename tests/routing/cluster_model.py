"""A cluster as a plain model: what its nodes would say, and the timeline that comes of looking at it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from routing.cluster_nodes import AtomicMigration, NodeLine, Replication, Report
from routing.discovery import Known, merge
from routing.events import Event, EventKind
from routing.names import slot_ranges
from routing.observation import Observation
from routing.slot import SLOT_COUNT
from routing.timeline import Advance, Timeline, TimelineLimits, advance
from routing.topology import EMPTY_VIEW, Address, Node, Role

LIMITS = TimelineLimits()


@dataclass
class Server:
    """One node. Its id is its name's letters, forty of them, so that messages stay short."""

    id: str
    address: Address
    primary_id: str | None = None
    slots: set[int] = field(default_factory=set)
    epoch: int = 0
    migrating: dict[int, str] = field(default_factory=dict)
    importing: dict[int, str] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)  # slot -> keys
    running: list[AtomicMigration] = field(default_factory=list)
    finished: list[AtomicMigration] = field(default_factory=list)  # the newest first
    answers: bool = True
    is_failing: bool = False
    is_linked: bool = True
    is_reset: bool = False  # it left: it knows nobody, nobody knows it, and it answers
    replication: Replication | None = None
    key_count: int | None = None
    used_bytes: int | None = None

    def lines(self) -> tuple[NodeLine, NodeLine]:
        """What it says of itself, and what the others say of it."""
        spans = slot_ranges(self.slots)
        return self._line(spans, is_own=True), self._line(spans, is_own=False)

    def _line(self, spans: tuple[tuple[int, int], ...], *, is_own: bool) -> NodeLine:
        return NodeLine(
            Node(
                self.id,
                self.address,
                Role.REPLICA if self.primary_id else Role.PRIMARY,
                self.primary_id,
                self.epoch,
                self.is_failing and not is_own,
                self.is_linked or is_own,
            ),
            spans,
            tuple(sorted(self.migrating.items())) if is_own else (),
            tuple(sorted(self.importing.items())) if is_own else (),
        )


class Cluster:
    """Servers by name. A test changes them as an operator or a fault would, and looks."""

    def __init__(self, *names: str) -> None:
        """Primaries ``a``, ``b`` ... that share the slots evenly; ``ra`` is a replica of ``a``."""
        self.servers: dict[str, Server] = {}
        self.epoch = 0
        primaries = [name for name in names if len(name) == 1]
        for place, name in enumerate(primaries):
            low, high = place * SLOT_COUNT // len(primaries), (place + 1) * SLOT_COUNT // len(primaries)
            self.add(name).slots = set(range(low, high))
        for name in names:
            if len(name) > 1:
                self.add(name, of=name[1:])

    def __getitem__(self, name: str) -> Server:
        return self.servers[name]

    def add(self, name: str, of: str = "") -> Server:
        self.epoch += 1
        number = len(self.servers) + 1
        server = Server(ident(name), Address(f"10.0.0.{number}", 6379), ident(of) if of else None)
        server.epoch = self.epoch
        self.servers[name] = server
        return server

    def own(self, name: str, slots: Iterable[int], *, bump: bool = True) -> None:
        """``name`` owns ``slots`` from now on, and nobody else."""
        for server in self.servers.values():
            server.slots -= set(slots)
        self[name].slots |= set(slots)
        if bump:
            self.epoch += 1
            self[name].epoch = self.epoch

    def fail_over(self, old: str, new: str, *, fails: bool) -> None:
        """``new`` takes ``old``'s slots; ``old`` follows it, or is down."""
        slots = set(self[old].slots)
        self[new].primary_id = None
        self.own(new, slots)
        if fails:
            self[old].is_failing, self[old].is_linked, self[old].answers = True, False, False
        else:
            self[old].primary_id = self[new].id
        for server in self.servers.values():
            if server.primary_id == self[old].id:
                server.primary_id = self[new].id

    def open(self, slot: int, source: str, target: str) -> None:
        self[source].migrating[slot] = self[target].id
        self[target].importing[slot] = self[source].id

    def close(self, slot: int, source: str, target: str) -> None:
        self[source].migrating.pop(slot, None)
        self[target].importing.pop(slot, None)

    def move(self, slot: int, source: str, target: str) -> None:
        self.close(slot, source, target)
        self.own(target, {slot}, bump=not self[target].slots)

    def reports(self, asked: Iterable[str] | None = None) -> tuple[Report, ...]:
        names = self.servers if asked is None else asked
        lines = {name: server.lines() for name, server in self.servers.items()}
        return tuple(
            Report(
                lines[name][0],
                tuple(
                    told
                    for other, (_, told) in lines.items()
                    if other != name and not self[name].is_reset and not self[other].is_reset
                ),
                self.epoch,
                True,
                tuple(self[name].running),
                tuple(self[name].finished),
                self[name].replication,
                self[name].key_count,
                self[name].used_bytes,
            )
            for name in names
            if self[name].answers
        )


class History:
    """Looks at a cluster, one after another, and the timeline of them."""

    def __init__(self, cluster: Cluster, limits: TimelineLimits = LIMITS, at: float = 1000.0) -> None:
        self.cluster = cluster
        self.limits = limits
        self.at = at
        self.known = Known(EMPTY_VIEW, (0,) * SLOT_COUNT)
        self.timeline = Timeline()
        self.events: list[Event] = []
        self.last = Advance(self.timeline, (), (), ())

    def observe(self, asked: Iterable[str] | None = None) -> Observation:
        reports = self.cluster.reports(asked)
        self.known = merge(reports, self.known, {})
        if self.known.unclaimed:  # then discovery looks again before it believes it
            self.known = merge(reports, self.known, {})
        servers = self.cluster.servers.values()
        return Observation(
            at=self.at,
            view=self.known.view,
            reports=reports,
            problems={server.id: "connection refused" for server in servers if not server.answers},
            keys_in_slot={
                (slot, server.id): server.keys.get(slot, 0)
                for server in servers
                for slot in {*server.migrating, *server.importing}
            },
        )

    def look(self, seconds: float = 0.1, asked: Iterable[str] | None = None) -> tuple[Event, ...]:
        """The events of one look, ``seconds`` after the last."""
        self.at += seconds
        self.last = advance(self.timeline, self.observe(asked), self.limits)
        self.timeline = self.last.timeline
        self.events += self.last.events
        return self.last.events

    def kinds(self, seconds: float = 0.1, asked: Iterable[str] | None = None) -> list[str]:
        return [event.kind.value for event in self.look(seconds, asked)]

    def settle(self, seconds: float = 5.0) -> list[str]:
        """The kinds of what happens while nothing is done."""
        kinds = []
        for _ in range(round(seconds / 0.5)):
            kinds += self.kinds(0.5)
        return kinds

    def restart(self, timeline: Timeline) -> None:
        """Go on as a proxy that has only what was stored."""
        self.timeline = replace(timeline, view=self.timeline.view, observed_at=self.timeline.observed_at)

    def of(self, kind: EventKind) -> list[Event]:
        return [event for event in self.events if event.kind is kind]


def ident(name: str) -> str:
    """A node id of forty characters."""
    return (name * 40)[:40]
