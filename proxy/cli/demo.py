"""``steadyread demo``: what a plain client and Steadyread each see while slots move under them.

One cluster, one migration at a time, two sides with keys of their own in the same slots: a client that
follows the cluster and reads at replicas, and ordinary connections to a Steadyread that runs as a process.
Both run at the same time, so both meet the same moves. Meanwhile keys in several slots are written together and read
together through Steadyread, as they are and at snapshots.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import proxy
from proxy.cli.main import DONE, FAILED
from proxy.embedded.cluster import HOST, Cluster, ClusterError, Node, held_ports, log_end, running_cluster
from proxy.embedded.connection import ConnectionLost, ServerError, connected
from proxy.embedded.engine import EngineNotFound, find_engine
from proxy.embedded.follower import FollowingClient
from proxy.embedded.guard import signal_group, wait_ended
from proxy.embedded.moves import MoveError, move_slot_stepwise
from proxy.embedded.tearing import Together, TornTally
from proxy.embedded.traffic import (
    Client,
    SingleServerClient,
    Tally,
    Traffic,
    tags_in_slots_of,
    write_first_values,
)
from proxy.settings.state import MEMORY
from routing.slot import slot_of
from routing.topology import Address

if TYPE_CHECKING:
    from proxy.cli.main import Subparsers

SLOTS_PER_PRIMARY = 2
KEYS_PER_SLOT = 300  # of each side
READERS, WRITERS = 8, 2  # of each side
# Pauses leave the machine idle enough for latencies to be the servers' and not the queue's at our own door.
READ_PAUSE_SECONDS = 0.004
WRITE_PAUSE_SECONDS = 0.004
# A slot of real size stays half-moved for seconds; these small ones are held there for so long.
HALF_MOVED_SECONDS = 0.5
_SERVE_SECONDS = 20.0  # for the proxy to answer
_STOP_SECONDS = 15.0  # for the proxy to end after SIGTERM; it allows itself 10
_REDRAW_SECONDS = 0.25

PLAIN, STEADY = "plain client, reads at replicas", "Steadyread"
NOW, AT_SNAPSHOT = "as they are", "at snapshots"


def add_parser(subparsers: Subparsers) -> None:
    """Add ``demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="show reads while slots move, with and without the proxy",
        description="Start a cluster of 3 primaries and 3 replicas, move slots back and forth under readers"
        " and writers, and count what a plain client and Steadyread see. All of it is stopped at the end."
        " Beside them, keys over all shards are written together, and reads of all of them are checked for being torn:"
        " as they are, and at snapshots."
        " Exit code 0 if Steadyread saw no wrong read, no torn snapshot and no error, else 1.",
    )
    add = parser.add_argument
    add("--seconds", type=_positive, default=30.0, metavar="N", help="length of the traffic; default: 30")
    add("--json", action="store_true", help="print only the facts, as JSON")
    add(
        "--engine",
        metavar="PROGRAM",
        help="server program, or a command of several words whose last is its name."
        " Default: valkey-server or redis-server on PATH, else the bundled one",
    )


def run(arguments: argparse.Namespace) -> int:
    """Show it. 0 if Steadyread's side saw no wrong read and no error, else 1."""
    show = _Show(arguments.seconds, is_quiet=arguments.json)
    failed = False
    try:
        trio.run(_demo, show, arguments.engine)
    except* (ClusterError, EngineNotFound, MoveError, ServerError, ConnectionLost, OSError) as faults:
        print(f"steadyread demo: {_first(faults)}", file=sys.stderr)
        failed = True
    if failed:
        return FAILED
    facts = show.facts()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        show.summarise()
    return DONE if facts["ok"] else FAILED


async def _demo(show: _Show, program: str | None) -> None:
    engine = find_engine(program)
    show.engine = str(engine)
    show.say(f"starting 3 primaries and 3 replicas of {engine}")
    async with running_cluster(engine) as cluster:
        show.say("starting Steadyread before them")
        async with _steadyread(cluster) as address:
            plain, steady, together = await _prepare(cluster)
            show.tallies = {PLAIN: plain.tally, STEADY: steady.tally}
            show.torn = {NOW: together.now, AT_SNAPSHOT: together.at_snapshot}
            await _run_traffic(cluster, show, plain, steady, together, address)
            show.say("stopping")


async def _prepare(cluster: Cluster) -> tuple[Traffic, Traffic, Together]:
    map_ = await cluster.map_at(cluster.nodes[0])
    owners = [map_.owned_by(node.id) for node in cluster.primaries]
    tags = list(tags_in_slots_of(owners, SLOTS_PER_PRIMARY))
    sides = Traffic("plain", tags, KEYS_PER_SLOT), Traffic("steady", tags, KEYS_PER_SLOT)
    await write_first_values(cluster, sides)
    return *sides, Together(tags)


