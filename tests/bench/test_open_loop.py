"""What the open loop holds for a wrong value, and what it makes of replies that do not come."""

from __future__ import annotations

import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.bench.open_loop import OpenLoop, Outcome, Phase, Stream, Values

KEY = b"key"


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def test_values_are_judged_by_what_was_acknowledged_and_sent() -> None:
    values = Values()
    first = values.prefilled(KEY)
    assert values.is_right(KEY, bulk(first), values.floor(KEY))
    second = values.begin_write(KEY)
    assert second is not None
    assert values.begin_write(KEY) is None
    assert values.is_right(KEY, bulk(first), values.floor(KEY))
    assert values.is_right(KEY, bulk(second), values.floor(KEY))
    values.acknowledge(KEY)
    assert not values.is_right(KEY, bulk(first), values.floor(KEY))  # stale
    assert not values.is_right(KEY, bulk(b"key|2"), values.floor(KEY))  # never written
    assert not values.is_right(KEY, bulk(b"other|1"), values.floor(KEY))
    refused = values.begin_write(KEY)
    assert refused is not None
    values.refuse(KEY)
    assert not values.is_right(KEY, bulk(refused), values.floor(KEY))
    assert values.begin_write(KEY) == refused


class Server(socketserver.ThreadingTCPServer):
    """Answers every GET with ``reply``, ``seconds`` later."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Client)
        self.reply = bulk(b"key|0")
        self.seconds = 0.0


class Client(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        while line := self.rfile.readline():
            for _ in range(int(line[1:])):
                self.rfile.readline(), self.rfile.readline()
            time.sleep(self.server.seconds)
            self.wfile.write(self.server.reply)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def outcomes(server: Server, rate: float = 200.0, connections: int = 4) -> tuple[Counter[Outcome], OpenLoop]:
    """Of half a second, with clients that give up after a fifth."""
    values = Values()
    values.prefilled(KEY)
    host, port = server.server_address[:2]
    load = OpenLoop((str(host), port), [Stream("all", "", connections, [KEY])], values, 0.2)
    load.run([Phase("all", 0.5, [rate])])
    return Counter(sample.outcome for sample in load.samples), load


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (bulk(b"key|0"), Outcome.ANSWERED),
        (b"$-1\r\n", Outcome.WRONG),
        (bulk(b"key|1"), Outcome.WRONG),
        (b"-OVERLOADED node h:1 is overloaded and so on (normal); retry after 12 ms\r\n", Outcome.SHED),
        (b"-ERR no\r\n", Outcome.FAILED),
    ],
)
def test_each_reply_is_counted_as_what_it_is(server: Server, reply: bytes, outcome: Outcome) -> None:
    server.reply = reply
    counted, load = outcomes(server)
    assert set(counted) == {outcome}
    assert {sample.retry_ms for sample in load.samples} == {12 if outcome is Outcome.SHED else -1}


def test_a_refusal_without_a_time_says_so(server: Server) -> None:
    server.reply = b"-OVERLOADED node h:1 is overloaded\r\n"
    _, load = outcomes(server)
    assert {sample.retry_ms for sample in load.samples} == {-1}


def test_a_wait_for_a_connection_counts(server: Server) -> None:
    """One connection that takes 50 ms for each of 80 a second: they queue, and most are given up."""
    server.seconds = 0.05
    counted, load = outcomes(server, rate=80.0, connections=1)
    assert counted[Outcome.TIMED_OUT] > 0
    waits = [sample.ended - sample.due for sample in load.samples if sample.outcome is Outcome.ANSWERED]
    assert max(waits) > 0.1
