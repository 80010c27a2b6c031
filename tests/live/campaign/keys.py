"""What the load reads and writes, and what each reply may be.

Every key has one owner, the only client that writes it, and a version that only grows. A read that begins
after version v was acknowledged must show v or later, and nothing later than the owner has begun to write.
Keys of every family but `Churned` always exist, so nil, 0 or an empty list for them is wrong. Values name
their key, so a reply that belongs to another request is seen.

A builder makes a `Request`: the bytes, and the check of its replies. Builders run at the moment of sending:
they note what is acknowledged then. This file does no I/O.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import NamedTuple

from routing.slot import slot_of
from tests.live.campaign.resp import Reply, frame

PRESENT = -1  # what a read that shows only that the key is there says of its version
PAYLOAD_BYTES = 100
LASTING_SECONDS = 900_000  # the time to live of keys that have one; no run comes near it
RECENT_KEYS = 64  # writes that reads are drawn to, where a stale reply would show
STREAM_LENGTH = 4
MANY_KEYS = 8  # in one MGET; half as many in one MSET


class FaultKind(Enum):
    NIL = "nil"  # a key that exists was answered as if it did not
    STALE = "stale"  # older than what was acknowledged before the read began
    WRONG = "wrong"  # not this key's value, torn, from the future, or a write that ran twice
    MISSED = "missed"  # a full SCAN did not show a key that was there all the time
    ERROR = "error"  # an error reply, or a connection that ended
    LEAKED = "leaked"  # MOVED, ASK, TRYAGAIN, CLUSTERDOWN or CROSSSLOT reached the client
    HANG = "hang"  # no reply within the deadline


class Fault(NamedTuple):
    kind: FaultKind
    detail: str


@dataclass(slots=True, eq=False)
class Key:
    """One key, as its owner and its readers know it."""

    family: Family
    name: bytes
    slot: int
    index: int  # among all keys, which counters and bitmaps carry in their values
    owner: int
    issued: int = 0  # the newest version that was sent
    acked: int = 0  # the newest version that was acknowledged
    is_certain: bool = True  # False: a write's outcome is unknown, and the key is written no more
    alive: bool = True  # of a Churned key: its owner's last write created it
    members: list[int] = field(default_factory=list)  # of a set: the versions to remove in time

    def begin(self) -> int:
        self.issued += 1
        return self.issued


@dataclass(slots=True, eq=False)
class Request:
    """What to send, and how to judge what comes back. ``check`` sees as many replies as ``reply_count``."""

    label: str
    payload: bytes
    check: Callable[[list[Reply]], list[Fault]]
    reply_count: int = 1
    writes: tuple[Key, ...] = ()  # the keys whose state is unknown if no reply comes


Builder = Callable[[Key, int], Request]  # key, the client that sends it
Extract = Callable[[Reply], int | None]  # a reply's version; None is nil; ValueError: not this key's value


def value_of(name: bytes, version: int) -> bytes:
    return (b"%b=%d;" % (name, version)).ljust(PAYLOAD_BYTES, b".")


def version_in(name: bytes, value: Reply) -> int | None:
    """The version that a value carries. Raises ValueError when it is not a value of ``name``."""
    if value is None:
        return None
    if not isinstance(value, bytes) or not value.startswith(name + b"="):
        raise ValueError(f"{value!r} is not a value of {name.decode()}")
    return int(value[len(name) + 1 : value.index(b";")])


def judge(key: Key, floor: int, version: int | None) -> list[Fault]:
    """What is wrong with a read of ``version``, None being nil, that had to show ``floor`` at least."""
    if key.family.has_gaps:
        return _judge_churned(key, floor, version)
    if version is None:
        return [Fault(FaultKind.NIL, f"nil, must be {floor}")]
    if version == PRESENT:
        return []
    if version < floor:
        return [Fault(FaultKind.STALE, f"version {version}, {floor} was acknowledged")]
    if version > key.issued:
        return [Fault(FaultKind.WRONG, f"version {version}, only {key.issued} was written")]
    return []


def _judge_churned(key: Key, floor: int, version: int | None) -> list[Fault]:
    """Even versions exist, odd ones are deletions; each in the window floor..issued may be seen."""
    may_exist = key.issued > floor or floor % 2 == 0
    may_lack = key.issued > floor or floor % 2 == 1
    if version is None:
        return [] if may_lack else [Fault(FaultKind.NIL, f"nil, must be {floor}")]
    if version == PRESENT:
        return [] if may_exist else [Fault(FaultKind.STALE, f"exists, its deletion {floor} was acknowledged")]
    if version < floor:
        return [Fault(FaultKind.STALE, f"version {version}, {floor} was acknowledged")]
    if version > key.issued:
        return [Fault(FaultKind.WRONG, f"version {version}, only {key.issued} was written")]
    return []


def judged(key: Key, floor: int, extract: Extract, reply: Reply) -> list[Fault]:
    """`judge`, with a reply of the wrong shape or of another key counted as wrong."""
    try:
        version = extract(reply)
    except (ValueError, TypeError, IndexError) as problem:
        return [Fault(FaultKind.WRONG, f"{type(problem).__name__}: {problem}"[:200])]
    return judge(key, floor, version)


def reading(
    label: str, parts: Callable[[Key], Sequence[bytes | int]], extract: Callable[[Key, Reply], int | None]
) -> tuple[str, Builder]:
    """A read of one key. The owner's own reads must also show its writes earlier in the same pipeline."""

    def build(key: Key, client: int) -> Request:
        floor = key.acked

        def check(replies: list[Reply]) -> list[Fault]:
            # Replies come in order: by now the owner has seen those of its earlier writes, and of no later.
            least = key.acked if key.owner == client else floor
            return judged(key, least, lambda reply: extract(key, reply), replies[0])

        return Request(label, frame(parts(key)), check)

    return label, build


