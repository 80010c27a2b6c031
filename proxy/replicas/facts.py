"""What this proxy knows of each replica now, for people: values that stay as they are while the replicas go on."""

from __future__ import annotations

from proxy.replicas.service import Replica, Replicas
from routing.circuit import CircuitState
from routing.replicas import ReplicaFacts


def replica_facts(replicas: Replicas, now: float) -> dict[str, ReplicaFacts]:
    """Node id -> facts, of every replica in the view. ``now``: Trio's clock."""
    return {replica.node.id: _facts_of(replica, now) for replica in replicas.replicas()}


def _facts_of(replica: Replica, now: float) -> ReplicaFacts:
    sample, circuit = replica.sample, replica.circuit
    connection = replica.connections[0]  # of RESP 2, which every replica has; it also tells the offsets
    is_syncing = sample is not None and sample.is_syncing  # its offset proves nothing
    until = replica.shard.history.proven_until(replica.stamp)
    return ReplicaFacts(
        stage=replica.stage.value,
        zone=replica.zone,
        is_connected=connection is not None and not connection.is_closed,
        outstanding=replica.outstanding(),
        latency_seconds=replica.latency_seconds,
        offset=None if sample is None else sample.point.offset,
        replid="" if sample is None else sample.point.replid.decode("ascii", "backslashreplace"),
        lag_bytes=_lag_of(replica),
        staleness_seconds=None if until is None or is_syncing else max(0.0, now - until),
        reads_total=replica.reads_total,
        mismatched_keys=replica.mismatched,
        why_not="" if replica.is_readable else replica.why_not,
        verified_at=replica.verified_at,
        address=replica.address,
        primary_id=replica.shard.primary.id,
        circuit=circuit.state.value,
        circuit_share=circuit.share,
        circuit_why="" if circuit.state is CircuitState.CLOSED else circuit.why,
        circuit_openings_total=circuit.openings_total,
    )


def _lag_of(replica: Replica) -> int | None:
    """In bytes, as far as is known; at least 0, because the replica's sample may be the newer one."""
    ours, primary = replica.sample, replica.shard.sample
    if ours is None or primary is None or ours.point.replid != primary.point.replid:
        return None
    return max(0, primary.point.offset - ours.point.offset)
