"""Routes: slot -> upstream connections, the one table that the hot path reads.

A slot's entry holds the shared connections to its owner, one of each kind: for the RESP version of the client and the
lane of the request. A connection that is ready takes a request without a second thought. Else the entry holds what
is never ready, and the request takes the slow way: its slot is in flux, nobody owns it, or its node has no connection.

All slots of a node share one entry. So a connection that comes or goes changes one entry, and a new view is shown by
writing one table, in well under 2 ms also for 1,000 nodes (tests/bench/test_large.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from operator import is_not, itemgetter

from proxy.topology.service import Topology
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import RESPS, Lane, Nodes
from proxy.upstream.reply_slot import Slot
from routing.slot import SLOT_COUNT
from routing.topology import EMPTY_VIEW, UNOWNED, Address, Shard, TopologyView


class NotReady:
    """A route that takes no request as it is. ``reason`` is for error texts."""

    __slots__ = ("reason",)
    ready = False
    is_free = False

    def __init__(self, reason: str) -> None:
        self.reason = reason


IN_FLUX = NotReady("the slot is moving")
UNOWNED_SLOT = NotReady("no node serves the slot")
DISCONNECTED = NotReady("the node is not connected")

Route = NodeConnection | NotReady

NodeRoutes = list[Route]  # by kind of connection, see KINDS

KINDS = {resp: tuple(resp_index * len(Lane) + lane for lane in Lane) for resp_index, resp in enumerate(RESPS)}
KIND_COUNT = len(RESPS) * len(Lane)

IN_FLUX_ROUTES: NodeRoutes = [IN_FLUX] * KIND_COUNT
UNOWNED_ROUTES: NodeRoutes = [UNOWNED_SLOT] * KIND_COUNT


@dataclass(frozen=True, slots=True, eq=False)
class Primary:
    """What the table knows of one primary; both lists are changed in place. Equal only to itself."""

    routes: NodeRoutes
    owed: list[deque[Slot]]  # by its connections; apart, because 4,000 of them cost more to look at than this


class Routes:
    """The table, changed in place so that readers may keep it: ``of_slot[slot][KINDS[resp][lane]]`` is the route."""

    def __init__(self, nodes: Nodes, topology: Topology) -> None:
        self.of_slot: list[NodeRoutes] = [UNOWNED_ROUTES] * SLOT_COUNT
        self.in_flux: frozenset[int] = frozenset()  # slots on their way between two shards
        self._nodes = nodes
        self._topology = topology
        self._resps = [2]  # the RESP versions in use
        # What the table shows.
        self._primaries: dict[Address, Primary] = {}
        self._shards: tuple[Shard, ...] = ()
        self._of_shard: list[Primary] = []
        self._routes_of_shard = [UNOWNED_ROUTES]  # the last stands for no owner, because UNOWNED is -1
        self._shard_of_slot = EMPTY_VIEW.shard_of_slot
        self._of_owner: Sequence[NodeRoutes] = tuple(self.of_slot)  # slot -> its owner's, in flux or not
        self._on_view(EMPTY_VIEW, topology.view)
        nodes.on_change = self._on_connection
        topology.subscribe(self._on_view)

    def use(self, resp: int) -> None:
        """Have connections for clients of this RESP version from now on."""
        if resp not in self._resps:
            self._resps.append(resp)
            self._nodes.ensure_all(self._primaries, resp)

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

    def refresh_soon(self) -> None:
        """Something does not fit the view: have the cluster looked at."""
        self._topology.refresh_soon()

    def _on_view(self, old: TopologyView, new: TopologyView) -> None:
        former = self._of_shard
        if new.shards is not self._shards:
            self._follow(new.shards)
        of_owner = itemgetter(*new.shard_of_slot)(self._routes_of_shard)  # at the speed of C, as what follows
        differs = [*map(is_not, self._of_owner, of_owner)]
        self._of_owner = of_owner
        self.of_slot[:] = of_owner
        self.in_flux = frozenset(slot for migration in new.migrations for slot in migration.slots)
        for slot in self.in_flux:
            self.of_slot[slot] = IN_FLUX_ROUTES
        if former_owners := set(compress(self._shard_of_slot, differs)) - {UNOWNED}:
            owed = chain.from_iterable(former[index].owed for index in former_owners)
            self._hold_those_in_flight(owed, differs)
        self._shard_of_slot = new.shard_of_slot
        if new.migrations is not old.migrations:
            ends = {end for each in new.migrations for end in (each.source_id, each.target_id)}
            touched = [shard.primary.address for shard in new.shards if shard.primary.id in ends]
            self._nodes.loads.touch(frozenset(touched))
        if former_owners:
            self._nodes.loads.look_again()
        self._nodes.wake()

    def _follow(self, shards: tuple[Shard, ...]) -> None:
        """Have an entry for each primary, and connections to those and no others."""
        self._shards = shards
        addresses = [shard.primary.address for shard in shards]
        known = [*map(self._primaries.get, addresses)]
        staying = set(known)
        new = [address for address, primary in zip(addresses, known, strict=True) if primary is None]
        gone = [address for address, primary in self._primaries.items() if primary not in staying]
        for address in gone:
            del self._primaries[address]
        for address in new:
            self._primaries[address] = self._primary_at(address)
        for resp in self._resps:
            self._nodes.ensure_all(new, resp)
        if addresses and (new or gone):
            self._nodes.retain(self._primaries)
        self._of_shard = [
            primary or self._primaries[address] for address, primary in zip(addresses, known, strict=True)
        ]
        self._routes_of_shard = [*(primary.routes for primary in self._of_shard), UNOWNED_ROUTES]

    def _on_connection(self, address: Address) -> None:
        """A connection to one node came or went."""
        if (primary := self._primaries.get(address)) is not None:
            now = self._primary_at(address)
            primary.routes[:] = now.routes
            primary.owed[:] = now.owed

    def _primary_at(self, address: Address) -> Primary:
        found = [self._nodes.connection(address, resp, lane) for resp in RESPS for lane in Lane]
        return Primary(
            [connection or DISCONNECTED for connection in found],
            [connection.owed for connection in found if connection is not None],
        )

    def _hold_those_in_flight(self, owed: Iterable[deque[Slot]], differs: list[bool]) -> None:
        """A client whose request is on its way to a slot's former owner waits for its answers first.

        Else its next request for that slot would go to the new owner and could run before the one in flight,
        which comes back with MOVED and is sent again. ``owed``: by the former owners. ``differs``: slot -> whether
        its owner is another one now.
        """
        differs.append(False)  # for -1, which stands for no slot
        waiting = [
            slot.requester for queue in filter(None, owed) for slot in queue if differs[slot.hash_slot]
        ]
        for requester in dict.fromkeys(waiting):  # afterwards: what is held may send, and change the queues
            if requester is not None:
                requester.hold_until_drained()
