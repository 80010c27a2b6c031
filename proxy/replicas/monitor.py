"""Watches the replicas and their primaries: asks for their offsets at a steady beat, and promotes or takes back.

At each beat the primaries are asked, and when one has answered, its replicas; the answers are handled in the turn in
which they come. Nobody waits for an answer, so a node that gives none holds up no other: while its question is open
it is asked no second one, and after SILENCE_SECONDS it counts as not answering.

What an answer means for a replica is decided by ``routing.promotion``. Comparisons (``proxy.replicas.verify``) are
tasks of their own, one at a time for each shard and a few at a time in all. Nothing that a node does raises here; it
is the reason why a replica is not readable.

The beat is quick while reads at replicas are in use, and while some replica is on its way to be readable; else slow.
A quicker one looks for replicas that stall. The questions are also what a replica is probed with whose circuit is open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import inf

import trio

from proxy.log import get_logger
from proxy.protocol.encode import command
from proxy.protocol.replies import ServerError, decode
from proxy.replicas.service import Replica, Replicas, ShardReplicas
from proxy.replicas.verify import REPLICATION, compare
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane, Nodes
from proxy.upstream.reply_slot import Slot
from routing.comparison import Outcome
from routing.offsets import Sample, SampleError, parse_sample
from routing.promotion import (
    Compared,
    Promotion,
    PromotionRules,
    Stage,
    Tick,
    advance,
    is_comparison_due,
    keys_to_compare,
    parse_backlog,
    reset,
)

IDLE_INTERVAL_SECONDS = 1.0  # the beat while nobody reads at replicas
IN_USE_SECONDS = 5.0  # after the last read at a replica, or the last change of a stage, the beat is quick
ASKED_PER_SECOND_MAX = 2000  # nodes: of larger clusters each is asked less often
IDLE_ASKED_PER_SECOND_MAX = 200
LOOKED_AT_PER_SECOND_MAX = 20_000  # replicas, for stalls: about a hundredth of the processor
ASKED_PER_STEP = 50  # shards, so that the sockets have their turns in between
SILENCE_SECONDS = 0.5  # a question that is open for longer: the node does not answer
COMPARE_SECONDS_MAX = 5.0
COMPARISONS_MAX = 4  # at once
SERVER = command("INFO", "server")
ZONE_FIELD = "availability_zone:"

log = get_logger(__name__)

OnStage = Callable[[Replica, Stage, Stage, str], None]  # the replica, its former stage, its stage, the reason


@dataclass(frozen=True, slots=True)
class MonitorOptions:
    """What operators set. Durations in seconds."""

    sample_interval_seconds: float = 0.1  # while reads at replicas are in use
    verify_interval_seconds: float = 30.0  # 0: a readable replica is not compared again
    verify_keys: int = 16
    quarantine_seconds: float = 60.0

    def rules(self) -> PromotionRules:
        return PromotionRules(self.verify_interval_seconds, self.verify_keys, self.quarantine_seconds)


class _Question(Slot):
    """INFO to one node. Its answer, or None when the connection ended first, goes to ``on_answer``."""

    __slots__ = ("asked_at", "hash_slot", "on_answer", "raw", "requester")

    def __init__(self, raw: bytes, on_answer: Callable[[_Question, bytes | None], None]) -> None:
        self.raw = raw
        self.hash_slot = -1
        self.requester = None
        self.on_answer = on_answer
        self.asked_at = trio.current_time()  # before it is queued

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        self.on_answer(self, reply)

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        self.on_answer(self, None)


@dataclass(slots=True, eq=False)
class _WatchedReplica:
    replica: Replica
    promotion: Promotion = field(default_factory=Promotion)
    open: _Question | None = None  # not answered yet
    compared: Compared | None = None  # a comparison that ended since the last tick
    compared_at: float = -inf  # when its last comparison was begun
    zone_asked_of: NodeConnection | None = None


@dataclass(slots=True, eq=False)
class _WatchedShard:
    shard: ShardReplicas
    open: _Question | None = None
    is_comparing: bool = False


class Monitor:
    """See the module's text. ``run`` must run for replicas to become readable, and to be taken back."""

    def __init__(
        self,
        replicas: Replicas,
        primaries: Nodes,
        options: MonitorOptions,
        on_stage: OnStage = lambda replica, old, new, reason: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``clock`` gives Unix seconds, for people; everything else goes by Trio's."""
        self.options = options  # may be set anew at any time
        self.on_stage = on_stage
        self.samples_total = 0
        self.comparisons_total = 0
        self.mismatches_total = 0
        self._replicas = replicas
        self._primaries = primaries
        self._clock = clock
        self._shards: dict[ShardReplicas, _WatchedShard] = {}
        self._watched: dict[Replica, _WatchedReplica] = {}
        self._changed_at = -inf  # Trio's time of the last change of a stage
        self._comparisons = trio.CapacityLimiter(COMPARISONS_MAX)
        self._nursery: trio.Nursery | None = None
        self._news = trio.Event()
        self._reads_begin = trio.Event()
        replicas.on_connection_lost = self._on_connection_lost
        replicas.on_news = self._on_news

    def _on_news(self) -> None:
        self._news.set()
        self._reads_begin.set()

    async def run(self) -> None:
        """Beat until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._watch_for_stalls)
            while True:
                began = trio.current_time()
                self._follow()
                self._replicas.settle(began)
                for first in range(0, len(self._shards), ASKED_PER_STEP):
                    for shard in [*self._shards.values()][first : first + ASKED_PER_STEP]:
                        self._ask_shard(shard)
                    await trio.lowlevel.checkpoint()
                with trio.move_on_at(began + self.interval_seconds()):
                    await self._news.wait()
                self._news = trio.Event()

    async def _watch_for_stalls(self) -> None:
        """A quicker beat, while reads are sent to replicas, and circuits are not closed.

        Silence counts until the beat was due: when this process itself stood still since, replies may wait unread.
        """
        while True:
            due = trio.current_time() + self._stall_beat_seconds()
            await trio.sleep_until(due)
            await trio.lowlevel.checkpoint()  # the sockets have their turn
            self._replicas.look_for_stalls(due)
            if not self._is_in_use():
                self._reads_begin = trio.Event()
                await self._reads_begin.wait()

    def _stall_beat_seconds(self) -> float:
        """A quarter of the shortest stall; longer in large clusters."""
        stall_seconds = self._replicas.options.stall_seconds or IDLE_INTERVAL_SECONDS
        return max(stall_seconds / 4, len(self._watched) / LOOKED_AT_PER_SECOND_MAX)

    def _is_in_use(self) -> bool:
        if trio.current_time() - self._replicas.used_at < IN_USE_SECONDS:
            return True
        return any(replica.circuit.share != 1.0 for replica in self._watched)

    def interval_seconds(self) -> float:
        """The time between two beats, as things are."""
        count = len(self._shards) + len(self._watched)
        quick = max(self.options.sample_interval_seconds, count / ASKED_PER_SECOND_MAX)
        if trio.current_time() - max(self._replicas.used_at, self._changed_at) < IN_USE_SECONDS:
            return quick
        return max(quick, IDLE_INTERVAL_SECONDS, count / IDLE_ASKED_PER_SECOND_MAX)

    # -- who is watched

    def _follow(self) -> None:
        """Watch the shards and replicas that there are now, and no others."""
        self._shards = {
            shard: self._shards.get(shard) or _WatchedShard(shard) for shard in self._replicas.shards()
        }
        former, self._watched = self._watched, {}
        for replica in self._replicas.replicas():
            watched = former.get(replica)
            if watched is None:
                watched = _WatchedReplica(replica)
                self._changed_at = trio.current_time()
            self._watched[replica] = watched

    def _on_connection_lost(self, replica: Replica) -> None:
        watched = self._watched.get(replica)
        if watched is not None:
            watched.open = None
            failure = self._replicas.nodes.failure(replica.address)
            why = "the connection to it ended" + (f": {failure}" if failure else "")
            self._set(watched, reset(watched.promotion, Stage.JOINING, why))

    # -- asking

    def _ask_shard(self, watched: _WatchedShard) -> None:
        """Ask the primary, whose answer lets its replicas be asked; them at once if it does not answer."""
        shard = watched.shard
        now = trio.current_time()
        connection = self._primaries.connection(shard.primary.address, 2, Lane.READ)
        if connection is None:
            self._ask_replicas(shard.replicas)
        elif watched.open is None:
            watched.open = _Question(
                REPLICATION, lambda question, reply: self._on_primary(watched, question, reply)
            )
            connection.queue(watched.open)
        elif now - watched.open.asked_at >= SILENCE_SECONDS:
            self._ask_replicas(shard.replicas)

    def _on_primary(self, watched: _WatchedShard, question: _Question, reply: bytes | None) -> None:
        if watched.open is question:
            watched.open = None
        shard = watched.shard
        sample = self._parsed(reply, shard.primary.address)
        if sample is not None and not shard.is_gone:
            shard.note(sample, question.asked_at)
            self._ask_replicas(shard.replicas, sample, question.asked_at)
        elif not shard.is_gone:
            self._ask_replicas(shard.replicas)

    def _ask_replicas(
        self, replicas: Iterable[Replica], primary: Sample | None = None, primary_asked_at: float = 0.0
    ) -> None:
        for replica in replicas:
            watched = self._watched.get(replica)
            if watched is not None:
                self._ask_replica(watched, primary, primary_asked_at)

    def _ask_replica(self, watched: _WatchedReplica, primary: Sample | None, primary_asked_at: float) -> None:
        connection = watched.replica.connections[0]
        if connection is None or connection.is_closed:
            failure = self._replicas.nodes.failure(watched.replica.address)
            self._take(watched, Tick(None, problem=failure or "it has no connection yet"))
            return
        if watched.open is not None:
            silent_seconds = trio.current_time() - watched.open.asked_at
            if silent_seconds >= SILENCE_SECONDS:
                self._take(watched, Tick(None, problem=f"it has not answered for {SILENCE_SECONDS:g} s"))
            return

        def on_answer(question: _Question, reply: bytes | None) -> None:
            if watched.open is question:
                watched.open = None
                self._on_replica(watched, question, reply, primary, primary_asked_at)

        watched.open = _Question(REPLICATION, on_answer)
        if watched.zone_asked_of is not connection:
            watched.zone_asked_of = connection
            connection.queue(_Question(SERVER, lambda question, reply: self._on_server(watched, reply)))
        connection.queue(watched.open)

    def _on_replica(
        self,
        watched: _WatchedReplica,
        question: _Question,
        reply: bytes | None,
        primary: Sample | None,
        primary_asked_at: float,
    ) -> None:
        if self._watched.get(watched.replica) is not watched:
            return  # it is none any more
        sample = self._parsed(reply, watched.replica.address)
        if sample is None:
            self._take(watched, Tick(None, problem=_problem_of(reply)))
            return
        self._replicas.note(watched.replica, sample, question.asked_at, trio.current_time())
        backlog_from = None if reply is None else parse_backlog(reply)
        self._take(watched, Tick(sample, primary, primary_asked_at, backlog_from))

    def _parsed(self, reply: bytes | None, address: object) -> Sample | None:
        self.samples_total += 1
        if reply is None:
            return None
        try:
            return parse_sample(reply)
        except SampleError as error:
            log.debug("sample_unreadable", node=address, error=error)
            return None

    def _on_server(self, watched: _WatchedReplica, reply: bytes | None) -> None:
        """Valkey from 8.1 on names the zone it is in, if it was told."""
        for line in (reply or b"").decode(errors="replace").splitlines():
            if line.startswith(ZONE_FIELD):
                self._replicas.set_zone(watched.replica, line.removeprefix(ZONE_FIELD).strip())

    # -- promoting

    def _take(self, watched: _WatchedReplica, tick: Tick) -> None:
        """One tick was seen: go by it."""
        if watched.compared is not None:
            tick = replace(tick, compared=watched.compared)
            watched.compared = None
        self._set(watched, advance(watched.promotion, tick, self.options.rules(), trio.current_time()))
        shard = self._shards.get(watched.replica.shard)
        if shard is not None and not shard.is_comparing and tick.primary is not None:
            self._compare_next(shard)

    def _compare_next(self, shard: _WatchedShard) -> None:
        """Begin a comparison of the shard's replica that is due and was not compared for longest, if there is one."""
        rules, now = self.options.rules(), trio.current_time()
        due = [
            watched
            for watched in map(self._watched.get, shard.shard.replicas)
            if watched is not None
            and watched.compared is None
            and is_comparison_due(watched.promotion, rules, now)
        ]
        primary = self._primaries.connection(shard.shard.primary.address, 2, Lane.READ)
        if not due or primary is None or self._nursery is None:
            return
        watched = min(due, key=lambda each: each.compared_at)
        replica = watched.replica.connections[0]
        if replica is not None:
            watched.compared_at = now
            shard.is_comparing = True
            self._nursery.start_soon(self._compare, shard, watched, primary, replica)

    def _set(self, watched: _WatchedReplica, promotion: Promotion) -> None:
        """The replica's fields say what its promotion says; a change of its stage is told."""
        former, watched.promotion = watched.promotion, promotion
        replica = watched.replica
        replica.mismatched = promotion.suspects
        if promotion.verified_at != former.verified_at:
            replica.verified_at = None if promotion.verified_at is None else self._clock()
        if promotion.stage is former.stage:
            replica.why_not = promotion.why_not
            return
        replica.set_stage(promotion.stage, promotion.why_not)
        self._changed_at = trio.current_time()
        reason = promotion.why_not or "its keys are equal to its primary's"
        is_bad = former.stage is Stage.READABLE or promotion.stage is Stage.QUARANTINED
        report = log.warning if is_bad else log.info
        report(
            "replica_stage_changed",
            node=replica.address,
            primary=replica.shard.primary.address,
            old=former.stage,
            new=promotion.stage,
            reason=reason,
        )
        self.on_stage(replica, former.stage, promotion.stage, reason)

    async def _compare(
        self, shard: _WatchedShard, watched: _WatchedReplica, primary: NodeConnection, replica: NodeConnection
    ) -> None:
        """One comparison. Its outcome counts at the replica's next tick."""
        try:
            async with self._comparisons:
                known = watched.promotion
                outcome = Outcome(problem=f"the comparison took longer than {COMPARE_SECONDS_MAX:g} s")
                with trio.move_on_after(COMPARE_SECONDS_MAX):
                    outcome = await compare(
                        primary, replica, known.suspects, keys_to_compare(known, self.options.rules())
                    )
        finally:
            shard.is_comparing = False
        self.comparisons_total += 1
        log.debug(
            "replica_compared",
            node=watched.replica.address,
            verdict=outcome.verdict,
            equal=outcome.equal,
            undecided=outcome.undecided,
            mismatched=len(outcome.mismatched),
            problem=outcome.problem,
        )
        self.mismatches_total += len(outcome.mismatched)
        watched.compared = Compared(known.proof, outcome)


def _problem_of(reply: bytes | None) -> str:
    if reply is None:
        return "the connection to it ended"
    if reply.startswith(b"-"):
        error = decode(reply)
        assert isinstance(error, ServerError)
        return f"it refused to tell its offset: {error}"
    return "it did not tell its offset"
