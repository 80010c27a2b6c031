"""Snapshots, as the rest of the proxy knows them: opened and closed, and what writes and reads have to know of them.

    open    allocate an id -> kill what was abandoned -> cut -> drain -> floors -> serving
    close   closing -> readers done -> closed -> swept
    abort   at once here, then in the store

``proxy.snapshots.book`` has the records, and tells of each change, own or others', in one synchronous call,
``_on_record``: that is where a cut happens. docs/decisions/0009-snapshots.md is the protocol.

Why the cut is where the commit's return is seen, and not before: until then no write has been preserved, and if the
commit failed nobody need know. Why that is not too late: what is sent before belongs before the cut.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from math import inf

import trio

from proxy.log import get_logger
from proxy.metrics import Sample as MetricSample
from proxy.protocol.encode import error
from proxy.settings import OnBudget, OnPreserveFailure, SnapshotSettings
from proxy.snapshots.abandoned import kill_abandoned, kill_strangers
from proxy.snapshots.barrier import PING, Barrier, CutFailedError
from proxy.snapshots.book import Book, BookError, TooManyOpenError
from proxy.snapshots.bypass import BypassWatch
from proxy.snapshots.evictions import INFO_STATS, Evictions
from proxy.snapshots.facts import Costs, SnapshotError, SnapshotFacts
from proxy.snapshots.histories import Histories, restored
from proxy.snapshots.links import Links
from proxy.snapshots.members import Member, Members, Phase
from proxy.snapshots.metrics import SnapshotMetrics
from proxy.snapshots.preserve import Preserver, Ways
from proxy.snapshots.room import INFO_MEMORY, refusals
from proxy.snapshots.sweep import Sweeper, SweepPace
from proxy.store.interface import StoreError, TopologyStore
from proxy.topology.audit import Operator
from proxy.topology.service import Topology
from proxy.upstream.abandoned import Abandoned
from proxy.upstream.connection import NodeConnection
from proxy.upstream.nodes import Lane
from proxy.upstream.reply_slot import ConnectionLostError
from routing.snapshot import Chain, Floor, SnapshotRecord, SnapshotState, chain_of
from routing.snapshot_floors import ShardFloor, retaken
from routing.snapshot_names import tags
from routing.topology import Address

BEAT_SECONDS = 0.25  # between two looks for snapshots whose time is over
ATTEMPT_PAUSE_SECONDS = 0.02
LOOK_SECONDS = 0.002  # while another proxy opens
ATTENTIVE_SECONDS = 1.0  # in which other members notice an opening
ORPHAN_SECONDS = 1.0  # an opening that takes longer may have lost its opener
FORGET_SECONDS = 60.0  # for which an acknowledgement stays
CLOSE_SECONDS = 5.0  # after which whoever sees a snapshot still closing ends it
RETRY_SECONDS = 0.1  # between two attempts at the store before the first write
CUT, UNHEARD = "proxies cut together", "another proxy has not heard of this one"  # why new writes are held
READABLE = frozenset({SnapshotState.SERVING, SnapshotState.CLOSING})
SETTLE_SECONDS = 10.0  # after which no write is on its way any more that went by a former chain

log = get_logger(__name__)


class Snapshots:
    """See the module's text. One per proxy."""

    def __init__(
        self,
        settings: SnapshotSettings,
        topology: Topology,
        links: Links,
        store: TopologyStore,
        abandoned: Abandoned,
        proxy_id: str,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.preserver = Preserver(settings)
        self.own_writes = self.preserver.own_writes
        self.histories = Histories(topology, links, self._on_unproven, self._on_floors)
        self.book = Book(store, proxy_id, now)
        self.members = Members(
            store, proxy_id, settings.member_ttl_seconds, read_records=self._read_records, now=now
        )
        # Called in the step in which one serves no more.
        self.on_end: Callable[[int], None] = lambda number: None
        self.cuts = 0  # on this proxy
        self.aborted_total = 0
        self._serving: dict[int, SnapshotRecord] = {}
        # Cut by another proxy: no view from before this (Trio time) may be read by. See ``is_view_fresh``.
        self._view_from: dict[int, float] = {}
        self._ended: dict[int, str] = {}  # ended here, and maybe not in the store yet: why
        self._topology = topology
        self._links = links
        self._store = store
        self._abandoned = abandoned
        self._proxy_id = proxy_id
        self._now = now
        self._opening = trio.Lock()
        self._cut_pending = False
        self._cut_done = trio.Event()
        self._multis: set[object] = set()  # writes in parts, of which some may have run and others not
        self._multis_ended = trio.Event()
        self._spoiled: str | None = None
        self._barrier: Barrier | None = None
        self._barrier_of = 0  # the snapshot that it cuts; the hold is for it, too
        self._barrier_ended = trio.Event()
        self._others_cut_too = False  # in the opening of this proxy's
        self._barrier_seconds: dict[int, float] = {}
        self._unrecorded: dict[int, str] = {}  # to be aborted in the store: why
        self._closing_since: dict[int, float] = {}  # Trio time
        self._done_reading: set[int] = set()  # closing; the others were told that nobody here reads at them
        self._read_no_more: set[int] = set()  # ended, and no member reads at them
        # Aborted, and not yet of those: writes preserve for them as before.
        self._lingering: set[int] = set()
        self._lingered = trio.Event()  # one of them lingers no more
        self._floors_changed = False
        self._has_work = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._problem = ""
        self._metrics = SnapshotMetrics()
        self._is_blind = False  # this proxy may have written past what others have cut
        # Others' snapshots that serve: this proxy writes when their owners have heard of it. See ``_await_owners``.
        self._owners: dict[int, str] = {}
        self._attempt_of = 0  # the snapshot that this proxy is opening
        self._had_strangers = False  # there were connections of proxies that are no members, in that attempt
        # Aborted before this proxy joined, and maybe read elsewhere still.
        self._ended_before: set[int] = set()
        self._began_at = now()
        self.bypass = BypassWatch(
            self._ask,
            self._primaries,
            self._known_members,
            proxy_id,
            settings.bypass_interval_seconds,
            self._open_since,
            now=now,
        )
        self.sweeper = Sweeper(
            self._ask,
            self._execute,
            topology,
            SweepPace(settings.sweep_pause_seconds, settings.sweep_interval_seconds, SETTLE_SECONDS),
            chain=lambda: self.chain,
            sweepable=self._is_sweepable,
            strangers=self.bypass.find_strangers,
        )
        self._evictions = Evictions()
        self.members.on_detached = self._on_detached
        self.members.on_attached = self._on_attached
        self.members.on_other = self._on_other
        self.book.on_change = self._on_record
        self.preserver.on_failure = self._on_preserve_failure
        self.preserver.on_split = self.histories.mark_unsettled
        self.preserver.history_at = self.histories.history_at

    def attach(self, ways: Ways) -> None:
        """The exchange is there."""
        self.preserver.ways = ways

    # -- for the data plane: synchronous

    @property
    def chain(self) -> Chain:
        return self.preserver.chain

    def current(self) -> int | None:
        """The newest that serves."""
        return max(self._serving, default=None)

    def record_of_serving(self, snapshot_id: int) -> SnapshotRecord | None:
        """Its record while it serves."""
        return self._serving.get(snapshot_id)

    def refusal(self, snapshot_id: int) -> bytes | None:
        """The error reply for a read at this snapshot; None while it serves."""
        if snapshot_id in self._serving:
            if self.members.valid_until != inf and trio.current_time() >= self.members.valid_until:
                return error(
                    "NOTREADY this proxy has lost touch with the topology store, so it cannot tell whether the"
                    " snapshot still serves; try again"
                )
            return None
        return error(self._why_not(snapshot_id))

    def is_usable(self, snapshot_id: int) -> bool:
        """Whether a reply that was asked for while it served may be used."""
        if self.members.valid_until != inf and trio.current_time() >= self.members.valid_until:
            return False
        if snapshot_id in self._serving:
            return True
        return (
            snapshot_id in self._closing_since
            and snapshot_id not in self._ended
            and snapshot_id not in self._done_reading
        )

    def is_view_fresh(self, snapshot_id: int) -> bool:
        """Whether the view is no older than the cut, so that slots that moved before it are read where they were then.

        This proxy's own writes go by its view, so its own cuts need no look.
        """
        since = self._view_from.get(snapshot_id)
        if since is None:
            return True
        if self._topology.looked_at >= since:
            del self._view_from[snapshot_id]
            return True
        self._topology.refresh_soon()
        return False

    def may_have_keys(self) -> bool:
        """Whether internal keys may stand in the cluster."""
        return self.sweeper.may_have_keys

    @asynccontextmanager
    async def begin_multi(self, write: object) -> AsyncIterator[None]:
        """Around a write that goes out in several steps: no cut comes between them."""
        while self._cut_pending and write not in self._multis:
            await self._cut_done.wait()
        self.add_multi(write)
        try:
            yield
        finally:
            self.end_multi(write)

    def add_multi(self, write: object) -> None:
        """Of this write some parts may have run and others not. It is to be ended by ``end_multi``."""
        self._multis.add(write)

    def end_multi(self, write: object) -> None:
        self._multis.discard(write)
        if not self._multis:
            self._multis_ended.set()
            self._multis_ended = trio.Event()

    def spoil(self, cuts: int, reason: str) -> None:
        """Part of a write that was begun after ``cuts`` cuts is sent again: it may stand on both sides of a cut."""
        if self._barrier is not None and cuts != self.cuts:
            self._spoiled = reason

    async def catch_up(self, snapshot_id: int | None) -> None:
        """Know of a snapshot that another proxy has just opened, if there is one; None: of any."""
        if snapshot_id in self._serving:
            return
        try:
            with trio.move_on_after(ATTENTIVE_SECONDS), self._store.attentive():
                await self.book.fresh_last_id()
                record = self.book.records.get(snapshot_id or self.book.last_id)
                while record is not None and record.state is SnapshotState.OPENING:
                    await trio.sleep(LOOK_SECONDS)
                    record = self.book.records.get(record.id)
        except StoreError as failed:
            log.info("snapshots_not_looked_up", reason=failed)  # what is known then decides

    # -- for operators

    async def open(self, name: str, ttl_seconds: float | None, operator: Operator) -> SnapshotRecord:
        """Open a snapshot. Raises SnapshotError. If cancelled, it is given up, or stays until its TTL."""
        deadline = trio.current_time() + self.settings.open_deadline_seconds
        ttl = self.settings.ttl_seconds if ttl_seconds is None else ttl_seconds
        reason = "other snapshots are being opened"
        with trio.move_on_at(deadline):
            async with self._opening:
                if not self.members.is_attached():
                    raise SnapshotError(
                        "NOTREADY this proxy has lost touch with the topology store; try again"
                    )
                await self._refuse_without_room()
                while trio.current_time() < deadline:
                    try:
                        return await self._attempt(name, ttl, operator, deadline)
                    except CutFailedError as failed:
                        reason = str(failed)
                        log.info("snapshot_attempt_failed", reason=reason)
                        with suppress(StoreError):  # then the beat sees to it
                            await self._record_ends()
                    except TooManyOpenError as refused:
                        raise SnapshotError(f"ERR {refused}") from refused
                    except (
                        BookError
                    ) as other:  # another one is being opened, or another member gave this one up
                        reason = str(other)
                    except StoreError as failed:
                        raise SnapshotError(f"NOTREADY the topology store: {failed}") from failed
                    await trio.sleep(ATTEMPT_PAUSE_SECONDS)
        raise SnapshotError(
            f"NOTREADY no snapshot could be opened within {self.settings.open_deadline_seconds:g} s: {reason}"
        )

    async def close(self, snapshot_id: int, operator: Operator) -> SnapshotRecord:
        """Close a snapshot. Raises SnapshotError."""
        record = self.book.records.get(snapshot_id)
        if record is None:
            raise SnapshotError(
                f"ERR there is no snapshot {snapshot_id}; STEADY.SNAPSHOT LIST shows what there is"
            )
        if record.state not in (SnapshotState.SERVING, SnapshotState.CLOSING):
            raise SnapshotError(f"ERR snapshot {snapshot_id} is {record.state.value} and cannot be closed")
        try:
            if record.state is SnapshotState.SERVING:
                await self.book.move(snapshot_id, _closing, operator=operator)
            return await self._end_closing(snapshot_id)
        except BookError as refused:
            raise SnapshotError(f"ERR {refused}") from refused
        except StoreError as failed:
            raise SnapshotError(f"NOTREADY the topology store: {failed}") from failed

    def facts(self) -> list[SnapshotFacts]:
        """Those known, oldest first."""
        return [self._facts(record) for _, record in sorted(self.book.records.items())]

    def facts_of(self, snapshot_id: int) -> SnapshotFacts | None:
        record = self.book.records.get(snapshot_id)
        return None if record is None else self._facts(record)

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each."""
        found = [self._problem] if self._problem else []
        if self._is_blind:
            found.append("this proxy has lost touch with the topology store: it serves no snapshot")
        return [
            *found,
            *self.book.problems(),
            *self.members.problems(),
            *self.bypass.warnings(),
            *self.bypass.problems(),
            *self.sweeper.problems(),
        ]

    def samples(self) -> Iterator[MetricSample]:
        yield from self._metrics.samples(self.facts())
        yield from self.sweeper.samples()
        yield from self.bypass.samples()

    # -- running

    async def recover(self, seconds: float) -> None:
        """Learn of the open snapshots, before a first write. Gives up on the store after ``seconds``.

        Traffic does not wait for the store: what is open then may be written past by this proxy, and ends when this
        proxy sees it.
        """
        tags()  # some tenths of a second at the first call, which no write should wait for
        failure = "it does not answer"
        with trio.move_on_after(seconds):
            while True:
                try:
                    await self.members.join()
                    break
                except StoreError as failed:
                    failure = str(failed)
                    await trio.sleep(RETRY_SECONDS)
        if not self.members.is_attached():
            self._is_blind = True
            log.warning("snapshots_unknown", reason=failure)
        known = self.book.records.values()
        self._owners = {
            record.id: record.owner
            for record in known
            if record.state in READABLE and record.owner != self._proxy_id
        }
        if self._owners:
            self.preserver.hold(UNHEARD)
        if self.members.others:  # one that was aborted just now may serve there still
            self._ended_before = {
                record.id for record in known if record.state is SnapshotState.ABORTED and record.is_cut
            }
            self._lingering |= self._ended_before
            self._adopt_chain()

    async def run(self) -> None:
        """Look after the snapshots until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.book.run)
            nursery.start_soon(self.members.run)
            nursery.start_soon(self.histories.run)
            nursery.start_soon(self.sweeper.run)
            nursery.start_soon(self.bypass.run)
            nursery.start_soon(self._await_former_readers)
            nursery.start_soon(self._watch_nodes)
            if self._owners:
                nursery.start_soon(self._await_owners)
            if self.members.is_attached():
                self._on_attached()
            while True:
                with trio.move_on_after(BEAT_SECONDS):
                    await self._has_work.wait()
                self._has_work = trio.Event()
                await self._beat()

    async def _read_records(self) -> None:
        """This proxy has joined, and counts as a member when it has read what there is."""
        await self.book.load()
        self._metrics.begin(self.facts())
        others = await self.members.fresh_others()
        await self.book.abort_orphans(others)
        for record in list(self.book.records.values()):
            if record.state is SnapshotState.OPENING and record.owner != self._proxy_id:
                # Its opener does not wait for this proxy, and cannot know what this proxy has in flight.
                with suppress(BookError):  # it serves by now, or has ended
                    await self.book.move(record.id, partial(_give_up, "a proxy joined meanwhile"))
        self._is_blind = False

    def _on_detached(self) -> None:
        self._is_blind = True
        self._end_own_writes("this proxy has lost its lease")
        self._end_barrier(self._barrier_of)  # whoever cuts does not count on this proxy any more

    def _on_attached(self) -> None:
        """A member again, or the first time: what it has acknowledged before is gone, and what closes waits for it."""
        for record in self.book.records.values():
            if record.state is SnapshotState.CLOSING:
                self._start(self._finish_reading, record.id)
        if self.members.others:
            self._on_other()

    def _on_other(self) -> None:
        """Another proxy is there, and writes when it knows that this one has heard of it. Synchronous."""
        self._end_own_writes("another proxy has joined")
        for record in self.book.records.values():
            self._tell_shared(record)

    def _tell_shared(self, record: SnapshotRecord) -> None:
        if record.state in READABLE and record.owner == self._proxy_id:
            self._start(self._acknowledge, record.id, Phase.SHARED)

    async def _acknowledge(self, number: int, phase: Phase) -> None:
        """Until it is told, or this proxy is detached: then nobody waits for it."""
        while self.members.is_attached():
            try:
                await self.members.acknowledge(number, phase)
                return
            except StoreError as failed:
                log.warning("snapshot_not_acknowledged", id=number, error=failed)
                await trio.sleep(RETRY_SECONDS)

    async def _await_owners(self) -> None:
        """Hold this proxy's first writes until nobody reads as if they could not be (``OwnWrites``).

        The owner of a snapshot that serves may be the only proxy that it knows of. It hears of this one when it renews
        its lease, if not before, or loses the lease (``Members``): either within the time of a lease.
        """
        deadline = trio.current_time() + 2 * self.settings.member_ttl_seconds
        if not self.members.is_attached():  # nobody says who has heard
            await trio.sleep_until(deadline)
        for number, owner in self._owners.items():
            owners = {owner} if owner else {*self.members.others}  # "": of a record that cannot be read
            if silent := await self.members.wait_acks(number, Phase.SHARED, owners, deadline):
                log.info("snapshot_owner_silent", id=number, members=sorted(silent))  # its lease is over
        self.preserver.release(UNHEARD)

    # -- opening

    async def _attempt(self, name: str, ttl: float, operator: Operator, deadline: float) -> SnapshotRecord:
        expires_at = self._now() + ttl if ttl else None
        record = await self.book.allocate(
            name, expires_at, operator, open_max=self.settings.open_max, alone=True
        )
        number = self._attempt_of = record.id
        try:
            async with self._attention(number) as others:
                had_strangers = self._had_strangers = await self._kill_leftovers()
                abandoned_before = self._abandoned.added_total
                await self._cut(number, others)
                began = trio.current_time()
                barrier = self._barrier
                if barrier is None:
                    raise CutFailedError("this proxy has lost touch with the topology store")
                until = min(deadline, began + self.settings.drain_seconds)
                await barrier.drain(until, partial(self._await_drained, number))
                if others:
                    await self.members.acknowledge(
                        number, Phase.CUT
                    )  # for those who wait to keep what blocks
                if missing := await self.members.wait_acks(
                    number, Phase.CUT, others, trio.current_time() + self.settings.hold_seconds
                ):
                    raise CutFailedError(f"{', '.join(sorted(missing))} did not cut in time")
                floors = await self._take_floors(began + self.settings.drain_seconds)
                if had_strangers and await self._kill_strangers():
                    raise CutFailedError(
                        "a proxy that shares no topology store with this one writes to the cluster"
                    )
                if self._spoiled is not None:
                    raise CutFailedError(self._spoiled)
                if self._abandoned.added_total != abandoned_before:
                    raise CutFailedError("a connection with writes from before the cut was lost")
                if not self.members.is_attached():
                    raise CutFailedError("this proxy has lost touch with the topology store")
                self.histories.begin(number, floors)
                recorded, epoch = self.histories.recorded(number), self._topology.view.epoch
                served = await self.book.move(
                    number,
                    lambda cut: replace(cut.moved_to(SnapshotState.SERVING), floors=recorded, epoch=epoch),
                )
                self._barrier_seconds[number] = trio.current_time() - began
                log.info("snapshot_opened", id=number, seconds=round(trio.current_time() - began, 6))
                return served
        except BaseException as failure:
            self.histories.end(number)
            reason = str(failure) if isinstance(failure, Exception) else "its opening was cancelled"
            self._abort([number], f"not opened: {reason}")
            raise
        finally:
            self._attempt_of = 0
            self._end_barrier(number)

    @asynccontextmanager
    async def _attention(self, number: int) -> AsyncIterator[set[str]]:
        """With several proxies: all look for what comes next every few milliseconds. Who they are."""
        others = set(await self.members.fresh_others())
        if not others:
            yield others
            return
        with self._store.attentive():
            missing = await self.members.wait_acks(
                number, Phase.ATTENTIVE, others, trio.current_time() + ATTENTIVE_SECONDS
            )
            if missing:
                raise CutFailedError(f"{', '.join(sorted(missing))} did not notice the opening in time")
            yield others

    async def _kill_leftovers(self) -> bool:
        """What abandoned connections still hold is done or gone afterwards. Whether there were strangers', too."""
        serving = set(self._primaries())
        failures = await kill_abandoned(self._abandoned, self._ask, serving.__contains__, self._proxy_id)
        if failures:
            raise CutFailedError(failures[0])
        return await self._kill_strangers()

    async def _kill_strangers(self) -> bool:
        """End what proxies have open that are no members. Whether there was any."""
        strangers = await kill_strangers(self._ask, self._primaries(), self._known_members(), self._proxy_id)
        if strangers.problems:
            raise CutFailedError(strangers.problems[0])
        return bool(strangers.found)

    async def _cut(self, number: int, others: set[str]) -> None:
        """Wait for a moment at which no write is between its parts, and cut there."""
        self._cut_pending = True
        try:
            with trio.move_on_after(self.settings.drain_seconds):
                while self._multis:
                    await self._multis_ended.wait()
            if self._multis:
                raise CutFailedError("writes over several slots are being retried")
            self._others_cut_too = bool(others)
            await self.book.move(
                number, lambda record: replace(record, is_cut=True)
            )  # the cut: see _on_record
        finally:
            self._cut_pending = False
            self._cut_done.set()
            self._cut_done = trio.Event()

    async def _await_drained(self, number: int) -> None:
        """Return when all proxies have cut, and what they sent before is answered.

        Raises CutFailedError, StoreError.
        """
        others = set(await self.members.fresh_others())
        if not others:
            return
        await self.members.acknowledge(number, Phase.DRAINED)
        deadline = trio.current_time() + self.settings.hold_seconds
        if missing := await self.members.wait_acks(number, Phase.DRAINED, others, deadline):
            raise CutFailedError(f"{', '.join(sorted(missing))} did not cut in time")

    async def _take_floors(self, deadline: float) -> dict[bytes, ShardFloor]:
        """Each primary's history and offset, behind all that was sent before the cut."""
        view = self._topology.view
        addresses = self._primaries()
        samples = await self.histories.sample_all(addresses, deadline)
        if missing := [str(address) for address in addresses if address not in samples]:
            raise CutFailedError(f"{', '.join(missing)} did not tell the replication offset")
        if self._topology.view.shards != view.shards:
            raise CutFailedError("the cluster's map changed meanwhile")
        floors: dict[bytes, ShardFloor] = {}
        for index, shard in enumerate(view.shards):
            sample = samples[shard.primary.address]
            slots = [slot for first, last in view.slot_ranges_of(index) for slot in range(first, last + 1)]
            floor = retaken(sample, slots, shard.primary.config_epoch)
            is_importing = any(migration.target_id == shard.primary.id for migration in view.migrations)
            floors[sample.point.replid] = floor.seen(
                floor.slots or frozenset(), floor.config_epoch, is_importing=is_importing
            )
        return floors

    async def _refuse_without_room(self) -> None:
        replies, failures = await self._ask_all(INFO_MEMORY)
        if failures:
            raise SnapshotError(f"NOTREADY {failures[0]}")
        await self._look_for_evictions()
        if found := refusals(replies, self.settings.memory_percent_max):
            raise SnapshotError(f"ERR {'; '.join(found)}")

    def _end_barrier(self, number: int) -> None:
        """The cut of this snapshot is complete, or given up. Nothing if it is over."""
        if self._barrier is None or self._barrier_of != number:
            return
        self._barrier.open_gates()
        self._barrier = None
        self._barrier_ended.set()
        self._barrier_ended = trio.Event()
        self.preserver.release(CUT)

    # -- what the book tells

    def _on_record(self, old: SnapshotRecord | None, new: SnapshotRecord) -> None:
        """A record changed, here or elsewhere. Synchronous."""
        number = new.id
        is_cut_now = new.is_cut and not (old is not None and old.is_cut)
        if (
            new.state is SnapshotState.ABORTED
            and old is not None
            and new.is_cut
            and self._may_be_read_elsewhere()
        ):
            self._lingering.add(number)
        self._adopt_chain()
        if is_cut_now and new.state is SnapshotState.OPENING:
            self.cuts += 1
            is_own = new.owner == self._proxy_id
            # If its opening was given up meanwhile, nobody would end a barrier.
            if not is_own or number == self._attempt_of:
                self._begin_barrier(new, is_own=is_own)
        elif new.state is SnapshotState.OPENING and old is None and new.owner != self._proxy_id:
            self._start(self._attend, new)
        elif is_cut_now:
            self._clear_known()  # it was cut before this proxy knew
        if self._is_blind and is_cut_now and new.is_open and new.owner != self._proxy_id:
            self._abort([number], f"{self._proxy_id} wrote without knowing of it")
        if new.state is SnapshotState.SERVING and number not in self._ended:
            if number not in self.histories.floors:
                self.histories.begin(number, restored(new.floors))
                self._view_from[number] = trio.current_time()
                self._topology.refresh_soon()
            self._serving[number] = new
            if self.members.others:
                self._tell_shared(new)
        else:
            self._stop_serving(number)
        if new.state is SnapshotState.CLOSING:
            self._closing_since.setdefault(number, trio.current_time())
            if old is not None and self.members.others:
                self._start(self._finish_reading, number)
        if not new.is_open:
            self._start(self._await_last_reader, new)
            self._closing_since.pop(number, None)
            self._done_reading.discard(number)
            self._view_from.pop(number, None)
            self.histories.end(number)
            if new.state is SnapshotState.ABORTED:
                self._ended[number] = new.reason
        if new.state is not SnapshotState.OPENING and new.owner != self._proxy_id:
            self._end_barrier(number)
        self._has_work.set()

    def _begin_barrier(self, record: SnapshotRecord, *, is_own: bool) -> None:
        """Cut: what is sent from here on preserves for the snapshot. Synchronous."""
        self._end_barrier(self._barrier_of)
        self._spoiled = "writes over several slots were being retried" if self._multis else None
        self._barrier = Barrier(self.preserver, self._links)
        self._barrier_of = record.id
        if not is_own or self._others_cut_too:
            self.preserver.hold(CUT)
        elif not self.members.others and not self._had_strangers:
            self.own_writes.begin(record.id)
        if not is_own:
            self._start(self._cut_for_other, record, self._barrier)

    def _stop_serving(self, number: int) -> None:
        if self._serving.pop(number, None) is not None:
            self.on_end(number)

    def _adopt_chain(self) -> None:
        chain = chain_of(
            replace(record, state=SnapshotState.CLOSING) if record.id in self._lingering else record
            for record in self.book.records.values()
        )
        self._forget_own_writes()
        if chain == self.preserver.chain:
            return
        newest_before = self.preserver.newest
        self.preserver.chain = chain
        self.preserver.newest = chain.newest
        self.sweeper.chain_changed()
        self.bypass.chain_changed()
        if chain.newest != newest_before:
            self._clear_known()

    def _forget_own_writes(self) -> None:
        """Of snapshots that are not read any more."""
        records = self.book.records.values()
        self.own_writes.keep(
            [record.id for record in records if record.is_open and record.id not in self._ended]
        )

    def _end_own_writes(self, reason: str) -> None:
        """Reads at what this proxy has cut alone ask for markers from now on."""
        if self.own_writes.since:
            log.info("snapshots_shared", ids=sorted(self.own_writes.since), reason=reason)
            self.own_writes.end()

    def _may_be_read_elsewhere(self) -> bool:
        return (
            self._store.is_shared and self._nursery is not None
        )  # before ``run`` it is one that nobody reads yet

    def _clear_known(self) -> None:
        for connection in self._links.shared():
            connection.known.clear()

    async def _attend(self, record: SnapshotRecord) -> None:
        """Another proxy opens: look every few milliseconds until that is over."""
        with self._store.attentive():
            try:
                await self.members.acknowledge(record.id, Phase.ATTENTIVE)
            except StoreError as failed:  # then its opening fails
                log.warning("snapshot_not_acknowledged", id=record.id, error=failed)
            while (now := self.book.records.get(record.id)) is not None:
                if now.state is not SnapshotState.OPENING:
                    break
                await trio.sleep(LOOK_SECONDS)

    async def _cut_for_other(self, record: SnapshotRecord, barrier: Barrier) -> None:
        """Another proxy opens, and this one has cut: drain, say so, and hold until it serves."""
        try:
            await self._kill_leftovers()
            until = trio.current_time() + self.settings.hold_seconds
            await barrier.drain(until, partial(self._await_drained, record.id))
            if self._spoiled is not None:
                raise CutFailedError(self._spoiled)
            await self.members.acknowledge(record.id, Phase.CUT)
            with trio.move_on_after(self.settings.hold_seconds):
                while self._barrier is barrier:
                    await self._barrier_ended.wait()
            if self._barrier is barrier:
                raise CutFailedError("its opening took too long")
        except CutFailedError as failed:
            await self._give_up(record.id, f"{self._proxy_id}: {failed}")
        except StoreError as failed:
            self._abort([record.id], f"{self._proxy_id}: {failed}")

    async def _give_up(self, number: int, reason: str) -> None:
        """End another proxy's opening, unless it serves by now: then this one had only not heard of it yet."""

        try:
            await self.book.move(number, partial(_give_up, reason))
        except BookError as over:
            log.debug("snapshot_not_given_up", reason=str(over))
        except StoreError as failed:
            self._abort([number], f"{reason}; {failed}")

    async def _await_last_reader(self, record: SnapshotRecord) -> None:
        """What an ended snapshot has left may be swept when no member reads at it, even one that has not heard yet.

        After an abort, which waits for nobody, writes preserve until then, too. Who joins later knows that it ended.
        """
        readers: Mapping[str, Member] | None = None
        had_others = False
        while readers is None or readers:
            try:
                await self.members.acknowledge(record.id, Phase.DONE)
                others = await self.members.fresh_others()
                had_others = had_others or bool(others)
                # One with the same name that has joined anew has read that the snapshot ended.
                readers = others if readers is None else _staying(readers, others)
                deadline = trio.current_time() + self.settings.member_ttl_seconds
                missing = await self.members.wait_acks(record.id, Phase.DONE, set(readers), deadline)
                readers = {name: readers[name] for name in missing}
            except StoreError as failed:
                log.debug("snapshot_readers_unknown", id=record.id, reason=failed)
            if readers is None or readers:
                await trio.sleep(BEAT_SECONDS)
        self._read_no_more.add(record.id)
        self._lingering.discard(record.id)
        self._adopt_chain()
        self._lingered.set()
        self._lingered = trio.Event()
        self.sweeper.chain_changed()
        if had_others:
            await trio.sleep(FORGET_SECONDS)  # the others may still ask for the acknowledgement
        self.members.forget(record.id)

    async def _await_former_readers(self) -> None:
        """The same for those that had ended before this proxy began: every member has heard of them by then."""
        ended = [record.id for record in self.book.records.values() if not record.is_open]
        if self._store.is_shared:
            await trio.sleep(2 * self.settings.member_ttl_seconds)
        self._read_no_more.update(ended)
        self._lingering -= self._ended_before
        self._adopt_chain()
        self._lingered.set()
        self._lingered = trio.Event()
        self.sweeper.chain_changed()

    async def _finish_reading(self, number: int) -> None:
        """Another proxy waits for this one's readers before it lets the snapshot's data be swept."""
        await self._drain_readers()
        self._done_reading.add(number)  # what is not complete by now is not used
        try:
            await self.members.acknowledge(number, Phase.DONE)
        except StoreError as failed:
            log.warning("snapshot_not_acknowledged", id=number, error=failed)

    # -- ending

    async def _end_closing(self, number: int) -> SnapshotRecord:
        await self._drain_readers()
        others = await self.members.fresh_others()
        deadline = trio.current_time() + self.settings.member_ttl_seconds * 2
        if missing := await self.members.wait_acks(number, Phase.DONE, set(others), deadline):
            if deaf := missing.intersection(_staying(others, await self.members.fresh_others())):
                raise SnapshotError(
                    f"NOTREADY snapshot {number} is closing, and {', '.join(sorted(deaf))} may still read at it"
                )
            # The leases of the others are over: they refuse reads themselves.
            log.warning("snapshot_closed_without", id=number, members=sorted(missing))
        try:
            return await self.book.move(number, SnapshotState.CLOSED)
        except BookError:
            record = self.book.records.get(number)
            if record is None or record.state is not SnapshotState.CLOSED:  # else another one was faster
                raise
            return record

    async def _drain_readers(self) -> None:
        """Wait for what was asked on the read lanes."""

        async def one(connection: NodeConnection) -> None:
            try:
                await connection.request(PING)
            except ConnectionLostError:
                return  # its readers were told

        with trio.move_on_after(self.settings.drain_seconds):
            async with trio.open_nursery() as nursery:
                for connection in self._links.reading():
                    if connection.owed:
                        nursery.start_soon(one, connection)

    def _abort(self, numbers: Iterable[int], reason: str) -> None:
        """End snapshots: here at once, in the store soon."""
        for number in numbers:
            record = self.book.records.get(number)
            if record is None or not record.is_open or number in self._ended:
                continue
            self._ended[number] = reason
            self._stop_serving(number)
            self._unrecorded[number] = reason
            self.aborted_total += 1
            log.warning("snapshot_aborted", id=number, reason=reason)
        self._forget_own_writes()
        self._has_work.set()

    def _on_unproven(self, numbers: Iterable[int], reason: str) -> None:
        numbers = list(numbers)
        for number in numbers:
            self.histories.end(number)
        self._abort(numbers, reason)

    def _on_floors(self) -> None:
        self._floors_changed = True
        self._has_work.set()

    async def _on_preserve_failure(self, snapshot_id: int, reason: str) -> bytes | None:
        """A pre-image cannot be stored: by the operator's rule, refuse the write, or end all that count on it."""
        if self.settings.on_preserve_failure is OnPreserveFailure.REFUSE:
            return error(
                f"NOTREADY the key could not be preserved for snapshot {snapshot_id}: {reason}; nothing was written"
                " (setting snapshots.on_preserve_failure)"
            )
        numbers = [record.id for record in self.book.records.values() if record.is_open and record.is_cut]
        self._abort(numbers, f"a pre-image could not be stored: {reason}")
        try:
            # Before the write goes on, also a proxy that starts after this one has died must know.
            await self._record_ends()
        except StoreError as failed:
            return error(
                f"NOTREADY the key could not be preserved: {reason}; and that the snapshots end could not be"
                f" recorded: {failed}; nothing was written"
            )
        with trio.move_on_after(self.settings.member_ttl_seconds):
            while self._lingering:
                await self._lingered.wait()
        if self._lingering:
            return error("NOTREADY other proxies may still read a snapshot that was aborted; try again")
        return None

    async def _record_ends(self) -> None:
        """Write down what was aborted here. Raises StoreError."""
        for number, reason in list(self._unrecorded.items()):
            with suppress(BookError):  # somebody else ended it
                await self.book.move(number, SnapshotState.ABORTED, reason=reason)
            self._unrecorded.pop(number, None)

    # -- the beat

    async def _beat(self) -> None:
        try:
            if self._unrecorded:
                await self._record_ends()
            if self._floors_changed:
                self._floors_changed = False
                for number in list(self._serving):
                    if number in self.histories.floors:
                        recorded = self.histories.recorded(number)
                        await self.book.move(number, partial(_with_floors, recorded))
            now = self._now()
            for record in list(self.book.records.values()):
                if record.state is SnapshotState.SERVING and record.id in self._serving:
                    await self._look_at(record, now)
                elif record.state is SnapshotState.CLOSING:
                    since = self._closing_since.setdefault(record.id, trio.current_time())
                    if trio.current_time() - since > CLOSE_SECONDS:
                        await self._end_closing(record.id)
                elif record.state is SnapshotState.OPENING:
                    await self._look_at_opening(record)
            self._problem = ""
            self._forget_gone()
        except BookError as refused:
            log.debug("snapshot_moved_elsewhere", reason=str(refused))
        except SnapshotError as problem:
            self._problem = str(problem)
        except StoreError as failed:
            self._floors_changed = True
            self._problem = f"snapshots: the topology store cannot be written: {failed}"

    async def _look_at(self, record: SnapshotRecord, now: float) -> None:
        """Close it when its time is over; end it, or say so, when it costs too much."""
        if record.expires_at is not None and now >= record.expires_at:
            log.info("snapshot_expired", id=record.id)
            await self.book.move(record.id, SnapshotState.CLOSING)
            await self._end_closing(record.id)
        elif self.settings.on_budget is OnBudget.ABORT and (over := self._over_budget(record, now)):
            self._abort([record.id], over)

    async def _look_at_opening(self, record: SnapshotRecord) -> None:
        """End it if nobody opens it any more: its allocation was cancelled, or its proxy is gone."""
        if record.owner == self._proxy_id:
            if not self._opening.locked():
                self._abort([record.id], "not opened: its opening was given up")
        elif self._now() - record.opened_at > ORPHAN_SECONDS:
            await self.book.abort_orphans(await self.members.fresh_others())

    def _forget_gone(self) -> None:
        """What is known of snapshots whose records are gone."""
        self._read_no_more &= self.book.records.keys()
        for known in (self.preserver.costs, self._barrier_seconds, self._ended):
            for number in [number for number in known if number not in self.book.records]:
                known.pop(number)

    def _over_budget(self, record: SnapshotRecord, now: float) -> str | None:
        age_max, bytes_max = self.settings.age_seconds_max, self.settings.preserved_bytes_max
        stored = self._costs(record.id).bytes_preserved
        if age_max and now - record.opened_at > age_max:
            return f"it is older than {age_max:g} s (setting snapshots.age_seconds_max)"
        if bytes_max and stored > bytes_max:
            return f"its pre-images take {stored} bytes (setting snapshots.preserved_bytes_max)"
        return None

    async def _watch_nodes(self) -> None:
        """While a snapshot is open: what servers and other proxies do that it cannot outlive."""
        while True:
            await trio.sleep(self.settings.bypass_interval_seconds)
            if not self.chain.ids:
                self._evictions.forget()
                continue
            await self._look_for_evictions()
            if self.bypass.strangers():
                self._end_own_writes("a proxy that is no member writes to the cluster")
                with suppress(StoreError):  # one that has just joined is none
                    await self.members.fresh_others()
                await self.bypass.look()
                if found := self.bypass.strangers():
                    numbers = [record.id for record in self.book.records.values() if record.is_open]
                    self._abort(numbers, f"a proxy that is no member writes to the cluster: {found[0]}")

    async def _look_for_evictions(self) -> None:
        if found := self._evictions.look((await self._ask_all(INFO_STATS))[0]):
            numbers = [record.id for record in self.book.records.values() if record.is_open]
            self._abort(numbers, f"{', '.join(map(str, found))} evicted keys to make room")

    async def _ask_all(self, raw: bytes) -> tuple[dict[Address, bytes], list[str]]:
        """The primaries' replies, and why others did not answer."""
        replies: dict[Address, bytes] = {}
        failures: list[str] = []

        async def one(address: Address) -> None:
            try:
                replies[address] = await self._ask(address, raw)
            except ConnectionLostError as lost:
                failures.append(f"{address} does not answer: {lost}")

        async with trio.open_nursery() as nursery:
            for address in self._primaries():
                nursery.start_soon(one, address)
        return replies, failures

    # -- small things

    def _start(self, work: Callable[..., Awaitable[object]], *arguments: object) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(work, *arguments)

    def _primaries(self) -> list[Address]:
        return [shard.primary.address for shard in self._topology.view.shards]

    def _known_members(self) -> set[str]:
        return {self._proxy_id, *self.members.others}

    async def _ask(self, address: Address, raw: bytes) -> bytes:
        """One question to one node. Raises ConnectionLostError, also when it does not answer in time."""
        connection = self._links.asking(address)
        if connection is None:
            raise ConnectionLostError(f"{address} is not connected", sent=False)
        with trio.move_on_after(self.settings.drain_seconds):
            return await connection.request(raw)
        raise ConnectionLostError(f"{address} does not answer", sent=True)

    async def _execute(self, raw: bytes, hash_slot: int) -> bytes:
        return await self.preserver.ways.execute(raw, hash_slot, resp=2, repeatable=True, lane=Lane.WRITE)

    def _is_sweepable(self, snapshot_id: int) -> bool:
        """Ids from before this proxy began and unknown to the store are of a store that was lost."""
        record = self.book.records.get(snapshot_id)
        if record is not None:
            return not record.is_open and snapshot_id in self._read_no_more
        return snapshot_id <= self.book.last_id or snapshot_id < int(self._began_at)

    def _open_since(self) -> float | None:
        opened = [
            record.opened_at for record in self.book.records.values() if record.is_open and record.is_cut
        ]
        return min(opened, default=None)

    def _costs(self, number: int) -> Costs:
        return self.preserver.costs.setdefault(number, Costs())

    def _facts(self, record: SnapshotRecord) -> SnapshotFacts:
        costs = self._costs(record.id)
        costs.barrier_seconds = self._barrier_seconds.get(record.id)
        warnings: Sequence[str] = ()
        if record.is_open:
            over = self._over_budget(record, self._now())
            warnings = [*([over] if over else []), *self.bypass.warnings(record.opened_at)]
        return SnapshotFacts(record, max(0.0, self._now() - record.opened_at), costs, tuple(warnings))

    def _why_not(self, number: int) -> str:
        record = self.book.records.get(number)
        if (reason := self._ended.get(number)) is not None:
            return f"SNAPSHOTTOOOLD snapshot {number} was aborted: {reason}; open another one"
        if record is None:
            if number > self.book.last_id:
                return f"NOTREADY there is no snapshot {number}; STEADY.SNAPSHOT LIST shows what there is"
            return f"SNAPSHOTTOOOLD snapshot {number} ended, and its data is gone; open another one"
        if record.state is SnapshotState.OPENING:
            return f"NOTREADY snapshot {number} is being opened"
        return f"SNAPSHOTTOOOLD snapshot {number} is {record.state.value}; open another one"


def _staying(members: Mapping[str, Member], now: Mapping[str, Member]) -> Mapping[str, Member]:
    """Those that are there still, and have not left and joined again."""
    return {name: member for name, member in members.items() if now.get(name) == member}


def _give_up(reason: str, record: SnapshotRecord) -> SnapshotRecord:
    """What is not serving yet. Raises BookError."""
    if record.state is not SnapshotState.OPENING:
        raise BookError(f"snapshot {record.id} is {record.state.value}")
    return record.moved_to(SnapshotState.ABORTED, reason)


def _closing(record: SnapshotRecord) -> SnapshotRecord:
    """Also if another proxy has begun to close it."""
    return record if record.state is SnapshotState.CLOSING else record.moved_to(SnapshotState.CLOSING)


def _with_floors(floors: Mapping[str, Floor], record: SnapshotRecord) -> SnapshotRecord:
    """Also those of histories that were proven since."""
    return replace(record, floors=floors)
