"""Routes: slot -> upstream connections, the one table that the hot path reads.

A slot's entry holds the shared connections to its owner, one of each kind: for the RESP version of the client and the
lane of the request. A connection that is ready takes a request without a second thought. Else the entry holds what
is never ready, and the request takes the slow way: its slot is in flux, nobody owns it, or its node has no connection.

All slots of a node share one entry. So a connection that comes or goes changes one entry, and a new view is shown by
writing one table, in well under 2 ms also for 1,000 nodes (tests/bench/test_large.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not, itemgetter

from proxy.topology.service import Topology
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane, Nodes
from routing.slot import SLOT_COUNT
from routing.topology import EMPTY_VIEW, Address, TopologyView


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

NodeRoutes = list[Route]  # by kind of connection, see KINDS

RESPS = (2, 3)  # the RESP versions that clients speak
KINDS = {resp: tuple(resp_index * len(Lane) + lane for lane in Lane) for resp_index, resp in enumerate(RESPS)}
KIND_COUNT = len(RESPS) * len(Lane)

IN_FLUX_ROUTES: NodeRoutes = [IN_FLUX] * KIND_COUNT
UNOWNED_ROUTES: NodeRoutes = [UNOWNED_SLOT] * KIND_COUNT


class Routes:
    """The table, changed in place so that readers may keep it: ``of_slot[slot][KINDS[resp][lane]]`` is the route."""

    def __init__(self, nodes: Nodes, topology: Topology) -> None:
        self.of_slot: list[NodeRoutes] = [UNOWNED_ROUTES] * SLOT_COUNT
        self.in_flux: frozenset[int] = frozenset()  # slots on their way between two shards
        self._nodes = nodes
        self._topology = topology
        self._resps = [2]  # the RESP versions in use
        self._of_primary: dict[Address, NodeRoutes] = {}
        self._of_owner: Sequence[NodeRoutes] = tuple(self.of_slot)  # slot -> its owner's, in flux or not
        self._on_view(EMPTY_VIEW, topology.view)
        nodes.on_change = self._on_connection
        topology.subscribe(self._on_view)

    def use(self, resp: int) -> None:
        """Have connections for clients of this RESP version from now on."""
        if resp not in self._resps:
            self._resps.append(resp)
            self._nodes.ensure_all(self._of_primary, resp)

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
        primaries = [shard.primary.address for shard in new.shards]
        known = self._of_primary
        self._of_primary = {address: known.get(address) or self._routes_to(address) for address in primaries}
        if self._of_primary.keys() != known.keys():
            for resp in self._resps:
                self._nodes.ensure_all(primaries, resp)
            if primaries:
                self._nodes.retain(primaries)
        of_shard = [self._of_primary[address] for address in primaries]
        # At the speed of C. The last stands for no owner, because UNOWNED is -1.
        of_owner = itemgetter(*new.shard_of_slot)([*of_shard, UNOWNED_ROUTES])
        differs = [*map(is_not, self._of_owner, of_owner)]
        self._of_owner = of_owner
        self.of_slot[:] = of_owner
        self.in_flux = frozenset(slot for migration in new.migrations for slot in migration.slots)
        for slot in self.in_flux:
            self.of_slot[slot] = IN_FLUX_ROUTES
        if True in differs:
            self._hold_those_in_flight(differs)
        self._nodes.wake()

    def _on_connection(self, address: Address) -> None:
        """A connection to one node came or went."""
        if (routes := self._of_primary.get(address)) is not None:
            routes[:] = self._routes_to(address)

    def _routes_to(self, address: Address) -> NodeRoutes:
        return [
            self._nodes.connection(address, resp, lane) or DISCONNECTED for resp in RESPS for lane in Lane
        ]

    def _hold_those_in_flight(self, differs: Sequence[bool]) -> None:
        """A client whose request is on its way to a slot's former owner waits for its answers first.

        Else its next request for that slot would go to the new owner and could run before the one in flight,
        which comes back with MOVED and is sent again. ``differs``: slot -> whether its owner is another one now.
        """
        differs = [*differs, False]  # the last is for -1, which stands for no slot
        waiting = [
            slot.requester
            for connection in self._nodes.connections()
            for slot in connection.owed
            if differs[slot.hash_slot] and connection not in self._of_owner[slot.hash_slot]
        ]
        for requester in dict.fromkeys(waiting):  # afterwards: what is held may send, and change the queues
            if requester is not None:
                requester.hold_until_drained()
