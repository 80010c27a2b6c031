"""Which of listed keys existed at a snapshot's cut. routing.snapshot_listing says why none is missed.

Each candidate is read as any read at the snapshot is: the key first, then its markers, of which the oldest decides.
At rest that is one pipeline to the node that had all keys of the slot. In a split slot each step goes by itself, in
the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import NamedTuple

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.gather.existing import (
    SINGLES_MAX,
    TOGETHER_KEYS_MAX,
    Candidates,
    KeyFaultError,
    ask_settled,
)
from proxy.exchange.gather.fanout import ERROR
from proxy.exchange.gather.slots import CHECKPOINT_KEYS, SlotKeys
from proxy.exchange.gather.testify import Judge
from proxy.exchange.snapshot_reads import Asked
from proxy.protocol.encode import command, error, frame
from proxy.protocol.replies import ReplyError, decode
from routing.names import key_text
from routing.snapshot_listing import PREIMAGE, Decision, Existence, SlotCandidates, decide
from routing.snapshot_names import marker, preimage
from routing.topology import Address

AGAIN_SECONDS = 0.01  # before a key is read anew
TOGETHER_MARKERS_MAX = 2048  # asked for at the same time: making their names takes a millisecond


class KeysAtSnapshot:
    """The clients' keys as of one snapshot, expiry aside."""

    def __init__(self, exchange: Exchange, snapshot_id: int) -> None:
        self._exchange = exchange
        self._id = snapshot_id
        self._deadline = trio.current_time() + exchange.deadline_seconds
        self.judge: Judge = exchange.snapshot_reads.may_ask(snapshot_id)

    def refusal(self) -> bytes | None:
        snapshots = self._exchange.snapshots
        if snapshots.is_usable(self._id):
            return None
        return snapshots.refusal(self._id) or error("NOTREADY the snapshot changed; send it again")

    async def candidates(self, slot: int, listed: SlotKeys) -> Candidates:
        if not listed.keys:  # as of most slots, often
            return Candidates(slot, listed.address, ())
        found = SlotCandidates(slot, self._ids())
        for at in range(0, len(listed.keys), CHECKPOINT_KEYS):
            found.add(listed.keys[at : at + CHECKPOINT_KEYS])
            if at:
                await trio.lowlevel.checkpoint()
        return Candidates(slot, listed.address, found.keys, found.marked)

    async def existing(self, found: Sequence[Candidates], type_name: bytes | None) -> list[bytes]:
        """Raises KeyFaultError, also when the type of one is asked for and is not known."""
        kept: list[bytes] = []
        for portion in _portions(found, max(1, TOGETHER_MARKERS_MAX // len(self._ids()))):
            try:
                kept += await self._existing(portion, type_name)
            except (ReplyError, ValueError) as fault:
                raise KeyFaultError(error(f"ERR snapshot {self._id}: {fault}")) from fault
        return kept

    async def count(self, found: Sequence[Candidates]) -> int:
        return len(await self.existing(found, None))

    async def _existing(self, found: Sequence[Candidates], type_name: bytes | None) -> list[bytes]:
        """Raises as ``existing``, and ReplyError and ValueError for what no node can have meant."""
        sorted_ = await self._sort(found, type_name)
        answers = await self._ask(sorted_.copied, type_name)
        for piece, answer in zip(sorted_.copied, answers, strict=True):
            for at, key in enumerate(piece.keys):
                if answer is None or answer.values[at] != PREIMAGE:
                    sorted_.alone.append((piece.slot, key))
                elif answer.is_there[at]:  # else it has expired
                    sorted_.existed.append(key)
        return sorted_.existed + await self._read_alone(sorted_.alone, type_name)

    def _ids(self) -> tuple[int, ...]:
        """The ids whose markers decide over what was read before this call.

        A write preserves for a newer snapshot only once every proxy knows of its cut. Raises KeyFaultError when
        the snapshot may not be read any more.
        """
        if (refusal := self.refusal()) is not None:
            raise KeyFaultError(refusal)
        return self._exchange.snapshots.chain.markers_of(self._id)

    # -- at rest: together

    async def _sort(self, found: Sequence[Candidates], type_name: bytes | None) -> _Sorted:
        """Look at the candidates and their markers. Raises as ``_existing``."""
        while True:
            ids = self._ids()
            pieces = _pieces(found, ids)
            answers = await self._ask(pieces, type_name)
            if self._ids() == ids:
                break
            # A snapshot was cut meanwhile: a write since then has left a marker of that one alone.
        into = _Sorted()
        for piece, answer in zip(pieces, answers, strict=True):
            if answer is None:
                into.alone.extend([(piece.slot, key) for key in piece.keys])
            elif piece.names and not any(answer.values):
                into.existed.extend(compress(piece.keys, answer.is_there))
            else:
                _sort_by_markers(piece, answer, ids, type_name, into)
            await trio.lowlevel.checkpoint()
        return into

    async def _ask(self, pieces: Sequence[_Piece], type_name: bytes | None) -> list[_Answer | None]:
        """What the nodes that had the keys say; None where they do not. Raises ReplyError."""
        answers: list[_Answer | None] = [None] * len(pieces)
        asked: Sequence[int] = range(len(pieces))
        for one_by_one in (False, True):
            questions = [
                (pieces[at].address, pieces[at].questions(type_name, one_by_one=one_by_one)) for at in asked
            ]
            unclear = []
            replies_of = await ask_settled(self._exchange, questions, self.judge)
            for at, replies in zip(asked, replies_of, strict=True):
                if replies is not None:
                    answers[at] = pieces[at].answer(replies, type_name, one_by_one=one_by_one)
                    if answers[at] is None:
                        unclear.append(at)
            if not unclear:
                break
            asked = unclear
        return answers

    # -- in a split slot, or where something moved: one by one

    async def _read_alone(self, alone: Sequence[tuple[int, bytes]], type_name: bytes | None) -> list[bytes]:
        existed = [False] * len(alone)
        faults: list[KeyFaultError] = []
        limiter = trio.CapacityLimiter(SINGLES_MAX)

        async def read(index: int) -> None:
            async with limiter:
                if not faults:
                    try:
                        existed[index] = await self._existed(*alone[index], type_name)
                    except KeyFaultError as fault:
                        faults.append(fault)

        async with trio.open_nursery() as nursery:
            for index in range(len(alone)):
                nursery.start_soon(read, index)
        if faults:
            raise faults[0]
        return [key for (_, key), did in zip(alone, existed, strict=True) if did]

    async def _existed(self, slot: int, key: bytes, type_name: bytes | None) -> bool:
        """One key, each step by itself. Raises KeyFaultError."""
        while True:
            owners: Asked = []
            is_there = await self._is_there(slot, key, type_name, owners)
            decision = await self._decide_alone(slot, key, owners)
            if len(set(owners)) > 1:  # the owner, or its history, is another one now: see snapshot_reads
                await trio.sleep(AGAIN_SECONDS)
                continue
            match decision.existence:
                case Existence.AS_NOW:
                    return is_there
                case Existence.DID_NOT:
                    return False
                case Existence.DID_BUT_LOST:
                    return _may_be(key, type_name)
            snapshot_id = decision.snapshot_id
            is_there = await self._is_there(slot, preimage(slot, snapshot_id, key), type_name)
            if await self._value(slot, marker(slot, snapshot_id, key)) == PREIMAGE:
                return is_there
            # The marker is gone, as above.

    async def _decide_alone(self, slot: int, key: bytes, owners: Asked) -> Decision:
        """By the markers of a key that was read before."""
        ids = self._ids()
        values: list[bytes | None] = []
        for snapshot_id in ids:
            values.append(await self._value(slot, marker(slot, snapshot_id, key), owners))
            if values[-1] is not None:
                break
        try:
            return decide(ids[: len(values)], values)
        except ValueError as fault:
            raise KeyFaultError(error(f"ERR snapshot {self._id}: {fault}")) from fault

    async def _is_there(
        self, slot: int, name: bytes, type_name: bytes | None, owners: Asked | None = None
    ) -> bool:
        """Whether it exists now, and is of the type if one is wanted."""
        if type_name is None:
            return await self._call(slot, command("EXISTS", name), owners) == b":1\r\n"
        return (
            await self._call(slot, command("TYPE", name), owners)
        ).lower() == b"+%b\r\n" % type_name.lower()

    async def _value(self, slot: int, name: bytes, owners: Asked | None = None) -> bytes | None:
        value = decode(await self._call(slot, command("GET", name), owners))
        return value if isinstance(value, bytes) else None

    async def _call(self, slot: int, raw: bytes, owners: Asked | None = None) -> bytes:
        """The reply of a node whose history has the cut; ``owners`` gets who was asked first. Raises KeyFaultError."""
        asked: Asked = []
        reply = await self._exchange.snapshot_reads.judged_execute(
            raw, slot, self._id, resp=2, deadline=self._deadline, asked=asked
        )
        if owners is not None:
            owners += asked[:1]
        if reply[0] == ERROR:
            raise KeyFaultError(reply)
        return reply


class _Answer(NamedTuple):
    """What was read of a piece."""

    is_there: list[bool]  # of its names: exists, and is of the wanted type
    values: list[bytes | None]  # of its markers


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is read together, in one slot: the names are looked at, and after that the markers are read."""

    slot: int
    address: Address | None  # None: the slot is split, so nothing is read together
    keys: Sequence[bytes]  # the clients' keys that it is about
    names: Sequence[bytes]  # one for each key, or none at all
    markers: Sequence[bytes]  # for each key the same number, oldest first

    def questions(self, type_name: bytes | None, *, one_by_one: bool) -> list[bytes]:
        if self.address is None:
            return []
        if type_name is not None:
            looks = [command("TYPE", name) for name in self.names]
        elif one_by_one:
            looks = [command("EXISTS", name) for name in self.names]
        else:
            looks = [frame([b"EXISTS", *self.names])] if self.names else []
        return [*looks, frame([b"MGET", *self.markers])]

    def answer(
        self, replies: Sequence[bytes], type_name: bytes | None, *, one_by_one: bool
    ) -> _Answer | None:
        """None when EXISTS of several names says how many are there, and not which. Raises ReplyError."""
        *looks, values = replies
        count = len(self.names)
        if type_name is not None:
            wanted = b"+%b\r\n" % type_name.lower()
            is_there = [look.lower() == wanted for look in looks]
        elif one_by_one:
            is_there = [look == b":1\r\n" for look in looks]
        elif not looks or looks[0] == b":0\r\n":
            is_there = [False] * count
        elif looks[0] == b":%d\r\n" % count:
            is_there = [True] * count
        else:
            return None
        return _Answer(is_there, _values(values, len(self.markers)))


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Keys by what is known of them."""

    existed: list[bytes] = field(default_factory=list)
    copied: list[_Piece] = field(default_factory=list)  # what is to be read of those with a pre-image
    alone: list[tuple[int, bytes]] = field(default_factory=list)  # slot and key: to be read step by step


def _sort_by_markers(
    piece: _Piece, answer: _Answer, ids: Sequence[int], type_name: bytes | None, into: _Sorted
) -> None:
    """Raises KeyFaultError and ValueError."""
    width = len(ids)
    copies: list[tuple[bytes, int]] = []  # key, and the id of its pre-image
    for at, key in enumerate(piece.keys):
        decision = decide(ids, answer.values[at * width : (at + 1) * width])
        match decision.existence:
            case Existence.AS_NOW if not piece.names:
                # Its marker was listed and is gone: a failover has taken it, and the write behind it.
                into.alone.append((piece.slot, key))
            case Existence.AS_NOW if answer.is_there[at]:
                into.existed.append(key)
            case Existence.AS_KEPT:
                copies.append((key, decision.snapshot_id))
            case Existence.DID_BUT_LOST if _may_be(key, type_name):
                into.existed.append(key)
    if copies:
        into.copied.append(_piece_of_copies(piece, copies))


def _portions(found: Sequence[Candidates], keys_max: int) -> Iterator[list[Candidates]]:
    """The same candidates, so many keys at a time: of each one there is a marker's name for each id."""
    portion: list[Candidates] = []
    room = keys_max
    for one in found:
        at = 0
        while at < len(one.keys):
            keys = one.keys[at : at + room]
            portion.append(replace(one, keys=keys))
            at += len(keys)
            room -= len(keys)
            if not room:
                yield portion
                portion, room = [], keys_max
    if portion:
        yield portion


def _pieces(found: Sequence[Candidates], ids: Sequence[int]) -> list[_Piece]:
    """The candidates, each key with the markers of ``ids``. Those whose markers were listed are not looked at."""
    pieces = []
    for one in found:
        unmarked: Sequence[bytes] = one.keys
        marked: Sequence[bytes] = ()
        if one.marked:
            unmarked = [key for key in one.keys if key not in one.marked]
            marked = [key for key in one.keys if key in one.marked]
        for keys, is_looked_at in ((unmarked, True), (marked, False)):
            for at in range(0, len(keys), TOGETHER_KEYS_MAX):
                part = keys[at : at + TOGETHER_KEYS_MAX]
                markers = [marker(one.slot, snapshot_id, key) for key in part for snapshot_id in ids]
                pieces.append(_Piece(one.slot, one.address, part, part if is_looked_at else (), markers))
    return pieces


def _piece_of_copies(piece: _Piece, copies: Sequence[tuple[bytes, int]]) -> _Piece:
    """The pre-images, and the markers once more, so that a sweep is noticed."""
    return _Piece(
        piece.slot,
        piece.address,
        [key for key, _ in copies],
        [preimage(piece.slot, snapshot_id, key) for key, snapshot_id in copies],
        [marker(piece.slot, snapshot_id, key) for key, snapshot_id in copies],
    )


def _values(reply: bytes, count: int) -> list[bytes | None]:
    """The reply to MGET. Raises ReplyError."""
    if reply == b"*%d\r\n" % count + b"$-1\r\n" * count:  # as nearly always
        return [None] * count
    values = decode(reply)
    if not isinstance(values, list) or len(values) != count:
        raise ReplyError(f"expected {count} values, got {reply[:40]!r}")
    return values


def _may_be(key: bytes, type_name: bytes | None) -> bool:
    """A key that was too large to keep is listed, but not by its type. Raises KeyFaultError."""
    if type_name is None:
        return True
    raise KeyFaultError(
        error(
            f"SNAPSHOTTOOOLD the type of {key_text(key)} as of the snapshot is not known: it has been written since,"
            " and was too large to keep; SCAN without TYPE lists it"
        )
    )
