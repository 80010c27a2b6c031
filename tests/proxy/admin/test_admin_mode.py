"""/v1/mode shows the routing mode and sets it by compare-and-set, and each refusal says what and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import trio

from proxy.admin.http import ProblemError, Request
from proxy.admin.mode import routes
from proxy.admin.server import AdminServer
from proxy.store.interface import Put
from proxy.store.memory import MemoryStore
from proxy.store.records import AUDIT_HEAD
from proxy.topology.audit import read_page
from proxy.topology.mode import ModeKeeper
from routing.audit import AuditRecord
from routing.levels import Level
from tests.proxy.failing_store import FailingStore

JSON = {"content-type": "application/json"}
STRONG = {"mode": "strong", "revision": 0}


def keeper_of(store: MemoryStore) -> ModeKeeper:
    return ModeKeeper(store, "p1", now=lambda: 1_800_000_000.0)


async def get(keeper: ModeKeeper) -> dict[str, Any]:
    [route] = routes(keeper)
    response = await route.handlers["GET"](Request("GET", "/v1/mode", {}, {}))
    assert response.status == 200
    return dict(json.loads(response.body))


async def put(
    keeper: ModeKeeper, body: object, headers: Mapping[str, str] = JSON, peer: str = "10.0.0.7:4711"
) -> dict[str, Any]:
    [route] = routes(keeper)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await route.handlers["PUT"](Request("PUT", "/v1/mode", {}, headers, raw, peer=peer))
    assert response.status == 200
    return dict(json.loads(response.body))


async def problem(keeper: ModeKeeper, body: object, headers: Mapping[str, str] = JSON) -> dict[str, Any]:
    with pytest.raises(ProblemError) as raised:
        await put(keeper, body, headers)
    return dict(json.loads(raised.value.response().body))


async def test_the_mode_and_all_modes_are_shown() -> None:
    facts = await get(keeper_of(MemoryStore()))
    modes = facts.pop("modes")
    assert facts == {
        "mode": "strong",
        "revision": 0,
        "at": None,
        "who": None,
        "given": "strong",
        "problems": [],
    }
    assert [(mode["name"], mode["routes"]) for mode in modes] == [(mode.value, True) for mode in Level]
    assert modes[0]["note"] == "reads go to the slot's primary"
    assert modes[1]["note"].startswith("reads go to replicas that prove to be as new as the primary was")


async def test_a_mode_that_does_not_route_says_so() -> None:
    keeper = ModeKeeper(MemoryStore(), "p1", routed=frozenset({Level.STRONG, Level.SESSION}))
    facts = await get(keeper)
    assert [mode["name"] for mode in facts["modes"] if mode["routes"]] == ["strong", "session"]
    [eventual] = (mode for mode in facts["modes"] if mode["name"] == "eventual")
    assert eventual["note"].endswith(
        "; eventual comes with its level; this version routes strong and session only"
    )
    answer = await problem(keeper, {"mode": "eventual", "revision": 0})
    assert (answer["status"], answer["detail"]) == (
        422,
        "eventual comes with its level; this version routes strong and session only",
    )


async def test_mode_snapshot_wants_a_snapshot_that_serves() -> None:
    """409 without the current state, because nobody else has changed it; and then a problem when it has ended."""
    current: list[int] = []
    store = MemoryStore()
    keeper = ModeKeeper(store, "p1", current_snapshot=lambda: current[0] if current else None)
    answer = await problem(keeper, {"mode": "snapshot", "revision": 0})
    assert (answer["status"], "current" in answer, await store.revision()) == (409, False, 0)
    assert "no snapshot serves" in answer["detail"]
    assert "steadyread snapshot open" in answer["detail"]
    current.append(7)
    facts = await put(keeper, {"mode": "snapshot", "revision": 0})
    assert (facts["mode"], facts["given"], facts["problems"]) == ("snapshot", "snapshot", [])
    current.clear()
    [told] = (await get(keeper))["problems"]
    assert "every read that chooses no level is refused; open a snapshot, or choose another mode" in told


async def test_setting_answers_with_the_new_state_and_records_who() -> None:
    store = MemoryStore()
    keeper = keeper_of(store)
    headers = {"content-type": "Application/JSON; charset=utf-8", "x-steadyread-operator": "anna@web1"}
    facts = await put(keeper, STRONG, headers)
    assert (facts["mode"], facts["revision"], facts["who"]) == ("strong", 1, "anna@web1")
    assert facts["at"] == "2027-01-15T08:00:00.000Z"
    assert await get(keeper) == facts
    await put(keeper, {"mode": "strong", "revision": 1}, peer="")
    records = (await read_page(store, 1, 10)).records
    assert [(record.who, record.origin) for record in records if isinstance(record, AuditRecord)] == [
        ("anna@web1", "10.0.0.7:4711"),
        ("admin", ""),
    ]


async def test_a_past_revision_is_409_with_the_state_that_is() -> None:
    keeper = keeper_of(MemoryStore())
    await put(keeper, STRONG)
    answer = await problem(keeper, STRONG)
    assert answer["status"] == 409
    assert answer["current"] == {
        "mode": "strong",
        "revision": 1,
        "at": "2027-01-15T08:00:00.000Z",
        "who": "admin",
    }


@pytest.mark.parametrize(
    ("body", "headers", "status", "detail"),
    [
        (STRONG, {}, 415, "takes Content-Type: application/json"),
        (STRONG, {"content-type": "text/plain"}, 415, "takes Content-Type: application/json"),
        (STRONG, {"content-type": "application/x-www-form-urlencoded"}, 415, "takes Content-Type"),
        (b"{", JSON, 400, "the body is not JSON"),
        (b"\xff", JSON, 400, "the body is not JSON"),
        (b"[" * 100_000, JSON, 400, "the body is not JSON"),
        (["strong", 0], JSON, 400, 'a JSON object with "mode" and "revision"'),
        ({"mode": "strong"}, JSON, 400, 'a JSON object with "mode" and "revision"'),
        ({**STRONG, "force": True}, JSON, 400, 'a JSON object with "mode" and "revision"'),
        ({"mode": "fast", "revision": 0}, JSON, 422, '"mode" is one of strong, caught_up, bounded_staleness'),
        ({"mode": ["strong"], "revision": 0}, JSON, 422, '"mode" is one of'),
        ({"mode": "strong", "revision": "0"}, JSON, 422, '"revision" is the one that GET shows'),
        ({"mode": "strong", "revision": False}, JSON, 422, '"revision" is the one that GET shows'),
        ({"mode": "strong", "revision": -1}, JSON, 422, '"revision" is the one that GET shows'),
        ({"mode": "snapshot", "revision": 0}, JSON, 409, "no snapshot serves"),
        (STRONG, {**JSON, "x-steadyread-operator": " "}, 400, "X-Steadyread-Operator takes a name"),
        (STRONG, {**JSON, "x-steadyread-operator": "a" * 129}, 400, "X-Steadyread-Operator takes a name"),
        (STRONG, {**JSON, "x-steadyread-operator": "a\x1b[2J"}, 400, "X-Steadyread-Operator takes a name"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_reason_and_leaves_nothing(
    body: object, headers: dict[str, str], status: int, detail: str
) -> None:
    """Promise 9. A page in a browser cannot send application/json to another site unasked, hence 415."""
    store = MemoryStore()
    answer = await problem(keeper_of(store), body, headers)
    assert answer["status"] == status
    assert detail in answer["detail"]
    assert await store.revision() == 0


async def test_without_the_store_setting_is_503_and_asking_still_works() -> None:
    store = FailingStore()
    keeper = keeper_of(store)
    store.is_down = True
    with pytest.raises(ProblemError, match="the topology store is out of reach: the disk is full") as raised:
        await put(keeper, STRONG)
    response = raised.value.response()
    assert response.status == 503
    assert ("Retry-After", "1") in response.headers
    assert (await get(keeper))["mode"] == "strong"


async def test_a_damaged_log_refuses_the_act_and_says_why() -> None:
    store = MemoryStore()
    await store.commit([Put(AUDIT_HEAD, b"\xc1")])
    answer = await problem(keeper_of(store), STRONG)
    assert answer["status"] == 500
    assert "the store's audit head is damaged" in answer["detail"]


async def test_the_origin_is_the_address_of_the_other_end() -> None:
    """Over a real socket, as `127.0.0.1:PORT`."""
    store = MemoryStore()
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = AdminServer(routes(keeper_of(store)))
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: server.serve([listener], task_status=task_status))
        stream = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        body = json.dumps(STRONG).encode()
        head = "PUT /v1/mode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        await stream.send_all(head.encode() + b"\r\n\r\n" + body)
        assert (await stream.receive_some(100)).startswith(b"HTTP/1.1 200 ")
        port = stream.socket.getsockname()[1]
        await stream.aclose()
        server.stop()
    [record] = (await read_page(store, 1, 10)).records
    assert isinstance(record, AuditRecord)
    assert record.origin == f"127.0.0.1:{port}"
