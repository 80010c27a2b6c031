"""/v1/hot shows what the sampler saw, and where those keys and slots are."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from proxy.admin.hot import routes
from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.exchange.hot import HotSampler
from proxy.settings import HotSettings
from routing.command import lookup
from routing.slot import slot_of
from routing.topology import EMPTY_VIEW, UNOWNED, Address, Node, Role, Shard, TopologyView

PRIMARY = Node("c" * 40, Address("10.0.0.9", 6379), Role.PRIMARY)
SLOT = slot_of(b"cart:1")
VIEW = TopologyView(1, 9, (Shard(PRIMARY),), tuple(0 if slot == SLOT else UNOWNED for slot in range(16384)))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def seen(options: HotSettings | None = None) -> HotSampler:
    """Eight reads of one key and six of another in ten seconds, and one write."""
    clock = Clock()
    hot = HotSampler(options or HotSettings(sample_every=1), Random(1), clock)
    for name, key, times in ((b"GET", b"cart:1", 8), (b"GET", b"\xff\n", 6), (b"INCR", b"k", 1)):
        command = lookup([name])
        assert command is not None
        for _ in range(times):
            hot.look_at(command, [name, key])
    clock.now += 10.0
    return hot


def table(hot: HotSampler, view: TopologyView = VIEW) -> list[Route]:
    return routes(hot.facts, lambda: hot.options, lambda: view)


async def get(hot: HotSampler, view: TopologyView = VIEW, **query: str) -> dict[str, Any]:
    [route] = table(hot, view)
    listed = {name: [value] for name, value in query.items()}
    response = await route.handlers["GET"](Request("GET", "/v1/hot", listed, {}))
    assert isinstance(response, Response)
    assert response.status == 200
    facts: dict[str, Any] = json.loads(response.body)
    return facts


async def test_what_is_hot_and_where_it_is() -> None:
    facts = await get(seen())
    cart = {
        "slot": SLOT,
        "owner": "10.0.0.9:6379",
        "share_at_least": 8 / 14,
        "share_at_most": 8 / 14,
        "per_second": 0.8,
    }
    other = {
        "slot": slot_of(b"\xff\n"),
        "owner": None,
        "share_at_least": 6 / 14,
        "share_at_most": 6 / 14,
        "per_second": 0.6,
    }
    assert facts == {
        "sample_every": 1,
        "window_seconds": 30.0,
        "reads": {
            "seconds": 10.0,
            "samples": 14,
            "keys": [{"key": "cart:1", **cart}, {"key": "\\xff\\n", **other}],
            "slots": [cart, other],
        },
        "writes": {"seconds": 10.0, "samples": 1, "keys": [], "slots": []},
    }


async def test_fewer_before_the_cluster_is_seen_and_misuse() -> None:
    facts = await get(seen(), EMPTY_VIEW, count="1")
    [key] = facts["reads"]["keys"]
    assert (key["key"], key["owner"]) == ("cart:1", None)
    for count in ("0", "1001", "many"):
        with pytest.raises(ProblemError, match="count is a number from 1 to 1000"):
            await get(seen(), count=count)
    with pytest.raises(ProblemError):
        await get(seen(), number="1")
