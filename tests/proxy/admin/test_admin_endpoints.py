"""The endpoints tell what the proxy knows, and say so when it does not know yet."""

import json
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from proxy.admin.endpoints import AdminState, facts_of_view, routes
from proxy.admin.http import ProblemError, Request, Response
from proxy.metrics import Family, Metrics, MetricType, Sample
from proxy.topology.keeper import Recorded
from routing.anomalies import Anomaly, AnomalyKind
from routing.slot import SLOT_COUNT
from routing.topology import (
    EMPTY_VIEW,
    UNOWNED,
    Address,
    Migration,
    MigrationKind,
    Node,
    Role,
    Shard,
    TopologyView,
)

A = Node("a" * 40, Address("10.0.0.1", 7000), Role.PRIMARY, config_epoch=3)
B = Node("b" * 40, Address("::1", 7001), Role.PRIMARY, is_failing=True)
R = Node(
    "c" * 40, Address("10.0.0.3", 7002), Role.REPLICA, primary_id=A.id, is_linked=False, hostname="r.example"
)
VIEW = TopologyView(
    revision=5,
    epoch=9,
    shards=(Shard(A, (R,)), Shard(B)),
    shard_of_slot=(0,) * 100 + (1,) * 50 + (0,) + (UNOWNED,) * (SLOT_COUNT - 151),
    migrations=(Migration((1, 2, 7), A.id, B.id, MigrationKind.STEPWISE),),
)
STATE = AdminState(
    view=lambda: VIEW,
    view_seen_at=lambda: 1_800_000_000.25,
    readiness=list,
    warnings=list,
    registry=CollectorRegistry(),
    recorded=lambda: Recorded(7, 1_800_000_000.0, "one", 1_800_000_000.5, ("one", "two")),
    anomalies=lambda: (
        Anomaly(AnomalyKind.SHARD_WITHOUT_REPLICA, "alone", (B.id,), since=1_800_000_000.0, subject=B.id),
    ),
)


async def get(
    state: AdminState, path: str, query: dict[str, list[str]] | None = None, accept: str = ""
) -> Response:
    [route] = [route for route in routes(state) if route.pattern == path]
    return await route.handlers["GET"](Request("GET", path, query or {}, {"accept": accept}))


async def test_health_is_200_and_lists_what_to_look_at() -> None:
    """Promise 8: what does not stop traffic does not make the proxy unhealthy."""
    calm = await get(STATE, "/healthz")
    assert (calm.status, json.loads(calm.body)) == (200, {"status": "ok", "warnings": []})
    worried = await get(replace(STATE, warnings=lambda: ["discovery fails"]), "/healthz")
    assert (worried.status, json.loads(worried.body)) == (
        200,
        {"status": "warning", "warnings": ["discovery fails"]},
    )


async def test_readiness_is_503_with_all_reasons_until_there_are_none() -> None:
    with pytest.raises(ProblemError, match="no view; stopping") as raised:
        await get(replace(STATE, readiness=lambda: ["no view", "stopping"]), "/readyz")
    response = raised.value.response()
    assert response.status == 503
    assert json.loads(response.body)["reasons"] == ["no view", "stopping"]
    assert (await get(STATE, "/readyz")).status == 200


async def test_only_health_is_answered_without_a_token() -> None:
    assert [route.pattern for route in routes(STATE) if route.is_open] == ["/healthz"]


async def test_metrics_are_exposed_in_the_format_that_was_asked_for() -> None:
    metrics = Metrics()
    family = Family("steadyread_reads_total", "Reads.", MetricType.COUNTER)
    metrics.register_source(lambda: [Sample(family, 3)])
    state = replace(STATE, registry=metrics.registry)
    plain = await get(state, "/metrics")
    assert plain.content_type.startswith("text/plain; version=")
    assert b"\nsteadyread_reads_total 3.0\n" in plain.body
    openmetrics = await get(state, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert openmetrics.content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.body.endswith(b"# EOF\n")


async def test_the_topology_view_is_told_whole() -> None:
    response = await get(STATE, "/v1/topology")
    assert json.loads(response.body) == {
        "epoch": 9,
        "revision": 5,
        "seen_at": "2027-01-15T08:00:00.250Z",
        "shards": [
            {
                "primary": {
                    "id": "a" * 40,
                    "address": "10.0.0.1:7000",
                    "hostname": "",
                    "role": "primary",
                    "state": "online",
                    "config_epoch": 3,
                },
                "replicas": [
                    {
                        "id": "c" * 40,
                        "address": "10.0.0.3:7002",
                        "hostname": "r.example",
                        "role": "replica",
                        "state": "unlinked",
                        "config_epoch": 0,
                        "primary_id": "a" * 40,
                    }
                ],
                "slot_ranges": [[0, 99], [150, 150]],
            },
            {
                "primary": {
                    "id": "b" * 40,
                    "address": "[::1]:7001",
                    "hostname": "",
                    "role": "primary",
                    "state": "failing",
                    "config_epoch": 0,
                },
                "replicas": [],
                "slot_ranges": [[100, 149]],
            },
        ],
        "migrations": [
            {
                "slot_ranges": [[1, 2], [7, 7]],
                "slot_count": 3,
                "source_id": "a" * 40,
                "target_id": "b" * 40,
                "kind": "stepwise",
            }
        ],
        "unowned_count": SLOT_COUNT - 151,
        "unowned_slot_ranges": [[151, 16383]],
        "anomalies": [
            {
                "kind": "shard_without_replica",
                "subject": B.id,
                "message": "alone",
                "nodes": [B.id],
                "slot_ranges": [],
                "evidence": {},
                "since": "2027-01-15T08:00:00.000Z",
            }
        ],
        "record": {
            "version": 7,
            "recorded_at": "2027-01-15T08:00:00.000Z",
            "discoverer": "one",
            "looked_at": "2027-01-15T08:00:00.500Z",
            "proxies": ["one", "two"],
        },
    }
    assert facts_of_view(VIEW, None)["seen_at"] is None


async def test_an_unseen_cluster_is_an_error_and_not_an_empty_one() -> None:
    with pytest.raises(ProblemError, match="has not been seen yet") as raised:
        await get(replace(STATE, view=lambda: EMPTY_VIEW), "/v1/topology")
    assert raised.value.status == 503


async def test_a_query_that_is_not_understood_is_refused() -> None:
    """Promise 9: ?epochs= must not be answered with the view of another epoch."""
    with pytest.raises(ProblemError, match="takes epoch, at, and got epochs") as raised:
        await get(STATE, "/v1/topology", query={"epochs": ["3"]})
    assert raised.value.status == 400
