"""Snapshots without a cluster, for those who ask for them: what was asked is kept, and each act happens at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from proxy.snapshots.facts import Costs, SnapshotError, SnapshotFacts
from proxy.snapshots.own_writes import OwnWrites
from proxy.topology.audit import Operator
from routing.snapshot import Chain, SnapshotRecord, SnapshotState, chain_of

AT = 1_800_000_000.0
SERVING, CLOSED, ABORTED = SnapshotState.SERVING, SnapshotState.CLOSED, SnapshotState.ABORTED
COSTS = Costs(
    keys_preserved=3,
    bytes_preserved=700,
    keys_too_large=1,
    preserves=4,
    preserve_seconds_sum=0.002,
    preserve_seconds_max=0.001,
    barrier_seconds=0.0125,
)


def facts_of(
    snapshot_id: int,
    state: SnapshotState = SERVING,
    *,
    age_seconds: float = 60.0,
    costs: Costs = COSTS,
    warnings: tuple[str, ...] = (),
    **record: object,
) -> SnapshotFacts:
    """One that was opened at AT."""
    made = SnapshotRecord(snapshot_id, state, AT, epoch=12, is_cut=True)
    return SnapshotFacts(replace(made, **record), age_seconds, replace(costs), warnings)  # type: ignore[arg-type]


@dataclass
class PlainDesk:
    """It takes any TTL, and the next opening fails with ``problem``, if that is set."""

    known: list[SnapshotFacts] = field(default_factory=list)
    asked: list[tuple[object, ...]] = field(default_factory=list)
    problem: str = ""
    cuts: int = 0
    own_writes: OwnWrites = field(default_factory=lambda: OwnWrites(10))

    async def catch_up(self, snapshot_id: int | None) -> None:
        """It knows all there is."""

    @property
    def chain(self) -> Chain:
        return chain_of(facts.record for facts in self.known)

    def current(self) -> int | None:
        serving = [facts.record.id for facts in self.known if facts.record.state is SERVING]
        return max(serving, default=None)

    def refusal(self, snapshot_id: int) -> bytes | None:
        facts = self.facts_of(snapshot_id)
        if facts is not None and facts.record.state is SERVING:
            return None
        return b"-SNAPSHOTTOOOLD snapshot %d has ended; open another one\r\n" % snapshot_id

    async def open(self, name: str, ttl_seconds: float | None, operator: Operator) -> SnapshotRecord:
        self.asked.append(("open", name, ttl_seconds, operator))
        if self.problem:
            raise SnapshotError(self.problem)
        newest = max((facts.record.id for facts in self.known), default=6)
        expires_at = AT + ttl_seconds if ttl_seconds else None
        self.known.append(facts_of(newest + 1, name=name, expires_at=expires_at, age_seconds=0.0))
        return self.known[-1].record

    async def close(self, snapshot_id: int, operator: Operator) -> SnapshotRecord:
        self.asked.append(("close", snapshot_id, operator))
        [place] = (at for at, facts in enumerate(self.known) if facts.record.id == snapshot_id)
        facts = self.known[place]
        if facts.record.state is not SERVING:
            raise SnapshotError(f"ERR snapshot {snapshot_id} is {facts.record.state.value} already")
        record = replace(facts.record, state=CLOSED)
        self.known[place] = replace(facts, record=record)
        return record

    def facts(self) -> list[SnapshotFacts]:
        return self.known

    def facts_of(self, snapshot_id: int) -> SnapshotFacts | None:
        return next((facts for facts in self.known if facts.record.id == snapshot_id), None)
