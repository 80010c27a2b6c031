"""Sessions of level ``session``: what each client's reads must show, and tokens that carry it to other connections.

The bookkeeping is ``routing.session``. Here it learns what happens: writes, reads that the owner served, the primaries'
samples, and changes of the map. After a change of the map a session is checked before its next read: a failover may
have lost what it wrote, and then its reads are refused until it is begun anew, also reads at the primary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import trio

from proxy.exchange.read_groups import ReadGroup
from proxy.exchange.replica_reads import INFO_REPLICATION
from proxy.log import get_logger
from proxy.protocol.encode import error
from proxy.replicas.service import Replicas, ShardReplicas
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ConnectionLostError
from routing.offsets import Point, Sample, SampleError, parse_sample
from routing.session import SessionState
from routing.token import Token, TokenError, is_of, pack_token, unpack_token

if TYPE_CHECKING:
    from proxy.exchange.exchange import Exchange

WITNESSES = 3  # primaries that a token names beside its floors, so that its cluster is known
LOOK_SECONDS = 0.01  # between two looks at whether the cluster was looked at

LOST = error(
    "NOTREADY this session's writes are not proven to have survived a failover;"
    " begin a new session with STEADY.READ SESSION, or read with another level"
)

log = get_logger(__name__)


class Session:
    """One connection's session."""

    def __init__(self, replicas: Replicas) -> None:
        self.open_groups: dict[ShardReplicas, ReadGroup] = {}
        self._replicas = replicas
        self._state: SessionState[ShardReplicas] = SessionState()
        self._lines: dict[ShardReplicas, NodeConnection] = {}
        self._map_version = replicas.map_version
        self.is_lost = False  # reads are refused until the session is begun anew
        # Counts what it did at owners: a floor that was asked before does not show the last of them.
        self.deeds = 0

    # -- what ``replica_reads`` asks and tells

    def floor_of(self, shard: ShardReplicas) -> Point | None:
        return self._state.floor(shard)

    def line_of(self, shard: ShardReplicas) -> NodeConnection | None:
        return self._lines.get(shard)

    def is_kept(self, shard: ShardReplicas, sample: Sample) -> bool:
        """Whether ``on_floor`` would go on with this sample; changes nothing."""
        return not self.is_lost and self._state.is_kept(shard, sample)

    def on_floor(self, shard: ShardReplicas, sample: Sample, deeds: int | None = None) -> bytes | None:
        if not self.is_kept(shard, sample):
            self.is_lost = True
            return LOST
        # What came behind the reads that asked for the floor is sent after them, and noted before: the floor is
        # right for those reads, and for no later ones.
        if deeds is None or deeds == self.deeds:
            self._state.sampled(shard, sample)
        self._lines.pop(shard, None)
        return None

    def on_served(self, shard: ShardReplicas, connection: NodeConnection) -> None:
        self._lines[shard] = connection

    def on_owner(self, shard: ShardReplicas) -> None:
        self.deeds += 1
        self._state.read_at_owner(shard)

    # -- what its client does

    @property
    def needs_check(self) -> bool:
        """The map has changed: ``check`` before the next command."""
        return not self.is_lost and self._map_version != self._replicas.map_version

    def wrote(self, slots: Iterable[int]) -> None:
        """Writes on these slots are sent."""
        self.deeds += 1
        for slot in slots:
            shard = self._replicas.owner_of(slot)
            if shard is not None:
                self._state.wrote(shard, shard.replid)

    def read_at_owner(self, slot: int) -> None:
        self.deeds += 1
        shard = self._replicas.owner_of(slot)
        if shard is not None:
            self._state.read_at_owner(shard)

    def wrote_somewhere(self) -> None:
        """A command ran whose slots are not known here: it may have written to any shard."""
        self.deeds += 1
        for shard in self._replicas.shards():
            self._state.wrote(shard, shard.replid)

    def read_somewhere(self) -> None:
        """A read was served by owners that are not known here."""
        self.deeds += 1
        self._state.map_changed()

    async def check(self, exchange: Exchange, deadline: float) -> bytes | None:
        """After a change of the map; an error reply when the session cannot go on as it is."""
        while not self.is_lost and self._map_version != self._replicas.map_version:
            version = self._replicas.map_version
            orphans = self._state.owed_by(lambda shard: shard.is_gone)
            samples: Sequence[Sample] = ()
            if orphans:
                asked = await samples_of(exchange, self._replicas.shards(), deadline)
                samples = [sample for sample in asked.values() if sample is not None]
                if len(samples) < len(asked) and trio.current_time() >= deadline:
                    return NOT_ASKED
                if version != self._replicas.map_version:
                    continue
            for shard in orphans:
                if shard.left_empty:  # its slots moved away in good order, and with them what it owed
                    self._state.forget(shard)
                elif not self._state.inherited(shard, samples):
                    self.is_lost = True
            self._state.map_changed()
            self._lines.clear()
            if self._map_version >= 0 and self._state.touched():
                self.wrote_somewhere()  # slots that it wrote may have gone to any shard, and what is owed with them
            self._map_version = version
        return LOST if self.is_lost else None

    # -- tokens

    async def token(self, exchange: Exchange, deadline: float) -> bytes:
        """A token for what this session has done so far; or an error reply."""
        refusal = await self.check(exchange, deadline)
        if refusal is not None:
            return refusal
        if not exchange.token_secret:
            return NO_SECRET
        unsampled = [shard for shard in self._state.touched() if self._state.floor(shard) is None]
        for shard, sample in (await samples_of(exchange, unsampled, deadline)).items():
            if sample is None:
                return NOT_ASKED
            if (refusal := self.on_floor(shard, sample)) is not None:
                return refusal
        return token_of(self._state.floors(), exchange)

    @classmethod
    async def of_token(cls, text: bytes, exchange: Exchange, deadline: float) -> Session | bytes:
        """The session that a token continues; or an error reply."""
        if not exchange.token_secret:
            return NO_SECRET
        try:
            token = unpack_token(text, exchange.token_secret)
        except TokenError as problem:
            return error(f"INVALIDTOKEN {problem}")
        topology, replicas = exchange.topology, exchange.replicas
        if not is_of(token, {node.id for node in topology.view.nodes()}):
            return error("INVALIDTOKEN the token names no node of this cluster: it is of another one")
        if token.fingerprint != topology.view.fingerprint or token.epoch > topology.view.epoch:
            # Who made it may know of a change that is news here.
            if not await _look_anew(exchange, token.epoch, deadline):
                return NOT_LOOKED
            if token.epoch > topology.view.epoch:
                return error(
                    f"NOTREADY the token is of cluster epoch {token.epoch}, and this proxy knows of"
                    f" {topology.view.epoch} only: its nodes may be cut off; try again"
                )
        session = cls(replicas)
        session._map_version = -1  # so that what has no primary any more is sought among today's
        is_usable = token.fingerprint == topology.view.fingerprint
        by_id = {shard.primary.id: shard for shard in replicas.shards()}
        for node_id, floor in token.floors.items():
            shard = by_id.get(node_id)
            if shard is None:
                shard = ShardReplicas.gone(node_id)
            session._state.promise(shard, floor, is_usable=False)
        refusal = await session.check(exchange, deadline)
        if refusal is not None:
            return refusal
        if is_usable and token.fingerprint == topology.view.fingerprint:
            for node_id, floor in token.floors.items():
                if (shard := by_id.get(node_id)) is not None:
                    session._state.promise(shard, floor, is_usable=True)
        return session


