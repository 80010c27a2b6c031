"""Compares keys of a replica with its primary's, over the connections that both have. See ``routing.comparison``.

A comparison costs each node some pipelines of a few commands for each key. It never raises for what a node does: a
comparison that cannot be finished says why in its outcome, and has shown nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from proxy.protocol.encode import command, frame
from proxy.protocol.replies import ReplyError, ServerError, decode
from proxy.upstream.connection import NodeConnection
from proxy.upstream.reply_slot import ConnectionLostError, Waiter
from routing.comparison import (
    WHOLE_BYTES_MAX,
    Answer,
    Outcome,
    Refused,
    Rounds,
    Subject,
    Told,
    Words,
    is_between,
    told,
)
from routing.offsets import Sample, SampleError, covers, parse_sample

REPLICATION = command("INFO", "replication")
REACH_TRIES_MAX = 6  # at the replica, until it has applied what the primary had at its first answer
REACH_PAUSE_SECONDS = 0.005  # doubled from try to try
ROUND_PAUSE_SECONDS = 0.02  # between two rounds, so that a key that toggles is not met in step


class _Unfinished(Exception):
    """The comparison cannot go on; the text says why."""


async def compare(
    primary: NodeConnection, replica: NodeConnection, suspects: Sequence[bytes], key_count: int
) -> Outcome:
    """Compare the suspects and up to ``key_count`` keys that the primary draws. RESP2 on both connections.

    The replica draws half as many: a key that its primary has not shows only so.
    """
    try:
        keys, is_empty = await _draw(primary, replica, key_count)
        rounds = Rounds(keys, suspects)
        subjects = {subject.key: subject for subject in await _subjects(primary, replica, rounds.keys)}
        while rounds.keys:
            rounds.note(await _round(primary, replica, [subjects[key] for key in rounds.keys]))
            if rounds.keys:
                await trio.sleep(ROUND_PAUSE_SECONDS)
        return rounds.outcome(is_empty)
    except (ConnectionLostError, SampleError, ReplyError, _Unfinished) as error:
        return Outcome(problem=str(error))


async def _draw(primary: NodeConnection, replica: NodeConnection, key_count: int) -> tuple[list[bytes], bool]:
    """Different keys of either node, and whether the primary has none."""
    asked = [_start(primary, [(b"DBSIZE",), *[(b"RANDOMKEY",)] * key_count])]
    asked.append(_start(replica, [(b"RANDOMKEY",)] * (key_count // 2)))
    (size, *drawn), drawn_at_replica = [await _answers(waiters) for waiters in asked]
    for answer in (size, *drawn, *drawn_at_replica):
        if isinstance(answer, Refused):
            raise _Unfinished(f"keys could not be drawn: {answer.text}")
    keys = dict.fromkeys(key for key in (*drawn, *drawn_at_replica) if isinstance(key, bytes))
    return list(keys), size == 0


async def _subjects(primary: NodeConnection, replica: NodeConnection, keys: Sequence[bytes]) -> list[Subject]:
    """How each key is to be compared: by its type at the primary, and whole only if it is small at both."""
    sizes: list[Words] = [(b"MEMORY", b"USAGE", key) for key in keys]
    asked = [
        _start(primary, [(b"TYPE", key) for key in keys]),
        _start(primary, sizes),
        _start(replica, sizes),
    ]
    types, at_primary, at_replica = [await _answers(waiters) for waiters in asked]
    return [
        Subject(
            key,
            type_ if isinstance(type_, bytes) else b"",
            is_whole=_is_small(size) and _is_small(size_at_replica),
        )
        for key, type_, size, size_at_replica in zip(keys, types, at_primary, at_replica, strict=True)
    ]


def _is_small(size: Answer) -> bool:
    """By MEMORY USAGE; what is not there is, and what may not be asked is not."""
    return size is None or (isinstance(size, int) and size <= WHOLE_BYTES_MAX)


async def _round(
    primary: NodeConnection, replica: NodeConnection, subjects: Sequence[Subject]
) -> dict[bytes, tuple[Told, Told, Told]]:
    """The primary's answers, the replica's after them, and the primary's after those."""
    questions = [words for subject in subjects for words in subject.questions()]
    values = _start(primary, questions)
    p1 = await _sample(primary.start(REPLICATION))
    first = _told(subjects, await _answers(values))
    r1, middle, r2 = await _middle(replica, subjects, questions, p1)
    asked = primary.start(REPLICATION)
    values = _start(primary, questions)
    p2 = await _sample(asked)
    last = _told(subjects, await _answers(values))
    if not is_between(p1, r1, r2, p2):
        raise _Unfinished("one of both changed its replication history meanwhile")
    return {subject.key: (first[index], middle[index], last[index]) for index, subject in enumerate(subjects)}


async def _middle(
    replica: NodeConnection, subjects: Sequence[Subject], questions: Sequence[Words], p1: Sample
) -> tuple[Sample, list[Told], Sample]:
    """The replica's answers from when it has applied p1."""
    for attempt in range(REACH_TRIES_MAX):
        before = replica.start(REPLICATION)
        values = _start(replica, questions)
        after = replica.start(REPLICATION)
        r1 = await _sample(before)
        answers = await _answers(values)
        r2 = await _sample(after)
        if covers(r1.point, p1.point):
            return r1, _told(subjects, answers), r2
        await trio.sleep(REACH_PAUSE_SECONDS * 2**attempt)
    raise _Unfinished("it did not reach its primary's offset in time")


def _told(subjects: Sequence[Subject], answers: Sequence[Answer]) -> list[Told]:
    found = []
    at = 0
    for subject in subjects:
        size = len(subject.questions())
        found.append(told(subject, answers[at : at + size]))
        at += size
    return found


# -- asking


def _start(connection: NodeConnection, questions: Sequence[Words]) -> list[Waiter]:
    """Queue the questions in one piece; if the connection is closed, each is lost."""
    waiters = [
        Waiter(frame([word if isinstance(word, bytes) else b"%d" % word for word in words]))
        for words in questions
    ]
    connection.queue_all(waiters)
    return waiters


async def _answers(waiters: Sequence[Waiter]) -> list[Answer]:
    return [_answer(await waiter.wait_reply()) for waiter in waiters]


def _answer(reply: bytes) -> Answer:
    value = decode(reply)
    return Refused(str(value)) if isinstance(value, ServerError) else value


async def _sample(waiter: Waiter) -> Sample:
    return parse_sample(await waiter.wait_reply())
