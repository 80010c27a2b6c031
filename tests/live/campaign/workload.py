"""The load: fifty clients that read, write and check, in a process of their own.

Most clients have one request under way, a few pipeline eight; half speak RESP3. Each is paced, so that the
same load is offered in every phase and a phase's latencies can be compared with another's. The parent names
the phases on stdin, one JSON object a line, and reads answers on stdout:

    {"phase": NAME} -> {"phase": NAME}     {"finish": true} -> the result     end of stdin: stop at once

A request belongs to the phase in which it was sent; its latency is the time until its reply was read.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import trio

from tests.live.campaign.keys import COMMON_READS, FAMILIES, Fault, FaultKind, Key, Keys, Request
from tests.live.campaign.resp import BadReply, Connection, ErrorReply, Reply, frame

PIPELINE_DEPTH = 8
EXAMPLES_MAX = 5  # faults told in full, for each kind
PREFILL_BATCH = 200
PREPARE_SECONDS = 60.0
KINDS_OF_MANY_DRAWS = 50  # as many as show each kind
MANY_SHARE = 0.12  # of reads, and of writes, those of several keys
RECONNECT_SECONDS = 0.1
SCAN_PAUSE_SECONDS = 3.0
SCAN_COUNT = 500
SCAN_CALLS_MAX = 10_000  # more than any iteration over the keys of a run needs
DELAY_PROBE_SECONDS = 0.01
LEAKED_CODES = (b"MOVED", b"ASK", b"TRYAGAIN", b"CLUSTERDOWN", b"CROSSSLOT")
BOUND_TOGETHER = ("EVAL", "EXEC")  # labels of what needs all its keys on one node
OUTCOME_UNKNOWN = b"OUTCOMEUNKNOWN"
GONE = (trio.BrokenResourceError, trio.ClosedResourceError, BadReply, OSError)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    host: str
    port: int
    slots: tuple[int, ...]
    keys_per_slot: int = 1000
    clients: int = 50
    pipelined: int = 5  # how many of the clients pipeline
    rate: float = 1500.0  # requests per second of all clients together
    write_share: float = 0.3
    scans: bool = True  # one more client iterates over all keys, which is work that others' latency shows
    deadline_seconds: float = 8.0  # a reply that takes longer counts as a hang
    seed: int = 0


@dataclass(slots=True)
class Phase:
    """What was seen in all stretches of one name."""

    seconds: float = 0.0
    reads: int = 0
    writes: int = 0
    faults: Counter[FaultKind] = field(default_factory=Counter)
    faults_of: Counter[tuple[str, FaultKind]] = field(default_factory=Counter)
    latencies: dict[str, array[float]] = field(default_factory=dict)  # label -> seconds
    # Seconds, of requests sent alone, EVAL and EXEC left out: while their keys are on two nodes, those can only
    # wait, and what is pipelined behind one waits with it.
    free_latencies: array[float] = field(default_factory=lambda: array("d"))
    free_read_latencies: array[float] = field(default_factory=lambda: array("d"))  # the reads among them
    delays: array[float] = field(default_factory=lambda: array("d"))  # how late this process itself ran

    def summary(self) -> dict[str, Any]:
        every = sorted(latency for of_label in self.latencies.values() for latency in of_label)
        return {
            "seconds": round(self.seconds, 2),
            "reads": self.reads,
            "writes": self.writes,
            "faults": {kind.value: self.faults[kind] for kind in FaultKind},
            "faults_of": {f"{label}: {kind.value}": n for (label, kind), n in self.faults_of.most_common()},
            "latency_ms": percentiles(every),
            "free_latency_ms": percentiles(sorted(self.free_latencies)),
            "free_read_latency_ms": percentiles(sorted(self.free_read_latencies)),
            "latency_ms_of": {label: percentiles(sorted(of)) for label, of in sorted(self.latencies.items())},
            "own_delay_ms": percentiles(sorted(self.delays)),
        }


def percentiles(ordered: Sequence[float]) -> dict[str, float]:
    """Of seconds in ascending order, in milliseconds: the nearest-rank percentiles."""
    if not ordered:
        return {"count": 0}
    ranks = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    found = {
        name: ordered[min(len(ordered) - 1, int(rank * len(ordered)))] * 1000 for name, rank in ranks.items()
    }
    found |= {"max": ordered[-1] * 1000}
    return {"count": len(ordered), **{name: round(value, 3) for name, value in found.items()}}


class Load:
    """The clients and what they saw."""

    def __init__(self, options: LoadOptions) -> None:
        self.options = options
        self.keys = Keys(options.slots, options.keys_per_slot, options.clients)
        self.phases: dict[str, Phase] = {}
        self.examples: dict[FaultKind, list[str]] = {}
        self.unsupported: dict[str, str] = {}  # label -> what the target said
        self.resp3 = True
        self.scans = 0
        self.phase = Phase()  # before the first has a name; told nowhere
        self._phase_began = perf_counter()
        self._stopping = False

    # --- before the load ---

    async def prepare(self) -> None:
        """Finds out what the target can do, then writes version 0 of each key.

        Raises BadReply, OSError, trio.BrokenResourceError, or trio.TooSlowError for a silent target.
        """
        options = self.options
        with trio.fail_after(PREPARE_SECONDS):
            try:
                connection = await Connection.open(options.host, options.port, resp3=True)
            except BadReply as problem:
                self.resp3 = False
                self.unsupported["HELLO 3"] = str(problem)
                connection = await Connection.open(options.host, options.port)
            try:
                await self._probe(connection)
                await self._prefill(connection)
                await self._probe_the_rest(connection)
            finally:
                await connection.aclose()

    async def _probe(self, connection: Connection) -> None:
        """Every kind of request once. Families that cannot be written are left out of the load."""
        for family in FAMILIES:
            key = next(key for key in self.keys.all if key.family is family)
            if not await self._can_write(connection, key):
                self.keys.all = [key for key in self.keys.all if key.family is not family]
                continue
            for _, build in (*family.reads, *COMMON_READS):
                await self._can_do(connection, build(key, key.owner))
        self.keys.index()

    async def _probe_the_rest(self, connection: Connection) -> None:
        """What `_probe` leaves: requests of several keys, which need all keys to be there, and SCAN."""
        rng = random.Random(self.options.seed)
        for _ in range(KINDS_OF_MANY_DRAWS):
            for request in (self.keys.read_many(0, rng), self.keys.write_many(0, rng)):
                if request is not None:
                    await self._can_do(connection, request)
        await self._can_do(connection, Request("SCAN", frame([b"SCAN", 0, b"COUNT", 1]), lambda replies: []))

    async def _can_write(self, connection: Connection, key: Key) -> bool:
        for payload in key.family.create(key):
            create = Request(f"create {key.family.stem.decode()}", payload, lambda replies: [])
            if not await self._can_do(connection, create):
                return False
        for _ in range(8):  # as many as show each kind of write
            request = key.family.write(key)
            if not await self._can_do(connection, request):
                return False
        return True

    async def _can_do(self, connection: Connection, request: Request) -> bool:
        """Whether the target knows the request. Raises BadReply when its reply is wrong even now."""
        replies = await connection.exchange(request.payload, request.reply_count)
        refusal = next((reply for reply in replies if isinstance(reply, ErrorReply)), None)
        if refusal is not None:
            self.unsupported[request.label] = refusal.decode(errors="replace")
            self.keys.unsupported.add(request.label)
            return False
        if faults := request.check(replies):
            raise BadReply(
                f"{request.label} before the load began: {faults[0].kind.value}: {faults[0].detail}"
            )
        return True

    async def _prefill(self, connection: Connection) -> None:
        firsts = {key.family: key for key in reversed(self.keys.all)}  # these the probe has made
        payloads = [
            payload
            for key in self.keys.all
            if firsts[key.family] is not key
            for payload in key.family.create(key)
        ]
        for start in range(0, len(payloads), PREFILL_BATCH):
            batch = payloads[start : start + PREFILL_BATCH]
            for reply in await connection.exchange(b"".join(batch), len(batch)):
                if isinstance(reply, ErrorReply):
                    raise BadReply(f"prefill: {reply.decode(errors='replace')}")

    # --- the load ---

    async def run(self) -> None:
        """Load until `finish`."""
        async with trio.open_nursery() as clients:
            for number in range(self.options.clients):
                clients.start_soon(self._client, number)
            if self.options.scans and "SCAN" not in self.keys.unsupported:
                clients.start_soon(self._scanner)
            clients.start_soon(self._delay_probe)

    def enter(self, name: str) -> None:
        """Requests sent from now on belong to the phase ``name``."""
        self._leave()
        self.phase = self.phases.setdefault(name, Phase())

    def finish(self) -> None:
        """Each client ends after the requests that it has under way."""
        self._leave()
        self._stopping = True

    def _leave(self) -> None:
        now = perf_counter()
        self.phase.seconds += now - self._phase_began
        self._phase_began = now

    def result(self) -> dict[str, Any]:
        return {
            "seed": self.options.seed,
            "keys": self.keys.count,
            "slots": list(self.options.slots),
            "resp3": self.resp3,
            "scans": self.scans,
            "unsupported": self.unsupported,
            "phases": {name: phase.summary() for name, phase in self.phases.items()},
            "examples": {kind.value: told for kind, told in self.examples.items()},
        }

    async def _client(self, number: int) -> None:
        options = self.options
        rng = random.Random(f"{options.seed}/{number}")
        depth = PIPELINE_DEPTH if number < options.pipelined else 1
        pause = options.clients / options.rate * depth
        due = trio.current_time() + rng.random() * pause
        connection: Connection | None = None
        try:
            while True:
                await trio.sleep_until(due)
                if self._stopping:
                    return
                if connection is None:
                    connection = await self._connected(resp3=self.resp3 and number % 2 == 1)
                if connection is not None:
                    requests = [self._draw(number, rng) for _ in range(depth)]
                    if not await self._perform(connection, requests):
                        await connection.aclose()
                        connection = None
                # A client that fell behind does not catch up: that would be another load.
                due = max(trio.current_time(), due + rng.uniform(0.5, 1.5) * pause)
        finally:
            if connection is not None:
                await connection.aclose_forcefully()  # noqa: ASYNC102  # it does not wait

    async def _connected(self, *, resp3: bool) -> Connection | None:
        """A connection, or None after counting what went wrong and a pause."""
        try:
            with trio.move_on_after(self.options.deadline_seconds):
                return await Connection.open(self.options.host, self.options.port, resp3=resp3)
            self._count("connect", Fault(FaultKind.HANG, "no connection within the deadline"), self.phase)
        except GONE as problem:
            self._count("connect", Fault(FaultKind.ERROR, str(problem)), self.phase)
        await trio.sleep(RECONNECT_SECONDS)
        return None

    def _draw(self, client: int, rng: random.Random) -> Request:
        request = None
        draw = rng.random()
        if draw < self.options.write_share:
            many = rng.random() < MANY_SHARE
            request = self.keys.write_many(client, rng) if many else self.keys.write(client, rng)
        elif draw < self.options.write_share + MANY_SHARE:
            request = self.keys.read_many(client, rng)
        return request or self.keys.read(client, rng)

    async def _perform(self, connection: Connection, requests: Sequence[Request]) -> bool:
        """Send all at once and judge each reply in turn. False: the connection is spent."""
        phase = self.phase
        phase.writes += sum(1 for request in requests if request.writes)
        phase.reads += sum(1 for request in requests if not request.writes)
        unanswered = list(reversed(requests))
        began = perf_counter()
        try:
            with trio.move_on_after(self.options.deadline_seconds):
                await connection.send(b"".join([request.payload for request in requests]))
                while unanswered:
                    request = unanswered[-1]
                    replies = [await connection.next_reply() for _ in range(request.reply_count)]
                    unanswered.pop()
                    seconds = perf_counter() - began
                    phase.latencies.setdefault(request.label, array("d")).append(seconds)
                    if len(requests) == 1 and not request.label.startswith(BOUND_TOGETHER):
                        phase.free_latencies.append(seconds)
                        if not request.writes:
                            phase.free_read_latencies.append(seconds)
                    self._judge(request, replies, phase)
                return True
            fault = Fault(FaultKind.HANG, f"no reply within {self.options.deadline_seconds} s")
        except GONE as problem:
            fault = Fault(FaultKind.ERROR, f"connection lost: {problem}")
        for request in unanswered:
            self._count(request.label, fault, phase)
            for key in request.writes:
                key.is_certain = False
        return False

    def _judge(self, request: Request, replies: list[Reply], phase: Phase) -> None:
        refusals = list(refusals_in(replies))
        if refusals:
            for key in request.writes:
                key.alive = False  # of a key that is churned, the next write creates it again
                if refusals[0].startswith(OUTCOME_UNKNOWN):
                    key.is_certain = False
            code = refusals[-1].split(b" ", 1)[0]
            kind = FaultKind.LEAKED if any(r.startswith(LEAKED_CODES) for r in refusals) else FaultKind.ERROR
            shown = b" / ".join(refusals) if code == b"EXECABORT" else refusals[0]
            self._count(request.label, Fault(kind, shown.decode(errors="replace")), phase)
            return
        for fault in request.check(replies):
            self._count(request.label, fault, phase)

    def _count(self, label: str, fault: Fault, phase: Phase) -> None:
        phase.faults[fault.kind] += 1
        phase.faults_of[label, fault.kind] += 1
        told = self.examples.setdefault(fault.kind, [])
        if len(told) < EXAMPLES_MAX:
            told.append(f"{label}: {fault.detail}")

    async def _scanner(self) -> None:
        """Full iterations, each on a connection of its own; every key that is never deleted must appear."""
        while not self._stopping:
            with trio.move_on_after(SCAN_PAUSE_SECONDS) as pause:
                while not self._stopping:
                    await trio.sleep(0.05)
            if not pause.cancelled_caught:
                return
            phase = self.phase
            connection = await self._connected(resp3=self.resp3)
            if connection is None:
                continue
            try:
                await self._scan(connection, phase)
            except GONE as problem:
                self._count("SCAN", Fault(FaultKind.ERROR, f"connection lost: {problem}"), phase)
            finally:
                await connection.aclose_forcefully()  # noqa: ASYNC102  # it does not wait

    async def _scan(self, connection: Connection, phase: Phase) -> None:
        """One iteration. Raises what `Connection.exchange` raises."""
        seen: set[Reply] = set()
        cursor = b"0"
        for _ in range(SCAN_CALLS_MAX):
            began = perf_counter()
            reply: Reply = None
            with trio.move_on_after(self.options.deadline_seconds) as deadline:
                [reply] = await connection.exchange(frame([b"SCAN", cursor, b"COUNT", SCAN_COUNT]), 1)
            if deadline.cancelled_caught:
                self._count("SCAN", Fault(FaultKind.HANG, "no reply within the deadline"), phase)
                return
            phase.reads += 1
            phase.latencies.setdefault("SCAN", array("d")).append(perf_counter() - began)
            match reply:
                case ErrorReply():
                    self._judge(Request("SCAN", b"", lambda replies: []), [reply], phase)
                    return
                case [bytes(cursor), list(names)]:
                    seen.update(name for name in names if isinstance(name, bytes))
                case _:
                    self._count("SCAN", Fault(FaultKind.WRONG, f"{reply!r}"[:200]), phase)
                    return
            if cursor == b"0":
                break
        else:
            self._count("SCAN", Fault(FaultKind.WRONG, f"no end after {SCAN_CALLS_MAX} calls"), phase)
            return
        self.scans += 1
        for name in self.keys.steady_names - seen:
            self._count("SCAN", Fault(FaultKind.MISSED, f"{name.decode()} did not appear"), phase)

    async def _delay_probe(self) -> None:
        """How late this process runs what is due: the part of a latency that is not the target's."""
        while not self._stopping:
            due = trio.current_time() + DELAY_PROBE_SECONDS
            await trio.sleep_until(due)
            self.phase.delays.append(trio.current_time() - due)


