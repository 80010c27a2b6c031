"""Explains a read: does the proof that its level asks for, for real, but does not run the read.

    the level, and whose choice it is ─▶ does only a primary answer it? ─▶ the owner is asked whether it is there
                                                  │ no
              caught_up, or a session without a usable floor: the owner tells its offset, the floor
                                                  │
              every replica is asked what it has applied, all at once; ``judge`` says whether that is enough
                                                  │
              of those that prove the level, the one that reads would go to; if there is none, the owner

A read of a snapshot is its owner's alone: the key there, and behind it the markers of the snapshot and of newer ones.

What nodes tell is noted as if a read had asked, and nothing else changes: no session learns of it, no counter counts.

One thing differs from a read. A read asks one replica, chosen by what is known of it, and goes to the owner if that
one proves too little; here all are asked, so the one that is named is the one that reads come to after the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.failures import not_ready
from proxy.exchange.read_groups import Asked, ReadCounts
from proxy.exchange.replica_reads import INFO_REPLICATION, UNPROVEN
from proxy.exchange.sessions import LOST, Session, samples_of
from proxy.protocol.encode import error
from proxy.protocol.facts import reply_of_facts
from proxy.replicas.service import RESP_INDEX, Replica, ShardReplicas
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import RESPS, Lane
from proxy.upstream.reply_slot import ConnectionLostError
from routing import explain as words
from routing.command import CURSOR_COMMANDS, Command, lookup
from routing.explain import CandidateFacts, Explanation, Preference, as_json
from routing.keys import key_positions
from routing.levels import STRONG, Level, LevelChoice, ReadLevel
from routing.mode import NO_SNAPSHOT
from routing.offsets import Point, Sample, SampleError, parse_sample
from routing.priority import Priority
from routing.promotion import Stage
from routing.proof import Refusal, judge
from routing.slot import slot_of
from routing.snapshot_reads import is_plain, plan
from routing.topology import Node

READING_SCRIPTS = frozenset({"EVAL_RO", "EVALSHA_RO", "FCALL_RO"})


async def explain(
    exchange: Exchange,
    arguments: Sequence[bytes],
    choice: LevelChoice,
    session: Session | None,
    deadline: float,
    *,
    resp: int = 2,
    is_question: bool = False,
) -> Explanation:
    """Where this read goes now, and why. Raises ExplainError if it is no read of keys.

    ``choice``: what reads of its connection get; ``is_question``: the level stands in the question, and no connection
    chose it. ``session``: of the connection; None stands for one that is new. Nodes are waited for until ``deadline``
    (Trio's clock), and replicas no longer than reads wait for them. MGET is explained by its first key's slot.
    """
    read = _read_of(arguments, choice, is_question)
    explanation: Explanation | None = None
    while explanation is None:
        shard = exchange.replicas.owner_of(read.slot)
        look = _Look(exchange, read, shard, session, deadline, resp)
        async with trio.open_nursery() as nursery:
            if trio.current_time() < deadline:
                nursery.start_soon(_cancel_when_moved, exchange, read.slot, shard, nursery.cancel_scope)
            explanation = await look.explanation()
            nursery.cancel_scope.cancel()
    return explanation


async def _cancel_when_moved(
    exchange: Exchange, slot: int, shard: ShardReplicas | None, scope: trio.CancelScope
) -> None:
    """What is asked of a shard that the slot has left is of no use: look anew."""
    while exchange.replicas.owner_of(slot) is shard:
        await exchange.topology.wait_change()
    scope.cancel()


def reply_of(explanation: Explanation, *, resp3: bool) -> bytes:
    """The explanation as a map; in RESP2 as an array of names and values in turn."""
    return reply_of_facts(as_json(explanation), resp3=resp3)


# -- what is asked


@dataclass(frozen=True, slots=True)
class _Read:
    """The read, its level, and whose choice that is."""

    command: Command
    key: bytes  # of several the first
    keys: tuple[bytes, ...]
    slot: int
    asked: ReadLevel | None
    level: ReadLevel
    because: str
    why_owner: str  # why only its owner answers, whatever the state of slot and shard; empty if replicas may
    refusal: str  # the error that it is at its level, whatever the state of all; empty if it is none


def _read_of(arguments: Sequence[bytes], choice: LevelChoice, is_question: bool) -> _Read:
    key = words.key_of_read(arguments)
    command = lookup(arguments)
    assert command is not None
    keys = [arguments[position] for position in key_positions(command, arguments)]
    slot = slot_of(key)
    level, because = choice.of_key(key), _whose_choice(choice, key, is_question)
    if command.name == "MGET" and len({choice.of_key(other) for other in keys if slot_of(other) == slot}) > 1:
        level, because = STRONG, words.KEYS_DIFFER
    why_owner = words.LEVEL_STRONG if level.level is Level.STRONG else _why_not_at_replicas(command, keys)
    refusal = ""
    if level.level is Level.SNAPSHOT:
        planned = plan(command, arguments)
        refusal = planned if isinstance(planned, str) else ""
    return _Read(command, key, tuple(keys), slot, choice.connection, level, because, why_owner, refusal)


def _whose_choice(choice: LevelChoice, key: bytes, is_question: bool) -> str:
    if choice.connection is not None:
        return words.BY_QUESTION if is_question else words.BY_CONNECTION
    usual = words.BY_MODE if choice.listener is None else words.BY_LISTENER
    for rule in choice.rules:
        if key.startswith(rule.prefix):
            return (
                words.by_rule(rule.prefix) if choice.looks_at_keys else f"{usual}; {words.RULES_DO_NOT_COUNT}"
            )
    return usual


def _why_not_at_replicas(command: Command, keys: Sequence[bytes]) -> str:
    if command.is_read_at_replicas or command.name == "MGET":
        return ""
    if not command.only_reads:
        return words.MAY_WRITE
    if command.name in READING_SCRIPTS:
        return words.RUNS_SCRIPT
    if command.name in CURSOR_COMMANDS:
        return words.HAS_CURSOR
    return words.SEVERAL_KEYS if len(keys) > 1 else words.NOT_AT_REPLICAS


# -- the proof


@dataclass(slots=True)
class _Found:
    """What one replica told, or why it told nothing."""

    failure: str = ""
    sample: Sample | None = None
    came_at: float = 0.0  # Trio's clock
    refusal: Refusal | None = None  # of its sample


@dataclass(slots=True)
class _Verdict:
    """The end of a look. ``served_by`` None: the client gets ``refusal``."""

    served_by: Node | None
    why: dict[str, str]  # node id -> why it was chosen, or why not
    refusal: str = ""


@dataclass(slots=True)
class _Look:
    """One look at the read, by one state of the map."""

    exchange: Exchange
    read: _Read
    shard: ShardReplicas | None
    session: Session | None
    deadline: float
    resp: int
    floor: Point | None = None
    owner_sample: Sample | None = None
    was_owner_asked: bool = False
    snapshot_id: int | None = None  # that the read is of
    found: dict[Replica, _Found] = field(default_factory=dict)

    async def explanation(self) -> Explanation:
        verdict = await self._verdict()
        served_by, shard, read = verdict.served_by, self.shard, self.read
        is_owner = shard is not None and served_by is shard.primary
        given: Level | None = None
        if served_by is not None:
            given = Level.STRONG if is_owner and self.snapshot_id is None else read.level.level
        candidates = tuple(self._candidates(verdict))
        chosen = next((candidate for candidate in candidates if candidate.is_chosen), None)
        return Explanation(
            command=read.command.name,
            key=read.key,
            slot=read.slot,
            slot_state=self._slot_state(),
            owner=None if shard is None else shard.primary.address,
            epoch=self.exchange.topology.view.epoch,
            asked=read.asked,
            level=read.level,
            because=read.because,
            given=given,
            floor=self.floor,
            staleness_seconds=None if chosen is None else self._staleness_seconds(chosen),
            served_by=None if served_by is None else served_by.address,
            role="" if served_by is None else served_by.role.value,
            candidates=candidates,
            refusal=verdict.refusal,
            snapshot_id=self.snapshot_id,
            markers=() if served_by is None else self._markers(),
            hot_share=self.exchange.hot.share_of_reads(read.key),
        )

    async def _verdict(self) -> _Verdict:
        if self.read.level.level is Level.SNAPSHOT:
            return await self._of_snapshot()
        shard, lost_reply = self.shard, None
        if self.session is not None:
            lost_reply = await self.session.check(self.exchange, self.deadline)  # as before each read
        if lost_reply is not None:
            return self._refused(lost_reply, words.SESSION_LOST if lost_reply == LOST else words.NO_FLOOR)
        if shard is None:
            return self._refused(self._not_served(), words.SLOT_UNOWNED)
        if why_owner := self.read.why_owner or self._why_primary():
            return await self._at_owner(why_owner, dict.fromkeys(_ids(shard), why_owner))
        return await self._at_replica(shard)

    async def _of_snapshot(self) -> _Verdict:
        """Its owner serves it, or a replica, if the snapshot serves."""
        snapshots, shard = self.exchange.snapshots, self.shard
        self.snapshot_id = self.read.level.snapshot_id or snapshots.current()
        if self.snapshot_id is None:
            return self._refused(error(NO_SNAPSHOT), words.SNAPSHOT_REFUSED)
        refusal = snapshots.refusal(self.snapshot_id)
        if refusal is not None:
            return self._refused(refusal, words.SNAPSHOT_REFUSED)
        if self.read.refusal:
            return self._refused(error(self.read.refusal), words.NOT_OF_SNAPSHOT)
        if shard is None:
            return self._refused(self._not_served(), words.SLOT_UNOWNED)
        is_in_flux = self.read.slot in self.exchange.routes.in_flux
        why_owner = words.SNAPSHOT_IN_FLUX if is_in_flux else words.LEVEL_SNAPSHOT
        is_unwritten = not is_in_flux and snapshots.own_writes.shows(self.snapshot_id, self.read.keys)
        if is_unwritten:
            why_owner = words.SNAPSHOT_UNWRITTEN
        verdict = await self._at_owner(why_owner, dict.fromkeys(_ids(shard), why_owner))
        replicas = self.exchange.snapshot_reads.replicas
        if is_unwritten and replicas.is_used and is_plain(self.read.command):
            line = replicas.line(self.snapshot_id, self.read.slot, self.resp)
            if line is not None:
                replica = line[0].node
                verdict = _Verdict(replica, {**verdict.why, replica.id: words.SNAPSHOT_AT_REPLICA})
        refusal = snapshots.refusal(self.snapshot_id)  # it may have ended meanwhile
        return verdict if refusal is None else self._refused(refusal, words.SNAPSHOT_REFUSED)

    def _markers(self) -> tuple[int, ...]:
        """Of which snapshots' markers the read asks."""
        snapshots = self.exchange.snapshots
        if self.snapshot_id is None or snapshots.own_writes.shows(self.snapshot_id, self.read.keys):
            return ()
        chain = snapshots.chain
        return chain.markers_of(self.snapshot_id) if self.snapshot_id in chain.ids else ()

    def _staleness_seconds(self, chosen: CandidateFacts) -> float | None:
        """Of the reply: the snapshot's age, or that of what the node has."""
        if self.snapshot_id is None:
            return chosen.staleness_seconds
        facts = self.exchange.snapshots.facts_of(self.snapshot_id)
        return None if facts is None else facts.age_seconds

    def _slot_state(self) -> str:
        replicas, slot = self.exchange.replicas, self.read.slot
        if self.shard is None:
            return words.UNOWNED
        if slot in self.exchange.routes.in_flux:
            return words.IN_FLUX
        return words.SETTLED if replicas.settling_until(slot) is None else words.MOVED

    def _why_primary(self) -> str:
        """Why the slot is read at primaries now; empty if it is not."""
        replicas, slot = self.exchange.replicas, self.read.slot
        if replicas.of_slot[slot] is not None:
            return ""
        until = replicas.settling_until(slot)
        if until is None or slot in self.exchange.routes.in_flux:
            return words.SLOT_IN_FLUX
        settle_seconds = replicas.options.settle_seconds
        return words.slot_moved(max(0.0, trio.current_time() + settle_seconds - until), settle_seconds)

    async def _at_owner(self, why_owner: str, why: dict[str, str]) -> _Verdict:
        """The owner serves it, if it is there."""
        shard = self.shard
        assert shard is not None
        if not self.was_owner_asked:
            await self._ask_owner(shard)
        primary = shard.primary
        if self.owner_sample is None:
            why[primary.id] = self._why_owner_silent(primary)
            return _Verdict(None, why, _text_of(self._not_served()))
        why[primary.id] = why_owner
        return _Verdict(primary, why)

    async def _at_replica(self, shard: ShardReplicas) -> _Verdict:
        """A replica serves it, if one proves its level; else the owner."""
        asked = Asked(self.read.level, self.resp, ReadCounts())
        line = await self._floor_for(shard, asked)
        session = self.session if asked.is_session else None
        if asked.needs_floor and self.owner_sample is not None and session is not None:
            if not session.is_kept(shard, self.owner_sample):
                return self._refused(LOST, words.SESSION_LOST)
        await self._ask_replicas(shard)
        against = {replica: self._against(replica, asked) for replica in shard.replicas}
        proven = [replica for replica, why_not in against.items() if not why_not]
        chosen = self._choose(shard, proven, line)
        if chosen is not None:
            why = {replica.node.id: why_not for replica, why_not in against.items()}
            for replica in proven:
                why[replica.node.id] = self._preferred(chosen, replica, is_line=line is not None)
            why[chosen.node.id] = words.CHOSEN
            why[shard.primary.id] = words.OWNER_NOT_NEEDED
            return _Verdict(chosen.node, why)
        for replica in proven:  # not the one that the session goes on with, or it is not their turn
            is_line = line is not None
            against[replica] = words.SESSION_GOES_ON if is_line else words.returning(replica.circuit.share)
        return await self._at_owner_instead(shard, session, against)

    async def _at_owner_instead(
        self, shard: ShardReplicas, session: Session | None, against: dict[Replica, str]
    ) -> _Verdict:
        """No replica proves the level."""
        why = {replica.node.id: why_not for replica, why_not in against.items()}
        had_floor = session is not None and not self.was_owner_asked
        told = any(found.sample is not None for found in self.found.values())
        why_owner = words.OWNER_PROVES if told else words.OWNER_ASKED
        verdict = await self._at_owner(why_owner if against else words.NO_REPLICA, why)
        if had_floor and any(found.refusal is Refusal.OTHER_HISTORY for found in self.found.values()):
            # The primary may have begun a new history without what the session wrote: reads ask it first, too.
            assert session is not None
            if self.owner_sample is None:
                verdict.refusal = _text_of(UNPROVEN)
            elif not session.is_kept(shard, self.owner_sample):
                return self._refused(LOST, words.SESSION_LOST)
        return verdict

    # -- questions to nodes

    async def _floor_for(self, shard: ShardReplicas, asked: Asked) -> NodeConnection | None:
        """Find the floor. The connection that the session goes on with, if its floor is still good there."""
        if not asked.needs_floor:
            return None
        line = None
        if asked.is_session and self.session is not None:
            self.floor = self.session.floor_of(shard)
            line = self.session.line_of(shard)
            if line is not None and self.exchange.reads.readable_at(shard, line) is None:
                self.floor = line = None
        if self.floor is None:
            line = None
            await self._ask_owner(shard)
            self.floor = None if self.owner_sample is None else self.owner_sample.point
        return line

    async def _ask_owner(self, shard: ShardReplicas) -> None:
        self.was_owner_asked = True
        self.owner_sample = (await samples_of(self.exchange, [shard], self.deadline))[shard]

    async def _ask_replicas(self, shard: ShardReplicas) -> None:
        """Ask each what it has applied, all at once."""
        async with trio.open_nursery() as nursery:
            for replica in shard.replicas:
                self.found[replica] = found = _Found()
                connection = replica.connections[0]
                if connection is not None and connection.ready:
                    nursery.start_soon(self._ask_replica, replica, connection, found)

    async def _ask_replica(self, replica: Replica, connection: NodeConnection, found: _Found) -> None:
        asked_at = trio.current_time()
        seconds = self.exchange.replicas.nodes.deadline_seconds
        found.failure = words.timed_out(seconds)
        try:
            with trio.move_on_after(seconds):
                sample = parse_sample(await connection.request(INFO_REPLICATION))
                found.failure, found.sample, found.came_at = "", sample, trio.current_time()
                self.exchange.replicas.note(replica, sample, asked_at, found.came_at)
        except (ConnectionLostError, SampleError) as problem:
            found.failure = words.no_stamp(str(problem))

    # -- who is chosen, and who is not

    def _against(self, replica: Replica, asked: Asked) -> str:
        """Why this replica is not asked, or its reply is not used; empty if nothing speaks against it."""
        if replica.stage is Stage.QUARANTINED and replica.mismatched:
            return words.quarantined(replica.mismatched)
        connection = replica.connections[RESP_INDEX[self.resp]]
        if connection is None or not connection.ready:
            return words.not_connected(self.exchange.replicas.nodes.failure(replica.address))
        if not replica.is_readable:
            return _not_readable(replica)
        if self.exchange.reads.can_owner(replica.shard):  # else there is nobody to spare the replica
            if replica.circuit.is_open:
                return words.out(replica.circuit.why)
            if not connection.load.has_permit(Priority.NORMAL):
                return words.NO_PERMIT
        if asked.needs_floor and self.floor is None:
            return words.NO_FLOOR
        found = self.found[replica]
        if found.sample is None:
            return found.failure or words.not_connected("")
        if asked.is_eventual:
            return ""
        history = replica.shard.history
        found.refusal, until = judge(asked.bound, history, self.floor, found.sample, found.came_at)
        if found.refusal is not None:
            return self._refused_because(
                found.refusal, found.sample, found.came_at - until, asked, history.replid
            )
        return words.KNOWN_BEHIND if asked.bound == inf and replica.is_behind else ""

    def _refused_because(
        self, refusal: Refusal, sample: Sample, staleness_seconds: float, asked: Asked, replid: bytes
    ) -> str:
        """What ``judge`` found, in a sentence. ``replid``: of the primary's history."""
        match refusal:
            case Refusal.SYNCING:
                return words.not_readable(Stage.SYNCING.value)
            case Refusal.BEHIND:
                assert self.floor is not None
                return words.behind(self.floor.offset - sample.point.offset)
            case Refusal.TOO_OLD if staleness_seconds != inf:
                return words.too_old(staleness_seconds, asked.bound)
            case Refusal.OTHER_HISTORY if replid or asked.needs_floor:
                return words.OTHER_HISTORY
        return words.NOTHING_PROVED

    def _choose(
        self, shard: ShardReplicas, proven: Sequence[Replica], line: NodeConnection | None
    ) -> Replica | None:
        """Of these the one that reads go to."""
        if line is not None:
            return next((replica for replica in proven if line in replica.connections), None)
        among = ShardReplicas(shard.primary)
        among.replicas = tuple(proven)
        choice = among.choose(self.resp, 0, despite=not self.exchange.reads.can_owner(shard))
        return None if choice is None else choice[0]

    def _preferred(self, chosen: Replica, other: Replica, *, is_line: bool) -> str:
        """Why ``chosen`` is asked and ``other``, which proves as much, is not."""
        if is_line:
            return words.SESSION_GOES_ON
        index = RESP_INDEX[self.resp]
        ours, theirs = chosen.connections[index], other.connections[index]
        assert ours is not None
        assert theirs is not None
        if other.circuit.share != 1.0:
            return words.returning(other.circuit.share)
        if chosen.in_zone != other.in_zone:
            return words.passed_over(Preference.ZONE)
        if len(ours.owed) != len(theirs.owed):
            return words.passed_over(Preference.OUTSTANDING)
        is_quicker = (chosen.latency_seconds or 0.0) < (other.latency_seconds or 0.0)
        return words.passed_over(Preference.LATENCY if is_quicker else Preference.FIRST)

    # -- refusals

    def _refused(self, reply: bytes, why: str) -> _Verdict:
        ids = () if self.shard is None else _ids(self.shard)
        return _Verdict(None, dict.fromkeys(ids, why), _text_of(reply))

    def _not_served(self) -> bytes:
        """What a client gets whose read waited for the owner in vain."""
        slot, seconds = self.read.slot, self.exchange.deadline_seconds
        owner = self.exchange.routes.owner(slot, 2, Lane.READ)
        reason = self.exchange.why_unreachable(slot)
        if owner is not None:
            reason = f"{owner.address} did not reply within {seconds:g} s"
        return not_ready(f"slot {slot}", seconds, reason)

    def _why_owner_silent(self, primary: Node) -> str:
        if self.exchange.routes.node(primary.address, 2, Lane.READ) is None:
            return words.not_connected(self.exchange.nodes.failure(primary.address))
        return words.timed_out(self.exchange.deadline_seconds)

    # -- candidates

    def _candidates(self, verdict: _Verdict) -> Iterator[CandidateFacts]:
        shard = self.shard
        if shard is None:
            return
        now = trio.current_time()
        exchange, primary = self.exchange, shard.primary
        yield _facts_of_primary(
            exchange,
            shard,
            verdict.why[primary.id],
            is_chosen=primary is verdict.served_by,
            is_told=self.owner_sample is not None,
        )
        for migration in exchange.topology.view.migrations:
            if self.read.slot in migration.slots and primary.id == migration.source_id:
                for other in exchange.replicas.shards():
                    if other.primary.id == migration.target_id:
                        yield _facts_of_primary(exchange, other, words.MIGRATION_TARGET)
        for replica in shard.replicas:
            yield self._facts_of_replica(replica, verdict, now)

    def _facts_of_replica(self, replica: Replica, verdict: _Verdict, now: float) -> CandidateFacts:
        found = self.found.get(replica)
        told_at = found.came_at if found is not None and found.sample is not None else now
        until = replica.shard.history.proven_until(replica.stamp)
        is_syncing = replica.sample is not None and replica.sample.is_syncing  # its offset proves nothing
        return CandidateFacts(
            node_id=replica.node.id,
            address=replica.address,
            role=replica.node.role.value,
            stage=replica.stage.value,
            zone=replica.zone,
            outstanding=replica.outstanding(),
            latency_seconds=replica.latency_seconds,
            stamp=None if replica.sample is None else replica.stamp,
            staleness_seconds=None if until is None or is_syncing else max(0.0, told_at - until),
            is_chosen=replica.node is verdict.served_by,
            why=verdict.why.get(replica.node.id, words.not_connected("")),
        )


def _facts_of_primary(
    exchange: Exchange, shard: ShardReplicas, why: str, *, is_chosen: bool = False, is_told: bool = False
) -> CandidateFacts:
    """``is_told``: it has told its offset just now, so that nothing is newer than what it has."""
    node = shard.primary
    return CandidateFacts(
        node_id=node.id,
        address=node.address,
        role=node.role.value,
        stage="",
        zone=(exchange.replicas.options.zones or {}).get(node.address, ""),
        outstanding=_outstanding(exchange, node),
        latency_seconds=None,
        stamp=None if shard.sample is None else shard.sample.point,
        staleness_seconds=0.0 if is_told else None,
        is_chosen=is_chosen,
        why=why,
    )


def _ids(shard: ShardReplicas) -> Iterator[str]:
    yield shard.primary.id
    for replica in shard.replicas:
        yield replica.node.id


def _not_readable(replica: Replica) -> str:
    """By its stage, and what the one who promotes it says of it beyond that."""
    sentence = words.not_readable(replica.stage.value)
    return sentence if replica.why_not in sentence else f"{sentence} ({replica.why_not})"


def _outstanding(exchange: Exchange, node: Node) -> int:
    """Replies that a primary owes on its shared connections."""
    found = (exchange.nodes.connection(node.address, resp, lane) for resp in RESPS for lane in Lane)
    return sum(len(connection.owed) for connection in found if connection is not None)


def _text_of(reply: bytes) -> str:
    """An error reply without its frame."""
    return reply[1:-2].decode(errors="replace")
