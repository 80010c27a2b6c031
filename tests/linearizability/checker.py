"""Whether what clients saw of single keys can be put into one order: linearizability, decided by search.

A history is linearizable if every operation can be given one moment between its call and its return, so that all
replies are those of a register to which the operations happen one after the other at these moments. Keys are judged
one by one, which loses nothing: a history is linearizable if and only if that of each key is (Herlihy and Wing).

The search tries to place one operation after another (Wing and Gong), of those that were called before any unplaced
one returned. What was placed and what the register then holds is a *configuration*; one that failed is not tried
again, however it was reached (Lowe). Three rules make that quick and lose no order that matters:

- An operation that changes nothing is placed as soon as the register holds what it saw.
- A value that can come about only once is not given up while an unplaced operation has still to see it.
- A write all of whose seers were called is placed without a choice, unless deletions stand in the way.

An operation whose outcome is unknown, because its reply was lost, may take effect at any time after its call, or
never. Times are seconds on one monotonic clock; operations that touch at one moment count as concurrent.

Sources: Wing and Gong, "Testing and verifying concurrent objects" (1993); Lowe, "Testing for linearizability" (2017).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

CONFIGURATIONS_MAX = 500_000  # for one history of one key; about 300 MB with 2,000 operations
RETURNS_FIRST = 128  # tried at first
SHOWN_BEFORE = 12  # of the operations in their order, the last ones


class Kind(Enum):
    READ = "read"
    WRITE = "write"
    INCREMENT = "increment"
    SET_IF_ABSENT = "set if absent"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of one client on one key, and what it returned. A register holds an integer, or nothing."""

    client: int
    key: str
    kind: Kind
    called_at: float
    returned_at: float | None  # None: the outcome is unknown
    argument: int | None = None  # of write and set if absent
    # read: the value, None for absence. increment: the new value. set if absent, delete: whether it did. write: None.
    result: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether it returned; its result means nothing otherwise."""
        return self.returned_at is not None

    @property
    def is_passive(self) -> bool:
        """Whether it leaves the register as it was, wherever it is placed."""
        if self.kind is Kind.READ:
            return True
        return self.is_known and self.kind in (Kind.SET_IF_ABSENT, Kind.DELETE) and not self.result

    def __str__(self) -> str:
        until = f"{self.returned_at:.6f}" if self.returned_at is not None else "?"
        argument = "" if self.argument is None else f" {self.argument}"
        if not self.is_known:
            outcome = " (outcome unknown)"
        elif self.kind is Kind.WRITE:
            outcome = ""
        elif self.kind in (Kind.SET_IF_ABSENT, Kind.DELETE):
            outcome = " -> done" if self.result else " -> not done"
        else:
            outcome = f" -> {_shown(self.result)}"
        return f"[{self.called_at:.6f}, {until}] client {self.client}: {self.kind.value}{argument}{outcome}"


@dataclass(frozen=True, slots=True)
class Violation:
    """The shortest beginning of a key's history that has no order, and an order of all but its last return."""

    key: str
    placed: tuple[Operation, ...]  # a longest prefix that has an order, in that order
    value: int | None  # what the register holds after them
    misplaced: Operation  # the return that fits nowhere
    unplaced: tuple[Operation, ...]  # the others that were under way when it returned, and need no place yet

    def __str__(self) -> str:
        hidden = len(self.placed) - SHOWN_BEFORE
        return "\n".join(
            [
                f"key {self.key}: {len(self.placed)} operations have an order, the next has no place in any:",
                *([f"      ... {hidden} before these"] if hidden > 0 else []),
                *[f"      {operation}" for operation in self.placed[-SHOWN_BEFORE:]],
                f"      the register holds {_shown(self.value)}",
                f"  --> {self.misplaced}",
                *[f"      under way: {operation}" for operation in self.unplaced],
            ]
        )


class SearchTooLong(Exception):
    """The search met more configurations than it may; the history is neither accepted nor refused."""


def check(
    operations: Iterable[Operation],
    initial: Mapping[str, int] | None = None,
    configurations_max: int = CONFIGURATIONS_MAX,
) -> list[Violation]:
    """A violation for each key whose history is not linearizable; none if all are.

    ``initial`` are the values at the beginning, of keys that were there. Raises SearchTooLong.
    """
    histories: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        histories[operation.key].append(operation)
    found = [
        _first_violation(history, (initial or {}).get(key), configurations_max)
        for key, history in sorted(histories.items())
    ]
    return [violation for violation in found if violation is not None]


