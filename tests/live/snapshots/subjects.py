"""What is written, and what each snapshot must show of it: keys with versions, chains of causes, banks and queues.

A subject is the state that its writers know. The moment before OPEN is sent it makes an expectation, which knows what
was acknowledged by then; when OPEN has returned, the expectation learns what had been sent by then.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Protocol

from tests.live.campaign.keys import (
    COMMON_READS,
    FaultKind,
    HyperLogLogs,
    Key,
    Pairs,
    Request,
    counting,
    items,
    judged,
    tag_of,
    version_in,
)
from tests.live.campaign.keys import Fault as KeyFault
from tests.live.campaign.resp import Reply, frame
from tests.live.snapshots.checks import Check, Expectation, Fault, Judge, Read, Verdict
from tests.live.snapshots.families import Keys, Parts, Renamed, names_at

GROUPS = 12  # of keys that are read together over slots
GROUP_KEYS = 8
CHAIN_LINKS = 3
ACCOUNTS_PER_SLOT = 4
BALANCE = 1000
# At a snapshot refused, because the engines count them among the writes; or they go with the clock.
NOT_AT_SNAPSHOTS = ("EVAL read", "BITFIELD GET")
CLOCK_BOUND = ("TTL",)
EVAL_RO_SCRIPT = b"return {redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])}"


class Subject(Protocol):
    def create(self) -> list[bytes]:
        """The commands that make it."""

    def expect(self) -> Expectation:
        """What a snapshot that is opened now must show."""


# --- keys with versions ---


class VersionedKeys:
    def __init__(self, keys: Keys, *, has_eval_ro: bool, seed: int) -> None:
        self.keys = keys
        self.has_eval_ro = has_eval_ro
        rng = random.Random(seed)
        together = keys.readable_together
        lasting = [key for key in keys.all if not key.family.has_gaps and not isinstance(key.family, Renamed)]
        # The same groups for every snapshot, so that each is read more than once. By place in ``keys.all``.
        self.mget_groups = [_drawn(rng, together) for _ in range(GROUPS)]
        self.exists_groups = [_drawn(rng, lasting) for _ in range(GROUPS // 2)]

    def create(self) -> list[bytes]:
        return [payload for key in self.keys.all for payload in key.family.create(key)]

    def expect(self) -> KeysExpectation:
        return KeysExpectation(self)


def _drawn(rng: random.Random, keys: Sequence[Key]) -> list[int]:
    return [key.index for key in rng.sample(keys, min(GROUP_KEYS, len(keys)))]


class KeysExpectation:
    """Each key as it was before OPEN was sent (`acked`) and when it had returned (`issued`)."""

    def __init__(self, subject: VersionedKeys) -> None:
        self._subject = subject
        self._live = subject.keys.all
        self._then = [replace(key) for key in self._live]

    def on_opened(self) -> None:
        for then, live in zip(self._then, self._live, strict=True):
            then.issued = live.issued

    def reads(self) -> list[Read]:
        reads: list[Read] = []
        for then, live in zip(self._then, self._live, strict=True):
            labels: set[str] = set()
            # Of what is renamed, one name alone may be there or not.
            common = () if isinstance(then.family, Renamed) else COMMON_READS
            for label, build in (*then.family.reads, *common):
                if label not in labels and label not in NOT_AT_SNAPSHOTS:
                    labels.add(label)
                    reads.append(_read_of(build(then, -1), then, live))
            reads += [
                Read(label, frame(parts), 1, is_dumpable=not label.endswith("SCAN"))
                for label, parts in _further(then)
            ]
            if isinstance(then.family, Pairs) and self._subject.has_eval_ro:
                parts: Parts = [b"EVAL_RO", EVAL_RO_SCRIPT, 2, *Pairs.names(then)]
                request = Request("EVAL_RO", frame(parts), partial(_check_pair, then, then.acked))
                reads.append(_read_of(request, then, live))
        for group in self._subject.mget_groups:
            reads.append(self._mget(group))
        for group in self._subject.exists_groups:
            keys = [self._then[index] for index in group]
            payload = frame([b"EXISTS", *[key.name for key in keys]])
            label = "EXISTS over slots"
            reads.append(Read(label, payload, 1, _as_judge(counting(label, keys))))
        gapped = [key.name for key in self._then if key.family.has_gaps]
        for start in range(0, len(gapped), GROUP_KEYS):
            # How many there are is not known, but that it must not change.
            reads.append(Read("EXISTS gaps", frame([b"EXISTS", *gapped[start : start + GROUP_KEYS]]), 1))
        return reads

    def names(self) -> tuple[set[bytes], set[bytes]]:
        must: set[bytes] = set()
        may: set[bytes] = set()
        for key in self._then:
            possible = [set(names_at(key, version)) for version in range(key.acked, key.issued + 1)]
            must |= set.intersection(*possible)
            may |= set.union(*possible)
        return must, may

    def _mget(self, group: Sequence[int]) -> Read:
        then, live = [self._then[i] for i in group], [self._live[i] for i in group]
        payload = frame([b"MGET", *[key.name for key in then]])

        def judge(replies: list[Reply]) -> Verdict | None:
            for old, new, value in zip(then, live, items(replies[0]), strict=True):

                def check(_: list[Reply], old: Key = old, value: Reply = value) -> list[KeyFault]:
                    return judged(old, old.acked, partial(version_in, old.name), value)

                if verdict := _judge(old, new, Request("MGET", b"", check), []):
                    return verdict
            return None

        return Read("MGET over slots", payload, 1, judge)


def _further(key: Key) -> list[tuple[str, Parts]]:
    """Reads of which only is known that they must not change, and what a dump says: label, command."""
    name, family = key.name, key.family
    match family.kind:
        case "hash":
            commands: list[Parts] = [[b"HKEYS", name], [b"HVALS", name], [b"HSCAN", name, 0]]
        case "set":
            commands = [[b"SUNION", name, name], [b"SSCAN", name, 0]]
        case "list":
            commands = [[b"LRANGE", name, -2, -1]]
        case "stream":
            commands = [[b"XREVRANGE", name, b"+", b"-"]]
        case "zset":
            commands = [[b"ZREVRANGE", name, 0, -1, b"WITHSCORES"], [b"ZSCAN", name, 0]]
        case _:
            commands = [[b"PFCOUNT", name]] if family.stem == b"reborn-" + HyperLogLogs.stem else []
    return [(str(parts[0], "ascii"), parts) for parts in commands]  # type: ignore[arg-type]


def _read_of(request: Request, then: Key, live: Key) -> Read:
    return Read(
        request.label,
        request.payload,
        request.reply_count,
        partial(_judge, then, live, request),
        is_repeatable=request.label not in CLOCK_BOUND,
        is_dumpable=request.label not in CLOCK_BOUND,
    )


def _judge(then: Key, live: Key, request: Request, replies: list[Reply]) -> Verdict | None:
    faults = request.check(replies)
    if not faults:
        return None
    kind, words = faults[0]
    issued_then, then.issued = then.issued, live.issued
    is_of_later = not request.check(replies)
    then.issued = issued_then
    if "torn" in words:
        return Verdict(Fault.TORN, words)
    if is_of_later:
        return Verdict(Fault.NEWER, words)
    return Verdict(Fault.WRONG if kind is FaultKind.WRONG else Fault.OLDER, words)


def _check_pair(key: Key, floor: int, replies: list[Reply]) -> list[KeyFault]:
    return judged(key, floor, lambda reply: Pairs._both(key, reply), replies[0])


def _as_judge(check: Callable[[list[Reply]], list[KeyFault]]) -> Judge:
    def judge(replies: list[Reply]) -> Verdict | None:
        faults = check(replies)
        return Verdict(Fault.OLDER, faults[0].detail) if faults else None

    return judge


# --- what belongs together ---


def _each(label: str, steps: Sequence[bytes], judge: Judge | None, check: Check) -> Read:
    """One read after the other, with other clients' writes in between."""
    return Read(label, b"".join(steps), len(steps), judge, check, steps=tuple(steps))