def writing(
    key: Key, label: str, parts: Sequence[bytes | int], accept: Callable[[Reply], int | Fault | None]
) -> Request:
    """A write of one key, begun already. ``accept`` gives the version that is now there, or what is wrong."""

    def check(replies: list[Reply]) -> list[Fault]:
        try:
            accepted = accept(replies[0])
        except (ValueError, TypeError, IndexError) as problem:
            return [Fault(FaultKind.WRONG, f"{type(problem).__name__}: {problem}"[:200])]
        if isinstance(accepted, Fault):
            return [accepted]
        if accepted is not None:
            key.acked = accepted
        return []

    return Request(label, frame(parts), check, writes=(key,))


def replying(
    version: int | None, wanted: Reply, *, absent: Reply = None
) -> Callable[[Reply], int | Fault | None]:
    """Accepts exactly ``wanted`` for ``version``, None when the write makes no new one.

    ``absent`` is what the engine says when it did not find the key.
    """

    def accept(reply: Reply) -> int | Fault | None:
        if reply == wanted:
            return version
        kind = FaultKind.NIL if reply == absent else FaultKind.WRONG
        return Fault(kind, f"the write replied {reply!r}, not {wanted!r}")

    return accept


def present(reply: Reply, wanted: Reply) -> int | None:
    """For reads that only tell that the key is there: 0, nil and empty mean that it is not."""
    if not reply:
        return None
    if reply != wanted:
        raise ValueError(f"{reply!r}, must be {wanted!r}")
    return PRESENT


def items(reply: Reply) -> list[Reply]:
    if not isinstance(reply, list):
        raise TypeError(f"not an array: {reply!r}")
    return reply


def number(reply: Reply) -> int:
    if not isinstance(reply, int):
        raise TypeError(f"not an integer: {reply!r}")
    return reply


class Family(ABC):
    """Keys of one type that are written and read alike."""

    kind = "string"  # what TYPE says
    stem = b""
    per_slot = 0  # of 1000 keys in a slot
    lasting = False  # whether the keys have a time to live
    has_gaps = False  # whether its keys are at times deleted
    reads: tuple[tuple[str, Builder], ...] = ()

    @abstractmethod
    def create(self, key: Key) -> list[bytes]:
        """The commands that make version 0."""

    @abstractmethod
    def write(self, key: Key) -> Request:
        """A request that makes the next version."""


def _exists(key: Key, reply: Reply) -> int | None:
    return present(reply, 1)


def _type(key: Key, reply: Reply) -> int | None:
    return None if reply == b"none" else present(reply, key.family.kind.encode())


