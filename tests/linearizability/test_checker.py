"""The checker accepts what a register can have done and nothing else; each fault that it is for is planted once."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.linearizability.checker import Kind, Operation, SearchTooLong, Violation, check

KEY = "k"
READ_MIX = "r" * 62 + "w" * 30 + "i" * 5 + "n" + "d" * 2
KINDS = {
    "r": Kind.READ,
    "w": Kind.WRITE,
    "i": Kind.INCREMENT,
    "n": Kind.SET_IF_ABSENT,
    "d": Kind.DELETE,
}


def history(text: str) -> list[Operation]:
    """One operation a line: when it was called and returned (``?``: never), what it was, what it replied.

    0 4 read 7 | 0 4 read none | 0 4 write 7 | 0 4 increment 8 | 0 4 set 7 done | 0 4 delete not
    """
    operations = []
    for client, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        called, returned, name, *rest = line.split()
        numbers = [int(word) for word in rest if word.isdigit()]
        number = numbers[0] if numbers else None
        kind = Kind.SET_IF_ABSENT if name == "set" else Kind(name)
        has_argument = kind in (Kind.WRITE, Kind.SET_IF_ABSENT)
        operations.append(
            Operation(
                client,
                KEY,
                kind,
                float(called),
                None if returned == "?" else float(returned),
                argument=number if has_argument else None,
                result=int("done" in rest)
                if kind in (Kind.SET_IF_ABSENT, Kind.DELETE)
                else None
                if has_argument
                else number,
            )
        )
    return operations


LEGAL = {
    "nothing happened": "",
    "absent at first": "0 1 read none",
    "one after the other": "0 1 write 1 \n 2 3 read 1 \n 4 5 delete done \n 6 7 read none \n 8 9 delete not",
    "read during a write, new": "0 9 write 1 \n 1 2 read 1",
    "read during a write, old": "0 9 write 1 \n 1 2 read none",
    "old and then new during a write": "0 9 write 1 \n 1 2 read none \n 3 4 read 1",
    "two writes, seen in the other order": "0 9 write 1 \n 0 9 write 2 \n 1 2 read 2 \n 3 4 read 1",
    "touching at one moment": "0 1 write 1 \n 1 2 read none",
    "increments": "0 1 increment 1 \n 2 9 increment 3 \n 2 9 increment 2 \n 10 11 read 3",
    "set if absent": "0 5 set 1 done \n 0 5 set 2 not \n 6 7 read 1",
    "set if absent after a delete": "0 1 write 1 \n 2 9 delete done \n 3 4 set 2 done \n 5 6 read 2",
    "the same value twice": "0 1 write 1 \n 2 3 write 2 \n 4 5 read 2 \n 6 7 write 1 \n 8 9 read 1",
    "lost reply, took effect": "0 1 write 1 \n 2 ? write 2 \n 3 4 read 2",
    "lost reply, no effect": "0 1 write 1 \n 2 ? write 2 \n 3 4 read 1",
    "lost reply, late effect": "0 1 write 1 \n 2 ? write 2 \n 3 4 read 1 \n 50 51 read 2",
    "lost increment, took effect": "0 1 write 5 \n 2 ? increment \n 3 4 read 5 \n 5 6 read 6",
    "lost increment, late": "0 1 write 5 \n 2 ? increment \n 3 4 write 8 \n 5 6 read 9",
    "lost delete, took effect": "0 1 write 5 \n 2 ? delete \n 3 4 read none \n 5 6 write 6 \n 7 8 read 6",
    "lost set if absent, found it there": "0 1 write 5 \n 2 ? set 6 \n 3 4 read 5",
    "lost read": "0 1 write 5 \n 2 ? read \n 3 4 read 5",
}
# The last word: what has no place, as its line's number.
ILLEGAL = {
    "never written": ("0 1 read 7", 0),
    "read before it was written": ("0 1 read 7 \n 2 3 write 7", 0),
    "stale read": ("0 1 write 1 \n 2 3 write 2 \n 4 5 read 1", 2),
    "new and then old": ("0 1 write 1 \n 2 9 write 2 \n 3 4 read 2 \n 5 6 read 1", 3),
    "old after new, another client": ("0 1 write 1 \n 2 9 write 2 \n 3 4 read 2 \n 4.5 8 read 1", 3),
    "lost write": ("0 1 write 1 \n 2 3 write 2 \n 4 5 read 1 \n 6 7 read 1", 2),
    "nil for a key that exists": ("0 1 write 1 \n 2 3 read none", 1),
    "a deleted key is back": ("0 1 write 1 \n 2 3 delete done \n 4 5 read 1", 2),
    "deleted and not": ("0 1 write 1 \n 2 3 delete not", 1),
    "increment counted twice": ("0 1 increment 1 \n 2 3 increment 3", 1),
    "two increments to one value": ("0 9 increment 1 \n 0 8 increment 1", 0),
    "increment of what was overwritten": ("0 1 write 5 \n 2 3 write 7 \n 4 5 increment 6", 2),
    "both set if absent": ("0 4 set 1 done \n 0 5 set 2 done", 1),
    "not set though absent": ("0 1 set 1 not", 0),
    "two clients disagree": (
        "0 9 write 1 \n 0 9 write 2 \n 10 11 read 1 \n 12 13 read 2",
        3,
    ),
    "lost reply, then old again": ("0 1 write 1 \n 2 ? write 2 \n 3 4 read 2 \n 5 6 read 1", 3),
    "lost reply, effect before the call": ("0 1 read 2 \n 2 ? write 2", 0),
    "lost increment, twice": ("0 1 write 5 \n 2 ? increment \n 3 4 read 7", 2),
}


@pytest.mark.parametrize("text", LEGAL.values(), ids=LEGAL)
def test_accepts(text: str) -> None:
    assert check(history(text)) == []


@pytest.mark.parametrize(("text", "misplaced"), ILLEGAL.values(), ids=ILLEGAL)
def test_refuses_and_names_the_operation(text: str, misplaced: int) -> None:
    """What is named is the return that made the history illegal, and not what came of it."""
    operations = history(text)
    [violation] = check(operations)
    assert violation.misplaced == operations[misplaced]


def test_a_key_that_was_there_at_the_beginning() -> None:
    assert check(history("0 1 read 7"), {KEY: 7}) == []
    assert check(history("0 1 read none"), {KEY: 7}) != []
    assert check(history("0 1 write 8 \n 2 3 read 7"), {KEY: 7}) != []


def test_each_key_is_judged_alone() -> None:
    """A stale read of one key is a violation of that key, whatever happens to the others."""
    fine = [replace(operation, key="fine") for operation in history("0 1 write 1 \n 4 5 read 1")]
    stale = [
        replace(operation, key="stale") for operation in history("0 1 write 1 \n 2 3 write 2 \n 4 5 read 1")
    ]
    assert [violation.key for violation in check([*fine, *stale])] == ["stale"]


def test_a_violation_reads_as_a_story() -> None:
    [violation] = check(history("0 1 write 1 \n 2 3 write 2 \n 4 5 read 1 \n 4 9 write 3 \n 10 11 read 3"))
    assert str(violation).splitlines() == [
        "key k: 2 operations have an order, the next has no place in any:",
        "      [0.000000, 1.000000] client 0: write 1",
        "      [2.000000, 3.000000] client 1: write 2",
        "      the register holds 2",
        "  --> [4.000000, 5.000000] client 2: read -> 1",
        "      under way: [4.000000, 9.000000] client 3: write 3",
    ]


def test_gives_up_aloud() -> None:
    """A history that needs a longer search is neither accepted nor refused."""
    with pytest.raises(SearchTooLong, match="more than 3 configurations"):
        check(simulated(1, clients=5, count=50), configurations_max=3)


# --- against brute force ---


@st.composite
def small_histories(draw: st.DrawFn) -> list[Operation]:
    """Up to six operations with few values and times, so that many are nearly legal and some are."""
    operations = []
    for client in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([Kind.READ, Kind.READ, Kind.WRITE, *Kind]))
        called = draw(st.integers(0, 12))
        is_lost = draw(st.integers(0, 7)) == 0
        number = draw(st.integers(1, 4))
        result: int | None = None
        if not is_lost and kind is not Kind.WRITE:
            result = number
            if kind is Kind.READ:
                result = draw(st.sampled_from([None, number, number]))
            elif kind in (Kind.SET_IF_ABSENT, Kind.DELETE):
                result = number % 2
        operations.append(
            Operation(
                client,
                KEY,
                kind,
                float(called),
                None if is_lost else float(called + draw(st.integers(1, 8))),
                number if kind in (Kind.WRITE, Kind.SET_IF_ABSENT) else None,
                result,
            )
        )
    return operations


@given(small_histories(), st.sampled_from([None, 1]))
@settings(max_examples=100)
def test_agrees_with_trying_every_order(operations: list[Operation], initial: int | None) -> None:
    """Any history: the search finds an order if and only if there is one."""
    found = check(operations, {} if initial is None else {KEY: initial})
    assert (found == []) == has_an_order(operations, initial)


@given(st.integers(0, 2**32), st.integers(2, 6), st.sampled_from(["rrwwd", "rwiddn", "rrrwi", "rwwnd"]))
@settings(max_examples=100)
def test_agrees_on_histories_that_happened_but_for_one_reply(seed: int, clients: int, mix: str) -> None:
    """What a register did is accepted; with one reply replaced, the search agrees with trying every order."""
    operations = simulated(seed, clients, 6, mix)
    assert check(operations) == []
    rng = random.Random(seed)
    index = rng.randrange(len(operations))
    changed = operations[index]
    if changed.kind is Kind.READ:
        values = [operation.argument for operation in operations if operation.argument is not None]
        changed = replace(changed, result=rng.choice([None, *values]))
    elif changed.kind in (Kind.SET_IF_ABSENT, Kind.DELETE):
        changed = replace(changed, result=1 - (changed.result or 0))
    operations[index] = changed
    assert (check(operations) == []) == has_an_order(operations, None)


def has_an_order(operations: Sequence[Operation], initial: int | None) -> bool:
    """The definition, tried out: some order of all that returned, and of some whose outcome is unknown."""
    known = [operation for operation in operations if operation.is_known]
    unknown = [operation for operation in operations if not operation.is_known]
    chosen = chain.from_iterable(combinations(unknown, size) for size in range(len(unknown) + 1))
    return any(
        respects_time(order) and replies_fit(order, initial)
        for some in chosen
        for order in permutations([*known, *some])
    )


def respects_time(order: Sequence[Operation]) -> bool:
    """Nothing stands before what had returned when it was called."""
    latest_call = -math.inf
    for operation in order:
        if operation.returned_at is not None and operation.returned_at < latest_call:
            return False
        latest_call = max(latest_call, operation.called_at)
    return True


def replies_fit(order: Sequence[Operation], value: int | None) -> bool:
    for operation in order:
        value, reply = performed(operation.kind, operation.argument, value)
        if operation.is_known and reply != operation.result:
            return False
    return True


def performed(kind: Kind, argument: int | None, value: int | None) -> tuple[int | None, int | None]:
    """What a server's key holds after the command, and the reply."""
    if kind is Kind.WRITE:
        return argument, None
    if kind is Kind.INCREMENT:
        return (value or 0) + 1, (value or 0) + 1
    if kind is Kind.SET_IF_ABSENT:
        return (argument, 1) if value is None else (value, 0)
    if kind is Kind.DELETE:
        return None, int(value is not None)
    return value, value


