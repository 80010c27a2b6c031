"""/v1/audit hands out the whole log by pages, so that whoever reads it can verify it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.admin.audit import routes
from proxy.admin.http import ProblemError, Request, parse_target
from proxy.store.interface import Put
from proxy.store.memory import MemoryStore
from proxy.store.records import AUDIT, AUDIT_HEAD, numbered
from proxy.topology.audit import Act, Operator, commit_audited
from routing.audit import Damaged, head_of_facts, record_of_facts, verify
from tests.proxy.failing_store import FailingStore


async def get(store: MemoryStore, target: str = "/v1/audit") -> dict[str, Any]:
    path, query = parse_target(target.encode())
    [route] = routes(store)
    response = await route.handlers["GET"](Request("GET", path, query, {}))
    assert response.status == 200
    return dict(json.loads(response.body))


async def store_of(count: int) -> MemoryStore:
    store = MemoryStore()
    for number in range(count):
        before = {"n": number / 3, "text": "§\x1b", "list": [None, True, -1]}
        await commit_audited(
            store, Act("mode", Operator("anna", "::1"), 1.8e9 + number / 7, before, None), []
        )
    return store


async def test_an_empty_log_has_no_head_and_no_records() -> None:
    assert await get(MemoryStore()) == {"head": None, "records": [], "next": None}


async def test_pages_join_to_a_log_that_verifies() -> None:
    """Also numbers and letters that JSON writes in its own way keep their hash."""
    store = await store_of(7)
    records, first = [], 1
    while first is not None:
        page = await get(store, f"/v1/audit?from={first}&limit=3")
        assert len(page["records"]) <= 3
        records += [record_of_facts(facts) for facts in page["records"]]
        first = page["next"]
    assert [record.number for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert verify(records, head_of_facts(page["head"])) == ()


async def test_damage_is_shown_where_it_is() -> None:
    store = await store_of(3)
    await store.commit([Put(numbered(AUDIT, 2), b"\xc1"), Put(AUDIT_HEAD, b"\xc1")])
    page = await get(store)
    assert page["records"][1]["number"] == 2
    assert "is damaged" in page["records"][1]["damage"]
    assert isinstance(head_of_facts(page["head"]), Damaged)


@pytest.mark.parametrize(
    "query",
    ["from=x", "from=-1", "from=1&from=2", "from=", "limit=0", "limit=1001", "limit=%C2%B2", "since=3"],
)
async def test_a_query_that_is_not_understood_is_refused(query: str) -> None:
    with pytest.raises(ProblemError) as raised:
        await get(MemoryStore(), f"/v1/audit?{query}")
    assert raised.value.status == 400


async def test_without_the_store_it_is_503() -> None:
    store = FailingStore()
    store.is_down = True
    with pytest.raises(ProblemError, match="out of reach") as raised:
        await get(store)
    assert raised.value.status == 503