def _time_to_live(key: Key, reply: Reply) -> int | None:
    if reply == -2:
        return None
    if key.family.lasting != (number(reply) > LASTING_SECONDS // 2):
        raise ValueError(f"time to live {reply!r}")
    return PRESENT


COMMON_READS = (
    reading("EXISTS", lambda key: [b"EXISTS", key.name], _exists),
    reading("TYPE", lambda key: [b"TYPE", key.name], _type),
    reading("TTL", lambda key: [b"TTL", key.name], _time_to_live),
)


def _own_version(key: Key, reply: Reply) -> int | None:
    return version_in(key.name, reply)


_GET = reading("GET", lambda key: [b"GET", key.name], _own_version)


class Strings(Family):
    stem, per_slot = b"string", 300
    reads = (
        _GET,
        _GET,
        reading(
            "GETRANGE",
            lambda key: [b"GETRANGE", key.name, 0, 60],
            lambda key, r: _own_version(key, r or None),
        ),
        reading("STRLEN", lambda key: [b"STRLEN", key.name], lambda key, r: present(r, PAYLOAD_BYTES)),
    )

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"SET", key.name, value_of(key.name, 0)])]

    def write(self, key: Key) -> Request:
        floor = key.acked
        version = key.begin()
        value = value_of(key.name, version)
        if version % 3 == 0:
            return writing(key, "SET XX", [b"SET", key.name, value, b"XX"], replying(version, b"OK"))
        if version % 3 == 1:
            return writing(key, "SET", [b"SET", key.name, value], replying(version, b"OK"))

        def accept(reply: Reply) -> int | Fault:
            faults = judge(key, floor, version_in(key.name, reply))
            return faults[0] if faults else version

        return writing(key, "GETSET", [b"GETSET", key.name, value], accept)


class Lasting(Family):
    """Strings with a time to live that a migration must carry over."""

    stem, per_slot, lasting = b"lasting", 60, True
    reads = (_GET, *[COMMON_READS[2]] * 2)

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"SET", key.name, value_of(key.name, 0), b"EX", LASTING_SECONDS])]

    def write(self, key: Key) -> Request:
        version = key.begin()
        value = value_of(key.name, version)
        if version % 2:
            return writing(
                key, "SETEX", [b"SETEX", key.name, LASTING_SECONDS, value], replying(version, b"OK")
            )
        return writing(key, "SET KEEPTTL", [b"SET", key.name, value, b"KEEPTTL"], replying(version, b"OK"))


class Churned(Family):
    """Strings that their owner deletes and makes again: the one family whose reads may be nil."""

    stem, per_slot, has_gaps = b"churned", 60, True
    reads = (_GET,)

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"SET", key.name, value_of(key.name, 0)])]

    def write(self, key: Key) -> Request:
        if not key.alive:
            key.alive = True
            key.issued += 2 - key.issued % 2
            value = value_of(key.name, key.issued)
            return writing(key, "SET", [b"SET", key.name, value], replying(key.issued, b"OK"))
        key.alive = False
        key.issued += 1 + key.issued % 2
        label = "DEL" if key.issued % 4 == 1 else "UNLINK"
        return writing(key, label, [label.encode(), key.name], replying(key.issued, 1, absent=0))


class Counters(Family):
    stem, per_slot = b"counter", 90
    reads = (reading("GET", lambda key: [b"GET", key.name], lambda key, r: Counters.version(key, r)),)

    @staticmethod
    def base(key: Key) -> int:
        return (key.index + 1) * 10_000_000

    @staticmethod
    def version(key: Key, reply: Reply) -> int | None:
        return None if reply is None else int(reply) - Counters.base(key)  # type: ignore[arg-type]

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"SET", key.name, self.base(key)])]

    def write(self, key: Key) -> Request:
        before = key.acked
        key.begin()

        def accept(reply: Reply) -> int | Fault:
            version = number(reply) - self.base(key)
            if version < 0:
                return Fault(FaultKind.NIL, f"INCR began anew: {reply!r}")
            if not before < version <= key.issued:
                return Fault(
                    FaultKind.WRONG, f"INCR gave {version}; {before} was acknowledged, {key.issued} sent"
                )
            return version

        return writing(key, "INCR", [b"INCR", key.name], accept)


class Hashes(Family):
    kind, stem, per_slot = "hash", b"hash", 100

    @staticmethod
    def _pair(key: Key, value: Reply, count: Reply) -> int | None:
        version = version_in(key.name, value)
        if version is None and count is None:
            return None
        if not isinstance(count, bytes) or int(count) != version:
            raise ValueError(f"torn hash: value of {version}, number {count!r}")
        return version

    @staticmethod
    def _all(key: Key, reply: Reply) -> int | None:
        flat = items(reply)
        if not flat:
            return None
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        return Hashes._pair(key, fields[b"v"], fields[b"n"])

    reads = (
        reading("HGET", lambda key: [b"HGET", key.name, b"v"], _own_version),
        reading("HGETALL", lambda key: [b"HGETALL", key.name], lambda key, r: Hashes._all(key, r)),
        reading(
            "HMGET", lambda key: [b"HMGET", key.name, b"v", b"n"], lambda key, r: Hashes._pair(key, *items(r))
        ),
        reading("HLEN", lambda key: [b"HLEN", key.name], lambda key, r: present(r, 3)),
        reading("HEXISTS", lambda key: [b"HEXISTS", key.name, b"v"], lambda key, r: present(r, 1)),
    )

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"HSET", key.name, b"v", value_of(key.name, 0), b"n", 0, b"fixed", key.name])]

    def write(self, key: Key) -> Request:
        version = key.begin()
        parts: list[bytes | int] = [b"HSET", key.name, b"v", value_of(key.name, version), b"n", version]
        return writing(key, "HSET", parts, replying(version, 0, absent=2))


