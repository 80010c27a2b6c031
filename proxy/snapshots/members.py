"""Which proxies take part in snapshots, and how far each is with one: entries of the topology store, on leases.

A proxy is *attached* while it may count on its lease, which is over here before it is over in the store: it is reckoned
from before each renewal was sent. Else it is *detached*: the others may have gone on without it. What the order of
steps guarantees: a proxy joins first and then reads the records, an opener makes its record first and then reads the
members. So an opener waits for whoever might not know of its snapshot.

Each proxy writes and removes its own keys, and what it leaves goes with its lease. Where no other process can have
the store there is nothing to agree on: the proxy is attached for ever, and nothing is written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Final

import trio

from proxy.log import get_logger
from proxy.store.interface import (
    CompactedError,
    Delete,
    LeaseExpiredError,
    Put,
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
    TopologyStore,
    prefix_range,
)
from proxy.store.records import MEMBER_ACKS, MEMBERS, numbered, pack, unpack
from routing.snapshot import SnapshotRecord

RENEWALS: Final = 5  # within a lease's time: four may fail
RETRY_SECONDS: Final = 0.25  # between two attempts at a store that fails; less with a short lease
READ_MAX: Final = 100_000  # members, or their acknowledgements
FORGOTTEN_MAX: Final = 1000  # ended snapshots that nobody acknowledges any more
PARTING_SECONDS: Final = 1.0  # for the last words of a proxy that stops
_WATCHED: Final = "member"  # what MEMBERS and MEMBER_ACKS begin with

log = get_logger(__name__)


class Phase(Enum):
    """How far a member is with a snapshot. Later ones include the earlier ones."""

    ATTENTIVE = "attentive"  # it looks at the store every few milliseconds
    DRAINED = "drained"  # its writes preserve, and those from before are answered
    CUT = "cut"  # what its blocked commands may write is preserved, too
    SHARED = "shared"  # it serves, and its owner has heard that it is not the only one who writes
    DONE = "done"  # none of its readers reads at it any more


_PLACE: Final = {phase: place for place, phase in enumerate(Phase)}


@dataclass(frozen=True, slots=True)
class Member:
    """Another proxy."""

    id: str
    since: float  # Unix seconds by its clock; 0 if it cannot be read


class Members:
    """The members of one store as one proxy has them. ``join`` first; then ``run`` must run."""

    def __init__(
        self,
        store: TopologyStore,
        proxy_id: str,
        ttl_seconds: float,
        *,
        read_records: Callable[[], Awaitable[None]],
        now: Callable[[], float] = time.time,
    ) -> None:
        """``read_records`` brings in all that the store has, Book.load; it is called whenever this proxy has joined,
        and only then it counts as attached. ``now`` gives Unix seconds, for operators."""
        self._store = store
        self._proxy_id = proxy_id
        self._ttl_seconds = ttl_seconds
        self._read_records = read_records
        self._now = now
        self._key = MEMBERS + proxy_id
        self._lease = 0
        self._entry_revision = 0  # of this proxy's entry
        self._is_attached = False
        self._joined = trio.Event()  # set while attached
        self._trouble = ""  # why the store cannot be asked
        self._followed = 0  # the log was followed up to this revision
        self._revision_of: dict[str, int] = {}  # key -> revision of what is known of it
        self._others: dict[str, Member] = {}
        self._acks: dict[tuple[int, str], Phase] = {}  # (snapshot, another member) -> how far it is
        self._own_acks: dict[int, Phase] = {}
        self._written_acks: set[int] = set()  # snapshots whose key of this proxy may be in the store
        self._forgotten: deque[int] = deque(maxlen=FORGOTTEN_MAX)
        self._acknowledging = trio.Lock()  # so that a later phase is not overwritten
        self._news = trio.Event()  # another's entry changed
        self._has_to_remove = trio.Event()
        self.valid_until = -inf  # trio time until which this proxy may count on its lease
        # Synchronous. A lease was lost, and one was taken anew: in turns, each once. Not the first that ``join`` takes.
        self.on_detached: Callable[[], None] = lambda: None
        self.on_attached: Callable[[], None] = lambda: None
        self.on_other: Callable[[], None] = lambda: None  # another member is there that was not

    def is_attached(self) -> bool:
        """Whether the others count on this proxy, so that nothing happens without it."""
        return trio.current_time() < self.valid_until

    @property
    def others(self) -> Mapping[str, Member]:
        """id -> the other members, as the watch last had them; those that ``fresh_others`` read, too."""
        return self._others

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each; empty when all is well."""
        if not self.is_attached():
            why = self._trouble or "it joins again"
            return [f"this proxy is detached, and serves no snapshot: {why}"]
        return [f"other members may have changed unseen: {self._trouble}"] if self._trouble else []

    # -- joining

    async def join(self) -> None:
        """Become a member, then read the records, then count as attached. Nothing if attached.

        Raises StoreUnavailableError, StoreRefusedError; then ``run`` tries again. If cancelled, others may see an
        entry for the time of a lease.
        """
        if self._is_attached:
            return
        until = inf
        if self._store.is_shared:
            if self._lease:
                await self._store.revoke(self._lease)  # what hung on the former one goes first
            self._own_acks.clear()
            self._written_acks.clear()
            until = trio.current_time() + self._ttl_seconds
            try:
                self._lease = await self._store.grant(self._ttl_seconds)
                entry = Put(self._key, pack(self._now()), self._lease)
                self._entry_revision = await self._store.commit([entry])
            except LeaseExpiredError as error:
                raise StoreUnavailableError(f"{self._store.name} took longer than a lease") from error
        await self._read_records()
        if trio.current_time() >= until:
            raise StoreUnavailableError(f"{self._store.name} took longer than a lease")
        # No await from here on.
        self.valid_until = until
        self._is_attached = True
        self._joined.set()
        log.info("member_joined", proxy=self._proxy_id)

    def _detach(self, why: str) -> None:
        """At once. Nothing if detached."""
        if self._is_attached:
            self._leave()
            self._trouble = self._trouble or why
            log.warning("member_detached", proxy=self._proxy_id, reason=why)
            self.on_detached()

    def _leave(self) -> None:
        self._is_attached = False
        self.valid_until = -inf
        self._joined = trio.Event()

    # -- for openers and closers

    async def fresh_others(self) -> Mapping[str, Member]:
        """All that were other members when this was called, and perhaps one whose lease was over. Raises StoreError."""
        if not self._store.is_shared:
            return {}
        found: dict[str, Member] = {}
        for entry in await self._store.read(*prefix_range(MEMBERS), limit=READ_MAX):
            if entry.key != self._key:
                member = _member_of(entry.key, entry.value)
                found[member.id] = member
                if entry.revision > self._followed:  # else the watch knows better
                    self._take(entry.key, entry.value, entry.revision)
        return found

    async def wait_acks(
        self, snapshot_id: int, phase: Phase, members: Collection[str], deadline: float
    ) -> set[str]:
        """Those of ``members`` that have not come to ``phase`` by ``deadline`` (trio time), or whose lease is over.

        Returns as soon as there is nobody left to wait for. ``members`` were read by ``fresh_others``.
        """
        with trio.move_on_at(deadline):
            while True:
                news = self._news
                missing = {member for member in members if not self._has(snapshot_id, member, phase)}
                if not any(member == self._proxy_id or member in self._others for member in missing):
                    break
                await news.wait()
        return missing

    def _has(self, snapshot_id: int, member: str, phase: Phase) -> bool:
        if member == self._proxy_id:
            found = self._own_acks.get(snapshot_id)
        else:
            found = self._acks.get((snapshot_id, member))
        return found is not None and _PLACE[found] >= _PLACE[phase]

    # -- for every member

    async def acknowledge(self, snapshot_id: int, phase: Phase) -> None:
        """Tell the others that this proxy has come so far with a snapshot. Nothing if it was forgotten, or is further.

        Raises LeaseExpiredError when detached, StoreUnavailableError, StoreRefusedError. If cancelled, it may have
        been told.
        """
        async with self._acknowledging:
            if snapshot_id in self._forgotten or self._has(snapshot_id, self._proxy_id, phase):
                return
            if self._store.is_shared:
                if not self._is_attached:
                    raise LeaseExpiredError("this proxy is detached")
                lease = self._lease
                self._written_acks.add(snapshot_id)
                value = pack(phase.value)
                try:
                    await self._store.commit([Put(_ack_key(snapshot_id, self._proxy_id), value, lease)])
                except LeaseExpiredError as error:
                    if lease == self._lease:
                        self._detach(str(error))
                    raise
                if lease != self._lease:
                    raise LeaseExpiredError("this proxy was detached meanwhile")
            self._own_acks[snapshot_id] = phase
            self._tell()

    def forget(self, snapshot_id: int) -> None:
        """The snapshot has ended: take back what this proxy acknowledged, when the store lets it."""
        if snapshot_id not in self._forgotten:
            self._forgotten.append(snapshot_id)
        self._own_acks.pop(snapshot_id, None)
        self._has_to_remove.set()

    def on_change(self, old: SnapshotRecord | None, new: SnapshotRecord) -> None:
        """For who has no reason to keep them longer than the record is open."""
        if not new.is_open:
            self.forget(new.id)

    # -- the tasks

    async def run(self) -> None:
        """Be a member until cancelled; then leave at once. Raises nothing: see ``problems``."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hold)
                nursery.start_soon(self._end_in_time)
                nursery.start_soon(self._remove_acks)
                if self._store.is_shared:
                    nursery.start_soon(self._follow)
        finally:
            self._leave()
            with trio.move_on_after(PARTING_SECONDS, shield=True), suppress(StoreError):
                if self._lease:
                    await self._store.revoke(self._lease)

    async def _hold(self) -> None:
        """Renew the lease; take another one when it is lost."""
        retry_seconds = min(RETRY_SECONDS, self._ttl_seconds / RENEWALS / 2)
        pause_seconds = 0.0
        while True:
            await trio.sleep(pause_seconds)
            pause_seconds = retry_seconds
            try:
                with trio.fail_after(self._ttl_seconds):
                    if not self._is_attached:
                        await self.join()
                        self._trouble = ""
                        self.on_attached()
                    elif self._store.is_shared:
                        await self._renew()
            except (StoreError, trio.TooSlowError) as error:
                self._note_trouble(str(error) or f"{self._store.name} does not answer")
            else:
                if self._is_attached:
                    pause_seconds = self._ttl_seconds / RENEWALS if self._store.is_shared else inf

    async def _renew(self) -> None:
        lease, began = self._lease, trio.current_time()
        try:
            await self._store.renew(lease)
        except LeaseExpiredError as error:
            self._detach(str(error))
            return
        # Who has joined before the renewal was sent is heard of now, also if the watch stands still: so one that joins
        # waits no longer than a lease for the others to have heard of it, or to be detached.
        await self.fresh_others()
        self._end_if_due()
        if self._is_attached and lease == self._lease:
            self.valid_until = began + self._ttl_seconds
            self._trouble = ""

    async def _end_in_time(self) -> None:
        while True:
            await self._joined.wait()
            await trio.sleep_until(self.valid_until)
            self._end_if_due()

    def _end_if_due(self) -> None:
        if self._is_attached and not self.is_attached():
            self._detach(f"its lease was not renewed for {self._ttl_seconds:g} s")

    async def _remove_acks(self) -> None:
        while True:
            await self._has_to_remove.wait()
            self._has_to_remove = trio.Event()  # before the look: what is forgotten later comes the next time
            try:
                async with self._acknowledging:
                    for snapshot_id in self._written_acks.intersection(self._forgotten):
                        await self._store.commit([Delete(_ack_key(snapshot_id, self._proxy_id))])
                        self._written_acks.discard(snapshot_id)
            except StoreError as error:
                self._note_trouble(str(error))
                self._has_to_remove.set()
                await trio.sleep(RETRY_SECONDS)

    def _note_trouble(self, why: str) -> None:
        if not self._trouble:
            log.warning("members_wait_for_store", reason=why)
        self._trouble = why

    # -- following

    async def _follow(self) -> None:
        while True:
            try:
                await self._read_anew()
                watch = self._store.watch(_WATCHED, self._followed)
                while True:
                    batch = await watch.next_batch()
                    for change in batch.changes:
                        self._take(change.key, change.value, change.revision)
                    self._followed = batch.revision
            except CompactedError:
                continue
            except StoreError as error:
                self._note_trouble(str(error))
                await trio.sleep(RETRY_SECONDS)

    async def _read_anew(self) -> None:
        after = await self._store.revision()
        entries = await self._store.read(*prefix_range(MEMBERS), limit=READ_MAX)
        entries += await self._store.read(*prefix_range(MEMBER_ACKS), limit=READ_MAX)
        # No await from here on.
        self._followed = after
        for entry in entries:
            self._take(entry.key, entry.value, entry.revision)
        there = {entry.key for entry in entries}
        for key, revision in list(self._revision_of.items()):
            if key not in there and revision <= after:
                self._take(key, None, after)
        if self._key not in there:
            self._miss_entry(after)

    def _take(self, key: str, value: bytes | None, revision: int) -> None:
        """A key has this value since ``revision``; None: it is gone. Something newer that is known stays."""
        if key == self._key:
            if value is None:
                self._miss_entry(revision)
            return
        if revision < self._revision_of.get(key, 0):
            return
        if value is None:
            self._revision_of.pop(key, None)
        else:
            self._revision_of[key] = revision
        if key.startswith(MEMBERS):
            member = _member_of(key, value or b"")
            if value is None:
                self._others.pop(member.id, None)
            elif self._others.get(member.id) != member:
                self._others[member.id] = member
                self.on_other()
        elif key.startswith(MEMBER_ACKS):
            number, _, proxy_id = key.removeprefix(MEMBER_ACKS).partition("/")
            phase = None if value is None else _phase_of(value)
            if not number.isdecimal():
                log.warning("member_key_unknown", key=key)
            elif phase is None:
                self._acks.pop((int(number), proxy_id), None)
            else:
                self._acks[int(number), proxy_id] = phase
        self._tell()

    def _miss_entry(self, revision: int) -> None:
        if revision >= self._entry_revision:
            self._detach("its entry is gone from the store")

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


def _ack_key(snapshot_id: int, proxy_id: str) -> str:
    return f"{numbered(MEMBER_ACKS, snapshot_id)}/{proxy_id}"


def _member_of(key: str, value: bytes) -> Member:
    """Whatever its value is: who has an entry is a member."""
    since = 0.0
    with suppress(StoreRefusedError):
        content = unpack(value, "member")
        since = float(content) if isinstance(content, int | float) else 0.0
    return Member(key.removeprefix(MEMBERS), since)


def _phase_of(value: bytes) -> Phase | None:
    """None for one that cannot be read: who waits for it waits on."""
    try:
        return Phase(unpack(value, "acknowledgement of a member"))
    except (StoreRefusedError, ValueError):
        return None
