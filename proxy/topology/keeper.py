"""Keeps the topology view: looks at the cluster for every proxy of the store, or follows the one that does.

    who looks    one proxy of a store, the discoverer, holds a lease and looks at the cluster; it records what it sees
    who follows  every proxy, the discoverer too, adopts what the record says, as the store's watch brings it
    who wants    a proxy that meets something that does not fit its view asks the discoverer to look, through the store

Nothing here stops traffic, not even a fault of this program in making the record. Whoever hears nothing from the
store, or of no discoverer, looks for itself and adopts what it sees unrecorded; the record is caught up when the
store is back, and an event says for how long it was not kept. The order of adoptions is safe in each case: what a
MOVED said after a look began is newer than that look, and a version that this proxy recorded is not adopted when it
has adopted a later look of its own by then. A look of its own that nobody recorded, and a MOVED, last until the
discoverer is known to have looked later; what another one recorded is adopted only when that one looked later.

It owns the lease and the tasks. It decides no event (``routing.timeline``) and parses no answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

import trio

from proxy.log import get_logger
from proxy.store.interface import (
    ABSENT,
    Batch,
    CompactedError,
    ConflictError,
    Delete,
    Expect,
    LeaseExpiredError,
    Put,
    StoreError,
    TopologyStore,
    prefix_range,
)
from proxy.store.records import (
    DISCOVERER,
    LOOKED,
    PROXIES,
    TIMELINE,
    VIEW,
    WANTED,
    Looked,
    ViewRecord,
    pack,
    unpack,
    unpack_looked,
    unpack_number,
    unpack_timeline,
)
from proxy.topology.discovery import ANSWER_SECONDS, Discovery, Look
from proxy.topology.recorder import Recorder
from proxy.topology.service import Topology
from proxy.topology.store_health import StoreHealth
from proxy.topology.views import ViewReader
from routing.anomalies import Anomaly
from routing.discovery import Known, Merging, claims_of
from routing.observation import Observation
from routing.slot import SLOT_COUNT
from routing.timeline import Advance, Timeline, TimelineLimits, advance, current_anomalies
from routing.topology import Address, TopologyView

BUSY_SECONDS = 0.1  # between looks while slots move or a node is in trouble
BUSY_FOR_SECONDS = 10.0  # after the last change, looks are as seldom as ever
SOON_SECONDS = 0.01  # after a MOVED or a lost connection; also the least time between two looks
WANT_SECONDS = 0.1  # between two wishes of one proxy to the discoverer
RECORD_SECONDS = 0.25  # the store may hold a new view back for so long; then it is adopted unrecorded
TOUCH_SECONDS = 1.0  # between two notes of the discoverer that it looked
SILENCE_SECONDS = 3.0  # nothing from the discoverer for so long after its next look was due: look for oneself
LEASE_SECONDS = 2.0  # a dead discoverer is replaced after this time
RENEW_SECONDS = LEASE_SECONDS / 4
RETRY_SECONDS = 0.25  # between two attempts at a store that failed
MOVED_SECONDS = (
    1.0  # another proxy's look may have begun so long before its record comes: a MOVED since then is newer
)
HEARD_OF_MAX = 4  # nodes that one wish names; a look asks no more of them
PROXIES_MAX = 1000  # of one store that are told
PARTING_SECONDS = 1.0  # for the last words of a proxy that stops

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the record says now, for operators."""

    number: int  # of the newest version adopted from the record; 0: none yet
    at: float | None  # Unix seconds when that was recorded
    discoverer: str  # "" while nobody is
    looked_at: float | None  # Unix seconds of the discoverer's last look, as far as it told
    proxies: tuple[str, ...] = ()  # that share the record, by id


NOTHING_RECORDED = Recorded(0, None, "", None)


