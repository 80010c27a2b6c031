"""``/v1/replicas``: how each replica fares, as the record has it, and as this proxy sees it now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from proxy.admin.acts import store_problems
from proxy.admin.http import Request, Response, Route
from proxy.topology.event_facts import rfc3339
from proxy.topology.history import History
from routing.names import key_text
from routing.replicas import ReplicaFacts, ReplicaRecord

_NOT_RECORDED = {"state": None, "since": None, "replid": None, "offset": None}


def routes(history: History, live: Callable[[], Mapping[str, ReplicaFacts]] = dict) -> list[Route]:
    """GET ``/v1/replicas``. ``live`` gives node id -> what this proxy knows of it now.

    ``offset`` is that of the moment of ``since``, in the history ``replid``; the one in ``live`` is of now.
    """

    async def get(request: Request) -> Response:
        request.refuse_query()
        with store_problems():
            records = await history.replicas()
        return Response.of_json({"replicas": _merged(records, live())})

    return [Route("/v1/replicas", {"GET": get})]


def _merged(records: Iterable[ReplicaRecord], live: Mapping[str, ReplicaFacts]) -> list[dict[str, object]]:
    """Those on record, then those that only this proxy knows, by node id."""
    merged = [_facts_of_record(record, live.get(record.node_id)) for record in records]
    recorded = {facts["id"] for facts in merged}
    merged += [_facts_of_unrecorded(node_id, live[node_id]) for node_id in sorted(live.keys() - recorded)]
    return merged


def _facts_of_record(record: ReplicaRecord, facts: ReplicaFacts | None) -> dict[str, object]:
    return {
        "id": record.node_id,
        "address": str(record.address),
        "primary_id": record.primary_id,
        "state": record.state.value,
        "since": rfc3339(record.since),
        "replid": record.replid or None,
        "offset": record.offset,
        "live": None if facts is None else _facts_of_live(facts),
    }


def _facts_of_unrecorded(node_id: str, facts: ReplicaFacts) -> dict[str, object]:
    return {
        "id": node_id,
        "address": None if facts.address is None else str(facts.address),
        "primary_id": facts.primary_id or None,
        **_NOT_RECORDED,
        "live": _facts_of_live(facts),
    }


def _facts_of_live(facts: ReplicaFacts) -> dict[str, object]:
    return {
        "stage": facts.stage,
        "zone": facts.zone or None,
        "is_connected": facts.is_connected,
        "outstanding": facts.outstanding,
        "latency_seconds": facts.latency_seconds,
        "offset": facts.offset,
        "replid": facts.replid or None,
        "lag_bytes": facts.lag_bytes,
        "staleness_seconds": facts.staleness_seconds,
        "reads_total": facts.reads_total,
        "mismatched_keys": [key_text(key) for key in facts.mismatched_keys],
        "why_not": facts.why_not or None,
        "circuit": {
            "state": facts.circuit,
            "share": facts.circuit_share,
            "why": facts.circuit_why or None,
            "openings_total": facts.circuit_openings_total,
        },
        "verified_at": None if facts.verified_at is None else rfc3339(facts.verified_at),
    }