def _first_violation(
    history: Sequence[Operation], initial: int | None, configurations_max: int
) -> Violation | None:
    """Of one key. A beginning of a history that has an order has one too: so twice as many returns are tried each
    time, which finds an early fault before the search is long, and then the number is bisected."""
    returns = sorted((operation for operation in history if operation.is_known), key=_until)
    orderly, last = 0, len(returns) + 1  # so many returns have an order; so many have none, or are none
    placed: list[Operation] = []
    length = RETURNS_FIRST
    while last - orderly > 1:
        length = min(length, last - 1) if last > len(returns) else (orderly + last) // 2
        order = _ordered(history, _until(returns[length - 1]), initial, configurations_max)
        if order is None:
            last = length
        else:
            orderly, placed = length, order
            length *= 2
    if orderly == len(returns):
        return None
    misplaced = returns[last - 1]
    return Violation(
        misplaced.key,
        tuple(placed),
        _after_all(placed, initial),
        misplaced,
        tuple(
            operation
            for operation in history
            if operation.called_at <= _until(misplaced) <= _until(operation)
            and operation is not misplaced
            and operation not in placed
        ),
    )


def _ordered(
    history: Iterable[Operation], until: float, initial: int | None, configurations_max: int
) -> list[Operation] | None:
    """An order of what had returned at ``until``, None if there is none. Raises SearchTooLong.

    What was under way then may have a place or not; where it has one, it replied as it did later.
    """
    entries = [
        _Entry(operation, returned if (returned := _until(operation)) <= until else math.inf)
        for operation in history
        if operation.called_at <= until
    ]
    return _Search(entries, initial).order(configurations_max)


@dataclass(slots=True, eq=False)
class _Entry:
    operation: Operation
    deadline: float  # it is placed before; infinite if it need not have a place