# --- long histories ---


def simulated(seed: int, clients: int, count: int, mix: str = READ_MIX) -> list[Operation]:
    """What clients see of a register that takes each request up at a moment between its call and its return.

    Each client sends its next request soon after a reply. Increments never reach a written value.
    """
    rng = random.Random(seed)
    value: int | None = None
    operations: list[Operation] = []
    started = 0
    due: list[tuple[float, int, float, float, str]] = []  # when, client, called, returns, kind

    def call(client: int, at: float) -> None:
        nonlocal started
        if started < count:
            started += 1
            seconds = 0.01 + rng.expovariate(1.0)
            heapq.heappush(due, (at + rng.random() * seconds, client, at, at + seconds, rng.choice(mix)))

    for client in range(clients):
        call(client, rng.random())
    while due:
        _, client, called, returns, letter = heapq.heappop(due)
        kind = KINDS[letter]
        argument = 1000 * (len(operations) + 1) if kind in (Kind.WRITE, Kind.SET_IF_ABSENT) else None
        value, reply = performed(kind, argument, value)
        operations.append(Operation(client, KEY, kind, called, returns, argument, reply))
        call(client, returns + 0.1 * rng.random())
    return operations


def planted(operations: Sequence[Operation], age_seconds: float) -> tuple[list[Operation], Operation]:
    """The history with one late read that shows what another read showed so long before, and that read."""
    late = next(
        index
        for index, operation in enumerate(operations)
        if index > len(operations) * 3 // 4 and operation.kind is Kind.READ
    )
    old = max(
        (
            operation
            for operation in operations
            if operation.kind is Kind.READ
            and operation.result is not None
            and (operation.returned_at or 0.0) < operations[late].called_at - age_seconds
        ),
        key=lambda operation: operation.called_at,
    )
    stale = replace(operations[late], result=old.result)
    return [*operations[:late], stale, *operations[late + 1 :]], stale


