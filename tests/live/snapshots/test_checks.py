"""The checker names each broken promise, and nothing else: shown on planted answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.live.campaign.keys import Key, value_of
from tests.live.campaign.resp import Reply, parse
from tests.live.snapshots.checks import Check, Fault, Read, Tally, View, canonical
from tests.live.snapshots.families import Keys, Reborn, Renamed, names_at
from tests.live.snapshots.subjects import BALANCE, Chain, Queue, Shares, Subject, Tills, VersionedKeys

SLOTS = (0, 7000, 12000)


def encoded(reply: Reply) -> bytes:
    """RESP2."""
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, list):
        return b"*%d\r\n" % len(reply) + b"".join(map(encoded, reply))
    return b"$-1\r\n" if reply is None else b"$%d\r\n%b\r\n" % (len(reply), reply)


def opened(*subjects: Subject, dump: dict[bytes, list[Reply]] | None = None) -> View:
    view = View([subject.expect() for subject in subjects], dump=dump)
    view.on_opened(1)
    return view


def take(view: View, read: Read, replies: Sequence[Reply], *, resp3: bool = False) -> Tally:
    tally = Tally()
    view.take(read, b"".join(map(encoded, replies)), list(replies), tally, resp3=resp3)
    return tally


def the_read(view: View, label: str, name: bytes) -> Read:
    return next(read for read in view.reads if read.label == label and name in read.payload)


def key_named(keys: Keys, stem: bytes) -> Key:
    return next(key for key in keys.all if key.name.startswith(stem + b":"))


@pytest.fixture
def keys() -> Keys:
    return Keys(SLOTS, 25, owners=1)


def versioned(keys: Keys) -> VersionedKeys:
    return VersionedKeys(keys, has_eval_ro=True, seed=0)


def set_versions(key: Key, acked: int, issued: int) -> None:
    key.acked, key.issued = acked, issued


def test_what_was_acknowledged_before_open_shows_and_nothing_sent_after_it(keys: Keys) -> None:
    """Promises 2 and 4: older than the window of the opening, or newer, each by its name."""
    key = key_named(keys, b"string")
    set_versions(key, 5, 6)  # the sixth is under way when OPEN is sent
    view = View([versioned(keys).expect()])
    set_versions(key, 6, 7)  # and the seventh is sent before OPEN returns
    view.on_opened(1)
    set_versions(key, 9, 10)
    seen = {}
    for version in (4, 5, 6, 7, 8, 11):
        read = the_read(view, "GET", key.name)
        view._seen.clear()
        seen[version] = set(take(view, read, [value_of(key.name, version)]).faults)
    assert seen == {4: {Fault.OLDER}, 5: set(), 6: set(), 7: set(), 8: {Fault.NEWER}, 11: {Fault.WRONG}}
    view._seen.clear()
    assert set(take(view, the_read(view, "GET", key.name), [None]).faults) == {Fault.OLDER}
    view._seen.clear()
    another = value_of(b"another", 6)
    assert set(take(view, the_read(view, "GET", key.name), [another]).faults) == {Fault.WRONG}


def test_a_deletion_after_the_opening_does_not_show(keys: Keys) -> None:
    """Nor does what was made anew; and a key that was absent stays so. For every type."""
    for key in keys.all:
        if not isinstance(key.family, Reborn):
            continue
        exists = Read("EXISTS", b"", 1)
        for acked, shown, fault in ((2, 0, Fault.NEWER), (3, 1, Fault.NEWER), (2, 1, None), (3, 0, None)):
            set_versions(key, acked, acked)
            view = opened(versioned(keys))
            set_versions(key, acked + 3, acked + 3)
            exists = the_read(view, "EXISTS", key.name)
            assert list(take(view, exists, [shown]).faults) == ([fault] if fault else []), (key.name, acked)


def test_two_answers_that_differ(keys: Keys) -> None:
    """Promise 3: byte for byte, each protocol for itself, whatever writers would allow."""
    key = key_named(keys, b"string")
    set_versions(key, 1, 3)
    view = opened(versioned(keys))
    read = the_read(view, "GET", key.name)
    first, second = value_of(key.name, 1), value_of(key.name, 2)
    assert not take(view, read, [first]).faults
    assert not take(view, read, [second], resp3=True).faults
    again = take(view, read, [first])
    assert not again.faults
    assert again.checked[Check.REPEATS] == 1
    assert set(take(view, read, [second]).faults) == {Fault.CHANGED}


def test_another_value_than_the_dump(keys: Keys) -> None:
    """A dump decides where order is settled; and it decides for reads of which writers know nothing."""
    key = key_named(keys, b"hash")
    set_versions(key, 1, 2)
    fields: list[Reply] = [b"v", value_of(key.name, 1), b"n", b"1", b"fixed", key.name]
    plain = opened(versioned(keys))
    read = the_read(plain, "HGETALL", key.name)
    values = the_read(plain, "HVALS", key.name)
    dump = {
        read.payload: canonical(read.label, [fields]),
        values.payload: canonical(values.label, [fields[1::2]]),
    }
    turned = fields[2:] + fields[:2]
    newer: list[Reply] = [b"v", value_of(key.name, 2), b"n", b"2", b"fixed", key.name]
    for given, wanted in ((turned, set()), (newer, {Fault.UNLIKE_DUMP})):
        view = opened(versioned(keys), dump=dump)
        assert set(take(view, read, [given]).faults) == wanted
        assert set(take(view, values, [given[1::2]]).faults) == wanted


def test_an_effect_without_its_cause() -> None:
    """Promise 4, in both directions of a chain, also where each link alone would be allowed."""
    chain = Chain(SLOTS, 0)
    chain.acked, chain.issued = [3, 3, 3], [3, 3, 3]
    view = View([chain.expect()])
    chain.issued = [9, 9, 9]
    view.on_opened(1)
    mget, backwards = [read for read in view.reads if read.label == "MGET"]
    for numbers, fault in (
        ([5, 5, 4], None),
        ([5, 4, 4], None),
        ([4, 5, 4], Fault.UNCAUSED),
        ([4, 4, 5], Fault.UNCAUSED),
        ([6, 4, 4], Fault.UNCAUSED),
        ([2, 2, 2], Fault.OLDER),
        ([10, 10, 9], Fault.NEWER),
    ):
        for read, shown in ((mget, numbers), (backwards, numbers[::-1])):
            view._seen.clear()
            tally = take(view, read, [[b"%d" % number for number in shown]])
            assert list(tally.faults) == ([fault] if fault else []), numbers


@pytest.mark.parametrize("make", [Tills, lambda slots: Shares(slots, 0)])
def test_a_torn_total(make: Callable[[Sequence[int]], Tills | Shares]) -> None:
    """Promise 4: what is moved in one step is moved or not."""
    bank = make(SLOTS)
    balances: list[Reply] = [b"%d" % BALANCE for _ in bank.names]
    mget, each = opened(bank).reads
    assert not take(opened(bank), mget, [balances]).faults
    assert not take(opened(bank), each, balances).faults
    torn = [b"%d" % (BALANCE + 7), *balances[1:]]
    assert set(take(opened(bank), mget, [torn]).faults) == {Fault.TORN}
    assert set(take(opened(bank), each, torn).faults) == {Fault.TORN}
    assert set(take(opened(bank), each, [None, *balances[1:]]).faults) == {Fault.OLDER}
    bank.is_certain = False  # a transfer may be half done for good
    view = opened(bank)
    assert not take(view, view.reads[0], [torn]).faults


@pytest.mark.parametrize(
    ("has_second", "lists", "fault"),
    [
        (False, [[3, 4, 5]], None),
        (False, [[4, 5, 6]], None),
        (False, [[2, 3, 4, 5]], Fault.OLDER),
        (False, [[3, 4]], Fault.OLDER),
        (False, [[5, 6]], Fault.NEWER),
        (False, [[3, 4, 5, 6, 7]], Fault.NEWER),
        (False, [[3, 5]], Fault.TORN),
        (False, [[]], Fault.NEWER),
        (True, [[1, 2], [3, 4, 5]], None),
        (True, [[1, 2, 3], [4, 5]], None),
        (True, [[1], [2, 3, 4, 5]], Fault.OLDER),
        (True, [[1, 2, 3, 4], [5]], Fault.NEWER),
        (True, [[1, 2], [4, 5]], Fault.TORN),
        (True, [[1, 2, 3], [3, 4, 5]], Fault.TORN),
        (True, [[2], [3, 4, 5]], Fault.TORN),
    ],
)
def test_queues(has_second: bool, lists: list[list[int]], fault: Fault | None) -> None:
    """Two are taken, one more may be; five are pushed, one more may be. Nothing is in both lists, or in none."""
    queue = Queue(0, 0, has_second=has_second)
    queue.pushed_acked, queue.pushed_issued, queue.taken_acked = 5, 6, 2
    view = opened(queue)
    queue.pushed_issued = queue.pushed_acked = 9
    tally = take(view, view.reads[0], [[queue.element(number) for number in of] for of in lists])
    assert list(tally.faults) == ([fault] if fault else [])


def test_a_renamed_key_has_one_name(keys: Keys) -> None:
    key = key_named(keys, b"renamed")
    for version in range(7):
        set_versions(key, version, version)
        view = opened(versioned(keys))
        read = the_read(view, "MGET names", key.name)
        value = value_of(key.name, version - version % 2)
        there: list[Reply] = [
            value if name in names_at(key, version) else None for name in Renamed.names(key)
        ]
        assert not take(view, read, [there]).faults, version
        set_versions(key, version + 2, version + 2)
        view._seen.clear()
        assert take(view, read, [there[::-1]]).faults.total() == 1, version
        view._seen.clear()
        assert set(take(view, read, [[value, value]]).faults) == {Fault.TORN}
        view._seen.clear()
        assert set(take(view, read, [[None, None]]).faults) == {Fault.OLDER}


def test_listings(keys: Keys) -> None:
    """Deleted since: still listed. Created since: not. Internal: never. And always the same."""
    key = key_named(keys, b"reborn-hash")
    gone = key_named(keys, b"churned")
    set_versions(key, 2, 2)
    set_versions(gone, 1, 1)
    subject = versioned(keys)
    view = opened(subject)
    set_versions(key, 3, 3)
    set_versions(gone, 2, 2)
    must = {name for each in keys.all for name in names_at(each, 0)} - {gone.name}

    def faults_of(names: set[bytes]) -> dict[Fault, int]:
        tally = Tally()
        view.take_listing("KEYS", sorted(names), tally)
        return dict(tally.faults)

    assert faults_of(must) == {}
    assert faults_of(must - {key.name}) == {Fault.LISTING: 1, Fault.CHANGED: 1}
    assert faults_of(must | {gone.name}) == {Fault.LISTING: 1, Fault.CHANGED: 1}
    assert faults_of(must | {b"steady{3560}:m:1:x"}) == {Fault.LISTING: 1, Fault.CHANGED: 1}
    assert faults_of(must) == {}


def test_refusals_are_no_faults_and_other_errors_are(keys: Keys) -> None:
    view = opened(versioned(keys))
    read = view.reads[0]
    for text, fault in (
        (b"-NOTREADY try again\r\n", None),
        (b"-SNAPSHOTTOOOLD snapshot 1 was aborted\r\n", None),
        (b"-ERR unknown command\r\n", Fault.ERROR),
        (b"-MOVED 1 127.0.0.1:1\r\n", Fault.ERROR),
    ):
        reply, _ = parse(text, 0)
        tally = Tally()
        view.take(read, text, [reply], tally, resp3=False)
        assert list(tally.faults) == ([fault] if fault else [])
        assert tally.reads == 0
    assert view.has_ended