def refusals_in(replies: Sequence[Reply]) -> Iterator[ErrorReply]:
    """The error replies, those inside arrays too."""
    for reply in replies:
        if isinstance(reply, ErrorReply):
            yield reply
        elif isinstance(reply, list):
            yield from refusals_in(reply)


async def main(options: LoadOptions) -> None:
    """The load's process: prepare, say what was found, obey stdin."""
    load = Load(options)
    await load.prepare()
    gc.collect()
    gc.freeze()  # the keys stay for ever; looking at them again would only add pauses
    say({"ready": True, "keys": load.keys.count, "unsupported": load.unsupported})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        async for line in lines_of(trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))):
            wanted = json.loads(line)
            if "finish" in wanted:
                break
            load.enter(wanted["phase"])
            say({"phase": wanted["phase"]})
        else:
            nursery.cancel_scope.cancel()  # the parent is gone
        load.finish()
    say(load.result())


async def lines_of(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    buffered = b""
    async with stream:
        async for data in stream:
            *lines, buffered = (buffered + data).split(b"\n")
            for line in lines:
                yield line  # noqa: ASYNC119  # its one reader drains it


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def parse_options(arguments: Sequence[str] | None = None) -> LoadOptions:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", help="LoadOptions as a JSON object")
    given = json.loads(parser.parse_args(arguments).options)
    return LoadOptions(**{**given, "slots": tuple(given["slots"])})


if __name__ == "__main__":
    trio.run(main, parse_options())