class Lists(Family):
    """The newest value is the head; two elements are always there."""

    kind, stem, per_slot = "list", b"list", 70

    @staticmethod
    def _head(key: Key, reply: Reply) -> int | None:
        elements = items(reply)
        if len(elements) == 1:
            raise ValueError("one element, there are always two")
        return version_in(key.name, elements[0]) if elements else None

    @staticmethod
    def _length(reply: Reply) -> int | None:
        return None if number(reply) < 2 else PRESENT

    reads = (
        reading("LRANGE", lambda key: [b"LRANGE", key.name, 0, -1], lambda key, r: Lists._head(key, r)),
        reading("LINDEX", lambda key: [b"LINDEX", key.name, 0], _own_version),
        reading("LLEN", lambda key: [b"LLEN", key.name], lambda key, r: Lists._length(r)),
    )

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"RPUSH", key.name, value_of(key.name, 0), value_of(key.name, 0)])]

    def write(self, key: Key) -> Request:
        if key.acked % 6 == 5 and key.alive:
            key.alive = False  # trim once, then push again
            parts: list[bytes | int] = [b"LTRIM", key.name, 0, 1]
            return writing(key, "LTRIM", parts, replying(None, b"OK"))
        key.alive = True
        version = key.begin()

        def accept(reply: Reply) -> int | Fault:
            if number(reply) < 3:
                return Fault(FaultKind.NIL, f"LPUSH gave length {reply!r}: the list was not there")
            return version

        return writing(key, "LPUSH", [b"LPUSH", key.name, value_of(key.name, version)], accept)


class Sets(Family):
    """A member for each of the last versions, and one that is the key's name."""

    kind, stem, per_slot = "set", b"set", 70

    @staticmethod
    def _newest(key: Key, reply: Reply) -> int | None:
        members = items(reply)
        if not members:
            return None
        if key.name not in members:
            raise ValueError(f"the member that names {key.name.decode()} is missing")
        versions = [version_in(key.name, member) for member in members if member != key.name]
        return max(version for version in versions if version is not None)

    reads = (
        reading("SMEMBERS", lambda key: [b"SMEMBERS", key.name], lambda key, r: Sets._newest(key, r)),
        reading("SISMEMBER", lambda key: [b"SISMEMBER", key.name, key.name], lambda key, r: present(r, 1)),
        reading(
            "SCARD", lambda key: [b"SCARD", key.name], lambda key, r: PRESENT if number(r) >= 2 else None
        ),
    )

    def create(self, key: Key) -> list[bytes]:
        key.members.append(0)
        return [frame([b"SADD", key.name, key.name, value_of(key.name, 0)])]

    def write(self, key: Key) -> Request:
        if len(key.members) > 4:
            old, key.members = key.members[:-1], key.members[-1:]
            parts: list[bytes | int] = [b"SREM", key.name, *[value_of(key.name, version) for version in old]]
            return writing(key, "SREM", parts, replying(None, len(old), absent=0))
        version = key.begin()

        def accept(reply: Reply) -> int | Fault:
            if reply != 1:
                return Fault(FaultKind.WRONG, f"SADD of a new member gave {reply!r}: it ran twice")
            key.members.append(version)
            return version

        return writing(key, "SADD", [b"SADD", key.name, value_of(key.name, version)], accept)


class SortedSets(Family):
    """The key's name has the version as its score."""

    kind, stem, per_slot = "zset", b"zset", 70

    @staticmethod
    def _score(key: Key, reply: Reply) -> int | None:
        flat = items(reply)
        if not flat:
            return None
        if isinstance(flat[0], list):  # RESP3 pairs member and score
            flat = [part for pair in flat for part in items(pair)]
        scores = dict(zip(flat[::2], flat[1::2], strict=True))
        if set(scores) != {key.name, b"fixed"}:
            raise ValueError(f"members {sorted(scores)!r}")  # type: ignore[type-var]
        return int(float(scores[key.name]))  # type: ignore[arg-type]

    reads = (
        reading(
            "ZSCORE",
            lambda key: [b"ZSCORE", key.name, key.name],
            lambda key, r: None if r is None else int(float(r)),  # type: ignore[arg-type]
        ),
        reading(
            "ZRANGE",
            lambda key: [b"ZRANGE", key.name, 0, -1, b"WITHSCORES"],
            lambda key, r: SortedSets._score(key, r),
        ),
        reading(
            "ZRANGEBYSCORE",
            lambda key: [b"ZRANGEBYSCORE", key.name, b"-inf", b"+inf", b"WITHSCORES"],
            lambda key, r: SortedSets._score(key, r),
        ),
        reading("ZCARD", lambda key: [b"ZCARD", key.name], lambda key, r: present(r, 2)),
    )

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"ZADD", key.name, 0, key.name, -1, b"fixed"])]

    def write(self, key: Key) -> Request:
        version = key.begin()
        return writing(key, "ZADD", [b"ZADD", key.name, version, key.name], replying(version, 0, absent=1))


