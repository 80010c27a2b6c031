"""What the admin port answers at once: health, readiness, metrics, and the topology view of now or of a moment past."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from proxy.admin.acts import store_problems
from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.admin.query import moment_of, number_of
from proxy.store.records import ViewRecord, anomaly_content
from proxy.topology.event_facts import rfc3339
from proxy.topology.history import History
from proxy.topology.keeper import NOTHING_RECORDED, Recorded
from routing.anomalies import Anomaly
from routing.topology import UNOWNED, Migration, Node, Role, TopologyView, ranges

LoadOf = Callable[[Node], Mapping[str, object] | None]


@dataclass(frozen=True, slots=True)
class AdminState:
    """What the admin port may know of the proxy: questions that are answered at once and change nothing."""

    view: Callable[[], TopologyView]
    view_seen_at: Callable[
        [], float | None
    ]  # Unix seconds when the cluster last confirmed the view; None: never
    readiness: Callable[[], list[str]]  # why clients should not be sent here; empty means ready
    warnings: Callable[[], list[str]]  # what an operator should look at while the proxy serves on
    registry: CollectorRegistry
    history: History | None = None  # None: no record is kept, and nothing is known of the past
    recorded: Callable[[], Recorded] = lambda: NOTHING_RECORDED  # what the record says of itself
    anomalies: Callable[[], Sequence[Anomaly]] = tuple  # what is wrong with the map now
    load_of: LoadOf = lambda node: None  # what the node is asked at once; None: it is not known


def routes(state: AdminState) -> list[Route]:
    """The table that AdminServer takes."""

    async def healthz(request: Request) -> Response:
        """200 while the process works at all: what it cannot do now is a warning, and a reason in /readyz."""
        warnings = state.warnings()
        return Response.of_json({"status": "warning" if warnings else "ok", "warnings": warnings})

    async def readyz(request: Request) -> Response:
        reasons = state.readiness()
        if reasons:
            raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, "; ".join(reasons), more={"reasons": reasons})
        return Response.of_json({"status": "ready", "reasons": []})

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(HTTPStatus.OK, encode(state.registry), content_type)

    async def topology(request: Request) -> Response:
        request.refuse_query("epoch", "at")
        if request.query:
            return Response.of_json(await _facts_of_past(request, state.history))
        view = state.view()
        if view.revision == 0:
            raise ProblemError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the cluster has not been seen yet; /readyz says why",
                headers=[("Retry-After", "1")],
            )
        return Response.of_json(
            {
                **facts_of_view(view, state.view_seen_at(), state.load_of),
                "anomalies": [_facts_of_anomaly(anomaly) for anomaly in state.anomalies()],
                "record": _facts_of_record(state.recorded()),
            }
        )

    return [
        Route("/healthz", {"GET": healthz}, is_open=True),
        Route("/readyz", {"GET": readyz}),
        Route("/metrics", {"GET": metrics}),
        Route("/v1/topology", {"GET": topology}),
    ]


async def _facts_of_past(request: Request, history: History | None) -> dict[str, object]:
    """The version of the map that held at ``epoch`` or ``at``."""
    epoch, at = number_of(request, "epoch"), moment_of(request, "at", now=time.time())
    if epoch is not None and at is not None:
        raise ProblemError(HTTPStatus.BAD_REQUEST, "give either epoch or at: they may name different maps")
    if history is None:
        raise ProblemError(HTTPStatus.NOT_FOUND, "this proxy keeps no record of the past")
    with store_problems():
        record = await history.view_at(epoch=epoch, at=at)
        oldest = None if record is not None else await history.oldest_version()
    if record is not None and epoch is not None and epoch > record.view.epoch:
        newest = (await history.versions(1))[0].view.epoch
        if epoch > newest:
            raise ProblemError(
                HTTPStatus.NOT_FOUND, f"epoch {epoch} has not been seen: the newest is {newest}"
            )
    asked = f"epoch {epoch}" if at is None else rfc3339(at)
    if record is not None:
        return {**facts_of_view(record.view, record.at), "as_of": asked, **_facts_of_version(record)}
    if oldest is None:
        raise ProblemError(HTTPStatus.NOT_FOUND, "no map has been recorded yet", more={"oldest": None})
    raise ProblemError(
        HTTPStatus.NOT_FOUND,
        f"no map as of {asked} is kept: the oldest is version {oldest.number}, of epoch {oldest.view.epoch}, "
        f"recorded at {rfc3339(oldest.at)}",
        more={"oldest": _facts_of_version(oldest)},
    )


def _facts_of_version(record: ViewRecord) -> dict[str, object]:
    return {
        "version": record.number,
        "epoch": record.view.epoch,
        "recorded_at": rfc3339(record.at),
        "recorded_by": record.writer,
    }


def facts_of_view(
    view: TopologyView, seen_at: float | None, load_of: LoadOf = lambda node: None
) -> dict[str, object]:
    """A view for JSON. Slot ranges are inclusive [first, last] pairs."""

    def node_facts(node: Node) -> dict[str, object]:
        facts, load = _facts_of_node(node), load_of(node)
        return facts if load is None else {**facts, "load": load}

    return {
        "epoch": view.epoch,
        "revision": view.revision,
        "seen_at": None if seen_at is None else rfc3339(seen_at),
        "shards": [
            {
                "primary": node_facts(shard.primary),
                "replicas": [node_facts(replica) for replica in shard.replicas],
                "slot_ranges": [list(pair) for pair in view.slot_ranges_of(index)],
            }
            for index, shard in enumerate(view.shards)
        ],
        "migrations": [_facts_of_migration(migration) for migration in view.migrations],
        "unowned_count": view.unowned_count,
        "unowned_slot_ranges": [list(pair) for pair in view.slot_ranges_of(UNOWNED)],
    }


def _facts_of_anomaly(anomaly: Anomaly) -> dict[str, object]:
    return {**anomaly_content(anomaly), "since": rfc3339(anomaly.since)}


def _facts_of_record(recorded: Recorded) -> dict[str, object]:
    """Of the newest version of the map on record that this proxy knows, and of who looks at the cluster."""
    return {
        "version": recorded.number or None,
        "recorded_at": None if recorded.at is None else rfc3339(recorded.at),
        "discoverer": recorded.discoverer or None,
        "looked_at": None if recorded.looked_at is None else rfc3339(recorded.looked_at),
        "proxies": list(recorded.proxies),
    }


def _facts_of_node(node: Node) -> dict[str, object]:
    facts: dict[str, object] = {
        "id": node.id,
        "address": str(node.address),
        "hostname": node.hostname,
        "role": node.role.value,
        "state": "failing" if node.is_failing else "online" if node.is_linked else "unlinked",
        "config_epoch": node.config_epoch,
    }
    if node.role is Role.REPLICA:
        facts["primary_id"] = node.primary_id
    return facts


def _facts_of_migration(migration: Migration) -> dict[str, object]:
    return {
        "slot_ranges": [list(pair) for pair in ranges(migration.slots)],
        "slot_count": len(migration.slots),
        "source_id": migration.source_id,
        "target_id": migration.target_id,
        "kind": migration.kind.value,
    }
