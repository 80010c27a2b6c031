"""The metrics of reads: which level was asked for and which was given, and why a replica did not serve one.

All series of labels with a fixed set of values are there from the start, at 0, so that rates and alerts need not wait
for the first of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from proxy.exchange.replica_reads import ReplicaReads
from proxy.metrics import PREFIX, Family, MetricType, Sample
from proxy.replicas.service import Replicas
from routing.levels import Level
from routing.promotion import Stage
from routing.proof import Refusal

# A replica told what it has applied, or should have, and that did not prove enough.
STAMP_FAILURES = (
    Refusal.BEHIND,
    Refusal.OTHER_HISTORY,
    Refusal.TOO_OLD,
    Refusal.SYNCING,
    Refusal.NO_STAMP,
)


def _counter(name: str, help_: str, *labels: str) -> Family:
    return Family(f"{PREFIX}{name}_total", help_, MetricType.COUNTER, labels)


READS = _counter(
    "reads",
    "Reads by the level that they asked for, the level that their reply proves, and the role of who served them.",
    "asked",
    "given",
    "role",
)
REFUSALS = _counter(
    "replica_refusals", "Reads that no replica served although their level allows it, by why.", "reason"
)
STAMP_FAILURES_TOTAL = _counter(
    "stamp_failures", "Reads whose replica did not prove that it is new enough, by why.", "reason"
)
CONFIRMED = _counter(
    "misses_confirmed",
    "Replies of replicas that could mean that there is no such key, asked again at the owner.",
)
NILS_PREVENTED = _counter("nils_prevented", "Of those, the ones whose key the owner had.")
FLOOR_QUESTIONS = _counter("floor_questions", "Questions to primaries for their offset, for reads.")
STAMP_QUESTIONS = _counter("stamp_questions", "Questions to replicas for what they have applied, for reads.")
STALENESS = Family(
    f"{PREFIX}read_staleness_seconds",
    "How old at most the data was that a replica read, when it proved that.",
    MetricType.HISTOGRAM,
)
REPLICAS = Family(
    f"{PREFIX}replicas", "Replicas by how far they have come here.", MetricType.GAUGE, ("stage",)
)
REPLICA_READS = _counter("replica_reads", "Reads sent to a replica.", "node")
CIRCUIT_OPEN = Family(
    f"{PREFIX}circuit_open",
    "1 while reads that others can prove do not go to the node, because it failed or stalled.",
    MetricType.GAUGE,
    ("node",),
)
CIRCUIT_OPENINGS = _counter("circuit_openings", "How often the node's circuit was opened.", "node")


def read_samples(reads: ReplicaReads, replicas: Replicas) -> Iterator[Sample]:
    """All numbers of reads and replicas as they are now."""
    yield Sample(READS, reads.strong_total, ("strong", "strong", "primary"))
    answered = reads.answered()
    for level, counts in reads.counts.items():
        if level not in (Level.STRONG, Level.SNAPSHOT):  # which no replica serves
            yield Sample(READS, answered[level], (level.value, level.value, "replica"))
            yield Sample(READS, counts.at_owner, (level.value, "strong", "primary"))
    for refusal in Refusal:
        yield Sample(REFUSALS, reads.refusals[refusal], (refusal.value,))
    for refusal in STAMP_FAILURES:
        yield Sample(STAMP_FAILURES_TOTAL, reads.refusals[refusal], (refusal.value,))
    yield Sample(CONFIRMED, reads.confirmed_total)
    yield Sample(NILS_PREVENTED, reads.nils_prevented_total)
    yield Sample(FLOOR_QUESTIONS, reads.floors_total)
    yield Sample(STAMP_QUESTIONS, reads.stamps_total)
    yield Sample(STALENESS, reads.staleness)
    stages = Counter(replica.stage for replica in replicas.replicas())
    for stage in Stage:
        yield Sample(REPLICAS, stages[stage], (stage.value,))
    for replica in replicas.replicas():
        node = (str(replica.address),)
        yield Sample(REPLICA_READS, replica.reads_total, node)
        yield Sample(CIRCUIT_OPEN, int(replica.circuit.is_open), node)
        yield Sample(CIRCUIT_OPENINGS, replica.circuit.openings_total, node)
