"""SCAN, KEYS, RANDOMKEY, DBSIZE: the keys of all shards as one server's.

SCAN goes through the slots in order, so its cursor is a slot and needs no memory here; each slot's listing is
proven complete (routing.slot_listing). A key that exists during a full iteration is returned at least once,
whatever moves. The keys of snapshots are never shown.

A client whose reads are as of a snapshot gets the keys as of its cut, expiry aside; RANDOMKEY is refused.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.failures import not_ready
from proxy.exchange.gather.at_snapshot import KeysAtSnapshot
from proxy.exchange.gather.existing import Candidates, KeyFaultError, KeysNow, Keyspace
from proxy.exchange.gather.fanout import ask_primaries, first_error, primaries
from proxy.exchange.gather.slots import CHECKPOINT_KEYS, SlotKeys, SlotLister, SlotTooLargeError
from proxy.exchange.gather.testify import UnansweredError, testify
from proxy.exchange.open_requests import CURRENT, OpenRequests
from proxy.protocol.encode import array, bulk, command, error, integer, null
from proxy.protocol.replies import ReplyError, decode
from routing import glob
from routing.keys import INTEGER
from routing.mode import NO_SNAPSHOT
from routing.scan_cursor import ScanCursor
from routing.slot import SLOT_COUNT, slot_of
from routing.snapshot_names import PREFIX, is_internal
from routing.topology import Address

SCAN_SECONDS = 0.05  # after which SCAN returns what it has, so that it holds its client no longer
PART_KEYS = 10_000  # of a slot with more keys SCAN returns about so many at a time, or COUNT if that is more
KEYS_BYTES_MAX = 256 * 1024 * 1024  # of a reply to KEYS
RANDOM_DRAWS_MAX = 5  # of each node, before all keys are listed to find one that is a client's

SYNTAX = error("ERR syntax error")
INVALID_CURSOR = error("ERR invalid cursor")
NOT_AN_INTEGER = error("ERR value is not an integer or out of range")
TOO_MANY_KEYS = error(f"ERR the reply to KEYS would be more than {KEYS_BYTES_MAX} bytes: use SCAN")
NO_CHANCE = error(
    "ERR RANDOMKEY cannot be answered as of a snapshot: the nodes draw from the keys of now; use SCAN, or read at"
    " another level (STEADY.READ)"
)


@dataclass(frozen=True, slots=True)
class ScanOptions:
    count: int = 10
    pattern: glob.Pattern | None = None
    type_name: bytes | None = None


async def scan(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """SCAN cursor [MATCH pattern] [COUNT count] [TYPE type].

    Returns when ``count`` keys were looked at, as in Redis before MATCH and TYPE, or SCAN_SECONDS are over;
    the keys of one slot come together, so there may be more. After an error, the same cursor may be sent
    again.
    """
    options = _scan_options(arguments)
    if isinstance(options, bytes):
        return options
    cursor = ScanCursor.parse(arguments[1])
    if cursor is None:
        return INVALID_CURSOR
    keyspace = _keyspace(requests)
    if isinstance(keyspace, bytes):
        return keyspace

    async def go_on(lister: SlotLister) -> bytes:
        until = trio.current_time() + SCAN_SECONDS
        following, found = await _collect(lister, keyspace, cursor, options, until)
        keys = await keyspace.existing(found, options.type_name)
        return array([bulk(str(following)), array([bulk(key) for key in keys])])

    return await _listing(keyspace, requests.exchange, "SCAN", go_on)


def _keyspace(requests: OpenRequests) -> Keyspace | bytes:
    """What the client's reads are of, as its command begins; the error reply when that cannot be read."""
    exchange, snapshot_id = requests.exchange, requests.snapshot_id
    if not snapshot_id:
        return KeysNow(exchange)
    if snapshot_id == CURRENT:
        current = exchange.snapshots.current()
        if current is None:
            return error(NO_SNAPSHOT)
        snapshot_id = current
    return exchange.snapshots.refusal(snapshot_id) or KeysAtSnapshot(exchange, snapshot_id)


async def _listing(
    keyspace: Keyspace, exchange: Exchange, name: str, work: Callable[[SlotLister], Awaitable[bytes]]
) -> bytes:
    """The reply of ``work`` within the request deadline, or the error that says what is in its way."""
    lister = SlotLister(exchange, trio.current_time() + exchange.deadline_seconds, keyspace.judge)
    try:
        with trio.move_on_at(lister.deadline):
            reply = await work(lister)
            return keyspace.refusal() or reply  # it may have ended meanwhile, and its keys with it
    except SlotTooLargeError as too_large:
        return error(f"ERR {name}: {too_large}")
    except KeyFaultError as fault:
        return fault.reply
    return not_ready(name, exchange.deadline_seconds, lister.reason or "there is too much to list")