class _Search:
    """One search. An operation is its index: those that must have a place in the order of their calls, then the rest.

    A set of operations is an integer with a bit for each.
    """

    def __init__(self, entries: Sequence[_Entry], initial: int | None) -> None:
        self._initial = initial
        self._makers: dict[int, list[_Entry]] = defaultdict(list)  # value -> what can make it
        for entry in entries:
            if (made := _made(entry.operation)) is not None:
                self._makers[made].append(entry)
        # What an unknown increment makes depends on where it stands, so then any value may come about again.
        self._is_open_ended = any(
            entry.operation.kind is Kind.INCREMENT and not entry.operation.is_known for entry in entries
        )
        self._hasten(entries)

        required = sorted(
            (entry for entry in entries if entry.deadline < math.inf),
            key=lambda entry: entry.operation.called_at,
        )
        ordered = [*required, *self._useful(entries, required)]
        self._operations = [entry.operation for entry in ordered]
        self._called = [operation.called_at for operation in self._operations]
        self._deadline = [entry.deadline for entry in ordered]
        self._passive = [operation.is_passive for operation in self._operations]
        self._required_count = len(required)
        self._required = (1 << len(required)) - 1
        self._seers: dict[int, int] = defaultdict(int)  # value -> set of what needs to find it
        for index, operation in enumerate(self._operations):
            if (needed := _needed(operation)) is not None:
                self._seers[needed] |= 1 << index
        self._chains = [self._chain(index) for index in range(len(required))]
        calls = list(zip(self._called, range(len(ordered)), self._operations, strict=True))
        self._absences = _SetsByCall(
            (at, index) for at, index, operation in calls if _makes_absent(operation)
        )
        self._concerns = _SetsByCall(
            (at, index) for at, index, operation in calls if _concerns_absence(operation)
        )

    def _comes_once(self, value: int) -> bool:
        """Whether the register can come to hold the value only once."""
        return not self._is_open_ended and len(self._makers[value]) + (value == self._initial) == 1

    def _hasten(self, entries: Iterable[_Entry]) -> None:
        """Who alone can have made what another saw has a place, and before the other's deadline."""
        hastened = [entry for entry in entries if entry.deadline < math.inf]
        while hastened:
            seer = hastened.pop()
            needed = _needed(seer.operation)
            if needed is None or not self._comes_once(needed):
                continue
            for maker in self._makers[needed]:
                if seer.deadline < maker.deadline:
                    maker.deadline = seer.deadline
                    hastened.append(maker)

    def _useful(self, entries: Iterable[_Entry], required: Iterable[_Entry]) -> list[_Entry]:
        """What need not have a place, but whose effect somebody may have seen; in the order of calls."""
        all_may_help = self._is_open_ended or any(_concerns_absence(entry.operation) for entry in required)
        needed = {_needed(entry.operation) for entry in entries} - {None}
        useful = [
            entry
            for entry in entries
            if entry.deadline == math.inf
            and not entry.operation.is_passive
            and (all_may_help or _made(entry.operation) in needed)
        ]
        return sorted(useful, key=lambda entry: entry.operation.called_at)

    def _chain(self, index: int) -> int:
        """A write, all that sees its value, and if that is an increment, what sees its value in turn, and so on.

        Empty when it is not certain what that is.
        """
        operation = self._operations[index]
        made = operation.argument if operation.kind is Kind.WRITE else None
        chain = 1 << index if made is not None else 0
        while made is not None:
            seers = self._seers.get(made, 0)
            if not self._comes_once(made) or seers & ~self._required:
                return 0
            chain |= seers
            increments = [seer for seer in _members(seers) if not self._passive[seer]]
            made = _made(self._operations[increments[0]]) if increments else None
        return chain

    def order(self, configurations_max: int) -> list[Operation] | None:
        """All that must have a place and what else is needed, in an order; None if there is none."""
        if not self._every_value_has_a_source():
            return None
        tried: set[tuple[int, int | None]] = set()
        order: list[int] = []
        # For each choice that was made: how long the order was before, what was placed, what else can be tried.
        choices: list[tuple[int, int, list[tuple[int, int | None]]]] = []
        placed, value = 0, self._initial
        while True:
            placed, candidates = self._place_passive(placed, value, order)
            if placed & self._required == self._required:
                return [self._operations[index] for index in order]
            if (placed, value) not in tried:
                if len(tried) >= configurations_max:
                    raise SearchTooLong(
                        f"more than {configurations_max} configurations of {len(self._operations)} operations"
                        f" on key {self._operations[0].key}"
                    )
                tried.add((placed, value))
                choices.append((len(order), placed, self._choices(placed, value, candidates)))
            while choices and not choices[-1][2]:
                choices.pop()
            if not choices:
                return None
            length, placed, left = choices[-1]
            index, value = left.pop()
            del order[length:]
            order.append(index)
            placed |= 1 << index

    def _every_value_has_a_source(self) -> bool:
        """Whether each value that was seen can have come about before the one that saw it returned."""
        return self._is_open_ended or all(
            value == self._initial
            or any(maker.operation.called_at <= self._deadline[seer] for maker in self._makers[value])
            for value, seers in self._seers.items()
            for seer in _members(seers & self._required)
        )

    def _place_passive(self, placed: int, value: int | None, order: list[int]) -> tuple[int, list[int]]:
        """Place all that changes nothing and saw ``value``. Returns what is placed now, and what can come next."""
        while True:
            candidates = self._candidates(placed)
            fitting = [i for i in candidates if self._passive[i] and _fits(self._operations[i], value)]
            if not fitting:
                return placed, candidates
            for index in fitting:
                placed |= 1 << index
            order += fitting

    def _candidates(self, placed: int) -> list[int]:
        """What was called before any unplaced operation had to be placed."""
        left = self._required & ~placed
        first_deadline = math.inf
        candidates = []
        if left:
            for index in range(_lowest(left), self._required_count):
                if self._called[index] > first_deadline:
                    break
                if left >> index & 1:
                    candidates.append(index)
                    first_deadline = min(first_deadline, self._deadline[index])
        for index in range(self._required_count, len(self._operations)):
            if self._called[index] > first_deadline:
                break
            if not placed >> index & 1:
                candidates.append(index)
        return candidates

    def _choices(
        self, placed: int, value: int | None, candidates: Sequence[int]
    ) -> list[tuple[int, int | None]]:
        """What can change the register next, and to what; the most urgent last."""
        seers = 0 if value is None else self._seers.get(value, 0) & ~placed
        must_see = seers & self._required if value is not None and self._comes_once(value) else 0
        possible = [
            index
            for index in candidates
            if not self._passive[index]
            and not must_see & ~(1 << index)
            and _fits(self._operations[index], value)
        ]
        possible.sort(key=self._deadline.__getitem__, reverse=True)
        if not seers and (closed := self._closed_chains(placed, possible, candidates)):
            if self._is_settled(closed, placed, value):
                possible = closed[:1]
            else:
                possible.append(closed[0])
        return [(index, _after(self._operations[index], value)) for index in possible]

    def _closed_chains(self, placed: int, possible: Sequence[int], candidates: Iterable[int]) -> list[int]:
        """The writes of whose chains all was called, the most urgent first."""
        called = sum(1 << index for index in candidates) | placed
        return [
            index
            for index in reversed(possible)
            if index < self._required_count and self._chains[index] and not self._chains[index] & ~called
        ]

    def _is_settled(self, closed: Sequence[int], placed: int, value: int | None) -> bool:
        """Whether the most urgent write with a closed chain can come next, if there is an order at all.

        Nobody has still to see the present value, so a chain can be taken out of any order and put in front, if the
        key still exists where it must. That is so if nothing before the chain makes it absent. Otherwise the chain
        may be what makes it exist again. But then there is a deletion for it alone, and where there are more chains
        than deletions, one is not needed so: the most urgent comes to the front, and that one takes its place, where
        it is not too late.
        """
        if value is None:
            return not self._concerns.called_until(self._deadline[closed[0]]) & ~placed
        return any(
            (self._absences.called_until(self._deadline[write]) & ~placed).bit_count() <= others
            for others, write in enumerate(closed)
        )