class Numbers(ABC):
    """Numbers that only grow, each in a key of its own; one task writes all of them."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.names = tuple(names)
        self.acked = [0] * len(names)
        self.issued = [0] * len(names)
        self.is_certain = True

    def create(self) -> list[bytes]:
        return [frame([b"SET", name, 0]) for name in self.names]

    def expect(self) -> NumbersExpectation:
        return NumbersExpectation(self)

    @abstractmethod
    def together(self, numbers: Sequence[int]) -> Verdict | None:
        """What is wrong with these, that were read of one snapshot."""


class NumbersExpectation:
    def __init__(self, subject: Numbers) -> None:
        self._subject = subject
        self._acked = list(subject.acked)
        self._issued = list(subject.issued)

    def on_opened(self) -> None:
        self._issued = list(self._subject.issued)

    def reads(self) -> list[Read]:
        """One after the other, causes first and effects first, and all in one command."""
        names = self._subject.names
        backwards = names[::-1]
        gets = [[frame([b"GET", name]) for name in order] for order in (names, backwards)]
        return [
            _each("GET each", gets[0], self._judge, Check.CHAINS),
            _each("GET each", gets[1], lambda r: self._judge(r[::-1]), Check.CHAINS),
            Read("MGET", frame([b"MGET", *names]), 1, lambda r: self._judge(items(r[0])), Check.CHAINS),
            Read(
                "MGET",
                frame([b"MGET", *backwards]),
                1,
                lambda r: self._judge(items(r[0])[::-1]),
                Check.CHAINS,
            ),
        ]

    def names(self) -> tuple[set[bytes], set[bytes]]:
        return set(self._subject.names), set(self._subject.names)

    def _judge(self, replies: Sequence[Reply]) -> Verdict | None:
        numbers = []
        for name, reply in zip(self._subject.names, replies, strict=True):
            if reply is None:
                return Verdict(Fault.OLDER, f"{name.decode()} is nil")
            if not isinstance(reply, bytes) or not reply.isdigit():
                return Verdict(Fault.WRONG, f"{name.decode()} is {reply!r}")
            numbers.append(int(reply))
        if verdict := self._subject.together(numbers):
            return verdict
        for name, number, low, high in zip(
            self._subject.names, numbers, self._acked, self._issued, strict=True
        ):
            if number < low:
                return Verdict(Fault.OLDER, f"{name.decode()} is {number}, {low} was acknowledged")
            if number > high:
                return Verdict(Fault.NEWER, f"{name.decode()} is {number}, only {high} was sent")
        return None


class Chain(Numbers):
    """Each number is written on another shard, and only once the one before it was acknowledged."""

    def __init__(self, slots: Sequence[int], index: int) -> None:
        super().__init__([b"chain:{%b}:%d" % (tag_of(slot), index) for slot in slots])

    def together(self, numbers: Sequence[int]) -> Verdict | None:
        is_causal = all(cause >= effect for cause, effect in pairwise(numbers))
        # The first link's next number is sent once the last link has this one.
        if is_causal and numbers[0] <= numbers[-1] + 1:
            return None
        return Verdict(Fault.UNCAUSED, f"links are {numbers}")


class Bank:
    """Accounts whose total never changes. Reads give the total; what each account has is nobody's to know."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.names = tuple(names)
        self.is_certain = True

    @property
    def total(self) -> int:
        return BALANCE * len(self.names)

    def create(self) -> list[bytes]:
        return [frame([b"SET", name, BALANCE]) for name in self.names]

    def expect(self) -> BankExpectation:
        return BankExpectation(self)