def _scan_options(arguments: Sequence[bytes]) -> ScanOptions | bytes:
    """The options, or the error reply that Redis gives for them."""
    count = 10
    pattern = type_name = None
    words = arguments[2:]
    for name, value in zip(words[::2], [*words[1::2], None], strict=False):
        match name.upper():
            case _ if value is None:
                return SYNTAX
            case b"COUNT":
                if not INTEGER.fullmatch(value) or not -(1 << 63) <= int(value) < 1 << 63:
                    return NOT_AN_INTEGER
                count = int(value)
                if count < 1:
                    return SYNTAX
            case b"MATCH":
                try:
                    pattern = None if value == b"*" else glob.parse(value)
                except glob.PatternError as too_long:
                    return error(str(too_long))
            case b"TYPE":
                type_name = value
            case _:
                return SYNTAX
    return ScanOptions(count, pattern, type_name)


async def _collect(
    lister: SlotLister, keyspace: Keyspace, cursor: ScanCursor, options: ScanOptions, until: float
) -> tuple[ScanCursor, list[Candidates]]:
    """Go on from ``cursor``: the next one, and the keys that the pattern fits.

    Raises as SlotLister.walk and Keyspace.candidates.
    """
    begin = cursor
    found: list[Candidates] = []
    looked_at = 0
    part_keys = max(options.count, PART_KEYS)
    try:
        async with aclosing(lister.walk(range(cursor.slot, SLOT_COUNT))) as batches:
            async for batch in batches:
                for slot, slot_keys in batch:
                    candidates = await keyspace.candidates(slot, slot_keys)
                    keys = candidates.keys
                    if not cursor.parts_log2:
                        cursor = cursor.in_parts(len(keys), part_keys)
                    if cursor.parts_log2:
                        keys = [key for key in keys if cursor.holds(key)]
                    cursor = cursor.following()
                    if keys:
                        looked_at += len(keys)
                        if kept := await _matching(keys, options.pattern):
                            found.append(replace(candidates, keys=kept))
                    # A slot in parts goes on with the next call: its parts are large.
                    if looked_at >= options.count or cursor.parts_log2:
                        return cursor, found
                if trio.current_time() >= until:
                    break
    except SlotTooLargeError:
        if cursor == begin:
            raise  # else the client gets what there is, and the error when it goes on
    return cursor, found


async def _matching(keys: Sequence[bytes], pattern: glob.Pattern | None) -> Sequence[bytes]:
    if pattern is None:
        return keys
    kept: list[bytes] = []
    for at in range(0, len(keys), CHECKPOINT_KEYS):
        kept += [key for key in keys[at : at + CHECKPOINT_KEYS] if glob.matches(pattern, key)]
        if at:
            await trio.lowlevel.checkpoint()
    return kept


