"""Keeps the current topology view: asks the nodes, merges what they say, tells who subscribed.

It owns the view and the connections it asks on. The data plane never asks it a question that waits: it subscribes,
and reports what nodes told it in passing (MOVED). Losing every node changes nothing: the last view serves on, and
``problems`` says so.

Who is asked: each round at most ASKED_MAX nodes, all of them in a cluster of that size, else in turn. Each is asked
on a connection of its own, so that a slow command on a shared one delays no discovery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio

from proxy.log import get_logger
from proxy.protocol.encode import command
from proxy.protocol.replies import ReplyError, ServerError, decode
from proxy.upstream.connect import ConnectError, Dialer
from proxy.upstream.connection import NodeConnection
from proxy.upstream.reply_slot import ConnectionLostError
from routing.cluster_nodes import Report, ReportError, parse_atomic_migrations, parse_info, parse_nodes
from routing.discovery import Known, merge, with_moved
from routing.slot import SLOT_COUNT
from routing.topology import EMPTY_VIEW, Address, TopologyView

ASKED_MAX = 16  # nodes per round
ANSWER_SECONDS = 0.5  # a node that does not answer by then counts as not answering this round
BUSY_SECONDS = 0.1  # between rounds while slots move or a node is in trouble
SOON_SECONDS = 0.01  # after a MOVED or a lost connection; also the least time between two rounds

log = get_logger(__name__)

Subscriber = Callable[[TopologyView, TopologyView], None]  # (old, new); called at once, must not block


class NodeInfo:
    """What discovery remembers of one node between rounds."""

    __slots__ = ("connection", "engine_version", "problem", "tells_atomic")

    def __init__(self) -> None:
        self.connection: NodeConnection | None = None
        self.engine_version = ""
        self.problem = ""
        self.tells_atomic = True  # until it refuses CLUSTER GETSLOTMIGRATIONS


class Topology:
    """The current view and its keeper. ``run`` must run for the view to follow the cluster."""

    def __init__(self, dialer: Dialer, seeds: Sequence[Address], refresh_seconds: float) -> None:
        self.view: TopologyView = EMPTY_VIEW
        self.refreshed_at: float | None = None  # trio time of the last round in which a node answered
        self.rounds_total = 0
        self.failed_rounds_total = 0
        self.engine_version = ""  # the oldest that a node of the cluster named
        self._dialer = dialer
        self._seeds = tuple(seeds)
        self.refresh_seconds = refresh_seconds
        self._known = Known(EMPTY_VIEW, (0,) * SLOT_COUNT)
        self._reports: tuple[Report, ...] = ()
        self._adopted: dict[int, tuple[float, Address]] = {}  # slot -> (trio time, owner) by MOVED
        self._infos: dict[Address, NodeInfo] = {}
        self._subscribers: dict[Subscriber, None] = {}  # in the order in which they came
        self._wanted = trio.Event()  # a round is wanted soon
        self._changed = trio.Event()
        self._turn = 0  # where the next round begins in a cluster of more than ASKED_MAX nodes
        self._troubled = False

    # -- for the data plane: synchronous

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call ``subscriber(old, new)`` at each change, in the order of the changes."""
        self._subscribers[subscriber] = None

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Call ``subscriber`` no more, also not for the change that is being told just now."""
        self._subscribers.pop(subscriber, None)

    def on_moved(self, slot: int, address: Address) -> None:
        """A node said that ``address`` owns ``slot`` now: adopt it at once and look at the cluster soon."""
        self._adopted[slot] = (trio.current_time(), address)
        self._set_view(with_moved(self.view, slot, address))
        self.refresh_soon()

    def refresh_soon(self) -> None:
        """Something does not fit the view: look at the cluster without waiting for the interval."""
        self._wanted.set()

    async def wait_change(self) -> None:
        """Return when the view has changed, or a round has ended."""
        await self._changed.wait()

    # -- for operators

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each; empty when all is well."""
        found = []
        if self.refreshed_at is None:
            found.append("no node of the cluster has answered yet")
        elif (age := trio.current_time() - self.refreshed_at) > 3 * self.refresh_seconds + ANSWER_SECONDS:
            found.append(f"no node has answered for {age:.0f} s; the last view serves on")
        if self.view.shards and (unowned := self.view.unowned_count):
            found.append(f"{unowned} of {SLOT_COUNT} slots are served by no node")
        found += [
            f"{address}: {info.problem}" for address, info in sorted(self._infos.items()) if info.problem
        ]
        return found

    # -- the task

    async def run(self) -> None:
        """Follow the cluster until cancelled."""
        try:
            while True:
                self._wanted = trio.Event()
                await self.refresh()
                busy = self._troubled or bool(self.view.migrations)
                with trio.move_on_after(
                    min(BUSY_SECONDS, self.refresh_seconds) if busy else self.refresh_seconds
                ):
                    await self._wanted.wait()
                await trio.sleep(SOON_SECONDS)
        finally:
            for info in self._infos.values():
                if info.connection is not None:
                    info.connection.close("stopping")

    async def refresh(self) -> None:
        """One round: ask, merge, tell."""
        began = trio.current_time()
        asked = self._whom_to_ask()
        reports: dict[Address, Report] = {}

        async def ask(address: Address) -> None:
            report = await self._ask(address)
            if report is not None:
                reports[address] = report

        async with trio.open_nursery() as nursery:
            for address in asked:
                nursery.start_soon(ask, address)
        self.rounds_total += 1
        if reports:
            self.refreshed_at = trio.current_time()
            self._merge([reports[address] for address in asked if address in reports], began)
        else:
            self.failed_rounds_total += 1
        self._troubled = (
            len(reports) < len(asked)
            or self.view.unowned_count > 0
            or any(not report.is_cluster_ok for report in reports.values())
        )
        self._notify()

    def _whom_to_ask(self) -> list[Address]:
        # Once each: a replica that a MOVED named is a primary as well until the next round.
        known = list(dict.fromkeys(node.address for node in self.view.nodes()))
        if not known or (self._troubled and len(known) <= ASKED_MAX):
            known += [seed for seed in self._seeds if seed not in known]
        for address in list(self._infos):
            if address not in known:
                info = self._infos.pop(address)
                if info.connection is not None:
                    info.connection.close("the node left the cluster")
        if len(known) <= ASKED_MAX:
            return known
        self._turn = (self._turn + ASKED_MAX) % len(known)
        return (known + known)[self._turn : self._turn + ASKED_MAX]

    def _merge(self, reports: Sequence[Report], began: float) -> None:
        self._adopted = {slot: item for slot, item in self._adopted.items() if item[0] > began}
        if tuple(reports) == self._reports and self._known.view is self.view:
            return
        self._reports = tuple(reports)
        adopted = {slot: address for slot, (_, address) in self._adopted.items()}
        self._known = merge(reports, Known(self.view, self._known.claim_epochs), adopted)
        self._set_view(self._known.view)

    def _set_view(self, view: TopologyView) -> None:
        old = self.view
        if view is old:
            return
        self.view = view
        log.info(
            "view_changed",
            revision=view.revision,
            epoch=view.epoch,
            shards=len(view.shards),
            unowned_slots=view.unowned_count,
            migrating_slots=sum(len(migration.slots) for migration in view.migrations),
        )
        for subscriber in list(self._subscribers):
            if subscriber in self._subscribers:
                subscriber(old, view)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _ask(self, address: Address) -> Report | None:
        """What one node says, or None with the reason in its info."""
        info = self._infos.setdefault(address, NodeInfo())
        problem = f"did not answer within {ANSWER_SECONDS:g} s"
        report: Report | None = None
        with trio.move_on_after(ANSWER_SECONDS) as scope:
            try:
                report = await self._converse(address, info)
                problem = ""
            except (ConnectError, ConnectionLostError, ReportError, ReplyError) as error:
                problem = str(error)
        if scope.cancelled_caught and info.connection is not None:
            info.connection.close(problem)  # its late answers must not be taken for the next round's
            info.connection = None
        if problem and problem != info.problem:
            log.warning("node_not_answering", node=str(address), problem=problem)
        info.problem = problem
        return report

    async def _converse(self, address: Address, info: NodeInfo) -> Report:
        if info.connection is None or info.connection.is_closed:
            info.connection = None
            info.connection = await self._dialer.open(address)
            info.engine_version = ""
        connection = info.connection
        if not info.engine_version:
            server = parse_info(_text(await _ask_one(connection, "INFO", "server")))
            info.engine_version = server.get("redis_version", "")
            self._note_engine_versions()
        cluster = parse_info(_text(await _ask_one(connection, "CLUSTER", "INFO")))
        myself, others = parse_nodes(_text(await _ask_one(connection, "CLUSTER", "NODES")), address)
        jobs: Sequence[Any] = ()
        if info.tells_atomic:
            try:
                jobs = await _ask_one(connection, "CLUSTER", "GETSLOTMIGRATIONS")
            except ReportError as error:
                if "unknown subcommand" not in str(error).lower():
                    raise
                info.tells_atomic = False  # an engine without atomic migration
        return Report(
            myself=myself,
            others=others,
            current_epoch=_number(cluster.get("cluster_current_epoch", "0")),
            is_cluster_ok=cluster.get("cluster_state") == "ok",
            atomic_migrations=parse_atomic_migrations(jobs),
        )

    def _note_engine_versions(self) -> None:
        versions = [info.engine_version for info in self._infos.values() if info.engine_version]
        self.engine_version = min(versions, key=_version_key, default="")


async def _ask_one(connection: NodeConnection, *words: str) -> Any:
    answer = decode(await connection.request(command(*words)))
    if isinstance(answer, ServerError):
        raise ReportError(f"{connection.address} answered {' '.join(words)} with: {answer}")
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
