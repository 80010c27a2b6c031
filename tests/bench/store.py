"""What a large topology store costs: opening, queries as of a time or an epoch, pages of events, commits, watches.

    python -m tests.bench.store [--views 1000] [--nodes 1000] [--events 1000000] [--reads 300] [--json FILE]

It fills a store in a temporary directory with versions of a map, and with events, and prints the median and the 99th
percentile of each kind of access, in milliseconds, decoding included. The event loop does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

import trio

from proxy.store import records
from proxy.store.interface import Operation, Put
from proxy.store.records import ViewRecord, numbered
from proxy.store.sqlite import SqliteStore, open_store
from proxy.topology.history import History
from routing.slot import SLOT_COUNT
from routing.timeline import Event, EventKind
from routing.topology import Address, Node, Role, Shard, TopologyView
from tests.bench.proxies import positive

SEED = 1
VIEWS_A_COMMIT = 20
EVENTS_A_COMMIT = 2000
EVENTS_A_PAGE = 100
FIRST_EPOCH = 1000
FIRST_AT = 1_700_000_000.0  # Unix seconds of version 1; each version is a minute later
VIEWS_SHARING_NODES = 10  # the nodes change with every tenth version
COMMITS = 500
WATCHES = 10
WATCHED_CHANGES = 20_000


def main() -> int:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        facts = trio.run(run, Path(folder) / "store.db", options)
    for name, value in facts.items():
        print(f"{name:44} {value:,.2f}" if isinstance(value, float) else f"{name:44} {value:,}")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


async def run(path: Path, options: argparse.Namespace) -> dict[str, float]:
    dice = random.Random(SEED)
    facts: dict[str, float] = {}
    store = await open_store(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        started = time.perf_counter()
        await fill_views(store, options.views, options.nodes)
        await fill_events(store, options.events)
        facts["fill_seconds"] = time.perf_counter() - started
        nursery.cancel_scope.cancel()
    await store.aclose()
    facts["file_bytes"] = path.stat().st_size

    started = time.perf_counter()
    store = await open_store(path)
    facts["open_ms"] = (time.perf_counter() - started) * 1000
    history = History(store)
    (newest,) = await history.versions(1)
    assert newest.number == options.views
    assert (await history.newest(EVENTS_A_PAGE)).newest == options.events
    facts["open_and_first_reads_ms"] = (time.perf_counter() - started) * 1000

    filled_revision = await store.revision()
    gc.collect()
    gc.freeze()  # as the proxy does when it has started
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)

        history = History(store)

        async def as_of_time() -> None:
            at = FIRST_AT + 60 * dice.uniform(1, options.views)
            found = await history.view_at(at=at)
            assert found is not None
            assert found.at <= at < found.at + 60

        async def as_of_epoch() -> None:
            epoch = FIRST_EPOCH + dice.randint(1, options.views)
            found = await history.view_at(epoch=epoch)
            assert found is not None
            assert found.view.epoch == epoch

        async def page() -> None:
            after = dice.randint(1, options.events - EVENTS_A_PAGE)
            assert len((await history.events(after, limit=EVENTS_A_PAGE)).events) == EVENTS_A_PAGE

        async def commit() -> None:
            await store.commit([Put("looked", b"%d" % dice.randrange(10**9)), Put("mode", bytes(200))])

        async def durable_commit() -> None:
            await store.commit([Put("mode", bytes(200))], durable=True)

        for name, work, times in (
            ("as_of_time", as_of_time, options.reads),
            ("as_of_epoch", as_of_epoch, options.reads),
            (f"page_of_{EVENTS_A_PAGE}_events", page, options.reads),
            ("commit", commit, COMMITS),
            ("durable_commit", durable_commit, COMMITS // 5),
        ):
            facts |= await latencies(name, work, times)
        facts["watched_changes_a_second"] = await watch_rate(store, dice, filled_revision)
        nursery.cancel_scope.cancel()
    await store.aclose()
    return facts


async def latencies(name: str, work: Callable[[], Awaitable[None]], times: int) -> dict[str, float]:
    taken: list[float] = []
    for _ in range(times):
        started = time.perf_counter()
        await work()
        taken.append((time.perf_counter() - started) * 1000)
    taken.sort()
    return {f"{name}_median_ms": median(taken), f"{name}_p99_ms": taken[int(len(taken) * 0.99)]}


async def watch_rate(store: SqliteStore, dice: random.Random, last: int) -> float:
    """Changes a second that a watch reads, begun at random revisions, up to WATCHED_CHANGES or the last revision."""
    seen, started = 0, time.perf_counter()
    for _ in range(WATCHES):
        watch, upto, batch_end = store.watch("", dice.randrange(last)), seen + WATCHED_CHANGES, 0
        while seen < upto and batch_end < last:
            batch = await watch.next_batch()
            seen += len(batch.changes)
            batch_end = batch.revision
    return seen / (time.perf_counter() - started)


# -- what is in it


async def fill_views(store: SqliteStore, views: int, nodes: int) -> None:
    operations: list[Operation] = []
    for number in range(1, views + 1):
        nodes_number = number - (number - 1) % VIEWS_SHARING_NODES
        view = _view(number, nodes, nodes_number)
        at = FIRST_AT + 60 * number
        record = ViewRecord(number, at, "proxy-1", number, nodes_number, view)
        operations += [
            Put(numbered(records.VIEWS, number), records.pack_view(record)),
            *(Put(key, b"") for key in records.index_keys(number, at, view.epoch)),
        ]
        if nodes_number == number:
            operations.append(Put(numbered(records.VIEW_NODES, number), records.pack_nodes(view.shards)))
        if number % VIEWS_A_COMMIT == 0 or number == views:
            operations.append(Put(records.VIEW, records.pack(number)))
            await store.commit(operations)
            operations = []


def _view(number: int, nodes: int, nodes_number: int) -> TopologyView:
    """Two nodes to a shard; slots in runs of 8 that are shifted with each version, and a shard in turn whose primary
    has a new config epoch with each change of the nodes."""
    shards = []
    for place in range(max(1, nodes // 2)):
        primary_id, replica_id = (f"{place * 2 + which:040x}" for which in (0, 1))
        config_epoch = nodes_number if place == nodes_number % (nodes // 2) else place
        primary = Node(primary_id, _address(place * 2), Role.PRIMARY, None, config_epoch)
        shards.append(Shard(primary, (Node(replica_id, _address(place * 2 + 1), Role.REPLICA, primary_id),)))
    return TopologyView(
        revision=number,
        epoch=FIRST_EPOCH + number,
        shards=tuple(shards),
        shard_of_slot=tuple((slot // 8 + number) % len(shards) for slot in range(SLOT_COUNT)),
        migrations=(),
    )


def _address(place: int) -> Address:
    return Address(f"10.{place >> 16 & 255}.{place >> 8 & 255}.{place & 255}", 6379)


async def fill_events(store: SqliteStore, events: int) -> None:
    for first in range(1, events + 1, EVENTS_A_COMMIT):
        numbers = range(first, min(first + EVENTS_A_COMMIT, events + 1))
        operations: list[Operation] = [
            Put(numbered(records.EVENTS, number), records.pack_event(_event(number))) for number in numbers
        ]
        await store.commit([*operations, Put(records.EVENT_HEAD, records.pack(numbers[-1]))])


def _event(number: int) -> Event:
    source, target = f"{number % 1000:040x}", f"{number % 997:040x}"
    return Event(
        EventKind.MIGRATION_ADVANCED,
        FIRST_AT + number / 10,
        f"slot {number % SLOT_COUNT} moved from {source[:8]} to {target[:8]}",
        FIRST_EPOCH + number // 1000,
        (target, source),
        (target, source),
        ((number % SLOT_COUNT, number % SLOT_COUNT),),
        f"m-{number // 100}",
        {"keys": number % 5000, "offset": number * 100},
        "proxy-1",
        number,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.store",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--views", type=positive, default=1000)
    parser.add_argument("--nodes", type=positive, default=1000)
    parser.add_argument("--events", type=positive, default=1_000_000)
    parser.add_argument("--reads", type=positive, default=300)
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the store is made")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