class Streams(Family):
    """Entry VERSION-1 holds the version's value."""

    kind, stem, per_slot = "stream", b"stream", 50

    @staticmethod
    def _entry(key: Key, reply: Reply, which: int) -> int | None:
        entries = items(reply)
        if not entries:
            return None
        entry_id, fields = items(entries[which])
        version = version_in(key.name, items(fields)[1])
        if version is None or entry_id != b"%d-1" % version:
            raise ValueError(f"entry {entry_id!r} holds version {version}")
        return version

    reads = (
        reading(
            "XREVRANGE",
            lambda key: [b"XREVRANGE", key.name, b"+", b"-", b"COUNT", 1],
            lambda key, r: Streams._entry(key, r, 0),
        ),
        reading(
            "XRANGE", lambda key: [b"XRANGE", key.name, b"-", b"+"], lambda key, r: Streams._entry(key, r, -1)
        ),
        reading("XLEN", lambda key: [b"XLEN", key.name], lambda key, r: PRESENT if number(r) > 0 else None),
    )

    def _add(self, key: Key, version: int) -> list[bytes | int]:
        return [
            b"XADD", key.name, b"MAXLEN", STREAM_LENGTH, b"%d-1" % version, b"v", value_of(key.name, version),
        ]  # fmt: skip

    def create(self, key: Key) -> list[bytes]:
        return [frame(self._add(key, 0))]

    def write(self, key: Key) -> Request:
        version = key.begin()
        return writing(key, "XADD", self._add(key, version), replying(version, b"%d-1" % version))


class Bitmaps(Family):
    """Three 32-bit words: the version, the key's index plus one, and a word of ones."""

    stem, per_slot = b"bitmap", 40

    @staticmethod
    def _words(key: Key, reply: Reply) -> int | None:
        version, index = items(reply)
        if index == 0:
            return None
        if index != key.index + 1:
            raise ValueError(f"bitmap of key number {index!r}")
        return number(version)

    reads = (
        reading(
            "BITFIELD GET",
            lambda key: [b"BITFIELD", key.name, b"GET", b"u32", b"#0", b"GET", b"u32", b"#1"],
            lambda key, r: Bitmaps._words(key, r),
        ),
        reading(
            "BITFIELD_RO",
            lambda key: [b"BITFIELD_RO", key.name, b"GET", b"u32", b"#0", b"GET", b"u32", b"#1"],
            lambda key, r: Bitmaps._words(key, r),
        ),
        reading("BITCOUNT", lambda key: [b"BITCOUNT", key.name, 8, 11], lambda key, r: present(r, 32)),
        reading("GETBIT", lambda key: [b"GETBIT", key.name, 64], lambda key, r: present(r, 1)),
        reading(
            "BITPOS",
            lambda key: [b"BITPOS", key.name, 1, 8],
            lambda key, r: None if r == -1 else present(r, 64),
        ),
    )

    def create(self, key: Key) -> list[bytes]:
        words = [0, key.index + 1, 2**32 - 1]
        return [frame([b"SET", key.name, b"".join([word.to_bytes(4, "big") for word in words])])]

    def write(self, key: Key) -> Request:
        if key.issued % 4 == 3 and key.alive:
            key.alive = False  # set a bit that is set, then go on
            return writing(key, "SETBIT", [b"SETBIT", key.name, 64, 1], replying(None, 1, absent=0))
        key.alive = True
        before = key.acked
        version = key.begin()

        def accept(reply: Reply) -> int | Fault:
            [old, index] = items(reply)
            if index == 0:
                return Fault(FaultKind.NIL, "BITFIELD SET found no bitmap")
            if not before <= number(old) < version or index != key.index + 1:
                return Fault(
                    FaultKind.WRONG, f"BITFIELD SET of {version} found {old!r}, key number {index!r}"
                )
            return version

        parts: list[bytes | int] = [
            b"BITFIELD", key.name, b"SET", b"u32", b"#0", version, b"GET", b"u32", b"#1",
        ]  # fmt: skip
        return writing(key, "BITFIELD SET", parts, accept)


