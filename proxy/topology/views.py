"""Reads versions of the map from the store, and keeps the newest that were read or written.

The nodes of a version are a record of their own, shared by all versions until they change: moving a slot in a
cluster of 1,000 nodes writes and decodes its slots alone.
"""

from __future__ import annotations

from cachetools import LRUCache

from proxy.store.interface import StoreRefusedError, TopologyStore
from proxy.store.records import (
    VIEW_NODES,
    VIEWS,
    ViewRecord,
    nodes_number_of,
    numbered,
    unpack_nodes,
    unpack_view,
)
from routing.topology import Shard

KEPT_MAX = 4  # versions, and nodes parts: neighbours in time share nearly everything


class ViewReader:
    """Versions by number."""

    def __init__(self, store: TopologyStore) -> None:
        self._store = store
        self._records: LRUCache[int, ViewRecord] = LRUCache(KEPT_MAX)
        self._nodes: LRUCache[int, tuple[Shard, ...]] = LRUCache(KEPT_MAX)

    def remember(self, record: ViewRecord) -> None:
        """A version that was just written: whoever follows need not decode it. Never one that is about to be written,
        since another proxy may write one of that number first."""
        self._records[record.number] = record
        self._nodes[record.nodes_number] = record.view.shards

    def forget(self) -> None:
        """The store is another one than before, and numbers mean other versions."""
        self._records.clear()
        self._nodes.clear()

    async def version(self, number: int) -> ViewRecord | None:
        """None if there is no such version, or no more. Raises StoreError."""
        record = self._records.get(number)
        if record is not None:
            return record
        entry = await self._store.get(numbered(VIEWS, number))
        if entry is None:
            return None
        nodes_number = nodes_number_of(entry.value)
        shards = self._nodes.get(nodes_number)
        if shards is None:
            nodes = await self._store.get(numbered(VIEW_NODES, nodes_number))
            if nodes is None:
                if await self._store.get(numbered(VIEWS, number)) is None:
                    return None  # retention removed both between the two reads
                raise StoreRefusedError(
                    f"the store's map {number} has lost its nodes, {VIEW_NODES}{nodes_number}"
                )
            shards = self._nodes[nodes_number] = unpack_nodes(nodes.value)
        record = self._records[number] = unpack_view(number, entry.value, shards)
        return record