NO_SECRET = error("NOTREADY the secret that signs tokens has not been read from the store yet; try again")
NOT_LOOKED = error(
    "NOTREADY the token is of another slot map, and the cluster could not be looked at to see which is newer; try again"
)
NOT_ASKED = error("NOTREADY a primary did not tell its offset, so nothing is proven of it; try again")


async def token_of_now(exchange: Exchange, deadline: float) -> bytes:
    """A token for everything that is acknowledged by now, of who has no session; or an error reply."""
    if not exchange.token_secret:
        return NO_SECRET
    floors = {}
    for shard, sample in (await samples_of(exchange, exchange.replicas.shards(), deadline)).items():
        if sample is None:
            return NOT_ASKED
        floors[shard] = sample.point
    return token_of(floors, exchange)


def token_of(floors: dict[ShardReplicas, Point], exchange: Exchange) -> bytes:
    """The token, as a bulk string; or an error reply."""
    view = exchange.topology.view
    witnesses = frozenset(shard.primary.id for shard in view.shards[:WITNESSES])
    if not witnesses:
        return error("NOTREADY the cluster has not been seen yet; try again")
    token = Token(
        view.epoch,
        view.fingerprint,
        {shard.primary.id: point for shard, point in floors.items()},
        witnesses,
    )
    text = pack_token(token, exchange.token_secret)
    return b"$%d\r\n%b\r\n" % (len(text), text)


async def samples_of(
    exchange: Exchange, shards: Iterable[ShardReplicas], deadline: float
) -> dict[ShardReplicas, Sample | None]:
    """What the primaries of ``shards`` tell now; None for one that told nothing by the deadline (Trio's clock)."""
    found: dict[ShardReplicas, Sample | None] = {}

    async def ask(shard: ShardReplicas) -> None:
        found[shard] = await _sample_of(exchange, shard, deadline)

    async with trio.open_nursery() as nursery:
        for shard in shards:
            nursery.start_soon(ask, shard)
    return found


async def _sample_of(exchange: Exchange, shard: ShardReplicas, deadline: float) -> Sample | None:
    attempt = 0
    while trio.current_time() < deadline and not shard.is_gone:
        asked_at = trio.current_time()
        connection = exchange.routes.node(shard.primary.address, 2, Lane.READ)
        try:
            if connection is not None:
                with trio.move_on_at(deadline):
                    sample = parse_sample(await connection.request(INFO_REPLICATION))
                    if sample.is_primary:
                        shard.note(sample, asked_at)
                        return sample
                    exchange.topology.refresh_soon()
        except (ConnectionLostError, SampleError) as problem:
            log.info("no_floor", node=shard.primary.address, reason=problem)
        await exchange.pause(attempt, deadline)
        attempt += 1
    return None


async def _look_anew(exchange: Exchange, epoch: int, deadline: float) -> bool:
    """Wait until the view is of a look that began after now and knows ``epoch``; give up at the deadline.

    Whether the cluster was looked at.
    """
    topology = exchange.topology
    began = trio.current_time()
    while trio.current_time() < deadline and (topology.looked_at <= began or topology.view.epoch < epoch):
        topology.refresh_soon()
        await trio.sleep(LOOK_SECONDS)
    return topology.looked_at > began
