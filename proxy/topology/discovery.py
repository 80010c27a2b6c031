"""Asks the nodes what they know of the cluster. It decides nothing: what they say goes into a ``Look``.

Who is asked: each round at most ASKED_MAX nodes, all of them in a cluster of that size, else in turn
(``routing.discovery.whom_to_ask``). Each is asked on a connection of its own, so that a slow command on a shared one
delays no discovery. Answers of large clusters are read in steps, so that they delay no traffic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from proxy.log import get_logger
from proxy.protocol.encode import command
from proxy.protocol.replies import ReplyError, ServerError, decode
from proxy.upstream.connect import ConnectError, Dialer
from proxy.upstream.connection import NodeConnection
from proxy.upstream.reply_slot import ConnectionLostError
from routing.cluster_nodes import (
    LineCache,
    NodesParser,
    Report,
    ReportError,
    parse_atomic_migrations,
    parse_finished_migrations,
    parse_info,
    parse_key_count,
    parse_replication,
    parse_used_bytes,
)
from routing.discovery import whom_to_ask
from routing.topology import Address, MigrationKind, TopologyView

ASKED_MAX = 16  # nodes per round
ANSWER_SECONDS = 0.5  # a node that does not answer by then counts as not answering this round
SIZES_SECONDS = 5.0  # between two questions for keys and bytes, which are for balance and need no more
COUNT_SECONDS = 1.0  # between two counts of open slots' keys, which tell whether they are stuck
COUNTED_SLOTS_MAX = 16  # open slots whose keys are counted then

Question = tuple[str, ...]  # the words of a command
CLUSTER_INFO: Question = ("CLUSTER", "INFO")
CLUSTER_NODES: Question = ("CLUSTER", "NODES")
REPLICATION: Question = ("INFO", "replication")
SERVER: Question = ("INFO", "server")
KEYSPACE: Question = ("INFO", "keyspace")
MEMORY: Question = ("INFO", "memory")
ATOMIC_MIGRATIONS: Question = ("CLUSTER", "GETSLOTMIGRATIONS")  # Valkey 9

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """What one round found."""

    began: float  # trio time: what nodes said later, in a MOVED, is newer
    asked: tuple[Address, ...]
    reports: tuple[Report, ...]  # of those that answered, in the order asked
    problems: Mapping[Address, str]  # why the others did not
    keys_in_slot: Mapping[tuple[int, str], int]  # (open slot, node id) -> keys, of those counted this time


class _Asked:
    """What discovery remembers of one node between rounds."""

    __slots__ = ("connection", "engine_version", "problem", "sizes", "sizes_at", "tells_atomic")

    def __init__(self) -> None:
        self.connection: NodeConnection | None = None
        self.engine_version = ""
        self.problem = ""
        self.tells_atomic = True  # until it refuses CLUSTER GETSLOTMIGRATIONS
        self.sizes: tuple[int | None, int | None] = (None, None)  # keys, bytes
        self.sizes_at = -SIZES_SECONDS  # trio time


class Discovery:
    """The connections to ask on, and what each node said last."""

    def __init__(self, dialer: Dialer, seeds: Sequence[Address]) -> None:
        self.seeds = tuple(seeds)
        self.looks_total = 0
        self.failed_looks_total = 0  # in which no node answered
        self.answered_at: float | None = None  # trio time of the last look in which a node answered
        self._dialer = dialer
        self._asked: dict[Address, _Asked] = {}
        self._lines = LineCache()
        self._counted_at = -COUNT_SECONDS  # trio time

    @property
    def engine_version(self) -> str:
        """The oldest that a node of the cluster named; empty while none has."""
        versions = [asked.engine_version for asked in self._asked.values() if asked.engine_version]
        return min(versions, key=_version_key, default="")

    def problems(self) -> list[str]:
        """Which nodes do not answer, and why, one sentence each."""
        return [
            f"{address}: {asked.problem}" for address, asked in sorted(self._asked.items()) if asked.problem
        ]

    def close(self) -> None:
        """Close the connections."""
        for asked in self._asked.values():
            if asked.connection is not None:
                asked.connection.close("stopping")

    async def look(self, view: TopologyView, *, with_seeds: bool, heard_of: Sequence[Address] = ()) -> Look:
        """Ask the nodes of ``view``, those first that were ``heard_of``; the seeds too if asked for, or if alone.

        Raises nothing: who does not answer, or not what is documented, is in ``Look.problems``.
        """
        began = trio.current_time()
        addresses = self._whom_to_ask(view, with_seeds, heard_of)
        reports: dict[Address, Report] = {}

        async def ask(address: Address) -> None:
            report = await self._ask(address)
            if report is not None:
                reports[address] = report

        async with trio.open_nursery() as nursery:
            for address in addresses:
                nursery.start_soon(ask, address)
        self.looks_total += 1
        if reports:
            self.answered_at = trio.current_time()
        else:
            self.failed_looks_total += 1
        return Look(
            began=began,
            asked=tuple(addresses),
            reports=tuple(reports[address] for address in addresses if address in reports),
            problems={
                address: self._asked[address].problem for address in addresses if address not in reports
            },
            keys_in_slot=await self._count_keys(view),
        )

    def _whom_to_ask(
        self, view: TopologyView, with_seeds: bool, heard_of: Sequence[Address]
    ) -> list[Address]:
        chosen = whom_to_ask(view, turn=self.looks_total, asked_max=ASKED_MAX, first=heard_of)
        known = {node.address for node in view.nodes()}
        if not known or (with_seeds and len(known) <= ASKED_MAX):
            chosen += [seed for seed in self.seeds if seed not in known]
        for address in self._asked.keys() - known - set(chosen):
            asked = self._asked.pop(address)
            if asked.connection is not None:
                asked.connection.close("the node left the cluster")
        return chosen

    async def _ask(self, address: Address) -> Report | None:
        """What one node says, or None with the reason in what is remembered of it."""
        asked = self._asked.setdefault(address, _Asked())
        problem = f"did not answer within {ANSWER_SECONDS:g} s"
        report: Report | None = None
        with trio.move_on_after(ANSWER_SECONDS) as scope:
            try:
                report = await self._converse(address, asked)
                problem = ""
            except (ConnectError, ConnectionLostError, ReportError, ReplyError) as error:
                problem = str(error)
        if scope.cancelled_caught and asked.connection is not None:
            asked.connection.close(problem)  # its late answers must not be taken for the next round's
            asked.connection = None
        if problem and problem != asked.problem:
            log.warning("node_not_answering", node=str(address), problem=problem)
        asked.problem = problem
        return report

    async def _converse(self, address: Address, asked: _Asked) -> Report:
        if asked.connection is None or asked.connection.is_closed:
            asked.connection = None
            asked.connection = await self._dialer.open(address)
            asked.engine_version = ""
        connection = asked.connection
        with_sizes = trio.current_time() - asked.sizes_at > SIZES_SECONDS
        questions = [CLUSTER_INFO, CLUSTER_NODES, REPLICATION]
        questions += [] if asked.engine_version else [SERVER]
        questions += [KEYSPACE, MEMORY] if with_sizes else []
        questions += [ATOMIC_MIGRATIONS] if asked.tells_atomic else []
        answers = await _ask_all(connection, questions)
        if not asked.engine_version:
            server = parse_info(_text(answers[SERVER]))
            asked.engine_version = server.get("redis_version", "")
        if with_sizes:
            asked.sizes_at = trio.current_time()
            asked.sizes = (
                parse_key_count(_text(answers[KEYSPACE])),
                parse_used_bytes(_text(answers[MEMORY])),
            )
        cluster = parse_info(_text(answers[CLUSTER_INFO]))
        parser = NodesParser(_text(answers[CLUSTER_NODES]), address, self._lines)
        while parser.step():
            await trio.lowlevel.checkpoint()
        myself, others = parser.result()
        jobs = answers.get(ATOMIC_MIGRATIONS, ())
        asked.tells_atomic = ATOMIC_MIGRATIONS in answers  # an engine without them refused to tell
        return Report(
            myself=myself,
            others=others,
            current_epoch=_number(cluster.get("cluster_current_epoch", "0")),
            is_cluster_ok=cluster.get("cluster_state") == "ok",
            atomic_migrations=parse_atomic_migrations(jobs),
            replication=parse_replication(_text(answers[REPLICATION])),
            finished_migrations=parse_finished_migrations(jobs),
            key_count=asked.sizes[0],
            used_bytes=asked.sizes[1],
        )

    async def _count_keys(self, view: TopologyView) -> dict[tuple[int, str], int]:
        """The keys of open slots on either side; a node that does not tell is left out."""
        counts: dict[tuple[int, str], int] = {}
        if not view.migrations or trio.current_time() - self._counted_at < COUNT_SECONDS:
            return counts
        self._counted_at = trio.current_time()
        address_of = {node.id: node.address for node in view.nodes()}

        async def count(slot: int, node_id: str) -> None:
            asked = self._asked.get(address_of[node_id])
            if asked is None or asked.connection is None or asked.connection.is_closed:
                return
            try:
                found = await _ask_one(asked.connection, "CLUSTER", "COUNTKEYSINSLOT", str(slot))
            except (ConnectionLostError, ReportError, ReplyError) as error:
                log.debug("keys_not_counted", node=str(address_of[node_id]), slot=slot, reason=error)
                return
            if isinstance(found, int):
                counts[slot, node_id] = found

        with trio.move_on_after(ANSWER_SECONDS):
            async with trio.open_nursery() as nursery:
                for migration in view.migrations:
                    if migration.kind is MigrationKind.ATOMIC:
                        continue  # its slots are not split: the engine's job says how far it is
                    for slot in migration.slots[:COUNTED_SLOTS_MAX]:
                        for node_id in (migration.source_id, migration.target_id):
                            if node_id in address_of:
                                nursery.start_soon(count, slot, node_id)
        return counts


async def _ask_all(connection: NodeConnection, questions: Sequence[Question]) -> dict[Question, Any]:
    """The answers, asked in one go; without that of a question that this engine does not know.

    Raises ReportError for any other refusal, ReplyError, ConnectionLostError.
    """
    waiters = [connection.start(command(*words)) for words in questions]
    answers = {}
    for words, waiter in zip(questions, waiters, strict=True):
        answer = decode(await waiter.wait_reply())
        if not isinstance(answer, ServerError):
            answers[words] = answer
        elif words is not ATOMIC_MIGRATIONS or "unknown subcommand" not in str(answer).lower():
            raise _refusal(connection, words, answer)
    return answers


def _refusal(connection: NodeConnection, words: Question, answer: ServerError) -> ReportError:
    return ReportError(f"{connection.address} answered {' '.join(words)} with: {answer}")


async def _ask_one(connection: NodeConnection, *words: str) -> Any:
    answer = decode(await connection.request(command(*words)))
    if isinstance(answer, ServerError):
        raise _refusal(connection, words, answer)
    return answer


def _text(value: Any) -> str:
    if not isinstance(value, bytes):
        raise ReportError(f"expected text, got {value!r:.100}")
    return value.decode(errors="replace")


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ReportError(f"expected a number, got {text!r:.100}") from None


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
