"""GETs at snapshots that the shelf does not have: one fetch at a time for each key, from memcached or its node.

    read -> memcached, if there is one -> the key's node -> shelf and memcached -> all who wait for that key

The first read of a key begins a ``Fetch``; those that come before it ends wait for it, in slots of their own, in their
clients' order. No client is held: a read at a snapshot shows the same wherever it stands among its client's other
requests, so those go on. If a fetch comes to nothing (its node turned it away, its value is about to expire) each who
waited reads by itself, as without a cache. So nobody waits for more than one fetch, and that has memcached's deadline
and the node's.

An answer of memcached is a proof like one that was read here (``proxy.cache.memcached``), if the snapshot serves in the
step in which it is used. Answers of a batch are used in one step of the hub.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import trio

from proxy.cache.memcached import Memcached, Question, identity_of, subject_of
from proxy.cache.memory import Shelf
from proxy.exchange.open_requests import OpenRequests, RequestSlot
from proxy.exchange.snapshot_reads import SnapshotReads
from proxy.exchange.snapshot_slots import FastReads, SnapshotSlot
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from routing.snapshot import SnapshotRecord
from routing.snapshot_reads import GET

if TYPE_CHECKING:
    from proxy.exchange.exchange import Exchange

IDENTITIES_MAX = 64  # more than snapshots serve at one time


class FetchedRead(RequestSlot):
    """A client's GET at a snapshot that waits for a fetch. When that comes to nothing, another slot takes its place."""

    __slots__ = ("key",)
    direct = False

    def __init__(self, client: OpenRequests, raw: bytes, hash_slot: int, key: bytes) -> None:
        super().__init__(client, GET, raw, hash_slot)
        self.key = key

    def keys(self) -> set[bytes]:
        return set()  # as of any read at a snapshot


class Fetch:
    """Of one key of a shelf; a ``Keeper`` of what its node says."""

    __slots__ = ("_fetches", "ends_at", "key", "question", "shelf", "waiting")

    def __init__(self, fetches: SnapshotFetches, shelf: Shelf, key: bytes) -> None:
        self._fetches = fetches
        self.shelf = shelf
        self.key = key
        self.question: Question | None = None  # for memcached, if that has a part in it
        self.ends_at: float | None = None  # of the snapshot, in Unix seconds
        self.waiting: deque[FetchedRead] = deque()

    def keep(self, reply: bytes, until: float) -> None:
        fetches = self._fetches
        fetches.end(self)
        self.shelf.put(self.key, reply, until)
        if until == inf and self.question is not None and fetches.memcached is not None:
            fetches.memcached.keep(self.question, reply, self.ends_at)
        if until == inf or trio.current_time() < until:
            fetches.shared_total += len(self.waiting)
            fetches.answer(self, reply)
        else:
            fetches.read_alone(self)

    def give_up(self) -> None:
        self._fetches.end(self)
        self._fetches.read_alone(self)


