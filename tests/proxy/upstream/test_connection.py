"""Promises 5 and 6 at one node's connection: replies go to slots in order, and what was lost is told truly."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.hub import TICK_SECONDS, Hub
from proxy.protocol.encode import frame
from proxy.upstream.abandoned import Abandoned
from proxy.upstream.connection import NodeConnection
from proxy.upstream.load import NodeLoad
from proxy.upstream.reply_slot import ConnectionLostError, Slot
from routing.topology import Address

ADDRESS = Address("node", 7000)


class RecordingSlot(Slot):
    """A slot that writes down what became of it, exactly once."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.hash_slot = -1
        self.requester = None
        self.reply: bytes | None = None
        self.lost: bool | None = None  # ``sent``

    def on_reply(self, reply: bytes, connection: NodeConnection) -> None:
        assert self.reply is None
        assert self.lost is None
        self.reply = reply

    def on_lost(self, sent: bool, connection: NodeConnection) -> None:
        assert self.reply is None
        assert self.lost is None
        self.lost = sent


@dataclass
class Pair:
    """A connection in a hub and the node's end of it."""

    unsent_bytes_max: int = 1 << 20
    closed: list[str] = field(default_factory=list)
    pushes: list[bytes] = field(default_factory=list)
    readies: int = 0

    def __post_init__(self) -> None:
        self.hub = Hub(time.monotonic)
        self.abandoned = Abandoned()
        near, self.far = socket.socketpair()
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.far.setblocking(False)
        self.connection = NodeConnection(
            self.hub,
            near,
            ADDRESS,
            unsent_bytes_max=self.unsent_bytes_max,
            on_closed=lambda connection, reason: self.closed.append(reason),
            on_ready=self._on_ready,
            on_push=self.pushes.append,
            client_id=7,
            abandoned=self.abandoned,
        )

    def _on_ready(self) -> None:
        self.readies += 1

    def turns(self) -> None:
        while self.hub.turn():
            pass

    def close(self) -> None:
        self.connection.close("end of test")
        self.far.close()
        self.hub.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


REPLIES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"+OK\r\n",
                b":1\r\n",
                b"$-1\r\n",
                b"*0\r\n",
                b"-MOVED 1 h:1\r\n",
                b"*2\r\n$1\r\na\r\n*1\r\n:3\r\n",
            ]
        ),
        st.binary(max_size=40).map(lambda body: b"$%d\r\n%b\r\n" % (len(body), body)),
        st.just(b"$5000\r\n" + b"x" * 5000 + b"\r\n"),
        st.just(b">2\r\n+push\r\n:1\r\n"),
    ),
    max_size=12,
)


@given(REPLIES, st.lists(st.integers(1, 60), min_size=1, max_size=10))
def test_replies_match_slots_in_order_however_they_are_cut(replies: list[bytes], sizes: list[int]) -> None:
    """Promise 6; pushes take no slot."""
    pair = Pair()
    try:
        owed = [RecordingSlot(b"x") for reply in replies if reply[:1] != b">"]
        for slot in owed:
            pair.connection.queue(slot)
        data = b"".join(replies)
        place = looks = 0
        while place < len(data):
            size = sizes[looks % len(sizes)] if len(data) < 1000 else 700
            looks += 1
            pair.far.sendall(data[place : place + size])
            place += size
            pair.turns()
        assert not pair.closed
        assert [slot.reply for slot in owed] == [reply for reply in replies if reply[:1] != b">"]
        assert pair.pushes == [reply for reply in replies if reply[:1] == b">"]
        assert not pair.connection.owed
    finally:
        pair.close()


def test_what_is_queued_in_one_turn_goes_out_in_order(pair: Pair) -> None:
    pair.connection.queue(RecordingSlot(b"a"))
    pair.connection.queue_asking(RecordingSlot(b"b"))
    assert pair.far.recv(100) == b"a*1\r\n$6\r\nASKING\r\nb"
    assert len(pair.connection.owed) == 3


