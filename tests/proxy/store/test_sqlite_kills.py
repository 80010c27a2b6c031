"""Processes that share the file are killed at random moments: it is never corrupt, and no watch misses a change.

    STEADYREAD_KILLS=50 python -m pytest tests/proxy/store/test_sqlite_kills.py -s

kills that many; without it a few. The seed is printed, and STEADYREAD_SEED sets it.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import trio

from proxy.store.interface import Change, Put
from proxy.store.sqlite import open_store
from tests.proxy.store.test_contract import collect

KILLS = int(os.environ.get("STEADYREAD_KILLS", "8"))
WRITERS = 2  # at a time; more only wait for each other


async def kill_a_writer(path: Path, name: str, dice: random.Random) -> list[tuple[int, int]]:
    """Let a writer commit for a random time, kill it; (number, revision) of each commit it was told of."""
    dies_after = [str(dice.randint(1, 100))] if dice.random() < 0.3 else []
    command = [sys.executable, "-m", "tests.proxy.store.writer", str(path), name, str(dice.randrange(2**32))]
    lines = b""
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, [*command, *dies_after], stdout=subprocess.PIPE, check=False)
        process = await nursery.start(run)
        lines += await process.stdout.receive_some()
        with trio.move_on_after(dice.uniform(0.0, 0.5)):
            async for chunk in process.stdout:
                lines += chunk
        process.kill()
        async for chunk in process.stdout:
            lines += chunk
        assert await process.wait() == -signal.SIGKILL
    whole = lines.decode().splitlines()[: lines.count(b"\n")]
    return [(int(number), int(revision)) for number, revision in map(str.split, whole)]


async def test_killed_writers(tmp_path: Path) -> None:
    """After each kill the file is sound; the log has every acknowledged commit, whole; watches saw exactly the log."""
    seed = int(os.environ.get("STEADYREAD_SEED", random.randrange(2**32)))
    print(f"seed {seed}")
    dice = random.Random(seed)
    path = tmp_path / "store.db"
    store = await open_store(path)
    told: dict[str, list[tuple[int, int]]] = {f"w{number}": [] for number in range(WRITERS)}
    seen: list[tuple[int, list[Change]]] = []
    kills_left = KILLS

    async def kill_often(name: str) -> None:
        nonlocal kills_left
        while kills_left > 0:
            kills_left -= 1
            told[name] += await kill_a_writer(path, name, dice)
            with sqlite3.connect(path) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            connection.close()

    async def watch_from_anywhere() -> None:
        after = dice.randint(0, await store.revision())
        found: list[Change] = []
        seen.append((after, found))
        watch = store.watch("", after)
        while True:
            found += (await watch.next_batch()).changes

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        async with trio.open_nursery() as killers:
            for name in told:
                killers.start_soon(kill_often, name)
            for _ in range(4):
                nursery.start_soon(watch_from_anywhere)
                await trio.sleep(0.3)
        last = await store.commit([Put("end", b"")])
        with trio.fail_after(10):
            while not all(found and found[-1].revision == last for _, found in seen):
                await trio.sleep(0.02)
        assert store.problems() == []
        nursery.cancel_scope.cancel()
    await store.aclose()

    again = await open_store(path)
    log = await collect(again.watch("", 0), last)
    await again.aclose()
    assert sorted({change.revision for change in log}) == list(range(1, last + 1))
    for after, found in seen:
        assert found == [change for change in log if change.revision > after]
    for name, commits in told.items():
        counted = [
            (int(change.value), change.revision)
            for change in log
            if change.key == f"count/{name}" and change.value is not None
        ]
        assert [number for number, _ in counted] == list(range(len(counted)))
        assert set(commits) <= set(counted)
        revision_of = dict(counted)
        for change in log:
            if change.key.startswith(f"data/{name}/") and change.value is not None:
                assert revision_of[int(change.value.split(b" ", 1)[0])] == change.revision
    print(f"{KILLS} kills, {last} revisions, {len(log)} changes")
    assert last > KILLS
