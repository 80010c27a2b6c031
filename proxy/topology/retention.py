"""Keeps the record from growing for ever: removes the oldest events and versions of the map, and cuts the log.

What it removes it removes from the old end, so that what is left has no gap. A version goes in one commit with its
index keys; the nodes parts that only removed versions used follow. Commits are small, so that no writer waits for
long. Any number of proxies may do it at once: removing what is gone is nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from proxy.log import get_logger
from proxy.store.interface import Delete, StoreError, TopologyStore, prefix_range
from proxy.store.records import (
    EVENT_HEAD,
    EVENTS,
    MIGRATIONS,
    VIEW,
    VIEW_NODES,
    VIEWS,
    index_keys_of,
    nodes_number_of,
    number_of,
    numbered,
    unpack_number,
)

TRIM_SECONDS = 60.0  # between two rounds
REMOVED_EVENTS = 250  # of one commit
REMOVED_VERSIONS = 50  # of one commit; three keys each
MIGRATIONS_KEPT_MAX = 10_000
LOG_REVISIONS_KEPT = 10_000  # a watch that is no further behind than this goes on

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of the past is kept. The newest event and the newest version always are."""

    events_kept_max: int
    views_kept_max: int

    def __post_init__(self) -> None:
        if self.events_kept_max < 1 or self.views_kept_max < 1:
            raise ValueError("at least one event and one version are kept")


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What one round removed."""

    events: int
    versions: int
    nodes_parts: int


async def run(store: TopologyStore, retention: Callable[[], Retention]) -> None:
    """A round each TRIM_SECONDS until cancelled; ``retention`` is asked each time. A round that fails is logged."""
    while True:
        await trio.sleep(TRIM_SECONDS)
        kept = retention()
        try:
            trimmed = await trim(
                store, events_kept_max=kept.events_kept_max, views_kept_max=kept.views_kept_max
            )
        except StoreError as error:
            log.warning("record_not_trimmed", store=store.name, reason=error)
        else:
            if trimmed.events or trimmed.versions:
                log.info("record_trimmed", events=trimmed.events, versions=trimmed.versions)


async def trim(store: TopologyStore, *, events_kept_max: int, views_kept_max: int) -> Trimmed:
    """One round. Raises StoreError; then, or if cancelled, what was removed is, and the next round goes on there."""
    Retention(events_kept_max, views_kept_max)
    events = await _trim_events(store, events_kept_max)
    versions = await _trim_versions(store, views_kept_max)
    nodes_parts = await _trim_nodes_parts(store)
    await _trim_migrations(store)
    revision = await store.revision()
    if revision > LOG_REVISIONS_KEPT:
        await store.compact(revision - LOG_REVISIONS_KEPT)
    return Trimmed(events, versions, nodes_parts)


async def _trim_events(store: TopologyStore, kept_max: int) -> int:
    first_kept = await _head(store, EVENT_HEAD) - kept_max + 1
    removed = 0
    while first_kept > 0:
        entries = await store.read(EVENTS, numbered(EVENTS, first_kept), limit=REMOVED_EVENTS)
        if not entries:
            break
        await store.commit([Delete(entry.key) for entry in entries])
        removed += len(entries)
    return removed


async def _trim_versions(store: TopologyStore, kept_max: int) -> int:
    first_kept = await _head(store, VIEW) - kept_max + 1
    removed = 0
    while first_kept > 0:
        entries = await store.read(VIEWS, numbered(VIEWS, first_kept), limit=REMOVED_VERSIONS)
        if not entries:
            break
        keys: list[str] = []
        for entry in entries:
            keys += [entry.key, *index_keys_of(number_of(entry.key), entry.value)]
        await store.commit([Delete(key) for key in keys])
        removed += len(entries)
    return removed


async def _trim_nodes_parts(store: TopologyStore) -> int:
    """Those older than the one that the oldest version goes with: later versions never go back to an older one."""
    oldest = await store.read(*prefix_range(VIEWS), limit=1)
    removed = 0
    while oldest:
        last_key = numbered(VIEW_NODES, nodes_number_of(oldest[0].value))
        entries = await store.read(VIEW_NODES, last_key, limit=REMOVED_VERSIONS)
        if not entries:
            break
        await store.commit([Delete(entry.key) for entry in entries])
        removed += len(entries)
    return removed


async def _trim_migrations(store: TopologyStore) -> None:
    """A migration that old has ended: the record of one that has not stands in the timeline as well."""
    newest = await store.read(*prefix_range(MIGRATIONS), limit=1, descending=True)
    first_kept = number_of(newest[0].key) - MIGRATIONS_KEPT_MAX + 1 if newest else 0
    while first_kept > 0:
        entries = await store.read(MIGRATIONS, numbered(MIGRATIONS, first_kept), limit=REMOVED_EVENTS)
        if not entries:
            break
        await store.commit([Delete(entry.key) for entry in entries])


async def _head(store: TopologyStore, key: str) -> int:
    entry = await store.get(key)
    return 0 if entry is None else unpack_number(entry.value, f"number of {key}")
