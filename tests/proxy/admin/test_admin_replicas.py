"""/v1/replicas puts what this proxy sees of each replica now beside what the record says of it for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from proxy.admin.http import ProblemError, Request
from proxy.admin.replicas import routes
from proxy.store.interface import Put
from proxy.store.memory import MemoryStore
from proxy.store.records import REPLICAS, pack_replica
from proxy.topology.history import History
from routing.replicas import ReplicaFacts, ReplicaRecord, ReplicaState
from routing.topology import Address
from tests.proxy.failing_store import FailingStore

A, B, C = "a" * 40, "b" * 40, "c" * 40
RECORD = ReplicaRecord(A, Address("10.0.0.1", 6379), C, ReplicaState.ONLINE, 1_800_000_000.0, "1" * 40, 700)
FACTS = ReplicaFacts(
    stage="readable",
    zone="eu-1a",
    is_connected=True,
    outstanding=2,
    latency_seconds=0.0005,
    offset=900,
    replid="1" * 40,
    lag_bytes=12,
    staleness_seconds=0.04,
    reads_total=5,
    mismatched_keys=(),
    why_not="",
    verified_at=1_800_000_001.5,
)
QUARANTINED = replace(
    FACTS,
    stage="quarantined",
    zone="",
    is_connected=False,
    latency_seconds=None,
    offset=None,
    replid="",
    lag_bytes=None,
    staleness_seconds=None,
    mismatched_keys=(b"k\xff", b"\n"),
    why_not="it is quarantined",
    verified_at=None,
    address=Address("::1", 6380),
    primary_id=C,
)


async def store_of(*records: ReplicaRecord) -> MemoryStore:
    store = MemoryStore()
    await store.commit([Put(f"{REPLICAS}{record.node_id}", pack_replica(record)) for record in records])
    return store


async def get(store: MemoryStore, live: Mapping[str, ReplicaFacts] | None) -> list[dict[str, Any]]:
    history = History(store)
    [route] = routes(history) if live is None else routes(history, lambda: live)
    response = await route.handlers["GET"](Request("GET", "/v1/replicas", {}, {}))
    assert response.status == 200
    replicas: list[dict[str, Any]] = json.loads(response.body)["replicas"]
    return replicas


async def test_the_record_and_what_is_live_stand_side_by_side() -> None:
    [facts] = await get(await store_of(RECORD), {A: FACTS})
    live = facts.pop("live")
    assert facts == {
        "id": A,
        "address": "10.0.0.1:6379",
        "primary_id": C,
        "state": "online",
        "since": "2027-01-15T08:00:00.000Z",
        "replid": "1" * 40,
        "offset": 700,
    }
    assert live == {
        "stage": "readable",
        "zone": "eu-1a",
        "is_connected": True,
        "outstanding": 2,
        "latency_seconds": 0.0005,
        "offset": 900,
        "replid": "1" * 40,
        "lag_bytes": 12,
        "staleness_seconds": 0.04,
        "reads_total": 5,
        "mismatched_keys": [],
        "why_not": None,
        "circuit": {"state": "closed", "share": 1.0, "why": None, "openings_total": 0},
        "verified_at": "2027-01-15T08:00:01.500Z",
    }


async def test_a_circuit_shows_its_state_its_share_and_why() -> None:
    facts = replace(
        FACTS,
        circuit="returning",
        circuit_share=0.2,
        circuit_why="it owes replies",
        circuit_openings_total=3,
    )
    [shown] = await get(await store_of(RECORD), {A: facts})
    assert shown["live"]["circuit"] == {
        "state": "returning",
        "share": 0.2,
        "why": "it owes replies",
        "openings_total": 3,
    }


async def test_one_that_this_proxy_does_not_know_has_nothing_live() -> None:
    store = await store_of(RECORD)
    for live in (None, {}):
        [facts] = await get(store, live)
        assert (facts["state"], facts["live"]) == ("online", None)


async def test_one_that_is_not_on_record_is_listed_too() -> None:
    """With its mismatched keys as text, whatever they hold."""
    recorded, unrecorded = await get(await store_of(RECORD), {B: QUARANTINED, A: FACTS})
    assert recorded["id"] == A
    live = unrecorded.pop("live")
    assert unrecorded == {
        "id": B,
        "address": "[::1]:6380",
        "primary_id": C,
        "state": None,
        "since": None,
        "replid": None,
        "offset": None,
    }
    assert live["mismatched_keys"] == ["k\\xff", "\\n"]
    assert live["why_not"] == "it is quarantined"
    unknown = ("zone", "latency_seconds", "offset", "replid", "lag_bytes", "staleness_seconds", "verified_at")
    assert {live[name] for name in unknown} == {None}


async def test_without_the_store_it_is_503() -> None:
    store = FailingStore()
    store.is_down = True
    with pytest.raises(ProblemError, match="the topology store is out of reach") as raised:
        await get(store, {A: FACTS})
    assert raised.value.status == 503
