"""What clients saw becomes a history that says neither more nor less. The servers here are dictionaries."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from tests.linearizability.checker import Kind, check
from tests.linearizability.recorder import WEIGHTS, Recorder, Refused, command_of, result_of
from tests.live.campaign.resp import BadReply, ErrorReply, Reply, frame, parse

KEYS = [b"a", b"b"]
LOAD_SECONDS = 0.1


class Register:
    """A server that takes each request up at some moment. ``distort`` may replace its replies."""

    def __init__(self, distort: Callable[[bytes, Reply], Reply] = lambda name, reply: reply) -> None:
        self._values: dict[bytes, int] = {}
        self._distort = distort
        self._rng = random.Random(1)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Register]:
        yield self

    async def ask(self, key: bytes, is_read: bool, request: bytes) -> Reply:
        await trio.sleep(self._rng.random() * 0.002)
        words, _ = parse(request, 0)
        assert isinstance(words, list)
        reply = self._distort(bytes(words[0]), self._perform(*words))  # type: ignore[arg-type]
        await trio.sleep(self._rng.random() * 0.002)
        return reply

    def _perform(self, name: bytes, key: bytes, *rest: bytes) -> Reply:
        value = self._values.get(key)
        match name, rest:
            case b"GET", ():
                return None if value is None else b"%d" % value
            case b"SET", (argument, *condition):
                if condition and value is not None:
                    return None
                self._values[key] = int(argument)
                return b"OK"
            case b"INCR", ():
                self._values[key] = (value or 0) + 1
                return self._values[key]
            case b"DEL", ():
                return int(self._values.pop(key, None) is not None)
        raise AssertionError(name)


async def recorded(register: Register) -> Recorder:
    """A short load of eight clients."""
    recorder = Recorder(KEYS)
    await recorder.create_keys(register)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.run, [register.opened] * 8)
        await trio.sleep(LOAD_SECONDS)
        recorder.stop()
    return recorder


async def test_a_register_is_linearizable() -> None:
    recorder = await recorded(Register())
    assert check(recorder.operations) == []
    assert not recorder.refused
    assert {operation.kind for operation in recorder.operations} >= {Kind.READ, Kind.WRITE, Kind.INCREMENT}
    assert recorder.reads > 30
    overlapping = sum(
        first.key == second.key and second.called_at < (first.returned_at or 0.0)
        for first, second in zip(recorder.operations, recorder.operations[1:], strict=False)
    )
    assert overlapping > 30  # concurrent on one key, or nothing would be shown


async def test_a_reply_of_before_is_found() -> None:
    """A server that now and then repeats its reply to a read of some time ago."""
    seen: list[Reply] = []
    rng = random.Random(2)

    def distort(name: bytes, reply: Reply) -> Reply:
        if name != b"GET":
            return reply
        seen.append(reply)
        return seen[-40] if len(seen) > 40 and rng.random() < 0.1 else reply

    assert check((await recorded(Register(distort))).operations)


async def test_lost_replies_leave_unknown_outcomes() -> None:
    """OUTCOMEUNKNOWN is no refusal; the write may have happened, and here it did."""
    rng = random.Random(3)

    def distort(name: bytes, reply: Reply) -> Reply:
        return ErrorReply(b"OUTCOMEUNKNOWN so it is") if name != b"GET" and rng.random() < 0.05 else reply

    recorder = await recorded(Register(distort))
    assert check(recorder.operations) == []
    assert not recorder.refused
    assert any(not operation.is_known for operation in recorder.operations)
    assert all(operation.is_known for operation in recorder.operations if operation.kind is Kind.READ)


async def test_a_connection_that_breaks_is_counted_and_opened_again() -> None:
    rng = random.Random(4)

    def distort(name: bytes, reply: Reply) -> Reply:
        if rng.random() < 0.02:
            raise trio.BrokenResourceError("cut")
        return reply

    register = Register()
    recorder = Recorder(KEYS)
    await recorder.create_keys(register)
    register._distort = distort
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.run, [register.opened] * 8)
        await trio.sleep(LOAD_SECONDS)
        recorder.stop()
    assert recorder.refused["connection lost: cut"] > 0
    assert check(recorder.operations) == []


async def test_refusals_are_counted() -> None:
    """An error is counted in its words, and keys that cannot be written end the run at its beginning."""
    recorder = Recorder(KEYS)
    with pytest.raises(Refused, match="MOVED 7"):
        await recorder.create_keys(Register(lambda name, reply: ErrorReply(b"MOVED 7")))
    assert recorder.refused == {"MOVED 7": 2}


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_a_reply_that_the_command_cannot_have_is_no_history(kind: Kind) -> None:
    assert frame(command_of(kind, b"k", 1))
    with pytest.raises(BadReply):
        result_of(kind, b"rubbish")