async def _run_traffic(
    cluster: Cluster, show: _Show, plain: Traffic, steady: Traffic, together: Together, address: Address
) -> None:
    """Readers, writers and the mover, for the time the user asked for; a move that has begun is finished."""
    choice = random.Random()
    seed = cluster.nodes[0].address
    async with AsyncExitStack() as clients, trio.open_nursery() as nursery:
        for side, new_client in (
            (plain, lambda: FollowingClient(seed, choice)),
            (steady, lambda: SingleServerClient(address)),
        ):
            _start_side(nursery, clients, side, new_client, choice)
        for work in (together.write_on, together.read_now_on, together.read_snapshots_on):
            client = SingleServerClient(address)
            clients.push_async_callback(client.aclose)
            nursery.start_soon(work, client, READ_PAUSE_SECONDS)
        nursery.start_soon(show.redraw_until_cancelled)
        await _move_slots(cluster, show, sorted({slot_of(key) for key in plain.keys}))
        nursery.cancel_scope.cancel()


def _start_side(
    nursery: trio.Nursery,
    clients: AsyncExitStack,
    side: Traffic,
    new_client: Callable[[], Client],
    choice: random.Random,
) -> None:
    for _ in range(READERS):
        client = new_client()
        clients.push_async_callback(client.aclose)
        nursery.start_soon(side.read_on, client, choice, READ_PAUSE_SECONDS)
    for number in range(WRITERS):
        client = new_client()
        clients.push_async_callback(client.aclose)
        nursery.start_soon(side.write_on, client, side.keys[number::WRITERS], WRITE_PAUSE_SECONDS)


async def _move_slots(cluster: Cluster, show: _Show, slots: list[int]) -> None:
    """Move each slot to the next primary and each back again, over and over, until the time is up."""
    show.start()
    map_ = await cluster.map_at(cluster.nodes[0])
    home = {slot: cluster.node_at(map_.owner_of(slot).address) for slot in slots}
    away = {slot: _next_primary(cluster, home[slot]) for slot in slots}
    for targets in cycle((away, home)):
        for slot in slots:
            if show.seconds_left <= 0:
                return
            where = f"slot {slot} to {targets[slot]}"
            show.now(f"moving {where}")
            await move_slot_stepwise(
                cluster,
                slot,
                targets[slot],
                # The last slot is held only as long as there is time.
                half_moved_seconds=max(0.0, min(HALF_MOVED_SECONDS, show.seconds_left)),
                on_half_moved=partial(show.now, f"half of the keys moved: {where}"),
            )
            show.moves += 1


def _next_primary(cluster: Cluster, node: Node) -> Node:
    index = cluster.primaries.index(node)
    return cluster.primaries[(index + 1) % len(cluster.primaries)]


@asynccontextmanager
async def _steadyread(cluster: Cluster) -> AsyncIterator[Address]:
    """The proxy as a process of its own for the length of the block. ClusterError if it does not serve."""
    assert cluster.guard is not None
    log = cluster.directory / "steadyread.log"
    # ``-m`` looks in the working directory first: the package that runs there is the one that runs here.
    where = Path(proxy.__file__).resolve().parents[1]
    with held_ports(2) as ports:
        listen, admin = (Address(HOST, port) for port in ports)
        process = cluster.guard.spawn(_serve_command(cluster.nodes[0].address, listen, admin), where, log)
        try:
            await _wait_serving(process, listen, log)
            yield listen
        finally:
            signal_group(process, signal.SIGTERM)
            with trio.move_on_after(_STOP_SECONDS) as patience:
                patience.shield = True
                await wait_ended(process)
            signal_group(process, signal.SIGKILL)
            process.wait()
            cluster.guard.forget(process)


def _serve_command(seed: Address, listen: Address, admin: Address) -> list[str]:
    options = ("--seed", str(seed), "--listen", str(listen), "--admin", str(admin))
    return [sys.executable, "-m", "proxy", "serve", *options, "--set", f"store.file={MEMORY}"]


async def _wait_serving(process: subprocess.Popen[bytes], address: Address, log: Path) -> None:
    with trio.move_on_after(_SERVE_SECONDS):
        while process.poll() is None:
            try:
                async with connected(address) as connection:
                    await connection.call("PING")
                    await connection.call("GET", "steadyread-demo")
                    return
            except (ConnectionLost, ServerError):
                await trio.sleep(0.05)
        raise ClusterError(f"steadyread serve ended with {process.returncode}: {log_end(log)}")
    raise ClusterError(f"steadyread serve does not answer after {_SERVE_SECONDS:.0f} s: {log_end(log)}")


