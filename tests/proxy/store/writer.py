"""A process that commits until it is killed, and says what it was told was committed.

    python -m tests.proxy.store.writer FILE NAME SEED [DIES_AFTER]

It puts its number, which counts up, at ``count/NAME`` and at a few random keys; each line of its output is
"NUMBER REVISION". With DIES_AFTER it kills itself between that many commits' last one and its notification.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import trio

from proxy.store.interface import ConflictError, Delete, Expect, Operation, Put, StoreUnavailableError
from proxy.store.sqlite import SqliteStore, open_store


class DyingStore(SqliteStore):
    """Dies where a commit is done and nobody has been told."""

    commits_left = 0

    def _tell_if_new(self) -> None:
        self.commits_left -= 1
        if self.commits_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._tell_if_new()


async def main(path: Path, name: str, seed: int, dies_after: int | None) -> None:
    dice = random.Random(seed)
    store = await open_store(path)
    if dies_after is not None:
        store.__class__ = DyingStore
        assert isinstance(store, DyingStore)
        store.commits_left = dies_after
    entry = await store.get(f"count/{name}")
    number = 1 + int(entry.value) if entry is not None else 0
    while True:
        value = b"%d" % number
        operations: list[Operation] = [Put(f"count/{name}", value)]
        for key in dice.sample(range(20), dice.randint(0, 3)):
            value = b"%d " % number + dice.randbytes(dice.choice([10, 10, 20_000]))
            operations.append(
                Delete(f"data/{name}/{key}") if dice.random() < 0.2 else Put(f"data/{name}/{key}", value)
            )
        expect = [Expect(f"count/{name}", 999_999_999)] if dice.random() < 0.1 else []
        try:
            revision = await store.commit(operations, expect, durable=dice.random() < 0.02)
        except ConflictError:
            continue
        except StoreUnavailableError:  # locked for long, while a dead process's file is recovered
            continue
        print(number, revision, flush=True)
        number += 1


if __name__ == "__main__":
    path, name, seed, *rest = sys.argv[1:]
    trio.run(main, Path(path), name, int(seed), int(rest[0]) if rest else None)
