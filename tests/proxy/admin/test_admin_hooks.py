"""What the admin port tells of hooks, and what an operator can do about dead letters."""

from __future__ import annotations

import json

import pytest

from proxy.admin.hooks import routes
from proxy.admin.http import ProblemError, Request, RouteTable
from proxy.hooks.records import DeadLetter, letter_key, pack_letter, pack_position, position_key, read_letters
from proxy.settings import HookSettings
from proxy.store.interface import Put
from proxy.store.memory import MemoryStore
from proxy.topology.audit import read_page
from routing.hook_delivery import HookPosition

HOOKS = (
    HookSettings(name="pager", command=("page", "s3cret")),
    HookSettings(name="mail", url="http://h/s3cret", authorization="s3cret"),
)


async def ask(store: MemoryStore, method: str, path: str) -> tuple[int, dict[str, list[dict[str, object]]]]:
    table = RouteTable(routes(store, HOOKS))
    match = table.find(path)
    assert match is not None
    headers = {"content-type": "application/json"} if method == "POST" else {}
    request = Request(method, path, {}, headers, b"{}", match.parameters)
    try:
        response = await table.handler_of(match, request)(request)
    except ProblemError as problem:
        response = problem.response()
    return response.status.value, json.loads(response.body)


async def test_hooks_are_listed_with_how_they_fare_and_without_secrets() -> None:
    """One that never ran has no position; command, URL and authorization are not told."""
    store = MemoryStore()
    position = HookPosition("k", 6, 1.0, 2.0, 3, 7, "nobody answers")
    letter = Put(letter_key("pager", 5), pack_letter(DeadLetter(5, 8, "no", 1.5)))
    await store.commit([Put(position_key("pager"), pack_position(position)), letter])
    status, answer = await ask(store, "GET", "/v1/hooks")
    pager, mail = answer["hooks"]
    assert status == 200
    assert (pager["position"], pager["failed_attempts"], pager["failing_event"]) == (6, 3, 7)
    assert (pager["delivered_at"], pager["failing_since"]) == (
        "1970-01-01T00:00:01.000Z",
        "1970-01-01T00:00:02.000Z",
    )
    assert (pager["last_error"], pager["dead_letter_count"]) == ("nobody answers", 1)
    assert (mail["kind"], mail["position"], mail["dead_letter_count"]) == ("url", None, 0)
    assert "s3cret" not in str(answer)


async def test_a_dead_letter_is_listed_retried_and_removed() -> None:
    """Asking marks it for the runner; removing it is final; what is not there is 404."""
    store = MemoryStore()
    await store.commit([Put(letter_key("pager", 5), pack_letter(DeadLetter(5, 8, "no", 1.5)))])
    path = "/v1/hooks/pager/dead-letters"
    _, answer = await ask(store, "GET", path)
    assert answer["dead_letters"] == [
        {
            "event_number": 5,
            "attempts": 8,
            "last_error": "no",
            "at": "1970-01-01T00:00:01.500Z",
            "retry_asked_at": None,
        }
    ]
    assert (await ask(store, "POST", f"{path}/5/retry"))[0] == 202
    assert [record.act for record in (await read_page(store, 1, 9)).records] == ["hook_retry"]
    assert (await read_letters(store, "pager"))[0].retry_asked_at is not None
    assert (await ask(store, "DELETE", f"{path}/5"))[0] == 200
    assert await read_letters(store, "pager") == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/hooks/none/dead-letters", 404),
        ("POST", "/v1/hooks/pager/dead-letters/9/retry", 404),
        ("DELETE", "/v1/hooks/pager/dead-letters/9", 404),
        ("DELETE", "/v1/hooks/pager/dead-letters/x", 400),
    ],
)
async def test_what_is_not_there_is_said(method: str, path: str, status: int) -> None:
    """A wrong name or number is the caller's fault, and named."""
    assert (await ask(MemoryStore(), method, path))[0] == status


async def test_a_damaged_position_is_500() -> None:
    """Asking again would not help, so nobody is told to."""
    store = MemoryStore()
    await store.commit([Put(position_key("pager"), b"\xc1")])
    assert (await ask(store, "GET", "/v1/hooks"))[0] == 500


async def test_a_store_that_is_gone_is_503() -> None:
    """The caller may ask again; the proxy serves on."""
    store = MemoryStore()
    await store.aclose()
    assert (await ask(store, "GET", "/v1/hooks"))[0] == 503