class SnapshotFetches:
    """One per proxy."""

    def __init__(self, exchange: Exchange, reads: SnapshotReads, memcached: Memcached | None) -> None:
        self.exchange = exchange
        self.reads = reads
        self.memcached = memcached
        self.dirty = False  # as a Flushable of the hub
        self.shared_total = 0  # reads that the fetch of another one answered
        self._fetches: dict[tuple[Shelf, bytes], Fetch] = {}
        self._asked: dict[Question, Fetch] = {}
        self._answered: deque[tuple[Fetch, bytes | None]] = deque()
        self._handled: Fetch | None = None
        self._identities: dict[int, tuple[SnapshotRecord, bytes]] = {}  # by snapshot
        if memcached is not None:
            memcached.deliver = self._on_answers

    def read(self, client: OpenRequests, raw: bytes, hash_slot: int, key: bytes, shelf: Shelf) -> None:
        """Queue a GET that its shelf does not have. The snapshot serves. Afterwards the client may be held."""
        slot = FetchedRead(client, raw, hash_slot, key)
        client.slots.append(slot)
        fetch = self._fetches.get((shelf, key))
        if fetch is None:
            fetch = self._fetches[shelf, key] = Fetch(self, shelf, key)
            if self.memcached is None or not self._ask(fetch, self.memcached):
                self._fetch_from_node(fetch, slot)
                return
        fetch.waiting.append(slot)

    # -- from memcached

    def _ask(self, fetch: Fetch, memcached: Memcached) -> bool:
        """Whether it is asked."""
        record = self.reads.snapshots.record_of_serving(fetch.shelf.snapshot_id)
        if memcached.is_bypassed or record is None:
            return False
        question = Question(subject_of(self._identity_of(record), fetch.shelf.resp, fetch.key))
        if not memcached.ask(question):
            return False
        fetch.question = question
        fetch.ends_at = record.expires_at
        self._asked[question] = fetch
        return True

    def _identity_of(self, record: SnapshotRecord) -> bytes:
        known = self._identities.get(record.id)
        if known is None or known[0] is not record:
            if len(self._identities) >= IDENTITIES_MAX:
                self._identities.clear()
            known = self._identities[record.id] = record, identity_of(record)
        return known[1]

    def _on_answers(self, questions: Sequence[Question]) -> None:
        self._answered += [(self._asked.pop(question), question.found) for question in questions]
        self.exchange.hub.touched(self)

    def flush(self) -> None:
        """Use what memcached has answered."""
        while self._answered:
            fetch, reply = self._answered.popleft()
            self._handled = fetch
            self._on_answer(fetch, reply)
        self._handled = None

    def on_fault(self, error: Exception) -> None:
        faulty, self._handled = self._handled, None
        if faulty is not None:
            self.end(faulty)
            for slot in faulty.waiting:
                slot.requester.on_fault(error)
        if self._answered:
            self.exchange.hub.touched(self)

    def _on_answer(self, fetch: Fetch, reply: bytes | None) -> None:
        if reply is not None and self.reads.snapshots.refusal(fetch.shelf.snapshot_id) is None:
            self.end(fetch)
            fetch.shelf.put(fetch.key, reply, inf)
            self.shared_total += len(fetch.waiting) - 1
            self.answer(fetch, reply)
            return
        while fetch.waiting:
            first = fetch.waiting.popleft()
            if not first.requester.is_closed:
                self._fetch_from_node(fetch, first)
                return
        self.end(fetch)

    # -- from the node

    def _fetch_from_node(self, fetch: Fetch, slot: FetchedRead) -> None:
        """By the read of one client."""
        if not self._send(slot, fetch):
            fetch.give_up()

    def read_alone(self, fetch: Fetch) -> None:
        """Who still waits for a fetch that has come to nothing."""
        for slot in fetch.waiting:
            if not slot.requester.is_closed:
                self._send(slot, fetch, is_kept=False)

    def _send(self, waiting: FetchedRead, fetch: Fetch, *, is_kept: bool = True) -> bool:
        """Put a read of the node in the place of one that waits. False: what it finds will not be kept."""
        client = waiting.requester
        assert isinstance(client, OpenRequests)
        reads, number = self.reads, fetch.shelf.snapshot_id
        raw, hash_slot, key = waiting.raw, waiting.hash_slot, waiting.key
        kind = client.kind_of(Lane.READ)
        route = client.routes_of_slot[hash_slot][kind]
        slot: SnapshotSlot | None = None
        is_full = isinstance(route, NodeConnection) and not route.load.has_permit(client.priority)
        if (
            isinstance(route, NodeConnection)
            and route.ready
            and not is_full
            and reads.snapshots.refusal(number) is None
        ):
            slot = FastReads(client, reads, number).slot(GET, raw, hash_slot, key, route.history)
            if slot is not None:
                _replace(client, waiting, slot)
                step = self.exchange.hub.step
                if route.guarded_step != step:
                    reads.histories.guard(route, step)
                route.queue_all((slot.fill_for(fetch), slot) if is_kept else (slot,))
                return is_kept
        reads.reads_total += 1
        slot = SnapshotSlot(client, GET, raw, hash_slot, key, number)
        _replace(client, waiting, slot)
        connection = reads.connection_for(hash_slot, kind, number)
        if is_full:
            slot.wait("its node has no permit for it")
        elif connection is None:
            slot.wait("its slot is moving, or its node has not shown yet that it has the snapshot's data")
        else:
            slot.send(self.exchange, connection)
        return False

    # -- small steps

    def answer(self, fetch: Fetch, reply: bytes) -> None:
        """Whoever waits for it."""
        self.reads.reads_total += len(fetch.waiting)
        for slot in fetch.waiting:
            if not slot.requester.is_closed:
                slot.answer(reply)

    def end(self, fetch: Fetch) -> None:
        """The next read of the key begins another one."""
        self._fetches.pop((fetch.shelf, fetch.key), None)


def _replace(client: OpenRequests, old: RequestSlot, new: RequestSlot) -> None:
    slots = client.slots
    slots[-1 if slots[-1] is old else slots.index(old)] = new
