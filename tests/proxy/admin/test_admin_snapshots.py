"""/v1/snapshots opens, lists, shows and closes snapshots, and each refusal says what and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from proxy.admin.http import ProblemError, Request, Response, RouteTable
from proxy.admin.snapshots import routes
from proxy.store.interface import StoreUnavailableError
from proxy.topology.audit import Operator
from routing.levels import Level
from tests.proxy.snapshot_desk import ABORTED, PlainDesk, facts_of

JSON = {"content-type": "application/json"}
PEER = "10.0.0.7:4711"


async def answer(
    desk: PlainDesk,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] = JSON,
    mode: Level = Level.STRONG,
) -> Response:
    table = RouteTable(routes(desk, lambda: mode, open_deadline_seconds=5.0))
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    match = table.find(path)
    assert match is not None
    request = Request(method, path, {}, headers, raw, dict(match.parameters), PEER)
    response = await table.handler_of(match, request)(request)
    assert isinstance(response, Response)
    return response


async def ask(desk: PlainDesk, method: str, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    response = await answer(desk, method, path, *args, **kwargs)
    return dict(json.loads(response.body))


async def problem(desk: PlainDesk, *args: Any, **kwargs: Any) -> dict[str, Any]:
    with pytest.raises(ProblemError) as raised:
        await answer(desk, *args, **kwargs)
    return dict(json.loads(raised.value.response().body))


async def test_all_are_listed_and_which_is_current() -> None:
    assert await ask(PlainDesk(), "GET", "/v1/snapshots") == {"current": None, "snapshots": []}
    desk = PlainDesk([facts_of(5), facts_of(6), facts_of(7, ABORTED, reason="budget: it is 25 h old")])
    facts = await ask(desk, "GET", "/v1/snapshots")
    assert facts["current"] == 6
    assert [(each["id"], each["state"], each["reason"]) for each in facts["snapshots"]] == [
        (5, "serving", None),
        (6, "serving", None),
        (7, "aborted", "budget: it is 25 h old"),
    ]


async def test_one_is_shown_with_its_costs_and_warnings() -> None:
    desk = PlainDesk(
        [facts_of(7, name="é", expires_at=1_800_000_600.5, owner="p1", warnings=("a writer bypasses it",))]
    )
    assert await ask(desk, "GET", "/v1/snapshots/7") == {
        "id": 7,
        "name": "é",
        "state": "serving",
        "opened_at": "2027-01-15T08:00:00.000Z",
        "age_seconds": 60.0,
        "expires_at": "2027-01-15T08:10:00.500Z",
        "epoch": 12,
        "reason": None,
        "opened_by": "p1",
        "keys_preserved": 3,
        "bytes_preserved": 700,
        "keys_too_large": 1,
        "preserves": 4,
        "preserve_seconds_mean": 0.0005,
        "preserve_seconds_max": 0.001,
        "barrier_seconds": 0.0125,
        "warnings": ["a writer bypasses it"],
    }


@pytest.mark.parametrize(
    ("body", "name", "ttl_seconds"),
    [
        ({}, "", None),
        ({"name": None, "ttl_seconds": None}, "", None),
        ({"name": "report"}, "report", None),
        ({"name": "report", "ttl_seconds": 600}, "report", 600),
        ({"ttl_seconds": 0}, "", 0),
        ({"ttl_seconds": 0.5}, "", 0.5),
    ],
)
async def test_opening_is_201_with_where_it_is(body: object, name: str, ttl_seconds: float | None) -> None:
    desk = PlainDesk()
    response = await answer(
        desk, "POST", "/v1/snapshots", body, {**JSON, "x-steadyread-operator": "anna@web1"}
    )
    assert (response.status, response.headers) == (201, (("Location", "/v1/snapshots/7"),))
    facts = json.loads(response.body)
    assert (facts["id"], facts["state"]) == (7, "serving")
    assert facts == await ask(desk, "GET", "/v1/snapshots/7")
    assert desk.asked == [("open", name, ttl_seconds, Operator("anna@web1", PEER))]


async def test_closing_answers_with_the_record_and_names_the_operator() -> None:
    desk = PlainDesk([facts_of(7)])
    facts = await ask(desk, "DELETE", "/v1/snapshots/7", b"", {})
    assert (facts["id"], facts["state"]) == (7, "closed")
    assert desk.asked == [("close", 7, Operator("admin", PEER))]


@pytest.mark.parametrize(
    ("body", "headers", "status", "detail"),
    [
        ({}, {}, 415, "takes Content-Type: application/json"),
        (b"{", JSON, 400, "the body is not JSON"),
        ([], JSON, 400, 'a JSON object with "name" and "ttl_seconds", or without'),
        ({"ttl": 5}, JSON, 400, 'a JSON object with "name" and "ttl_seconds", or without'),
        ({"name": 7}, JSON, 422, '"name" is a text, or null'),
        ({"name": "a\n"}, JSON, 422, '"name": a snapshot\'s name is at most 128 printable characters'),
        ({"name": "\ud800"}, JSON, 422, "printable characters"),
        ({"name": "x" * 129}, JSON, 422, "printable characters"),
        ({"ttl_seconds": -1}, JSON, 422, '"ttl_seconds": a snapshot\'s TTL is a number of seconds, at most'),
        ({"ttl_seconds": "600"}, JSON, 422, "0 means that it stays open until it is closed"),
        ({"ttl_seconds": True}, JSON, 422, "a number of seconds"),
        (b'{"ttl_seconds": NaN}', JSON, 422, "a number of seconds"),
        (b'{"ttl_seconds": 1e999}', JSON, 422, "a number of seconds"),
        ({}, {**JSON, "x-steadyread-operator": " "}, 400, "X-Steadyread-Operator takes a name"),
    ],
)
async def test_what_cannot_be_opened_is_refused_with_the_reason_and_leaves_nothing(
    body: object, headers: dict[str, str], status: int, detail: str
) -> None:
    """Promise 9."""
    desk = PlainDesk()
    found = await problem(desk, "POST", "/v1/snapshots", body, headers)
    assert found["status"] == status
    assert detail in found["detail"]
    assert desk.asked == []


@pytest.mark.parametrize(
    ("text", "status", "has_retry"),
    [
        ("ERR node 10.0.0.1:6379 evicts keys; set its maxmemory-policy to noeviction", 409, False),
        ("SNAPSHOTOPEN 8 snapshots are open (setting snapshots.open_max); close one", 409, False),
        ("NOTREADY the topology store did not answer; try again", 503, True),
    ],
)
async def test_an_opening_that_fails_says_why(text: str, status: int, has_retry: bool) -> None:
    desk = PlainDesk(problem=text)
    with pytest.raises(ProblemError) as raised:
        await answer(desk, "POST", "/v1/snapshots", {})
    response = raised.value.response()
    facts = json.loads(response.body)
    assert (facts["status"], f"{facts['code']} {facts['detail']}") == (status, text)
    assert (("Retry-After", "1") in response.headers) is has_retry


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("text", ["8", "x", "-7", "07", "7" * 19, "٧"])
async def test_what_is_not_there_is_404(method: str, text: str) -> None:
    desk = PlainDesk([facts_of(7)])
    found = await problem(desk, method, f"/v1/snapshots/{text}", b"", {})
    assert (found["status"], desk.asked) == (404, [])
    assert found["detail"].startswith("there is no snapshot ")


async def test_one_that_has_ended_cannot_be_closed() -> None:
    found = await problem(PlainDesk([facts_of(7, ABORTED)]), "DELETE", "/v1/snapshots/7", b"", {})
    assert (found["status"], found["code"], found["detail"]) == (
        409,
        "ERR",
        "snapshot 7 is aborted already",
    )


async def test_the_last_that_serves_cannot_be_closed_while_the_mode_is_snapshot() -> None:
    """Or reads that choose no level would all be refused; of two, one may go."""
    desk = PlainDesk([facts_of(5, ABORTED), facts_of(6), facts_of(7)])
    await ask(desk, "DELETE", "/v1/snapshots/7", b"", {}, mode=Level.SNAPSHOT)
    desk.asked.clear()
    found = await problem(desk, "DELETE", "/v1/snapshots/6", b"", {}, mode=Level.SNAPSHOT)
    assert (found["status"], found["code"]) == (409, "SNAPSHOTOPEN")
    assert "choose another mode first" in found["detail"]
    assert desk.asked == []
    await ask(desk, "DELETE", "/v1/snapshots/6", b"", {}, mode=Level.STRONG)


async def test_without_the_store_it_is_503() -> None:
    class Lost(PlainDesk):
        async def open(self, *_: object) -> Any:
            raise StoreUnavailableError("the disk is full")

    found = await problem(Lost(), "POST", "/v1/snapshots", {})
    assert (found["status"], found["detail"]) == (503, "the topology store is out of reach: the disk is full")


async def test_an_opening_may_take_its_time() -> None:
    """Longer than other requests, which end after 10 s."""
    [of_all, _] = routes(PlainDesk(), lambda: Level.STRONG, open_deadline_seconds=30.0)
    assert of_all.deadline_seconds == 40.0
