"""The load's judge condemns each wrong reply, and none that a correct server could give."""

from __future__ import annotations

import pytest

from load.ledger import (
    BrokenList,
    ForeignValue,
    Ledger,
    StaleValue,
    UnwrittenValue,
    WrongNil,
    value_of,
    version_in,
    version_of_counter,
    version_of_list,
)


def acknowledged(ledger: Ledger, times: int) -> bytes:
    """The only key of the ledger, written that many times."""
    for _ in range(times):
        begun = ledger.begin_write()
        assert begun is not None
        ledger.acknowledge(begun[0])
    return ledger.choose()


def test_a_value_older_than_an_acknowledged_write_is_stale() -> None:
    ledger = Ledger("k", key_count=1, seed=1)
    key = acknowledged(ledger, times=3)
    floor = ledger.floor(key)
    ledger.check(key, 3, floor)
    with pytest.raises(StaleValue):
        ledger.check(key, 2, floor)


def test_a_nil_is_wrong_once_a_write_was_acknowledged() -> None:
    ledger = Ledger("k", key_count=1, seed=1)
    key = ledger.choose()
    ledger.check(key, None, ledger.floor(key))
    acknowledged(ledger, times=1)
    with pytest.raises(WrongNil):
        ledger.check(key, None, ledger.floor(key))


def test_a_read_beside_a_write_may_show_the_value_before_or_after_it() -> None:
    ledger = Ledger("k", key_count=1, seed=1)
    key = acknowledged(ledger, times=1)
    floor = ledger.floor(key)
    assert ledger.begin_write() == (key, 2)
    ledger.check(key, 1, floor)
    ledger.check(key, 2, floor)
    ledger.acknowledge(key)
    ledger.check(key, 1, floor)  # the read was sent before the write was acknowledged
    with pytest.raises(UnwrittenValue):
        ledger.check(key, 3, floor)


def test_a_key_has_one_write_on_its_way_at_most() -> None:
    ledger = Ledger("k", key_count=1, seed=1)
    assert ledger.begin_write() is not None
    assert ledger.begin_write() is None


def test_a_key_with_a_write_of_unknown_outcome_is_not_used_again() -> None:
    ledger = Ledger("k", key_count=1, seed=1)
    key = acknowledged(ledger, times=1)
    ledger.begin_write()
    ledger.abandon(key)
    assert ledger.choose() != key
    assert ledger.written_keys() == [key]


def test_a_value_carries_its_key_and_version() -> None:
    assert version_in(b"k:1", value_of(b"k:1", 12, value_bytes=100)) == 12
    assert len(value_of(b"k:1", 12, value_bytes=100)) == 100
    for foreign in (value_of(b"k:2", 12, 100), b"", b"k:1|x|", b"k:1|12|y"):
        with pytest.raises(ForeignValue):
            version_in(b"k:1", foreign)
    assert version_of_counter(b"k:1", b"12") == 12
    with pytest.raises(ForeignValue):
        version_of_counter(b"k:1", b"OK")


def test_a_list_shows_each_version_once_newest_first() -> None:
    def items(*versions: int) -> list[bytes]:
        return [value_of(b"k", version, 0) for version in versions]

    assert version_of_list(b"k", [], 3) is None
    assert version_of_list(b"k", items(2, 1), 3) == 2
    assert version_of_list(b"k", items(5, 4, 3), 3) == 5
    for broken in (items(5, 3, 2), items(5, 5, 4), items(3, 4, 5), items(2), items(5, 4)):
        with pytest.raises(BrokenList):
            version_of_list(b"k", broken, 3)