@dataclass(slots=True)
class _Show:
    """What the user sees: a live table on a terminal, plain lines elsewhere, with --json the facts alone."""

    seconds: float
    is_quiet: bool
    engine: str = ""
    moves: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    torn: dict[str, TornTally] = field(default_factory=dict)
    _console: Console = field(default_factory=Console)
    _moving: str = ""
    _begun: float | None = None  # Trio's clock

    def say(self, words: str) -> None:
        if not self.is_quiet:
            self._console.print(f"{words} ...", highlight=False)

    def now(self, words: str) -> None:
        """What happens to the slots, until the next call."""
        self._moving = words

    def start(self) -> None:
        """The traffic's time begins."""
        self._begun = trio.current_time()

    @property
    def seconds_left(self) -> float:
        assert self._begun is not None
        return self._begun + self.seconds - trio.current_time()

    async def redraw_until_cancelled(self) -> None:
        if self.is_quiet or not self._console.is_terminal:
            self.say(f"reading and writing for {self.seconds:.0f} s while slots move")
            return
        with Live(Group(), console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                left = f"{max(0.0, self.seconds_left):.0f} s left. {self._moving}"
                live.update(Group(self._table(left), self._torn_table()), refresh=True)
                await trio.sleep(_REDRAW_SECONDS)

    def facts(self) -> dict[str, Any]:
        plain, steady = self.tallies[PLAIN], self.tallies[STEADY]
        return {
            "ok": steady.is_clean and self._is_whole,
            "engine": self.engine,
            "seconds": self.seconds,
            "moves": self.moves,
            "plain": _facts_of(plain),
            "steadyread": _facts_of(steady),
            "together": {"now": _torn_facts(self.torn[NOW]), "snapshot": _torn_facts(self.torn[AT_SNAPSHOT])},
        }

    @property
    def _is_whole(self) -> bool:
        """Reads as they are may be torn, and nothing else."""
        return self.torn[AT_SNAPSHOT].is_clean and not self.torn[NOW].errors

    def summarise(self) -> None:
        self._console.print(self._table(f"{self.moves} moves of slots in {self.seconds:.0f} s"))
        self._console.print(self._torn_table())
        seen = {name: tally.examples for name, tally in self.tallies.items()}
        seen |= {f"read together {name}": tally.examples for name, tally in self.torn.items()}
        for name, examples in seen.items():
            for words in examples.values():
                self._console.print(f"{name}, for example: {words}", highlight=False, markup=False)
        if self.tallies[PLAIN].is_clean:
            self._console.print(
                "The plain client saw nothing wrong: from Valkey 8 on, replicas redirect reads of a slot that"
                " moves. Those of Redis up to 8.0 answer nil: try --engine redis-server",
                highlight=False,
            )
        is_ok = self.tallies[STEADY].is_clean and self._is_whole
        verdict = "no wrong read, no torn snapshot and no error" if is_ok else "WRONG READS OR ERRORS"
        self._console.print(f"Steadyread: {verdict}", highlight=False)

    def _table(self, caption: str = "") -> Table:
        table = Table(title=f"{self.engine}, 3 primaries, 3 replicas", caption=caption or None)
        table.add_column("")
        for name in self.tallies:
            table.add_column(name, justify="right", min_width=12)
        for row, is_fault in _ROWS.items():
            cells = [_facts_of(tally)[row] for tally in self.tallies.values()]
            table.add_row(row.replace("_", " "), *[_cell(value, is_fault) for value in cells])
        return table

    def _torn_table(self) -> Table:
        table = Table(
            title="keys over all shards, written together (MSET) and read together (MGET) by Steadyread"
        )
        table.add_column("")
        for name in self.torn:
            table.add_column(name, justify="right", min_width=12)
        for row, is_fault in _TORN_ROWS.items():
            cells = [_torn_facts(tally)[row] for tally in self.torn.values()]
            table.add_row(row, *[_cell(value, is_fault) for value in cells])
        return table


# row -> whether any other number than 0 is a fault
_TORN_ROWS = {"snapshots": False, "reads": False, "torn": True, "changed": True, "errors": True}
_ROWS = {
    "reads": False,
    "wrong_nils": True,
    "stale_values": True,
    "errors": True,
    "writes": False,
    "p50_ms": False,
    "p99_ms": False,
}


def _facts_of(tally: Tally) -> dict[str, Any]:
    p50, p99 = tally.latencies.quantile_ms(0.5), tally.latencies.quantile_ms(0.99)
    return {
        "reads": tally.reads,
        "wrong_nils": tally.wrong_nils,
        "stale_values": tally.stale_values,
        "errors": tally.errors,
        "writes": tally.writes,
        "p50_ms": None if p50 is None else round(p50, 2),
        "p99_ms": None if p99 is None else round(p99, 2),
        "examples": tally.examples,
    }


def _torn_facts(tally: TornTally) -> dict[str, Any]:
    return {**{row: getattr(tally, row) for row in _TORN_ROWS}, "examples": tally.examples}


def _cell(value: float | None, is_fault: bool) -> str:
    text = "-" if value is None else f"{value:,}"
    if not is_fault:
        return text
    return f"[bold red]{text}[/]" if value else f"[green]{text}[/]"


def _first(faults: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first fault in a tree of groups."""
    fault: BaseException = faults
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    return fault


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value