async def keys(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """KEYS pattern. Each primary's own KEYS counts for the slots that it had all keys of, by its testimony;
    the other slots are listed as SCAN does, and all of them as of a snapshot."""
    keyspace, exchange = _keyspace(requests), requests.exchange
    if isinstance(keyspace, bytes):
        return keyspace
    try:
        pattern = glob.parse(arguments[1])
    except glob.PatternError as too_long:
        return error(str(too_long))

    async def gather(lister: SlotLister) -> bytes:
        gathered = _Gathered(exchange, command("KEYS", arguments[1]))
        if isinstance(keyspace, KeysNow):
            async with trio.open_nursery() as nursery:
                for address in primaries(exchange):
                    nursery.start_soon(gathered.ask, address)
        remaining = [slot for slot in range(SLOT_COUNT) if slot not in gathered.slots]
        async with aclosing(lister.walk(remaining)) as batches:
            async for batch in batches:
                fitting = [
                    replace(one, keys=await _matching(one.keys, pattern))
                    for one in await _candidates(keyspace, batch)
                ]
                gathered.add([bulk(key) for key in await keyspace.existing(fitting, None)])
                if gathered.size_bytes > KEYS_BYTES_MAX:
                    break
        return TOO_MANY_KEYS if gathered.size_bytes > KEYS_BYTES_MAX else array(list(gathered.frames))

    return await _listing(keyspace, requests.exchange, "KEYS", gather)


async def _candidates(keyspace: Keyspace, batch: Sequence[tuple[int, SlotKeys]]) -> list[Candidates]:
    """Raises as Keyspace.candidates."""
    return [await keyspace.candidates(slot, slot_keys) for slot, slot_keys in batch]


class _Gathered:
    """What primaries' own KEYS gave, and the slots that it covers."""

    def __init__(self, exchange: Exchange, raw: bytes) -> None:
        self.frames: dict[bytes, None] = {}  # encoded keys; two nodes may list one just handed over
        self.slots: set[int] = set()
        self.size_bytes = 0
        self._exchange = exchange
        self._raw = raw

    def add(self, frames: Sequence[bytes]) -> None:
        self.frames.update(dict.fromkeys(frames))
        self.size_bytes += sum(map(len, frames))

    async def ask(self, address: Address) -> None:
        """One primary. If it does not answer, or in part only, its slots stay to be listed."""
        try:
            testimony, (reply,) = await testify(self._exchange, address, [self._raw], None)
            complete = {slot for slot in testimony.before.owned if testimony.has_all(slot)}
            async with aclosing(_bulk_frames(reply)) as pieces:
                async for frames in pieces:
                    self.add([raw for raw in frames if _is_shown(raw[raw.index(b"\n") + 1 : -2], complete)])
                    if self.size_bytes > KEYS_BYTES_MAX:
                        break
        except (UnansweredError, ReplyError):
            return
        self.slots |= complete


def _is_shown(key: bytes, slots: set[int]) -> bool:
    return slot_of(key) in slots and not (key.startswith(PREFIX) and is_internal(key))


async def _bulk_frames(reply: bytes) -> AsyncGenerator[list[bytes], None]:
    """The members of an array of bulk strings, some at a time. Raises ReplyError."""
    at = reply.find(b"\r\n") + 2
    if reply[:1] != b"*" or at < 2:
        raise ReplyError(f"expected an array, got {reply[:40]!r}")
    frames: list[bytes] = []
    while at < len(reply):
        line_end = reply.index(b"\r\n", at)
        end = line_end + 4 + int(reply[at + 1 : line_end])
        frames.append(reply[at:end])
        at = end
        if len(frames) >= CHECKPOINT_KEYS:
            yield frames
            frames = []
            await trio.lowlevel.checkpoint()
    yield frames


async def random_key(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """RANDOMKEY: from a shard by the share of its keys. Nil only after all slots were found empty."""
    keyspace = _keyspace(requests)
    if not isinstance(keyspace, KeysNow):
        return NO_CHANCE
    sizes = await ask_primaries(requests, [b"DBSIZE"], repeatable=True)
    size_of = {size.address: decode(size.reply) for size in sizes if not size.is_error}
    for _ in range(RANDOM_DRAWS_MAX):
        answers = await ask_primaries(requests, [b"RANDOMKEY"], repeatable=True)
        drawn = {answer: decode(answer.reply) for answer in answers if not answer.is_error}
        # A node that drew a snapshot's key is left out, so a share counts by the clients' keys in it.
        having = [answer for answer, key in drawn.items() if key is not None and not is_internal(key)]
        if having:
            weights = [max(1, size_of.get(answer.address, 0)) for answer in having]
            return random.choices(having, weights)[0].reply
        if all(key is None for key in drawn.values()):
            if (failure := first_error(answers)) is not None:
                return failure
            break  # a key on its way can have escaped all of them
        if len(drawn) < len(answers):
            break  # an unreachable node would hold up each draw

    async def find(lister: SlotLister) -> bytes:
        begin = random.randrange(SLOT_COUNT)
        slots = [*range(begin, SLOT_COUNT), *range(begin)]
        async with aclosing(lister.walk(slots)) as batches:
            async for batch in batches:
                if found := await keyspace.existing(await _candidates(keyspace, batch), None):
                    return bulk(random.choice(found))
        return null(requests.resp == 3)

    return await _listing(keyspace, requests.exchange, "RANDOMKEY", find)


async def database_size(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """DBSIZE: the sum. A key that is being handed over may count twice or not at all for a moment.

    The nodes count the keys of snapshots too. While there may be any, and as of a snapshot, all keys are listed
    and counted: the slower the more there are.
    """
    keyspace, snapshots = _keyspace(requests), requests.exchange.snapshots
    if isinstance(keyspace, bytes):
        return keyspace
    if isinstance(keyspace, KeysNow) and not snapshots.may_have_keys():
        answers = await ask_primaries(requests, arguments, repeatable=True)
        if (failure := first_error(answers)) is not None:
            return failure
        if not snapshots.may_have_keys():  # still
            return integer(sum(decode(answer.reply) for answer in answers))

    async def count(lister: SlotLister) -> bytes:
        total = 0
        async with aclosing(lister.walk(range(SLOT_COUNT))) as batches:
            async for batch in batches:
                total += await keyspace.count(await _candidates(keyspace, batch))
        return integer(total)

    return await _listing(keyspace, requests.exchange, "DBSIZE", count)


COMMANDS = {"SCAN": scan, "KEYS": keys, "RANDOMKEY": random_key, "DBSIZE": database_size}