class BankExpectation:
    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._is_certain = bank.is_certain

    def on_opened(self) -> None:
        # A transfer of unknown outcome may be half done, and of that the snapshot shows what there was.
        self._is_certain = self._is_certain and self._bank.is_certain

    def reads(self) -> list[Read]:
        names = self._bank.names
        gets = [frame([b"GET", name]) for name in names]
        judge = self._judge if self._is_certain else None
        return [
            Read("MGET", frame([b"MGET", *names]), 1, judge and (lambda r: judge(items(r[0]))), Check.TOTALS),
            _each("GET each", gets, judge, Check.TOTALS),
        ]

    def names(self) -> tuple[set[bytes], set[bytes]]:
        return set(self._bank.names), set(self._bank.names)

    def _judge(self, replies: Sequence[Reply]) -> Verdict | None:
        balances = [int(reply) for reply in replies if isinstance(reply, bytes)]
        if len(balances) < len(self._bank.names):
            return Verdict(Fault.OLDER, f"only {len(balances)} of {len(self._bank.names)} accounts are there")
        if sum(balances) == self._bank.total:
            return None
        return Verdict(Fault.TORN, f"the total is {sum(balances)}, must be {self._bank.total}: {balances}")


class Tills(Bank):
    """Some accounts in each slot; money moves within one slot, by MULTI or by a script."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.by_slot = [[b"till:{%b}:%d" % (tag_of(s), i) for i in range(ACCOUNTS_PER_SLOT)] for s in slots]
        super().__init__([name for names in self.by_slot for name in names])


class Shares(Bank):
    """One account in each slot; money moves from slot to slot by MSET. One task writes all of them."""

    def __init__(self, slots: Sequence[int], index: int) -> None:
        super().__init__([b"share:{%b}:%d" % (tag_of(slot), index) for slot in slots])
        self.balances = [BALANCE] * len(self.names)


class Queue:
    """Numbers pushed in order, and taken in order by somebody who waits for them.

    With a ``second`` list they are moved there in one step (BLMOVE), else they are popped (BLPOP).
    """

    def __init__(self, slot: int, index: int, *, has_second: bool) -> None:
        stem = b"moving" if has_second else b"popped"
        self.name = b"%b:{%b}:%d" % (stem, tag_of(slot), index)
        self.second = self.name + b":done" if has_second else None
        self.pushed_acked = self.pushed_issued = 0
        self.taken_acked = 0
        self.is_certain = True

    def create(self) -> list[bytes]:
        return []

    def element(self, number: int) -> bytes:
        return b"%b=%d;" % (self.name, number)

    def expect(self) -> QueueExpectation:
        return QueueExpectation(self)


class QueueExpectation:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._pushed_acked = queue.pushed_acked
        self._pushed_issued = queue.pushed_issued
        self._taken_acked = queue.taken_acked
        self._taken_issued = 0

    def on_opened(self) -> None:
        queue = self._queue
        self._pushed_issued = queue.pushed_issued
        # One taker waits at a time, and what it takes it may not have been told yet.
        self._taken_issued = min(queue.taken_acked + 1, queue.pushed_issued)

    def reads(self) -> list[Read]:
        queue = self._queue
        lists = [queue.name] if queue.second is None else [queue.second, queue.name]
        return [
            _each(
                "LRANGE queue", [frame([b"LRANGE", name, 0, -1]) for name in lists], self._judge, Check.TOTALS
            )
        ]

    def names(self) -> tuple[set[bytes], set[bytes]]:
        """A list that is empty is not there."""
        queue = self._queue
        return set(), {queue.name, queue.second or queue.name}

    def _judge(self, replies: list[Reply]) -> Verdict | None:
        prefix = self._queue.name + b"="
        numbers = []
        for element in [part for reply in replies for part in items(reply)]:
            if not isinstance(element, bytes) or not element.startswith(prefix):
                return Verdict(Fault.WRONG, f"element {element!r}")
            numbers.append(int(element[len(prefix) : -1]))
        if numbers and numbers != list(range(numbers[0], numbers[-1] + 1)):
            return Verdict(Fault.TORN, f"elements {numbers}")
        if numbers:
            newest = numbers[-1]
            if newest < self._pushed_acked:
                return Verdict(Fault.OLDER, f"newest is {newest}, {self._pushed_acked} was acknowledged")
            if newest > self._pushed_issued:
                return Verdict(Fault.NEWER, f"newest is {newest}, only {self._pushed_issued} was sent")
        if self._queue.second is not None:
            return self._judge_moved(len(items(replies[0])), numbers)
        oldest = numbers[0] if numbers else self._pushed_issued + 1
        if oldest <= self._taken_acked:
            return Verdict(Fault.OLDER, f"{oldest} is there, {self._taken_acked} was taken")
        if numbers and oldest > self._taken_issued + 1:
            return Verdict(Fault.NEWER, f"{oldest} is the oldest, only {self._taken_issued} were taken")
        if not numbers and self._taken_issued < self._pushed_acked:
            return Verdict(
                Fault.NEWER, f"none of {self._pushed_acked} are there, {self._taken_issued} were taken"
            )
        return None

    def _judge_moved(self, moved: int, numbers: Sequence[int]) -> Verdict | None:
        if numbers and numbers[0] != 1:
            return Verdict(Fault.TORN, f"elements {numbers}")
        if not numbers and self._pushed_acked:
            return Verdict(Fault.OLDER, f"none of {self._pushed_acked} are there")
        if moved < self._taken_acked:
            return Verdict(Fault.OLDER, f"{moved} are moved, {self._taken_acked} were acknowledged")
        if moved > self._taken_issued:
            return Verdict(Fault.NEWER, f"{moved} are moved, only {self._taken_issued} were asked for")
        return None
