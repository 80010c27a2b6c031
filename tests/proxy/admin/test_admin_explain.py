"""/v1/explain answers with the whole of a read's way, and says what is wrong with a question."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.admin.explain import routes
from proxy.admin.http import ProblemError, Request
from routing.explain import ExplainError, as_json
from routing.levels import STRONG, Level, ReadLevel
from tests.routing.test_explain import EXPLANATION

JSON = {"content-type": "application/json"}


async def ask(body: object, headers: dict[str, str] = JSON) -> tuple[dict[str, Any], list[object]]:
    """The answer, and what the explanation was asked for."""
    asked: list[object] = []

    async def explain(command: list[bytes], level: ReadLevel | None) -> object:
        asked.extend([command, level])
        return EXPLANATION

    [route] = routes(explain)  # type: ignore[arg-type]  # it does give an Explanation
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await route.handlers["POST"](Request("POST", "/v1/explain", {}, headers, raw))
    assert response.status == 200
    return json.loads(response.body), asked


@pytest.mark.parametrize(
    ("name", "level"),
    [
        (None, None),
        ("auto", None),
        ("strong", STRONG),
        ("caught_up", ReadLevel(Level.CAUGHT_UP)),
        ("bounded_staleness 2000", ReadLevel(Level.BOUNDED_STALENESS, 2.0)),
        ("bounded_staleness 0.5", ReadLevel(Level.BOUNDED_STALENESS, 0.0005)),
        ("snapshot", ReadLevel(Level.SNAPSHOT)),
        ("snapshot current", ReadLevel(Level.SNAPSHOT)),
        ("snapshot 7", ReadLevel(Level.SNAPSHOT, snapshot_id=7)),
    ],
)
async def test_a_read_is_explained_at_the_level_that_is_named(
    name: str | None, level: ReadLevel | None
) -> None:
    """Named as the answer names it."""
    answer, asked = await ask({"command": ["GET", "é"], "level": name})
    assert answer == json.loads(json.dumps(as_json(EXPLANATION)))
    assert asked == [[b"GET", b"\xc3\xa9"], level]
    assert name in (None, "auto", "snapshot", str(level))


def at(level: object) -> dict[str, object]:
    return {"command": ["GET", "k"], "level": level}


def of(command: object) -> dict[str, object]:
    return {"command": command, "level": None}


BOUND = "bounded_staleness takes its bound in milliseconds, above 0 and at most 86400000"


@pytest.mark.parametrize(
    ("body", "headers", "status", "detail"),
    [
        (at(None), {}, 415, "takes Content-Type: application/json"),
        (b"{", JSON, 400, "the body is not JSON"),
        ({"command": ["GET", "k"]}, JSON, 400, 'a JSON object with "command" and "level"'),
        ({**at(None), "x": 1}, JSON, 400, 'a JSON object with "command" and "level"'),
        (of("GET k"), JSON, 422, '"command" is a list of texts'),
        (of([]), JSON, 422, '"command" is a list of texts'),
        (of(["GET", 1]), JSON, 422, '"command" is a list of texts'),
        (of(["GET", "\ud800"]), JSON, 422, '"command" is a list of texts'),
        (of(["NOSUCH", "k"]), JSON, 422, "unknown command 'NOSUCH'"),
        (of(["GET"]), JSON, 422, "wrong number of arguments for 'get' command"),
        (of(["SET", "k", "v"]), JSON, 422, "SET is not a read"),
        (of(["DBSIZE"]), JSON, 422, "DBSIZE names no key here"),
        (at("fast"), JSON, 422, '"level" is null or one of auto, strong, caught_up'),
        (at(["strong"]), JSON, 422, '"level" is null or one of'),
        (at("session 5"), JSON, 422, "only bounded_staleness has a bound, and only snapshot an id"),
        (at("snapshot now"), JSON, 422, "a snapshot's id is a whole number of at most 18 digits"),
        (at("snapshot -7"), JSON, 422, '"snapshot" alone is the current one'),
        (at("bounded_staleness"), JSON, 422, BOUND),
        (at("bounded_staleness 0"), JSON, 422, BOUND),
        (at("bounded_staleness nan"), JSON, 422, BOUND),
        (at("bounded_staleness 1e9"), JSON, 422, BOUND),
        (at("bounded_staleness 1 s"), JSON, 422, BOUND),
    ],
)
async def test_what_cannot_be_explained_is_refused_with_the_reason(
    body: object, headers: dict[str, str], status: int, detail: str
) -> None:
    """Promise 9."""
    with pytest.raises(ProblemError) as raised:
        await ask(body, headers)
    assert raised.value.status == status
    assert detail in raised.value.detail


async def test_who_explains_may_refuse_too() -> None:
    async def explain(command: list[bytes], level: ReadLevel | None) -> object:
        raise ExplainError("the cluster has not been seen yet")

    [route] = routes(explain)  # type: ignore[arg-type]  # it would give an Explanation
    body = json.dumps(at(None)).encode()
    with pytest.raises(ProblemError, match="the cluster has not been seen yet") as raised:
        await route.handlers["POST"](Request("POST", "/v1/explain", {}, JSON, body))
    assert raised.value.status == 422
