"""The records of snapshots, as the topology store has them: read before the first write, followed, and moved.

The store decides: a record is written under the condition that it is still what was read, so of two proxies that
move it one succeeds, and the other sees what became of it. What this proxy has written is told here before the caller
goes on; what others wrote, when the watch brings it.

- Ids only grow. The newest stands in the store by itself, so that none is given twice when its record is gone; and
  none is below what this proxy has known, or the time in Unix seconds, so that a store that is lost gives none again.
- ``on_change`` hears the changes of one record in their order, none twice, and none is left out, unless the log was
  compacted meanwhile: then it hears what became of each record. What a commit was based on is told before it.
- Nothing is told to leave ``closed`` or ``aborted``, also when the store was set back: what was preserved is gone.
- A record that cannot be read counts as cut and ``closing``: writes preserve for it, and nobody reads at it. One that
  is gone while it was open counts as aborted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Final

import trio

from proxy.log import get_logger
from proxy.store.interface import (
    ABSENT,
    Batch,
    Change,
    CompactedError,
    ConflictError,
    Delete,
    Entry,
    Expect,
    Put,
    StoreError,
    StoreRefusedError,
    TopologyStore,
    prefix_range,
)
from proxy.store.records import (
    SNAPSHOT_HEAD,
    SNAPSHOTS,
    numbered,
    pack_number,
    pack_snapshot,
    unpack_number,
    unpack_snapshot,
)
from proxy.topology.audit import Act, Operator, commit_audited
from routing.snapshot import SnapshotRecord, SnapshotState, chain_of
from routing.timeline import Plain

ENDED_KEPT_MAX: Final = 100  # closed and aborted records; those whose data is kept stay anyway
PAGE_RECORDS: Final = 500  # are read at a time
RETRY_SECONDS: Final = 0.5  # between two attempts at a store that fails

OWNER_ENDED: Final = "the proxy that opened it ended"
RECORD_LOST: Final = "its record is gone from the topology store"
SET_BACK: Final = "it had ended before the topology store was set back"

OnChange = Callable[[SnapshotRecord | None, SnapshotRecord], None]
Step = SnapshotState | Callable[[SnapshotRecord], SnapshotRecord]

log = get_logger(__name__)


class BookError(ValueError):
    """What was asked for does not follow from what the store says. The text says what that is."""


class TooManyOpenError(BookError):
    """As many snapshots are open as may be."""


class OpeningError(BookError):
    """Another snapshot is being opened. That does not take long."""


class Book:
    """The records of one store as one proxy has them. ``now`` gives Unix seconds."""

    def __init__(self, store: TopologyStore, proxy_id: str, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._proxy_id = proxy_id
        self._now = now
        self._after = 0  # the log was followed up to this revision
        self._is_loaded = False
        self._untidy = trio.Event()  # records may have to be removed, or ended once more
        self._revived: set[int] = set()  # ended here, and open in the store
        self._unreadable: dict[int, str] = {}  # id -> why its record cannot be read
        self._out_of_reach = ""  # why the store cannot be followed
        self.records: dict[int, SnapshotRecord] = {}  # open ones, and the latest that ended
        self.revision_of: dict[int, int] = {}  # id -> revision of the record's newest change that is known
        self.last_id = 0  # the largest that is known to have been given
        # Synchronous, and raises nothing: the record as it was, None for a new one, and as it is.
        self.on_change: OnChange = lambda old, new: None

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each; empty when all is well."""
        found = []
        if self._out_of_reach:
            found.append(f"snapshots may have changed unseen: {self._out_of_reach}")
        found += [
            f"snapshot {snapshot_id} is kept and not read: {why}"
            for snapshot_id, why in self._unreadable.items()
        ]
        return found

    # -- to read

    async def load(self) -> None:
        """Know everything that the store had when this was called. The first time, before the first write is accepted.

        Raises StoreUnavailableError, StoreRefusedError. If cancelled, what was read is known.
        """
        if not self._is_loaded:
            await self._read_anew()
        else:
            await self._catch_up_with(await self._entries())

    async def fresh_last_id(self) -> int:
        """The largest id that was given when this was called; each record up to it is known when this returns.

        Raises StoreUnavailableError, StoreRefusedError.
        """
        head = await self._store.get(SNAPSHOT_HEAD)
        if head is not None:
            self._saw_id(unpack_number(head.value, "newest id of a snapshot"))
            await self._catch_up(head.revision)
        return self.last_id

    # -- to write

    async def allocate(
        self, name: str, expires_at: float | None, operator: Operator, *, open_max: int, alone: bool = False
    ) -> SnapshotRecord:
        """A new record, ``opening``, of this proxy, on the audit log. ``alone``: not while another one is opening.

        Raises TooManyOpenError, OpeningError, StoreUnavailableError, StoreRefusedError. If cancelled, it may have
        been done: then the watch brings a record whose owner is this proxy, and which nobody opens.
        """
        while True:
            head = await self._store.get(SNAPSHOT_HEAD)  # first: nobody else allocates from here on
            entries = await self._entries()
            await self._catch_up_with(entries)
            found = [_read(entry)[0] for entry in entries]
            if alone and (other := next(filter(_is_opening, found), None)) is not None:
                raise OpeningError(f"snapshot {other.id} is being opened")
            if sum(record.is_open for record in found) >= open_max:
                raise TooManyOpenError(f"{open_max} snapshots are open, and no more may be: close one first")
            if head is not None:
                self._saw_id(unpack_number(head.value, "newest id of a snapshot"))
            now = self._now()
            number = max(self.last_id + 1, int(now))
            record = SnapshotRecord(
                number, SnapshotState.OPENING, now, name, expires_at, owner=self._proxy_id
            )
            key = numbered(SNAPSHOTS, number)
            try:
                revision = await commit_audited(
                    self._store,
                    Act("snapshot", operator, now, before=None, after=_facts_of(record)),
                    [Put(key, pack_snapshot(record)), Put(SNAPSHOT_HEAD, pack_number(number))],
                    [Expect(key, ABSENT), Expect(SNAPSHOT_HEAD, ABSENT if head is None else head.revision)],
                )
            except ConflictError:
                continue  # someone else allocated meanwhile
            self._adopt(record, revision)
            return record

    async def move(
        self, snapshot_id: int, step: Step, *, reason: str = "", operator: Operator | None = None
    ) -> SnapshotRecord:
        """Bring a record on: into a state, or to what ``step`` makes of it; it is asked again when others were faster.

        It is an act on the audit log when there is an operator. All but ``serving`` survives a power failure: a cut
        that is forgotten would break the chain, and an end that is forgotten would serve what was swept. An opening
        whose ``serving`` is forgotten is aborted as any other that was left.

        Raises BookError when it does not follow (any more), StoreUnavailableError, StoreRefusedError. If cancelled,
        it may have been done.
        """
        key = numbered(SNAPSHOTS, snapshot_id)
        # What is known will do if the commit finds that it is so: an opening does not wait until it is read again.
        revision, known = self.revision_of.get(snapshot_id, 0), self.records.get(snapshot_id)
        after: SnapshotRecord | None = None
        if known is not None:
            with suppress(BookError):
                after = _stepped(known, step, reason)
        while True:
            if known is None or after is None or after == known:
                entry = await self._store.get(key)
                if entry is None:
                    raise BookError(f"there is no snapshot {snapshot_id}")
                await self._catch_up_with([entry])
                known, _ = _read(entry)
                revision = entry.revision
                after = _stepped(known, step, reason)
                if after == known:
                    return known
            put, unmoved = Put(key, pack_snapshot(after)), Expect(key, revision)
            try:
                if operator is None:
                    is_durable = after.state is not SnapshotState.SERVING
                    revision = await self._store.commit([put], [unmoved], durable=is_durable)
                else:
                    act = Act("snapshot", operator, self._now(), _facts_of(known), _facts_of(after))
                    revision = await commit_audited(self._store, act, [put], [unmoved])
            except ConflictError:
                known = None
                continue
            self._adopt(after, revision)
            return after

    async def abort_orphans(self, living: Collection[str]) -> None:
        """End what proxies left opening that are not among ``living``: members that were read after these records.

        In that order, because an opener is a member before it makes a record. Raises StoreUnavailableError,
        StoreRefusedError.
        """

        def abort(record: SnapshotRecord) -> SnapshotRecord:
            if record.state is not SnapshotState.OPENING:
                raise BookError(f"snapshot {record.id} is {record.state.value}, and not left opening")
            return record.moved_to(SnapshotState.ABORTED, OWNER_ENDED)

        for record in list(self.records.values()):
            if record.state is SnapshotState.OPENING and record.owner not in (*living, self._proxy_id):
                try:
                    await self.move(record.id, abort)
                except BookError as error:
                    log.debug("snapshot_not_left", snapshot=record.id, reason=error)

    # -- to follow

    async def run(self) -> None:
        """Follow the store until cancelled. Raises nothing: see ``problems``."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_tidy)
            while True:
                try:
                    if not self._is_loaded:
                        await self._read_anew()
                    await (
                        self._store.revision()
                    )  # a watch that waits does not tell whether the store is there
                    self._find()
                    await self._follow()
                except CompactedError:
                    self._is_loaded = False
                except StoreError as error:
                    self._lose(error)
                    await trio.sleep(RETRY_SECONDS)

    async def _follow(self) -> None:
        watch = self._store.watch(SNAPSHOT_HEAD, self._after)
        while True:
            self._apply(await watch.next_batch())

    def _find(self) -> None:
        if self._out_of_reach:
            log.info("snapshots_followed_again")
            self._out_of_reach = ""

    def _lose(self, error: StoreError) -> None:
        if not self._out_of_reach:
            log.warning("snapshots_not_followed", reason=error)
        self._out_of_reach = str(error)

    async def _catch_up_with(self, entries: Iterable[Entry]) -> None:
        """Be no less far than these entries, which the store just had."""
        unseen = [
            entry.revision for entry in entries if entry.revision > self.revision_of.get(_id_of(entry.key), 0)
        ]
        await self._catch_up(max(unseen, default=0))

    async def _catch_up(self, revision: int) -> None:
        """Follow the log up to a revision that changed one of the keys that are followed.

        Others may follow it at the same time: what is known already is not told again.
        """
        while self._after < revision:
            try:
                batch = await self._store.watch(SNAPSHOT_HEAD, self._after).next_batch()
            except CompactedError:
                await self._read_anew()
            else:
                self._apply(batch)

    async def _read_anew(self) -> None:
        after = await self._store.revision()  # before the look: what comes after it, a watch brings
        head = await self._store.get(SNAPSHOT_HEAD)
        entries = await self._entries()
        # No await from here on.
        self._after = after
        self._is_loaded = True
        if head is not None:
            self._saw_head(head.value)
        for entry in sorted(entries, key=lambda entry: entry.revision):
            self._adopt_entry(entry)
        there = {_id_of(entry.key) for entry in entries}
        for snapshot_id, revision in list(self.revision_of.items()):
            if snapshot_id not in there and revision <= after:  # else it was made here since the look
                self._drop(snapshot_id)

    async def _entries(self) -> list[Entry]:
        """Every record. One that changed meanwhile is as it was at some time since the call."""
        first, last = prefix_range(SNAPSHOTS)
        found: list[Entry] = []
        while True:
            page = await self._store.read(first, last, limit=PAGE_RECORDS)
            found += [entry for entry in page if _id_of(entry.key)]
            if len(page) < PAGE_RECORDS:
                return found
            first = page[-1].key + "\0"

    # -- what is known; all of it synchronous

    def _apply(self, batch: Batch) -> None:
        """The next of the log, from ``_after`` or from earlier on: what was applied meanwhile is passed over."""
        for change in batch.changes:
            if change.revision > self._after:
                self._apply_change(change)
        self._after = max(self._after, batch.revision)

    def _apply_change(self, change: Change) -> None:
        if change.key == SNAPSHOT_HEAD:
            if change.value is not None:
                self._saw_head(change.value)
        elif snapshot_id := _id_of(change.key):
            if change.value is not None:
                self._adopt_entry(Entry(change.key, change.value, change.revision))
            elif 0 < self.revision_of.get(snapshot_id, 0) < change.revision:  # else it came and went unseen
                self._drop(snapshot_id)

    def _adopt_entry(self, entry: Entry) -> None:
        if entry.revision > self.revision_of.get(_id_of(entry.key), 0):
            record, why = _read(entry)
            if why:
                log.error("snapshot_unreadable", snapshot=record.id, reason=why)
            self._adopt(record, entry.revision, why)

    def _adopt(self, record: SnapshotRecord, revision: int, damage: str = "") -> None:
        """The record is this since ``revision``. A newer one that is known stays."""
        if revision <= self.revision_of.get(record.id, 0):
            return
        self.revision_of[record.id] = revision
        self._saw_id(record.id)
        if damage:
            self._unreadable[record.id] = damage
        else:
            self._unreadable.pop(record.id, None)
        old = self.records.get(record.id)
        if old is not None and not old.is_open:
            if record.is_open:
                log.warning("snapshot_set_back", snapshot=record.id, state=record.state)
                self._revived.add(record.id)
                self._untidy.set()
            return
        if record != old:
            self._tell(old, record)

    def _drop(self, snapshot_id: int) -> None:
        """Its record is no longer in the store."""
        del self.revision_of[snapshot_id]
        self._revived.discard(snapshot_id)
        self._unreadable.pop(snapshot_id, None)
        old = self.records[snapshot_id]
        if old.is_open:
            self._tell(old, old.moved_to(SnapshotState.ABORTED, RECORD_LOST))
        else:
            del self.records[snapshot_id]

    def _tell(self, old: SnapshotRecord | None, new: SnapshotRecord) -> None:
        self.records[new.id] = new
        if not new.is_open:
            self._untidy.set()
        log.info("snapshot_changed", snapshot=new.id, state=new.state, is_cut=new.is_cut, reason=new.reason)
        self.on_change(old, new)

    def _saw_head(self, value: bytes) -> None:
        try:
            self._saw_id(unpack_number(value, "newest id of a snapshot"))
        except StoreRefusedError as error:
            log.error("snapshot_head_unreadable", reason=error)  # whoever needs it is told

    def _saw_id(self, snapshot_id: int) -> None:
        self.last_id = max(self.last_id, snapshot_id)

    # -- to tidy up

    async def _keep_tidy(self) -> None:
        """Any number of proxies may: what is gone, or has ended, is left as it is."""
        while True:
            await self._untidy.wait()
            self._untidy = trio.Event()  # before the look: what ends after it is seen the next time
            try:
                await self._end_revived()
                await self.trim()
            except StoreError as error:
                log.info("snapshots_not_tidied", reason=error)
                self._untidy.set()
                await trio.sleep(RETRY_SECONDS)

    async def _end_revived(self) -> None:
        """End in the store what has ended here, for those who do not know it."""
        for snapshot_id in list(self._revived):
            try:
                await self.move(snapshot_id, SnapshotState.ABORTED, reason=SET_BACK)
            except BookError as error:
                log.info("snapshot_ended_already", snapshot=snapshot_id, reason=error)
            self._revived.discard(snapshot_id)

    async def trim(self) -> None:
        """Remove records that ended, the oldest first, down to ENDED_KEPT_MAX; none whose data is kept.

        Raises ConflictError when another proxy did so at the same time, StoreUnavailableError, StoreRefusedError.
        """
        kept = {*chain_of(self.records.values()).ids, *self._revived}
        ended = sorted((record.id for record in self.records.values() if not record.is_open), reverse=True)
        surplus = [snapshot_id for snapshot_id in ended[ENDED_KEPT_MAX:] if snapshot_id not in kept]
        for snapshot_id in surplus:
            if snapshot_id not in self.revision_of:  # nobody but this proxy knows it
                del self.records[snapshot_id]
        unmoved = [
            Expect(numbered(SNAPSHOTS, snapshot_id), self.revision_of[snapshot_id])
            for snapshot_id in surplus
            if snapshot_id in self.revision_of
        ]
        if unmoved:
            revision = await self._store.commit([Delete(expect.key) for expect in unmoved], unmoved)
            await self._catch_up(revision)


def _is_opening(record: SnapshotRecord) -> bool:
    return record.state is SnapshotState.OPENING


def _stepped(before: SnapshotRecord, step: Step, reason: str) -> SnapshotRecord:
    """Raises BookError if that does not follow."""
    try:
        if isinstance(step, SnapshotState):
            return before.moved_to(step, reason)
        if not before.is_open:
            raise BookError(f"snapshot {before.id} is {before.state.value}, and stays so")
        after = step(before)
        if after.state is not before.state:
            before.moved_to(after.state)
        if after.id != before.id or after.is_cut < before.is_cut:
            raise BookError(f"snapshot {before.id} keeps its id, and cannot be uncut")
    except BookError:
        raise
    except ValueError as error:
        raise BookError(str(error)) from error
    return replace(after, reason=reason) if reason else after


def _id_of(key: str) -> int:
    """0 for a key that is no record's."""
    digits = key.removeprefix(SNAPSHOTS)
    return int(digits) if digits != key and digits.isdecimal() and digits.isascii() else 0


def _read(entry: Entry) -> tuple[SnapshotRecord, str]:
    """The record; if it cannot be read, one that writes preserve for and nobody reads at, and why."""
    number = _id_of(entry.key)
    try:
        record = unpack_snapshot(entry.value)
        if record.id != number:
            raise StoreRefusedError(f"the store's {entry.key} is of snapshot {record.id}")
    except StoreRefusedError as error:
        why = str(error)
        return SnapshotRecord(number, SnapshotState.CLOSING, float(number), reason=why, is_cut=True), why
    return record, ""


def _facts_of(record: SnapshotRecord) -> dict[str, Plain]:
    """For the audit log."""
    return {
        "id": record.id,
        "state": record.state.value,
        "name": record.name,
        "expires_at": record.expires_at,
        "reason": record.reason,
    }