class HyperLogLogs(Family):
    """An element for each version; the count is an estimate, so its check leaves room."""

    stem, per_slot = b"hyperloglog", 30
    ROOM = 0.1  # twelve times the standard error of 0.81 %
    ROOM_COUNT = 2

    @staticmethod
    def _estimate(key: Key, reply: Reply) -> int | None:
        count = number(reply)
        if count == 0:
            return None
        if count > (key.issued + 1) * (1 + HyperLogLogs.ROOM) + HyperLogLogs.ROOM_COUNT:
            raise ValueError(f"counts {count}, only {key.issued + 1} were added")
        # The most versions that the estimate allows, so that only what is certainly too old is called stale.
        return min(key.issued, int(count * (1 + HyperLogLogs.ROOM)) + HyperLogLogs.ROOM_COUNT)

    reads = (
        reading("PFCOUNT", lambda key: [b"PFCOUNT", key.name], lambda key, r: HyperLogLogs._estimate(key, r)),
    )

    def create(self, key: Key) -> list[bytes]:
        return [frame([b"PFADD", key.name, value_of(key.name, 0)])]

    def write(self, key: Key) -> Request:
        version = key.begin()

        def accept(reply: Reply) -> int | Fault:
            if reply not in (0, 1):
                return Fault(FaultKind.WRONG, f"PFADD gave {reply!r}")
            return key.acked + 1  # how many were added, which a refused write is not

        return writing(key, "PFADD", [b"PFADD", key.name, value_of(key.name, version)], accept)


class Places(Family):
    """A member named like its key, each version a step further east."""

    kind, stem, per_slot = "zset", b"place", 20
    STEP_DEGREES = 0.001

    @staticmethod
    def _position(key: Key, reply: Reply) -> int | None:
        [position] = items(reply)
        if position is None:
            return None
        longitude, latitude = items(position)
        if abs(float(latitude) - key.index % 60) > Places.STEP_DEGREES / 2:  # type: ignore[arg-type]
            raise ValueError(f"latitude {latitude!r}, must be {key.index % 60}")
        return round(float(longitude) / Places.STEP_DEGREES)  # type: ignore[arg-type]

    reads = (
        reading(
            "GEOPOS", lambda key: [b"GEOPOS", key.name, key.name], lambda key, r: Places._position(key, r)
        ),
        reading(
            "GEOSEARCH",
            lambda key: [b"GEOSEARCH", key.name, b"FROMMEMBER", key.name, b"BYRADIUS", 1, b"m"],
            lambda key, r: present(r, [key.name]),
        ),
        reading(
            "GEODIST",
            lambda key: [b"GEODIST", key.name, key.name, key.name],
            lambda key, r: present(r, b"0.0000"),
        ),
    )

    def _add(self, key: Key, version: int) -> list[bytes | int]:
        return [b"GEOADD", key.name, b"%.3f" % (version * self.STEP_DEGREES), key.index % 60, key.name]

    def create(self, key: Key) -> list[bytes]:
        return [frame(self._add(key, 0))]

    def write(self, key: Key) -> Request:
        version = key.begin()
        return writing(key, "GEOADD", self._add(key, version), replying(version, 0, absent=1))