@pytest.mark.parametrize(
    ("clients", "mix"), [(8, READ_MIX), (100, "rrrrrrrwww")], ids=["8 clients", "100 clients"]
)
def test_a_stale_read_among_two_thousand_operations(clients: int, mix: str) -> None:
    """One key, 2,000 operations: accepted as it happened, refused with one stale read, which is named."""
    operations = simulated(clients, clients, 2000, mix)
    assert check(operations) == []
    stale_history, stale = planted(operations, age_seconds=8.0)
    [violation] = check(stale_history)
    assert violation.misplaced == stale, str(violation)


def test_a_lost_write_among_many() -> None:
    """An acknowledged write of which no read knows, as if it had not been: the first later read has no place."""
    operations = simulated(3, 8, 500, "rrrrrrrwww")
    for index, write in enumerate(operations):
        if index > 250 and write.kind is Kind.WRITE:
            seers = [o for o in operations if o.kind is Kind.READ and o.result == write.argument]
            if any(seer.called_at > (write.returned_at or 0.0) for seer in seers):
                break
    older = next(
        o
        for o in reversed(operations[:index])
        if o.kind is Kind.WRITE and (o.returned_at or 0.0) < write.called_at
    )
    lost = [replace(o, result=older.argument) if o in seers else o for o in operations]
    [violation] = check(lost)
    assert violation.misplaced.result == older.argument


def test_a_nil_for_a_key_that_exists_among_many() -> None:
    operations = [replace(operation) for operation in simulated(4, 8, 500, "rrrrrrrwww")]
    index = next(i for i, o in enumerate(operations) if i > 250 and o.kind is Kind.READ)
    operations[index] = replace(operations[index], result=None)
    [violation] = check(operations)
    assert violation.misplaced == operations[index]
    assert isinstance(violation, Violation)
