"""Many pieces of work at the same time, but not too many: tasks that all begin at once hold up every client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

import trio

T = TypeVar("T")

AT_ONCE_MAX = 64  # tasks: some milliseconds until the sockets have their turn again


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Await ``work`` for each item, for at most AT_ONCE_MAX of them at a time. If cancelled, so is what has begun."""

    async def some(left: Iterator[T]) -> None:
        for item in left:
            await work(item)

    found = list(items)
    left = iter(found)
    async with trio.open_nursery() as nursery:
        for _ in range(min(len(found), AT_ONCE_MAX)):
            nursery.start_soon(some, left)