class Pairs(Family):
    """Two strings in one slot that are always written together: a read of both must show one version."""

    stem, per_slot = b"pair", 40  # 20 pairs
    READ_SCRIPT = b"return {redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])}"
    WRITE_SCRIPT = (
        b"local old = redis.call('GET', KEYS[1]);"
        b"redis.call('SET', KEYS[1], ARGV[1]); redis.call('SET', KEYS[2], ARGV[2]); return old"
    )

    @staticmethod
    def names(key: Key) -> tuple[bytes, bytes]:
        return key.name, key.name + b":twin"

    @staticmethod
    def _both(key: Key, reply: Reply) -> int | None:
        first, second = [
            version_in(name, value) for name, value in zip(Pairs.names(key), items(reply), strict=True)
        ]
        if first is None or second is None:
            return None
        if first != second:
            raise ValueError(f"torn: versions {first} and {second} in one step")
        return first

    @staticmethod
    def _read_in_transaction(key: Key, client: int) -> Request:
        floor = key.acked
        first, second = Pairs.names(key)
        payload = [frame([b"MULTI"]), frame([b"GET", first]), frame([b"GET", second]), frame([b"EXEC"])]

        def check(replies: list[Reply]) -> list[Fault]:
            if replies[:3] != [b"OK", b"QUEUED", b"QUEUED"]:
                return [Fault(FaultKind.WRONG, f"MULTI: {replies!r}"[:200])]
            least = key.acked if key.owner == client else floor
            return judged(key, least, lambda reply: Pairs._both(key, reply), replies[3])

        return Request("EXEC read", b"".join(payload), check, reply_count=4)

    reads = (
        _GET,
        reading(
            "GET twin",
            lambda key: [b"GET", Pairs.names(key)[1]],
            lambda key, r: version_in(Pairs.names(key)[1], r),
        ),
        reading(
            "EVAL read",
            lambda key: [b"EVAL", Pairs.READ_SCRIPT, 2, *Pairs.names(key)],
            lambda key, r: Pairs._both(key, r),
        ),
        ("EXEC read", lambda key, client: Pairs._read_in_transaction(key, client)),
    )

    def create(self, key: Key) -> list[bytes]:
        first, second = self.names(key)
        return [frame([b"MSET", first, value_of(first, 0), second, value_of(second, 0)])]

    def write(self, key: Key) -> Request:
        floor = key.acked
        version = key.begin()
        first, second = self.names(key)
        values = value_of(first, version), value_of(second, version)
        if version % 2:

            def accept(reply: Reply) -> int | Fault:
                faults = judge(key, floor, version_in(first, reply))
                return faults[0] if faults else version

            return writing(key, "EVAL write", [b"EVAL", self.WRITE_SCRIPT, 2, first, second, *values], accept)

        def check(replies: list[Reply]) -> list[Fault]:
            if replies != [b"OK", b"QUEUED", b"QUEUED", [b"OK", b"OK"]]:
                return [Fault(FaultKind.WRONG, f"MULTI: {replies!r}"[:200])]
            key.acked = version
            return []

        payload = [
            frame([b"MULTI"]),
            frame([b"SET", first, values[0]]),
            frame([b"SET", second, values[1]]),
            frame([b"EXEC"]),
        ]
        return Request("EXEC write", b"".join(payload), check, reply_count=4, writes=(key,))


FAMILIES: tuple[Family, ...] = (
    Strings(),
    Lasting(),
    Churned(),
    Counters(),
    Hashes(),
    Lists(),
    Sets(),
    SortedSets(),
    Streams(),
    Bitmaps(),
    HyperLogLogs(),
    Places(),
    Pairs(),
)


def tag_of(slot: int) -> bytes:
    """A short hash tag that falls in ``slot``."""
    number = 0
    while slot_of(b"%d" % number) != slot:
        number += 1
    return b"%d" % number


