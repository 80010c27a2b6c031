"""Routes: slot -> upstream connection, the one table that the hot path reads.

A slot's entry is the shared connection to its owner when a request may be queued there without a second thought.
Otherwise it is an entry that is never ready, and the request takes the slow way: its slot is in flux, nobody owns
it, or its node has no connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter

from proxy.topology.service import Topology
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane, Nodes
from routing.slot import SLOT_COUNT
from routing.topology import Address, TopologyView


class NotReady:
    """A route that takes no request as it is. ``reason`` is for error texts."""

    __slots__ = ("reason",)
    ready = False

    def __init__(self, reason: str) -> None:
        self.reason = reason


IN_FLUX = NotReady("the slot is moving")
UNOWNED_SLOT = NotReady("no node serves the slot")
DISCONNECTED = NotReady("the node is not connected")

Route = NodeConnection | NotReady


class Routes:
    """A table for each lane and RESP version that a client uses, changed in place so that readers may keep it."""

    def __init__(self, nodes: Nodes, topology: Topology) -> None:
        self._nodes = nodes
        self._topology = topology
        self._tables: dict[int, tuple[list[Route], ...]] = {}  # RESP version -> by lane -> slot -> route
        self.in_flux: frozenset[int] = frozenset()  # slots on their way between two shards
        self._by_slot = _taker_of(topology.view)
        self.tables(2)
        nodes.on_change = self._rebuild
        topology.subscribe(self._on_view)

    def tables(self, resp: int) -> tuple[list[Route], ...]:
        """By lane: slot -> route, for clients of this RESP version. The lists stay the same objects."""
        tables = self._tables.get(resp)
        if tables is None:
            tables = self._tables[resp] = tuple([UNOWNED_SLOT] * SLOT_COUNT for _ in Lane)
            self._ensure(self._topology.view)
            self._rebuild()
        return tables

    def owner(self, hash_slot: int, resp: int, lane: Lane) -> NodeConnection | None:
        """The connection to the slot's owner, in flux or not; None while there is none that takes requests."""
        primary = self._topology.view.primary_of(hash_slot)
        return None if primary is None else self.node(primary.address, resp, lane)

    def node(self, address: Address, resp: int, lane: Lane) -> NodeConnection | None:
        """The connection to one node, opened if need be; None while there is none that takes requests."""
        connection = self._nodes.connection(address, resp, lane)
        if connection is None:
            self._nodes.ensure(address, resp)
            return None
        return connection if connection.ready else None

    def _on_view(self, old: TopologyView, new: TopologyView) -> None:
        self._by_slot = _taker_of(new)
        settled = self.in_flux
        self.in_flux = frozenset(slot for migration in new.migrations for slot in migration.slots)
        if _primaries(old) == _primaries(new):
            self._patch(settled | self.in_flux | set(_changed(old.shard_of_slot, new.shard_of_slot)))
        else:
            self._ensure(new)
            self._rebuild()
        self._hold_those_in_flight(new)
        self._nodes.wake()

    def _ensure(self, view: TopologyView) -> None:
        addresses = [shard.primary.address for shard in view.shards]
        for resp in self._tables:
            for address in addresses:
                self._nodes.ensure(address, resp)
        if addresses:
            self._nodes.retain(addresses)

    def _rebuild(self) -> None:
        """All entries anew: connections came or went, or shards did."""
        for table, by_shard in self._by_shard():
            table[:] = self._by_slot(by_shard)
            for slot in self.in_flux:
                table[slot] = IN_FLUX

    def _patch(self, slots: Iterable[int]) -> None:
        """The entries of some slots anew."""
        shard_of_slot = self._topology.view.shard_of_slot
        for table, by_shard in self._by_shard():
            for slot in slots:
                table[slot] = IN_FLUX if slot in self.in_flux else by_shard[shard_of_slot[slot]]

    def _by_shard(self) -> Iterator[tuple[list[Route], list[Route]]]:
        """Each table with its routes by shard; the last stands for no owner, because UNOWNED is -1."""
        addresses = _primaries(self._topology.view)
        for resp, tables in self._tables.items():
            for lane, table in zip(Lane, tables, strict=True):
                by_shard: list[Route] = [
                    self._nodes.connection(address, resp, lane) or DISCONNECTED for address in addresses
                ]
                yield table, [*by_shard, UNOWNED_SLOT]

    def _hold_those_in_flight(self, view: TopologyView) -> None:
        """A client whose request is on its way to a slot's former owner waits for its answers first.

        Else its next request for that slot would go to the new owner and could run before the one in flight,
        which comes back with MOVED and is sent again.
        """
        for connection in self._nodes.connections():
            for slot in connection.owed:
                if slot.hash_slot < 0 or slot.requester is None:
                    continue
                owner = view.primary_of(slot.hash_slot)
                if owner is None or owner.address != connection.address:
                    slot.requester.hold_until_drained()


def _taker_of(view: TopologyView) -> Callable[[list[Route]], tuple[Route, ...]]:
    """What turns routes by shard into routes by slot, at the speed of C."""
    return itemgetter(*view.shard_of_slot)


def _primaries(view: TopologyView) -> list[Address]:
    return [shard.primary.address for shard in view.shards]


def _changed(old: Sequence[int], new: Sequence[int]) -> Iterator[int]:
    """The places where two sequences of the same length differ; quick where long stretches are alike."""
    for first in range(0, len(new), _STRETCH):
        stretch = slice(first, first + _STRETCH)
        if old[stretch] != new[stretch]:
            yield from (
                first + place
                for place, (before, after) in enumerate(zip(old[stretch], new[stretch], strict=True))
                if before != after
            )


_STRETCH = 128
