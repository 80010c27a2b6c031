"""The connections of this proxy, as snapshots see them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import RESPS, Lane, Nodes
from proxy.upstream.private import PrivateConnections
from routing.topology import Address


class Links:
    """Those over which it writes, and to each node one over which it asks."""

    def __init__(self, nodes: Nodes, private: PrivateConnections, at_replicas: Nodes | None = None) -> None:
        self._nodes = nodes
        self._private = private
        self._at_replicas = at_replicas

    def shared(self) -> Iterable[NodeConnection]:
        """The write lanes."""
        return self._nodes.on_lane(Lane.WRITE)

    def reading(self) -> Iterable[NodeConnection]:
        """The read lanes, those to replicas too."""
        yield from self._nodes.on_lane(Lane.READ)
        if self._at_replicas is not None:
            yield from self._at_replicas.on_lane(Lane.READ)

    def private(self) -> Iterable[NodeConnection]:
        """Those in use by one client each."""
        return self._private.connections_in_use()

    @property
    def blocked(self) -> Mapping[NodeConnection, tuple[int, tuple[bytes, ...]]]:
        """Private connections in a command that blocks: its hash slot and the keys that it may write."""
        return self._private.blocked

    def writing_to(self, address: Address) -> Iterable[NodeConnection]:
        """The write lanes to one node."""
        found = [self._nodes.connection(address, resp, Lane.WRITE) for resp in RESPS]
        return [connection for connection in found if connection is not None]

    def asking(self, address: Address) -> NodeConnection | None:
        """One that answers behind all that was written in RESP2; None while there is none."""
        connection = self._nodes.connection(address, 2, Lane.WRITE)
        if connection is None:
            self._nodes.ensure(address, 2)
        return connection