class Keys:
    """All keys of a run, and the requests that a client may choose next."""

    def __init__(self, slots: Sequence[int], keys_per_slot: int, owners: int) -> None:
        self.slots = tuple(slots)
        self.all: list[Key] = []
        self.unsupported: set[str] = set()  # labels of requests that the target knows nothing of
        self.recent: deque[Key] = deque(maxlen=RECENT_KEYS)
        self.by_owner: list[list[Key]] = [[] for _ in range(owners)]
        for slot in slots:
            tag = tag_of(slot)
            for family in FAMILIES:
                count = max(1, round(family.per_slot * keys_per_slot / 1000))
                for index in range(count // 2 or 1 if isinstance(family, Pairs) else count):
                    name = b"%b:{%b}:%d" % (family.stem, tag, index)
                    number = len(self.all)
                    self.all.append(Key(family, name, slot, number, number % owners))
        self.index()

    def index(self) -> None:
        """Sort the keys by owner and by use; again after keys were taken out."""
        for owned in self.by_owner:
            owned.clear()
        for key in self.all:
            self.by_owner[key.owner].append(key)
        self.readable_together = [
            key for key in self.all if isinstance(key.family, Strings | Lasting | Churned | Pairs)
        ]  # keys whose MGET carries their version
        self.of_slot: dict[int, list[Key]] = {}
        for key in self.readable_together:
            self.of_slot.setdefault(key.slot, []).append(key)

    @property
    def count(self) -> int:
        return sum(2 if isinstance(key.family, Pairs) else 1 for key in self.all)

    @property
    def steady_names(self) -> set[bytes]:
        """The names that a full SCAN must show."""
        names = {key.name for key in self.all if not key.family.has_gaps}
        return names | {Pairs.names(key)[1] for key in self.all if isinstance(key.family, Pairs)}

    def read(self, client: int, rng: random.Random) -> Request:
        while True:
            key = rng.choice(self.recent) if self.recent and rng.random() < 0.3 else rng.choice(self.all)
            reads = COMMON_READS if rng.random() < 0.15 else key.family.reads
            label, build = rng.choice(reads)
            if label not in self.unsupported:
                return build(key, client)

    def write(self, client: int, rng: random.Random) -> Request | None:
        """A write of a key that ``client`` owns; None when none of a few draws can be written."""
        for _ in range(10):
            key = rng.choice(self.by_owner[client])
            if key.is_certain:
                self.recent.append(key)
                return key.family.write(key)
        return None

    def read_many(self, client: int, rng: random.Random) -> Request | None:
        """MGET, EXISTS or TOUCH of several keys in one slot or over several; None if the target lacks it."""
        among = self.of_slot[rng.choice(self.slots)] if rng.random() < 0.5 else self.readable_together
        keys = rng.sample(among, min(MANY_KEYS, len(among)))
        command = rng.choice(["MGET", "MGET", "MGET", rng.choice(["EXISTS", "TOUCH"])])
        if command != "MGET":  # a count can only be checked for keys that are never deleted
            keys = [key for key in keys if not key.family.has_gaps]
        label = f"{command} {where(keys)}"
        if not keys or label in self.unsupported:
            return None
        if command == "MGET":
            return self._mget(label, keys, client)
        return Request(label, frame([command.encode(), *[key.name for key in keys]]), counting(label, keys))

    def write_many(self, client: int, rng: random.Random) -> Request | None:
        """MSET of the client's strings, or DEL of its churned keys, in one slot or over several.

        None if the target lacks it, or the client has none that it could write.
        """
        command, kind = rng.choice([("MSET", Strings), ("MSET", Strings), ("DEL", Churned)])
        own = [key for key in self.by_owner[client] if isinstance(key.family, kind) and key.is_certain]
        if command == "DEL":
            own = [key for key in own if key.alive]
        if own and rng.random() < 0.4:
            slot = rng.choice(own).slot
            own = [key for key in own if key.slot == slot]
        keys = rng.sample(own, min(MANY_KEYS // 2, len(own)))
        label = f"{command} {where(keys)}"
        if not keys or label in self.unsupported:
            return None
        self.recent.extend(keys)
        return self._mset(label, keys) if command == "MSET" else self._delete(label, keys)

    @staticmethod
    def _mget(label: str, keys: list[Key], client: int) -> Request:
        floors = [key.acked for key in keys]

        def check(replies: list[Reply]) -> list[Fault]:
            values = replies[0]
            if not isinstance(values, list) or len(values) != len(keys):
                return [Fault(FaultKind.WRONG, f"MGET of {len(keys)} keys: {values!r}"[:200])]
            faults: list[Fault] = []
            for key, floor, value in zip(keys, floors, values, strict=True):
                least = key.acked if key.owner == client else floor
                faults += judged(key, least, partial(version_in, key.name), value)
            return faults

        return Request(label, frame([b"MGET", *[key.name for key in keys]]), check)

    @staticmethod
    def _mset(label: str, keys: list[Key]) -> Request:
        parts: list[bytes | int] = [b"MSET"]
        for key in keys:
            parts += [key.name, value_of(key.name, key.begin())]
        versions = [key.issued for key in keys]

        def check(replies: list[Reply]) -> list[Fault]:
            if replies[0] != b"OK":
                return [Fault(FaultKind.WRONG, f"{label} gave {replies[0]!r}")]
            for key, version in zip(keys, versions, strict=True):
                key.acked = version
            return []

        return Request(label, frame(parts), check, writes=tuple(keys))

    @staticmethod
    def _delete(label: str, keys: list[Key]) -> Request:
        for key in keys:
            key.alive = False
            key.issued += 1 + key.issued % 2
        versions = [key.issued for key in keys]
        is_complete = counting(label, keys)

        def check(replies: list[Reply]) -> list[Fault]:
            for key, version in zip(keys, versions, strict=True):
                key.acked = version
            return is_complete(replies)

        return Request(label, frame([b"DEL", *[key.name for key in keys]]), check, writes=tuple(keys))


def where(keys: Sequence[Key]) -> str:
    return "in one slot" if len({key.slot for key in keys}) == 1 else "over slots"


def counting(label: str, keys: Sequence[Key]) -> Callable[[list[Reply]], list[Fault]]:
    """A check that the reply counts all keys; fewer means that some were not found."""

    def check(replies: list[Reply]) -> list[Fault]:
        counted = replies[0]
        if counted == len(keys):
            return []
        is_short = isinstance(counted, int) and 0 <= counted < len(keys)
        kind = FaultKind.NIL if is_short else FaultKind.WRONG
        return [Fault(kind, f"{label}: {counted!r} of {len(keys)}")]

    return check