class _SetsByCall:
    """Which operations of some sort were called until a time."""

    def __init__(self, members: Iterable[tuple[float, int]]) -> None:
        """``members``: when each was called, and its index."""
        self._times: list[float] = []
        self._sets = [0]
        for called_at, index in sorted(members):
            self._times.append(called_at)
            self._sets.append(self._sets[-1] | 1 << index)

    def called_until(self, time: float) -> int:
        return self._sets[bisect_right(self._times, time)]


def _fits(operation: Operation, value: int | None) -> bool:
    """Whether the operation would have replied as it did if the register held ``value``."""
    if not operation.is_known:
        return True
    match operation.kind:
        case Kind.READ:
            return operation.result == value
        case Kind.WRITE:
            return True
        case Kind.INCREMENT:
            return operation.result == (value or 0) + 1
        case Kind.SET_IF_ABSENT:
            return bool(operation.result) == (value is None)
        case Kind.DELETE:
            return bool(operation.result) == (value is not None)


def _after(operation: Operation, value: int | None) -> int | None:
    """What the register holds after an operation that fits."""
    match operation.kind:
        case Kind.READ:
            return value
        case Kind.WRITE:
            return operation.argument
        case Kind.INCREMENT:
            return (value or 0) + 1
        case Kind.SET_IF_ABSENT:
            return operation.argument if value is None else value
        case Kind.DELETE:
            return None


def _needed(operation: Operation) -> int | None:
    """The value that a known operation has certainly found; None if it may have found another, or absence."""
    if operation.kind is Kind.READ:
        return operation.result
    if operation.kind is Kind.INCREMENT and operation.result is not None and operation.result != 1:
        return operation.result - 1
    return None


def _made(operation: Operation) -> int | None:
    """The value that the operation leaves if it changes anything; None if that is absence, or depends."""
    match operation.kind:
        case Kind.WRITE | Kind.SET_IF_ABSENT:
            return None if operation.is_passive else operation.argument
        case Kind.INCREMENT:
            return operation.result if operation.is_known else None
        case Kind.READ | Kind.DELETE:
            return None


def _makes_absent(operation: Operation) -> bool:
    return operation.kind is Kind.DELETE and not operation.is_passive


def _concerns_absence(operation: Operation) -> bool:
    """Whether the operation makes the key absent, or depends on whether it is."""
    if operation.kind in (Kind.DELETE, Kind.SET_IF_ABSENT):
        return True
    return (operation.kind is Kind.READ and operation.result is None) or (
        operation.kind is Kind.INCREMENT and operation.is_known and operation.result == 1
    )


def _after_all(order: Iterable[Operation], value: int | None) -> int | None:
    for operation in order:
        value = _after(operation, value)
    return value


def _until(operation: Operation) -> float:
    return math.inf if operation.returned_at is None else operation.returned_at


def _lowest(members: int) -> int:
    return (members & -members).bit_length() - 1


def _members(members: int) -> Iterable[int]:
    while members:
        index = _lowest(members)
        yield index
        members ^= 1 << index


def _shown(value: int | None) -> str:
    return "nothing" if value is None else str(value)
