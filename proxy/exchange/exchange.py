"""Carries requests to the nodes and sees each one through redirections, waits and lost connections.

There are two ways. A direct slot is queued by the frontend straight from the routes table and comes back to its
client; the client's ``OpenRequests`` handles what goes wrong. Everything that must wait runs ``execute`` in a task.

Both keep promise 5: a request is sent again only if the node said that it did not run it, if no byte of it left,
or if it only reads. Everything else whose reply is lost ends with OUTCOMEUNKNOWN.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection
from typing import assert_never

import trio

from proxy.cache.memcached import Memcached
from proxy.cache.memory import SnapshotCache
from proxy.exchange.failures import internal_fault, not_ready, outcome_unknown
from proxy.exchange.hot import HotSampler
from proxy.exchange.replica_reads import ReplicaReads
from proxy.exchange.routes import Routes
from proxy.exchange.scripts import ScriptCache
from proxy.exchange.snapshot_fetches import SnapshotFetches
from proxy.exchange.snapshot_reads import SnapshotReads
from proxy.hub import Hub
from proxy.log import get_logger
from proxy.protocol.encode import error
from proxy.replicas.service import Replicas
from proxy.settings import CacheSettings
from proxy.snapshots.service import Snapshots
from proxy.topology.service import Topology
from proxy.upstream.connection import NodeConnection
from proxy.upstream.load import NodeLoad
from proxy.upstream.nodes import Lane, Nodes
from proxy.upstream.private import PrivateConnections
from proxy.upstream.reply_slot import ConnectionLostError
from routing.redirect import (
    Ask,
    Moved,
    NoScript,
    Redirect,
    Wait,
    needs_attention,
    parse_redirect,
    wait_seconds,
)
from routing.retry_budget import RetryBudget, RetryRules
from routing.topology import Address

CANCELLED = error("ERR the client left before the command was done")
NO_RETRY = "; too much of late had to be sent again, so it waits"
HOPS_MAX = 4  # redirections that are followed at once; further ones wait in between

log = get_logger(__name__)


class Exchange:
    """What a request needs to reach its node. One per proxy."""

    def __init__(
        self,
        hub: Hub,
        nodes: Nodes,
        topology: Topology,
        private: PrivateConnections,
        replicas: Replicas,
        snapshots: Snapshots,
        nursery: trio.Nursery,
        *,
        request_deadline_seconds: float,
        script_cache_bytes_max: int,
        cache: SnapshotCache | None = None,
        memcached: Memcached | None = None,
    ) -> None:
        self.hub = hub
        self.nodes = nodes
        self.topology = topology
        self.private = private
        self.routes = Routes(nodes, topology)
        self.replicas = replicas
        self.reads = ReplicaReads(hub, replicas, self.routes)
        self.snapshots = snapshots
        self.preserver = snapshots.preserver
        snapshots.attach(self)
        self.snapshot_reads = SnapshotReads(self, snapshots, cache or SnapshotCache(CacheSettings()))
        self.snapshot_fetches = SnapshotFetches(self, self.snapshot_reads, memcached)
        self.token_secret = b""  # signs the tokens of sessions; empty until it is known
        self.scripts = ScriptCache(script_cache_bytes_max)
        self.hot = HotSampler()
        self.deadline_seconds = request_deadline_seconds
        self.redirects_total = {"moved": 0, "ask": 0, "wait": 0, "noscript": 0}
        self.unknown_outcomes_total = 0
        self.retries = RetryBudget(RetryRules(), hub.clock())
        self.expired_total = 0  # requests that nobody served within the deadline
        self._nursery = nursery

    # -- what both ways share

    def understand(
        self, reply: bytes, connection: NodeConnection, *, from_script: bool = False
    ) -> Redirect | None:
        """What an error reply asks for, its news passed on to the topology; None when the client is to see it."""
        redirect = parse_redirect(reply, from_script=from_script)
        match redirect:
            case Moved(slot, address):
                self.redirects_total["moved"] += 1
                if not address.host:
                    redirect = Moved(slot, Address(connection.address.host, address.port))
                self.topology.on_moved(slot, redirect.address)
            case Ask(slot, address):
                self.redirects_total["ask"] += 1
                if not address.host:
                    redirect = Ask(slot, Address(connection.address.host, address.port))
                if slot not in self.routes.in_flux:
                    self.topology.refresh_soon()
            case Wait():
                self.redirects_total["wait"] += 1
                self.topology.refresh_soon()
            case NoScript():
                self.redirects_total["noscript"] += 1
            case None:
                pass
            case _:
                assert_never(redirect)
        return redirect

    def write_connection(self, hash_slot: int, resp: int) -> NodeConnection | None:
        """The shared write connection to the slot's owner; None while there is none that takes requests."""
        return self.routes.owner(hash_slot, resp, Lane.WRITE)

    def is_in_flux(self, hash_slot: int) -> bool:
        """Whether the slot is on its way between two shards, by the view."""
        return hash_slot in self.routes.in_flux

    def outcome_unknown(self, reason: str) -> bytes:
        """The reply for a write whose own reply was lost, counted."""
        self.unknown_outcomes_total += 1
        return outcome_unknown(reason)

    # -- the slow way

    async def execute(
        self,
        raw: bytes,
        hash_slot: int,
        *,
        resp: int,
        repeatable: bool,
        deadline: float | None = None,
        lane: Lane | None = None,
        from_script: bool = False,
        writes: Collection[bytes] = (),
        before: Callable[[NodeConnection, bool], bool] | None = None,
        priority: int | None = None,
        is_repeated: bool = False,
    ) -> bytes:
        """The reply to one request on one slot, redirections followed and waits done, until the deadline.

        ``deadline`` is on Trio's clock; None counts the request deadline from now. ``lane`` None: the
        read lane if it is repeatable. ``from_script``: as in
        ``parse_redirect``. ``writes``: the keys that it may write, to be preserved before each sending.
        ``before``: called with the connection, and whether it is asked after ASK, in the step in which the request is
        queued on it; False: not there. ``priority``: it waits for a permit at each node; None: it waits for none.
        ``is_repeated``: a node has had it already, so that it needs a place in the retry budget.

        ``repeatable``: running it twice does no harm, so it is sent again when its reply is lost. Never raises
        for what nodes do: an error reply says it. If cancelled, the command may have run.
        """
        deadline = trio.current_time() + self.deadline_seconds if deadline is None else deadline
        if lane is None:
            lane = Lane.READ if repeatable else Lane.WRITE
        target: Address | None = None  # after ASK, for one sending
        permitted: NodeLoad | None = None  # it waited there for a permit, in vain if it goes elsewhere now
        hops = attempt = 0
        reason = "a node did not run it" if is_repeated else "requests before it took all the time"
        # Nothing is sent at the deadline: there would be no time for the reply, and a write's outcome unknown.
        while trio.current_time() < deadline:
            if writes and self.preserver.needs(hash_slot, writes, resp):
                refused = await self.preserver.preserve({hash_slot: writes}, resp, deadline)
                if refused is not None:
                    return refused
            connection = (
                self.routes.owner(hash_slot, resp, lane)
                if target is None
                else self.routes.node(target, resp, lane)
            )
            load = None if connection is None else connection.load
            if load is not None and load is not permitted and not load.has_permit(priority):
                assert priority is not None
                refused = await load.permitted(priority, deadline)
                if refused:
                    return refused
                permitted = load if refused is None else None
                continue  # what was found above may have changed meanwhile
            permitted = None
            if connection is None:
                redirect: Redirect = Wait(self.why_unreachable(hash_slot, target), was_sent=False)
            elif is_repeated and not self.may_repeat():
                redirect = Wait(reason.removesuffix(NO_RETRY) + NO_RETRY)
            elif before is not None and not before(connection, target is not None):
                redirect = Wait(f"the history of {connection.address} is not judged yet", was_sent=False)
            else:
                is_repeated = False
                reply = None
                try:
                    with trio.move_on_at(deadline):
                        reply = await connection.request(
                            raw, asking=target is not None, hash_slot=-1 if repeatable else hash_slot
                        )
                except ConnectionLostError as lost:
                    if lost.sent and not repeatable:
                        return self.outcome_unknown(str(lost))
                    self.topology.refresh_soon()
                    redirect = Wait(str(lost), lost.sent)
                else:
                    if reply is None:
                        late = f"{connection.address} did not reply within {self.deadline_seconds:g} s"
                        if not repeatable:
                            return self.outcome_unknown(late)
                        redirect = Wait(late)
                    elif (
                        not needs_attention(reply)
                        or (found := self.understand(reply, connection, from_script=from_script)) is None
                    ):
                        return reply
                    else:
                        redirect = found
            target = None
            match redirect:
                case Moved():
                    hops += 1
                    reason = f"{connection.address} said {redirect}" if connection else str(redirect)
                case Ask(_, address):
                    hops += 1
                    target = address
                    reason = f"asked to go to {address}"
                case NoScript():
                    healed = self.scripts.heal(raw)
                    if healed is None:
                        return reply if reply is not None else b""
                    raw = healed
                    continue
                case Wait(reason, was_sent):
                    hops = HOPS_MAX
                    is_repeated = is_repeated or was_sent
                case _:
                    assert_never(redirect)
            if hops >= HOPS_MAX:
                target = None  # after a wait the owner is asked again: the slot may have settled
                await self.pause(attempt, deadline)
                attempt += 1
                hops = 0
        self.expired_total += 1
        return not_ready(f"slot {hash_slot}", self.deadline_seconds, reason)

    async def execute_at(self, address: Address, raw: bytes, *, resp: int = 2, repeatable: bool) -> bytes:
        """The reply of one named node, errors included, whatever slots it owns. Waits for its connection."""
        deadline = trio.current_time() + self.deadline_seconds
        attempt = 0
        reason = ""
        is_repeated = False
        while trio.current_time() < deadline:
            connection = self.routes.node(address, resp, Lane.READ if repeatable else Lane.WRITE)
            if connection is not None and not (is_repeated and not self.may_repeat()):
                try:
                    with trio.move_on_at(deadline):
                        return await connection.request(raw)
                    reason = f"{address} did not reply"
                    if not repeatable:
                        return self.outcome_unknown(reason)
                except ConnectionLostError as lost:
                    reason = str(lost)
                    if lost.sent and not repeatable:
                        return self.outcome_unknown(reason)
                    is_repeated = is_repeated or lost.sent
            await self.pause(attempt, deadline)
            attempt += 1
        self.expired_total += 1
        return not_ready(f"node {address}", self.deadline_seconds, reason or self.nodes.failure(address))

    def may_repeat(self) -> bool:
        """Whether what a node has had may be sent again now. If not, it waits: it is never refused before its time."""
        return self.retries.take(trio.current_time(), self.nodes.loads.answered_total())

    async def pause(self, attempt: int, deadline: float) -> None:
        """Wait a little, longer with each attempt, and less when connections or the view change."""
        seconds = min(wait_seconds(attempt, random.random()), max(0.0, deadline - trio.current_time()))
        with trio.move_on_after(seconds):
            await self.nodes.wait_change()

    def start(
        self, work: Callable[[], Awaitable[bytes]], deliver: Callable[[bytes], None], scope: trio.CancelScope
    ) -> None:
        """Run ``work`` in a task of its own and ``deliver`` its reply; a bug in it becomes an error reply.

        Cancelling ``scope`` ends the work; what is delivered then is for nobody.
        """
        self._nursery.start_soon(self._guarded, work, deliver, scope)

    async def _guarded(
        self, work: Callable[[], Awaitable[bytes]], deliver: Callable[[bytes], None], scope: trio.CancelScope
    ) -> None:
        reply = CANCELLED
        try:
            with scope:
                reply = await work()
        except Exception as fault:
            reference = f"{random.getrandbits(32):08x}"
            log.exception("task_fault", reference=reference, error=fault)
            reply = internal_fault(reference)
        deliver(reply)

    def why_unreachable(self, hash_slot: int, target: Address | None = None) -> str:
        """Why the slot's owner, or ``target``, takes no requests now."""
        if target is None:
            primary = self.topology.view.primary_of(hash_slot)
            if primary is None:
                return "no node serves the slot"
            target = primary.address
        return f"{target}: {self.nodes.failure(target) or 'not connected yet, or its send buffer is full'}"