@pytest.mark.parametrize("bad", [b"+OK\r\n", b"$x\r\n", b"?\r\n", b"*1\r\n?1\r\n"])
def test_lost_framing_ends_the_connection(pair: Pair, bad: bytes) -> None:
    """A reply that nothing asked for, or none at all: whatever follows could reach the wrong client (promise 6)."""
    slots = [RecordingSlot(b"a"), RecordingSlot(b"b")]
    for slot in slots:
        pair.connection.queue(slot)
    pair.far.sendall(b"+1\r\n+2\r\n" + bad if bad == b"+OK\r\n" else b"+1\r\n" + bad)
    pair.turns()
    assert slots[0].reply == b"+1\r\n"
    assert slots[1].lost is (None if bad == b"+OK\r\n" else True)
    assert len(pair.closed) == 1
    assert pair.closed[0].startswith("framing lost")
    assert pair.hub.faults_total == 0


def test_backpressure_and_its_end() -> None:
    """Promise 7: past unsent_bytes_max the connection takes no more, and says so when half of it has gone."""
    pair = Pair(unsent_bytes_max=100_000)
    try:
        while pair.connection.ready:
            pair.connection.queue(RecordingSlot(b"x" * 10_000))
        pair.turns()
        assert 100_000 < pair.connection._backlog_bytes <= 110_000
        assert pair.readies == 0
        while not pair.connection.ready:
            assert len(pair.far.recv(1000)) > 0
            pair.turns()
        assert pair.connection._backlog_bytes <= 50_000
        assert pair.readies == 1
        received = 0
        while pair.connection._backlog_bytes:
            received += len(pair.far.recv(1 << 16))
            pair.turns()
        assert pair.readies == 1
        assert not pair.closed
    finally:
        pair.close()


