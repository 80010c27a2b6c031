"""STEADY.SNAPSHOT carried out, and the snapshot that a connection's reads are bound to. All give replies."""

from __future__ import annotations

from proxy.frontend.steady import CloseSnapshot, ListSnapshots, OpenSnapshot, ShowSnapshot
from proxy.protocol import encode
from proxy.protocol.facts import reply_of_facts
from proxy.snapshots.asked import SnapshotDesk, why_not_closed
from proxy.snapshots.facts import SnapshotError
from proxy.snapshots.shown import shown
from proxy.topology.audit import Operator
from routing.levels import Level, ReadLevel
from routing.mode import NO_SNAPSHOT

WHO_CHARACTERS_MAX = 128  # of a client's name, in the audit log for ever


def operator_of_client(name: bytes, peer_address: str) -> Operator:
    """A client as the audit log names it: as CLIENT SETNAME has it, which is a claim."""
    return Operator(name.decode("ascii", "backslashreplace")[:WHO_CHARACTERS_MAX] or "client", peer_address)


def show(desk: SnapshotDesk, asked: ListSnapshots | ShowSnapshot, *, resp3: bool) -> bytes:
    """The facts of one snapshot as a map, in RESP2 as names and values in turn; or an array of those of all."""
    if isinstance(asked, ListSnapshots):
        return reply_of_facts([shown(facts) for facts in desk.facts()], resp3=resp3)
    facts = desk.facts_of(asked.snapshot_id)
    return _unknown(asked.snapshot_id) if facts is None else reply_of_facts(shown(facts), resp3=resp3)


async def open_(desk: SnapshotDesk, asked: OpenSnapshot, operator: Operator) -> bytes:
    """The id of a snapshot that serves. If cancelled, it may be open."""
    try:
        return encode.integer((await desk.open(asked.name, asked.ttl_seconds, operator)).id)
    except SnapshotError as error:
        return encode.error(str(error))


async def close(desk: SnapshotDesk, asked: CloseSnapshot, operator: Operator, mode: Level) -> bytes:
    """OK when no new read of it begins. ``mode``: the routing mode in effect."""
    if desk.facts_of(asked.snapshot_id) is None:
        return _unknown(asked.snapshot_id)
    refusal = why_not_closed(desk, asked.snapshot_id, mode)
    if refusal is not None:
        return encode.error(refusal)
    try:
        await desk.close(asked.snapshot_id, operator)
    except SnapshotError as error:
        return encode.error(str(error))
    return encode.OK


def bound(desk: SnapshotDesk, level: ReadLevel) -> ReadLevel | bytes:
    """``level`` with the id of a snapshot that serves, the current one if it names none; or the error reply."""
    snapshot_id = desk.current() if level.snapshot_id is None else level.snapshot_id
    if snapshot_id is None:
        return encode.error(NO_SNAPSHOT)
    return desk.refusal(snapshot_id) or ReadLevel(Level.SNAPSHOT, snapshot_id=snapshot_id)


def _unknown(snapshot_id: int) -> bytes:
    return encode.error(
        f"ERR there is no snapshot {snapshot_id}: it was never opened, or ended long ago; "
        "STEADY.SNAPSHOT LIST shows those that there are"
    )
