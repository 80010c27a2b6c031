"""What a reply may be at each consistency level. Pure: no I/O, no clock; times are nanoseconds on one monotonic clock.

Every key exists before the first read and is never deleted. One writer at a time writes it, and waits for the reply of
each write before it sends the next one of that key; each write is a new *version*, one higher. A value names its key,
its version and when its writer sent it. So at any moment it is known of each key

    sent            the highest version that was handed to a connection: no reply may show a later one
    acknowledged    the highest version whose write was answered, and when each was

A time of acknowledgement is taken when the reply was *read*, so it is never before the write took effect, and the time
of a read is taken *before* it is sent: what is called too old here was too old.
A write without a clear answer may take effect at any later time. Its key is *uncertain* from then on and not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from routing.slot import slot_of
from tests.live.campaign.keys import tag_of

VALUE_BYTES = 100
NS_PER_MS = 1_000_000


class Fault(Enum):
    NIL = "nil"  # a key that exists was answered as if it did not
    STALE = "stale"  # older than what was acknowledged before the read was sent, where the level forbids it
    OVER_BOUND = "over bound"  # superseded for longer than the bound when the read was sent
    OWN_MISSED = "own missed"  # older than what this session itself had written
    WENT_BACK = "went back"  # older than what this session had read
    WRONG = "wrong"  # no value of this key, or one that nobody has sent yet
    ERROR = "error"  # an error reply, a lost connection, or none within the deadline


@dataclass(slots=True, eq=False)
class Key:
    """One key and all that is known of its versions. Version 0 was acknowledged before the first read."""

    name: bytes
    acknowledged_at: list[int] = field(default_factory=lambda: [0])  # version -> when its reply was read
    sent: int = 0
    is_certain: bool = True

    @property
    def slot(self) -> int:
        return slot_of(self.name)

    @property
    def acknowledged(self) -> int:
        """The newest acknowledged version."""
        return len(self.acknowledged_at) - 1

    def begin_write(self, now: int) -> bytes:
        """The next version's value, sent from now on."""
        self.sent += 1
        return value_of(self, self.sent, now)

    def acknowledge(self, now: int) -> None:
        """The version that was sent last is written."""
        assert self.sent == len(self.acknowledged_at), "two writes of one key at a time"
        self.acknowledged_at.append(now)

    def superseded_at(self, version: int) -> int | None:
        """When the successor of ``version`` was acknowledged; None while it was not."""
        return self.acknowledged_at[version + 1] if version < self.acknowledged else None


def keys_in(slots: Sequence[int], keys_per_slot: int) -> list[Key]:
    """So many keys in each slot, one slot after another."""
    tags = [tag_of(slot) for slot in slots]
    return [Key(b"level:{%b}:%d" % (tag, index)) for tag in tags for index in range(keys_per_slot)]


def value_of(key: Key, version: int, now: int) -> bytes:
    return (b"%b=%d=%d=" % (key.name, version, now)).ljust(VALUE_BYTES, b".")


def version_in(key: Key, value: object) -> int | None:
    """The version that a value of this key shows; None when it is none that has been sent."""
    if not isinstance(value, bytes):
        return None
    name, *numbers, _ = value.split(b"=") if value.count(b"=") == 3 else (b"", b"")
    if name != key.name or not all(number.isdigit() for number in numbers):
        return None
    version = int(numbers[0])
    return version if version <= key.sent else None


@dataclass(frozen=True, slots=True)
class Question:
    """A read, with what was known when it was sent."""

    key: Key
    sent_at: int
    acknowledged: int  # the newest version acknowledged by then

    @classmethod
    def of(cls, key: Key, now: int) -> Question:
        return cls(key, now, key.acknowledged)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a reply was worth. Ages: for how long its version had been superseded, 0 for the newest one."""

    fault: Fault | None
    words: str = ""
    age_when_sent: int = 0
    age_when_answered: int = 0


class Promise(Protocol):
    """What a level forbids a version that is one of its key's."""

    def broken_by(self, question: Question, version: int) -> Fault | None: ...


@dataclass(frozen=True, slots=True)
class Newest:
    """`strong` and `caught_up`: nothing older than what was acknowledged before the read was sent."""

    def broken_by(self, question: Question, version: int) -> Fault | None:
        return Fault.STALE if version < question.acknowledged else None


@dataclass(frozen=True, slots=True)
class Bounded:
    """`bounded_staleness`: nothing that was superseded more than ``bound`` before the read was sent."""

    bound: int

    def broken_by(self, question: Question, version: int) -> Fault | None:
        return Fault.OVER_BOUND if _age(question.key, version, question.sent_at) > self.bound else None


@dataclass(frozen=True, slots=True)
class Session:
    """`session`: nothing older than what its client wrote or read before. One client's, over all its connections.

    Replies are judged in the order in which they came, so a read pipelined behind a write must show that write.
    """

    written: dict[Key, int] = field(default_factory=dict)  # key -> newest version acknowledged to this client
    seen: dict[Key, int] = field(default_factory=dict)  # key -> newest version it has read

    def broken_by(self, question: Question, version: int) -> Fault | None:
        key = question.key
        fault = None
        if version < self.seen.get(key, 0):
            fault = Fault.WENT_BACK
        if version < self.written.get(key, 0):
            fault = Fault.OWN_MISSED
        self.seen[key] = max(version, self.seen.get(key, 0))
        return fault

    def wrote(self, key: Key) -> None:
        """The newest acknowledged version is this client's."""
        self.written[key] = key.acknowledged


@dataclass(frozen=True, slots=True)
class Existing:
    """`eventual`: any version, but never nil for a key that exists."""

    def broken_by(self, question: Question, version: int) -> Fault | None:
        return None


def judge(question: Question, value: object, promise: Promise, answered_at: int) -> Judgement:
    """A reply that came at ``answered_at`` and is not an error. Call it for each reply in the order they came."""
    key = question.key
    what = f"GET {key.name.decode()}"
    if value is None:
        return Judgement(Fault.NIL, f"{what}: nil, but it exists")
    version = version_in(key, value)
    if version is None:
        return Judgement(Fault.WRONG, f"{what}: sent up to version {key.sent}, got {str(value)[:60]}")
    when_sent = _age(key, version, question.sent_at)
    fault = promise.broken_by(question, version)
    words = ""
    if fault is not None:
        words = (
            f"{what}: version {version}, superseded {when_sent / NS_PER_MS:.1f} ms before the read was sent;"
            f" {question.acknowledged} was acknowledged then"
        )
    return Judgement(fault, words, when_sent, _age(key, version, answered_at))


def _age(key: Key, version: int, now: int) -> int:
    """For how long ``version`` had been superseded at ``now``."""
    superseded_at = key.superseded_at(version)
    return 0 if superseded_at is None else max(0, now - superseded_at)


def shares(keys: Sequence[Key], writers: int) -> Iterator[list[Key]]:
    """Each writer's own keys, of every slot when a slot has as many keys as there are writers."""
    return (list(keys[number::writers]) for number in range(writers))
