"""Adds events to the timeline as part of someone's commit, so that a change and its event are recorded together."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.store.interface import ABSENT, Expect, Operation, Put, TopologyStore
from proxy.store.records import (
    EVENT_HEAD,
    EVENTS,
    numbered,
    pack_event,
    pack_number,
    renumbered,
    unpack_number,
)
from routing.timeline import Event


async def append_events(
    store: TopologyStore, events: Sequence[Event], seen_by: str
) -> tuple[list[Operation], list[Expect]]:
    """The operations that append ``events``, in order, and the conditions under which they do; none for no events.

    A commit that holds them fails with ConflictError on EVENT_HEAD when someone else appended meanwhile: ask again.
    Raises StoreUnavailableError, and StoreRefusedError when the head is damaged.
    """
    if not events:
        return [], []
    head = await store.get(EVENT_HEAD)
    newest, revision = (
        (0, ABSENT) if head is None else (unpack_number(head.value, "event head"), head.revision)
    )
    operations: list[Operation] = [
        Put(numbered(EVENTS, number), pack_event(renumbered(event, number, seen_by)))
        for number, event in enumerate(events, newest + 1)
    ]
    operations.append(Put(EVENT_HEAD, pack_number(newest + len(events))))
    return operations, [Expect(EVENT_HEAD, revision)]
