"""Connections of this proxy that ended while a node owed it replies to what may have been writes.

A node that stood still may execute what is in its socket long after this side closed: such a write could land behind
a snapshot's cut, without its pre-image. So each is kept here until its client is known to be gone at the node
(``proxy.snapshots.abandoned``); a barrier completes only then.

Also those that the node's side ended count. A server that closes a connection executes nothing more of it: Redis and
Valkey free the client first, and a process that died runs nothing. But the end that is seen here may be the doing of
what stands between (a TCP proxy, a firewall that forgot the connection), with the server's own end still open and
full. Nothing on the wire tells the two apart, and the price of the doubt is one question at the next barrier.

The list is bounded: more than PER_ADDRESS_MAX at one node become one entry that stands for all of them. Nodes are
those that the cluster has had; clients cannot make more of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from routing.topology import Address

PER_ADDRESS_MAX = 256
ALL = 0  # no server gives this client id


@dataclass(frozen=True, slots=True)
class AbandonedConnection:
    """One connection; with ``client_id`` ALL: every one of this proxy's name there that it does not have open."""

    address: Address
    client_id: int
    reason: str  # why it ended
    number: int  # how many were added up to it


class Abandoned:
    """Those of one proxy, and the client ids that it has open, which are never to be killed."""

    def __init__(self) -> None:
        self.added_total = 0  # who saw the same number twice knows that none came in between
        self._entries: dict[Address, dict[int, AbandonedConnection]] = {}  # address -> client id -> entry
        self._open: dict[Address, set[int]] = {}  # address -> client ids

    def add(self, address: Address, client_id: int, reason: str) -> None:
        """A connection ended; ``client_id`` ALL when the node did not tell its id."""
        self.added_total += 1
        entries = self._entries.setdefault(address, {})
        if ALL in entries or len(entries) >= PER_ADDRESS_MAX:
            client_id = ALL
        if client_id == ALL:
            entries.clear()
        entries[client_id] = AbandonedConnection(address, client_id, reason, self.added_total)

    def pending(self) -> list[AbandonedConnection]:
        """All that may still execute something."""
        return [entry for entries in self._entries.values() for entry in entries.values()]

    def remove(self, entry: AbandonedConnection) -> None:
        """Its client is gone. Does nothing when another connection has come to stand in its place."""
        entries = self._entries.get(entry.address, {})
        if entries.get(entry.client_id) == entry:
            del entries[entry.client_id]
            if not entries:
                del self._entries[entry.address]

    # -- what is open

    def opened(self, address: Address, client_id: int) -> None:
        self._open.setdefault(address, set()).add(client_id)

    def closed(self, address: Address, client_id: int) -> None:
        ids = self._open.get(address)
        if ids is not None:
            ids.discard(client_id)
            if not ids:
                del self._open[address]

    def is_open(self, address: Address, client_id: int) -> bool:
        """Whether this proxy has the connection, so that it counts with the writes in flight."""
        return client_id in self._open.get(address, ())
