from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.offsets import OffsetHistory, Point, Sample, SampleError, covers, holds, parse_sample

X = b"a" * 40
Y = b"b" * 40

PRIMARY = (
    b"# Replication\r\nrole:master\r\nconnected_slaves:1\r\n"
    b"slave0:ip=127.0.0.1,port=7001,state=online,offset=90,lag=1\r\nmaster_failover_state:no-failover\r\n"
    b"master_replid:" + X + b"\r\nmaster_replid2:" + Y + b"\r\nmaster_repl_offset:100\r\n"
    b"second_repl_offset:41\r\nrepl_backlog_active:1\r\n"
)
REPLICA = (
    b"# Replication\r\nrole:slave\r\nmaster_host:127.0.0.1\r\nmaster_port:7000\r\nmaster_link_status:up\r\n"
    b"master_last_io_seconds_ago:1\r\nmaster_sync_in_progress:0\r\nslave_read_repl_offset:95\r\n"
    b"slave_repl_offset:93\r\nconnected_slaves:0\r\nmaster_replid:" + X + b"\r\n"
    b"master_replid2:0000000000000000000000000000000000000000\r\nmaster_repl_offset:93\r\n"
    b"second_repl_offset:-1\r\n"
)


def bulk(body: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(body), body)


def verbatim(body: bytes) -> bytes:
    return b"=%d\r\ntxt:%b\r\n" % (len(body) + 4, body)


@pytest.mark.parametrize("framed", [bulk, verbatim])
def test_a_primary_tells_what_it_has_written_and_where_its_history_began(framed) -> None:
    assert parse_sample(framed(PRIMARY)) == Sample(True, Point(X, 100), Point(Y, 41))


@pytest.mark.parametrize("framed", [bulk, verbatim])
def test_a_replica_tells_what_it_has_applied_not_what_it_has_read(framed) -> None:
    sample = parse_sample(framed(REPLICA))
    assert (sample.is_primary, sample.point, sample.is_syncing, sample.link_up) == (
        False,
        Point(X, 93),
        False,
        True,
    )


def test_a_replica_in_a_full_synchronisation_and_one_whose_link_is_down() -> None:
    assert parse_sample(bulk(REPLICA.replace(b"in_progress:0", b"in_progress:1"))).is_syncing
    assert not parse_sample(bulk(REPLICA.replace(b"status:up", b"status:down"))).link_up


@pytest.mark.parametrize(
    "reply",
    [
        b"-NOPERM User default has no permissions to run the 'info' command\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        bulk(b"# Replication\r\nrole:slave\r\n"),
        bulk(PRIMARY.replace(b"master_repl_offset:100", b"master_repl_offset:many")),
        bulk(PRIMARY.replace(b"master_repl_offset:100\r\n", b"")),
        b"$-1\r\n",
    ],
)
def test_what_is_no_sample_is_refused(reply: bytes) -> None:
    with pytest.raises(SampleError):
        parse_sample(reply)


def test_offsets_of_different_histories_are_never_compared() -> None:
    assert covers(Point(X, 10), Point(X, 10))
    assert not covers(Point(X, 9), Point(X, 10))
    assert not covers(Point(Y, 1000), Point(X, 10))


def test_a_promoted_replica_holds_what_it_had_of_its_former_history() -> None:
    promoted = Sample(True, Point(X, 100), Point(Y, 41))
    assert holds(promoted, Point(Y, 40))  # the last byte that it had applied
    assert not holds(promoted, Point(Y, 41))
    assert holds(promoted, Point(X, 100))
    assert not holds(promoted, Point(X, 101))
    assert not holds(promoted, Point(b"c" * 40, 1))


def test_a_new_history_forgets_the_old_one() -> None:
    history = OffsetHistory(60)
    history.add(1.0, Point(X, 10))
    history.add(2.0, Point(Y, 5))
    assert history.proven_until(Point(X, 1000)) is None
    assert history.proven_until(Point(Y, 5)) == 2.0
    assert history.proven_until(Point(Y, 4)) is None


def test_what_is_older_than_it_keeps_is_forgotten_but_for_the_newest() -> None:
    history = OffsetHistory(10)
    history.add(1.0, Point(X, 10))
    history.add(20.0, Point(X, 20))
    assert history.proven_until(Point(X, 15)) is None
    history.add(100.0, Point(X, 30))
    assert history.proven_until(Point(X, 30)) == 100.0


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=20),
    st.integers(0, 31),
)
def test_the_newest_proof_is_found_whatever_the_order(pairs: list[tuple[int, int]], stamp: int) -> None:
    """Against the definition: the newest time whose offset the stamp has reached."""
    history = OffsetHistory(1000)
    for time, offset in pairs:
        history.add(float(time), Point(X, offset))
    expected = max((float(time) for time, offset in pairs if offset <= stamp), default=None)
    assert history.proven_until(Point(X, stamp)) == expected