@given(
    st.lists(st.one_of(st.integers(1, 50), st.integers(3000, 30_000)), min_size=1, max_size=8),
    st.integers(0, 120_000),
    st.integers(0, 8),
    st.sampled_from(["node closes", "we close"]),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_lost_requests_are_told_whether_they_were_sent(
    lengths: list[int], read: int, answered: int, how: str
) -> None:
    """Promise 5: a request that is said to be unsent, and may be sent again, was not seen by the node in any part."""
    pair = Pair()
    try:
        slots = [RecordingSlot(bytes([65 + n]) * length) for n, length in enumerate(lengths)]
        for slot in slots:
            pair.connection.queue(slot)
        pair.turns()
        seen = b""
        while len(seen) < read:
            try:
                seen += pair.far.recv(min(4096, read - len(seen)))
            except BlockingIOError:
                break
            pair.turns()
        whole = 0  # requests that the node has read whole, and so could answer
        while whole < len(slots) and sum(lengths[: whole + 1]) <= len(seen):
            whole += 1
        answered = min(answered, whole)
        pair.far.sendall(b"+OK\r\n" * answered)
        pair.turns()
        if how == "we close":
            pair.connection.close("test")
            while True:  # what had left could still be read and run
                data = pair.far.recv(1 << 20)
                if not data:
                    break
                seen += data
        else:
            pair.far.close()
            pair.turns()
        assert pair.connection.is_closed
        assert len(pair.closed) == 1
        for n, slot in enumerate(slots):
            if n < answered:
                assert (slot.reply, slot.lost) == (b"+OK\r\n", None)
            else:
                assert slot.reply is None
                assert slot.lost is not None
                if slot.lost is False:
                    assert slot.raw[:1] not in seen
                elif how == "we close":  # and no needless OUTCOMEUNKNOWN: some byte of it did leave
                    assert slot.raw[:1] in seen
    finally:
        pair.close()


def test_overdue_counts_from_when_a_request_was_first_seen(pair: Pair) -> None:
    """Promise 8: a silent node is found within the deadline and a beat, a busy one that answers is left alone."""
    slots = [RecordingSlot(b"x") for _ in range(3)]
    pair.connection.queue(slots[0])
    assert not pair.connection.overdue(10.0, 5.0)
    pair.connection.queue(slots[1])
    assert not pair.connection.overdue(12.0, 5.0)
    assert not pair.connection.overdue(14.9, 5.0)
    pair.far.sendall(b"+1\r\n")
    pair.turns()
    assert not pair.connection.overdue(15.5, 5.0)  # the first is answered, the second is 3.5 s old
    assert pair.connection.overdue(17.1, 5.0)
    pair.far.sendall(b"+2\r\n")
    pair.turns()
    assert not pair.connection.overdue(30.0, 5.0)
    assert not pair.connection.overdue(60.0, 5.0)


@pytest.mark.parametrize("kind", [b"$3000\r\n", b"*3\r\n$3000\r\n"], ids=["bulk", "array"])
def test_a_node_whose_large_reply_is_coming_is_not_overdue(pair: Pair, kind: bytes) -> None:
    """It would lose all that others wait for on this connection; one that stops in the middle is ended."""
    pair.connection.queue(RecordingSlot(b"x"))
    assert not pair.connection.overdue(0.0, 1.0)
    for beat, part in enumerate((kind, b"a" * 1000, b"a" * 1000), 1):
        pair.far.sendall(part)
        pair.turns()
        assert not pair.connection.overdue(float(beat), 1.0)
    assert pair.connection.overdue(4.0, 1.0)


@given(st.lists(st.tuples(st.sampled_from(["queue", "answer", "look"]), st.floats(0.01, 2.0)), max_size=40))
def test_overdue_is_never_early_and_never_a_beat_late(steps: list[tuple[str, float]]) -> None:
    pair = Pair()
    try:
        now = 0.0
        seen_at: list[float | None] = []  # the first look at each unanswered request
        for step, pause in steps:
            now += pause
            if step == "queue":
                pair.connection.queue(RecordingSlot(b"x"))
                seen_at.append(None)
            elif step == "answer" and seen_at:
                pair.far.sendall(b"+\r\n")
                pair.turns()
                seen_at.pop(0)
            elif step == "look":
                seen_at = [now if at is None else at for at in seen_at]
                overdue = pair.connection.overdue(now, 3.0)
                assert overdue == any(at is not None and at <= now - 3.0 for at in seen_at)
                if overdue:  # then it is closed
                    break
    finally:
        pair.close()


async def test_a_request_on_a_closed_connection_was_not_sent(pair: Pair) -> None:
    pair.connection.close("test")
    with pytest.raises(ConnectionLostError) as lost:
        await pair.connection.request(frame([b"PING"]))
    assert lost.value.sent is False


def test_a_large_reply_of_many_parts_costs_linear_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 7: what is joined from chunks and looked at anew stays a small multiple of the reply."""
    joined = 0
    original = NodeConnection._read_replies

    def counting(self: NodeConnection, buffer: bytes) -> int:
        nonlocal joined
        joined += len(buffer)
        return original(self, buffer)

    monkeypatch.setattr(NodeConnection, "_read_replies", counting)
    slot = RecordingSlot(b"x")
    pair.connection.queue(slot)
    pair.turns()
    reply = b"*3000\r\n" + (b"$1000\r\n" + b"v" * 1000 + b"\r\n") * 3000
    for at in range(0, len(reply), 30_000):
        pair.far.sendall(reply[at : at + 30_000])
        pair.turns()
    assert slot.reply == reply
    assert joined < 3 * len(reply)


def test_what_is_queued_on_a_closed_connection_is_lost_at_once(pair: Pair) -> None:
    """Else nobody would ever answer it."""
    pair.connection.close("gone")
    slots = [RecordingSlot(b"a"), RecordingSlot(b"b"), RecordingSlot(b"c")]
    pair.connection.queue(slots[0])
    pair.connection.queue_all(slots[1:])
    assert [slot.lost for slot in slots] == [False, False, False]
    assert not pair.connection.owed


# -- abandoned


def pending(pair: Pair) -> list[tuple[int, str]]:
    return [(entry.client_id, entry.reason) for entry in pair.abandoned.pending()]


def test_a_connection_that_is_closed_with_a_request_open_is_abandoned(pair: Pair) -> None:
    """The node may execute it later; who is told that it is lost finds the connection listed."""
    seen: list[list[tuple[int, str]]] = []

    class Looking(RecordingSlot):
        def on_lost(self, sent: bool, connection: NodeConnection) -> None:
            super().on_lost(sent, connection)
            seen.append(pending(pair))

    pair.connection.queue(Looking(b"a"))
    assert pair.abandoned.is_open(ADDRESS, 7)
    pair.connection.close("no reply within 5 s")
    pair.connection.close("again")
    assert seen == [[(7, "no reply within 5 s")]] == [pending(pair)]
    assert not pair.abandoned.is_open(ADDRESS, 7)


def test_one_that_the_node_ended_counts_too(pair: Pair) -> None:
    """What stands between may have ended it in the node's name."""
    pair.connection.queue(RecordingSlot(b"a"))
    pair.far.recv(10)
    pair.far.close()
    pair.turns()
    assert pending(pair) == [(7, "closed by the node")]


def test_one_of_which_everything_is_answered_is_not_abandoned(pair: Pair) -> None:
    pair.connection.queue(RecordingSlot(b"a"))
    pair.far.sendall(b"+OK\r\n")
    pair.turns()
    pair.connection.close("stopping")
    assert pending(pair) == []
    assert not pair.abandoned.is_open(ADDRESS, 7)


def test_one_whose_requests_never_left_is_not_abandoned(pair: Pair) -> None:
    slot = RecordingSlot(b"a")
    pair.hub._in_turn = True  # what is queued leaves at the end of the turn
    pair.connection.queue(slot)
    pair.connection.close("stopping")
    assert slot.lost is False
    assert pending(pair) == []


def test_one_of_which_a_part_left_is_abandoned(pair: Pair) -> None:
    """The node has the first request whole, and can execute it."""
    slots = [RecordingSlot(b"a"), RecordingSlot(b"b" * (1 << 20))]
    pair.connection.queue_all(slots)
    pair.connection.close("no reply")
    assert pending(pair) == [(7, "no reply")]


def test_one_that_only_reads_is_not_abandoned(pair: Pair) -> None:
    pair.connection.only_reads = True
    pair.connection.queue(RecordingSlot(b"a"))
    pair.connection.close("no reply")
    assert pending(pair) == []
    assert not pair.abandoned.is_open(ADDRESS, 7)


@pytest.mark.parametrize(
    "first", [b"*2\r\n$1\r\na\r\n$-1\r\n", b"*2\r\n$-1\r\n_\r\n", b"*2\r\n:1\r\n$1\r\na\r\n"]
)
def test_a_pair_that_comes_in_two_pieces_leaves_nothing_behind(first: bytes) -> None:
    """Wherever it is cut: the frame that follows is read as it is."""
    second = b"*3\r\n:1\r\n:2\r\n:3\r\n"
    whole = first + second + first
    for cut in range(1, len(whole)):
        pair = Pair()
        slots = [RecordingSlot(frame([b"PING"])) for _ in range(3)]
        pair.connection.queue_all(slots)
        for piece in (whole[:cut], whole[cut:]):
            pair.far.sendall(piece)
            pair.hub.turn()
        assert [slot.reply for slot in slots] == [first, second, first]
        pair.close()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_process_that_stood_still_does_not_make_its_node_look_slow(
    monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    """The reply comes at once and lies there; or it comes late, and is read at once."""
    found: list[tuple[float, float]] = []  # (round trip, how much of it the process was late)

    def on_round_trip(self: NodeLoad, seconds: float, in_flight: int, now: float, own_seconds: float) -> None:
        found.append((seconds, own_seconds))

    monkeypatch.setattr(NodeLoad, "on_round_trip", on_round_trip)
    hub = Hub(time.monotonic)
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far = server.accept()[0]
    near.setblocking(False)
    connection = NodeConnection(
        hub, near, ADDRESS, unsent_bytes_max=1 << 20, on_closed=lambda connection, reason: None
    )
    hub.now = hub.clock()
    connection.queue(RecordingSlot(frame([b"GET", b"k"])))
    if is_stopped:
        far.sendall(b"+OK\r\n")
    time.sleep(0.05)
    if not is_stopped:
        far.sendall(b"+OK\r\n")
    assert hub.turn()
    [(seconds, own_seconds)] = found
    assert seconds >= 0.05
    assert own_seconds >= 0.05 - 3 * TICK_SECONDS if is_stopped else own_seconds <= seconds - 0.05
    connection.close("end of test")
    far.close()
    hub.close()