class Keeper:
    """Of one proxy. ``run`` must run for the view to follow the cluster."""

    def __init__(
        self,
        topology: Topology,
        discovery: Discovery,
        store: TopologyStore,
        proxy_id: str,
        *,
        refresh_seconds: float,
        limits: TimelineLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``clock`` gives Unix seconds, for the record; waiting and order go by Trio's."""
        self.topology = topology
        self.discovery = discovery
        self.anomalies: tuple[Anomaly, ...] = ()
        self.proxy_id = proxy_id
        self._store = store
        self._clock = clock
        self.refresh_seconds = refresh_seconds
        self.views = ViewReader(store)  # forgets when the store is another one than before
        self.recorder = Recorder(store, self.views, proxy_id)
        self._limits = limits
        self._claims: Sequence[int] = (0,) * SLOT_COUNT  # slot -> config epoch of the claim to it
        self._unclaimed: frozenset[int] = (
            frozenset()
        )  # slots that lost their owner in the last look, it seems
        self._look_count = 0
        self._look_began = 0.0  # trio time
        self._adopted_look = 0  # the newest of this proxy's looks whose view was adopted
        self._adopted_began = -inf  # trio time when that began
        self._taken_over: TopologyView | None = (
            None  # the view, when it was last just what another one recorded
        )
        self._timeline = Timeline()  # as of the last look, on record or not
        self._is_troubled = False
        self._seen = topology.view  # by the last look
        self._changed_at = 0.0  # trio time at which the view changed last, or trouble began
        self._is_unsettled = False  # a migration has not ended, or a node is about to count as lost
        self._touched_at = 0.0  # trio time
        # What the store says:
        self._health = StoreHealth(store.name)
        self._faults: dict[str, str] = {}  # what is being done with the record -> what it failed of
        self._discoverer = ""
        self._heard_of: list[Address] = []  # by another proxy, which was sent there
        self._proxies: set[str] = set()
        self._heard_at = 0.0  # trio time of the last sign of the discoverer
        self._hears_looks = False  # the discoverer that there is, another proxy, looked since this one began
        self._looked: Looked | None = None
        self._record: ViewRecord | None = None  # the newest adopted
        self._is_foreign = False  # the record is of another cluster
        self._followed = trio.Event()
        self._vacant = trio.Event()  # nobody is the discoverer
        # What this proxy holds in it:
        self._lease = 0
        self._lease_ends_at = 0.0  # trio time: it cannot have ended before
        self._leadership = 0  # revision of our entry as discoverer; 0: we are not

    # -- for operators

    @property
    def is_discoverer(self) -> bool:
        """Whether this proxy holds the lease, by its own clock."""
        return self._leadership != 0 and trio.current_time() < self._lease_ends_at

    async def wait_discoverer(self, is_discoverer: bool) -> None:
        """Return when this proxy is, or is not, the discoverer."""
        while self.is_discoverer is not is_discoverer:
            await trio.sleep(RENEW_SECONDS)

    @property
    def is_kept(self) -> bool:
        """Whether someone who lives keeps this cluster's record, and has said so: then others may add to it."""
        if self._is_foreign:
            return False
        return self.recorder.records_total > 0 if self.is_discoverer else self._hears_looks

    @property
    def recorded(self) -> Recorded:
        return Recorded(
            number=0 if self._record is None else self._record.number,
            at=None if self._record is None else self._record.at,
            discoverer=self._discoverer,
            looked_at=None if self._looked is None else self._looked.at,
            proxies=tuple(sorted(self._proxies)),
        )

    @property
    def seen_at(self) -> float | None:
        """Unix seconds when the cluster last confirmed the view, as far as this proxy knows; None: never."""
        own = self.discovery.answered_at
        times = [] if own is None else [self._clock() - (trio.current_time() - own)]
        if self._looked is not None and self._record is not None:
            times.append(self._looked.at)
        return max(times, default=None)

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each; empty when all is well."""
        found = []
        seen_at = self.seen_at
        if seen_at is None:
            found.append("no node of the cluster has answered yet")
        elif (age := self._clock() - seen_at) > 3 * self.refresh_seconds + SILENCE_SECONDS + ANSWER_SECONDS:
            found.append(f"no node has answered for {age:.0f} s; the last view serves on")
        found += self._health.problems()
        found += [
            f"a fault of this program in {task} the record, which its log tells of: {fault}"
            for task, fault in self._faults.items()
        ]
        if self._is_foreign:
            found.append(
                f"the topology store {self._store.name} is that of another cluster, whose discoverer is "
                f"{self._discoverer}; it is not followed, and nothing is recorded: name another file in store.file"
            )
        found += self._store.problems()
        found += self.discovery.problems()
        found += [anomaly.message for anomaly in self.anomalies]
        return found

    # -- the tasks

    async def run(self) -> None:
        """Follow the cluster until cancelled; then say so in the store, so that another takes over at once."""
        try:
            await self._look()  # whoever looks for all: what this proxy sees itself comes first
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow)
                nursery.start_soon(self._hold_lease)
                nursery.start_soon(self._look_on)
        finally:
            with trio.move_on_after(PARTING_SECONDS, shield=True):
                await self._part()
            self.discovery.close()

    async def _part(self) -> None:
        try:
            if self.is_discoverer:
                with suppress(ConflictError):  # another one is the discoverer by now
                    await self.recorder.touch(self._clock(), self._leadership, is_last=True)
            if self._lease:
                await self._store.revoke(self._lease)
        except StoreError as error:
            log.warning("store_not_told_of_stop", reason=error)

    # -- looking

    async def _look_on(self) -> None:
        while True:
            seconds = self.refresh_seconds
            if self._must_look():
                self.topology.take_wanted()
                await self._look()
                if self._is_busy():
                    seconds = min(BUSY_SECONDS, self.refresh_seconds)
            elif self.topology.wanted.is_set():
                self.topology.take_wanted()
                await self._want()
                await trio.sleep(WANT_SECONDS)
            with trio.move_on_after(seconds):
                await self.topology.wanted.wait()
            await trio.sleep(SOON_SECONDS)

    def _is_busy(self) -> bool:
        """Whether something is about to change. What stays as it is, a node that is down or a slot that somebody left
        open, is no reason to look often for long."""
        is_fresh = trio.current_time() - self._changed_at < BUSY_FOR_SECONDS
        return is_fresh and (self._is_troubled or self._is_unsettled or bool(self.topology.view.migrations))

    def _must_look(self) -> bool:
        """Whether nobody else is known to look for this proxy."""
        return (
            self.is_discoverer
            or self._discoverer in ("", self.proxy_id)
            or bool(self._health.read_problem)
            or self._is_foreign
            or trio.current_time() - self._heard_at > self.refresh_seconds + SILENCE_SECONDS
        )

    async def _want(self) -> None:
        """Ask the discoverer to look."""
        try:
            with trio.move_on_after(WANT_SECONDS):
                moved_to = [str(address) for address in self.topology.moved_to()[:HEARD_OF_MAX]]
                await self._store.commit([Put(WANTED, pack([self.proxy_id, moved_to]))])
                self._health.on_written()
        except StoreError as error:
            self._health.on_write_problem(str(error))

    async def _look(self) -> None:
        """One look: ask, merge, record, adopt."""
        topology = self.topology
        look = await self.discovery.look(
            topology.view, with_seeds=self._is_troubled, heard_of=[*topology.moved_to(), *self._heard_of]
        )
        self._heard_of = []
        self._look_count += 1
        self._look_began = look.began
        topology.engine_version = self.discovery.engine_version
        if look.reports:
            merging = Merging(look.reports)
            while merging.step():
                await trio.lowlevel.checkpoint()
            known = merging.finish(
                Known(topology.view, tuple(self._claims), self._unclaimed), topology.moved_since(look.began)
            )
            self._unclaimed = known.unclaimed
            if known.unclaimed:
                topology.refresh_soon()
            await self._record_look(look, known.view)
            # What the record brought is adopted by now, and this changes nothing; unless it brought nothing.
            self._adopt(known.view, look.began, known.claim_epochs)
            self._adopted_look = self._look_count
            self._adopted_began = look.began
        was_troubled, former = self._is_troubled, self._seen
        self._seen = topology.view
        self._is_troubled = (
            len(look.reports) < len(look.asked)
            or topology.view.unowned_count > 0
            or any(not report.is_cluster_ok for report in look.reports)
        )
        if self._seen is not former or (self._is_troubled and not was_troubled):
            self._changed_at = trio.current_time()

    def _adopt(self, view: TopologyView, began: float, claims: Sequence[int]) -> None:
        self._claims = claims
        self.topology.adopt(view, began)

    async def _record_look(self, look: Look, view: TopologyView) -> None:
        """Put what was seen on record, and wait until the watch has brought it; both for a bounded time."""
        id_of = {node.address: node.id for node in view.nodes()}
        observation = Observation(
            at=self._clock(),
            view=view,
            reports=look.reports,
            problems={
                id_of[address]: problem for address, problem in look.problems.items() if address in id_of
            },
            keys_in_slot=look.keys_in_slot,
        )
        # Time that was meant to pass is no gap.
        limits = replace(self._limits, gap_seconds=self.refresh_seconds + self._limits.gap_seconds)
        try:
            made = await self._recorded(observation, look.began, limits)
            if made is None:  # what counts as an anomaly counts whether it is on record or not
                made = advance(self._timeline, observation, limits)
        except Exception as fault:
            self.recorder.miss(observation.at, repr(fault))
            self._on_fault("recording", fault)
            return
        self._faults.pop("recording", None)
        self._timeline = made.timeline
        self.anomalies = made.anomalies
        self._is_unsettled = bool(made.timeline.migrations or made.timeline.doubted)
        with trio.move_on_after(RECORD_SECONDS):
            while self.recorder.number > self.recorded.number:
                await self._followed.wait()

    async def _recorded(
        self, observation: Observation, began: float, limits: TimelineLimits
    ) -> Advance | None:
        """What the record made of it; None if it does not take it, or not from this proxy."""
        at = observation.at
        began_at = at - (trio.current_time() - began)
        if not self.is_discoverer:
            if self.recorder.told_until is None:
                self.recorder.told_until = began_at
            if problem := self._health.problem:
                self.recorder.miss(at, problem)
            return None
        try:
            with trio.fail_after(RECORD_SECONDS):
                made = await self.recorder.record(observation, self._look_count, self._leadership, limits)
                self.recorder.told_until = began_at
                if trio.current_time() - self._touched_at > TOUCH_SECONDS:
                    await self.recorder.touch(at, self._leadership)
                    self._touched_at = trio.current_time()
                    self._health.on_written()
                return made
        except ConflictError as conflict:
            log.info("no_longer_discoverer", reason=conflict)
            self._lose_leadership("this proxy was the discoverer no more")
        except StoreError as error:
            self.recorder.miss(at, str(error))
            self._health.on_write_problem(str(error))
        except trio.TooSlowError:
            reason = f"the store {self._store.name} did not answer within {RECORD_SECONDS:g} s"
            self.recorder.miss(at, reason)
            self._health.on_write_problem(reason)
        return None

    # -- following

    async def _follow(self) -> None:
        """Adopt what the record says, as it changes."""
        while True:
            try:
                watch = self._store.watch("", await self._read_record())
                self._health.on_read()
                while True:
                    await self._on_batch(await watch.next_batch())
            except CompactedError:
                continue
            except StoreError as error:
                self._health.on_read_problem(str(error))
                await trio.sleep(RETRY_SECONDS)
            except Exception as fault:
                self._on_fault("following", fault)
                self._health.on_read_problem(repr(fault))  # so that this proxy looks for itself
                await trio.sleep(RETRY_SECONDS)

    def _on_fault(self, task: str, fault: Exception) -> None:
        """A bug, or a record that no program could have written: the view goes on without."""
        if task not in self._faults:
            log.exception("record_fault", task=task)
        self._faults[task] = repr(fault)

    async def _read_record(self) -> int:
        """Take in the record as it is; the revision to watch from. What changes meanwhile, the watch tells again."""
        self.views.forget()  # perhaps it is another store than before
        revision = await self._store.revision()
        discoverer = await self._store.get(DISCOVERER)
        self._on_discoverer(None if discoverer is None else discoverer.value)
        timeline = await self._store.get(TIMELINE)
        if timeline is not None:
            self._on_timeline(timeline.value)
        self._proxies = {
            entry.key.removeprefix(PROXIES)
            for entry in await self._store.read(*prefix_range(PROXIES), limit=PROXIES_MAX)
        }
        looked = await self._store.get(LOOKED)
        if looked is not None:
            self._on_looked(looked.value)
        view = await self._store.get(VIEW)
        if view is not None:
            # Whoever recorded it may have ended meanwhile, and what this proxy saw itself may be newer.
            ago = 0.0 if self._looked is None else self._clock() - self._looked.at
            await self._on_version(
                unpack_number(view.value, "map's number"), looked_at=trio.current_time() - ago
            )
        return revision

    async def _on_batch(self, batch: Batch) -> None:
        newest = {change.key: change.value for change in batch.changes}
        if DISCOVERER in newest:
            self._on_discoverer(newest[DISCOVERER])
        if (timeline := newest.get(TIMELINE)) is not None:
            self._on_timeline(timeline)
        if (looked := newest.get(LOOKED)) is not None:
            self._on_looked(looked)
            self._heard_at = trio.current_time()
            self._hears_looks = True
        for key, value in newest.items():
            if key.startswith(PROXIES):
                change = self._proxies.discard if value is None else self._proxies.add
                change(key.removeprefix(PROXIES))
        if (wanted := newest.get(WANTED)) is not None and self.is_discoverer:
            _, moved_to = unpack(wanted, "wish to look")
            self._heard_of = [Address.parse(address) for address in moved_to]
            self.topology.refresh_soon()
        if (view := newest.get(VIEW)) is not None:
            await self._on_version(unpack_number(view, "map's number"), looked_at=inf)
        elif LOOKED in newest and self._record is not None and self.topology.view is not self._taken_over:
            # An own look, or a MOVED of a node that was wrong: what the discoverer confirms since then counts.
            self._take_over(self._record, trio.current_time())
        if LOOKED in newest and not self.is_discoverer:
            # The view of who follows is confirmed by each look, also by one that changes nothing.
            self.topology.looked_at = max(self.topology.looked_at, trio.current_time() - MOVED_SECONDS)

    def _on_discoverer(self, value: bytes | None) -> None:
        discoverer = "" if value is None else str(unpack(value, "discoverer"))
        self._hears_looks = self._hears_looks and bool(discoverer)
        if discoverer != self._discoverer:
            log.info("discoverer_changed", discoverer=discoverer or "none")
        self._discoverer = discoverer
        self._heard_at = trio.current_time()
        if not discoverer:
            self._is_foreign = False  # nobody looks at the other cluster any more
            self._vacant.set()
            self._vacant = trio.Event()
            self.topology.refresh_soon()

    def _on_looked(self, value: bytes) -> None:
        self._looked = unpack_looked(value)
        if self._looked.by != self.proxy_id:
            self.recorder.forgive(self._looked.at)

    def _on_timeline(self, value: bytes) -> None:
        if not self.is_discoverer:
            self.anomalies = current_anomalies(unpack_timeline(value))

    async def _on_version(self, number: int, looked_at: float) -> None:
        """The record's newest version is this one; ``looked_at``, in trio time, is when it was last confirmed."""
        record = await self.views.version(number)
        if record is None:
            return  # it is gone already: a newer one follows
        if record.writer == self.proxy_id:
            if record.look > self._adopted_look:
                self.topology.adopt(record.view, self._look_began)
        else:
            self._take_over(record, looked_at)
        self._record = record
        self._followed.set()
        self._followed = trio.Event()

    def _take_over(self, record: ViewRecord, looked_at: float) -> None:
        """Adopt what another proxy keeps on record, and saw at ``looked_at``; unless this one looked later."""
        if self._may_follow(record.view) and looked_at - MOVED_SECONDS > self._adopted_began:
            began = trio.current_time() - MOVED_SECONDS
            self._adopt(record.view, began, claims_of(record.view))
            self._taken_over = None if self.topology.moved_since(began) else self.topology.view

    def _may_follow(self, view: TopologyView) -> bool:
        """Whether what another proxy recorded may be adopted.

        From a discoverer that lives, if the record is of the same cluster: it knows a node that this proxy knows. Else
        the file is that of another cluster; when nobody looks at that one any more, this one takes its place there.
        A record that nobody keeps is older than what this proxy saw itself; it is better than nothing, where
        no node answered and it knows a seed.
        """
        is_kept = self._discoverer not in ("", self.proxy_id)
        own = self.topology.view
        if not own.shards:
            self._is_foreign = False
            return not {node.address for node in view.nodes()}.isdisjoint(self.discovery.seeds)
        self._is_foreign = is_kept and {node.id for node in view.nodes()}.isdisjoint(
            node.id for node in own.nodes()
        )
        return is_kept and not self._is_foreign

    # -- the lease

    async def _hold_lease(self) -> None:
        """Say that this proxy runs, and be the discoverer whenever nobody else is."""
        while True:
            try:
                if self._lease:
                    await self._renew_lease()
                else:
                    await self._take_lease()
                if self.is_discoverer and self._is_blind():
                    await self._resign()
                elif not self.is_discoverer and not self._is_foreign and not self._is_blind():
                    await self._stand()
                with trio.move_on_after(RENEW_SECONDS):
                    await self._vacant.wait()
            except LeaseExpiredError:
                log.warning("lease_ended", reason="the store was not reached in time")
                self._lose_leadership("the lease ended before it could be renewed")
                self._lease = 0
                await trio.sleep(RETRY_SECONDS)  # proxies of two machines on one file end each other's leases
            except StoreError as error:
                self._health.on_write_problem(str(error))
                await trio.sleep(RETRY_SECONDS)  # the lease may well outlive it
            except trio.TooSlowError:
                self._health.on_write_problem(
                    f"the store {self._store.name} did not answer within {LEASE_SECONDS:g} s"
                )

    async def _take_lease(self) -> None:
        began = trio.current_time()
        with trio.fail_after(LEASE_SECONDS):
            lease = await self._store.grant(LEASE_SECONDS)
            await self._store.commit(
                [Put(f"{PROXIES}{self.proxy_id}", pack({"started_at": self._clock()}), lease)]
            )
        self._lease = lease  # one that was granted and is not known here ends by itself
        self._lease_ends_at = began + LEASE_SECONDS

    def _lose_leadership(self, why: str) -> None:
        """What changes until it is had again is not recorded, unless another proxy does."""
        if self._leadership:
            self._leadership = 0
            self.recorder.miss(self._clock(), why)

    async def _renew_lease(self) -> None:
        began = trio.current_time()
        with trio.fail_after(LEASE_SECONDS):
            await self._store.renew(self._lease)
        self._lease_ends_at = began + LEASE_SECONDS
        self._health.on_written()

    def _is_blind(self) -> bool:
        """Whether no node has answered this proxy for long: another one may see more."""
        answered_at = self.discovery.answered_at
        since = trio.current_time() - self.refresh_seconds - SILENCE_SECONDS
        return answered_at is None or answered_at < since

    async def _resign(self) -> None:
        log.warning("discoverer_resigned", reason="no node answers")
        leadership = self._leadership
        self._lose_leadership("no node answered")
        with trio.fail_after(LEASE_SECONDS):
            await self._store.commit([Delete(DISCOVERER)], [Expect(DISCOVERER, leadership)])

    async def _stand(self) -> None:
        """Become the discoverer if nobody is, or find out that an attempt of which nothing was heard did it."""
        with trio.fail_after(LEASE_SECONDS):
            entry = await self._store.get(DISCOVERER)
            if entry is None:
                try:
                    self._leadership = await self._store.commit(
                        [Put(DISCOVERER, pack(self.proxy_id), self._lease)], [Expect(DISCOVERER, ABSENT)]
                    )
                except ConflictError:
                    self._lose_leadership("another proxy became the discoverer")
            elif entry.lease == self._lease:
                self._leadership = entry.revision
            else:
                self._lose_leadership("another lease than this proxy's holds")
        if self._leadership:
            self.recorder.start_over()
            log.info("is_discoverer", proxy=self.proxy_id)
            self.topology.refresh_soon()
