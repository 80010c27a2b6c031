"""Commands that concern all shards: asked of each and merged into one server's answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.exchange.open_requests import OpenRequests

Gather = Callable[[OpenRequests, list[bytes]], Awaitable[bytes]]

GATHERED: dict[str, Gather] = {}


async def ask_any_node(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    raise NotImplementedError


async def gather_keyspace(requests: OpenRequests) -> list[bytes] | None:
    raise NotImplementedError
